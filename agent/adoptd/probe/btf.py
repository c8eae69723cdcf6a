"""Where a member of a kernel struct is, read from the running kernel's own type information.

Owns the little of the BTF format (Linux Documentation/bpf/btf.rst) that this takes. Only seeding and the watch
need it, for the few facts no helper gives; the result is handed to the compiler as numbers, so nothing about a
kernel version is written down anywhere. Must never guess an offset. Called by the loader only.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from adoptd.model import ProbeError

VMLINUX = Path("/sys/kernel/btf/vmlinux")

# The members seeding reads, by the name of the macro bpf/probe.c expects (ADOPT_OFFSET_<name>).
SEED_MEMBERS: Mapping[str, Tuple[str, ...]] = {
    "SOCKET_SK": ("socket", "sk"),
    "SOCK_STATE": ("sock", "__sk_common", "skc_state"),
    "SOCK_UID": ("sock", "sk_uid"),
    "TASK_TGID": ("task_struct", "tgid"),
    "TASK_COMM": ("task_struct", "comm"),
    "TASK_CRED": ("task_struct", "cred"),
    "TASK_CGROUPS": ("task_struct", "cgroups"),
    "CRED_UID": ("cred", "uid"),
    "CSS_SET_DFL_CGRP": ("css_set", "dfl_cgrp"),
    "CGROUP_KN": ("cgroup", "kn"),
    "KERNFS_NODE_ID": ("kernfs_node", "id"),
}

# The members the look-up for twins reads.
TWIN_MEMBERS: Mapping[str, Tuple[str, ...]] = {
    "SOCK_STATE": ("sock", "__sk_common", "skc_state"),
    "SK_NODE": ("sock", "__sk_common", "skc_nulls_node"),
    "SK_HASH": ("sock", "__sk_common", "skc_hash"),
    "SK_NET": ("sock", "__sk_common", "skc_net"),
    "SK_PORTS": ("sock", "__sk_common", "skc_portpair"),
    "SK_IPV4": ("sock", "__sk_common", "skc_addrpair"),
    "SK_IPV6_REMOTE": ("sock", "__sk_common", "skc_v6_daddr"),
    "SK_IPV6_LOCAL": ("sock", "__sk_common", "skc_v6_rcv_saddr"),
}

# The members the watch reads.
WATCH_MEMBERS: Mapping[str, Tuple[str, ...]] = {
    "TASK_PID": ("task_struct", "pid"),
    "TASK_SIGNAL": ("task_struct", "signal"),
    "SIGNAL_LIVE": ("signal_struct", "live"),
    "CGROUP_KN": ("cgroup", "kn"),
    "CGROUP_ROOT": ("cgroup", "root"),
    "CGROUP_ROOT_HIERARCHY": ("cgroup_root", "hierarchy_id"),
    "KERNFS_NODE_ID": ("kernfs_node", "id"),
}

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")
_MEMBER = struct.Struct("=III")
_STRUCT, _UNION = 4, 5
# Bytes that follow a type of each kind, in all and per item (include/uapi/linux/btf.h, 5.15 plus ENUM64 of 6.0).
_FOLLOWS: Mapping[int, Tuple[int, int]] = {
    1: (4, 0), 2: (0, 0), 3: (12, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 7: (0, 0), 8: (0, 0), 9: (0, 0), 10: (0, 0),
    11: (0, 0), 12: (0, 0), 13: (0, 8), 14: (4, 0), 15: (0, 12), 16: (0, 0), 17: (4, 0), 18: (0, 0), 19: (0, 12),
}  # fmt: skip
# Modifiers between a member and its struct: typedef, volatile, const, restrict, type tag.
_MODIFIERS = (8, 9, 10, 11, 18)


class Btf:
    """Parsed type information. Raises ProbeError if ``data`` is not BTF of the layout this knows."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        try:
            magic, version, _flags, header, type_at, type_bytes, string_at, _ = _HEADER.unpack_from(data)
            if magic != _MAGIC or version != 1:
                raise ProbeError(f"BTF: magic {magic:#x} version {version}, expected {_MAGIC:#x} version 1")
            self._strings = header + string_at
            self._positions: List[int] = [0]  # type 0 is void
            self._structs: Dict[str, int] = {}
            self._index(header + type_at, header + type_at + type_bytes)
        except (struct.error, KeyError, ValueError, IndexError) as error:
            raise ProbeError(f"BTF: not understood ({error!r})") from None

    def offset_of(self, path: Sequence[str]) -> int:
        """Bytes from the start of struct ``path[0]`` to its member ``path[1]``, and on to that one's ``path[2]``...

        Members of unnamed structs and unions count as their parent's, as in C. Raises ProbeError naming
        the path if a step does not exist, is ambiguous to this reader, or does not start on a byte.
        """
        name = ".".join(path)
        position: Optional[int] = self._structs.get(path[0])
        bits = 0
        for step in path[1:]:
            found = None if position is None else self._find(position, step)
            if found is None:
                raise ProbeError(f"BTF: this kernel has no {name}")
            bits += found[0]
            position = self._struct_at(found[1])
        if bits % 8:
            raise ProbeError(f"BTF: {name} does not start on a byte")
        return bits // 8

    def _index(self, at: int, end: int) -> None:
        while at < end:
            name, info, _ = _TYPE.unpack_from(self._data, at)
            self._positions.append(at)
            kind, items = info >> 24 & 0x1F, info & 0xFFFF
            if kind == _STRUCT and name:
                # The first definition wins, as in the kernel's own search by name.
                self._structs.setdefault(self._string(name), at)
            once, each = _FOLLOWS[kind]
            at += _TYPE.size + once + each * items

    def _find(self, position: int, wanted: str) -> Optional[Tuple[int, int]]:
        for name, type_id, bits in self._members(position):
            if name == wanted:
                return bits, type_id
            inner = self._struct_at(type_id) if not name else None
            found = None if inner is None else self._find(inner, wanted)
            if found is not None:
                return bits + found[0], found[1]
        return None

    def _members(self, position: int) -> Iterator[Tuple[str, int, int]]:
        _, info, _ = _TYPE.unpack_from(self._data, position)
        has_bitfields = bool(info >> 31)
        for number in range(info & 0xFFFF):
            name, type_id, offset = _MEMBER.unpack_from(self._data, position + _TYPE.size + number * _MEMBER.size)
            yield self._string(name), type_id, offset & 0xFFFFFF if has_bitfields else offset

    def _struct_at(self, type_id: int) -> Optional[int]:
        while type_id:
            position = self._positions[type_id]
            _, info, target = _TYPE.unpack_from(self._data, position)
            kind = info >> 24 & 0x1F
            if kind in (_STRUCT, _UNION):
                return position
            if kind not in _MODIFIERS:
                return None
            type_id = target
        return None

    def _string(self, at: int) -> str:
        start = self._strings + at
        return self._data[start : self._data.index(b"\0", start)].decode("ascii", "replace")


def read_vmlinux(vmlinux: Path = VMLINUX) -> Btf:
    """The running kernel's own type information. Raises ProbeError if it has none."""
    try:
        return Btf(vmlinux.read_bytes())
    except OSError as error:
        raise ProbeError(f"{vmlinux}: cannot be read: {error.strerror}") from None


def offsets(btf: Btf, members: Mapping[str, Tuple[str, ...]]) -> Mapping[str, int]:
    """The offset in bytes of each of ``members``. Raises ProbeError if this kernel has one of them not."""
    return {name: btf.offset_of(path) for name, path in members.items()}
