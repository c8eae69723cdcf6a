"""Moves one process into a set of cgroups: into all of them, or into none.

Owns writing cgroup.procs, reading back where the process is, and undoing. It must never write through a
path (a path can come to mean another cgroup) nor report a move it has not read back. Used by the cgroup
backend only, which opens the cgroups and vouches for them.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import List, Mapping, Sequence

from adoptd.deadline import Deadline
from adoptd.hierarchy import CgroupMounts, Hierarchy, HierarchyKind, open_root
from adoptd.jobs.template import split_path
from adoptd.model import AdoptionFailed, JobManagerError
from adoptd.process import ProcessHandle

# What cgroup v2 answers for a cgroup that may not hold processes: EBUSY where it has controllers enabled
# for its children, EOPNOTSUPP where it is of an invalid threaded type (cgroup_migrate_vet_dst, Linux 4.14).
_NO_PROCESSES_ERRORS = frozenset({errno.EBUSY, errno.EOPNOTSUPP})
# 20 us each; a login's process has one.
_THREADS_MAX = 1024


@dataclass(frozen=True)
class Target:
    """A cgroup to move into: an open descriptor of its directory, and its path for the read-back."""

    hierarchy: Hierarchy
    path: str
    descriptor: int


@dataclass(frozen=True)
class _Step:
    """One hierarchy's part: cgroup.procs of the target and of where the process was, both open for writing."""

    target: Target
    there: int
    back: int


def is_within(path: str, top: str) -> bool:
    """Whether the cgroup ``path`` is ``top`` or below it."""
    return top == "/" or path == top or path.startswith(top + "/")


def move(process: ProcessHandle, targets: Sequence[Target], mounts: CgroupMounts, deadline: Deadline) -> None:
    """Move the whole thread group into every target, and read back that it is there.

    A process that is already at or below a target, with all its threads, is left where it is: what goes on inside a
    job is the job's business. Raises AdoptionFailed, after having put the process back where it was.
    """
    before = _where(process, mounts)
    threads = _threads_of(process, before, mounts)
    todo = [target for target in targets if not all(_is_at(each, target) for each in threads)]
    with ExitStack() as stack:
        # Everything that can fail without a write fails before the first write.
        steps = [_prepare(process, target, before, stack) for target in todo]
        done: List[_Step] = []
        try:
            for step in steps:
                if deadline.expired:
                    raise AdoptionFailed(f"process {process.pid} could not be moved in time")
                _write(process, step.there, step.target)
                done.append(step)
            _read_back(process, targets, mounts)
        except AdoptionFailed as failure:
            raise AdoptionFailed(f"{failure}{_undo(process, done, before, mounts)}") from None


def _where(process: ProcessHandle, mounts: CgroupMounts) -> Mapping[int, str]:
    try:
        where = mounts.membership(process.pid)
    except JobManagerError as error:
        raise AdoptionFailed(str(error)) from None
    # Asked after reading: while the pidfd says alive, the pid was this process's all along.
    if where is None or not process.alive():
        raise AdoptionFailed(f"process {process.pid} has exited")
    return where


def _threads_of(process: ProcessHandle, first: Mapping[int, str], mounts: CgroupMounts) -> Sequence[Mapping[int, str]]:
    """Where each thread is, ``first`` being where the first is: in v1 (file ``tasks``) one can be moved alone."""
    try:
        names = os.listdir(f"/proc/{process.pid}/task")
        if len(names) < 2:
            return [first]
        found = [mounts.membership(int(name)) for name in names[:_THREADS_MAX]]
    except (OSError, JobManagerError):
        # It has exited, or is about to: the move says so.
        return [first]
    return [first, *(where for where in found if where is not None)]


def _is_at(where: Mapping[int, str], target: Target) -> bool:
    path = where.get(target.hierarchy.number)
    return path is not None and is_within(path, target.path)


def _prepare(process: ProcessHandle, target: Target, before: Mapping[int, str], stack: ExitStack) -> _Step:
    label = target.hierarchy.label
    origin = before.get(target.hierarchy.number)
    # Seen from inside a cgroup namespace an origin outside it has "..", which no descriptor of ours leads to.
    if origin is None or split_path(origin) is None:
        raise AdoptionFailed(f"process {process.pid} is in no cgroup of hierarchy {label} that it could be put back to")
    try:
        there = os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=target.descriptor)
        stack.callback(os.close, there)
        root = open_root(target.hierarchy)
        stack.callback(os.close, root)
        back = os.open(f"{origin}/cgroup.procs".lstrip("/"), os.O_WRONLY | os.O_CLOEXEC, dir_fd=root)
        stack.callback(os.close, back)
    except OSError as error:
        raise AdoptionFailed(f"{target.path} in hierarchy {label}: {_reason(error)}") from None
    except JobManagerError as error:
        raise AdoptionFailed(str(error)) from None
    return _Step(target, there, back)


def _write(process: ProcessHandle, descriptor: int, target: Target) -> None:
    if not process.alive():
        raise AdoptionFailed(f"process {process.pid} has exited")
    try:
        os.write(descriptor, b"%d" % process.pid)
    except OSError as error:
        label = target.hierarchy.label
        hint = ""
        if target.hierarchy.kind is HierarchyKind.V2 and error.errno in _NO_PROCESSES_ERRORS:
            hint = "; this cgroup may not hold processes itself, set `leaf` to one below the job's that may"
        elif error.errno == errno.ENOSPC and "cpuset" in target.hierarchy.controllers:
            hint = "; cpuset.cpus or cpuset.mems of this cgroup is empty"
        text = f"{target.path} in hierarchy {label} does not take process {process.pid}: {_reason(error)}{hint}"
        raise AdoptionFailed(text) from None


def _read_back(process: ProcessHandle, targets: Sequence[Target], mounts: CgroupMounts) -> None:
    where = _where(process, mounts)
    for target in targets:
        if not _is_at(where, target):
            if process.exiting():
                raise AdoptionFailed(f"process {process.pid} has exited")
            path = where.get(target.hierarchy.number, "no cgroup")
            label = target.hierarchy.label
            raise AdoptionFailed(f"process {process.pid} is in {path!r} of hierarchy {label}, not in {target.path}")


def _undo(process: ProcessHandle, done: Sequence[_Step], before: Mapping[int, str], mounts: CgroupMounts) -> str:
    """Put the process back, last move first, however late it is. Returns what to add to the message."""
    stuck = []
    for step in reversed(done):
        # Its pid may be another's by now, and that one must not be moved anywhere.
        if process.exiting():
            return ""
        try:
            os.write(step.back, b"%d" % process.pid)
        except OSError as error:
            stuck.append(f"{step.target.hierarchy.label} ({_reason(error)})")
    try:
        where = _where(process, mounts)
    except AdoptionFailed:
        return ""
    for step in done:
        number = step.target.hierarchy.number
        if where.get(number) != before.get(number) and not stuck:
            stuck.append(f"{step.target.hierarchy.label} (it is in {where.get(number)!r})")
    if stuck and process.exiting():
        return ""
    if stuck:
        return f"; and it could not be put back in hierarchy {', '.join(stuck)}"
    return "; put back where it was" if done else ""


def _reason(error: OSError) -> str:
    return f"{errno.errorcode.get(error.errno or 0, 'error')}: {error.strerror}"
