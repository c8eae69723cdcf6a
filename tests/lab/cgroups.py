"""Cgroups of a run: where they can be made on this host, and the jobs in them.

Owns everything under ``/adoptd-demo-<id>`` in the hierarchies it uses: v2, and on a hybrid host v1
memory, pids and freezer beside it. Must never touch a cgroup outside that base, nor a controller's
setting inside it. Called by nodes, scenarios and the demo's cleanup.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import FrozenSet, List, Mapping, Optional, Sequence, Set, Tuple

# v1 controllers that a job manager would use. Not cpuset: no process can enter before its CPUs and nodes are set.
V1_CONTROLLERS = ("memory", "pids", "freezer")
V2 = "v2"
# A killed process may take a while to give back a large address space; nothing here is large.
KILL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Hierarchy:
    """One mounted cgroup hierarchy: ``name`` is "v2" or the v1 controllers as /proc/PID/cgroup spells them."""

    name: str
    mount: Path


def find_hierarchies(
    mountinfo: Path = Path("/proc/self/mountinfo"), wanted: Sequence[str] = V1_CONTROLLERS
) -> Tuple[Hierarchy, ...]:
    """The hierarchies jobs are made in, v2 first. Raises RuntimeError if there is none to write to."""
    found: List[Hierarchy] = []
    for line in mountinfo.read_text(encoding="utf-8").splitlines():
        left, _, right = line.partition(" - ")
        root, point = left.split()[3:5]
        kind, _, options = right.split()[:3]
        # A mount of a subtree names its groups otherwise than /proc/PID/cgroup does.
        if root != "/" or not os.access(point, os.W_OK):
            continue
        if kind == "cgroup2":
            name: Optional[str] = V2
        elif kind == "cgroup":
            controllers = [c for c in options.split(",") if c in wanted]
            name = ",".join(controllers) if controllers else None
        else:
            name = None
        if name is not None and all(known.name != name for known in found):
            found.append(Hierarchy(name, Path(point)))
    if not found:
        raise RuntimeError("no cgroup hierarchy is mounted writable here: is /sys/fs/cgroup mounted, is this root?")
    return tuple(sorted(found, key=lambda hierarchy: hierarchy.name != V2))


def paths_of_process(text: str) -> Mapping[str, str]:
    """``/proc/PID/cgroup`` as a map from hierarchy name to path; v1 hierarchies we do not use are left out."""
    paths = {}
    for line in text.splitlines():
        match = re.fullmatch(r"(\d+):([^:]*):(/.*)", line.strip())
        if not match:
            continue
        if match[1] == "0" and not match[2]:
            paths[V2] = match[3]
        else:
            controllers = [c for c in match[2].split(",") if c in V1_CONTROLLERS]
            if controllers:
                paths[",".join(controllers)] = match[3]
    return paths


def _pids(directory: Path) -> Set[int]:
    try:
        return {int(word) for word in (directory / "cgroup.procs").read_text(encoding="ascii").split() if word != "0"}
    except OSError as error:
        # Gone, going, or a threaded group, whose processes are listed one level up.
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
            return set()
        raise


@dataclass(frozen=True)
class Group:
    """One path in several hierarchies, as a job manager has it for a job. ``path`` starts with a slash."""

    hierarchies: Tuple[Hierarchy, ...]
    path: str

    def directories(self) -> Tuple[Path, ...]:
        """One directory per hierarchy, v2 first."""
        return tuple(hierarchy.mount / self.path.lstrip("/") for hierarchy in self.hierarchies)

    def child(self, name: str) -> Group:
        """The group ``name`` below this one."""
        return Group(self.hierarchies, f"{self.path}/{name}")

    def make(self) -> Group:
        """Create it, with parents, in every hierarchy. Raises OSError."""
        for directory in self.directories():
            directory.mkdir(parents=True, exist_ok=True)
        return self

    def procs_files(self) -> Tuple[str, ...]:
        """The files a process writes its pid to so as to enter."""
        return tuple(str(directory / "cgroup.procs") for directory in self.directories())

    def enter(self, pid: int) -> None:
        """Put a process in, in every hierarchy. Raises OSError."""
        for name in self.procs_files():
            Path(name).write_text(str(pid), encoding="ascii")

    def pids(self) -> FrozenSet[int]:
        """Processes in this group or below, in any hierarchy."""
        found: Set[int] = set()
        for top in self.directories():
            for directory, _, _ in os.walk(top):
                found |= _pids(Path(directory))
        return frozenset(found)

    def kill(self) -> None:
        """Kill every process in it or below, as a job manager does at a job's end, and wait until they are gone.

        Raises RuntimeError naming the processes that stay.
        """
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while True:
            pids = self.pids() - {os.getpid()}
            if not pids:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"cgroup {self.path}: processes {sorted(pids)} survive SIGKILL")
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.005)

    def remove(self) -> None:
        """Kill what is in it, then remove it and everything below in every hierarchy. Missing is fine."""
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while True:
            self.kill()
            try:
                for top in self.directories():
                    for directory, _, _ in os.walk(top, topdown=False):
                        Path(directory).rmdir()
                return
            except OSError as error:
                if error.errno == errno.ENOENT:
                    continue
                # EBUSY: a process was on its way out, or forked as it was killed.
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.005)
