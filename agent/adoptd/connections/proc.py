"""The /proc witness: finds who holds a connection's socket by walking every process's descriptors.

The last resort, where neither BPF nor sock_diag can name a process. Owns the reading of PROC/net/tcp{,6}
and PROC/PID/. Never answers from a walk that did not reach the end: a holder not seen yet may be another
user. Called by Witnesses in a thread; costs milliseconds to seconds, so it looks at its deadline all the time.

What it says is about now, not about connect(): the holders of the socket at this moment.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Optional, Protocol, Set

from adoptd.connections.candidates import the_one
from adoptd.connections.diag_codec import DiagSocket
from adoptd.connections.proc_net import SocketRow, rows_of
from adoptd.deadline import Deadline
from adoptd.model import Ambiguous, Connection, Owner, Witness, WitnessUnavailable
from adoptd.process import parse_stat, uids_in

# status, stat and cgroup of a process are a page or two; 65,536 groups in status (NGROUPS_MAX) are 700 KB.
_FILE_BYTES_MAX = 1 << 20
# A connection held by more processes than this is nobody's ssh client; looking at each would be work for an attacker.
_HOLDERS_MAX = 256
# What the kernel says when a process is gone, or goes while its files are being read.
_GONE = frozenset({errno.ENOENT, errno.ESRCH})


class SocketFinder(Protocol):
    """What can name the inode of a connection faster than PROC/net/tcp: DiagWitness."""

    def find(self, connection: Connection, deadline: Deadline) -> Optional[DiagSocket]:
        """The source's socket or None. Raises WitnessUnavailable."""
        ...


@dataclass(frozen=True)
class _Holder:
    """A process that has the socket open. ``started_ticks`` since boot, ``cgroups`` the text of PROC/PID/cgroup."""

    pid: int
    uid: int
    started_ticks: int
    cgroups: bytes
    comm: str


