"""The scenarios of the demo, in the order they are shown; their names are what users and tests rely on.

A scenario is a function from a lab to an outcome. It tries one thing with the real ssh client, says where
the session landed, and leaves the nodes as it found them. The first line of its docstring is its claim.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Callable, Mapping

from lab.lab import Lab
from lab.outcome import Outcome
from lab.scenarios_decision import DECISION_SCENARIOS
from lab.scenarios_journey import JOURNEY_SCENARIOS
from lab.scenarios_slurm import SLURM_SESSION_SCENARIOS
from lab.scenarios_slurm_asking import SLURM_ASKING_SCENARIOS
from lab.scenarios_slurm_many import SLURM_MANY_SCENARIOS

Scenario = Callable[[Lab], Outcome]

SCENARIOS: Mapping[str, Scenario] = {
    function.__name__: function for function in (*DECISION_SCENARIOS, *JOURNEY_SCENARIOS)
}
# Only where jobs are Slurm's.
SLURM_SCENARIOS: Mapping[str, Scenario] = {
    function.__name__: function
    for function in (*SLURM_SESSION_SCENARIOS, *SLURM_ASKING_SCENARIOS, *SLURM_MANY_SCENARIOS)
}
ALL_SCENARIOS: Mapping[str, Scenario] = {**SCENARIOS, **SLURM_SCENARIOS}


# Lines of an agent's log that tell why something is not as expected.
_TELLING = re.compile(r" (warning|error|critical) |unknown: |failed")
_TELLING_LINES = 4


def run_scenario(lab: Lab, name: str) -> Outcome:
    """Run one scenario. One that raises is an outcome too, and what agents logged goes with any that is not ok."""
    tails = [(node, node.agent_log()) for node in lab.cluster.hosts]
    try:
        outcome = ALL_SCENARIOS[name](lab)
    except Exception as error:
        # One scenario that breaks must not hide what the others show.
        outcome = Outcome("no error", f"{type(error).__name__}: {error}", False, "-", None, "the scenario itself broke")
    if outcome.ok:
        return outcome
    lines = [f"{node.name}: {line}" for node, tail in tails for line in tail.lines() if _TELLING.search(line)]
    told = "".join(f"\n          {line}" for line in lines[-_TELLING_LINES:])
    return dataclasses.replace(outcome, explanation=outcome.explanation + told)


def claim_of(name: str) -> str:
    """What a scenario shows, in one sentence."""
    return " ".join((ALL_SCENARIOS[name].__doc__ or "").split())
