"""One process, held so that its pid cannot come to mean another.

Owns the pidfd and the reading of start times. It must never act on a bare pid without saying what
makes the pid believable. Called by adoption (the process to move) and by callerid (is the owner
of the connection still that process?).
"""

from __future__ import annotations

import errno
import os
import select
import socket
from pathlib import Path
from types import TracebackType
from typing import Optional, Type

from adoptd.model import PID_MAX, AdoptionFailed

# Start times in /proc count USER_HZ ticks, 10 ms on every Linux since 2.6 (proc_pid_stat(5), sysconf(3)).
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
# Indexes into the fields after comm, of which field 3 (state) is the first: flags is 9, starttime 22.
_FLAGS_AFTER_COMM = 9 - 3
_STARTTIME_AFTER_COMM = 22 - 3
# include/uapi/asm-generic/socket.h, Linux 6.5.
_SO_PEERPIDFD = 77
# include/linux/sched.h; the same bit since Linux 2.6.
_PF_EXITING = 0x4


def started_ns(pid: int, proc_root: str = "/proc") -> Optional[int]:
    """When a process started, in ns of CLOCK_BOOTTIME, rounded down to a clock tick; None if it is gone.

    Field 22 of /proc/PID/stat is the task's start_boottime (fs/proc/array.c; boot time since Linux 5.5,
    and no kernel adoptd runs on is older).
    """
    ticks = _stat_field(pid, _STARTTIME_AFTER_COMM, proc_root)
    return None if ticks is None else ticks * _TICK_NS


def was_started_before(pid: int, boottime_ns: int, proc_root: str = "/proc") -> bool:
    """Whether ``pid`` can be the process that had this pid at ``boottime_ns`` (CLOCK_BOOTTIME).

    False if the process is gone or started after that time: the pid has been used again. Start times
    are rounded down by less than a tick, so a process that took the pid within 10 ms of that time passes.
    The strict comparison was rejected: it would disown every client that connects within 10 ms of its start.
    """
    started = started_ns(pid, proc_root)
    return started is not None and started <= boottime_ns


class ProcessHandle:
    """A process and the pidfd that holds on to it. Build it with :func:`open_process`, close it after use."""

    def __init__(self, pid: int, pidfd: int, process_started_ns: int, proc_root: str = "/proc") -> None:
        """Take over ``pidfd``, which must be of the process that ``pid`` names."""
        self._proc_root = proc_root
        self.pid = pid
        self.started_ns = process_started_ns
        self._pidfd: Optional[int] = pidfd

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
        root of every v1 hierarchy (proc_cgroup_show): a failure to move it then means only this.
        """
        if not self.alive():
            return True
        flags = _stat_field(self.pid, _FLAGS_AFTER_COMM, self._proc_root)
        return flags is None or bool(flags & _PF_EXITING)

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
    passed to another between its connect() and this call. Raises AdoptionFailed if the process has exited.
    """
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return open_process(pid)
        raise AdoptionFailed(f"process {pid} cannot be opened: {error.strerror}") from None
    return _hold(pid, pidfd, "/proc")


def open_process(pid: int, proc_root: str = "/proc") -> ProcessHandle:
    """Take hold of the process (not a thread) that has ``pid`` now.

    Raises AdoptionFailed naming the pid if there is none, or it exited while it was being opened.
    """
    if not 1 <= pid <= PID_MAX:
        raise AdoptionFailed(f"pid {pid} is not in 1..{PID_MAX}")
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise AdoptionFailed(f"process {pid} cannot be opened: {error.strerror}") from None
    return _hold(pid, pidfd, proc_root)


def _hold(pid: int, pidfd: int, proc_root: str) -> ProcessHandle:
    # Read after the pidfd is there: if the process still lives afterwards, the start time is its own.
    started = started_ns(pid, proc_root)
    handle = None if started is None else ProcessHandle(pid, pidfd, started, proc_root)
    if handle is None or not handle.alive():
        os.close(pidfd)
        raise AdoptionFailed(f"process {pid} has exited")
    return handle


def _stat_field(pid: int, after_comm: int, proc_root: str) -> Optional[int]:
    """One number of /proc/PID/stat; None if the process is gone."""
    try:
        stat = (Path(proc_root) / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # comm is whatever the process likes, spaces, parentheses and newlines included: only the last ")" ends it.
    fields = stat.rpartition(b")")[2].split()
    try:
        return int(fields[after_comm])
    except (IndexError, ValueError):
        return None
