"""The replay cache: nothing live is ever forgotten, and nothing is kept for good."""

from __future__ import annotations

import threading
from typing import Dict, List, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adoptd.seal.replay import Admission, ReplayCache, capacity_for


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_a_nonce_is_refused_the_second_time() -> None:
    """The same nonce is new once, also when its second expiry is another."""
    cache = ReplayCache(10, Clock())
    assert cache.offer("a", 1010) is Admission.NEW
    assert cache.offer("a", 1010) is Admission.SEEN
    assert cache.offer("a", 1015) is Admission.SEEN
    assert not cache.admit("a", 1010)


def test_a_nonce_that_has_expired_is_refused_and_not_kept() -> None:
    """What could no longer be accepted takes no room."""
    cache = ReplayCache(1, Clock())
    assert cache.offer("a", 1000) is Admission.EXPIRED
    assert cache.offer("a", 999.9) is Admission.EXPIRED
    assert len(cache) == 0


def test_a_full_cache_refuses_what_is_new_and_remembers_what_is_old() -> None:
    """A flood cannot push out an entry that is alive."""
    clock = Clock()
    cache = ReplayCache(3, clock)
    assert [cache.offer(nonce, 1010) for nonce in "abc"] == [Admission.NEW] * 3
    for number in range(1000):
        assert cache.offer(f"flood{number}", 1010) is Admission.FULL
    assert [cache.offer(nonce, 1010) for nonce in "abc"] == [Admission.SEEN] * 3
    clock.now = 1009.999
    assert cache.offer("a", 1010) is Admission.SEEN
    clock.now = 1010
    assert cache.offer("d", 1020) is Admission.NEW
    assert len(cache) == 1


def test_entries_expire_one_by_one_whatever_order_they_came_in() -> None:
    """A late entry with an early expiry does not wait for the ones before it."""
    clock = Clock()
    cache = ReplayCache(3, clock)
    for nonce, expires_at in (("late", 1030.0), ("early", 1010.0), ("middle", 1020.5)):
        assert cache.admit(nonce, expires_at)
    clock.now = 1010
    assert cache.admit("next", 1040)
    clock.now = 1020.9
    assert cache.offer("middle", 1020.95) is Admission.SEEN  # kept to the end of its second
    assert cache.offer("late", 1030) is Admission.SEEN


def test_a_clock_set_back_forgets_nothing() -> None:
    """Entries live by the clock that says whether a message is fresh, even when it goes back."""
    clock = Clock()
    cache = ReplayCache(10, clock)
    assert cache.admit("a", 1010)
    clock.now = 400
    assert cache.offer("a", 1010) is Admission.SEEN
    clock.now = 1010
    assert cache.offer("b", 1020) is Admission.NEW
    assert len(cache) == 1


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 30), st.floats(0, 5)), max_size=60))
def test_no_nonce_is_admitted_twice_within_its_life(steps: List[Tuple[str, float, float]]) -> None:
    """Against a model that forgets nothing: an admission is never repeated before it expires."""
    clock = Clock()
    cache = ReplayCache(4, clock)
    alive_until: Dict[str, float] = {}
    for nonce, lifetime_s, wait_s in steps:
        clock.now += wait_s
        if cache.admit(nonce, clock.now + lifetime_s):
            assert alive_until.get(nonce, 0) <= clock.now
            alive_until[nonce] = clock.now + lifetime_s
        assert len(cache) <= 4


def test_threads_that_offer_one_nonce_are_told_new_once() -> None:
    """Of eight threads offering the same thousand nonces, each nonce is new to exactly one."""
    cache = ReplayCache(10_000, Clock())
    admitted: List[List[int]] = [[] for _ in range(8)]

    def offer_all(mine: List[int]) -> None:
        mine.extend(number for number in range(1000) if cache.admit(str(number), 1010))

    threads = [threading.Thread(target=offer_all, args=(mine,)) for mine in admitted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for mine in admitted for number in mine) == list(range(1000))


def test_a_capacity_of_nothing_is_refused() -> None:
    """A cache that could admit nothing is a mistake of its maker."""
    with pytest.raises(ValueError, match="capacity 0"):
        ReplayCache(0, Clock())


def test_the_room_grows_with_the_life_of_a_seal_and_is_bounded() -> None:
    """Sized for the default alone, a longer life would have honest questions refused."""
    lives = [2 * ttl_s for ttl_s in (1, 10, 20, 60, 300, 3600)]
    rooms = [capacity_for(life_s) for life_s in lives]
    assert rooms == sorted(rooms)
    assert rooms[:2] == [65_536, 65_540]
    assert rooms[2] == 2 * rooms[1]
    assert rooms[-1] == rooms[-2] == 524_288


def test_more_room_is_made_and_less_forgets_nothing() -> None:
    """A reload may change how long a seal lives."""
    cache = ReplayCache(1, lambda: 100.0)
    assert cache.offer("a", 200.0) is Admission.NEW
    assert cache.offer("b", 200.0) is Admission.FULL
    cache.make_room(2)
    assert cache.offer("b", 200.0) is Admission.NEW
    cache.make_room(1)
    assert [cache.offer(nonce, 200.0) for nonce in ("a", "b", "c")] == [Admission.SEEN, Admission.SEEN, Admission.FULL]
