"""The pinned watch over sessions' processes: opened, checked, told which processes to watch.

Owns the list of what must be pinned for it, beside the probe and under its schema, and the entries of the list
that the kernel keeps. It is there or not, whole, whatever becomes of the probe's look-ups. Must never hold a
link open (as pins.py). Called by the loader and by the watch for escapes; its events are read by ring.py.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from adoptd.model import ProbeError
from adoptd.probe import store, syscalls
from adoptd.probe.record import (
    EVENT_BUFFER_BYTES,
    MEMBER,
    MEMBERS_MAX,
    SHARE_BYTES,
    SHARES,
    encode_member,
)
from adoptd.probe.ring import Ring
from adoptd.probe.sources import find_sources, schema_of


@dataclass(frozen=True)
class WatchMap:
    """A map that must be pinned, by its file's name. Sizes in bytes; ``shape``: type, key, value, entries."""

    name: str
    shape: Tuple[int, int, int, int]


@dataclass(frozen=True)
class WatchProgram:
    """A program that must be pinned, and its link to a raw tracepoint; file and function have the same name."""

    name: str
    tracepoint: str
    maps: Tuple[str, ...]

    @property
    def link(self) -> str:
        """The file of its link."""
        return "link_" + self.name


_EVENTS, _MEMBERS, _SHARES, _COUNTERS = "adopt_events", "adopt_members", "adopt_shares", "adopt_counters"

MAPS: Tuple[WatchMap, ...] = (
    WatchMap(_EVENTS, (syscalls.MAP_TYPE_RINGBUF, 0, 0, EVENT_BUFFER_BYTES)),
    WatchMap(_MEMBERS, (syscalls.MAP_TYPE_HASH, 4, MEMBER.size, MEMBERS_MAX)),
    WatchMap(_SHARES, (syscalls.MAP_TYPE_ARRAY, 4, SHARE_BYTES, SHARES)),
)
# Those that keep the list before the one that tells: nothing is told of a list that is not kept.
PROGRAMS: Tuple[WatchProgram, ...] = (
    WatchProgram("adopt_exit", "sched_process_exit", (_MEMBERS, _SHARES)),
    WatchProgram("adopt_exec", "sched_process_exec", (_MEMBERS, _SHARES)),
    WatchProgram("adopt_fork", "sched_process_fork", (_MEMBERS, _SHARES, _COUNTERS)),
    WatchProgram("adopt_attach", "cgroup_attach_task", (_EVENTS, _MEMBERS, _SHARES, _COUNTERS)),
)


class OpenWatch:
    """The watch, checked by :func:`open_watch`. The list is safe to share between threads, the ring is one loop's."""

    def __init__(self, schema: str, members_fd: int, ring: Ring) -> None:
        self.schema = schema
        # Not the same for any two that were ever loaded: the kernel counts its maps.
        self.number = syscalls.map_info(members_fd).id
        self.ring = ring
        self._members_fd = members_fd

    def watch(self, pid: int, leader: int, start_ticks: int, uid: int) -> None:
        """Put a process, or a thread, on the list: from now on its moves are told and its forks are on it too.

        Raises ProbeError, also if the list is full.
        """
        try:
            syscalls.map_update(self._members_fd, pid, encode_member(leader, start_ticks, uid))
        except OSError as error:
            raise ProbeError(f"process {pid} cannot be watched: {error.strerror}") from None

    def unwatch(self, pid: int) -> None:
        """Take one process off the list, as its end does. Raises ProbeError."""
        try:
            syscalls.map_delete(self._members_fd, pid)
        except OSError as error:
            raise ProbeError(f"process {pid} cannot be taken off the list: {error.strerror}") from None

    def session_of(self, pid: int) -> Optional[Tuple[int, int]]:
        """The pid and start in ticks of the first process of the session a process is of. Raises ProbeError."""
        try:
            value = syscalls.map_lookup(self._members_fd, pid, MEMBER.size)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ProbeError(f"the list of watched processes cannot be read: {error.strerror}") from None
        start_ticks, leader, _, _, _ = MEMBER.unpack(value)
        return leader, start_ticks

    def members(self) -> Iterator[Tuple[int, int, int, int]]:
        """The list, as (pid, leader, start_ticks, uid). What changes meanwhile may be missed. Raises ProbeError."""
        try:
            for pid, value in syscalls.map_items(self._members_fd, MEMBER.size, MEMBERS_MAX):
                start_ticks, leader, uid, _, _ = MEMBER.unpack(value)
                yield pid, leader, start_ticks, uid
        except OSError as error:
            raise ProbeError(f"the list of watched processes cannot be read: {error.strerror}") from None

    def close(self) -> None:
        """Let go of the watch, which stays."""
        self.ring.close()
        os.close(self._members_fd)


