"""The scenarios on jobs of a real Slurm: those that are about Slurm, and of the others those that depend on jobs."""

from __future__ import annotations

import pytest

from lab.lab import Lab
from lab.scenarios import SLURM_SCENARIOS, claim_of, run_scenario

NAMES = (
    "extern_step",
    "scancel_kills_session",
    "x11_display",
    "namespace_join",
    "memory_limit_applies",
    "salloc_hint",
    "fallback_slurmd",
    "requeue_same_id",
    "twenty_jobs",
    "storm",
)

# Told of plain cgroups in test_demo_scenarios; here is what a job manager makes different.
ALSO = (
    "no_job_denied",
    "one_job",
    "two_jobs_unknown_newest",
    "adopt_failure_allow",
    "adopt_failure_deny",
    "ipv4_mapped",
    "other_users_job",
    "multi_hop",
    "keyboard_interactive",
    "job_end_kills_session",
)


def test_the_names_are_the_promised_ones() -> None:
    """No scenario is missing, renamed or unexplained."""
    assert tuple(SLURM_SCENARIOS) == NAMES
    assert all(claim_of(name).endswith(".") for name in NAMES)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("name", [*ALSO, *NAMES])
def test_scenario_on_slurm(slurm_lab: Lab, name: str) -> None:
    """Each scenario shows what it says on Slurm's jobs."""
    outcome = run_scenario(slurm_lab, name)
    assert outcome.got == outcome.expected, outcome.explanation
    assert outcome.ok
