"""bpf(2) through ctypes: the few commands the probe needs, and nothing above them.

Owns the layout of bpf_attr and of the *_info records for these commands (include/uapi/linux/bpf.h; all of
them as of 5.9, which later kernels only append to). Every buffer handed to the kernel has an explicit size.
Descriptors returned are O_CLOEXEC, as the kernel makes them, and the caller closes them. Raises OSError
naming the command. Called by the probe's other modules and by the tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from dataclasses import dataclass
from typing import Iterator, Mapping, Optional, Tuple

# include/uapi/linux/bpf.h
MAP_TYPE_HASH = 1
MAP_TYPE_ARRAY = 2
MAP_TYPE_PERCPU_ARRAY = 6
MAP_TYPE_SK_STORAGE = 24
MAP_TYPE_RINGBUF = 27
PROG_TYPE_SCHED_CLS = 3
PROG_TYPE_RAW_TRACEPOINT = 17
PROG_TYPE_CGROUP_SOCK_ADDR = 18
PROG_TYPE_TRACING = 26
LINK_TYPE_RAW_TRACEPOINT = 1
LINK_TYPE_CGROUP = 3
ATTACH_CGROUP_INET4_CONNECT = 10
ATTACH_CGROUP_INET6_CONNECT = 11
ATTACH_TRACE_ITER = 28

_MAP_LOOKUP_ELEM = 1
_MAP_UPDATE_ELEM = 2
_MAP_DELETE_ELEM = 3
_MAP_GET_NEXT_KEY = 4
_OBJ_PIN = 6
_OBJ_GET = 7
_PROG_TEST_RUN = 10
_OBJ_GET_INFO_BY_FD = 15
_RAW_TRACEPOINT_OPEN = 17
_LINK_CREATE = 28
_ITER_CREATE = 33
_LINK_DETACH = 34
_NAMES: Mapping[int, str] = {
    _MAP_LOOKUP_ELEM: "BPF_MAP_LOOKUP_ELEM",
    _MAP_UPDATE_ELEM: "BPF_MAP_UPDATE_ELEM",
    _MAP_DELETE_ELEM: "BPF_MAP_DELETE_ELEM",
    _MAP_GET_NEXT_KEY: "BPF_MAP_GET_NEXT_KEY",
    _OBJ_PIN: "BPF_OBJ_PIN",
    _OBJ_GET: "BPF_OBJ_GET",
    _PROG_TEST_RUN: "BPF_PROG_TEST_RUN",
    _OBJ_GET_INFO_BY_FD: "BPF_OBJ_GET_INFO_BY_FD",
    _RAW_TRACEPOINT_OPEN: "BPF_RAW_TRACEPOINT_OPEN",
    _LINK_CREATE: "BPF_LINK_CREATE",
    _ITER_CREATE: "BPF_ITER_CREATE",
    _LINK_DETACH: "BPF_LINK_DETACH",
}

# bpf's number in each architecture's system call table (arch/*/.../syscall.tbl, asm-generic/unistd.h).
_NUMBERS: Mapping[str, int] = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}


def number_on(machine: str, pointer_bytes: int) -> Optional[int]:
    """bpf's number for a process of that word size on a kernel of uname(2)'s ``machine``; None if it is not known.

    A 32-bit interpreter on a 64-bit kernel has the table of another architecture: 321 is signalfd there.
    """
    return _NUMBERS.get(machine) if pointer_bytes == 8 else None


_NUMBER = number_on(os.uname().machine, struct.calcsize("P"))

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_long]

_OBJECT = struct.Struct("=QII")
_INFO = struct.Struct("=IIQ")
_LOOKUP = struct.Struct("=IIQQQ")
_FOUR = struct.Struct("=IIII")
_TWO = struct.Struct("=II")
_TEST = struct.Struct("=IIIIQQIIIIQQ")
# ctx_size_in, ctx_size_out, ctx_in: bytes 40 to 56 of the above.
_TEST_CONTEXT = struct.Struct("=IIQ")
_TEST_CONTEXT_AT = 40
# Where in struct __sk_buff the network device's index is.
_SKB_IFINDEX_AT = 40
# retval, data_size_in, data_size_out: bytes 4 to 16 of the above.
_TEST_RESULT = struct.Struct("=III")

_PROG_INFO = struct.Struct("=II8sIIQQQIIQ16s")
_MAP_INFO = struct.Struct("=IIIIII16s")
_LINK_INFO = struct.Struct("=III4xQI4x")
# More maps than any program of ours uses; the kernel fills in as many as fit and says how many there are.
_MAP_IDS_MAX = 16
_TRACEPOINT_BYTES = 64


@dataclass(frozen=True)
class ProgInfo:
    """What the kernel says of a program."""

    type: int
    id: int
    name: str
    map_ids: Tuple[int, ...]


@dataclass(frozen=True)
class MapInfo:
    """What the kernel says of a map. Sizes in bytes."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    name: str


