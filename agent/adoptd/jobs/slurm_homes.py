"""Where Slurm's jobs are in this host's cgroup hierarchies, and what a process's paths say of that.

Owns the meeting of Slurm's layouts with the mounted hierarchies. What is found is what paths say: whether a job is to
be believed its step tells. Changes nothing. Called by the slurm backend and by its adoptions.
"""

from __future__ import annotations

import os
import re
from typing import Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from adoptd.hierarchy import CgroupMounts, Hierarchy, HierarchyKind
from adoptd.jobs.looks import can_freeze, is_frozen
from adoptd.jobs.slurm_conf import SlurmConf
from adoptd.jobs.slurm_paths import NamedJob, SlurmPaths
from adoptd.model import Job

# Below a step of cgroup v2: what is not slurmstepd's own, and what Slurm freezes. In v1 it freezes the step.
_USER = "/user"


class Homes:
    """The cgroups of Slurm's jobs here. ``sluid`` is the step's, None before Slurm 25.11."""

    def __init__(self, conf: SlurmConf, mounts: CgroupMounts) -> None:
        self._conf = conf
        self._mounts = mounts

    @property
    def _paths(self) -> SlurmPaths:
        return self._conf.settings().paths

    def of(self, job: Job, sluid: Optional[int]) -> Iterator[Hierarchy]:
        """The hierarchies in which the job's extern step has a cgroup, looked for one by one. Raises JobManagerError
        before the first."""
        paths = self._paths
        return (each for each in self._mounts.hierarchies() if _is_home(paths, each, job, sluid))

    def missing(self, job: Job, sluid: Optional[int], homes: Sequence[Hierarchy], where: Mapping[int, str]) -> str:
        """In words, the hierarchies among ``homes`` in which a process at ``where`` is not in the job; or ""."""
        paths = self._paths
        mine = _names_of(job, sluid)
        labels = [each.label for each in homes if paths.parse(each.kind, where.get(each.number, "")) not in mine]
        return f"not in its cgroup of {', '.join(labels)}" if labels else ""

    def hold(self, job: Job, sluid: Optional[int], where: Mapping[int, str]) -> bool:
        """Whether a process at ``where`` is in the job, in every hierarchy that has it."""
        mine = _names_of(job, sluid)
        paths = self._paths
        inside: List[Hierarchy] = []
        outside: List[Hierarchy] = []
        for each in self._mounts.hierarchies():
            (inside if paths.parse(each.kind, where.get(each.number, "")) in mine else outside).append(each)
        # Most of the time one look settles each: whether a hierarchy has the job's extern step at all.
        return any(_is_home(paths, each, job, sluid) for each in inside) and not any(
            _is_home(paths, each, job, sluid) for each in outside
        )

    def named(self, where: Mapping[int, str]) -> Set[NamedJob]:
        """The jobs that the paths of a process name."""
        paths = self._paths
        found = (paths.parse(each.kind, where.get(each.number, "")) for each in self._mounts.hierarchies())
        return {named for named in found if named is not None}

    def entered(self, before: Mapping[int, str], now: Mapping[int, str]) -> List[str]:
        """In words, the jobs' cgroups that a process is in now and was not before."""
        paths = self._paths
        return [
            f"{now[each.number]} ({each.label})"
            for each in self._mounts.hierarchies()
            if now.get(each.number) != before.get(each.number)
            and paths.parse(each.kind, now.get(each.number, "")) is not None
        ]

    def job_cgroups(self, where: Mapping[int, str]) -> Mapping[int, str]:
        """Of a process at ``where``, its job's cgroup by hierarchy: that of all its steps."""
        paths = self._paths
        found = {}
        for each in self._mounts.hierarchies():
            path = where.get(each.number, "")
            if paths.parse(each.kind, path) is not None:
                steps = (path[: match.start()] for match in re.finditer(r"/|$", path))
                found[each.number] = next(step for step in steps if paths.parse(each.kind, step)).rpartition("/")[0]
        return found

    def is_frozen(self, job: Job, sluid: Optional[int]) -> bool:
        """Whether who comes into the job's extern step stands still. Raises JobManagerError.

        Users have that at any time (scancel --signal=STOP), administrators too (scontrol suspend).
        """
        paths = self._paths
        for each in self._mounts.hierarchies():
            step = _home(paths, each, job, sluid) if can_freeze(each) else None
            if step is not None and is_frozen(each, step + (_USER if each.kind is HierarchyKind.V2 else "")):
                return True
        return False

    def other_steps(self, job: Job, sluid: Optional[int]) -> Iterator[Tuple[str, ...]]:
        """By hierarchy, the directories of the job's steps other than the extern step. Raises JobManagerError."""
        for home in self.of(job, sluid):
            found: List[str] = []
            for extern in self._paths.extern_steps(home.kind, job.uid, int(job.id), sluid):
                directory, _, own = (home.mount_point + extern).rpartition("/")
                names = (name for name in _entries(directory) if name.startswith("step_") and name != own)
                found += (f"{directory}/{name}" for name in names)
            yield tuple(found)

    def may_be_of(self, uid: int, job_id: int) -> bool:
        """Whether a job whose step has never said whose it is may be this user's: cgroup v1 names the owner too."""
        paths = self._paths
        owners: Set[str] = set()
        for each in self._mounts.hierarchies():
            for top in paths.tops(HierarchyKind.V1) if each.kind is HierarchyKind.V1 else ():
                directory = each.mount_point + top
                owners.update(name for name in _entries(directory) if os.path.isdir(f"{directory}/{name}/job_{job_id}"))
        return not owners or f"uid_{uid}" in owners

    def are_in_v2_alone(self) -> bool:
        """Whether Slurm keeps its jobs in cgroup v2 and nowhere else."""
        kinds = [each.kind for each in self._mounts.hierarchies() if self._has_jobs(each)]
        return HierarchyKind.V2 in kinds and HierarchyKind.V1 not in kinds

    def _has_jobs(self, hierarchy: Hierarchy) -> bool:
        return any(os.path.isdir(hierarchy.mount_point + top) for top in self._paths.tops(hierarchy.kind))


def _entries(directory: str) -> List[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _names_of(job: Job, sluid: Optional[int]) -> Tuple[NamedJob, ...]:
    """What a path may call the job."""
    number = int(job.id)
    return NamedJob(number, None, job.uid), NamedJob(number, None, None), NamedJob(None, sluid, None)


def _is_home(paths: SlurmPaths, hierarchy: Hierarchy, job: Job, sluid: Optional[int]) -> bool:
    """Whether the job's extern step has a cgroup in the hierarchy."""
    return _home(paths, hierarchy, job, sluid) is not None


def _home(paths: SlurmPaths, hierarchy: Hierarchy, job: Job, sluid: Optional[int]) -> Optional[str]:
    """The path of the cgroup that the job's extern step has in the hierarchy; None if it has none."""
    steps = paths.extern_steps(hierarchy.kind, job.uid, int(job.id), sluid)
    # Twenty looks in each adoption, most of them in vain, and it is the exception that makes stat() slow. Nothing else
    # than a cgroup has such a name there.
    return next((step for step in steps if os.access(hierarchy.mount_point + step, os.F_OK)), None)
