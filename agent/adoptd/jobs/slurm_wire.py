"""The protocol of slurmstepd's unix sockets, as bytes: requests and how their replies are read. No I/O.

Owns the numbers, widths and bounds. It must never ask for a byte more than the reply has: there is no
framing, the next reply would be lost. Called by slurm_step, which moves the bytes, and by its double in tests.

A reply is read by a generator: it yields how much it wants next (:class:`Want`), is sent exactly that
(:class:`Got`), and returns the value. Integers are in the host's byte order: both ends are on one host.
Numbers are those of src/common/stepd_api.h, unchanged from Slurm 18.08 to 26.11.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Generator, Optional, Tuple, TypeVar

from adoptd.model import PID_MAX, UID_MAX, ProtocolError

# Protocol versions are N << 8, where N counts releases: 22.05 is 38, 25.11 is 44, 26.11 is 46.
# A step accepts any version that is not older than its own minimum, so the newest we know goes out.
OUR_VERSION = 46 << 8
# From 25.11 on: SLUID and GET_NS_FDS; op 26 may get no reply there when the job has no mount namespace.
VERSION_25_11 = 44 << 8
# 19.05, the first release with this handshake.
VERSION_OLDEST = 34 << 8

# SLURM_EXTERN_CONT since 20.11, and before (0xffffffff).
EXTERN_STEPS = frozenset({4294967292, 4294967295})

# Longest path the kernel takes, and what an authority file's path is in; len includes the NUL (PATH_MAX).
_PATH_MAX = 4096
# A step has one mount, one pid and one user namespace at most; anything far above is no count of ours.
_NAMESPACES_MAX = 16
_NAMESPACE_KINDS = frozenset(
    {0x00000080, 0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000}
)  # CLONE_NEW* of include/uapi/linux/sched.h: time, ns, cgroup, uts, ipc, user, pid, net
CLONE_NEWNS = 0x00020000

_I32 = struct.Struct("=i")
_U32 = struct.Struct("=I")
_U64 = struct.Struct("=Q")


class Op(enum.IntEnum):
    """Requests we send."""

    SLUID = 1
    STATE = 5
    PID_IN_CONTAINER = 8
    UID = 20
    ADD_EXTERN_PID = 22
    X11_DISPLAY = 23
    GET_NS_FD = 26
    GET_NS_FDS = 28


class StepState(enum.Enum):
    """What a step says of itself. ENDING is "cancelled" (4 states, from 23.11) and "ending" (before and after)."""

    NOT_RUNNING = "not_running"
    STARTING = "starting"
    RUNNING = "running"
    ENDING = "ending"


# 3 is "ending" up to 23.02 and "cancelled", on its way there, from 23.11: neither takes a process any more.
_STATES = (StepState.NOT_RUNNING, StepState.STARTING, StepState.RUNNING, StepState.ENDING, StepState.ENDING)


@dataclass(frozen=True)
class Want:
    """What a reply needs next: exactly ``size`` bytes, with a descriptor beside them (SCM_RIGHTS) or without."""

    size: int
    descriptor: bool = False


@dataclass(frozen=True)
class Got:
    """The bytes wanted, and the descriptor that came with them if one was wanted; it is the reader's to close."""

    data: bytes
    descriptor: Optional[int] = None


@dataclass(frozen=True)
class X11Display:
    """Display number of the job's X11 tunnel (DISPLAY=localhost:N.0), and its authority file; None: the user's own."""

    number: int
    authority: Optional[str]


@dataclass(frozen=True)
class Namespace:
    """One namespace of a job: CLONE_NEW* ``kind`` for setns(2), and a descriptor that is the holder's to close."""

    kind: int
    descriptor: int


T = TypeVar("T")
Reply = Generator[Want, Got, T]


def hello(version: int = OUR_VERSION) -> bytes:
    """What a client says first."""
    return _I32.pack(version)


def request(op: Op) -> bytes:
    """A request without an argument."""
    return _I32.pack(op)


def request_about(op: Op, pid: int) -> bytes:
    """A request about a process. Raises ValueError for what is no pid: the step would take it for a group."""
    if not 1 <= pid <= PID_MAX:
        raise ValueError(f"pid {pid} is not in 1..{PID_MAX}")
    return _I32.pack(op) + _I32.pack(pid)


