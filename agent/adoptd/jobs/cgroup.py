"""Jobs that are plain cgroups: any manager that gives each job a cgroup at a known path.

Owns the answers of the JobBackend protocol for such managers, on cgroup v1, v2 and both together. It
must never take a path for a job without the owner being checked (directories.py does), nor create or
remove a cgroup: that is the manager's. Built by the service, called by callerid, adoption and sessions.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from adoptd import log
from adoptd.deadline import Deadline
from adoptd.hierarchy import CgroupMounts, Hierarchy, HierarchyKind, path_of_id
from adoptd.jobs import CgroupFinding, CgroupVerdict, JobSession, JobsHere
from adoptd.jobs.directories import Budget, FoundJob, JobDirectories, OpenedJob
from adoptd.jobs.environment import processes_below
from adoptd.jobs.looks import can_freeze, is_frozen, job_by_paths
from adoptd.jobs.move import Target, move
from adoptd.jobs.template import JobPath, parse_leaf
from adoptd.model import AdoptionFailed, Job, JobFault, JobManagerError
from adoptd.process import ProcessHandle

_LEAF_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class CgroupJobs:
    """The JobBackend for plain cgroups."""

    name = "cgroup"
    job_variable = "ADOPTD_JOB_ID"

    def __init__(self, template: JobPath, leaf: str = "", mounts: Optional[CgroupMounts] = None) -> None:
        """``leaf`` is the cgroup below the job's that sessions go into, "" for the job's own.

        Raises ValueError if it is not a relative path.
        """
        self._template = template
        self._leaf = parse_leaf(leaf)
        self._mounts = mounts if mounts is not None else CgroupMounts()
        self._directories = JobDirectories(template, self._mounts)

    def jobs_of(self, uid: int, deadline: Deadline) -> Tuple[Job, ...]:
        """The user's jobs, newest first. Raises JobManagerError."""
        found = self._directories.listing(uid if self._template.has_uid else None, Budget(deadline))
        return _newest_first([job for job in found if job.uid == uid])

    @contextmanager
    def here(self, uid: int, deadline: Deadline) -> Iterator[JobsHere]:
        """jobs_of() and adopt_for_session(): there is nothing to keep open."""
        jobs = self.jobs_of(uid, deadline)
        frozen = {job for job in jobs if self._is_frozen(job)}
        running = tuple(job for job in jobs if job not in frozen)
        yield JobsHere(running, self.adopt_for_session, tuple(job for job in jobs if job in frozen))

    def all_jobs(self, deadline: Deadline) -> Tuple[Job, ...]:
        """Everybody's jobs, by uid and then newest first. Raises JobManagerError.

        For the admin's eyes: a user whose jobs cannot be ordered is left out with a warning, not all of them.
        """
        budget = Budget(deadline)
        uids: Sequence[Optional[int]] = self._directories.uids(budget) if self._template.has_uid else [None]
        by_owner: Dict[int, List[FoundJob]] = {}
        for uid in uids:
            for job in self._directories.listing(uid, budget):
                by_owner.setdefault(job.uid, []).append(job)
        jobs: List[Job] = []
        for owner in sorted(by_owner):
            try:
                jobs.extend(_newest_first(by_owner[owner]))
            except JobManagerError as error:
                log.warning("jobs_left_out", uid=owner, error=str(error))
        return tuple(jobs)

    def job_of_process(self, pid: int) -> Optional[Job]:
        """The job a process is in: named by at least one hierarchy, contradicted by none.

        Raises Ambiguous if hierarchies name different jobs or the process keeps being moved; JobManagerError.
        """
        return job_by_paths(pid, self._mounts, self._jobs_named)

    def job_of_cgroup(self, cgroup_id: int, pid: Optional[int] = None) -> CgroupVerdict:
        """What a cgroup-v2 id says about the job of whatever had it. Raises JobManagerError.

        NO_JOB only where jobs are in v2 and nowhere else: a process outside every job's v2 cgroup may still be in
        a job's v1 cgroups, and one in the v2 root has, on a host whose manager uses v1, merely not been moved.
        """
        # Read first, as in contains().
        where = None if pid is None else self._mounts.membership(pid)
        unified, legacy = self._by_kind()
        if unified is None:
            return CgroupVerdict(CgroupFinding.CANNOT_TELL, "no cgroup v2 hierarchy is mounted")
        path = path_of_id(unified, cgroup_id)
        if path is None:
            return self._removed(cgroup_id, unified, legacy)
        if path == "/":
            return CgroupVerdict(CgroupFinding.CANNOT_TELL, "the root cgroup is where nothing has been moved")
        location = self._template.parse(path)
        if location is not None:
            found = self._believed_at(location.uid, location.job_id, [unified])
            # Still there: then nothing above it was removed and made again while the job was looked at.
            if path_of_id(unified, cgroup_id) != path:
                return self._removed(cgroup_id, unified, legacy)
            if found is not None:
                holds = None if where is None else self._is_in(found, where)
                return CgroupVerdict(CgroupFinding.JOB, f"{path!r}", _newest_first([found])[0], holds)
        if not self._directories.holds_jobs(unified):
            return CgroupVerdict(CgroupFinding.CANNOT_TELL, "no jobs are kept in cgroup v2 on this host")
        if any(self._directories.holds_jobs(hierarchy) for hierarchy in legacy):
            return CgroupVerdict(
                CgroupFinding.CANNOT_TELL, f"{path!r} is in no job, but jobs are kept in cgroup v1 too"
            )
        return CgroupVerdict(CgroupFinding.NO_JOB, f"{path!r} is in no job")

    def _removed(self, cgroup_id: int, unified: Hierarchy, legacy: Sequence[Hierarchy]) -> CgroupVerdict:
        only_here = self._directories.holds_jobs(unified) and not any(map(self._directories.holds_jobs, legacy))
        finding = CgroupFinding.GONE if only_here else CgroupFinding.CANNOT_TELL
        return CgroupVerdict(finding, f"cgroup {cgroup_id} has been removed")

    def job_cgroups(self, where: Mapping[int, str]) -> Mapping[int, str]:
        """Of a process at ``where``, its job's cgroup by hierarchy."""
        found = {}
        for number, path in where.items():
            location = self._template.parse(path)
            if location is not None:
                found[number] = self._template.render(location.uid, location.job_id)
        return found

    def adopt(self, process: ProcessHandle, job: Job, deadline: Deadline) -> None:
        """Move the process into the job's leaf in every hierarchy that has the job. Raises AdoptionFailed."""
        try:
            with self._directories.opened(self._path_uid(job), job.id) as opened, ExitStack() as stack:
                if opened is None or not self._is_still(opened, job):
                    raise AdoptionFailed(f"job {job.id} of uid {job.uid} is gone", JobFault.JOB_ENDED)
                move(process, self._targets(opened, stack), self._mounts, deadline)
        except (JobManagerError, ValueError) as error:
            raise AdoptionFailed(f"job {job.id} of uid {job.uid}: {error}") from None

    def adopt_for_session(
        self, process: ProcessHandle, job: Job, x11: bool, namespaces: bool, deadline: Deadline
    ) -> JobSession:
        """adopt(), then session(), of a job that is not suspended."""
        if self._is_frozen(job):
            # Since the jobs were listed. No fault of the manager's, and for a login as good as ended.
            raise AdoptionFailed(f"job {job.id} is suspended", JobFault.JOB_ENDED)
        self.adopt(process, job, deadline)
        return self.session(job, x11, namespaces, deadline)

    def contains(self, job: Job, pid: int) -> bool:
        """Whether the process is in this very job in every hierarchy that has it. Raises JobManagerError."""
        # Read first: if the job is found to be the same afterwards, it was the same when this was read.
        where = self._mounts.membership(pid)
        if where is None:
            return False
        try:
            found = self._directories.find(self._path_uid(job), job.id)
        except ValueError:
            return False
        if found is None or found.uid != job.uid or not found.is_still(job.identity):
            return False
        return self._is_in(found, where)

    def _is_in(self, job: FoundJob, where: Mapping[int, str]) -> bool:
        """Whether a process at ``where`` is in the job in every hierarchy that has it."""
        named = (job.id, job.uid if self._template.has_uid else None)
        locations = (self._template.parse(where.get(place.hierarchy.number, "")) for place in job.places)
        return all(location is not None and (location.job_id, location.uid) == named for location in locations)

    def processes(self, job: Job, deadline: Deadline) -> Tuple[int, ...]:
        """Pids in the job's cgroup and below it, sessions among them: a plain cgroup does not tell them apart."""
        try:
            with self._directories.opened(self._path_uid(job), job.id) as opened:
                if opened is None or not self._is_still(opened, job):
                    return ()
                # The directory that was checked, not whichever has its path by now.
                return processes_below(f"/proc/self/fd/{opened.descriptors[0]}", deadline)
        except ValueError:
            return ()

    def session(self, job: Job, x11: bool, namespaces: bool, deadline: Deadline) -> JobSession:
        """ADOPTD_JOB_ID; a plain cgroup has neither a display nor namespaces of its own."""
        return JobSession({"ADOPTD_JOB_ID": job.id})

    def for_node(self, node_name: str) -> CgroupJobs:
        """This very backend: a cgroup has no node name."""
        return self

    def _is_frozen(self, job: Job) -> bool:
        """Whether who comes into the job's leaf stands still, in any hierarchy that has it. Raises JobManagerError."""
        path = "/".join((self._template.render(self._path_uid(job), job.id), *self._leaf))
        homes = (each for each in self._mounts.hierarchies() if can_freeze(each))
        return any(is_frozen(each, path) for each in homes if os.access(each.mount_point + path, os.F_OK))

    def _path_uid(self, job: Job) -> Optional[int]:
        return job.uid if self._template.has_uid else None

    @staticmethod
    def _is_still(opened: OpenedJob, job: Job) -> bool:
        return opened.found.uid == job.uid and opened.found.is_still(job.identity)

    def _by_kind(self) -> Tuple[Optional[Hierarchy], List[Hierarchy]]:
        hierarchies = self._mounts.hierarchies()
        unified = next((each for each in hierarchies if each.kind is HierarchyKind.V2), None)
        return unified, [each for each in hierarchies if each.kind is HierarchyKind.V1]

    def _jobs_named(self, membership: Mapping[int, str]) -> List[Job]:
        """The distinct jobs that the hierarchies name and that may be believed."""
        naming: Dict[Tuple[Optional[int], str], List[Hierarchy]] = {}
        for hierarchy in self._mounts.hierarchies():
            location = self._template.parse(membership.get(hierarchy.number, ""))
            if location is not None:
                naming.setdefault((location.uid, location.job_id), []).append(hierarchy)
        jobs = (self._believed(uid, job_id, hierarchies) for (uid, job_id), hierarchies in naming.items())
        return [job for job in jobs if job is not None]

    def _believed(self, uid: Optional[int], job_id: str, hierarchies: Sequence[Hierarchy]) -> Optional[Job]:
        found = self._believed_at(uid, job_id, hierarchies)
        return None if found is None else _newest_first([found])[0]

    def _believed_at(self, uid: Optional[int], job_id: str, hierarchies: Sequence[Hierarchy]) -> Optional[FoundJob]:
        """The job of that path, if it may be believed and is in one of the hierarchies that named it."""
        found = self._directories.find(uid, job_id)
        if found is None or all(place.hierarchy not in hierarchies for place in found.places):
            return None
        return found

    def _targets(self, opened: OpenedJob, stack: ExitStack) -> List[Target]:
        uid = opened.found.uid if self._template.has_uid else None
        path = "/".join((self._template.render(uid, opened.found.id), *self._leaf))
        targets = []
        for place, job_directory in zip(opened.found.places, opened.descriptors):
            descriptor = job_directory
            for name in self._leaf:
                try:
                    descriptor = os.open(name, _LEAF_FLAGS, dir_fd=descriptor)
                except OSError as error:
                    text = f"leaf {path} in hierarchy {place.hierarchy.label}: {error.strerror}"
                    raise AdoptionFailed(text) from None
                stack.callback(os.close, descriptor)
            targets.append(Target(place.hierarchy, path, descriptor))
        return targets


def _newest_first(found: Sequence[FoundJob]) -> Tuple[Job, ...]:
    """Jobs of one user by creation. Raises JobManagerError if they share no hierarchy to compare them in.

    Inode numbers of two hierarchies are two counters: comparing across them would be a guess.
    """
    if not found:
        return ()
    shared = set.intersection(*({place.hierarchy.number for place in job.places} for job in found))
    if not shared:
        names = ", ".join(sorted(job.id for job in found))
        raise JobManagerError(f"jobs {names} are in no common cgroup hierarchy, so which is newer cannot be told")
    number = min(shared)
    jobs = []
    for job in found:
        created = next(place.inode for place in job.places if place.hierarchy.number == number)
        jobs.append(Job(job.id, job.uid, created, job.identity))
    return tuple(sorted(jobs, key=lambda job: job.created, reverse=True))