@dataclass(frozen=True)
class LinkInfo:
    """What the kernel says of a cgroup link. ``cgroup_id`` is 0 once it is detached."""

    type: int
    id: int
    prog_id: int
    cgroup_id: int
    attach_type: int


def obj_get(path: str) -> int:
    """Open what is pinned at ``path``."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    return _bpf(_OBJ_GET, _attr(_OBJECT.pack(ctypes.addressof(name), 0, 0)))


def obj_pin(fd: int, path: str) -> None:
    """Pin ``fd`` at ``path``, which must not exist."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    _bpf(_OBJ_PIN, _attr(_OBJECT.pack(ctypes.addressof(name), fd, 0)))


def prog_info(fd: int) -> ProgInfo:
    """Raises OSError EINVAL if ``fd`` is not a program (the info of another kind of object is shorter)."""
    ids = (ctypes.c_uint32 * _MAP_IDS_MAX)()
    buffer = ctypes.create_string_buffer(_PROG_INFO.size)
    _PROG_INFO.pack_into(buffer, 0, 0, 0, b"", 0, 0, 0, 0, 0, 0, _MAP_IDS_MAX, ctypes.addressof(ids), b"")
    _info(fd, buffer)
    kind, number, _, _, _, _, _, _, _, count, _, name = _PROG_INFO.unpack_from(buffer)
    return ProgInfo(kind, number, _text(name), tuple(ids[: min(count, _MAP_IDS_MAX)]))


def map_info(fd: int) -> MapInfo:
    """What ``fd``, a map, is. Ask only of a descriptor known to be a map (see :func:`kind_of`)."""
    buffer = ctypes.create_string_buffer(_MAP_INFO.size)
    _info(fd, buffer)
    kind, number, key_size, value_size, max_entries, _, name = _MAP_INFO.unpack_from(buffer)
    return MapInfo(kind, number, key_size, value_size, max_entries, _text(name))


def link_info(fd: int) -> LinkInfo:
    """What ``fd``, a cgroup link, is. Ask only of a descriptor known to be a link (see :func:`kind_of`)."""
    buffer = ctypes.create_string_buffer(_LINK_INFO.size)
    _info(fd, buffer)
    return LinkInfo(*_LINK_INFO.unpack_from(buffer))


def kind_of(fd: int) -> str:
    """``bpf-map``, ``bpf-prog``, ``bpf-link``, or whatever else the descriptor is, in the kernel's words.

    BPF_OBJ_GET returns any of the three and the info records do not say which they describe.
    """
    # "bpf_link" where it was created and "bpf-link" where it was opened (kernel/bpf/syscall.c, 6.18).
    return os.readlink(f"/proc/self/fd/{fd}").replace("anon_inode:", "").strip("[]").replace("_", "-")


def map_lookup(fd: int, key: int, value_bytes: int) -> bytes:
    """The value under a 32-bit key. ``value_bytes`` must be what the kernel will write, all CPUs included."""
    index = ctypes.c_uint32(key)
    value = ctypes.create_string_buffer(value_bytes)
    _bpf(_MAP_LOOKUP_ELEM, _attr(_LOOKUP.pack(fd, 0, ctypes.addressof(index), ctypes.addressof(value), 0)))
    return value.raw


def map_update(fd: int, key: int, value: bytes) -> None:
    """Write the value under a 32-bit key. ``value`` must have the map's size."""
    index = ctypes.c_uint32(key)
    data = ctypes.create_string_buffer(value, len(value))
    _bpf(_MAP_UPDATE_ELEM, _attr(_LOOKUP.pack(fd, 0, ctypes.addressof(index), ctypes.addressof(data), 0)))


def map_delete(fd: int, key: int) -> None:
    """Have nothing under a 32-bit key."""
    index = ctypes.c_uint32(key)
    with contextlib.suppress(FileNotFoundError):
        _bpf(_MAP_DELETE_ELEM, _attr(_LOOKUP.pack(fd, 0, ctypes.addressof(index), 0, 0)))


def map_items(fd: int, value_bytes: int, most: int) -> Iterator[Tuple[int, bytes]]:
    """The 32-bit keys and values of a hash map, at most ``most``. What changes meanwhile may be missed."""
    key, found = None, ctypes.c_uint32()
    for _ in range(most):
        where = 0 if key is None else ctypes.addressof(key)
        try:
            _bpf(_MAP_GET_NEXT_KEY, _attr(_LOOKUP.pack(fd, 0, where, ctypes.addressof(found), 0)))
        except FileNotFoundError:
            return
        key = ctypes.c_uint32(found.value)
        # It may have gone in between.
        with contextlib.suppress(FileNotFoundError):
            yield key.value, map_lookup(fd, key.value, value_bytes)


