"""One process, held so that its pid cannot come to mean another.

Owns the pidfd and the reading of /proc/PID/stat. It must never act on a bare pid without saying what
makes the pid believable. Called by whoever acts on a process or asks when it started: adoption and join (the
process to move), callerid (is the owner of the connection still that process?), sessions, the job backends.
"""

from __future__ import annotations

import errno
import os
import re
import select
import socket
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Optional, Tuple, Type

from adoptd.model import PID_MAX, AdoptionFailed, JobManagerError, OutOfDescriptors

# Start times in /proc count USER_HZ ticks, 10 ms on every Linux since 2.6 (proc_pid_stat(5), sysconf(3)).
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
# Indexes into the fields after comm, of which the first is field 3 (proc_pid_stat(5)).
_STATE, _PPID, _SESSION, _FLAGS, _STARTTIME = 0, 4 - 3, 6 - 3, 9 - 3, 22 - 3
# include/uapi/asm-generic/socket.h, Linux 6.5.
_SO_PEERPIDFD = 77
_STAT_MAX_BYTES = 4096
# What pidfd_open(2) and getsockopt(2) say of us, and not of the process.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
# include/linux/sched.h; the same bit since Linux 2.6.
_PF_EXITING = 0x4
# Lines of /proc/PID/status (proc_pid_status(5)).
_UIDS = re.compile(rb"^Uid:\t(\d+)\t(\d+)\t(\d+)\t(\d+)$", re.MULTILINE)
_TGID = re.compile(rb"^Tgid:\t(\d+)$", re.MULTILINE)
# States of a task that has ended, and is only waited for or not yet taken off the list.
_ENDED = frozenset((b"Z", b"X"))


class Stat(NamedTuple):
    """A line of /proc/PID/stat: the parent, the kernel session (setsid(2)), the start in clock ticks since boot.

    No dataclass: one is made of every process of the host in a look at all of them, and is three times as dear.
    """

    parent: int
    sid: int
    start_ticks: int
    exiting: bool
    ended: bool


def parse_stat(text: bytes) -> Stat:
    """Raises ValueError if it is no such line."""
    # comm is whatever the process likes, spaces, parentheses and newlines included: only the last ")" ends it.
    fields = text.rpartition(b")")[2].split()
    try:
        return Stat(
            parent=int(fields[_PPID]),
            sid=int(fields[_SESSION]),
            start_ticks=int(fields[_STARTTIME]),
            exiting=bool(int(fields[_FLAGS]) & _PF_EXITING),
            ended=fields[_STATE] in _ENDED,
        )
    except (IndexError, ValueError):
        raise ValueError(f"a process's stat has an unknown format: {text[:200]!r}") from None


def stat_of(pid: int, proc_root: str = "/proc") -> Optional[Stat]:
    """A process as it is now, the remains of one that has ended included; None if it is gone.

    Raises JobManagerError if it cannot be read, for want of a descriptor: that is not the same as being gone.
    """
    try:
        return _read_stat(pid, proc_root)
    except OSError as error:
        raise JobManagerError(f"{proc_root}/{pid}/stat: {error.strerror}") from None


