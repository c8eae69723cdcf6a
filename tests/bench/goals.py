"""The numbers adoptd is to reach, and whether this run reached them.

Owns the list. A goal whose cells were not measured is neither reached nor missed. Used by __main__.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, List, Optional, Sequence, Tuple

from bench.figures import Figure

Find = Callable[[str, str, str], Optional[float]]


@dataclass(frozen=True)
class Goal:
    """``measured`` and ``limit`` in ``unit``; ``at_least`` turns the comparison round."""

    name: str
    limit: float
    unit: str
    measured: Optional[float]
    at_least: bool = False

    @property
    def reached(self) -> Optional[bool]:
        """None: not measured."""
        if self.measured is None:
            return None
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


_ANSWER, _RATE, _LOOKUP = "callerid answer", "callerid answers, 8 askers", "owner lookup, one witness alone"
_ACCOUNT, _ADDED, _AGENT = "PAM account phase", "added by the probe", "the agent, idle"
_FULL, _CROWDED = "100,000 more connections", "3,000 more processes"
_LONG, _SHORT = "adoptd munge, cgroup jobs", "adoptd key, cgroup jobs"


def judge(every: Sequence[Figure]) -> List[Goal]:
    """All goals, with what this run measured."""

    def p50(what: str, node: str, who: str) -> Optional[float]:
        return next((f.p50 for f in every if (f.what, f.node, f.who) == (what, node, who)), None)

    def over(one: Tuple[str, str, str], other: Tuple[str, str, str]) -> Optional[float]:
        first, second = p50(*one), p50(*other)
        return None if first is None or not second else first / second

    def answer(node: str) -> Optional[float]:
        return over((_ANSWER, node, _LONG), (_ANSWER, "idle", _LONG))

    added, cycle = ("connect()", "connect, accept, close")
    share = over((_ADDED, cycle, "paired difference"), ("on loopback", cycle, "without the probe"))
    return [
        Goal("callerid answer, idle node, MUNGE", 2.0, "ms", p50(_ANSWER, "idle", _LONG)),
        Goal("the same with 100,000 connections", 1.3, "x idle", answer(_FULL)),
        Goal("the same with 3,000 processes", 1.3, "x idle", answer(_CROWDED)),
        Goal(
            "answers per second, MUNGE", 3.0, "x slurmd", over((_RATE, "idle", _LONG), (_RATE, "idle", "slurmd")), True
        ),
        Goal(
            "answers per second, key", 6.0, "x slurmd", over((_RATE, "idle", _SHORT), (_RATE, "idle", "slurmd")), True
        ),
        Goal("owner lookup, idle node", 30.0, "us", p50(_LOOKUP, "idle", "bpf")),
        Goal("owner lookup, 100,000 connections", 30.0, "us", p50(_LOOKUP, _FULL, "bpf")),
        Goal("account phase, one Slurm job", 2.5, "ms", p50(_ACCOUNT, "one job", "adoptd, slurm jobs")),
        Goal("account phase, two Slurm jobs", 5.0, "ms", p50(_ACCOUNT, "two jobs, callerid", "adoptd, slurm jobs")),
        Goal(
            "account phase, silent source",
            350.0,
            "ms",
            p50(_ACCOUNT, "two jobs, source is silent", "adoptd, slurm jobs"),
        ),
        Goal("added to connect(), paired", 1.0, "us", p50(_ADDED, added, "paired difference")),
        Goal("added to connect(), the kernel's count", 1.0, "us", p50(_ADDED, added, "the kernel's run statistics")),
        Goal("added to a connect/close cycle", 2.0, "%", None if share is None else 100 * share),
        Goal("resident memory", 40.0, "MB", p50(_AGENT, "resident memory", "adoptd munge")),
        Goal("idle CPU", 0.1, "%", p50(_AGENT, "CPU, percent of a core", "adoptd munge")),
    ]


def table(goals: Sequence[Goal]) -> str:
    """One line per goal."""
    lines = [f"{'to be reached':<42} {'':<12} {'measured':>9}"]
    for goal in goals:
        word = {None: "not measured", True: "reached", False: "MISSED"}[goal.reached]
        measured = "-" if goal.measured is None else f"{goal.measured:.3g}"
        bound = f"{'>=' if goal.at_least else '<='} {goal.limit:g} {goal.unit}"
        lines.append(f"{goal.name:<42} {bound:<14} {measured:>9}  {word}")
    return "\n".join(lines)
