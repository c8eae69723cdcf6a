"""What ./dev bench says of its samples: a missing figure is never a number, a ratio is never the wrong way round."""

from __future__ import annotations

from bench import figures, goals
from bench.figures import Figure


def figure(who: str, node: str, p50: float, **more: bool) -> Figure:
    return figures.of_values(Figure("callerid answer", node, who, "ms", **more), [p50])


def test_no_samples_is_missing_and_not_zero() -> None:
    """A cell in which nothing was answered has no figure, and says so."""
    found = figures.of_slices(Figure("q", "idle", "w", "ms", lost=7), [[], []])
    assert (found.p50, found.missing, found.lost) == (None, "no samples", 7)


def test_no_ratio_to_a_peer_that_was_not_measured() -> None:
    """A peer that is not installed makes nobody better or worse."""
    ours = figure("adoptd", "idle", 2.0)
    peer = Figure("callerid answer", "idle", "slurmd", "ms", peer=True, missing="not installed")
    assert figures.ratios(ours, [ours, peer]) == (None, None)


def test_a_goal_that_was_not_measured_is_neither_reached_nor_missed() -> None:
    """Without Slurm the comparisons with it are open."""
    assert {goal.reached for goal in goals.judge([])} == {None}


def test_times_better_than_the_peer_is_over_one_for_less_time_and_for_more_answers() -> None:
    """Twice as fast is 2, whether the unit is milliseconds or answers per second."""
    faster, slower = figure("adoptd", "idle", 2.0), figure("slurmd", "idle", 4.0, peer=True)
    assert figures.ratios(faster, [faster, slower])[0] == 2.0
    more = figure("adoptd", "idle", 8.0, more_is_better=True)
    assert figures.ratios(more, [more, slower])[0] == 2.0


def test_times_idle_compares_one_contestant_with_itself() -> None:
    """The cell with load over the same one's cell without."""
    idle, loaded, other = figure("adoptd", "idle", 2.0), figure("adoptd", "loaded", 3.0), figure("x", "idle", 9.0)
    assert figures.ratios(loaded, [other, idle, loaded])[1] == 1.5
    assert figures.ratios(idle, [other, idle, loaded])[1] is None


def test_percentiles_are_values_that_were_measured() -> None:
    """Nearest rank: of 100 values the 99th, of one value that one."""
    assert figures.percentile([float(value) for value in range(1, 101)], 99) == 99.0
    assert figures.percentile([5.0], 99) == 5.0


def test_the_spread_is_that_of_the_slices_medians() -> None:
    """An outlier within a slice is in p99, not in the spread."""
    found = figures.of_slices(Figure("q", "idle", "w", "ms"), [[1.0, 1.0, 50.0], [2.0, 2.0, 2.0]])
    assert (found.low, found.high, found.p99, found.count) == (1.0, 2.0, 50.0, 6)
