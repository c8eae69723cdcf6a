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
from adoptd.probe.pins import COUNTS, MapPin, ProgramPin, check_map, check_program
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
class TracepointPin(ProgramPin):
    """A program that must be pinned, and its link to a raw tracepoint."""

    tracepoint: str

    @property
    def link(self) -> str:
        """The file of its link."""
        return "link_" + self.name


EVENTS = MapPin("adopt_events", syscalls.MAP_TYPE_RINGBUF, 0, EVENT_BUFFER_BYTES, 0)
MEMBERS = MapPin("adopt_members", syscalls.MAP_TYPE_HASH, MEMBER.size, MEMBERS_MAX)
SHARES_OF_USERS = MapPin("adopt_shares", syscalls.MAP_TYPE_ARRAY, SHARE_BYTES, SHARES)
# The counters are the probe's.
MAPS: Tuple[MapPin, ...] = (EVENTS, MEMBERS, SHARES_OF_USERS)


def _at(tracepoint: str, name: str, *maps: MapPin) -> TracepointPin:
    return TracepointPin(name, syscalls.PROG_TYPE_RAW_TRACEPOINT, maps, tracepoint)


# Those that keep the list before the one that tells: nothing is told of a list that is not kept.
PROGRAMS: Tuple[TracepointPin, ...] = (
    _at("sched_process_exit", "adopt_exit", MEMBERS, SHARES_OF_USERS),
    _at("sched_process_exec", "adopt_exec", MEMBERS, SHARES_OF_USERS),
    _at("sched_process_fork", "adopt_fork", MEMBERS, SHARES_OF_USERS, COUNTS),
    _at("cgroup_attach_task", "adopt_attach", EVENTS, MEMBERS, SHARES_OF_USERS, COUNTS),
)


class OpenWatch:
    """The watch, checked by :func:`open_watch`. The list is safe to share between threads, the ring is one loop's.

    Closed also when nobody closes it, as the probe is.
    """

    def __init__(self, schema: str, members_fd: int, ring: Ring) -> None:
        """Take over ``members_fd`` and ``ring``. Raises OSError; then they are the caller's."""
        self._closed = True
        self.schema = schema
        # Not the same for any two that were ever loaded: the kernel counts its maps.
        self.number = syscalls.map_info(members_fd).id
        self.ring = ring
        self._members_fd = members_fd
        self._closed = False

    def __del__(self) -> None:
        self.close()

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
        """Let go of the watch, which stays. A second call does nothing."""
        if not self._closed:
            self._closed = True
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
        names = (*(each.name for each in (*MAPS, COUNTS)), *(n for each in PROGRAMS for n in (each.name, each.link)))
        missing: List[str] = []
        for name in names:
            try:
                fds[name] = syscalls.obj_get(f"/proc/self/fd/{pinned}/{name}")
                opened.callback(os.close, fds[name])
            except FileNotFoundError:
                missing.append(name)
            except OSError as error:
                raise ProbeError(f"{shown}/{name}: cannot be opened: {error.strerror}") from None
        if set(fds) <= {COUNTS.name}:
            raise store.MissingProbe(f"{shown}: the kernel did not take the watch when the probe was loaded")
        if missing:
            raise ProbeError(f"{shown}: {', '.join(missing)} of the watch are missing: load the probe again")
        try:
            _check(fds, shown)
            ring = Ring(os.dup(fds[EVENTS.name]), EVENT_BUFFER_BYTES)
            watch = OpenWatch(schema, fds[MEMBERS.name], ring)
        except OSError as error:
            raise ProbeError(f"{shown}: the watch cannot be used: {error.strerror}") from None
        # It has that one now.
        opened.pop_all()
        for fd in (directory, pinned, *(fds[name] for name in set(fds) - {MEMBERS.name})):
            os.close(fd)
        return watch


def inherit(directory: int, name: str, others: Sequence[str]) -> None:
    """Have on the list of the watch pinned in ``name`` whoever is on the lists of ``others``, which still run.

    For the loader: only the list knows a daemon of a session's, and a probe is replaced while sessions live. Entries
    are read twice, since who forks between two reads is on the old list alone. Raises OSError.
    """
    with contextlib.ExitStack() as opened:
        fresh = syscalls.obj_get(f"/proc/self/fd/{directory}/{name}/{MEMBERS.name}")
        opened.callback(os.close, fresh)
        shape = syscalls.map_info(fresh)
        for other in others:
            try:
                old = syscalls.obj_get(f"/proc/self/fd/{directory}/{other}/{MEMBERS.name}")
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
    map_ids = {wanted: check_map(fds[wanted.name], wanted, shown) for wanted in (*MAPS, COUNTS)}
    for program in PROGRAMS:
        number = check_program(fds[program.name], program, map_ids, shown)
        store.expect(f"{shown}/{program.link}", syscalls.kind_of(fds[program.link]), "bpf-link")
        found = syscalls.raw_tracepoint_info(fds[program.link])
        expected = (syscalls.LINK_TYPE_RAW_TRACEPOINT, number, program.tracepoint)
        store.expect(f"{shown}/{program.link} (type, program, tracepoint)", found, expected)
