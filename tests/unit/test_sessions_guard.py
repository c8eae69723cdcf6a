"""The guard where the kernel does not answer: bounded, said once, and never the end of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from typing import AsyncIterator, List

import pytest
from fakes import ALICE, FakeBackend, job, until
from logs import LogLines, log_lines

from adoptd.events import Events
from adoptd.metrics import Metrics
from adoptd.model import JobManagerError, ProbeError
from adoptd.probe.watching import OpenWatch
from adoptd.process import open_process
from adoptd.sessions import Session, Sessions, guard
from adoptd.sessions.escapes import OnEscape
from adoptd.sessions.guard import Guard
from adoptd.workers import Workers

__all__ = ["log_lines"]


class Watched:
    """This test process as a session, whose backend the test has do things."""

    def __init__(self) -> None:
        self.backend = FakeBackend(job("17"))
        self.sessions = Sessions(time.time)
        self.workers = Workers("guard", threads=1, backlog=1)
        self.fault: List[str] = ["not permitted"]
        self.metrics = Metrics()
        self.guard = Guard(
            self.sessions,
            lambda: self.backend,
            lambda: OnEscape.READOPT,
            self._open,
            self.workers,
            self.metrics,
            Events(),
            lambda session: False,
        )

    def _open(self) -> OpenWatch:
        raise ProbeError(self.fault[0])

    def add_myself(self) -> Session:
        with open_process(os.getpid()) as process:
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
            node.add_myself()
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
            session = node.add_myself()
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
                node.sessions.add(
                    process,
                    uid=ALICE,
                    user="alice",
                    job=job("17"),
                    witness=None,
                    reason="x",
                    connection=None,
                    service="sshd",
                    stages=(),
                )
            assert node.metrics.registry.get_sample_value("adoptd_sessions") == 1
            child.communicate()
            await until(lambda: node.metrics.registry.get_sample_value("adoptd_sessions") == 0)

    asyncio.run(story())