def raw_tracepoint_open(prog_fd: int, tracepoint: str) -> int:
    """Attach a program to a raw tracepoint. The link lives as long as a descriptor or a pin does (5.7)."""
    name = ctypes.create_string_buffer(tracepoint.encode())
    return _bpf(_RAW_TRACEPOINT_OPEN, _attr(struct.pack("=QI4x", ctypes.addressof(name), prog_fd)))


def raw_tracepoint_info(fd: int) -> Tuple[int, int, str]:
    """Link type, program id and tracepoint of ``fd``, a link. Ask only of one (see :func:`kind_of`)."""
    name = ctypes.create_string_buffer(_TRACEPOINT_BYTES)
    buffer = ctypes.create_string_buffer(_LINK_INFO.size)
    struct.pack_into("=QI", buffer, 16, ctypes.addressof(name), _TRACEPOINT_BYTES)
    _info(fd, buffer)
    kind, _, prog_id = struct.unpack_from("=III", buffer)
    return kind, prog_id, _text(name.raw)


def link_create(prog_fd: int, target_fd: int, attach_type: int) -> int:
    """Attach a program. The link lives as long as a descriptor or a pin does (5.7; iterators 5.8)."""
    return _bpf(_LINK_CREATE, _attr(_FOUR.pack(prog_fd, target_fd, attach_type, 0)))


def link_detach(fd: int) -> None:
    """Detach now (5.9). Dropping the last reference also detaches, but later, from a work queue."""
    _bpf(_LINK_DETACH, _attr(struct.pack("=I", fd)))


def iter_create(link_fd: int) -> int:
    """A descriptor whose read() runs the iterator once (5.8)."""
    return _bpf(_ITER_CREATE, _attr(_TWO.pack(link_fd, 0)))


class TestRun:
    """BPF_PROG_TEST_RUN of one program over one packet buffer, everything allocated once.

    ``packet`` is read by the program and overwritten with what it made of it. Not for two threads at once.
    """

    # pytest takes a class of this name for a test otherwise.
    __test__ = False

    def __init__(self, prog_fd: int, packet_bytes: int) -> None:
        self.packet = bytearray(packet_bytes)
        view = (ctypes.c_char * packet_bytes).from_buffer(self.packet)
        self._bytes = packet_bytes
        # In and out may be one buffer: the kernel copies all of it in before the run and out after it (5.10 to 6.18).
        where = ctypes.addressof(view)
        self._view = view
        # Only its beginning, up to the index: the kernel takes the rest for zeros.
        self._context = ctypes.create_string_buffer(_SKB_IFINDEX_AT + 4)
        self._attr = _attr(_TEST.pack(prog_fd, 0, packet_bytes, packet_bytes, where, where, 0, 0, 0, 0, 0, 0))

    def run(self, device: int = 0) -> int:
        """The program's return value. ``device``: index of the one the packet is on, 0 for the loopback (5.9).

        Raises OSError, EMSGSIZE if the packet came back with another length, ENODEV if there is no such device.
        """
        attr = self._attr
        struct.pack_into("=I", self._context, _SKB_IFINDEX_AT, device)
        context = (len(self._context), 0, ctypes.addressof(self._context)) if device else (0, 0, 0)
        _TEST_CONTEXT.pack_into(attr, _TEST_CONTEXT_AT, *context)
        _TWO.pack_into(attr, 8, self._bytes, self._bytes)
        _bpf(_PROG_TEST_RUN, attr)
        returned, _, size_out = _TEST_RESULT.unpack_from(attr, 4)
        if size_out != self._bytes:
            raise OSError(errno.EMSGSIZE, f"BPF_PROG_TEST_RUN: {size_out} bytes came back of {self._bytes}")
        return int(returned)


def _attr(packed: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(packed, len(packed))


def _info(fd: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
    _bpf(_OBJ_GET_INFO_BY_FD, _attr(_INFO.pack(fd, len(buffer), ctypes.addressof(buffer))))


def _text(name: bytes) -> str:
    return name.partition(b"\0")[0].decode("ascii", "backslashreplace")


def _bpf(command: int, attr: ctypes.Array[ctypes.c_char]) -> int:
    if _NUMBER is None:
        raise OSError(errno.ENOSYS, f"{_NAMES[command]}: system call number not known on {os.uname().machine}")
    while True:
        result = int(_syscall(_NUMBER, command, ctypes.addressof(attr), len(attr)))
        if result >= 0:
            return result
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, f"{_NAMES[command]}: {os.strerror(error)}")
