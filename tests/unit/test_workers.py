"""The thread pool: a stuck callee costs a bounded number of threads and nobody more than their deadline."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Iterator, List

import pytest
from fakes import soon, until

from adoptd.deadline import Deadline
from adoptd.workers import OutOfTime, Overloaded, Workers


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What the stuck calls wait for; opened at the end of every test, so that no thread stays."""
    event = threading.Event()
    yield event
    event.set()


def test_a_stuck_call_costs_its_deadline_and_no_more(gate: threading.Event) -> None:
    """OutOfTime at the deadline, while the call goes on in its thread and counts as pending until it ends."""

    async def story() -> None:
        workers = Workers("t", 1, 4)
        started = time.monotonic()
        with pytest.raises(OutOfTime, match="t: no result within the deadline"):
            await workers.run(lambda: gate.wait(5), Deadline.after_ms(50))
        assert time.monotonic() - started < 1.0
        assert workers.pending == 1
        gate.set()
        await until(lambda: workers.pending == 0)
        workers.close()

    asyncio.run(story())


def test_a_call_that_waited_past_its_deadline_is_never_made(gate: threading.Event) -> None:
    """A move into a job does not happen after its login was told that it failed."""

    async def story() -> None:
        made: List[str] = []
        workers = Workers("t", 1, 4)
        stuck = asyncio.create_task(workers.run(lambda: gate.wait(5), soon(5000)))
        await until(lambda: workers.pending == 1)
        with pytest.raises(OutOfTime):
            await workers.run(lambda: made.append("queued"), Deadline.after_ms(30))
        gate.set()
        await stuck
        await until(lambda: workers.pending == 0)
        with pytest.raises(OutOfTime):
            await workers.run(lambda: made.append("expired"), Deadline.after_ms(0))
        await workers.run(lambda: made.append("in time"), soon())
        assert made == ["in time"]
        workers.close()

    asyncio.run(story())


def test_over_the_backlog_is_refused_at_once(gate: threading.Event) -> None:
    """Waiting behind calls that are stuck would only be waiting past the deadline."""

    async def story() -> None:
        workers = Workers("t", 2, 3)
        running = [asyncio.create_task(workers.run(lambda: gate.wait(5), soon(5000))) for _ in range(3)]
        await until(lambda: workers.pending == 3)
        started = time.monotonic()
        with pytest.raises(Overloaded, match="t: 3 calls are under way, at most 3"):
            await workers.run(lambda: None, soon(5000))
        assert time.monotonic() - started < 1.0
        gate.set()
        assert await asyncio.gather(*running) == [True] * 3
        await until(lambda: workers.pending == 0)
        assert await workers.run(lambda: 7, soon()) == 7
        workers.close()

    asyncio.run(story())


def test_cancelling_the_asker_gives_its_place_back(gate: threading.Event) -> None:
    """A login that goes away while its call waits for a thread leaves nothing pending."""

    async def story() -> None:
        workers = Workers("t", 1, 4)
        running = asyncio.create_task(workers.run(lambda: gate.wait(5), soon(5000)))
        await until(lambda: workers.pending == 1)
        waiting = asyncio.create_task(workers.run(lambda: 1, soon(5000)))
        await until(lambda: workers.pending == 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await until(lambda: workers.pending == 1)
        gate.set()
        await running
        await until(lambda: workers.pending == 0)
        workers.close()

    asyncio.run(story())


def test_what_the_call_raises_is_raised(gate: threading.Event) -> None:
    """The caller sees the callee's own exception, and the place is free again."""

    async def story() -> None:
        workers = Workers("t", 1, 1)
        for _ in range(3):
            with pytest.raises(KeyError, match="gone"):
                await workers.run(lambda: {}["gone"], soon())
            await until(lambda: workers.pending == 0)
        workers.close()
        with pytest.raises(RuntimeError):
            await workers.run(lambda: 1, soon())
        assert workers.pending == 0

    asyncio.run(story())
