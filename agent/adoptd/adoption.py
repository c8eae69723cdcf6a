"""An adoption: from sshd's question to a session that is in its job, read back.

Owns the order of the stages (:meth:`Adoptions.serve`) and the carrying out of what
:mod:`adoptd.policy` decides. Must never decide by itself, and never say "adopted" of a process that
was not read back in the job. Called by the PAM server and, changing nothing, by ``adoptctl explain``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import List, Mapping, Optional, Tuple

from adoptd.callerid import Asker, AskFault, Told
from adoptd.deadline import Deadline
from adoptd.jobs import JobBackend, JobSession
from adoptd.jobs.environment import JobEnvironment
from adoptd.metrics import Metrics
from adoptd.model import AdoptionFailed, Connection, Job, JobManagerError, Witness
from adoptd.policy import AFTER_FAILURE, Options, Situation, Step, next_step, situation_of
from adoptd.process import ProcessHandle
from adoptd.sessions import PendingLogins, Settlement
from adoptd.wire.callerid import Outcome
from adoptd.wire.pam import MESSAGE_BYTES, Mode, PamReply, PamRequest, Phase, Verdict
from adoptd.workers import OutOfTime, Overloaded, Workers

_VERDICTS: Mapping[Step, Verdict] = {
    Step.SUCCEED: Verdict.SUCCESS,
    Step.DENY: Verdict.DENY,
    Step.IGNORE: Verdict.IGNORE,
}

# Metric label of a decision that leaves the session out of any job.
_OUTCOMES: Mapping[Step, str] = {Step.SUCCEED: "allowed", Step.DENY: "denied", Step.IGNORE: "ignored"}

# How many job ids a message names before it says "and others": the record's message is 512 bytes.
_JOBS_NAMED = 5


@dataclass(frozen=True)
class Login:
    """What is asked about: a user, a connection if it is known, and the options of the PAM line."""

    uid: int
    user: str
    connection: Optional[Connection]
    options: Options


@dataclass(frozen=True)
class Stage:
    """One step of a decision, for the log and for ``explain``. ``at_ms`` counts from the start."""

    name: str
    found: str
    at_ms: float


@dataclass(frozen=True)
class Decision:
    """How a login ended. ``step`` is SUCCEED, DENY or IGNORE; ``reason`` a value of Step or Situation, or
    "account_phase" where the session phase followed what that had settled.

    ``job`` is the job the process was adopted into (with ``adopted``), or would be when only explained.
    ``session`` is what the session is given; whoever takes the decision closes it.
    """

    step: Step
    situation: Situation
    reason: str
    adopted: bool
    job: Optional[Job]
    witness: Optional[Witness]
    message: str
    stages: Tuple[Stage, ...]
    session: Optional[JobSession] = None

    @property
    def verdict(self) -> Verdict:
        """What PAM returns."""
        return _VERDICTS[self.step]

    @property
    def outcome(self) -> str:
        """adopted, allowed, denied or ignored: what happened or, where only observed or explained, would have."""
        return _OUTCOMES[self.step] if self.job is None else "adopted"


@dataclass(frozen=True)
class _Mover:
    """The process to move, and what its session is to be given besides."""

    process: ProcessHandle
    x11: bool
    namespaces: bool


class _Trail:
    """Collects the stages of one decision with their times."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._stages: List[Stage] = []

    def add(self, name: str, found: str) -> None:
        self._stages.append(Stage(name, found, (time.monotonic() - self._started) * 1000.0))

    @property
    def stages(self) -> Tuple[Stage, ...]:
        return tuple(self._stages)


