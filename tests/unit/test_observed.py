"""Observe mode: every pair of what was done and what we would have done, and each login counted once."""

from __future__ import annotations

import asyncio
import os
from typing import Awaitable, Callable, Dict, Optional, Tuple

import pytest
from fakes import ALICE, FakeBackend, connection, job
from logs import LogLines, log_lines

from adoptd.adoption import Adoptions
from adoptd.deadline import Deadline
from adoptd.metrics import Metrics
from adoptd.model import Ambiguous, Job
from adoptd.observed import Agreement, Found, Observations, Sight, Would, agreement_of
from adoptd.policy import Action, Options
from adoptd.process import open_process
from adoptd.sessions import PendingLogins
from adoptd.wire.pam import Mode, PamRequest, Phase
from adoptd.workers import Workers

__all__ = ["log_lines"]

OLD = job("17", created=1, identity=(1,))
NEW = job("18", created=2, identity=(2,))
ENDS = connection()
Counted = Dict[Tuple[str, str, str], int]


def counted(metrics: Metrics) -> Counted:
    """The series that are not 0."""
    found: Counted = {}
    for family in metrics.observed.collect():
        for sample in family.samples:
            if sample.name.endswith("_total") and sample.value:
                labels = sample.labels
                found[(labels["agreement"], labels["found"], labels["would"])] = int(sample.value)
    return found


@pytest.mark.parametrize("would", Would)
@pytest.mark.parametrize("found", Found)
def test_they_agree_in_three_cases_only(would: Would, found: Found) -> None:
    """The same job, refused by both, left out by both; what cannot be read is neither."""
    agree = {(Would.ADOPT, Found.THAT_JOB), (Would.DENY, Found.NO_SESSION), (Would.LEAVE_OUT, Found.NO_JOB)}
    expected = Agreement.AGREE if (would, found) in agree else Agreement.DISAGREE
    assert agreement_of(would, found) is (Agreement.UNKNOWN if found is Found.UNKNOWN else expected)


def sight(would: Would, ours: Optional[Job], place: Optional[Job], fault: str = "") -> Sight:
    """One phase of alice's login."""
    return Sight(ALICE, "alice", ENDS, would, "only_job", ours, place, fault)


def run(story: Callable[[Observations], Awaitable[None]], wait_s: float = 60.0, capacity: int = 10) -> Counted:
    """What is counted when ``story`` is over."""
    metrics = Metrics()

    async def told() -> None:
        observations = Observations(metrics, wait_s, capacity)
        await story(observations)

    asyncio.run(told())
    return counted(metrics)


def test_every_series_is_there_from_the_start() -> None:
    """A rate() over a series that begins with 1 would miss the first disagreement."""
    metrics = Metrics()
    Observations(metrics)
    samples = [s for f in metrics.observed.collect() for s in f.samples if s.name.endswith("_total")]
    assert len(samples) == len(Would) * len(Found)
    assert not any(sample.value for sample in samples)


def test_the_session_phase_is_what_counts(log_lines: LogLines) -> None:
    """What the account phase decided, beside where the session is: once, whatever was seen in the account phase."""

    async def story(observations: Observations) -> None:
        observations.account(sight(Would.ADOPT, OLD, None))
        observations.session(sight(Would.ADOPT, NEW, OLD))
        assert len(observations) == 0

    assert run(story) == {("agree", "that_job", "adopt"): 1}
    assert not [line for line in log_lines() if "observed" in line]


def test_a_disagreement_is_logged_with_both_jobs(log_lines: LogLines) -> None:
    """And with who, and from where."""

    async def story(observations: Observations) -> None:
        observations.account(sight(Would.ADOPT, OLD, None))
        observations.session(sight(Would.ADOPT, OLD, NEW))

    assert run(story) == {("disagree", "other_job", "adopt"): 1}
    (line,) = [line for line in log_lines() if "observed_disagreement" in line]
    for word in ("user=alice", f"uid={ALICE}", "in_job=18", "would_be_job=17", "found=other_job", "would=adopt"):
        assert word in line.split()
    assert "127.0.0.1:40000" in line


def test_a_later_job_of_the_same_id_is_another() -> None:
    """Jobs are compared as jobs, not by their numbers."""

    async def story(observations: Observations) -> None:
        observations.session(sight(Would.ADOPT, OLD, job("17", created=9, identity=(9,))))

    assert run(story) == {("disagree", "other_job", "adopt"): 1}


