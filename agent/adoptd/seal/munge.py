"""Seals that are MUNGE credentials, made and opened by the host's munged through libmunge.

Owns every call into libmunge and all memory that crosses it. Must never return a payload unless the
library said success: for an expired, rewound or replayed credential it hands the payload out as well.
Made by :func:`adoptd.seal.open_seal`. The Python package "munge" on PyPI is an unrelated project.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import re
import threading
import weakref
from ipaddress import IPv4Address
from typing import Optional, Tuple

from adoptd.model import UID_MAX
from adoptd.seal.values import Opened, SealError, SealFault, check_payload, check_sealed, check_ttl

# The library's ABI version; the same name on every distribution since MUNGE 0.5.
LIBRARY = "libmunge.so.2"

# munge_err_t in munge.h, unchanged since 0.5.0. Whatever is not listed is refused as a bad seal.
_SUCCESS = 0
_FAULTS = {
    1: SealFault.UNAVAILABLE,  # EMUNGE_SNAFU
    2: SealFault.BAD_SEAL,  # EMUNGE_BAD_ARG
    3: SealFault.TOO_LARGE,  # EMUNGE_BAD_LENGTH
    4: SealFault.UNAVAILABLE,  # EMUNGE_OVERFLOW: the socket's path is too long
    5: SealFault.UNAVAILABLE,  # EMUNGE_NO_MEMORY
    6: SealFault.UNAVAILABLE,  # EMUNGE_SOCKET
    7: SealFault.UNAVAILABLE,  # EMUNGE_TIMEOUT
    8: SealFault.BAD_SEAL,  # EMUNGE_BAD_CRED
    9: SealFault.BAD_SEAL,  # EMUNGE_BAD_VERSION
    10: SealFault.BAD_SEAL,  # EMUNGE_BAD_CIPHER
    11: SealFault.BAD_SEAL,  # EMUNGE_BAD_MAC
    12: SealFault.BAD_SEAL,  # EMUNGE_BAD_ZIP
    13: SealFault.BAD_SEAL,  # EMUNGE_BAD_REALM
    14: SealFault.BAD_SEAL,  # EMUNGE_CRED_INVALID
    15: SealFault.EXPIRED,  # EMUNGE_CRED_EXPIRED
    16: SealFault.REWOUND,  # EMUNGE_CRED_REWOUND
    17: SealFault.REPLAYED,  # EMUNGE_CRED_REPLAYED
    18: SealFault.FOREIGN,  # EMUNGE_CRED_UNAUTHORIZED
}

# munge_opt_t in munge.h.
_OPT_TTL = 4
_OPT_ADDR4 = 5
_OPT_ENCODE_TIME = 6
_OPT_DECODE_TIME = 7
_OPT_SOCKET = 8
_OPT_UID_RESTRICTION = 9

# The armour munged writes. The library takes a C string and munged skips blanks: without this, bytes
# after a NUL, or blanks between, would be part of the seal for us and not for them.
_CREDENTIAL = re.compile(rb"MUNGE:([A-Za-z0-9+/]+={0,2}):")


class MungeSeal:
    """Credentials of the munged at ``socket`` (None: libmunge's default), good for ``ttl_s`` seconds.

    ``ttl_s`` bounds both what is sealed here and the age of what is opened here, whatever time to live
    the sealer chose. A sealer's clock may be ahead of ours by as much (munged, dec.c).

    ``Opened.uid`` is the uid of the process that sealed: any local user can. ``Opened.address`` is what
    the sealer's munged takes for its host's address: one of several, or a loopback one; a hint, not to be
    compared with the address the message came from. munged forgets what it opened when it restarts: a
    nonce inside the payload covers the seconds until then.

    The library waits for munged by itself and cannot be told how long. Measured with 0.5.15: no socket,
    at once; a socket nobody listens on, 2.3 s (10 attempts, each 50 ms further apart); a munged that is
    stopped or hangs, 10.1 s (5 attempts of 2 s). So the caller runs seal() and open() in a bounded pool
    of threads, and keeps its own deadline whether or not they have come back.

    Raises SealError(UNAVAILABLE) if the library is not installed, ValueError if ttl_s is out of range.
    Whether munged answers is found out by each call.
    """

    scheme = "munge"
    may_block = True

    def __init__(self, socket: Optional[str], ttl_s: int) -> None:
        check_ttl(ttl_s)
        self._library = _Library()
        self._socket = socket
        self._ttl_s = ttl_s
        self.identity: Tuple[object, ...] = (self.scheme, socket, ttl_s)
        self._closed = False
        # A context used by two threads at once fails with EMUNGE_SNAFU, or worse: each thread has its own.
        # They are freed when the last reference goes: with their thread, or in close() once no call uses them.
        self._local = threading.local()

    def seal(self, payload: bytes, reader_uid: int = 0) -> bytes:
        """A credential that only ``reader_uid`` can open, not even root if it is another. Raises SealError."""
        check_payload(payload)
        if not 0 <= reader_uid <= UID_MAX:
            raise ValueError(f"reader_uid {reader_uid} is no uid")
        library = self._library
        context = self._contexts().encoder
        library.set_option(context, _OPT_UID_RESTRICTION, ctypes.c_uint32(reader_uid))
        credential = ctypes.c_void_p()
        try:
            code = library.encode(ctypes.byref(credential), context.pointer, payload, len(payload))
            if code != _SUCCESS or not credential.value:
                raise library.error(context, code, "munge_encode")
            sealed = ctypes.string_at(credential.value)
        finally:
            library.free(credential)
        check_sealed(sealed)
        return sealed

    def open(self, sealed: bytes) -> Opened:
        """The content of a credential made for our uid, fresh and never opened before. Raises SealError."""
        check_sealed(sealed)
        _check_armour(sealed)
        library = self._library
        context = self._contexts().decoder
        buffer = ctypes.c_void_p()
        length = ctypes.c_int()
        uid, gid = ctypes.c_uint32(), ctypes.c_uint32()
        try:
            code = library.decode(
                sealed,
                context.pointer,
                ctypes.byref(buffer),
                ctypes.byref(length),
                ctypes.byref(uid),
                ctypes.byref(gid),
            )
            if code != _SUCCESS:
                raise library.error(context, code, "munge_decode")
            payload = ctypes.string_at(buffer.value, length.value) if buffer.value and length.value > 0 else b""
        finally:
            library.free(buffer)
        check_payload(payload)
        if uid.value > UID_MAX:
            raise SealError(SealFault.BAD_SEAL, f"credential of uid {uid.value}, which is no uid")
        sealed_at_s = self._check_fresh(context)
        address = library.address(context)
        return Opened(payload, uid.value, address if int(address) else None, sealed_at_s)

    def close(self) -> None:
        """Free the contexts. A call under way in another thread ends first and frees its own."""
        self._closed = True
        self._local = threading.local()

    def _contexts(self) -> _Contexts:
        if self._closed:
            raise SealError(SealFault.UNAVAILABLE, "the MUNGE seal is closed")
        contexts: Optional[_Contexts] = getattr(self._local, "contexts", None)
        if contexts is None:
            contexts = _Contexts(self._library, self._socket, self._ttl_s)
            self._local.contexts = contexts
        return contexts

    def _check_fresh(self, context: _Context) -> int:
        """When it was sealed, by the sealer's clock. Raises SealError."""
        sealed_at_s = self._library.time(context, _OPT_ENCODE_TIME)
        # The sealer chose the credential's time to live, up to munged's own maximum of an hour.
        age_s = self._library.time(context, _OPT_DECODE_TIME) - sealed_at_s
        if age_s > self._ttl_s:
            raise SealError(SealFault.EXPIRED, f"credential is {age_s} s old, at most {self._ttl_s}")
        if -age_s > self._ttl_s:
            raise SealError(SealFault.REWOUND, f"credential is {-age_s} s in the future, at most {self._ttl_s}")
        return sealed_at_s


def _check_armour(sealed: bytes) -> None:
    armour = _CREDENTIAL.fullmatch(sealed)
    if armour is None:
        raise SealError(SealFault.BAD_SEAL, f"{len(sealed)} bytes that are not a MUNGE credential")
    try:
        # One spelling per credential: the unused bits of the last character must be zero.
        canonical = base64.b64encode(base64.b64decode(armour[1], validate=True)) == armour[1]
    except binascii.Error:
        canonical = False
    if not canonical:
        raise SealError(SealFault.BAD_SEAL, "MUNGE credential is not in canonical base64")


class _Context:
    """One munge_ctx, destroyed with this object."""

    def __init__(self, library: _Library) -> None:
        self.pointer = ctypes.c_void_p(library.ctx_create())
        if not self.pointer.value:
            raise SealError(SealFault.UNAVAILABLE, "libmunge is out of memory")
        # Not at exit: a thread may still be in a call then, and the process gives the memory back anyway.
        weakref.finalize(self, library.ctx_destroy, self.pointer).atexit = False


class _Contexts:
    """A thread's two contexts: decoding overwrites the options that encoding reads (munge.h)."""

    def __init__(self, library: _Library, socket: Optional[str], ttl_s: int) -> None:
        self.encoder = _Context(library)
        self.decoder = _Context(library)
        library.set_option(self.encoder, _OPT_TTL, ctypes.c_int(ttl_s))
        if socket is not None:
            for context in (self.encoder, self.decoder):
                library.set_option(context, _OPT_SOCKET, ctypes.c_char_p(socket.encode("utf-8", "surrogateescape")))


class _Library:
    """libmunge's functions with their C types, and free() for what they allocate."""

    def __init__(self) -> None:
        try:
            munge = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise SealError(SealFault.UNAVAILABLE, f"{LIBRARY} cannot be loaded: {error}") from None
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        self.ctx_create = munge.munge_ctx_create
        self.ctx_create.argtypes, self.ctx_create.restype = (), pointer
        self.ctx_destroy = munge.munge_ctx_destroy
        self.ctx_destroy.argtypes, self.ctx_destroy.restype = (pointer,), None
        self.encode = munge.munge_encode
        self.encode.argtypes, self.encode.restype = (pointer, pointer, ctypes.c_char_p, integer), integer
        self.decode = munge.munge_decode
        self.decode.argtypes = (ctypes.c_char_p, pointer, pointer, pointer, pointer, pointer)
        self.decode.restype = integer
        self.strerror = munge.munge_strerror
        self.strerror.argtypes, self.strerror.restype = (integer,), ctypes.c_char_p
        self._ctx_strerror = munge.munge_ctx_strerror
        self._ctx_strerror.argtypes, self._ctx_strerror.restype = (pointer,), ctypes.c_char_p
        # Both take their last argument through "...": ctypes passes it as it is typed by the caller.
        self._ctx_get = munge.munge_ctx_get
        self._ctx_get.argtypes, self._ctx_get.restype = (pointer, integer), integer
        self._ctx_set = munge.munge_ctx_set
        self._ctx_set.argtypes, self._ctx_set.restype = (pointer, integer), integer
        # The process's own free(): the one libmunge's malloc() belongs to. free(NULL) does nothing.
        self.free = ctypes.CDLL(None).free
        self.free.argtypes, self.free.restype = (pointer,), None

    def set_option(self, context: _Context, option: int, value: object) -> None:
        code = self._ctx_set(context.pointer, option, value)
        if code != _SUCCESS:
            raise self.error(context, code, "munge_ctx_set")

    def time(self, context: _Context, option: int) -> int:
        seconds = ctypes.c_int64()  # time_t
        self._get_option(context, option, ctypes.byref(seconds))
        return seconds.value

    def address(self, context: _Context) -> IPv4Address:
        packed = (ctypes.c_ubyte * 4)()  # struct in_addr, in network byte order
        self._get_option(context, _OPT_ADDR4, ctypes.byref(packed))
        return IPv4Address(bytes(packed))

    def error(self, context: _Context, code: int, what: str) -> SealError:
        text: Optional[bytes] = self._ctx_strerror(context.pointer) or self.strerror(code)
        detail = (text or b"no reason given").decode("ascii", "backslashreplace")
        return SealError(_FAULTS.get(code, SealFault.BAD_SEAL), f"{what}: {detail} (error {code})")

    def _get_option(self, context: _Context, option: int, pointer: object) -> None:
        code = self._ctx_get(context.pointer, option, pointer)
        if code != _SUCCESS:
            raise self.error(context, code, "munge_ctx_get")
