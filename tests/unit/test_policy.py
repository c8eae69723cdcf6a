"""The decision table, against a second one written from pam_slurm_adopt's documentation alone."""

from __future__ import annotations

import itertools
from typing import Dict, Iterator, List, Optional, Tuple

import pytest

from adoptd.policy import (
    AFTER_FAILURE,
    ALLOWED_ACTIONS,
    RULES,
    Action,
    Options,
    Situation,
    Step,
    next_step,
    situation_of,
)

# Option: its values, pam_slurm_adopt's default first.
VALUES: Dict[str, Tuple[str, ...]] = {
    "action_no_jobs": ("deny", "ignore"),
    "action_unknown": ("newest", "allow", "deny"),
    "action_adopt_failure": ("allow", "deny"),
    "action_generic_failure": ("ignore", "allow", "deny"),
}

# Situation: the option it consults and the step for each of its values, or the step whatever the options.
EXPECTED: Dict[str, Tuple[Optional[str], Dict[object, str]]] = {
    "generic_failure": ("action_generic_failure", {"ignore": "ignore", "allow": "success", "deny": "deny"}),
    "no_jobs": ("action_no_jobs", {"deny": "deny", "ignore": "ignore"}),
    "one_job": ("single_job_skip_rpc", {True: "only_job", False: "ask_source"}),
    "several_jobs": (None, {None: "ask_source"}),
    "named": (None, {None: "callerid"}),
    "unknown": ("action_unknown", {"newest": "newest", "allow": "success", "deny": "deny"}),
    "named_failed": ("action_unknown", {"newest": "newest", "allow": "success", "deny": "deny"}),
    "adopt_failure": ("action_adopt_failure", {"allow": "success", "deny": "deny"}),
}

ENDS = {Step.SUCCEED, Step.DENY, Step.IGNORE}


def every_options() -> Iterator[Tuple[Dict[str, object], Options]]:
    for words in itertools.product(*VALUES.values()):
        for skip in (True, False):
            chosen = dict(zip(VALUES, words))
            options = Options(single_job_skip_rpc=skip, **{name: Action(word) for name, word in chosen.items()})
            yield {**chosen, "single_job_skip_rpc": skip}, options


@pytest.mark.parametrize("option", sorted(VALUES))
@pytest.mark.parametrize("action", list(Action))
def test_an_option_takes_its_own_values_and_no_other(option: str, action: Action) -> None:
    """A value that pam_slurm_adopt's option lacks is refused with the option's name and the values it has."""
    if action.value in VALUES[option]:
        assert getattr(Options(**{option: action}), option) is action
        return
    with pytest.raises(ValueError, match=f"{option} is {action.value}") as refusal:
        Options(**{option: action})
    assert all(word in str(refusal.value) for word in VALUES[option])


def test_the_values_and_defaults_are_those_of_pam_slurm_adopt() -> None:
    """No option has more, fewer or other values, and the default is the first one documented."""
    assert {name: {a.value for a in found} for name, found in ALLOWED_ACTIONS.items()} == {
        name: set(words) for name, words in VALUES.items()
    }
    assert {name: getattr(Options(), name).value for name in VALUES} == {n: words[0] for n, words in VALUES.items()}
    assert Options().single_job_skip_rpc is True


def test_every_situation_under_every_option_value() -> None:
    """The whole table: 8 situations x 72 settings; each situation depends on its own option only."""
    assert {situation.value for situation in Situation} == set(EXPECTED) == {s.value for s in RULES}
    compared = 0
    for chosen, options in every_options():
        for situation in Situation:
            option, steps = EXPECTED[situation.value]
            expected = steps[None if option is None else chosen[option]]
            assert next_step(situation, options).value == expected, (situation, chosen)
            compared += 1
    assert compared == 8 * 72


def test_where_a_login_starts() -> None:
    """The number of jobs decides; not knowing it is no number."""
    starts = [situation_of(count) for count in (None, 0, 1, 2, 3, 5000)]
    assert [s.value for s in starts] == [
        "generic_failure",
        "no_jobs",
        "one_job",
        "several_jobs",
        "several_jobs",
        "several_jobs",
    ]


def test_what_follows_a_failed_adoption() -> None:
    """A named job that cannot be had leaves the question open; the last adoption failing is adopt_failure."""
    assert {step.value: situation.value for step, situation in AFTER_FAILURE.items()} == {
        "only_job": "adopt_failure",
        "callerid": "named_failed",
        "newest": "adopt_failure",
    }


def paths(situation: Situation, options: Options, behind: Tuple[Situation, ...]) -> Iterator[Tuple[List[Step], Step]]:
    """Every way a login can go from ``situation``: the steps taken, and the last."""
    assert situation not in behind, f"{behind} leads back to {situation}"
    step = next_step(situation, options)
    behind = (*behind, situation)
    if step in ENDS:
        yield [], step
    elif step is Step.ASK_SOURCE:
        for answer in (Situation.NAMED, Situation.UNKNOWN):
            for taken, end in paths(answer, options, behind):
                yield [step, *taken], end
    else:
        yield [step], Step.SUCCEED
        for taken, end in paths(AFTER_FAILURE[step], options, behind):
            yield [step, *taken], end


@pytest.mark.parametrize("count", [None, 0, 1, 2])
def test_every_path_ends(count: Optional[int]) -> None:
    """No situation is met twice on a path, so no login can go round in circles; at most three steps of work."""
    for _, options in every_options():
        for taken, end in paths(situation_of(count), options, ()):
            assert end in ENDS
            assert len(taken) <= 3
            assert len(set(taken)) == len(taken)


def test_denied_never_follows_from_defaults_with_a_job() -> None:
    """With the default options a user who has a job here is never denied, whatever fails."""
    for count in (None, 1, 2):
        assert all(end is not Step.DENY for _, end in paths(situation_of(count), Options(), ()))
