"""Which job directories there are, and which of them may be believed.

Owns the walk from a hierarchy's root to a job's directory and the rules of trust along it; must never
follow a link, believe a directory that somebody other than root could have made, or change anything.
Used by the cgroup backend only.

The rules. Above a job every directory belongs to root and nobody else may write to it: whoever can make
a job's directory gives themselves a job. The job's own directory may belong to its owner (delegation).
A job that fails in one hierarchy is refused in all: a job is moved into everywhere or not at all.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Sequence, Set, Tuple

from adoptd import log
from adoptd.deadline import Deadline
from adoptd.hierarchy import CgroupMounts, Hierarchy, open_root_with_status
from adoptd.jobs.template import JobPath
from adoptd.model import JobFault, JobManagerError

# A node holds hundreds of jobs; a directory with more entries than this is not a job manager's doing.
ENTRIES_MAX = 65_536
_ENTRIES_PER_DEADLINE_CHECK = 256
# Refusals remembered so that each is logged once; past it the oldest may be logged a second time.
_REFUSALS_MAX = 1024
_OPEN_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Place:
    """A job's directory in one hierarchy.

    ``inode`` is the kernfs id of the cgroup. The kernel counts ids up within a hierarchy, 32 bits cyclic with
    the wraps counted above them (__kernfs_new_node, fs/kernfs/dir.c), and shows all 64 as st_ino since
    Linux 5.5: it is never used again and orders cgroups by creation. The directory's times do neither: kernfs
    sets them when the inode is read into memory, and again whenever something below it is made or removed.
    """

    hierarchy: Hierarchy
    inode: int
    owner: int


@dataclass(frozen=True)
class FoundJob:
    """A job that may be believed, and its directory in every hierarchy that has one (at least one)."""

    id: str
    uid: int
    places: Tuple[Place, ...]

    @property
    def identity(self) -> Tuple[int, ...]:
        """Hierarchy number, inode, hierarchy number, inode, ..."""
        return tuple(value for place in self.places for value in (place.hierarchy.number, place.inode))

    def is_still(self, identity: Sequence[int]) -> bool:
        """Whether this is the job that had ``identity``. It may have come to more hierarchies since, not left one."""
        now = {place.hierarchy.number: place.inode for place in self.places}
        pairs = list(zip(identity[::2], identity[1::2]))
        return bool(pairs) and all(now.get(number) == inode for number, inode in pairs)


@dataclass(frozen=True)
class OpenedJob:
    """A believed job and a descriptor of its directory per place, in the order of ``found.places``."""

    found: FoundJob
    descriptors: Tuple[int, ...]


class Budget:
    """How much one question may still read. Shared by all the directories that the question needs."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._entries = 0

    def spend(self) -> None:
        """Count one directory entry. Raises JobManagerError when there are too many or it is too late."""
        self._entries += 1
        if self._entries > ENTRIES_MAX:
            raise JobManagerError(f"more than {ENTRIES_MAX} entries in the job directories")
        if self._entries % _ENTRIES_PER_DEADLINE_CHECK == 0:
            self.check()

    def check(self) -> None:
        """Raises JobManagerError if the deadline has passed."""
        if self._deadline.expired:
            raise JobManagerError("the job directories could not be read in time", JobFault.OUT_OF_TIME)


@dataclass(frozen=True)
class _Parent:
    """An open directory above jobs; ``fault`` says why nothing below it is to be believed."""

    hierarchy: Hierarchy
    descriptor: int
    fault: Optional[str]


