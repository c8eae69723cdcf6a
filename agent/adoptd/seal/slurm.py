"""Seals that are tokens like those of Slurm's auth/slurm (23.11 on), under the site's own slurm.key or slurm.jwks.

Owns the key set and the claims. Must never take a token that Slurm made, nor make one that Slurm would take: both
have the claim "context", which is "auth", "sack" and the like there and "adoptd" here, and both look at it. Slurm's
tokens can be replayed, ours cannot. Made by :func:`adoptd.seal.open_seal`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, FrozenSet, List, Optional, Tuple

from adoptd.model import UID_MAX, ProtocolError
from adoptd.seal.key_file import KEY_MAX_BYTES, KEY_MIN_BYTES, KeyFileRules, key_file_error, read_key_file
from adoptd.seal.token import ALGORITHM, KID_MAX, Tokens
from adoptd.seal.values import SEALED_MAX_BYTES, Opened, SealError, SealFault, check_payload, check_ttl
from adoptd.wire.strict_json import decode_object

CONTEXT = "adoptd"
VERSION = 1

# Those of src/plugins/auth/slurm/internal.c (create_internal), with our "ver", beside iat, exp and our jti. ruid: who
# may open it. payload: base64 with padding.
_CLAIMS = frozenset({"ver", "ruid", "context", "cluster", "uid", "gid", "host", "payload"})
_NAME_MAX = 255

JWKS_SUFFIX = ".jwks"
_JWKS_MAX_BYTES = 65536
_KEYS_MAX = 64


@dataclass(frozen=True)
class _Key:
    kid: Optional[str]
    secret: bytes
    expires_at: Optional[float]


@dataclass(frozen=True)
class _Keys:
    """``default`` signs, and opens what names no key. ``by_kid`` is empty for a slurm.key."""

    default: _Key
    by_kid: Dict[str, _Key]


class SlurmSeal:
    """HS256 tokens under Slurm's key, good for ``ttl_s`` seconds, by the rules of :class:`Tokens`.

    ``path`` is a slurm.jwks if its name ends so, else a slurm.key. Only a token of the same ``cluster`` is opened: a
    site's clusters may share a key, and their job ids mean different jobs. ``Opened.uid`` is what the sealer says of
    itself, among those who can read the key: like Slurm, this takes every holder of the key at its word.

    Raises SealError(UNAVAILABLE) naming the path, what was found and what was expected; ValueError if ttl_s is out of
    range.
    """

    scheme = "slurm"
    may_block = False

    def __init__(
        self,
        path: Path,
        ttl_s: int,
        cluster: str,
        owners: FrozenSet[int] = frozenset(),
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        replay_capacity: Optional[int] = None,
    ) -> None:
        check_ttl(ttl_s)
        if not 1 <= len(cluster) <= _NAME_MAX:
            raise SealError(SealFault.UNAVAILABLE, f"ClusterName {cluster!r} of slurm.conf is no name")
        self._tokens = Tokens(_CLAIMS, ttl_s, clock, monotonic, replay_capacity, has_kid=True)
        keys, owner_uid = _read_keys(path, owners, self._tokens)
        self._keys: Optional[_Keys] = keys
        self._holders = frozenset({0, os.geteuid(), owner_uid})
        self._cluster = cluster
        self.identity: Tuple[object, ...] = (self.scheme, ttl_s, cluster, self._holders, _digest(keys))
        self._host = socket.gethostname().partition(".")[0]
        self._clock = clock

    def seal(self, payload: bytes, reader_uid: int = 0) -> bytes:
        """A token for ``reader_uid``, who must be one of the key's holders. Raises SealError."""
        key = self._live_keys().default
        check_payload(payload)
        if reader_uid not in self._holders:
            raise SealError(SealFault.FOREIGN, f"uid {reader_uid} cannot read the key, so could not open this")
        if self._is_expired(key):
            raise SealError(SealFault.UNAVAILABLE, f"Slurm's key {key.kid} has expired")
        claims = {
            "ver": VERSION,
            "ruid": reader_uid,
            "context": CONTEXT,
            "cluster": self._cluster,
            "uid": os.geteuid(),
            "gid": os.getegid(),
            "host": self._host,
            "payload": base64.b64encode(payload).decode("ascii"),
        }
        return self._tokens.sign(claims, key.secret, key.kid)

    def open(self, sealed: bytes) -> Opened:
        """The content of a genuine token for us, fresh and never opened before. Raises SealError."""
        keys = self._live_keys()
        try:
            token = self._tokens.verify(sealed, lambda kid: self._key_of(keys, kid))
            fields = token.fields
            if fields.text("context", 64) != CONTEXT:
                raise SealError(SealFault.FOREIGN, "token is for another context")
            fields.integer("ver", VERSION, VERSION)
            if fields.text("cluster", _NAME_MAX) != self._cluster:
                raise SealError(SealFault.FOREIGN, "token is of another cluster")
            if fields.integer("ruid", 0, UID_MAX) != os.geteuid():
                raise SealError(SealFault.FOREIGN, "token is for another reader")
            uid = fields.integer("uid", 0, UID_MAX)
            if uid not in self._holders:
                raise SealError(SealFault.FOREIGN, f"token of uid {uid}, who cannot read the key")
            fields.integer("gid", 0, UID_MAX)
            fields.text("host", _NAME_MAX)
            payload = _payload(fields.text("payload", SEALED_MAX_BYTES))
        except ProtocolError as error:
            raise SealError(SealFault.BAD_SEAL, str(error)) from None
        check_payload(payload)
        self._tokens.admit(token)
        return Opened(payload, uid, None, token.issued_at)

    def close(self) -> None:
        """Let go of the keys. A call under way in another thread ends as if before."""
        self._keys = None

    def _live_keys(self) -> _Keys:
        keys = self._keys
        if keys is None:
            raise SealError(SealFault.UNAVAILABLE, "the slurm seal is closed")
        return keys

    def _key_of(self, keys: _Keys, kid: Optional[str]) -> bytes:
        """A slurm.key opens whatever kid a token names, as in Slurm: nodes change over to slurm.jwks one by one."""
        key = keys.by_kid.get(kid) if kid is not None and keys.by_kid else keys.default
        if key is None:
            raise ProtocolError("token names a key that is not in slurm.jwks")
        if self._is_expired(key):
            raise SealError(SealFault.EXPIRED, f"token is under Slurm's key {key.kid}, which has expired")
        return key.secret

    def _is_expired(self, key: _Key) -> bool:
        return key.expires_at is not None and key.expires_at <= self._clock()


