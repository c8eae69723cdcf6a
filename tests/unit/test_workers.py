"""The thread pool: a stuck callee costs a bounded number of threads and nobody more than their deadline."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
import weakref
from typing import List

import pytest
from fakes import longer, soon, until

from adoptd.deadline import Deadline
from adoptd.workers import OutOfTime, Overloaded, Turns, Workers
from lab.waiting import DEADLINE_S

# For so long a call hangs that is not let go on.
HANGS_S = DEADLINE_S


def test_a_stuck_call_costs_its_deadline_and_no_more(gate: threading.Event) -> None:
    """OutOfTime at the deadline, while the call goes on in its thread and counts as pending until it ends."""

    async def story() -> None:
        workers, begun = Workers("t", 1, 4), threading.Event()
        started = time.monotonic()
        # One that no thread has begun by then is not made at all.
        for ms in longer(50):
            with pytest.raises(OutOfTime, match="t: no result within the deadline"):
                await workers.run(lambda: begun.set() or gate.wait(HANGS_S), Deadline.after_ms(ms))
            if begun.is_set():
                break
        assert time.monotonic() - started < HANGS_S / 2
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
        stuck = asyncio.create_task(workers.run(lambda: gate.wait(HANGS_S), soon()))
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
        running = [asyncio.create_task(workers.run(lambda: gate.wait(HANGS_S), soon())) for _ in range(3)]
        await until(lambda: workers.pending == 3)
        started = time.monotonic()
        with pytest.raises(Overloaded, match="t: 3 calls are under way, at most 3"):
            await workers.run(lambda: None, soon())
        assert time.monotonic() - started < HANGS_S / 2
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
        running = asyncio.create_task(workers.run(lambda: gate.wait(HANGS_S), soon()))
        await until(lambda: workers.pending == 1)
        waiting = asyncio.create_task(workers.run(lambda: 1, soon()))
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
        with pytest.raises(Overloaded, match="after shutdown"):
            await workers.run(lambda: 1, soon())
        assert workers.pending == 0

    asyncio.run(story())


def test_more_calls_than_threads_are_made_in_the_order_they_came() -> None:
    """Those that wait are taken by whichever thread is done first."""

    async def story() -> None:
        made: List[int] = []
        workers = Workers("t", 1, 64)
        await asyncio.gather(*(workers.run(functools.partial(made.append, n), soon()) for n in range(50)))
        assert made == list(range(50))
        workers.close()

    asyncio.run(story())


def test_a_closed_pool_begins_nothing_that_waits(gate: threading.Event) -> None:
    """What is under way ends; what waited is told at its own deadline."""

    async def story() -> None:
        made: List[str] = []
        workers = Workers("t", 1, 4)
        running = asyncio.create_task(workers.run(lambda: gate.wait(HANGS_S), soon()))
        await until(lambda: workers.pending == 1)
        waiting = asyncio.create_task(workers.run(lambda: made.append("begun"), Deadline.after_ms(60)))
        # In this turn of the loop it is put behind the other; its deadline is heard of in a later one.
        await asyncio.sleep(0)
        assert workers.pending == 2
        workers.close()
        assert workers.pending == 1
        gate.set()
        assert await running is True
        with pytest.raises(OutOfTime):
            await waiting
        assert made == []
        assert workers.pending == 0

    asyncio.run(story())


def test_a_result_nobody_waits_for_is_let_go_of(gate: threading.Event) -> None:
    """It may hold descriptors, and the thread that made it may be idle for hours."""

    class Made:
        pass

    async def story() -> None:
        kept: List[weakref.ref[Made]] = []

        def make() -> Made:
            begun.set()
            gate.wait(HANGS_S)
            made = Made()
            kept.append(weakref.ref(made))
            return made

        workers, begun = Workers("t", 1, 4), threading.Event()
        for ms in longer(20):
            with pytest.raises(OutOfTime):
                await workers.run(make, Deadline.after_ms(ms))
            if begun.is_set():
                break
        gate.set()
        await until(lambda: workers.pending == 0)
        await until(lambda: kept[0]() is None)
        workers.close()

    asyncio.run(story())


def test_turns_go_from_key_to_key() -> None:
    """Who has fifty waiting is not served fifty times before somebody else's first."""

    async def story() -> None:
        turns = Turns(2, 2)
        order: List[str] = []
        first = [turns.take_now("flood"), turns.take_now("flood")]
        assert first == [True, True]
        assert not turns.take_now("flood")
        assert not turns.take_now("other")

        async def one(key: str) -> None:
            async with turns.taken(key, soon()):
                order.append(key)

        waiting = [asyncio.create_task(one("flood")) for _ in range(50)]
        await asyncio.sleep(0)
        waiting += [asyncio.create_task(one("other")) for _ in range(2)]
        await until(lambda: sum(map(len, turns._waiting.values())) == 52)
        turns.give_back("flood")
        turns.give_back("flood")
        await asyncio.gather(*waiting)
        assert order.index("other") <= 2
        assert order[:5].count("other") == 2
        assert (turns._free, turns._held, dict(turns._waiting)) == (2, {}, {})

    asyncio.run(story())


def test_turns_are_kept_count_of_between_threads() -> None:
    """Taken and given back by many threads and the event loop at once: never more than there are, and none is lost."""

    async def story() -> None:
        turns, held, most = Turns(4, 3), 0, 0
        count = threading.Lock()

        def enter() -> None:
            nonlocal held, most
            with count:
                held += 1
                most = max(most, held)

        def leave() -> None:
            nonlocal held
            with count:
                held -= 1

        def in_a_thread() -> None:
            for _ in range(300):
                if turns.take_now("thread"):
                    enter()
                    leave()
                    turns.give_back("thread")

        async def in_the_loop(key: str) -> None:
            for _ in range(40):
                async with turns.taken(key, soon()):
                    enter()
                    await asyncio.sleep(0)
                    leave()

        workers = Workers("t", 4, 8)
        threads = [workers.run(in_a_thread, soon()) for _ in range(4)]
        await asyncio.gather(*threads, *(in_the_loop(key) for key in ("a", "b", "a", "thread")))
        assert 1 <= most <= 4
        assert (turns._free, turns._held, dict(turns._waiting)) == (4, {}, {})
        workers.close()

    asyncio.run(story())


def test_a_turn_granted_to_who_gave_up_is_the_next_one_s() -> None:
    """The grant is on its way when the waiter is cancelled: nobody else must wait for it in vain."""

    async def story() -> None:
        turns = Turns(1, 1)
        assert turns.take_now("a")
        waiting = asyncio.create_task(turns.take("b", soon()))
        await until(lambda: bool(turns._waiting))
        turns.give_back("a")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0)
        assert (turns._free, turns._held) == (1, {})

    asyncio.run(story())