class JobDirectories:
    """The jobs of one template in all the hierarchies of this host. Safe to share between threads."""

    def __init__(self, template: JobPath, mounts: CgroupMounts) -> None:
        self._template = template
        self._mounts = mounts
        self._refused: Dict[str, None] = {}
        self._warned_of_missing = False

    def listing(self, uid: Optional[int], budget: Budget) -> List[FoundJob]:
        """The believed jobs below one parent: the user's if the template has {uid}, else everybody's.

        Raises JobManagerError.
        """
        components = self._template.parents(uid)
        jobs = []
        with ExitStack() as stack:
            parents = self._open_parents(components, stack)
            for name in sorted(self._names(parents, budget)):
                budget.check()
                job_id = self._template.job_of_name(name)
                if job_id is not None:
                    job = self._judge(uid, job_id, *_places(parents, name))
                    jobs.extend([job] if job is not None else [])
        self._note_missing(bool(parents))
        return jobs

    def uids(self, budget: Budget) -> List[int]:
        """The uids that have a directory, for a template with {uid}. Raises JobManagerError."""
        with ExitStack() as stack:
            parents = self._open_parents(self._template.fixed, stack)
            names = self._names(parents, budget)
        self._note_missing(bool(parents))
        uids = {self._template.uid_of_name(name) for name in names}
        return sorted(uid for uid in uids if uid is not None)

    @contextmanager
    def opened(self, uid: Optional[int], job_id: str) -> Iterator[Optional[OpenedJob]]:
        """One job, opened; None if there is none that may be believed. Raises JobManagerError, ValueError."""
        name = self._template.job_name(job_id)
        with ExitStack() as stack:
            parents = self._open_parents(self._template.parents(uid), stack)
            places, descriptors, faults = [], [], []
            for parent in parents:
                below = _open_below(parent.descriptor, name, parent.hierarchy)
                if below is not None:
                    descriptor, status = below
                    stack.callback(os.close, descriptor)
                    places.append(Place(parent.hierarchy, status.st_ino, status.st_uid))
                    descriptors.append(descriptor)
                    faults.extend([parent.fault] if parent.fault is not None else [])
            found = self._judge(uid, job_id, places, faults)
            yield None if found is None else OpenedJob(found, tuple(descriptors))

    def find(self, uid: Optional[int], job_id: str) -> Optional[FoundJob]:
        """As :meth:`opened`, for who only wants to know: by names, with a third of the system calls.

        Nobody but root can put another directory in the place of one on the way: that is what is checked of each.
        Raises JobManagerError, ValueError.
        """
        components = (*self._template.parents(uid), self._template.job_name(job_id))
        places, faults = [], []
        for hierarchy in self._hierarchies():
            place, fault = _look(hierarchy, components)
            places.extend([place] if place is not None else [])
            faults.extend([fault] if fault is not None else [])
        return self._judge(uid, job_id, places, faults)

    def holds_jobs(self, hierarchy: Hierarchy) -> bool:
        """Whether the hierarchy has the directory that all jobs are under. Raises JobManagerError."""
        parent = self._open_parent(hierarchy, self._template.fixed)
        if parent is not None:
            os.close(parent.descriptor)
        return parent is not None

    def _names(self, parents: Sequence[_Parent], budget: Budget) -> Set[str]:
        names: Set[str] = set()
        for parent in parents:
            # Not read: its entries are somebody's invention, as many as they like.
            if parent.fault is not None:
                self._refuse(parent.fault)
                continue
            try:
                with os.scandir(parent.descriptor) as entries:
                    for entry in entries:
                        budget.spend()
                        names.add(entry.name)
            except FileNotFoundError:  # removed since it was opened, so it was empty
                continue
            except OSError as error:
                raise JobManagerError(f"jobs in hierarchy {parent.hierarchy.label}: {error.strerror}") from None
        return names

    def _judge(
        self, uid: Optional[int], job_id: str, places: Sequence[Place], faults: Sequence[str]
    ) -> Optional[FoundJob]:
        if not places:
            return None
        path = self._template.render(uid, job_id)
        owners = {place.owner for place in places} - {0}
        reasons = list(faults)
        owner = uid
        if uid is not None:
            reasons += [f"{path}: owned by uid {other}, not by uid {uid} or root" for other in sorted(owners - {uid})]
        elif len(owners) == 1:
            owner = next(iter(owners))
        elif owners:
            reasons.append(f"{path}: owned by different users in different hierarchies: {sorted(owners)}")
        else:
            reasons.append(f"{path}: owned by root and the template has no {{uid}}, so it is nobody's job")
        for reason in reasons:
            self._refuse(reason)
        return None if reasons or owner is None else FoundJob(job_id, owner, tuple(places))

    def _refuse(self, reason: str) -> None:
        if reason not in self._refused:
            if len(self._refused) >= _REFUSALS_MAX:
                with suppress(StopIteration, KeyError, RuntimeError):
                    del self._refused[next(iter(self._refused))]
            self._refused[reason] = None
            log.warning("job_refused", error=reason)

    def _note_missing(self, found_parents: bool) -> None:
        """Say once that the directory of all jobs is nowhere: a manager that starts lazily, or a wrong ``path``.

        It still counts as "no jobs", not as a failure: it is the normal state of a node before its first job, and
        a failure would by default let everybody in (action_generic_failure=ignore), "no jobs" nobody.
        """
        if found_parents or any(self.holds_jobs(hierarchy) for hierarchy in self._hierarchies()):
            self._warned_of_missing = False
        elif not self._warned_of_missing:
            self._warned_of_missing = True
            fixed = "/" + "/".join(self._template.fixed)
            words = f"{fixed} is in no cgroup hierarchy, so nobody has a job; [jobs] path is {self._template.text}"
            log.warning("jobs_directory_missing", error=words)

    def _hierarchies(self) -> Tuple[Hierarchy, ...]:
        hierarchies = self._mounts.hierarchies()
        if not hierarchies:
            raise JobManagerError("no cgroup hierarchy is mounted whole on this host")
        return hierarchies

    def _open_parents(self, components: Sequence[str], stack: ExitStack) -> List[_Parent]:
        parents = []
        for hierarchy in self._hierarchies():
            parent = self._open_parent(hierarchy, components)
            if parent is not None:
                stack.callback(os.close, parent.descriptor)
                parents.append(parent)
        return parents

    def _open_parent(self, hierarchy: Hierarchy, components: Sequence[str]) -> Optional[_Parent]:
        descriptor, status = open_root_with_status(hierarchy)
        path = hierarchy.mount_point
        fault = _fault(status, path)
        for name in components:
            try:
                child = _open_below(descriptor, name, hierarchy)
            finally:
                os.close(descriptor)
            if child is None:
                return None
            descriptor, status = child
            path = f"{path}/{name}"
            fault = fault or _fault(status, path)
        return _Parent(hierarchy, descriptor, fault)


