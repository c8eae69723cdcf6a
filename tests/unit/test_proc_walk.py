"""The /proc witness over a made-up PROC root whose processes hold this test's own, real socket."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Iterator, List, Optional, Union

import pytest

from adoptd.connections.diag_codec import DiagSocket
from adoptd.connections.proc import ProcWitness
from adoptd.deadline import Deadline
from adoptd.model import Ambiguous, Connection, Endpoint, Owner, Witness, WitnessUnavailable

UID = 1001
# 10.0.0.1:44450 > 10.0.0.2:22 as a little-endian kernel prints it.
CONNECTION = Connection(Endpoint.parse("10.0.0.1:44450"), Endpoint.parse("10.0.0.2:22"))
ENDS = "0100000A:ADA2 0200000A:0016"
MAPPED_ENDS = "0000000000000000FFFF00000100000A:ADA2 0000000000000000FFFF00000200000A:0016"
HEADING = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


class FakeProc:
    """A PROC root under construction."""

    def __init__(self, root: Path, inode: int) -> None:
        self.root, self.inode = root, inode
        (root / "net").mkdir(parents=True)
        (root / "self").mkdir()
        self.table([], "tcp")
        self.table([], "tcp6")

    def table(self, rows: List[str], name: str = "tcp") -> None:
        (self.root / "net" / name).write_text(HEADING + "".join(row + "\n" for row in rows))

    def row(self, ends: str = ENDS, state: str = "01", uid: int = UID, inode: Optional[int] = None) -> str:
        inode = self.inode if inode is None else inode
        return (
            f"  12: {ends} {state} 00000000:00000000 00:00000000 00000000 {uid:5}        0 {inode} 1 00000000d6658ad1"
        )

    def process(
        self,
        pid: int,
        uids: str = f"{UID}\t{UID}\t{UID}\t{UID}",
        started: int = 100,
        cgroup: str = "0::/job\n",
        holds: bool = True,
        comm: str = "ssh",
    ) -> Path:
        directory = self.root / str(pid)
        directory.mkdir()
        if holds:
            (directory / "fd").symlink_to("/proc/self/fd")
        else:
            (directory / "fd").mkdir()
        (directory / "status").write_text(
            f"Name:\t{comm}\nUmask:\t0022\nTgid:\t{pid}\nUid:\t{uids}\nGid:\t0\t0\t0\t0\n"
        )
        (directory / "stat").write_text(f"{pid} ({comm}) S " + " ".join(["0"] * 18) + f" {started} 0 0\n")
        (directory / "cgroup").write_text(cgroup)
        return directory


@pytest.fixture
def held() -> Iterator[socket.socket]:
    """A socket of sockfs; which kind does not matter to a walk."""
    with socket.socket(socket.AF_UNIX) as held_socket:
        yield held_socket


@pytest.fixture
def proc(tmp_path: Path, held: socket.socket) -> FakeProc:
    fake = FakeProc(tmp_path / "proc", os.fstat(held.fileno()).st_ino)
    fake.table([fake.row()])
    return fake


def ask(proc: FakeProc, connection: Connection = CONNECTION, budget_ms: float = 5000) -> Optional[Owner]:
    return ProcWitness(str(proc.root)).owner_of(connection, Deadline.after_ms(budget_ms))


def test_no_time_left_names_nobody(proc: FakeProc) -> None:
    """Not even the right holder, which is there to be found."""
    proc.process(10)
    with pytest.raises(WitnessUnavailable, match="out of time after 0 bytes of"):
        ask(proc, budget_ms=0)


def test_time_that_runs_out_in_the_walk_names_nobody(proc: FakeProc, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two processes is a holder; the second was not reached, and might have been another user's."""
    proc.process(10)
    proc.process(11, holds=False)
    looks: List[bool] = []

    def expired(_: Deadline) -> bool:
        looks.append(True)
        return len(looks) > 8

    monkeypatch.setattr(Deadline, "expired", property(expired))
    for pid in range(12, 30):
        proc.process(pid, holds=False)
    with pytest.raises(WitnessUnavailable, match=r"out of time after \d+ processes, looking for socket"):
        ask(proc)


def test_no_socket_table_is_unavailable(proc: FakeProc) -> None:
    """A missing PROC/net/tcp is not an empty one."""
    (proc.root / "net" / "tcp").unlink()
    with pytest.raises(WitnessUnavailable, match=r"there is no .*tcp"):
        ask(proc)


@pytest.mark.parametrize(
    "row", [f"  12: {ENDS} 01", f"  12: {ENDS} zz a b c d e f g", f"  12: {ENDS} 01 a b c x d 1 e"]
)
def test_a_row_of_another_format_is_unavailable(proc: FakeProc, row: str) -> None:
    """A kernel that prints other columns is not guessed at."""
    proc.table([row])
    with pytest.raises(WitnessUnavailable, match="unknown format"):
        ask(proc)


def test_a_row_without_an_end_is_unavailable(proc: FakeProc) -> None:
    """Memory stays bounded, and half a row is not read as a whole one."""
    (proc.root / "net" / "tcp").write_text(HEADING + proc.row())
    with pytest.raises(WitnessUnavailable, match="without an end"):
        ask(proc)