def open_watch(pin_dir: Path, source_dir: Optional[Path] = None) -> OpenWatch:
    """The watch pinned under ``pin_dir`` that was built from this agent's sources.

    Raises MissingProbe if there is none, ProbeError if it is not to be trusted, detached, or not what should be.
    """
    schema = schema_of(find_sources(source_dir))
    with contextlib.ExitStack() as opened:
        directory = store.open_trusted(str(pin_dir), str(pin_dir))
        opened.callback(os.close, directory)
        shown = f"{pin_dir}/{schema}"
        pinned = store.open_trusted(schema, shown, directory)
        opened.callback(os.close, pinned)
        fds: Dict[str, int] = {}
        names = (*(each.name for each in MAPS), _COUNTERS, *(n for each in PROGRAMS for n in (each.name, each.link)))
        missing: List[str] = []
        for name in names:
            try:
                fds[name] = syscalls.obj_get(f"/proc/self/fd/{pinned}/{name}")
                opened.callback(os.close, fds[name])
            except FileNotFoundError:
                missing.append(name)
            except OSError as error:
                raise ProbeError(f"{shown}/{name}: cannot be opened: {error.strerror}") from None
        if set(fds) <= {_COUNTERS}:
            raise store.MissingProbe(f"{shown}: the kernel did not take the watch when the probe was loaded")
        if missing:
            raise ProbeError(f"{shown}: {', '.join(missing)} of the watch are missing: load the probe again")
        try:
            _check(fds, shown)
            ring = Ring(os.dup(fds[_EVENTS]), EVENT_BUFFER_BYTES)
        except OSError as error:
            raise ProbeError(f"{shown}: the watch cannot be used: {error.strerror}") from None
        return OpenWatch(schema, os.dup(fds[_MEMBERS]), ring)


def inherit(directory: int, name: str, others: Sequence[str]) -> None:
    """Have on the list of the watch pinned in ``name`` whoever is on the lists of ``others``, which still run.

    For the loader: only the list knows a daemon of a session's, and a probe is replaced while sessions live. Entries
    are read twice, since who forks between two reads is on the old list alone. Raises OSError.
    """
    with contextlib.ExitStack() as opened:
        fresh = syscalls.obj_get(f"/proc/self/fd/{directory}/{name}/{_MEMBERS}")
        opened.callback(os.close, fresh)
        shape = syscalls.map_info(fresh)
        for other in others:
            try:
                old = syscalls.obj_get(f"/proc/self/fd/{directory}/{other}/{_MEMBERS}")
            except OSError:
                continue
            opened.callback(os.close, old)
            found = syscalls.map_info(old) if syscalls.kind_of(old) == "bpf-map" else None
            if found is None or replace(found, id=shape.id) != shape:
                continue
            for pid, value in _twice(old):
                start_ticks, leader, uid, _, _ = MEMBER.unpack(value)
                syscalls.map_update(fresh, pid, encode_member(leader, start_ticks, uid))
                try:
                    syscalls.map_lookup(old, pid, MEMBER.size)
                except FileNotFoundError:
                    # It ended meanwhile, which took it off both lists, or off the new one before it was put there.
                    syscalls.map_delete(fresh, pid)


def _twice(fd: int) -> Iterator[Tuple[int, bytes]]:
    for _ in range(2):
        yield from list(syscalls.map_items(fd, MEMBER.size, MEMBERS_MAX))


def _check(fds: Dict[str, int], shown: str) -> None:
    ids: Dict[str, int] = {}
    for name in (*(each.name for each in MAPS), _COUNTERS):
        store.expect(f"{shown}/{name}", syscalls.kind_of(fds[name]), "bpf-map")
        info = syscalls.map_info(fds[name])
        shape = next((each.shape for each in MAPS if each.name == name), None)
        if shape is not None:
            found_map = (info.type, info.key_size, info.value_size, info.max_entries, info.name)
            store.expect(f"{shown}/{name} (type, key bytes, value bytes, entries, name)", found_map, (*shape, name))
        ids[name] = info.id
    for wanted in PROGRAMS:
        store.expect(f"{shown}/{wanted.name}", syscalls.kind_of(fds[wanted.name]), "bpf-prog")
        program = syscalls.prog_info(fds[wanted.name])
        maps: List[int] = sorted(ids[name] for name in wanted.maps)
        found_program = (program.type, program.name, sorted(program.map_ids))
        expected = (syscalls.PROG_TYPE_RAW_TRACEPOINT, wanted.name, maps)
        store.expect(f"{shown}/{wanted.name} (type, name, maps)", found_program, expected)
        store.expect(f"{shown}/{wanted.link}", syscalls.kind_of(fds[wanted.link]), "bpf-link")
        found_link = syscalls.raw_tracepoint_info(fds[wanted.link])
        expected_link = (syscalls.LINK_TYPE_RAW_TRACEPOINT, program.id, wanted.tracepoint)
        store.expect(f"{shown}/{wanted.link} (type, program, tracepoint)", found_link, expected_link)