def _digest(keys: _Keys) -> bytes:
    """Tells one key set from another, and nothing else of it."""
    listed = [keys.default, *(keys.by_kid[kid] for kid in sorted(keys.by_kid))]
    digests = [(key.kid, key.expires_at, hashlib.sha256(key.secret).hexdigest()) for key in listed]
    return hashlib.sha256(repr(digests).encode()).digest()


def _payload(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ProtocolError("token: payload is not base64") from None


def _read_keys(path: Path, owners: FrozenSet[int], tokens: Tokens) -> Tuple[_Keys, int]:
    is_set = path.name.endswith(JWKS_SUFFIX)
    size = "a JSON Web Key Set" if is_set else f"of {KEY_MIN_BYTES} to {KEY_MAX_BYTES} bytes"
    rules = KeyFileRules(
        f"not for others to read, {size}",
        owners,
        # auth/slurm lets a group read it (S_IRWXO in _check_key_permissions): ours must start wherever Slurm does.
        refused_mode=0o007 | 0o020,
        min_bytes=2 if is_set else KEY_MIN_BYTES,
        max_bytes=_JWKS_MAX_BYTES if is_set else KEY_MAX_BYTES,
    )
    data, owner_uid = read_key_file(path, rules)
    try:
        keys = _parse_set(data) if is_set else _Keys(_Key(None, data, None), {})
    except ProtocolError as error:
        raise key_file_error(path, f"not a key set ({error})", rules) from None
    for key in (keys.default, *keys.by_kid.values()):
        refusal = tokens.refusal_of(key.secret)
        if refusal is not None:
            raise key_file_error(path, f"a key that PyJWT refuses ({refusal})", rules)
    return keys, owner_uid


def _parse_set(data: bytes) -> _Keys:
    """The keys of a slurm.jwks, as auth/slurm reads it. Raises ProtocolError."""
    listed = decode_object(data, "slurm.jwks").get("keys")
    if not isinstance(listed, list) or not 1 <= len(listed) <= _KEYS_MAX:
        raise ProtocolError(f'"keys" is not a list of 1 to {_KEYS_MAX} keys')
    by_kid: Dict[str, _Key] = {}
    defaults: List[_Key] = []
    for entry in listed:
        key, is_default = _parse_key(entry)
        if key.kid is None or key.kid in by_kid:
            raise ProtocolError(f"kid {key.kid!r} is there twice")
        by_kid[key.kid] = key
        defaults += [key] if is_default else []
    if len(defaults) > 1:
        raise ProtocolError("more than one key is the default")
    return _Keys(defaults[0] if defaults else next(iter(by_kid.values())), by_kid)


def _parse_key(entry: object) -> Tuple[_Key, bool]:
    """Unknown fields are passed over, as RFC 7517, 4 asks."""
    if not isinstance(entry, dict):
        raise ProtocolError("a key is not an object")
    kid, secret = entry.get("kid"), entry.get("k")
    if not isinstance(kid, str) or not 1 <= len(kid) <= KID_MAX or not kid.isascii() or not kid.isprintable():
        raise ProtocolError(f"kid is not a string of 1 to {KID_MAX} printable ASCII characters")
    for name, expected in (("kty", "oct"), ("alg", ALGORITHM)):
        value = entry.get(name)
        if not isinstance(value, str) or value.lower() != expected.lower():
            raise ProtocolError(f"{name} of key {kid!r} is not {expected}")
    expires_at = entry.get("exp")
    if expires_at is not None and (isinstance(expires_at, bool) or not isinstance(expires_at, (int, float))):
        raise ProtocolError(f"exp of key {kid!r} is not a number of seconds since 1970")
    use = entry.get("use")
    return _Key(kid, _secret(kid, secret), expires_at), isinstance(use, str) and use.lower() == "default"


def _secret(kid: str, text: object) -> bytes:
    """base64 in either alphabet, padded or not."""
    if not isinstance(text, str) or not text.isascii():
        raise ProtocolError(f"k of key {kid!r} is not base64")
    plain = text.translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        secret = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except binascii.Error:
        raise ProtocolError(f"k of key {kid!r} is not base64") from None
    if not KEY_MIN_BYTES <= len(secret) <= KEY_MAX_BYTES:
        raise ProtocolError(f"key {kid!r} has {len(secret)} bytes, not {KEY_MIN_BYTES} to {KEY_MAX_BYTES}")
    return secret