class Adoptions:
    """Serves the PAM module's requests."""

    def __init__(
        self,
        node_name: str,
        jobs: JobBackend,
        asker: Optional[Asker],
        pending: PendingLogins,
        workers: Workers,
        metrics: Metrics,
        environment: Optional[JobEnvironment] = None,
    ) -> None:
        """``environment``: what sessions are given of their job's variables; None: nothing."""
        self._node_name = node_name
        self._jobs = jobs
        self._asker = asker
        self._pending = pending
        self._workers = workers
        self._metrics = metrics
        self._environment = environment

    def at(self, node_name: str) -> Adoptions:
        """These adoptions for the PAM option nodename=; "" is none. Raises JobManagerError."""
        if not node_name:
            return self
        jobs = self._jobs.for_node(node_name)
        return Adoptions(
            self._node_name, jobs, self._asker, self._pending, self._workers, self._metrics, self._environment
        )

    async def serve(self, request: PamRequest, process: ProcessHandle, deadline: Deadline) -> Tuple[PamReply, Decision]:
        """The reply for one phase of one login. ``process`` is the caller, as the kernel named it.

        The descriptors of the decision's session go with the reply.
        """
        login = Login(request.uid, request.user, request.connection, request.options)
        mover = None
        if request.mode is Mode.ENFORCE:
            # Only the session phase runs in the process that may be moved to other namespaces.
            joins = request.join_container and request.phase is Phase.SESSION
            mover = _Mover(process, x11=not request.disable_x11, namespaces=joins)
        if request.phase is Phase.ACCOUNT:
            decision = await self._account(login, mover, deadline)
        else:
            decision = await self._session(login, mover, deadline)
        self._metrics.adoptions.labels(
            request.phase.name.lower(), request.mode.name.lower(), decision.outcome, decision.reason
        ).inc()
        return _reply(request, decision), decision

    async def explain(self, login: Login, deadline: Deadline) -> Decision:
        """The decision that ``login``'s account phase would get now. Moves nothing, remembers nothing."""
        return await self._decide(login, None, _Trail(), deadline)

    async def _account(self, login: Login, mover: Optional[_Mover], deadline: Deadline) -> Decision:
        decision = await self._decide(login, mover, _Trail(), deadline)
        if login.connection is not None:
            settlement = Settlement(decision.step, decision.situation, decision.job, decision.witness)
            self._pending.remember(login.uid, login.connection, settlement)
        return decision

    async def _session(self, login: Login, mover: Optional[_Mover], deadline: Deadline) -> Decision:
        """Adopt this process where the account phase put its own.

        The account phase is the gate. A login that it let through without a job, or that another
        module let in after we refused it, is not turned away here.
        """
        trail = _Trail()
        settled = None if login.connection is None else self._pending.take(login.uid, login.connection)
        if settled is not None and settled.job is not None:
            trail.add("account_phase", f"job {settled.job.id}")
            try:
                return await self._adopt_again(settled, settled.job, mover, trail, deadline)
            except (AdoptionFailed, JobManagerError, OutOfTime, Overloaded) as error:
                # The job ended, or is another one by the same name: everything is open again.
                trail.add("adopt", f"failed: {error}")
                return await self._decide(login, mover, trail, deadline)
        if settled is not None and settled.situation in (Situation.NO_JOBS, Situation.UNKNOWN, Situation.NAMED_FAILED):
            trail.add("account_phase", f"{settled.situation.value}, not adopted")
            step = Step.SUCCEED if settled.step is Step.SUCCEED else Step.IGNORE
            return self._finish(step, settled.situation, (), trail)
        decision = await self._decide(login, mover, trail, deadline)
        if decision.situation is Situation.NO_JOBS and decision.step is Step.DENY:
            trail.add("account_phase", "not known here; it let the user in")
            return replace(decision, step=Step.IGNORE, message="", stages=trail.stages)
        return decision

    async def _adopt_again(
        self, settled: Settlement, job: Job, mover: Optional[_Mover], trail: _Trail, deadline: Deadline
    ) -> Decision:
        session = await self._adopt(job, mover, deadline)
        trail.add("adopt", f"in job {job.id}")
        return Decision(
            step=Step.SUCCEED,
            situation=settled.situation,
            reason="account_phase",
            adopted=mover is not None,
            job=job,
            witness=settled.witness,
            message="",
            stages=trail.stages,
            session=session,
        )

    async def _decide(self, login: Login, mover: Optional[_Mover], trail: _Trail, deadline: Deadline) -> Decision:
        jobs = await self._jobs_of(login, trail, deadline)
        situation = situation_of(None if jobs is None else len(jobs))
        here = jobs or ()
        named: Optional[Job] = None
        told: Optional[Told] = None
        while True:
            step = next_step(situation, login.options)
            if step is Step.ASK_SOURCE:
                told = await self._ask(login, here, deadline)
                named = _named_here(told, here)
                trail.add("ask_source", _words(told, named))
                situation = Situation.UNKNOWN if named is None else Situation.NAMED
            elif step in AFTER_FAILURE:
                job = named if step is Step.ADOPT_NAMED and named is not None else here[0]
                try:
                    session = await self._adopt(job, mover, deadline)
                except (AdoptionFailed, JobManagerError, OutOfTime, Overloaded) as error:
                    trail.add("adopt", f"job {job.id} failed: {error}")
                    situation = AFTER_FAILURE[step]
                    continue
                trail.add("adopt", f"in job {job.id}" if mover is not None else f"would be job {job.id}")
                return Decision(
                    step=Step.SUCCEED,
                    situation=situation,
                    reason=step.value,
                    adopted=mover is not None,
                    job=job,
                    witness=told.witness if told is not None and step is Step.ADOPT_NAMED else None,
                    message="",
                    stages=trail.stages,
                    session=session,
                )
            else:
                return self._finish(step, situation, here, trail)

    async def _jobs_of(self, login: Login, trail: _Trail, deadline: Deadline) -> Optional[Tuple[Job, ...]]:
        try:
            jobs = await self._workers.run(lambda: self._jobs.jobs_of(login.uid, deadline), deadline)
        except (JobManagerError, OutOfTime, Overloaded) as error:
            trail.add("jobs_here", f"cannot be asked: {error}")
            return None
        trail.add("jobs_here", ", ".join(job.id for job in jobs) or "none")
        return jobs

    async def _ask(self, login: Login, here: Tuple[Job, ...], deadline: Deadline) -> Told:
        if self._asker is None:
            return Told(Outcome.UNKNOWN, AskFault.DISABLED.value)
        if login.connection is None:
            return Told(Outcome.UNKNOWN, AskFault.NO_CONNECTION.value)
        theirs = frozenset(job.id for job in here)
        return await self._asker.ask(login.connection, login.uid, deadline, theirs=theirs)

    async def _adopt(self, job: Job, mover: Optional[_Mover], deadline: Deadline) -> Optional[JobSession]:
        """Move the process into the job and fetch what its session is given; None where nothing is moved.

        Without the namespaces a session has to enter it is not in its job: that is a failed adoption too.
        """
        if mover is None:
            return None

        def adopt_and_fetch() -> JobSession:
            self._jobs.adopt(mover.process, job, deadline)
            session = self._jobs.session(job, mover.x11, mover.namespaces, deadline)
            if self._environment is not None:
                # In both phases: many a site has the account line alone.
                session.environment = self._environment.added_to(session.environment, self._jobs, job, deadline)
            return session

        return await self._workers.run(adopt_and_fetch, deadline)

    def _finish(self, step: Step, situation: Situation, here: Tuple[Job, ...], trail: _Trail) -> Decision:
        trail.add("decide", f"{situation.value}: {step.value}")
        return Decision(
            step=step,
            situation=situation,
            reason=situation.value,
            adopted=False,
            job=None,
            witness=None,
            message=self._denial(situation, here) if step is Step.DENY else "",
            stages=trail.stages,
        )

    def _denial(self, situation: Situation, here: Tuple[Job, ...]) -> str:
        """A sentence for the user: what was refused, why, and what to do."""
        node = self._node_name
        if situation is Situation.NO_JOBS:
            why = f"you have no job running on {node}. Log in to a node on which one of your jobs is running."
        elif situation is Situation.GENERIC_FAILURE:
            why = f"the jobs on {node} cannot be looked up at the moment. Try again, or tell your administrator."
        elif situation is Situation.ADOPT_FAILURE:
            why = f"the session could not be put into your job on {node}. Try again, or tell your administrator."
        else:
            ids = ", ".join(job.id for job in here[:_JOBS_NAMED])
            more = " and others" if len(here) > _JOBS_NAMED else ""
            why = (
                f"you have several jobs on {node} ({ids}{more}) and it could not be found out which of them "
                "this connection comes from. Connect from inside the job."
            )
        return _fitting(f"Access to {node} refused: {why}")


