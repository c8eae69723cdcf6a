"""Seals that are HS256 tokens (RFC 7515, RFC 7518 3.2) under a key file that all nodes share.

Owns the key, the token's layout and its replay cache. Must never take a token whose algorithm, header,
claims or spelling differ from what is written here. Made by :func:`adoptd.seal.open_seal`. PyJWT signs
and verifies, nothing else: its claim checks read the system's clock and vary with its version.
"""

from __future__ import annotations

import base64
import binascii
import errno
import os
import re
import secrets
import stat
import time
from pathlib import Path
from typing import Callable, Dict, Optional, Protocol, Tuple, cast

import jwt

from adoptd.model import ProtocolError
from adoptd.seal.replay import Admission, ReplayCache
from adoptd.seal.values import SEALED_MAX_BYTES, Opened, SealError, SealFault, check_payload, check_sealed, check_ttl
from adoptd.wire.strict_json import Fields, decode_object, encode_object

ALGORITHM = "HS256"

# Without this claim, a site that shares one key with another user of HS256 (Slurm's auth/slurm is one)
# would have each take the other's tokens.
AUDIENCE = "adoptd"

# RFC 7518, 3.2: a key is at least as long as the hash. The upper bound is what a key file can sensibly be.
KEY_MIN_BYTES = 32
KEY_MAX_BYTES = 4096

# With the default ttl_s of 10, 6,500 tokens a second for ever: more than one core can open. 13 MB when full.
REPLAY_CAPACITY = 65536

# A token is HEADER.CLAIMS.SIGNATURE, each in base64url without padding, the header one of these two.
_HEADERS: Tuple[Dict[str, object], ...] = ({"alg": ALGORITHM, "typ": "JWT"}, {"alg": ALGORITHM})

# Exactly these claims. iat and exp: seconds since 1970, to the microsecond, so that one sealed just after
# a start is told from one sealed just before it. jti: 128 random bits in hex. body: the payload in base64url without
# padding, like the parts of the token.
_CLAIMS = frozenset({"aud", "iat", "exp", "jti", "body"})

# A 32-byte signature is 43 characters, the last of which has two unused bits. Base64 decoders ignore
# those, and characters they do not know: this pattern allows the one spelling that a signer writes.
_TOKEN = re.compile(rb"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]")
_JTI = re.compile(r"[0-9a-f]{32}")

# A token that finds the cache full of live ones is honest as far as anyone can tell: the fault is here.
_NOT_ADMITTED = {
    Admission.SEEN: SealFault.REPLAYED,
    Admission.EXPIRED: SealFault.EXPIRED,
    Admission.FULL: SealFault.UNAVAILABLE,
}


class _Jws(Protocol):
    """What is used of jwt.PyJWS. Its annotations say the key is text in some versions; bytes work in all."""

    def encode(self, payload: bytes, key: bytes, algorithm: str) -> str: ...

    def decode_complete(self, jwt: str, key: bytes, algorithms: Tuple[str, ...]) -> Dict[str, object]: ...


