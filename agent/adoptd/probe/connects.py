"""The probe's word of connections as they are made: which ports it is to tell of, and its ring buffer of them.

Owns opening the two pins beside the probe's others. Which ports are watched stays in the kernel, so the list is
emptied where nobody wants to know. Called by the notes of jobs on cgroup v1; its events are read by ring.py.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Optional, Sequence

from adoptd.model import ProbeError
from adoptd.probe import syscalls
from adoptd.probe.pins import CONNECTS, WATCHED, open_probe
from adoptd.probe.record import CONNECTED_BUFFER_BYTES, encode_watched
from adoptd.probe.ring import Ring


class OpenConnects:
    """What the probe tells of connections. For one event loop, and one reader of the ring on this host.

    Closed also when nobody closes it, as the probe is.
    """

    def __init__(self, watched_fd: int, ring: Ring) -> None:
        """Take over both. Raises OSError; then they are the caller's."""
        self._closed = True
        # Not the same for any two that were ever loaded: the kernel counts its maps.
        self.number = syscalls.map_info(watched_fd).id
        self.ring = ring
        self._watched_fd = watched_fd
        self._closed = False

    def __del__(self) -> None:
        self.close()

    def watch(self, ports: Sequence[int]) -> None:
        """Have connections to these ports told, and to no others. Raises ProbeError."""
        try:
            syscalls.map_update(self._watched_fd, 0, encode_watched(ports))
        except OSError as error:
            raise ProbeError(f"the ports to watch cannot be set: {error.strerror}") from None

    def close(self) -> None:
        """Let go of it, which stays as it is. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self.ring.close()
            os.close(self._watched_fd)


def open_connects(pin_dir: Path, source_dir: Optional[Path] = None) -> OpenConnects:
    """Of the probe pinned under ``pin_dir`` that was built from this agent's sources. Raises ProbeError."""
    with open_probe(pin_dir, source_dir) as probe, contextlib.ExitStack() as opened:
        # What is pinned there has just been checked, in a directory that is root's alone.
        directory = f"{pin_dir}/{probe.schema}"
        try:
            watched = syscalls.obj_get(f"{directory}/{WATCHED.name}")
            opened.callback(os.close, watched)
            ring = Ring(syscalls.obj_get(f"{directory}/{CONNECTS.name}"), CONNECTED_BUFFER_BYTES)
            connects = OpenConnects(watched, ring)
        except OSError as error:
            raise ProbeError(f"{directory}: connections cannot be told of: {error.strerror or error}") from None
        opened.pop_all()
        return connects
