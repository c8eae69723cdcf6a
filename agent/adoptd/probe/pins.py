"""The pinned probe as the agent uses it: opened, checked, asked.

Owns the list of what must be pinned under a schema, the checks of each object against the kernel's own
description of it, and the look-up. Must never answer from an object it has not checked, and never holds a
link open: unloading the probe detaches it even while agents run. Called by the service, the bpf witness,
the self-test, status, and the loader (to see whether there is anything to do).
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Mapping, Optional, Tuple

from adoptd.model import Connection, ProbeError
from adoptd.probe import store, syscalls
from adoptd.probe.record import (
    CONNECTED_BUFFER_BYTES,
    COUNTERS,
    NETNS_OWN,
    NOT_FOUND,
    PACE_BYTES,
    PACKET_BYTES,
    RECORD,
    SHARES,
    WATCHED_BYTES,
    Answer,
    decode_answer,
    encode_question,
)
from adoptd.probe.sources import find_sources, schema_of

_POSSIBLE_CPUS = Path("/sys/devices/system/cpu/possible")
_COUNTER_BYTES = 8


@dataclass(frozen=True)
class MapPin:
    """A map that must be pinned, by its file's name. Sizes in bytes; the kernel knows it as ``name``."""

    name: str
    type: int
    value_size: int
    max_entries: int
    key_size: int = 4


@dataclass(frozen=True)
class ProgramPin:
    """A program that must be pinned, and the maps it has; its file and its function have the same name."""

    name: str
    type: int
    maps: Tuple[MapPin, ...]


@dataclass(frozen=True)
class LinkPin:
    """A link that must be pinned: ``program`` at the cgroup root for ``attach_type``."""

    name: str
    program: str
    attach_type: int


OWNERS = MapPin("adopt_owners", syscalls.MAP_TYPE_SK_STORAGE, RECORD.size, 0)
COUNTS = MapPin("adopt_counters", syscalls.MAP_TYPE_PERCPU_ARRAY, _COUNTER_BYTES, len(COUNTERS))
WATCHED = MapPin("adopt_watched", syscalls.MAP_TYPE_ARRAY, WATCHED_BYTES, 1)
PACES = MapPin("adopt_paces", syscalls.MAP_TYPE_ARRAY, PACE_BYTES, SHARES)
CONNECTS = MapPin("adopt_connects", syscalls.MAP_TYPE_RINGBUF, 0, CONNECTED_BUFFER_BYTES, 0)
MAPS: Tuple[MapPin, ...] = (OWNERS, COUNTS, WATCHED, PACES, CONNECTS)
QUERY = ProgramPin("adopt_query", syscalls.PROG_TYPE_SCHED_CLS, (OWNERS, COUNTS))
CONNECT4 = ProgramPin("adopt_connect4", syscalls.PROG_TYPE_CGROUP_SOCK_ADDR, MAPS)
CONNECT6 = ProgramPin("adopt_connect6", syscalls.PROG_TYPE_CGROUP_SOCK_ADDR, MAPS)
LINKS: Tuple[LinkPin, ...] = (
    LinkPin("link_connect4", CONNECT4.name, syscalls.ATTACH_CGROUP_INET4_CONNECT),
    LinkPin("link_connect6", CONNECT6.name, syscalls.ATTACH_CGROUP_INET6_CONNECT),
)
PROGRAMS: Tuple[ProgramPin, ...] = (QUERY, CONNECT4, CONNECT6)


