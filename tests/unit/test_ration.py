"""The log's share for one caller: what is left out is counted, nobody's first line is, and memory is bounded."""

from __future__ import annotations

from adoptd.ration import Ration


def test_the_first_lines_of_a_caller_are_said_and_the_rest_counted() -> None:
    """And another caller's are said all the while."""
    now_s = 100.0
    ration = Ration(3, 10.0, 100, lambda: now_s)
    assert [ration.take("flood") for _ in range(8)] == [0, 0, 0, None, None, None, None, None]
    assert ration.take("other") == 0
    now_s += 10.0
    assert ration.take("flood") == 5
    assert ration.take("flood") == 0


def test_callers_beyond_the_bound_are_forgotten_oldest_first() -> None:
    """Whoever has many addresses takes no memory, and silences nobody."""
    ration = Ration(1, 10.0, 4, lambda: 0.0)
    for caller in range(1000):
        assert ration.take(caller) == 0
    assert len(ration._said) == 4
    assert ration.take(999) is None
    assert ration.take(0) == 0
