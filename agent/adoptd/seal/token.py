"""HS256 tokens (RFC 7515, RFC 7518 3.2): their layout, freshness and single use, whatever scheme they are of.

Owns the header, the claims iat, exp and jti, and the replay cache. Must never take a token whose algorithm, header,
claims or spelling differ from what is written here. PyJWT signs and verifies, nothing else: its claim checks read the
system's clock and vary with its version. Called by the key and slurm schemes.
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from dataclasses import dataclass
from typing import Callable, Dict, FrozenSet, Mapping, Optional, Protocol, Tuple, cast

import jwt

from adoptd.model import ProtocolError
from adoptd.seal.replay import Admission, ReplayCache, capacity_for
from adoptd.seal.values import SealError, SealFault, check_sealed
from adoptd.wire.strict_json import Fields, decode_object, encode_object

ALGORITHM = "HS256"

# A token is HEADER.CLAIMS.SIGNATURE, each in base64url without padding, the header one of these two, with "kid" beside
# where the scheme has several keys.
_HEADERS: Tuple[Dict[str, object], ...] = ({"alg": ALGORITHM, "typ": "JWT"}, {"alg": ALGORITHM})
KID_MAX = 128

# iat and exp: seconds since 1970, to the microsecond, so that one sealed just after a start is told from one sealed
# just before it. jti: 128 random bits in hex.
_OWN_CLAIMS = frozenset({"iat", "exp", "jti"})

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

    def encode(self, payload: bytes, key: bytes, algorithm: str, headers: Optional[Dict[str, str]]) -> str: ...

    def decode_complete(self, jwt: str, key: bytes, algorithms: Tuple[str, ...]) -> Dict[str, object]: ...


@dataclass(frozen=True)
class Token:
    """A genuine token. ``fields`` are its claims, iat and exp read and not yet judged."""

    fields: Fields
    nonce: str
    issued_at: float
    expires_at: float


class Tokens:
    """Makes and judges the tokens of one scheme, whose own claims are ``claims``, good for ``ttl_s`` seconds.

    ``clock`` is seconds since 1970, ``monotonic`` seconds on a clock that is never set. A token is
    admitted once, while ``iat`` is at most ttl_s old by our clock, and at most ttl_s in the future, as
    munged has it: so both clocks of a pair of nodes may differ by just under ttl_s.

    Tokens from before this object was made are refused as REPLAYED: the one before it may have opened
    them, and its memory is gone. No honest token is lost, as its TCP connection ended with the old
    process; only, for a moment after a start, a sealer whose clock is behind ours is refused by as
    much as it is behind. A sealer whose clock is ahead can be replayed across a restart for as long as
    it is ahead: the nonce in the payload makes that of no use for an answer. The rule ends 2 * ttl_s
    after the start, when freshness alone refuses all earlier tokens: a clock that was far ahead at boot
    and then set right must not refuse everybody until it has caught up.
    """

    def __init__(
        self,
        claims: FrozenSet[str],
        ttl_s: int,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        replay_capacity: Optional[int],
        has_kid: bool = False,
    ) -> None:
        self._claims = claims | _OWN_CLAIMS
        self._ttl_s = ttl_s
        self._clock = clock
        self._monotonic = monotonic
        self._has_kid = has_kid
        # A token's life is ttl_s from iat, which may be as far ahead of our clock.
        self._replays = ReplayCache(replay_capacity or capacity_for(2 * ttl_s), clock)
        # No other algorithm is even registered, so that no header can ask for one.
        self._jws = cast(_Jws, jwt.PyJWS(algorithms=[ALGORITHM]))
        self._started_at = _to_microseconds(clock())
        self._started_monotonic_s = monotonic()

    def refusal_of(self, key: bytes) -> Optional[str]:
        """Why PyJWT refuses ``key``, None if it does not: what looks like a public key, or like a container of keys."""
        try:
            self._jws.encode(b"{}", key, algorithm=ALGORITHM, headers=None)
        except jwt.PyJWTError as error:
            return str(error)
        return None

    def sign(self, claims: Mapping[str, object], key: bytes, kid: Optional[str] = None) -> bytes:
        """A token of ``claims``, with iat, exp and jti of now."""
        issued_at = _to_microseconds(self._clock())
        whole = {
            **claims,
            "iat": issued_at,
            "exp": _to_microseconds(issued_at + self._ttl_s),
            "jti": secrets.token_hex(16),
        }
        headers = None if kid is None else {"kid": kid}
        return self._jws.encode(encode_object(whole), key, algorithm=ALGORITHM, headers=headers).encode("ascii")

    def verify(self, sealed: bytes, key_of: Callable[[Optional[str]], bytes]) -> Token:
        """The token, if the key that ``key_of`` gives for its kid has signed it. Raises SealError, ProtocolError."""
        check_sealed(sealed)
        token = _TOKEN.fullmatch(sealed)
        if token is None:
            raise ProtocolError(f"{len(sealed)} bytes that are not an {ALGORITHM} token")
        # Before the signature: PyJWT honours header fields (b64, crit) that change what is signed.
        header = decode_object(decoded("header", token[1]), "token header")
        kid = header.pop("kid", None) if self._has_kid else None
        if kid is not None and (not isinstance(kid, str) or not 1 <= len(kid) <= KID_MAX):
            raise ProtocolError(f"token header: kid is not a string of 1 to {KID_MAX} characters")
        if header not in _HEADERS:
            raise ProtocolError(f"token header is not that of {ALGORITHM}")
        key = key_of(kid)
        try:
            verified = self._jws.decode_complete(sealed.decode("ascii"), key, algorithms=(ALGORITHM,))
        except jwt.PyJWTError as error:
            raise ProtocolError(f"token is refused: {error}") from None
        body = verified["payload"]
        if not isinstance(body, bytes):
            raise ProtocolError("token has no claims")
        claims = decode_object(body, "token")
        fields = Fields(claims, self._claims, "token")
        nonce = fields.text("jti", 32)
        if not _JTI.fullmatch(nonce):
            raise ProtocolError("token: jti is not 32 lower-case hex digits")
        return Token(fields, nonce, _instant(claims, "iat"), _instant(claims, "exp"))

    def admit(self, token: Token) -> None:
        """Raises SealError unless ``token`` is fresh and was never admitted before."""
        now = self._clock()
        expires_at = min(token.expires_at, token.issued_at + self._ttl_s)
        if now >= expires_at:
            raise SealError(SealFault.EXPIRED, f"token expired {now - expires_at:.3f} s ago")
        ahead_s = token.issued_at - now
        if ahead_s > self._ttl_s:
            raise SealError(SealFault.REWOUND, f"token is {ahead_s:.3f} s in the future, at most {self._ttl_s}")
        # Equal is admitted: nothing seals, sends, opens, dies and starts again within a microsecond.
        if token.issued_at < self._started_at and self._monotonic() - self._started_monotonic_s <= 2 * self._ttl_s:
            raise SealError(SealFault.REPLAYED, "token is from before this start and may have been opened then")
        admission = self._replays.offer(token.nonce, expires_at)
        if admission is not Admission.NEW:
            raise SealError(_NOT_ADMITTED[admission], f"token is not admitted: {admission.value}")


def encoded(data: bytes) -> str:
    """``data`` in base64url without padding, like the parts of a token."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def decoded(what: str, text: bytes) -> bytes:
    """The bytes of base64url without padding. Raises ProtocolError."""
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        raise ProtocolError(f"token: {what} is not base64") from None


def _to_microseconds(seconds: float) -> float:
    return round(seconds, 6)


def _instant(claims: Dict[str, object], key: str) -> float:
    value = claims[key]
    # Below 2**33 (the year 2242) a double still holds microseconds.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**33:
        raise ProtocolError(f"token: {key} is not a number of seconds since 1970")
    return float(value)