@pytest.mark.parametrize("state", ["02", "03", "06", "07", "0A", "0C"])
def test_a_socket_that_is_not_connected_is_nobody(proc: FakeProc, state: str) -> None:
    """SYN_SENT, SYN_RECV, TIME_WAIT, CLOSE, LISTEN, NEW_SYN_RECV."""
    proc.table([proc.row(state=state)])
    proc.process(10)
    assert ask(proc) is None


@pytest.mark.parametrize(
    "ends",
    [
        "0100000A:ADA3 0200000A:0016",
        "0100000A:ADA2 0200000A:0017",
        "0200000A:0016 0100000A:ADA2",
        "0100000A:ADA2 0300000A:0016",
    ],
)
def test_another_tuple_is_nobody(proc: FakeProc, ends: str) -> None:
    """One digit that differs, or the two ends exchanged."""
    proc.table([proc.row(ends)])
    proc.process(10)
    assert ask(proc) is None


def test_an_orphan_is_nobody(proc: FakeProc) -> None:
    """Inode 0 with uid 0 is a socket nobody holds, not root's."""
    proc.table([proc.row(inode=0, uid=0)])
    proc.process(10)
    assert ask(proc) is None


def test_two_connected_sockets_of_one_tuple_are_nobody(proc: FakeProc) -> None:
    """As SO_BINDTODEVICE allows within one namespace; also when one of them is a mapped IPv6 socket."""
    proc.process(10)
    proc.table([proc.row(), proc.row(inode=proc.inode + 1)])
    with pytest.raises(Ambiguous, match="2 sockets"):
        ask(proc)
    proc.table([proc.row()])
    proc.table([proc.row(MAPPED_ENDS, inode=proc.inode + 1)], "tcp6")
    with pytest.raises(Ambiguous, match="2 sockets"):
        ask(proc)


