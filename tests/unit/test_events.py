"""The event stream: who publishes is never held up or failed, and a watcher who falls behind is told how far."""

from __future__ import annotations

import asyncio
from typing import List

import pytest
from fakes import ALICE, BOB

from adoptd.events import (
    WATCHERS_KEPT_FOR_ROOT,
    WATCHERS_MAX,
    WATCHERS_MAX_PER_UID,
    Event,
    EventKind,
    Events,
    Subscription,
    TooManyWatchers,
)


def event(number: int, uid: int = ALICE) -> Event:
    return Event(EventKind.ADOPTION, uid, {"n": number})


def everything(_: Event) -> bool:
    return True


def numbers(subscription: Subscription, count: int) -> List[object]:
    async def read() -> List[object]:
        return [(await asyncio.wait_for(subscription.__anext__(), 5.0)).fields["n"] for _ in range(count)]

    return asyncio.run(read())


def test_each_watcher_sees_what_it_accepts_in_order() -> None:
    """And nothing from before it began."""
    events = Events()
    events.publish(event(0))
    hers, all_of_it = events.subscribe(lambda e: e.uid == ALICE, ALICE), events.subscribe(everything)
    for number in range(1, 5):
        events.publish(event(number, (ALICE, BOB)[number % 2]))
    assert numbers(hers, 2) == [2, 4]
    assert numbers(all_of_it, 4) == [1, 2, 3, 4]


def test_who_does_not_read_loses_the_oldest_and_is_told_how_many() -> None:
    """The queue is bounded; nobody else loses anything."""
    events = Events(backlog=3)
    slow, quick = events.subscribe(everything), events.subscribe(everything)
    seen: List[object] = []
    for number in range(10):
        events.publish(event(number))
        seen += numbers(quick, 1)
    assert (seen, quick.take_dropped()) == (list(range(10)), 0)
    assert numbers(slow, 3) == [7, 8, 9]
    assert (slow.take_dropped(), slow.take_dropped()) == (7, 0)


def test_a_filter_that_fails_ends_its_own_watch_and_nobody_else_s() -> None:
    """An event must reach nobody unfiltered, and whoever published has done nothing wrong."""

    def fails(_: Event) -> bool:
        raise ValueError("a defect")

    events = Events()
    broken, sound = events.subscribe(fails), events.subscribe(everything)
    events.publish(event(1))
    assert (broken.closed, numbers(sound, 1)) == (True, [1])
    with pytest.raises(StopAsyncIteration):
        numbers(broken, 1)


def test_waiting_for_news_ends_with_the_agent() -> None:
    """close() wakes whoever waits."""

    async def story() -> None:
        events = Events()
        subscription = events.subscribe(everything)
        waiting = asyncio.create_task(subscription.__anext__())
        await asyncio.sleep(0)
        assert not waiting.done()
        events.close()
        with pytest.raises(StopAsyncIteration):
            await waiting

    asyncio.run(story())


def test_an_event_wakes_who_waits() -> None:
    """At once."""

    async def story() -> None:
        events = Events()
        subscription = events.subscribe(everything)
        waiting = asyncio.create_task(subscription.__anext__())
        await asyncio.sleep(0)
        events.publish(event(1))
        assert (await asyncio.wait_for(waiting, 5.0)).fields["n"] == 1

    asyncio.run(story())


def test_one_user_cannot_keep_the_others_from_watching() -> None:
    """A few for each; a closed one makes room."""
    events = Events()
    mine = [events.subscribe(everything, ALICE) for _ in range(WATCHERS_MAX_PER_UID)]
    with pytest.raises(TooManyWatchers, match=f"uid {ALICE} is watching {WATCHERS_MAX_PER_UID} times already"):
        events.subscribe(everything, ALICE)
    events.subscribe(everything, BOB)
    mine[0].close()
    mine[0].close()
    events.subscribe(everything, ALICE)


def test_all_users_together_cannot_keep_root_from_watching() -> None:
    """Some places are root's; in all there is a bound for root as well."""
    events = Events()
    for uid in range(1000, 1000 + WATCHERS_MAX - WATCHERS_KEPT_FOR_ROOT):
        events.subscribe(everything, uid)
    with pytest.raises(TooManyWatchers, match="others are watching already"):
        events.subscribe(everything, 5000)
    for _ in range(WATCHERS_KEPT_FOR_ROOT):
        events.subscribe(everything, 0)
    with pytest.raises(TooManyWatchers):
        events.subscribe(everything, 0)


def test_roots_watches_take_nothing_from_the_users_places() -> None:
    """Also where root has begun first."""
    events = Events()
    for _ in range(WATCHERS_KEPT_FOR_ROOT):
        events.subscribe(everything, 0)
    for uid in range(1000, 1000 + WATCHERS_MAX - WATCHERS_KEPT_FOR_ROOT):
        events.subscribe(everything, uid)