def read_hello() -> Reply[int]:
    """The step's protocol version. Raises ProtocolError if it refuses ours (-1) or speaks an unknown one."""
    version = yield from _i32()
    if version == -1:
        raise ProtocolError(f"step refuses protocol version {OUR_VERSION >> 8}: it is a newer Slurm than is known here")
    if version < VERSION_OLDEST or version > 0xFFFF:
        raise ProtocolError(f"step answers protocol version {version}, expected {VERSION_OLDEST} or more")
    return version


def read_state() -> Reply[StepState]:
    """STATE. Raises ProtocolError."""
    number = yield from _u32()
    if number >= len(_STATES):
        raise ProtocolError(f"step state {number} is not in 0..{len(_STATES) - 1}")
    return _STATES[number]


def read_uid() -> Reply[int]:
    """UID: whose job it is. Raises ProtocolError."""
    uid = yield from _u32()
    if uid > UID_MAX:
        raise ProtocolError(f"step uid {uid} is nobody's")
    return uid


def read_sluid() -> Reply[int]:
    """SLUID, a job's id across clusters and requeues (25.11 on)."""
    got = yield Want(_U64.size)
    value: int = _U64.unpack(got.data)[0]
    return value


def read_contains() -> Reply[bool]:
    """PID_IN_CONTAINER: a C bool, one byte. Raises ProtocolError."""
    got = yield Want(1)
    if got.data not in (b"\0", b"\1"):
        raise ProtocolError(f"step answers {got.data!r} where a truth value is expected")
    return got.data == b"\1"


def read_added() -> Reply[int]:
    """ADD_EXTERN_PID: 0 or an error of Slurm's. 0 proves nothing: not every plugin moves anything."""
    return (yield from _i32())


def read_x11() -> Reply[Optional[X11Display]]:
    """X11_DISPLAY; None if the job has no tunnel. Raises ProtocolError."""
    number = yield from _i32()
    size = yield from _i32()
    if not 0 <= number <= 0xFFFF:
        raise ProtocolError(f"display number {number} is not in 0..65535")
    if not 0 <= size <= _PATH_MAX:
        raise ProtocolError(f"an authority path of {size} bytes")
    authority: Optional[str] = None
    if size:
        path = (yield Want(size)).data
        if path[-1:] != b"\0" or b"\0" in path[:-1]:
            raise ProtocolError("the authority path is not one string with a NUL at its end")
        authority = path[:-1].decode("utf-8", "surrogateescape") or None
    return X11Display(number, authority) if number else None


def read_namespace() -> Reply[Tuple[Namespace, ...]]:
    """GET_NS_FD, up to 25.05: the mount namespace or nothing. The number sent is the step's own descriptor."""
    number = yield from _i32()
    if number <= 0:
        return ()
    got = yield Want(1, descriptor=True)
    if got.descriptor is None:
        raise ProtocolError("step announced a namespace and sent no descriptor")
    return (Namespace(CLONE_NEWNS, got.descriptor),)


def read_namespace_kind_count() -> Reply[int]:
    """GET_NS_FDS, 25.11 on: how many namespaces follow. Raises ProtocolError."""
    count = yield from _u32()
    if count > _NAMESPACES_MAX:
        raise ProtocolError(f"{count} namespaces announced, {_NAMESPACES_MAX} are the most there can be")
    return count


def read_one_namespace() -> Reply[Namespace]:
    """One of the namespaces after the count: its kind, then one byte that carries the descriptor."""
    kind = yield from _i32()
    if kind not in _NAMESPACE_KINDS:
        raise ProtocolError(f"namespace kind {kind:#x} is no CLONE_NEW flag")
    got = yield Want(1, descriptor=True)
    if got.descriptor is None:
        raise ProtocolError("step announced a namespace and sent no descriptor")
    return Namespace(kind, got.descriptor)


def _i32() -> Reply[int]:
    got = yield Want(_I32.size)
    value: int = _I32.unpack(got.data)[0]
    return value


def _u32() -> Reply[int]:
    got = yield Want(_U32.size)
    value: int = _U32.unpack(got.data)[0]
    return value
