"""Slurm's own cgroups, v1 with several slurmd on a host: where a job's are, and taking them away.

Owns ``slurm_<node>`` in every v1 hierarchy that slurmd uses; node names carry the run they belong to, so
no other slurmd's are touched. Called by the lab and by the tests' cluster, and by whoever clears up.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple

CGROUPS = Path("/sys/fs/cgroup")
# Those that Slurm 22.05 uses with task/cgroup (cores and memory), proctrack/cgroup and jobacct_gather/cgroup.
CONTROLLERS = ("freezer", "cpuset", "memory", "cpuacct")
REMOVE_TIMEOUT_S = 10.0

_JOB = re.compile(r"/slurm_(?P<node>[^/]+)/uid_(?P<uid>\d+)/job_(?P<job>\d+)/step_(?P<step>\w+)(?:/task_\w+)?")


@dataclass(frozen=True)
class StepGroup:
    """The cgroups of a job's step on one node: a place that a process can be started in."""

    node_name: str
    uid: int
    job: str
    step: str = "extern"

    def directories(self) -> Tuple[Path, ...]:
        """One per hierarchy."""
        inside = f"slurm_{self.node_name}/uid_{self.uid}/job_{self.job}/step_{self.step}"
        return tuple(CGROUPS / controller / inside for controller in CONTROLLERS)

    def procs_files(self) -> Tuple[str, ...]:
        """The files a process writes its pid to so as to enter."""
        return tuple(str(directory / "cgroup.procs") for directory in self.directories())

    def pids(self) -> List[int]:
        """The processes in it or below, by the hierarchy that Slurm itself tracks them with."""
        found: List[int] = []
        for directory, _, _ in os.walk(self.directories()[0]):
            with contextlib.suppress(OSError):
                found += [int(word) for word in (Path(directory) / "cgroup.procs").read_text().split()]
        return found


def job_of(text: str, node_name: str) -> Optional[Tuple[str, str]]:
    """Job and step that a ``/proc/PID/cgroup`` is in, ("17", "extern"); None in none.

    Raises ValueError if the hierarchies disagree.
    """
    found: Dict[str, Optional[Tuple[str, str]]] = {}
    for line in text.splitlines():
        names, path = line.split(":", 2)[1:]
        for controller in set(names.split(",")) & set(CONTROLLERS):
            match = _JOB.fullmatch(path)
            found[controller] = (match["job"], match["step"]) if match and match["node"] == node_name else None
    if len(set(found.values())) != 1:
        raise ValueError(f"torn between {found}")
    return next(iter(found.values()))


def remove_slurm_cgroups(pattern: str) -> None:
    """Remove ``slurm_<pattern>`` and all below in every v1 hierarchy; no process may be left in them.

    ``pattern`` is a node's name, or a glob of several. Missing is fine. Raises OSError for what stays in use.
    """
    for mount in sorted(CGROUPS.iterdir()):
        for top in mount.glob(f"slurm_{pattern}"):
            for directory, _, _ in os.walk(top, topdown=False):
                _remove(Path(directory))


def _remove(directory: Path) -> None:
    deadline = time.monotonic() + REMOVE_TIMEOUT_S
    while True:
        try:
            directory.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            # EBUSY: the last of its processes is on its way out.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