@pytest.mark.parametrize(
    ("place", "fault", "expected"),
    [
        (None, "", ("disagree", "no_session", "adopt")),
        (OLD, "", ("agree", "that_job", "adopt")),
        (NEW, "", ("disagree", "other_job", "adopt")),
        (None, "cannot be read", ("unknown", "unknown", "adopt")),
    ],
)
def test_without_a_session_the_account_phase_is_all_there_is(
    place: Optional[Job], fault: str, expected: Tuple[str, str, str]
) -> None:
    """Counted after the wait, by what was seen then: a process in a job was put there before us."""

    async def story(observations: Observations) -> None:
        observations.account(sight(Would.ADOPT, OLD, place, fault))
        while len(observations):
            await asyncio.sleep(0.01)
        # A session so late is one of its own.
        observations.session(sight(Would.LEAVE_OUT, None, None))

    assert run(story, wait_s=0.01) == {expected: 1, ("agree", "no_job", "leave_out"): 1}


def test_an_account_phase_run_twice_is_one_login() -> None:
    """Two lines, or a module that asks again: the last counts."""

    async def story(observations: Observations) -> None:
        observations.account(sight(Would.DENY, None, None))
        observations.account(sight(Would.ADOPT, OLD, None))
        observations.session(sight(Would.ADOPT, OLD, OLD))
        await asyncio.sleep(0.1)

    assert run(story, wait_s=0.05) == {("agree", "that_job", "adopt"): 1}


def test_their_number_is_bounded() -> None:
    """More logins at once than are kept: the oldest are counted as unknown, none is lost."""

    async def story(observations: Observations) -> None:
        for port in range(1, 16):
            ends = connection(port)
            observations.account(Sight(ALICE, "alice", ends, Would.ADOPT, "only_job", OLD, None))
        assert len(observations) == 10

    assert run(story) == {("unknown", "unknown", "adopt"): 5}


def test_without_a_connection_the_session_phase_is_told_alone() -> None:
    """The two phases cannot be told to be one login's, so the first says nothing."""

    async def story(observations: Observations) -> None:
        unknown = Sight(ALICE, "alice", None, Would.DENY, "unknown", None, None)
        observations.account(unknown)
        assert len(observations) == 0
        observations.session(unknown)

    assert run(story) == {("disagree", "no_job", "deny"): 1}


@pytest.mark.parametrize(
    ("here", "place", "options", "expected"),
    [
        ([OLD], OLD, Options(), ("agree", "that_job", "adopt")),
        ([OLD], None, Options(), ("disagree", "no_job", "adopt")),
        ([OLD, NEW], OLD, Options(), ("disagree", "other_job", "adopt")),
        ([OLD, NEW], OLD, Options(action_unknown=Action.DENY), ("disagree", "other_job", "deny")),
        ([OLD, NEW], None, Options(action_unknown=Action.ALLOW), ("agree", "no_job", "leave_out")),
        ([], None, Options(), ("disagree", "no_job", "deny")),
        ([], None, Options(action_no_jobs=Action.IGNORE), ("agree", "no_job", "leave_out")),
        ([OLD], Ambiguous("in two jobs at once"), Options(), ("unknown", "unknown", "adopt")),
    ],
)
def test_a_login_through_both_phases(
    here: Tuple[Job, ...], place: object, options: Options, expected: Tuple[str, str, str]
) -> None:
    """The adoptions' own decision, the process's own place: observed, and nothing moved; enforced, and not observed."""
    backend = FakeBackend(*sorted(here, key=lambda j: -j.created))
    metrics = Metrics()
    workers = Workers("jobs", 2, 8)

    async def login(mode: Mode) -> None:
        pending = PendingLogins(lambda: 0.0)
        observations = Observations(metrics)
        adoptions = Adoptions("n1", backend, None, pending, workers, metrics, observations=observations)
        for phase in (Phase.ACCOUNT, Phase.SESSION):
            # Our account line is first: the other module moves the process between the two.
            backend.of_process[os.getpid()] = None if phase is Phase.ACCOUNT else place  # type: ignore[assignment]
            request = PamRequest(phase, mode, options, ALICE, 1000, ENDS, "sshd", "alice", "", True, False)
            with open_process(os.getpid()) as process:
                reply, _ = await adoptions.serve(request, process, Deadline.after_ms(30_000.0))
            assert not (mode is Mode.OBSERVE and reply.adopted)

    asyncio.run(login(Mode.OBSERVE))
    assert counted(metrics) == {expected: 1}
    assert backend.adopted == {}
    asyncio.run(login(Mode.ENFORCE))
    assert counted(metrics) == {expected: 1}
