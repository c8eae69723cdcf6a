"""The sockets of this node's extern steps in slurmd's spool directory: which there are, and which may be believed.

Owns the directory's trust and the sockets' names. It must never unlink a socket, nor take another node's for this
one's. Nobody is connected to here. Called by slurm_spool.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Dict, FrozenSet, Iterator, List, Set

from adoptd import log
from adoptd.jobs.slurm_conf import SlurmConf, SlurmSettings
from adoptd.jobs.slurm_paths import parse_job_id
from adoptd.jobs.slurm_wire import EXTERN_STEPS
from adoptd.model import JobFault, JobManagerError

_COMPLAINTS_MAX = 1024
# Any node's extern step; the last "." may be followed by a heterogeneous component.
STEP_SOCKET = re.compile(r"(.+)_([0-9]{1,10})\.([0-9]{1,10})(?:\.[0-9]{1,10})?", re.DOTALL)


@dataclass(frozen=True)
class StepFile:
    """A socket file. Device, inode and ctime together are never those of an earlier file of that name."""

    name: str
    job_id: int
    device: int
    inode: int
    ctime_ns: int


@dataclass(frozen=True)
class SpoolDirectory:
    """slurmd's spool directory, open and found to be root's or Slurm's alone, and the settings that named it."""

    descriptor: int
    settings: SlurmSettings

    def has(self, file: StepFile) -> bool:
        """Whether this very file is there still."""
        try:
            status = os.stat(file.name, dir_fd=self.descriptor, follow_symlinks=False)
        except OSError:
            return False
        return (status.st_dev, status.st_ino, status.st_ctime_ns) == (file.device, file.inode, file.ctime_ns)


class Complaints:
    """What is wrong with a step, said once until it is found well again: each is asked at every login."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: Dict[str, str] = {}

    def say(self, subject: str, fault: JobFault, text: str) -> None:
        """One line in the log, unless it was the last that was said of ``subject``."""
        with self._lock:
            if self._said.get(subject) == text:
                return
            if len(self._said) >= _COMPLAINTS_MAX:
                self._said.clear()
            self._said[subject] = text
        log.warning("job_fault", fault=fault.value, detail=text)

    def withdraw(self, subject: str) -> None:
        """It is well again."""
        with self._lock:
            self._said.pop(subject, None)


class StepSockets:
    """The sockets of one node's steps. Safe to share between threads."""

    def __init__(self, conf: SlurmConf, complaints: Complaints, noted: Callable[[JobFault], None]) -> None:
        """``noted`` is told of each fault that no login fails of."""
        self._conf = conf
        self._complaints = complaints
        self._noted = noted

    @contextmanager
    def opened(self) -> Iterator[SpoolDirectory]:
        """The spool directory. Raises JobManagerError if it cannot be read or believed."""
        settings = self._conf.settings()
        try:
            descriptor = os.open(settings.spool_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            text = f"slurmd's spool directory {settings.spool_dir}: {error.strerror}"
            raise JobManagerError(text, JobFault.SPOOL_UNREADABLE) from None
        try:
            # Where it really is, behind any link, by the word of the kernel.
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            _check_trusted(path, descriptor, settings.trusted_uids)
            yield SpoolDirectory(descriptor, settings)
        finally:
            os.close(descriptor)

    def files(self, spool: SpoolDirectory) -> List[StepFile]:
        """The sockets of this node's extern steps. Raises JobManagerError."""
        # Read every time. Its modification time is no proof that nothing has changed: two changes within one tick of
        # the kernel's clock have the same one, a file server has a clock of its own, and any clock can be set back.
        files: List[StepFile] = []
        others: Set[str] = set()
        settings = spool.settings
        try:
            names = os.listdir(spool.descriptor)
        except OSError as error:
            text = f"slurmd's spool directory {settings.spool_dir}: {error.strerror}"
            raise JobManagerError(text, JobFault.SPOOL_UNREADABLE) from None
        for name in names:
            match = STEP_SOCKET.fullmatch(name)
            job_id = parse_job_id(match[2]) if match is not None else None
            if match is None or job_id is None or int(match[3]) not in EXTERN_STEPS:
                continue
            if match[1] != settings.node_name:
                others.add(match[1])
                continue
            try:
                status = os.stat(name, dir_fd=spool.descriptor, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if not stat.S_ISSOCK(status.st_mode) or status.st_uid not in settings.trusted_uids:
                text = f"{settings.spool_dir}/{name}: not a socket of root's or SlurmUser's, ignored"
                self._complaints.say(name, JobFault.FOREIGN_SOCKET, text)
                self._noted(JobFault.FOREIGN_SOCKET)
                continue
            files.append(StepFile(name, job_id, status.st_dev, status.st_ino, status.st_ctime_ns))
        if others and not files and not settings.node_name_certain:
            # Then the guess is wrong, and "no jobs" would turn away everybody who has some.
            raise JobManagerError(
                f"{settings.spool_dir} has job steps of node {', '.join(sorted(others))} and none of "
                f"{settings.node_name}, which is only this host's name: set the NodeName",
                JobFault.OTHER_NODE,
            )
        return files


def _check_trusted(path: str, directory: int, trusted: FrozenSet[int]) -> None:
    """Raise JobManagerError if anybody else could put a socket there, or another directory in its place."""
    statuses = [(path, os.fstat(directory))]
    parent = os.path.dirname(path)
    while True:
        try:
            statuses.append((parent, os.stat(parent)))
        except OSError as error:
            raise JobManagerError(f"{parent}: {error.strerror}", JobFault.SPOOL_UNREADABLE) from None
        if parent == "/":
            break
        parent = os.path.dirname(parent)
    for name, status in statuses:
        if status.st_uid not in trusted:
            text = f"slurmd's spool directory {path}: {name} belongs to uid {status.st_uid}"
            raise JobManagerError(text, JobFault.SPOOL_UNTRUSTED)
        open_to_group = status.st_mode & stat.S_IWGRP and status.st_gid != 0
        if not (open_to_group or status.st_mode & stat.S_IWOTH):
            continue
        # In a sticky directory others can add entries, but not replace one that is not theirs.
        if name == path or not status.st_mode & stat.S_ISVTX:
            text = f"slurmd's spool directory {path}: others can write to {name}"
            raise JobManagerError(text, JobFault.SPOOL_UNTRUSTED)