class OpenProbe:
    """A probe that was checked by :func:`open_probe`. May be used from several threads.

    Closed also when nobody closes it: a call that outlived its deadline leaves its result to nobody.
    """

    def __init__(self, schema: str, query_fd: int, counters_fd: int) -> None:
        """Take over both descriptors. Raises ProbeError; then they are the caller's."""
        self._lock = threading.Lock()
        self._closed = True
        self.schema = schema
        self._query_fd = query_fd
        self._counters_fd = counters_fd
        self._run = syscalls.TestRun(query_fd, PACKET_BYTES)
        self._value_bytes = _COUNTER_BYTES * _possible_cpus()
        self._closed = False

    def __del__(self) -> None:
        self.close()

    def ask(self, connection: Connection, device: int = 0, netns: int = NETNS_OWN) -> Answer:
        """What the probe knows of ``connection`` in the network namespace of the calling thread.

        ``device``: also look at sockets bound to the network device of this index, rather than to the loopback.
        ``netns``: look in another network namespace, by the id that the calling thread's has for it.
        Some 10 us, whatever the number of sockets. Raises ProbeError if the probe cannot be asked.
        """
        with self._lock:
            if self._closed:
                raise ProbeError("probe: asked after it was closed")
            run = self._run
            encode_question(run.packet, connection, netns)
            try:
                returned = run.run(device)
            except OSError as error:
                if device and error.errno == errno.ENODEV:
                    # Gone since it was listed, and what was bound to it is no connection any more.
                    return NOT_FOUND
                raise ProbeError(f"probe cannot be asked about {connection}: {error.strerror}") from None
            return decode_answer(run.packet, returned)

    def counters(self) -> Mapping[str, int]:
        """Every counter of the probe since it was loaded, all CPUs together. Raises ProbeError.

        Those of record.FAILURES count what went wrong, those of record.WORK what was done.
        """
        with self._lock:
            if self._closed:
                raise ProbeError("probe: asked after it was closed")
            try:
                return {
                    name: _total(syscalls.map_lookup(self._counters_fd, key, self._value_bytes))
                    for key, name in enumerate(COUNTERS)
                }
            except OSError as error:
                raise ProbeError(f"probe's counters cannot be read: {error.strerror}") from None

    def close(self) -> None:
        """Let go of the probe, which stays loaded. A second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._query_fd)
                os.close(self._counters_fd)

    def __enter__(self) -> OpenProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_probe(pin_dir: Path, source_dir: Optional[Path] = None) -> OpenProbe:
    """The probe pinned under ``pin_dir`` that was built from this agent's sources.

    Raises MissingProbe if none is loaded, ProbeError if it is of another schema, incomplete, detached, or
    not to be trusted: the directory is not root's alone, or what is pinned is not what should be.
    """
    return open_schema(pin_dir, schema_of(find_sources(source_dir)))


def open_schema(pin_dir: Path, schema: str) -> OpenProbe:
    """The probe of ``schema`` pinned under ``pin_dir``; otherwise as :func:`open_probe`."""
    with contextlib.ExitStack() as opened:
        directory = store.open_trusted(str(pin_dir), str(pin_dir))
        opened.callback(os.close, directory)
        others = store.schemas(directory)
        if others and schema not in others:
            raise ProbeError(f"{pin_dir}: has a probe of schema {', '.join(others)}, expected {schema}: load it again")
        pinned = store.open_trusted(schema, f"{pin_dir}/{schema}", directory)
        opened.callback(os.close, pinned)
        return open_pinned(pinned, schema, f"{pin_dir}/{schema}")


def open_pinned(directory: int, schema: str, shown: str) -> OpenProbe:
    """The probe pinned in one open, trusted ``directory``; ``shown`` is its name in messages.

    For the loader, which checks what it made before it puts it in place. Raises ProbeError.
    """
    with contextlib.ExitStack() as opened:
        fds: Dict[str, int] = {}
        names = [*(pin.name for pin in MAPS), *(pin.name for pin in PROGRAMS), *(pin.name for pin in LINKS)]
        for name in names:
            try:
                fds[name] = syscalls.obj_get(f"/proc/self/fd/{directory}/{name}")
            except OSError as error:
                raise ProbeError(f"{shown}/{name}: cannot be opened: {error.strerror}") from None
            opened.callback(os.close, fds[name])
        try:
            _check(fds, shown)
        except OSError as error:
            raise ProbeError(f"{shown}: the kernel does not describe what is pinned: {error.strerror}") from None
        probe = OpenProbe(schema, fds[QUERY.name], fds[COUNTS.name])
        # It has those two now.
        opened.pop_all()
        for name in set(names) - {QUERY.name, COUNTS.name}:
            os.close(fds[name])
        return probe


def check_map(fd: int, wanted: MapPin, shown: str) -> int:
    """The kernel's id of the map, which is ``wanted``. ``shown``: the directory it is pinned in, for messages.

    Raises ProbeError if it is another, OSError if the kernel does not say.
    """
    store.expect(f"{shown}/{wanted.name}", syscalls.kind_of(fd), "bpf-map")
    described = syscalls.map_info(fd)
    found = (described.type, described.key_size, described.value_size, described.max_entries, described.name)
    expected = (wanted.type, wanted.key_size, wanted.value_size, wanted.max_entries, wanted.name)
    store.expect(f"{shown}/{wanted.name} (type, key bytes, value bytes, entries, name)", found, expected)
    return described.id


def check_program(fd: int, wanted: ProgramPin, map_ids: Mapping[MapPin, int], shown: str) -> int:
    """As :func:`check_map`, of a program. Its maps too: over another of the same shape it would never be asked."""
    store.expect(f"{shown}/{wanted.name}", syscalls.kind_of(fd), "bpf-prog")
    described = syscalls.prog_info(fd)
    found = (described.type, described.name, sorted(described.map_ids))
    expected = (wanted.type, wanted.name, sorted(map_ids[each] for each in wanted.maps))
    store.expect(f"{shown}/{wanted.name} (type, name, maps)", found, expected)
    return described.id


def _check(fds: Mapping[str, int], shown: str) -> None:
    map_ids = {wanted: check_map(fds[wanted.name], wanted, shown) for wanted in MAPS}
    program_ids = {each.name: check_program(fds[each.name], each, map_ids, shown) for each in PROGRAMS}
    for link in LINKS:
        store.expect(f"{shown}/{link.name}", syscalls.kind_of(fds[link.name]), "bpf-link")
        attached = syscalls.link_info(fds[link.name])
        found_link = (attached.type, attached.prog_id, attached.attach_type)
        expected_link = (syscalls.LINK_TYPE_CGROUP, program_ids[link.program], link.attach_type)
        store.expect(f"{shown}/{link.name} (type, program, attach type)", found_link, expected_link)
        if attached.cgroup_id == 0:
            raise ProbeError(f"{shown}/{link.name}: is detached, expected attached to the cgroup root")


def _total(value: bytes) -> int:
    return sum(memoryview(value).cast("Q"))


def _possible_cpus() -> int:
    """How many values the kernel keeps of a per-CPU map. Raises ProbeError if it does not say.

    The highest number plus one, so never less than the kernel writes, even where the numbers have holes.
    """
    try:
        text = _POSSIBLE_CPUS.read_text("ascii").strip()
        return max(int(last) for last in text.replace("-", ",").split(",")) + 1
    except (OSError, ValueError) as error:
        raise ProbeError(f"{_POSSIBLE_CPUS}: {error}, expected a list of CPU numbers") from None
