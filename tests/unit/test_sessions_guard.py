"""The guard where the kernel does not answer: bounded, said once, and never the end of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from typing import AsyncIterator, Iterator, List, Optional

import pytest
from fakes import ALICE, FakeBackend, job, until
from logs import LogLines, log_lines

from adoptd.events import Events
from adoptd.metrics import Metrics
from adoptd.model import JobManagerError, ProbeError
from adoptd.probe.watching import OpenWatch
from adoptd.process import ProcessHandle, open_process
from adoptd.sessions import Session, Sessions, guard
from adoptd.sessions.escapes import OnEscape, OutsideOf
from adoptd.sessions.guard import Guard
from adoptd.workers import Workers

__all__ = ["log_lines"]


class Watched:
    """This test process as a session, whose backend the test has do things."""

    def __init__(self) -> None:
        self.backend = FakeBackend(job("17"))
        self.looks = 0
        self.on_escape = OnEscape.READOPT
        self.sessions = Sessions(time.time)
        self.workers = Workers("guard", threads=1, backlog=1)
        self.fault: List[str] = ["not permitted"]
        self.metrics = Metrics()
        self.guard = Guard(
            self.sessions,
            self._jobs,
            lambda: self.on_escape,
            self._open,
            self.workers,
            self.metrics,
            Events(),
            lambda session: False,
        )

    def _jobs(self) -> FakeBackend:
        self.looks += 1
        return self.backend

    def _open(self) -> OpenWatch:
        raise ProbeError(self.fault[0])

    def add(self, process: ProcessHandle) -> Session:
        return self.sessions.add(
            process,
            uid=ALICE,
            user="alice",
            job=job("17"),
            witness=None,
            reason="single_job",
            connection=None,
            service="sshd",
            stages=(),
        )

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """Of a process without children: pytest itself has all that other tests have running."""
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
            try:
                with open_process(child.pid) as process:
                    session = self.add(process)
                yield session
            finally:
                child.kill()


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[Watched]:
    made = Watched()
    task = asyncio.create_task(made.guard.run())
    try:
        yield made
    finally:
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        made.workers.close()
        made.sessions.close()
    assert isinstance(ended, asyncio.CancelledError)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_S", "ATTACH_S", "ATTACH_MAX_S"):
        monkeypatch.setattr(guard, name, 0.02)


def test_a_manager_that_cannot_be_asked_is_asked_again_and_nobody_is_moved(log_lines: LogLines) -> None:
    async def story() -> None:
        async with watched() as node:
            node.backend.down = "no slurmstepd answers"
            with node.session():
                await until(lambda: any("session_unclear" in line for line in log_lines()), within_s=30.0)
                assert node.backend.tried == []
                node.backend.down = None
                await until(lambda: node.backend.tried, within_s=30.0)

    asyncio.run(story())


def test_a_nodename_nobody_knows_holds_up_no_other_session(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with watched() as node:

            def unknown(name: str) -> FakeBackend:
                if name:
                    raise JobManagerError(f"nodename {name!r} is one of more than 16")
                return node.backend

            monkeypatch.setattr(node.backend, "for_node", unknown)
            with node.session() as session:
                node.guard._cases.suspect(
                    Session(**{**vars(session), "id": "1-1", "pid": 1, "start_ticks": 1, "nodename": "n17"}), 0.0
                )
                await until(lambda: node.backend.tried)

    asyncio.run(story())


def test_why_it_only_looks_is_said_once_for_each_reason(log_lines: LogLines) -> None:
    async def story() -> None:
        async with watched() as node:
            await until(lambda: node.sessions.watched_by.endswith("not permitted"))
            for word in ("lockdown", "not loaded"):
                node.fault[0] = word
                await until(lambda word=word: node.sessions.watched_by.endswith(word))  # type: ignore[misc]
            assert node.guard.status.told is False
            assert node.metrics.registry.get_sample_value("adoptd_session_watch_attached") == 0

    asyncio.run(story())
    assert sum("session_watch_polling" in line for line in log_lines()) == 3


def test_sessions_are_counted_and_their_end_is_seen_without_being_asked() -> None:
    async def story() -> None:
        async with watched() as node:
            child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
            with open_process(child.pid) as process:
                node.add(process)
            assert node.metrics.registry.get_sample_value("adoptd_sessions") == 1
            child.communicate()
            await until(lambda: node.metrics.registry.get_sample_value("adoptd_sessions") == 0)

    asyncio.run(story())


# ---- what is outside now


def outside_now(node: Watched) -> List[Optional[float]]:
    """Of a job that runs, and of one that has ended."""
    name = "adoptd_sessions_outside"
    return [node.metrics.registry.get_sample_value(name, {"out_of": each.value}) for each in OutsideOf]


def test_what_cannot_be_put_back_counts_as_outside_until_it_is_back() -> None:
    async def story() -> None:
        async with watched() as node:
            assert outside_now(node) == [None, None]
            await until(lambda: outside_now(node) == [0, 0])
            node.backend.cannot_adopt["17"] = "no space"
            with node.session() as session:
                await until(lambda: outside_now(node) == [1, 0])
                assert list(node.sessions.strays) == [session.id]
                assert list(node.sessions.strays[session.id].found) == [session.pid]
                node.backend.jobs.clear()
                await until(lambda: outside_now(node) == [0, 1])
                node.backend.jobs.append(session.job)
                node.backend.of_process[session.pid] = session.job
                await until(lambda: outside_now(node) == [0, 0])
                assert node.sessions.strays == {}

    asyncio.run(story())


def test_one_that_somebody_put_back_is_not_outside_at_once_and_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sooner than all the others are, whose next turn is far off here."""

    async def story() -> None:
        async with watched() as node:
            node.on_escape = OnEscape.REPORT
            with node.session() as session:
                await until(lambda: outside_now(node) == [1, 0])
                monkeypatch.setattr(guard, "POLL_S", 600.0)
                looks = node.looks
                await until(lambda: node.looks > looks + 20)
                node.sessions.moved(session, session.job)
                assert outside_now(node) == [0, 0]
                await until(lambda: outside_now(node) == [1, 0], within_s=30.0)

    asyncio.run(story())


def test_what_an_ended_session_left_outside_is_outside_as_long_as_it_lives() -> None:
    """Its first process has gone, and a daemon of it is where it should not be."""

    async def story() -> None:
        async with watched() as node:
            leaving = "sleep 600 >/dev/null 2>&1 & echo $!; read line"
            child = subprocess.Popen(["sh", "-c", leaving], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert child.stdout is not None
            daemon = int(child.stdout.readline())
            try:
                node.backend.cannot_adopt["17"] = "no space"
                with open_process(child.pid) as process:
                    node.add(process)
                await until(lambda: outside_now(node) == [1, 0])
                child.communicate("end")
                await until(lambda: len(node.sessions) == 0)
                looks = node.looks
                await until(lambda: node.looks > looks + 3)
                assert outside_now(node) == [1, 0]
            finally:
                os.kill(daemon, signal.SIGKILL)
            await until(lambda: outside_now(node) == [0, 0])

    asyncio.run(story())