class KeySeal:
    """HS256 tokens under the key in ``path``, good for ``ttl_s`` seconds.

    ``clock`` is seconds since 1970, ``monotonic`` seconds on a clock that is never set. A token is
    opened once, while ``iat`` is at most ttl_s old by our clock, and at most ttl_s in the future, as
    munged has it: so both clocks of a pair of nodes may differ by just under ttl_s.

    Tokens from before this object was made are refused as REPLAYED: the one before it may have opened
    them, and its memory is gone. No honest token is lost, as its TCP connection ended with the old
    process; only, for a moment after a start, a sealer whose clock is behind ours is refused by as
    much as it is behind. A sealer whose clock is ahead can be replayed across a restart for as long as
    it is ahead: the nonce in the payload makes that of no use for an answer. The rule ends 2 * ttl_s
    after the start, when freshness alone refuses all earlier tokens: a clock that was far ahead at boot
    and then set right must not refuse everybody until it has caught up.

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
        replay_capacity: int = REPLAY_CAPACITY,
    ) -> None:
        check_ttl(ttl_s)
        key, self._owner_uid = _read_key(path)
        self._key: Optional[bytes] = key
        self._ttl_s = ttl_s
        self._clock = clock
        self._monotonic = monotonic
        self._replays = ReplayCache(replay_capacity, clock)
        # No other algorithm is even registered, so that no header can ask for one.
        self._jws = cast(_Jws, jwt.PyJWS(algorithms=[ALGORITHM]))
        try:
            self._jws.encode(b"{}", key, algorithm=ALGORITHM)
        except jwt.PyJWTError as error:
            # PyJWT refuses what looks like a public key or a JWK: published, or a container of keys.
            raise _key_error(path, f"a key that PyJWT refuses ({error})") from None
        self._started_at = _to_microseconds(clock())
        self._started_monotonic_s = monotonic()

    def seal(self, payload: bytes, reader_uid: int = 0) -> bytes:
        """A token for any holder of the key. Raises SealError, also for a reader who cannot be one."""
        key = self._live_key()
        check_payload(payload)
        if reader_uid not in (0, self._owner_uid):
            raise SealError(SealFault.FOREIGN, f"uid {reader_uid} cannot read the key, so could not open this")
        issued_at = _to_microseconds(self._clock())
        claims: Dict[str, object] = {
            "aud": AUDIENCE,
            "iat": issued_at,
            "exp": _to_microseconds(issued_at + self._ttl_s),
            "jti": secrets.token_hex(16),
            "body": base64.urlsafe_b64encode(payload).rstrip(b"=").decode("ascii"),
        }
        return self._jws.encode(encode_object(claims), key, algorithm=ALGORITHM).encode("ascii")

    def open(self, sealed: bytes) -> Opened:
        """The content of a genuine token, fresh and never opened before. Raises SealError."""
        key = self._live_key()
        check_sealed(sealed)
        try:
            claims = decode_object(self._verified(sealed, key), "token")
            fields = Fields(claims, _CLAIMS, "token")
            if fields.text("aud", 64) != AUDIENCE:
                raise SealError(SealFault.FOREIGN, "token is for another audience")
            issued_at, expires_at = _instant(claims, "iat"), _instant(claims, "exp")
            nonce = fields.text("jti", 32)
            if not _JTI.fullmatch(nonce):
                raise ProtocolError("token: jti is not 32 lower-case hex digits")
            payload = _decoded("body", fields.text("body", SEALED_MAX_BYTES).encode("ascii"))
        except ProtocolError as error:
            raise SealError(SealFault.BAD_SEAL, str(error)) from None
        check_payload(payload)
        expires_at = min(expires_at, issued_at + self._ttl_s)
        self._check_fresh(issued_at, expires_at)
        self._check_first(nonce, issued_at, expires_at)
        return Opened(payload, self._owner_uid, None)

    def close(self) -> None:
        """Let go of the key. A call under way in another thread ends as if before."""
        self._key = None

    def _live_key(self) -> bytes:
        # Handed down rather than read again: an empty key, were there one, would verify forgeries.
        key = self._key
        if key is None:
            raise SealError(SealFault.UNAVAILABLE, "the key seal is closed")
        return key

    def _verified(self, sealed: bytes, key: bytes) -> bytes:
        token = _TOKEN.fullmatch(sealed)
        if token is None:
            raise ProtocolError(f"{len(sealed)} bytes that are not an {ALGORITHM} token")
        # Before the signature: PyJWT honours header fields (b64, crit) that change what is signed.
        if decode_object(_decoded("header", token[1]), "token header") not in _HEADERS:
            raise ProtocolError(f"token header is not that of {ALGORITHM}")
        try:
            verified = self._jws.decode_complete(sealed.decode("ascii"), key, algorithms=(ALGORITHM,))
        except jwt.PyJWTError as error:
            raise ProtocolError(f"token is refused: {error}") from None
        claims = verified["payload"]
        if not isinstance(claims, bytes):
            raise ProtocolError("token has no claims")
        return claims

    def _check_fresh(self, issued_at: float, expires_at: float) -> None:
        now = self._clock()
        if now >= expires_at:
            raise SealError(SealFault.EXPIRED, f"token expired {now - expires_at:.3f} s ago")
        if issued_at - now > self._ttl_s:
            raise SealError(SealFault.REWOUND, f"token is {issued_at - now:.3f} s in the future, at most {self._ttl_s}")

    def _check_first(self, nonce: str, issued_at: float, expires_at: float) -> None:
        # Equal is admitted: nothing seals, sends, opens, dies and starts again within a microsecond.
        if issued_at < self._started_at and self._monotonic() - self._started_monotonic_s <= 2 * self._ttl_s:
            raise SealError(SealFault.REPLAYED, "token is from before this start and may have been opened then")
        admission = self._replays.offer(nonce, expires_at)
        if admission is not Admission.NEW:
            raise SealError(_NOT_ADMITTED[admission], f"token is not admitted: {admission.value}")


def _read_key(path: Path) -> Tuple[bytes, int]:
    """The key and the uid of the file's owner."""
    try:
        # O_NONBLOCK: opening a FIFO would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        found = "a symbolic link" if error.errno == errno.ELOOP else f"not to be opened ({error.strerror})"
        raise _key_error(path, found) from None
    try:
        # The checks are on what was opened, not on what the path names by then.
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _key_error(path, "not a regular file")
        if status.st_uid not in (0, os.geteuid()):
            raise _key_error(path, f"owned by uid {status.st_uid}")
        if status.st_mode & 0o077:
            raise _key_error(path, f"of mode {stat.S_IMODE(status.st_mode):04o}")
        key = os.read(descriptor, KEY_MAX_BYTES + 1)
    except OSError as error:
        raise _key_error(path, f"not to be read ({error.strerror})") from None
    finally:
        os.close(descriptor)
    if not KEY_MIN_BYTES <= len(key) <= KEY_MAX_BYTES:
        size = f"more than {KEY_MAX_BYTES}" if len(key) > KEY_MAX_BYTES else str(len(key))
        raise _key_error(path, f"{size} bytes long")
    return key, status.st_uid


def _key_error(path: Path, found: str) -> SealError:
    expected = (
        f"a regular file of root or uid {os.geteuid()}, mode 0600 or 0400, of {KEY_MIN_BYTES} to {KEY_MAX_BYTES} bytes"
    )
    return SealError(SealFault.UNAVAILABLE, f"key file {path} is {found}; expected {expected}")


def _to_microseconds(seconds: float) -> float:
    return round(seconds, 6)


def _instant(claims: Dict[str, object], key: str) -> float:
    value = claims[key]
    # Below 2**33 (the year 2242) a double still holds microseconds.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**33:
        raise ProtocolError(f"token: {key} is not a number of seconds since 1970")
    return float(value)


def _decoded(what: str, text: bytes) -> bytes:
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        raise ProtocolError(f"token: {what} is not base64") from None
