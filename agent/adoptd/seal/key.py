"""Seals that are HS256 tokens under a key file that all nodes share.

Owns the scheme's claims and the key. Must never take a token for another audience. Made by
:func:`adoptd.seal.open_seal`; what makes a token genuine, fresh and new is in :mod:`adoptd.seal.token`.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Callable, Optional, Tuple

from adoptd.model import ProtocolError
from adoptd.seal.key_file import KEY_MAX_BYTES, key_file_error, read_key_file
from adoptd.seal.token import Tokens, decoded, encoded
from adoptd.seal.values import SEALED_MAX_BYTES, Opened, SealError, SealFault, check_payload, check_ttl

__all__ = ["KEY_MAX_BYTES", "KeySeal"]

# Without this claim, a site that shares one key with another user of HS256 would have each take the other's tokens.
AUDIENCE = "adoptd"

# Exactly these claims, beside those of every token. body: the payload in base64url without padding, like the parts of
# the token.
_CLAIMS = frozenset({"aud", "body"})


class KeySeal:
    """HS256 tokens under the key in ``path``, good for ``ttl_s`` seconds, by the rules of :class:`Tokens`.

    ``Opened.uid`` is the key file's owner, root on a real node: whoever has sealed could read the key.

    Raises SealError(UNAVAILABLE) naming the path, what was found and what was expected; ValueError if
    ttl_s is out of range.
    """

    scheme = "key"
    may_block = False

    def __init__(
        self,
        path: Path,
        ttl_s: int,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        replay_capacity: Optional[int] = None,
    ) -> None:
        check_ttl(ttl_s)
        key, self._owner_uid = read_key_file(path)
        self._key: Optional[bytes] = key
        self.identity: Tuple[object, ...] = (self.scheme, ttl_s, self._owner_uid, hashlib.sha256(key).digest())
        self._tokens = Tokens(_CLAIMS, ttl_s, clock, monotonic, replay_capacity)
        refusal = self._tokens.refusal_of(key)
        if refusal is not None:
            raise key_file_error(path, f"a key that PyJWT refuses ({refusal})")

    def seal(self, payload: bytes, reader_uid: int = 0) -> bytes:
        """A token for any holder of the key. Raises SealError, also for a reader who cannot be one."""
        key = self._live_key()
        check_payload(payload)
        if reader_uid not in (0, self._owner_uid):
            raise SealError(SealFault.FOREIGN, f"uid {reader_uid} cannot read the key, so could not open this")
        return self._tokens.sign({"aud": AUDIENCE, "body": encoded(payload)}, key)

    def open(self, sealed: bytes) -> Opened:
        """The content of a genuine token, fresh and never opened before. Raises SealError."""
        key = self._live_key()
        try:
            token = self._tokens.verify(sealed, lambda kid: key)
            if token.fields.text("aud", 64) != AUDIENCE:
                raise SealError(SealFault.FOREIGN, "token is for another audience")
            payload = decoded("body", token.fields.text("body", SEALED_MAX_BYTES).encode("ascii"))
        except ProtocolError as error:
            raise SealError(SealFault.BAD_SEAL, str(error)) from None
        check_payload(payload)
        self._tokens.admit(token)
        return Opened(payload, self._owner_uid, None, token.issued_at)

    def close(self) -> None:
        """Let go of the key. A call under way in another thread ends as if before."""
        self._key = None

    def _live_key(self) -> bytes:
        # Handed down rather than read again: an empty key, were there one, would verify forgeries.
        key = self._key
        if key is None:
            raise SealError(SealFault.UNAVAILABLE, "the key seal is closed")
        return key