class ProcWitness:
    """Names the uid and pid of the process that holds the connection's socket now."""

    name = Witness.PROC
    may_block = True

    def __init__(self, proc_root: str = "/proc", sockets: Optional[SocketFinder] = None) -> None:
        """``sockets`` saves reading PROC/net/tcp, which lists every socket of the network namespace.

        What only the table shows is then not looked for: a second socket with the same addresses.
        """
        self._root = Path(proc_root)
        self._sockets = sockets
        with socket.socket(socket.AF_UNIX) as any_socket:
            self._sockfs_device = os.fstat(any_socket.fileno()).st_dev

    def owner_of(self, connection: Connection, deadline: Deadline) -> Optional[Owner]:
        """The owner if every holder, and the socket itself, is of one uid, or None if nobody holds it.

        With several holders (fork, SCM_RIGHTS) all must be in the same cgroups, so that any of them
        stands for all when the job is looked up; the one named is the oldest, as the likeliest to have
        connected. Raises Ambiguous if uids or cgroups differ or two sockets have these addresses,
        WitnessUnavailable if it may not look into a process of the socket's uid, or runs out of time.
        """
        row = self._socket_of(connection, deadline)
        if row is None:
            return None
        holders: List[_Holder] = []
        for holder in self._holders(row, deadline):
            holders.append(holder)
            if len(holders) > _HOLDERS_MAX:
                raise Ambiguous(f"{connection} is held by more than {_HOLDERS_MAX} processes")
        if not holders:
            return None
        return _agreed(connection, row, holders)

    def _socket_of(self, connection: Connection, deadline: Deadline) -> Optional[SocketRow]:
        if self._sockets is not None:
            # Whatever keeps sock_diag from answering (it sees no socket bound to a device), the table may still.
            with contextlib.suppress(WitnessUnavailable):
                found = self._sockets.find(connection, deadline)
                if found is not None and found.uid is not None and found.inode is not None:
                    return SocketRow(found.uid, found.inode, found.state, found.device)
        return the_one(connection, rows_of(self._root, connection, deadline))

    def _holders(self, row: SocketRow, deadline: Deadline) -> Iterator[_Holder]:
        looked_at = 0
        try:
            with os.scandir(self._root) as entries:
                for entry in entries:
                    if not entry.name.isdigit():
                        continue
                    holder = self._holder(entry, row, deadline)
                    looked_at += 1
                    if holder is not None:
                        yield holder
        except _OutOfTime:
            raise WitnessUnavailable(
                f"out of time after {looked_at} processes, looking for socket {row.inode} in {self._root}"
            ) from None
        except OSError as error:
            raise WitnessUnavailable(f"cannot list {self._root}: {error.strerror}") from error

    def _holder(self, entry: os.DirEntry[str], row: SocketRow, deadline: Deadline) -> Optional[_Holder]:
        """The process in ``entry`` if it has the socket open, None if it has not or is gone."""
        try:
            # An open /proc/PID stays that process's: when it is gone the files in it are gone (ESRCH), even if
            # another process has the pid by then.
            directory = os.open(entry.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if not self._may_have_open(directory, row, deadline):
                    return None
                return _read_holder(int(entry.name), directory)
            finally:
                os.close(directory)
        except OSError as error:
            # A link of a process that is just gone can say EACCES too (proc_pid_readlink, Linux 6.12).
            if error.errno in _GONE or not Path(entry.path).exists():
                return None
            raise WitnessUnavailable(f"cannot look into {entry.path}: {error.strerror}") from error

    def _may_have_open(self, directory: int, row: SocketRow, deadline: Deadline) -> bool:
        """As _has_open; a process that may not be looked into is passed over if it cannot be the owner.

        The owner is of the socket's uid, so a process of no such uid is not it, whatever it holds. Even root may
        not look into some: an init with more capabilities than the agent has been seen on Linux 6.18.
        """
        try:
            return self._has_open(directory, row.inode, deadline)
        except PermissionError:
            if row.uid in _uids(_read(directory, "status")):
                raise
            return False

    def _has_open(self, directory: int, inode: int, deadline: Deadline) -> bool:
        """Whether one of the process's descriptors is the socket with this inode.

        The link's text only spares stat() on everything else: to stat a file is I/O, on a dead NFS server or a
        hostile FUSE mount without end, while the text of a link costs nothing. It proves nothing: a text is
        what whoever names a file or writes a kernel module makes of it. Nor is S_ISSOCK enough, since a unix
        socket's path opened with O_PATH is a socket too, with an inode number of its file system. Only type,
        device and inode number together are the socket.
        """
        text = f"socket:[{inode}]"
        fds = os.open("fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
        try:
            with os.scandir(fds) as links:
                for link in links:
                    if deadline.expired:
                        raise _OutOfTime
                    if self._is_socket(link.name, fds, text, inode):
                        return True
            if deadline.expired:
                raise _OutOfTime
            return False
        finally:
            os.close(fds)

    def _is_socket(self, link: str, fds: int, text: str, inode: int) -> bool:
        try:
            if os.readlink(link, dir_fd=fds) != text:
                return False
            found = os.stat(link, dir_fd=fds)
        except FileNotFoundError:  # closed since it was listed
            return False
        return stat.S_ISSOCK(found.st_mode) and found.st_dev == self._sockfs_device and found.st_ino == inode


class _OutOfTime(Exception):
    """The deadline passed in the middle of the walk."""


def _read_holder(pid: int, directory: int) -> _Holder:
    """Raises Ambiguous if the process acts for two users."""
    status = _read(directory, "status")
    uids = _uids(status)
    if len(uids) != 1:
        # Neither the real nor the effective uid alone will do: whoever runs, or wrote, a set-user-ID program
        # chooses which of the two is the other user's. All four (real, effective, saved, file system) being alike
        # takes being that user. The owner of /proc/PID is the effective uid alone, and that of the files in it is
        # root for any process that is not dumpable, which each can make itself.
        raise Ambiguous(f"process {pid} holds the connection and acts for {len(uids)} users")
    return _Holder(
        pid=pid,
        uid=uids.pop(),
        started_ticks=_started_ticks(_read(directory, "stat")),
        cgroups=_read(directory, "cgroup"),
        # The first line, "Name:\t" and the name with its newlines escaped.
        comm=status.partition(b"\n")[0][6:].decode("utf-8", errors="replace"),
    )


def _uids(status: bytes) -> Set[int]:
    uids = uids_in(status)
    if uids is None:
        raise WitnessUnavailable("a process's status has no line of uids")
    return set(uids)


def _started_ticks(text: bytes) -> int:
    try:
        return parse_stat(text).start_ticks
    except ValueError as error:
        raise WitnessUnavailable(str(error)) from None


def _read(directory: int, name: str) -> bytes:
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        parts: List[bytes] = []
        size = 0
        while True:
            part = os.read(descriptor, _FILE_BYTES_MAX)
            if not part:
                return b"".join(parts)
            parts.append(part)
            size += len(part)
            if size > _FILE_BYTES_MAX:
                raise OSError(errno.EFBIG, f"{name} is longer than {_FILE_BYTES_MAX} bytes")
    finally:
        os.close(descriptor)


def _agreed(connection: Connection, row: SocketRow, holders: List[_Holder]) -> Owner:
    strangers = [holder for holder in holders if holder.uid != row.uid]
    if strangers:
        # Passed on to another user (SCM_RIGHTS), or made before its maker became one: who is the owner then?
        words = ", ".join(f"process {holder.pid} of uid {holder.uid}" for holder in strangers)
        raise Ambiguous(f"the socket of {connection} is uid {row.uid}'s and held by {words}")
    if len({holder.cgroups for holder in holders}) > 1:
        words = ", ".join(str(holder.pid) for holder in holders)
        raise Ambiguous(f"{connection} is held by processes in different cgroups: {words}")
    oldest = min(holders, key=lambda holder: (holder.started_ticks, holder.pid))
    return Owner(Witness.PROC, oldest.uid, pid=oldest.pid, comm=oldest.comm)