def _reply(request: PamRequest, decision: Decision) -> PamReply:
    witness = "none" if decision.witness is None else decision.witness.value
    return PamReply(
        verdict=decision.verdict,
        adopted=decision.adopted,
        job_id="" if decision.job is None else decision.job.id,
        summary=f"reason={decision.reason} witness={witness}",
        message=decision.message if request.mode is Mode.ENFORCE else "",
        environment={} if decision.session is None else decision.session.environment,
    )


def _fitting(message: str) -> str:
    data = message.encode("utf-8")
    if len(data) < MESSAGE_BYTES:
        return message
    return data[: MESSAGE_BYTES - 4].decode("utf-8", "ignore") + "..."


def _named_here(told: Told, here: Tuple[Job, ...]) -> Optional[Job]:
    # The job must be here and the user's whatever the answer says: ``here`` holds only such jobs.
    if told.outcome is Outcome.JOB:
        named = told.job_id
    elif told.outcome is Outcome.NO_JOB:
        named = told.hint
    else:
        return None
    return next((job for job in here if job.id == named), None)


def _words(told: Told, named: Optional[Job]) -> str:
    if named is not None and told.witness is not None:
        return f"job {named.id} by {told.witness.value}"
    if told.outcome is Outcome.JOB:
        return f"job {told.job_id}, which is not a job of this user here"
    if told.hint is not None:
        return f"{told.outcome.value}: hint of job {told.hint}, which is not a job of this user here"
    return f"{told.outcome.value}: {told.reason}" + (f" ({told.detail})" if told.detail else "")
