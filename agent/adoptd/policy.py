"""The decision: from what is known about a login to what is done with it. Pure; a table.

Rules for editors:

1. Everything that decides lives in RULES and AFTER_FAILURE below. Code elsewhere finds facts and
   carries out steps; it never asks about an option.
2. A situation consults at most one option. Every value that the option can have is listed.
3. Names, values and defaults of the options are those of pam_slurm_adopt (Slurm 18.08 to 26.11), so
   that a site can swap the line in its PAM stack.
4. Root never comes here: the PAM module lets root pass before it opens a socket.

Called by :mod:`adoptd.adoption`, for a login that happens and for one that is only explained.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Dict, FrozenSet, Mapping, Optional, Tuple, Union


class Action(enum.Enum):
    """The values of the action_* options."""

    IGNORE = "ignore"
    ALLOW = "allow"
    DENY = "deny"
    NEWEST = "newest"


ALLOWED_ACTIONS: Mapping[str, FrozenSet[Action]] = {
    "action_no_jobs": frozenset({Action.DENY, Action.IGNORE}),
    "action_unknown": frozenset({Action.NEWEST, Action.ALLOW, Action.DENY}),
    "action_adopt_failure": frozenset({Action.ALLOW, Action.DENY}),
    "action_generic_failure": frozenset({Action.IGNORE, Action.ALLOW, Action.DENY}),
}


@dataclass(frozen=True)
class Options:
    """The administrator's choices, with pam_slurm_adopt's defaults. Raises ValueError for a value an option lacks."""

    action_no_jobs: Action = Action.DENY
    action_unknown: Action = Action.NEWEST
    action_adopt_failure: Action = Action.ALLOW
    action_generic_failure: Action = Action.IGNORE
    single_job_skip_rpc: bool = True

    def __post_init__(self) -> None:
        for name, allowed in ALLOWED_ACTIONS.items():
            value: Action = getattr(self, name)
            if value not in allowed:
                expected = ", ".join(sorted(action.value for action in allowed))
                raise ValueError(f"{name} is {value.value}, expected one of {expected}")


class Situation(enum.Enum):
    """Where a login stands. The value is the metric label and the word in the log."""

    GENERIC_FAILURE = "generic_failure"
    NO_JOBS = "no_jobs"
    ONE_JOB = "one_job"
    SEVERAL_JOBS = "several_jobs"
    NAMED = "named"
    UNKNOWN = "unknown"
    NAMED_FAILED = "named_failed"
    ADOPT_FAILURE = "adopt_failure"


class Step(enum.Enum):
    """What to do next. The first four are work; the last three end the login's decision."""

    ASK_SOURCE = "ask_source"
    ADOPT_ONLY = "only_job"
    ADOPT_NAMED = "callerid"
    ADOPT_NEWEST = "newest"
    SUCCEED = "success"
    DENY = "deny"
    IGNORE = "ignore"


_Rule = Union[Step, Tuple[str, Mapping[Union[Action, bool], Step]]]

_NOT_NAMED: _Rule = (
    "action_unknown",
    {Action.NEWEST: Step.ADOPT_NEWEST, Action.ALLOW: Step.SUCCEED, Action.DENY: Step.DENY},
)

RULES: Dict[Situation, _Rule] = {
    # The job manager cannot be asked: not the same as "no jobs".
    Situation.GENERIC_FAILURE: (
        "action_generic_failure",
        {Action.IGNORE: Step.IGNORE, Action.ALLOW: Step.SUCCEED, Action.DENY: Step.DENY},
    ),
    Situation.NO_JOBS: ("action_no_jobs", {Action.DENY: Step.DENY, Action.IGNORE: Step.IGNORE}),
    Situation.ONE_JOB: ("single_job_skip_rpc", {True: Step.ADOPT_ONLY, False: Step.ASK_SOURCE}),
    Situation.SEVERAL_JOBS: Step.ASK_SOURCE,
    # The source node named a job that is on this node and is the user's.
    Situation.NAMED: Step.ADOPT_NAMED,
    Situation.UNKNOWN: _NOT_NAMED,
    Situation.NAMED_FAILED: _NOT_NAMED,
    # The last adoption that the rules know has failed.
    Situation.ADOPT_FAILURE: (
        "action_adopt_failure",
        {Action.ALLOW: Step.SUCCEED, Action.DENY: Step.DENY},
    ),
}

AFTER_FAILURE: Dict[Step, Situation] = {
    Step.ADOPT_ONLY: Situation.ADOPT_FAILURE,
    Step.ADOPT_NAMED: Situation.NAMED_FAILED,
    Step.ADOPT_NEWEST: Situation.ADOPT_FAILURE,
}


def next_step(situation: Situation, options: Options) -> Step:
    """The step that ``situation`` leads to under ``options``."""
    rule = RULES[situation]
    if isinstance(rule, Step):
        return rule
    option, steps = rule
    return steps[getattr(options, option)]


def situation_of(job_count: Optional[int]) -> Situation:
    """Where a login starts: the number of the user's jobs on this node, None if it cannot be known."""
    if job_count is None:
        return Situation.GENERIC_FAILURE
    return {0: Situation.NO_JOBS, 1: Situation.ONE_JOB}.get(job_count, Situation.SEVERAL_JOBS)