def _look(hierarchy: Hierarchy, components: Sequence[str]) -> Tuple[Optional[Place], Optional[str]]:
    """The directory at the end of ``components``, None if it is not there, and what is wrong on the way to it."""
    path = "/".join((hierarchy.mount_point, *components))
    found = _directory_at(path, hierarchy)
    mount = _status_of(hierarchy.mount_point, follow=True)
    if mount is None or mount.st_dev != hierarchy.device:
        raise JobManagerError(f"{hierarchy.mount_point}: cgroup hierarchy {hierarchy.label} is no longer mounted here")
    if found is None:
        return None, None
    fault = _fault(mount, hierarchy.mount_point)
    path = hierarchy.mount_point
    for name in components[:-1]:
        path = f"{path}/{name}"
        above = _directory_at(path, hierarchy)
        if above is None:
            return None, None
        fault = fault or _fault(above, path)
    return Place(hierarchy, found.st_ino, found.st_uid), fault


def _directory_at(path: str, hierarchy: Hierarchy) -> Optional[os.stat_result]:
    """The directory of that hierarchy, and no link to one; None if there is none."""
    status = _status_of(path, follow=False)
    if status is None or not stat.S_ISDIR(status.st_mode) or status.st_dev != hierarchy.device:
        return None
    return status


def _status_of(path: str, follow: bool) -> Optional[os.stat_result]:
    try:
        return os.stat(path, follow_symlinks=follow)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise JobManagerError(f"{path}: {error.strerror}") from None


def _places(parents: Sequence[_Parent], name: str) -> Tuple[List[Place], List[str]]:
    places, faults = [], []
    for parent in parents:
        try:
            status = os.stat(name, dir_fd=parent.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise JobManagerError(f"{name} in hierarchy {parent.hierarchy.label}: {error.strerror}") from None
        if stat.S_ISDIR(status.st_mode) and status.st_dev == parent.hierarchy.device:
            places.append(Place(parent.hierarchy, status.st_ino, status.st_uid))
            faults.extend([parent.fault] if parent.fault is not None else [])
    return places, faults


def _open_below(parent: int, name: str, hierarchy: Hierarchy) -> Optional[Tuple[int, os.stat_result]]:
    """A directory of the hierarchy right below ``parent`` and its fstat(2); None if there is none of that name."""
    try:
        descriptor = os.open(name, _OPEN_FLAGS, dir_fd=parent)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise JobManagerError(f"{name} in hierarchy {hierarchy.label}: {error.strerror}") from None
    status = os.fstat(descriptor)
    if status.st_dev != hierarchy.device:
        os.close(descriptor)
        return None
    return descriptor, status


def _fault(status: os.stat_result, path: str) -> Optional[str]:
    if status.st_uid != 0:
        return f"{path}: owned by uid {status.st_uid}, not by root, so jobs below it are not believed"
    if status.st_mode & _WRITABLE_BY_OTHERS:
        return f"{path}: writable by group or others, so jobs below it are not believed"
    return None