def _read_stat(pid: int, proc_root: str) -> Optional[Stat]:
    """Raises OSError for anything but a process that is gone."""
    try:
        # Neither pathlib nor open(): it is read in every answer and login, and most of the time was theirs.
        descriptor = os.open(f"{proc_root}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            # The kernel makes all of it at the first read: a name of 63 bytes and 51 numbers.
            return parse_stat(os.read(descriptor, _STAT_MAX_BYTES))
        finally:
            os.close(descriptor)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None


def started_ns(pid: int, proc_root: str = "/proc") -> Optional[int]:
    """When a process started, in ns of CLOCK_BOOTTIME, rounded down to a clock tick; None if it is gone.

    Field 22 of /proc/PID/stat is the task's start_boottime (fs/proc/array.c; boot time since Linux 5.5,
    and no kernel adoptd runs on is older). Raises JobManagerError as :func:`stat_of`.
    """
    stat = stat_of(pid, proc_root)
    return None if stat is None else stat.start_ticks * _TICK_NS


def was_started_before(pid: int, boottime_ns: int, proc_root: str = "/proc") -> bool:
    """Whether ``pid`` can be the process that had this pid at ``boottime_ns`` (CLOCK_BOOTTIME).

    False if the process is gone or started after that time: the pid has been used again. Also if it is on its way
    out, or only waited for: it is in no cgroup of v1 any more, which must not be taken for being in no job.
    Start times are rounded down by less than a tick, so a process that took the pid within 10 ms of that time passes.
    The strict comparison was rejected: it would disown every client that connects within 10 ms of its start.
    Raises JobManagerError as :func:`stat_of`.
    """
    stat = stat_of(pid, proc_root)
    return stat is not None and not stat.exiting and stat.start_ticks * _TICK_NS <= boottime_ns


def parent_of(pid: int, proc_root: str = "/proc") -> Optional[int]:
    """The pid of a process's parent now; None if it is gone. 0: its parent is outside our pid namespace.

    Raises JobManagerError as :func:`stat_of`.
    """
    stat = stat_of(pid, proc_root)
    return None if stat is None else stat.parent


def uids_in(status: bytes) -> Optional[Tuple[int, int, int, int]]:
    """The real, effective, saved and file system uid in a /proc/PID/status; None if it has no such line."""
    # The name is the first line, and has its newlines escaped (fs/proc/array.c): no line is of the process's making.
    found = _UIDS.search(status)
    return None if found is None else (int(found[1]), int(found[2]), int(found[3]), int(found[4]))


def thread_group_of(tid: int, proc_root: str = "/proc") -> Optional[int]:
    """The pid of the process that a thread, or a process by its own pid, belongs to; None if it is gone."""
    try:
        status = (Path(proc_root) / str(tid) / "status").read_bytes()
    except OSError:
        return None
    found = _TGID.search(status)
    return None if found is None else int(found[1])


class ProcessHandle:
    """A process and the pidfd that holds on to it. Build it with :func:`open_process`, close it after use."""

    def __init__(self, pid: int, pidfd: int, process_started_ns: int, proc_root: str = "/proc") -> None:
        """Take over ``pidfd``, which must be of the process that ``pid`` names."""
        self._proc_root = proc_root
        self.pid = pid
        self.started_ns = process_started_ns
        self._pidfd: Optional[int] = pidfd

    @property
    def start_ticks(self) -> int:
        """Field 22 of /proc/PID/stat: with the pid, a name that no other process has until the next boot."""
        return self.started_ns // _TICK_NS

    def duplicate(self) -> ProcessHandle:
        """Another handle of the same process. Raises OSError if no descriptor is left, ValueError once closed."""
        return ProcessHandle(self.pid, os.dup(self.fileno()), self.started_ns, self._proc_root)

    def alive(self) -> bool:
        """Whether the process has not exited yet. While True the kernel cannot give its pid to another.

        A pidfd turns readable when the whole thread group has exited (pidfd_open(2), Linux 5.3). A
        closed handle is of no process.
        """
        if self._pidfd is None:
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    def exiting(self) -> bool:
        """Whether the process has exited or is on its way out, which no signal or mask can stop any more.

        Between the two the pidfd still says alive, but the kernel moves the process nowhere, and shows it in the
        root of every v1 hierarchy (proc_cgroup_show): a failure to move it then means only this. Where it cannot be
        seen the answer is no, and the failure stands.
        """
        if not self.alive():
            return True
        try:
            stat = stat_of(self.pid, self._proc_root)
        except JobManagerError:
            return False
        return stat is None or stat.exiting

    def fileno(self) -> int:
        """The pidfd, for poll and friends. Raises ValueError once closed."""
        if self._pidfd is None:
            raise ValueError(f"the handle of process {self.pid} is closed")
        return self._pidfd

    def close(self) -> None:
        """Let go of the process. May be called twice."""
        pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            os.close(pidfd)

    def __enter__(self) -> ProcessHandle:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ProcessHandle(pid={self.pid}, started_ns={self.started_ns})"


def open_peer(sock: socket.socket, pid: int) -> ProcessHandle:
    """Take hold of the process that connected the unix socket at the other end, ``pid`` by SO_PEERCRED.

    From Linux 6.5 the kernel gives the pidfd of that very process (SO_PEERPIDFD); before, the pid could have
    passed to another between its connect() and this call. Raises AdoptionFailed if the process has exited, and
    OutOfDescriptors.
    """
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return open_process(pid)
        raise _not_opened(pid, error) from None
    return _hold(pid, pidfd, "/proc")


def open_process(pid: int, proc_root: str = "/proc") -> ProcessHandle:
    """Take hold of the process (not a thread) that has ``pid`` now.

    Raises AdoptionFailed naming the pid if there is none, or it exited while it was being opened, and OutOfDescriptors.
    """
    if not 1 <= pid <= PID_MAX:
        raise AdoptionFailed(f"pid {pid} is not in 1..{PID_MAX}")
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise _not_opened(pid, error) from None
    return _hold(pid, pidfd, proc_root)


def _not_opened(pid: int, error: OSError) -> AdoptionFailed:
    kind = OutOfDescriptors if error.errno in _EXHAUSTED else AdoptionFailed
    return kind(f"process {pid} cannot be opened: {error.strerror}")


def _hold(pid: int, pidfd: int, proc_root: str) -> ProcessHandle:
    # Read after the pidfd is there: if the process still lives afterwards, the start time is its own.
    try:
        stat = _read_stat(pid, proc_root)
    except OSError as error:
        # The last descriptor may have been the pidfd's.
        os.close(pidfd)
        raise _not_opened(pid, error) from None
    handle = None if stat is None else ProcessHandle(pid, pidfd, stat.start_ticks * _TICK_NS, proc_root)
    if handle is None or not handle.alive():
        os.close(pidfd)
        raise AdoptionFailed(f"process {pid} has exited")
    return handle