@pytest.mark.parametrize("kind", ["file", "unix socket", "another socket"])
def test_a_link_that_only_reads_like_the_socket_is_not_it(
    proc: FakeProc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Type, device and inode are compared as well: here only the link's text is right."""
    link = proc.process(10, holds=False) / "fd" / "3"
    with socket.socket(socket.AF_UNIX) as other:
        target = tmp_path / "target"
        if kind == "file":
            target.touch()
        elif kind == "unix socket":
            other.bind(str(target))
        else:
            target = Path(f"/proc/self/fd/{other.fileno()}")
        link.symlink_to(target)
        monkeypatch.setattr(os, "readlink", lambda *_, **__: f"socket:[{proc.inode}]")
        assert ask(proc) is None


def test_a_socket_of_another_device_is_not_it(proc: FakeProc, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unix socket's path, opened with O_PATH, whose inode number in its own file system is the socket's."""
    proc.process(10)
    stat = os.stat

    def elsewhere(
        path: Union[str, os.PathLike[str]], *, dir_fd: Optional[int] = None, follow_symlinks: bool = True
    ) -> os.stat_result:
        real = list(stat(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks))
        if dir_fd is not None:
            real[2] += 1  # st_dev
        return os.stat_result(real)

    assert ask(proc) is not None
    monkeypatch.setattr(os, "stat", elsewhere)
    assert ask(proc) is None


def test_files_that_cannot_be_the_socket_are_never_opened_or_statted(
    proc: FakeProc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stat() on a dead NFS server, or on a user's FUSE mount, would hang the thread."""
    fds = proc.process(10, holds=False) / "fd"
    for number, target in enumerate(
        ["/net/dead/file", "pipe:[1]", f"socket:[{proc.inode}0]", f"/socket:[{proc.inode}]"]
    ):
        (fds / str(number)).symlink_to(target)
    stat = os.stat

    def guarded(path: Union[str, os.PathLike[str]], *, dir_fd: Optional[int] = None) -> os.stat_result:
        assert dir_fd is None, f"stat of descriptor link {path}"
        return stat(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "stat", guarded)
    assert ask(proc) is None


@pytest.mark.parametrize(
    "uids", ["1001\t0\t0\t0", "0\t1001\t1001\t1001", "1001\t1001\t1002\t1001", "1001\t1001\t1001\t0"]
)
def test_a_process_acting_for_two_users_is_nobody(proc: FakeProc, uids: str) -> None:
    """Real, effective, saved and file-system uid must be one."""
    proc.process(10, uids=uids)
    with pytest.raises(Ambiguous, match=r"process 10 .* 2 users"):
        ask(proc)


def test_a_process_that_calls_itself_uid_is_not_believed(proc: FakeProc) -> None:
    """A process chooses its name; the kernel escapes line ends in it, so it cannot add a line."""
    proc.process(10, comm="a\\nUid:\t0")
    owner = ask(proc)
    assert owner is not None
    assert owner.uid == UID


def test_another_users_socket_is_nobodys(proc: FakeProc) -> None:
    """The holder's uid must be the socket's."""
    proc.process(10, uids="1002\t1002\t1002\t1002")
    with pytest.raises(Ambiguous, match="uid 1001's and held by process 10 of uid 1002"):
        ask(proc)


def test_holders_in_different_cgroups_are_nobody(proc: FakeProc) -> None:
    """The job could be either one's."""
    proc.process(10)
    proc.process(11, cgroup="0::/other\n")
    with pytest.raises(Ambiguous, match=r"different cgroups: 1[01], 1[01]"):
        ask(proc)


def test_too_many_holders_are_nobody(proc: FakeProc) -> None:
    """The work that a user can make of a fork bomb is bounded."""
    for pid in range(10, 300):
        proc.process(pid)
    with pytest.raises(Ambiguous, match="more than 256"):
        ask(proc)


@pytest.mark.parametrize(
    ("name", "text"), [("status", "Name:\tssh\n"), ("status", "Uid:\tx\n"), ("stat", "10 (ssh) S 1")]
)
def test_unknown_formats_are_unavailable(proc: FakeProc, name: str, text: str) -> None:
    """A file that is not as proc(5) says is not guessed at."""
    (proc.process(10) / name).write_text(text)
    with pytest.raises(WitnessUnavailable):
        ask(proc)


def test_processes_that_vanish_are_passed_over(proc: FakeProc) -> None:
    """A directory that has lost its files, or whose files go while they are read, is a process that ended."""
    for pid, name in ((10, "fd"), (11, "status"), (12, "stat"), (13, "cgroup")):
        (proc.process(pid) / name).unlink()
    (proc.root / "14").symlink_to("/nonexistent")
    proc.process(15)
    owner = ask(proc)
    assert owner is not None
    assert owner.pid == 15


def test_no_holder_is_nobody(proc: FakeProc) -> None:
    """In flight in a unix socket, or held by a process that this PROC does not show."""
    proc.process(10, holds=False)
    assert ask(proc) is None


@pytest.mark.parametrize("table", ["tcp", "tcp6", "no tcp6"])
def test_the_holder_is_found(proc: FakeProc, table: str) -> None:
    """In either table, with or without IPv6 in the kernel."""
    proc.process(9, holds=False)
    proc.process(10)
    if table == "tcp6":
        proc.table([])
        proc.table([proc.row(MAPPED_ENDS)], "tcp6")
    elif table == "no tcp6":
        (proc.root / "net" / "tcp6").unlink()
    assert ask(proc) == Owner(Witness.PROC, UID, pid=10, comm="ssh")


def test_an_ipv6_row_is_found(proc: FakeProc) -> None:
    """fd00::1 in the kernel's 32-bit words."""
    proc.process(10)
    proc.table([proc.row("000000FD000000000000000001000000:ADA2 000000FD000000000000000002000000:0016")], "tcp6")
    asked = Connection(Endpoint.parse("[fd00::1]:44450"), Endpoint.parse("[fd00::2]:22"))
    owner = ask(proc, asked)
    assert owner is not None
    assert owner.pid == 10


def test_a_row_across_two_reads_is_found(proc: FakeProc) -> None:
    """The table is longer than one read; the row lies wherever the cut falls."""
    proc.process(10)
    filler = proc.row("0100000A:0001 0200000A:0016", inode=3)
    for before in range(425, 445):
        proc.table([filler] * before + [proc.row()] + [filler] * 500)
        owner = ask(proc)
        assert owner is not None


def test_the_oldest_holder_speaks_for_all(proc: FakeProc) -> None:
    """By start time, not by pid, which wraps around; a command with a parenthesis does not confuse it."""
    proc.process(10, started=300)
    proc.process(11, started=200, comm="a) S 1 (")
    proc.process(12, started=250)
    owner = ask(proc)
    assert owner is not None
    assert owner.pid == 11


class Finder:
    """A SocketFinder that knows one socket, or cannot be asked."""

    def __init__(self, known: Optional[DiagSocket], unavailable: bool = False) -> None:
        self._known, self._unavailable = known, unavailable

    def find(self, connection: Connection, deadline: Deadline) -> Optional[DiagSocket]:
        if self._unavailable:
            raise WitnessUnavailable("no sock_diag")
        return self._known


def test_a_finder_saves_the_table(proc: FakeProc) -> None:
    """With the inode known, PROC/net/tcp is not read."""
    (proc.root / "net" / "tcp").unlink()
    proc.process(10)
    known = DiagSocket(2, 1, b"\x0a\0\0\1", 44450, b"\x0a\0\0\2", 22, UID, proc.inode, None)
    owner = ProcWitness(str(proc.root), Finder(known)).owner_of(CONNECTION, Deadline.after_ms(5000))
    assert owner is not None
    assert owner.pid == 10


@pytest.mark.parametrize("unavailable", [True, False])
def test_without_an_answer_of_the_finder_the_table_is_read(proc: FakeProc, unavailable: bool) -> None:
    """sock_diag sees no socket bound to a device; the table does."""
    proc.process(10)
    owner = ProcWitness(str(proc.root), Finder(None, unavailable)).owner_of(CONNECTION, Deadline.after_ms(5000))
    assert owner is not None
    assert owner.pid == 10
