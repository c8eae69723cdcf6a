"""The demo's scenarios, one test each, on nodes like the demo's and on nodes unlike them."""

from __future__ import annotations

import pytest

from lab.lab import Lab
from lab.scenarios import SCENARIOS, claim_of, run_scenario

# Users and tests know them by these names.
NAMES = (
    "no_job_denied",
    "no_job_ignored",
    "one_job",
    "two_jobs_same_source",
    "two_jobs_unknown_newest",
    "unknown_deny",
    "unknown_allow",
    "root_ignored",
    "root_with_agent_down",
    "agent_down_generic_failure",
    "adopt_failure_allow",
    "adopt_failure_deny",
    "source_without_agent_refused",
    "source_drops_packets",
    "ipv6",
    "ipv4_mapped",
    "agent_restarted_between",
    "other_users_job",
    "multi_hop",
    "same_node",
    "keyboard_interactive",
    "pam_access_stack",
    "job_end_kills_session",
    "wrong_service_ignored",
)

# Where a job was named, the best witness named it: a kernel on which BPF cannot be had fails here, on purpose.
NAMED_BY_BPF = (
    "two_jobs_same_source",
    "ipv6",
    "ipv4_mapped",
    "agent_restarted_between",
    "multi_hop",
    "same_node",
    "keyboard_interactive",
)

# What depends on the layout of cgroups or on the seal.
ELSEWHERE = (
    "one_job",
    "two_jobs_same_source",
    "unknown_deny",
    "adopt_failure_allow",
    "adopt_failure_deny",
    "source_drops_packets",
    "ipv6",
    "other_users_job",
    "multi_hop",
    "keyboard_interactive",
    "job_end_kills_session",
)


def test_the_names_are_the_promised_ones() -> None:
    """No scenario is missing, renamed or unexplained."""
    assert tuple(SCENARIOS) == NAMES
    assert all(claim_of(name).endswith(".") for name in NAMES)


@pytest.mark.timeout(90)
@pytest.mark.parametrize("name", NAMES)
def test_scenario(lab: Lab, name: str) -> None:
    """Each scenario shows what it says, with the witness that it should."""
    outcome = run_scenario(lab, name)
    assert outcome.got == outcome.expected, outcome.explanation
    assert outcome.ok
    assert outcome.witness == ("bpf" if name in NAMED_BY_BPF else "-")


@pytest.mark.timeout(90)
@pytest.mark.parametrize("name", ELSEWHERE)
def test_scenario_on_pure_v2_with_a_key_file(other_lab: Lab, name: str) -> None:
    """The same where there is no cgroup v1 and no MUNGE."""
    outcome = run_scenario(other_lab, name)
    assert outcome.got == outcome.expected, outcome.explanation


def test_a_login_from_a_third_node_finds_its_job_there(other_lab: Lab) -> None:
    """The node that is asked is the one the connection comes from, whichever that is."""
    third = other_lab.cluster.nodes[2]
    other_lab.pam("action_unknown=deny")
    with other_lab.jobs(2, on=[third, other_lab.second]) as jobs:
        for job in jobs:
            assert other_lab.login(source=third, job=job).landed == f"job {job} on node2"
