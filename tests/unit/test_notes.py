"""What is noted of connections: of whom, for how long, how much, and nothing that was not seen."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import time
from typing import Iterator, List, Optional

import pytest
from fakes import FakeBackend, until

from adoptd.model import Ambiguous, Job, JobManagerError, Owner, ProbeError, Witness
from adoptd.notes import NOTES_MAX, NOTES_OF_USER_MAX, NOTES_S, Notes, NoteTaker, look
from adoptd.probe.record import CONNECTED, WATCHED_PORTS, decode_connected, encode_watched
from adoptd.workers import Workers

ALICE, BOB = 1001, 1002
JOB = Job("7", ALICE, 1, (1,))


def owner(pid: Optional[int] = 10, connected_at_ns: Optional[int] = 5, uid: int = ALICE) -> Owner:
    return Owner(Witness.BPF, uid, pid=pid, cgroup_id=1, connected_at_ns=connected_at_ns)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def child() -> Iterator[int]:
    """A process that waits to be killed, and is not waited for until the end."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_note_is_of_one_connection(clock: Clock) -> None:
    """Pid and time of connect() together; a witness that names neither has no note."""
    notes = Notes(clock)
    notes.put(10, 5, ALICE, JOB)
    notes.put(10, 6, ALICE, None)
    for asked, job in ((owner(), JOB), (owner(connected_at_ns=6), None)):
        found = notes.of(asked)
        assert found is not None
        assert found.job == job
    for asked in (owner(connected_at_ns=7), owner(pid=11), owner(pid=None), owner(connected_at_ns=None)):
        assert notes.of(asked) is None


def test_a_note_grows_old(clock: Clock) -> None:
    """It is not believed any more then, and forgotten when it is next seen to."""
    notes = Notes(clock)
    notes.put(10, 5, ALICE, JOB)
    clock.now_s += NOTES_S
    assert notes.of(owner()) is not None
    clock.now_s += 0.1
    notes.put(11, 5, BOB, None)
    assert notes.of(owner()) is None
    assert len(notes) == 2
    notes.expire()
    assert len(notes) == 1


def test_one_user_pushes_out_only_their_own(clock: Clock) -> None:
    """BOB connects without end; ALICE's note stays."""
    notes = Notes(clock)
    notes.put(10, 5, ALICE, JOB)
    for number in range(3 * NOTES_OF_USER_MAX):
        notes.put(20, number, BOB, None)
    assert len(notes) == NOTES_OF_USER_MAX + 1
    assert notes.of(owner()) is not None
    assert notes.of(owner(20, 3 * NOTES_OF_USER_MAX - 1, BOB)) is not None


