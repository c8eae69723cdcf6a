"""Which limits a process has from its cgroups, and how much of the memory its job has used.

Reads /proc and the cgroup mounts, changes nothing, and knows no job manager: the caller says which cgroups
are the job's. A limit that is not set, or cannot be read, is None. Called for ``adoptctl whereami``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, List, Mapping, Optional, Tuple

from adoptd.hierarchy import CgroupMounts, Hierarchy, HierarchyKind

# Every value is one line of two numbers at most.
_READ_BYTES = 128
# PAGE_COUNTER_MAX: v1's way of saying that there is no limit (mm/page_counter.c). Nothing has 2^60 bytes.
_UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True)
class Limits:
    """What is in force: the least of a cgroup and all above it, bytes, processors and processes.

    ``cpus`` is how many processors' time the process may have, ``cpu_list`` those it may run on; both None if it
    has ended. ``memory_used`` is the whole job's.
    """

    memory_max: Optional[int]
    memory_used: Optional[int]
    cpus: Optional[float]
    cpu_list: Optional[str]
    pids_max: Optional[int]
    pids_used: Optional[int]


def limits_of(pid: int, mounts: CgroupMounts, job_cgroups: Mapping[int, str]) -> Limits:
    """The limits of the process ``pid``, whose job's cgroups are ``job_cgroups`` by hierarchy number.

    The caller answers for the pid still being the process it means. Raises JobManagerError.
    """
    where = mounts.membership(pid) or {}
    memory: List[int] = []
    cpus: List[float] = []
    pids: List[int] = []
    used: Optional[int] = None
    running: Optional[int] = None
    for hierarchy in mounts.hierarchies():
        if hierarchy.number not in where:
            continue
        names = _NAMES[hierarchy.kind]
        for directory in _upwards(hierarchy, where[hierarchy.number]):
            memory += _some(_number(directory / names.memory_max), lambda value: value < _UNLIMITED_BYTES)
            pids += _some(_number(directory / "pids.max"))
            quota = names.quota(directory)
            cpus += [] if quota is None else [quota]
        if hierarchy.number in job_cgroups:
            job = Path(hierarchy.mount_point + job_cgroups[hierarchy.number])
            used = _number(job / names.memory_used) if used is None else used
            running = _number(job / "pids.current") if running is None else running
    allowed = _affinity(pid)
    if allowed is not None:
        cpus.append(float(len(allowed)))
    return Limits(
        memory_max=min(memory, default=None),
        memory_used=used,
        cpus=min(cpus, default=None) if allowed is not None else None,
        cpu_list=None if allowed is None else as_list(allowed),
        pids_max=min(pids, default=None),
        pids_used=running,
    )


def as_list(cpus: Tuple[int, ...]) -> str:
    """Sorted processor numbers as the kernel writes them: "0-3,8"."""
    ranges: List[List[int]] = []
    for cpu in cpus:
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _quota_v1(directory: Path) -> Optional[float]:
    # -1: none (Documentation/scheduler/sched-bwc.rst).
    quota, period = _number(directory / "cpu.cfs_quota_us"), _number(directory / "cpu.cfs_period_us")
    return quota / period if quota is not None and quota > 0 and period else None


def _quota_v2(directory: Path) -> Optional[float]:
    words = _words(directory / "cpu.max")
    if len(words) != 2 or not all(word.isdigit() for word in words) or not int(words[1]):
        return None
    return int(words[0]) / int(words[1])


@dataclass(frozen=True)
class _Names:
    """Where the two interfaces keep the same facts."""

    memory_max: str
    memory_used: str
    quota: Callable[[Path], Optional[float]]


_NAMES = {
    HierarchyKind.V1: _Names("memory.limit_in_bytes", "memory.usage_in_bytes", _quota_v1),
    HierarchyKind.V2: _Names("memory.max", "memory.current", _quota_v2),
}


def _upwards(hierarchy: Hierarchy, path: str) -> Iterator[Path]:
    """The cgroup at ``path`` and all above it. "..", seen from inside a cgroup namespace, leads nowhere."""
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        return
    for count in range(len(parts), -1, -1):
        yield Path(hierarchy.mount_point, *parts[:count])


def _affinity(pid: int) -> Optional[Tuple[int, ...]]:
    try:
        return tuple(sorted(os.sched_getaffinity(pid)))
    except OSError:
        return None


def _words(file: Path) -> List[str]:
    try:
        with file.open("rb", buffering=0) as stream:
            return stream.read(_READ_BYTES).decode("ascii", "replace").split()
    except OSError:
        return []


def _number(file: Path) -> Optional[int]:
    """The one number in a file; None if there is no such file, or it says "max"."""
    words = _words(file)
    return int(words[0]) if len(words) == 1 and words[0].lstrip("-").isdigit() else None


def _some(value: Optional[int], counts: Callable[[int], bool] = lambda value: True) -> List[int]:
    return [value] if value is not None and counts(value) else []
