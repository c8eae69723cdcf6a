"""Processes are held, not remembered by number."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Iterator, Optional, Tuple

import pytest

from adoptd.model import PID_MAX, AdoptionFailed, JobManagerError, OutOfDescriptors
from adoptd.process import (
    open_peer,
    open_process,
    parent_of,
    started_ns,
    stat_of,
    uids_in,
    was_started_before,
)

TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def boottime_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@pytest.mark.parametrize("pid", [0, -1, PID_MAX + 1])
def test_an_impossible_pid_is_refused(pid: int) -> None:
    """0 and -1 mean other things to the kernel than one process."""
    with pytest.raises(AdoptionFailed, match=str(pid)):
        open_process(pid)


def test_a_reaped_process_cannot_be_opened() -> None:
    """The pid is in the message."""
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(AdoptionFailed, match=str(process.pid)):
        open_process(process.pid)
    assert started_ns(process.pid) is None
    assert not was_started_before(process.pid, boottime_ns())


def test_a_zombie_cannot_be_opened(child: subprocess.Popen[bytes]) -> None:
    """It has exited, though its pid is still taken."""
    with open_process(child.pid) as handle:
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not handle.alive()
        assert handle.exiting()
    with pytest.raises(AdoptionFailed, match="exited"):
        open_process(child.pid)


def test_failed_opens_leave_no_descriptor(child: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """A /proc without the process: refused, and the pidfd is closed again."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(AdoptionFailed):
        open_process(child.pid, str(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_closed_handle_is_of_no_process(child: subprocess.Popen[bytes]) -> None:
    """alive() is False, fileno() an error, close() may be repeated."""
    handle = open_process(child.pid)
    assert handle.alive()
    assert not handle.exiting()
    handle.close()
    handle.close()
    assert not handle.alive()
    with pytest.raises(ValueError, match="closed"):
        handle.fileno()


def test_a_process_on_its_way_out_is_exiting(child: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """PF_EXITING shows in field 9 before the pidfd says so."""
    fields = " ".join(str(number) for number in range(10, 23))
    (tmp_path / str(child.pid)).mkdir()
    stat = tmp_path / str(child.pid) / "stat"
    stat.write_text(f"{child.pid} (sleep) S 4 5 6 7 8 {0x400100} {fields}\n")
    with open_process(child.pid, str(tmp_path)) as handle:
        assert not handle.exiting()
        stat.write_text(f"{child.pid} (sleep) R 4 5 6 7 8 {0x400104} {fields}\n")
        assert handle.alive()
        assert handle.exiting()


@pytest.mark.parametrize("stat", ["", "7", "7 (x", "7 (x) S 1", "7 (x) " + "S " * 30])
def test_a_broken_stat_line_is_no_start_time(tmp_path: Path, stat: str) -> None:
    """Unknown is None, never 0."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_text(stat)
    assert started_ns(7, str(tmp_path)) is None


@pytest.mark.parametrize("comm", ["sshd", "a b", "a) S 1 1 1", ") (", "(", ")", "x\ny", "9 9 9"])
def test_comm_cannot_forge_a_start_time(tmp_path: Path, comm: str) -> None:
    """Field 22 counts from the last parenthesis."""
    fields = " ".join(str(number) for number in range(4, 22))
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_text(f"7 ({comm}) S {fields} 1234 23 24\n")
    assert started_ns(7, str(tmp_path)) == 1234 * TICK_NS


def test_start_time_is_rounded_down_to_a_tick() -> None:
    """It is never after the real start, and less than a tick before it plus what starting takes."""
    earliest = boottime_ns()
    process = subprocess.Popen(["sleep", "60"])
    try:
        latest = boottime_ns()
        started = started_ns(process.pid)
        assert started is not None
        assert earliest - TICK_NS < started <= latest
        assert not was_started_before(process.pid, earliest - 2 * TICK_NS)
        assert was_started_before(process.pid, latest)
        with open_process(process.pid) as handle:
            assert handle.started_ns == started
    finally:
        process.kill()
        process.wait()


def test_a_peer_is_held_by_what_connected_and_not_by_what_has_its_pid_now() -> None:
    """A caller that exits after connect() cannot be opened, whoever has its pid next; one that lives can."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{directory}/s")
        listener.listen()
        connects = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); input()"
        child = subprocess.Popen([sys.executable, "-c", connects, f"{directory}/s"], stdin=subprocess.PIPE)
        accepted, _ = listener.accept()
        with accepted:
            with open_peer(accepted, child.pid) as held:
                assert held.pid == child.pid
                assert held.alive()
                child.communicate(b"\n")
                assert not held.alive()
            with pytest.raises(AdoptionFailed, match=str(child.pid)):
                open_peer(accepted, child.pid)


def test_no_descriptor_left_is_not_taken_for_an_exit() -> None:
    """Who is on call has to look at the agent then, and not at the login."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ours, theirs:
        lowest_free = os.dup(ours.fileno())
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            with pytest.raises(OutOfDescriptors, match=r"cannot be opened: Too many open files"):
                open_peer(ours, os.getpid())
            with pytest.raises(OutOfDescriptors, match=r"cannot be opened: Too many open files"):
                open_process(os.getpid())
            # The pidfd has the last one, and nothing is left to read when it began with.
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, hard))
            for _ in range(2):
                with pytest.raises(OutOfDescriptors, match=r"cannot be opened: Too many open files"):
                    open_peer(ours, os.getpid())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        open_peer(ours, os.getpid()).close()


def test_a_process_that_cannot_be_seen_is_not_taken_for_gone(tmp_path: Path) -> None:
    """Without a descriptor to read its stat with: an error of the family, since "gone" would be an answer."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").mkdir()
    for asked in (stat_of, started_ns, parent_of, lambda pid, root: was_started_before(pid, 2**62, root)):
        with pytest.raises(JobManagerError, match="7/stat: Is a directory"):
            asked(7, str(tmp_path))
        assert asked(8, str(tmp_path)) in (None, False)


@pytest.mark.parametrize(
    ("status", "uids"),
    [
        (b"Name:\tx\nUid:\t0\t1\t2\t3\nGid:\t9\t9\t9\t9\n", (0, 1, 2, 3)),
        (b"Name:\tUid:\\t5\nUid:\t4294967294\t0\t0\t0\n", (4294967294, 0, 0, 0)),
        (b"Name:\tx\rUid:\t5\t5\t5\t5\nGid:\t9\t9\t9\t9\n", None),
        (b"Name:\tx\nUid:\t0\t1\t2\n", None),
        (b"", None),
    ],
)
def test_the_uids_are_those_of_the_kernel_s_own_line(status: bytes, uids: Optional[Tuple[int, ...]]) -> None:
    """A name cannot make a line: its newlines are escaped, and a carriage return ends none."""
    assert uids_in(status) == uids
