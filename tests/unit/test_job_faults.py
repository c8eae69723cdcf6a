"""What is wrong with the job manager reaches the metric and the log by name, and a stranger's job id nobody's login."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from typing import Iterator, Optional

import pytest
from fakes import ALICE, FakeAsker, FakeBackend, connection, job, sample, soon

from adoptd.adoption import Adoptions
from adoptd.callerid import Told
from adoptd.deadline import Deadline
from adoptd.decision import Decision
from adoptd.metrics import Metrics
from adoptd.model import AdoptionFailed, Job, JobFault, JobManagerError, Witness
from adoptd.policy import Action, Options, Situation
from adoptd.process import ProcessHandle, open_process
from adoptd.sessions import PendingLogins
from adoptd.wire.callerid import Outcome
from adoptd.wire.pam import Mode, PamRequest, Phase
from adoptd.workers import Workers

ENDS = connection()
HERE = dataclasses.replace(job("17"), cluster="here")
OTHER = dataclasses.replace(job("18", created=1, identity=(2,)), cluster="here")


class Broken(FakeBackend):
    """A job manager with one fault."""

    def __init__(self, *jobs: Job, lookup: Optional[JobFault] = None, adopting: Optional[JobFault] = None) -> None:
        super().__init__(*jobs)
        self.lookup = lookup
        self.adopting = adopting

    def _answering(self, deadline: Optional[Deadline] = None) -> None:
        if self.lookup is not None:
            raise JobManagerError("broken", self.lookup)

    def adopt(self, process: ProcessHandle, job: Job, deadline: Deadline) -> None:
        if self.adopting is not None:
            raise AdoptionFailed("broken", self.adopting)
        super().adopt(process, job, deadline)


class Scene:
    """A login's account phase against a backend."""

    def __init__(self, backend: FakeBackend, told: Optional[Told] = None) -> None:
        self.metrics = Metrics()
        self.workers = Workers("jobs", 2, 8)
        asker = None if told is None else FakeAsker(told)
        self.adoptions = Adoptions(
            "n1",
            backend,
            asker,  # type: ignore[arg-type]
            PendingLogins(lambda: 0.0),
            self.workers,
            self.metrics,
        )

    def account(self, options: Options = Options()) -> Decision:  # noqa: B008 - frozen
        request = PamRequest(Phase.ACCOUNT, Mode.ENFORCE, options, ALICE, 1000, ENDS, "sshd", "alice", "", True, False)

        async def story() -> Decision:
            with open_process(os.getpid()) as process:
                _, decision = await self.adoptions.serve(request, process, soon())
            self.adoptions.after_reply(request, decision)
            return decision

        return asyncio.run(story())

    def counted(self, stage: str, fault: JobFault) -> float:
        return sample(self.metrics, "adoptd_job_faults_total", stage=stage, fault=fault.value)


@contextlib.contextmanager
def scene(backend: FakeBackend, told: Optional[Told] = None) -> Iterator[Scene]:
    made = Scene(backend, told)
    with contextlib.closing(made.workers):
        yield made


@pytest.mark.parametrize("fault", list(JobFault))
def test_a_lookup_that_fails(fault: JobFault) -> None:
    """Counted once, by its name, and told with the decision."""
    with scene(Broken(HERE, lookup=fault)) as made:
        decision = made.account()
        assert decision.situation is Situation.GENERIC_FAILURE
        assert decision.faults == (fault,)
        assert made.counted("jobs_here", fault) == 1


@pytest.mark.parametrize("fault", list(JobFault))
def test_an_adoption_that_fails(fault: JobFault) -> None:
    """As above, at its own stage."""
    with scene(Broken(HERE, adopting=fault)) as made:
        decision = made.account()
        # One that has ended is a job less, and it was the only one.
        ended = fault is JobFault.JOB_ENDED
        assert decision.situation is (Situation.NO_JOBS if ended else Situation.ADOPT_FAILURE)
        assert decision.faults == (fault,)
        assert made.counted("adopt", fault) == 1
        assert made.counted("jobs_here", fault) == 0


def test_a_job_that_is_named_and_fails_and_the_newest_that_fails_too() -> None:
    """Two adoptions were tried, and both are counted."""
    told = Told(Outcome.JOB, "owner", "17", Witness.BPF)
    with scene(Broken(OTHER, HERE, adopting=JobFault.STEP_SILENT), told) as made:
        assert made.account().faults == (JobFault.STEP_SILENT,) * 2
        assert made.counted("adopt", JobFault.STEP_SILENT) == 2


@pytest.mark.parametrize(("theirs", "named"), [("here", True), (None, True), ("there", False)])
def test_a_job_id_of_another_cluster_names_nothing_here(theirs: Optional[str], named: bool) -> None:
    """Both clusters have a job 17 of alice's; a source that does not say its cluster is believed as before."""
    told = Told(Outcome.JOB, "owner", "17", Witness.BPF, cluster=theirs)
    with scene(FakeBackend(OTHER, HERE), told) as made:
        decision = made.account(Options(action_unknown=Action.DENY))
        assert (decision.job is not None) == named
        assert made.counted("ask_source", JobFault.OTHER_CLUSTER) == (0 if named else 1)
        assert decision.faults == (() if named else (JobFault.OTHER_CLUSTER,))
        if not named:
            assert "job 17 of cluster there" in decision.stages[1].found


def test_nothing_is_counted_where_nothing_is_wrong() -> None:
    """Nor said."""
    with scene(FakeBackend(HERE)) as made:
        assert made.account().faults == ()
        assert "adoptd_job_faults_total{" not in str(list(made.metrics.registry.collect()))
