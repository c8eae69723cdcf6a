"""What both backends look at in the same way: which job a process is in, and whether a cgroup stands still.

Owns the rule that a job counts only if the process was in the same cgroups before and after it was asked for. Never
follows a process that does not come to rest, nor picks one of two jobs. Changes nothing. Called by the job backends.
"""

from __future__ import annotations

import os
from typing import Callable, Iterable, Mapping, Optional

from adoptd.hierarchy import CgroupMounts, Hierarchy, HierarchyKind
from adoptd.model import Ambiguous, Job

# A process is moved by its manager a few times in its life; one that is elsewhere at every look is not followed.
_LOOKS_MAX = 3

_FREEZER = "freezer"
# A word and its newline.
_WORD_BYTES = 64


def job_by_paths(
    pid: int, mounts: CgroupMounts, jobs_at: Callable[[Mapping[int, str]], Iterable[Job]]
) -> Optional[Job]:
    """The one job that ``jobs_at`` finds in the cgroups of a process, by hierarchy; None: in none, or gone.

    Raises Ambiguous if it finds several or the process keeps being moved, JobManagerError, and what ``jobs_at`` raises.
    """
    before = mounts.membership(pid)
    for _ in range(_LOOKS_MAX):
        if before is None:
            return None
        jobs = {job.identity: job for job in jobs_at(before)}
        after = mounts.membership(pid)
        if after == before:
            if len(jobs) > 1:
                ids = ", ".join(sorted(job.id for job in jobs.values()))
                raise Ambiguous(f"process {pid} is in jobs {ids} at once")
            return next(iter(jobs.values()), None)
        before = after
    raise Ambiguous(f"process {pid} is being moved from cgroup to cgroup")


def can_freeze(hierarchy: Hierarchy) -> bool:
    """Whether processes can be made to stand still by a cgroup of this hierarchy."""
    return hierarchy.kind is HierarchyKind.V2 or _FREEZER in hierarchy.controllers


def is_frozen(hierarchy: Hierarchy, path: str) -> bool:
    """Whether who comes into this cgroup stands still there, or is about to. What cannot be read is not frozen.

    SIGKILL does not end them in cgroup v1, nor does sshd's alarm() anywhere.
    """
    if hierarchy.kind is HierarchyKind.V1:
        # What is above counts in it.
        return _word_in(f"{hierarchy.mount_point}{path}/freezer.state") in (b"FREEZING", b"FROZEN")
    parts = path.split("/")
    above = ("/".join(parts[:count]) for count in range(len(parts), 1, -1))
    return any(_word_in(f"{hierarchy.mount_point}{each}/cgroup.freeze") == b"1" for each in above)


def _word_in(file: str) -> bytes:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(descriptor, _WORD_BYTES).strip()
    except OSError:
        return b""
    finally:
        os.close(descriptor)