def test_many_users_push_out_those_with_most(clock: Clock) -> None:
    """The number is bounded; whoever has one note keeps it."""
    notes = Notes(clock)
    notes.put(10, 5, ALICE, JOB)
    for uid in range(2000, 2000 + NOTES_MAX // 256):
        for number in range(300):
            notes.put(uid, number, uid, None)
    assert len(notes) == NOTES_MAX
    assert notes.of(owner()) is not None


def test_a_process_that_is_there_is_looked_at(child: int) -> None:
    """Its uid and its job."""
    backend = FakeBackend(JOB)
    backend.of_process[child] = JOB
    assert look(backend, child, time.clock_gettime_ns(time.CLOCK_BOOTTIME)) == (os.getuid(), JOB)


def test_of_a_process_on_its_way_out_nothing_is_noted(child: int) -> None:
    """It is in the root of every v1 hierarchy then, which must not be taken for being in no job."""
    now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert look(FakeBackend(), child, now_ns) is None


def test_of_a_process_that_ends_meanwhile_nothing_is_noted(child: int) -> None:
    """It was there before its cgroups were read, and not afterwards."""

    class Ending(FakeBackend):
        def job_of_process(self, pid: int) -> Optional[Job]:
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            return None

    assert look(Ending(), child, time.clock_gettime_ns(time.CLOCK_BOOTTIME)) is None


def test_of_another_process_with_the_pid_nothing_is_noted(child: int) -> None:
    """One that started after the connection was made."""
    assert look(FakeBackend(), child, time.clock_gettime_ns(time.CLOCK_BOOTTIME) - 3_600_000_000_000) is None
    assert look(FakeBackend(), 4_194_304, 2**62) is None


def test_events_that_are_none_are_refused() -> None:
    """Too short, or of another type."""
    assert decode_connected(CONNECTED.pack(3, 10, 5)) == (10, 5)
    for data in (CONNECTED.pack(3, 10, 5)[:-1], CONNECTED.pack(1, 10, 5), bytes(16)):
        with pytest.raises(ProbeError):
            decode_connected(data)


def test_the_ports_are_a_list_with_an_end() -> None:
    """In network order, and no more than there is room for."""
    assert encode_watched([22, 2222]) == bytes([0, 22, 8, 174]) + bytes(28)
    with pytest.raises(ProbeError):
        encode_watched(range(1, WATCHED_PORTS + 2))


class FakeRing:
    """Events in memory, and a pipe that is readable while there are some."""

    def __init__(self) -> None:
        self.events: List[bytes] = []
        self._readable, self._writable = os.pipe()

    def tell(self, *events: bytes) -> None:
        self.events += events
        os.write(self._writable, b"1")

    def read(self, most: int) -> List[bytes]:
        found, self.events = self.events[:most], self.events[most:]
        if found and not self.events:
            os.read(self._readable, 4096)
        return found

    def fileno(self) -> int:
        return self._readable

    def close(self) -> None:
        os.close(self._readable)
        os.close(self._writable)


class FakeConnects:
    number = 1

    def __init__(self) -> None:
        self.ring = FakeRing()

    def watch(self, ports: object) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_job_manager_that_fails_costs_those_notes_alone(
    child: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And an event that is none. It is said once for all of them."""
    connects, notes, backend = FakeConnects(), Notes(), FakeBackend(JOB)
    now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    backend.of_process = {child: JOB, os.getpid(): JobManagerError("away"), os.getppid(): Ambiguous("two")}
    workers = Workers("notes", 1, 1)

    async def run() -> None:
        taker = NoteTaker(notes, lambda: backend, lambda: connects, (22,), workers)  # type: ignore[arg-type, return-value]
        monkeypatch.setattr(taker, "_opened_or_none", lambda: connects)
        task = asyncio.create_task(taker.run())
        pids = (os.getpid(), os.getppid(), child)
        connects.ring.tell(b"nonsense", *(CONNECTED.pack(3, pid, now_ns) for pid in pids))
        end_s = time.monotonic() + 10
        while not len(notes):
            await asyncio.sleep(0.01)
            assert time.monotonic() < end_s
            assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    workers.close()
    connects.ring.close()
    found = notes.of(owner(child, now_ns))
    assert found is not None
    assert found.job == JOB
    assert len(notes) == 1


def test_a_process_that_cannot_be_seen_costs_its_own_note_alone(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For want of a descriptor, say: the agent goes on taking notes."""
    connects, notes, backend = FakeConnects(), Notes(), FakeBackend(JOB)
    now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    backend.of_process = {child: JOB}
    workers = Workers("notes", 1, 1)
    opened = os.open

    def open_or_fail(path: str, flags: int, *more: int) -> int:
        if path == f"/proc/{os.getpid()}/stat":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(path, flags, *more)

    async def run() -> None:
        taker = NoteTaker(notes, lambda: backend, lambda: connects, (22,), workers)  # type: ignore[arg-type, return-value]
        monkeypatch.setattr(taker, "_opened_or_none", lambda: connects)
        monkeypatch.setattr(os, "open", open_or_fail)
        task = asyncio.create_task(taker.run())
        connects.ring.tell(*(CONNECTED.pack(3, pid, now_ns) for pid in (os.getpid(), child)))
        await until(lambda: len(notes) or task.done())
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with contextlib.closing(workers), contextlib.closing(connects.ring):
        asyncio.run(run())
    assert notes.of(owner(child, now_ns)) is not None
    assert len(notes) == 1


def test_taking_notes_ends_though_there_is_news_in_the_same_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """wait_for() before Python 3.12 forgets the cancellation then, and the agent would not end."""
    connects, workers = FakeConnects(), Workers("notes", 1, 1)

    async def run() -> None:
        taker = NoteTaker(Notes(), lambda: None, lambda: connects, (22,), workers)  # type: ignore[arg-type, return-value]
        monkeypatch.setattr(taker, "_opened_or_none", lambda: connects)
        task = asyncio.create_task(taker.run())
        await until(lambda: taker.looked)
        for _ in range(10):
            await asyncio.sleep(0)
        taker._news.set()
        task.cancel()
        _, late = await asyncio.wait({task}, timeout=5.0)
        if late:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert not late

    with contextlib.closing(workers), contextlib.closing(connects.ring):
        asyncio.run(run())
