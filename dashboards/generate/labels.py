"""Every label of every metric of the agent's, with all values that it may ever have.

Owns the claim that the number of series is bounded, and by how much. The values come from the agent's own enums.
A test holds the table against what the agent exports; docs/metrics.md is written from it.
"""

from __future__ import annotations

import enum
from typing import Dict, FrozenSet, Iterable, Mapping, Tuple, Type

from prometheus_client import Counter, Histogram
from prometheus_client.core import Metric

from adoptd.callerid import AnswerStage, AskFault
from adoptd.control.joining import JoinOutcome
from adoptd.metrics import Door, Metrics, Pool, Refusal
from adoptd.model import JobFault, Witness
from adoptd.observed import Agreement, Found, Would
from adoptd.policy import Situation, Step
from adoptd.probe.record import COUNTERS
from adoptd.sessions.escapes import EscapeOutcome, Mover, OutsideOf
from adoptd.slurm_callerid import SlurmdFault
from adoptd.wire.callerid import Outcome, Reason
from adoptd.wire.pam import Mode, Phase

Values = FrozenSet[str]


def _of(*kinds: Type[enum.Enum]) -> Values:
    return frozenset(str(member.value) for kind in kinds for member in kind)


def _names(kind: Type[enum.Enum]) -> Values:
    return frozenset(member.name.lower() for member in kind)


_NONE: Values = frozenset({"none"})
_STAGES: Values = frozenset({"account_phase", "jobs_here", "ask_source", "adopt", "decide"})

CLOSED: Mapping[str, Mapping[str, Values]] = {
    "adoptd_adoptions": {
        "phase": _names(Phase),
        "mode": _names(Mode),
        "outcome": frozenset({"adopted", "allowed", "denied", "ignored"}),
        "reason": _of(Situation, Step) | {"account_phase"},
        "witness": _of(Witness) | _NONE,
    },
    "adoptd_adoption_duration_seconds": {"phase": _names(Phase)},
    "adoptd_adoption_budget_used_ratio": {"phase": _names(Phase)},
    "adoptd_stage_duration_seconds": {
        "journey": frozenset({"adoption", "answer"}),
        "stage": _STAGES | _of(AnswerStage),
    },
    "adoptd_observed": {"agreement": _of(Agreement), "found": _of(Found), "would": _of(Would)},
    "adoptd_job_faults": {"stage": _STAGES | {"worked_around"}, "fault": _of(JobFault)},
    "adoptd_callerid_asked": {
        "outcome": _of(Outcome),
        "reason": _of(Reason, AskFault, SlurmdFault),
        "witness": _of(Witness) | _NONE,
    },
    "adoptd_callerid_answered": {"outcome": _of(Outcome), "reason": _of(Reason), "witness": _of(Witness) | _NONE},
    "adoptd_joins": {"outcome": _of(JoinOutcome)},
    "adoptd_escapes": {"mover": _of(Mover), "outcome": _of(EscapeOutcome)},
    "adoptd_sessions_outside": {"out_of": _of(OutsideOf)},
    "adoptd_messages_refused": {"socket": _of(Door), "reason": _of(Refusal)},
    "adoptd_requests_in_flight": {"socket": _of(Door)},
    "adoptd_queue_waiting": {"queue": _of(Pool)},
    "adoptd_witness_up": {"witness": _of(Witness)},
    "adoptd_probe_events": {"kind": frozenset(COUNTERS)},
}

# One series each, whose labels are facts about the host and the build.
FACTS = ("adoptd_build_info", "adoptd_host_info")


def families() -> Dict[str, Metric]:
    """Every family of the agent's own by name, as a scrape would find it after everything happened once."""
    metrics = Metrics()
    metrics.watch_probe(lambda: dict.fromkeys(COUNTERS, 0))
    metrics.watch_host(dict)
    metrics.show_self_test(True)
    for pool in Pool:
        metrics.watch_queue(pool, lambda: 0)
    found = {family.name: family for family in metrics.registry.collect()}
    return {name: family for name, family in sorted(found.items()) if not name.startswith("adoptd_process_")}


def series_at_most(name: str, family: Metric) -> int:
    """How many series a family can have; of a histogram, each bucket is one, and the sum and the count.

    What prometheus-client counts has one more, with the time at which it began to (``_created``).
    """
    each = 1
    for values in CLOSED.get(name, {}).values():
        each *= len(values)
    if family.type == "histogram":
        return each * (_buckets(name) + 3)
    return each * 2 if has_created(name) else each


def has_created(name: str) -> bool:
    """Whether prometheus-client exports the time at which this metric's count began."""
    return any(isinstance(each, (Counter, Histogram)) and each._name == name for each in vars(Metrics()).values())


def samples_of(name: str, family: Metric) -> Iterable[str]:
    """The names that a query uses."""
    suffixes: Dict[str, Tuple[str, ...]] = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return [name + suffix for suffix in suffixes.get(family.type, ("",))]


def _buckets(name: str) -> int:
    # The +Inf bucket included. prometheus-client names the attribute with an underscore and has no other way.
    kept = [each for each in vars(Metrics()).values() if isinstance(each, Histogram) and each._name == name]
    return len(kept[0]._upper_bounds)
