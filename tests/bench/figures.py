"""What a measurement comes to, and how it is shown.

Owns percentiles, the ratio to the peer and to the idle node, and the table. Never measures anything
but how idle the machine is. Used by every other module here.
"""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

# Long enough for a percentage of two cores that count in ticks of 10 ms.
_IDLE_SAMPLE_S = 0.25


@dataclass(frozen=True)
class Figure:
    """One cell: what ``who`` took for ``what`` on a node that is as ``node`` says.

    ``low`` and ``high`` are the smallest and largest median of the slices it was measured in: the spread.
    ``lost`` is how many questions got no answer. ``missing`` says why there is nothing; the numbers are None then.
    ``idle_percent`` is the machine's, right before. A ``peer`` figure is what the others of its cell are compared with.
    """

    what: str
    node: str
    who: str
    unit: str
    lost: int = 0
    p50: Optional[float] = None
    p99: Optional[float] = None
    low: Optional[float] = None
    high: Optional[float] = None
    count: int = 0
    idle_percent: Optional[int] = None
    peer: bool = False
    more_is_better: bool = False
    missing: str = ""


def of_slices(base: Figure, slices: Sequence[Sequence[float]]) -> Figure:
    """``base`` with the numbers of these samples."""
    every = sorted(value for each in slices for value in each)
    medians = [percentile(sorted(each), 50) for each in slices if each]
    if not every:
        return dataclasses.replace(base, missing="no samples")
    return dataclasses.replace(
        base,
        p50=percentile(every, 50),
        p99=percentile(every, 99),
        low=min(medians),
        high=max(medians),
        count=len(every),
    )


def of_values(base: Figure, values: Sequence[float]) -> Figure:
    """``base`` with the median of a few figures that are sums or rates already: they have no p99."""
    return dataclasses.replace(of_slices(base, [[value] for value in values]), p99=None)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of sorted values."""
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]


def idle_percent() -> int:
    """How idle all cores together are right now."""
    before = _cpu_ticks()
    time.sleep(_IDLE_SAMPLE_S)
    after = _cpu_ticks()
    total = sum(after) - sum(before)
    return round(100 * (after[3] + after[4] - before[3] - before[4]) / max(1, total))


def _cpu_ticks() -> List[int]:
    return [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]


def machine() -> Dict[str, str]:
    """What the figures depend on."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?"
    )
    load = Path("/proc/loadavg").read_text().split()[:3]
    processes = sum(1 for name in os.listdir("/proc") if name.isdigit())
    return {
        "cpu": model,
        "cores": str(os.cpu_count()),
        "kernel": os.uname().release,
        "load_average": " ".join(load),
        "processes": str(processes),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _lines(path: str) -> List[str]:
    return Path(path).read_text(errors="replace").splitlines()


def ratios(figure: Figure, every: Sequence[Figure]) -> Tuple[Optional[float], Optional[float]]:
    """How many times better than the peer, and how many times the same one's on an idle node."""
    if figure.p50 is None:
        return None, None
    same = [other for other in every if other.what == figure.what and other.p50]
    peer = next((other for other in same if other.peer and other.node == figure.node), None)
    first = next((other for other in same if other.who == figure.who and other.node == "idle"), None)
    to_peer = None
    if peer is not None and peer is not figure and peer.p50 and figure.p50:
        to_peer = figure.p50 / peer.p50 if figure.more_is_better else peer.p50 / figure.p50
    to_idle = figure.p50 / first.p50 if first is not None and first is not figure and first.p50 else None
    return to_peer, to_idle


def table(every: Sequence[Figure]) -> str:
    """For people: one block per question, one line per cell and contestant."""
    lines: List[str] = []
    what = ""
    questions = list(dict.fromkeys(figure.what for figure in every))
    for figure in sorted(every, key=lambda each: questions.index(each.what)):
        if figure.what != what:
            what = figure.what
            lines += ["", f"{what} ({figure.unit})"]
            lines.append(
                f"  {'node':<27} {'who':<26} {'p50':>9} {'p99':>9} {'spread of p50':>19} {'n':>7} "
                f"{'lost':>5} {'x peer':>7} {'x idle':>7} {'cpu idle':>8}"
            )
        if figure.missing:
            lines.append(f"  {figure.node:<27} {figure.who:<26} not measured: {figure.missing}")
            continue
        to_peer, to_idle = ratios(figure, every)
        spread = f"{_number(figure.low)} .. {_number(figure.high)}"
        lines.append(
            f"  {figure.node:<27} {figure.who:<26} {_number(figure.p50):>9} {_number(figure.p99):>9} {spread:>19} "
            f"{figure.count:>7} {figure.lost:>5} {_ratio(to_peer):>7} {_ratio(to_idle):>7} "
            f"{'-' if figure.idle_percent is None else f'{figure.idle_percent}%':>8}"
        )
    return "\n".join(lines)


def as_json(every: Sequence[Figure]) -> List[Dict[str, object]]:
    """For programs: the figures and their ratios."""
    rows: List[Dict[str, object]] = []
    for figure in every:
        to_peer, to_idle = ratios(figure, every)
        rows.append({**dataclasses.asdict(figure), "times_better_than_peer": to_peer, "times_idle": to_idle})
    return rows


def _number(value: Optional[float]) -> str:
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def _ratio(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.2f}"
