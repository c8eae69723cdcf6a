"""An adoption: from sshd's question to a session that is in its job, read back.

Owns the order of the stages (:meth:`Adoptions.serve`) and the carrying out of what
:mod:`adoptd.policy` decides. Must never decide by itself, and never say "adopted" of a process that
was not read back in the job. Called by the PAM server and, changing nothing, by ``adoptctl explain``.
"""

from __future__ import annotations

import copy
import secrets
import time
from dataclasses import dataclass, replace
from typing import Callable, Mapping, Optional, Tuple, Union

from adoptd import log
from adoptd.callerid import Asker, AskFault, Told, reason_told
from adoptd.deadline import Deadline
from adoptd.decision import Decision, Login, Trail, reply_of
from adoptd.jobs import Adopt, JobBackend, JobSession
from adoptd.jobs.environment import JobEnvironment
from adoptd.messages import Texts
from adoptd.metrics import Metrics
from adoptd.model import AdoptdError, AdoptionFailed, Ambiguous, Job, JobFault, JobManagerError
from adoptd.observed import Observations, Sight, Would
from adoptd.pam_lines import AccountAlone
from adoptd.policy import AFTER_FAILURE, Situation, Step, next_step, situation_of
from adoptd.process import ProcessHandle
from adoptd.sessions import PendingLogins, Sessions, Settlement
from adoptd.wire.callerid import Outcome
from adoptd.wire.pam import Mode, PamReply, PamRequest, Phase
from adoptd.workers import OutOfTime, Overloaded, Workers

_WOULD: Mapping[str, Would] = {"adopted": Would.ADOPT, "denied": Would.DENY}


@dataclass(frozen=True)
class _Mover:
    """The process to move, and what its session is to be given besides."""

    process: ProcessHandle
    x11: bool
    namespaces: Callable[[], bool]


class _Look:
    """What a thread has found out, step by step: the event loop may have to go by it without waiting to the end."""

    def __init__(self) -> None:
        self.jobs: Optional[Tuple[Job, ...]] = None
        self.suspended: Tuple[Job, ...] = ()
        self.at_s = 0.0
        # An adoption that needed no question to anybody: begun, and how it ended.
        self.tried = False
        self.session: Optional[JobSession] = None
        self.error: Optional[AdoptdError] = None

    def take(self) -> Optional[JobSession]:
        """The result of the adoption, once. Raises what it raised."""
        self.tried = False
        if self.error is not None:
            raise self.error
        return self.session


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
        *,
        environment: Optional[JobEnvironment] = None,
        sessions: Optional[Sessions] = None,
        texts: Optional[Texts] = None,
        observations: Optional[Observations] = None,
        account_alone: Optional[Callable[[str], bool]] = None,
    ) -> None:
        """``environment``: what sessions are given of their job's variables; None: nothing. ``sessions``: where
        those adopted are kept; None: nowhere. ``texts``: what users are told; None: by the defaults.
        ``observations``: who compares in observe mode; None: nobody. ``account_alone``: whether a PAM service has
        no session line of ours."""
        self._texts = Texts(node_name, jobs.name) if texts is None else texts
        self._jobs = jobs
        self._asker = asker
        self._pending = pending
        self._workers = workers
        self._metrics = metrics
        self._environment = environment
        self._sessions = sessions
        self._observations = observations
        self._account_alone = AccountAlone() if account_alone is None else account_alone

    def at(self, node_name: str) -> Adoptions:
        """These adoptions for the PAM option nodename=; "" is none. Raises JobManagerError."""
        if not node_name:
            return self
        those = copy.copy(self)
        those._jobs = self._jobs.for_node(node_name)
        return those

    async def serve(self, request: PamRequest, process: ProcessHandle, deadline: Deadline) -> Tuple[PamReply, Decision]:
        """The reply for one phase of one login. ``process`` is the caller, as the kernel named it.

        The descriptors of the decision's session go with the reply; after it the caller calls :meth:`after_reply`.
        """
        login = Login(request.uid, request.user, request.connection, request.options)
        mover = None
        if request.mode is Mode.ENFORCE:
            mover = _Mover(process, x11=not request.disable_x11, namespaces=lambda: self._is_to_join(request))
        if request.phase is Phase.ACCOUNT:
            decision = await self._account(login, mover, deadline)
        else:
            decision = await self._session(login, mover, deadline)
            decision = replace(decision, message=decision.message or self._notice(decision))
        if request.mode is Mode.OBSERVE and self._observations is not None:
            await self._observe(self._observations, request, process, decision, deadline)
        self._keep(request, process, decision)
        return reply_of(request, decision), decision

    def _is_to_join(self, request: PamRequest) -> bool:
        # The account phase runs before sshd opens the session, or in a child that is about to end: it joins only where
        # nothing of ours comes after it.
        return request.join_container and (request.phase is Phase.SESSION or self._account_alone(request.service))

    async def _observe(
        self,
        observations: Observations,
        request: PamRequest,
        process: ProcessHandle,
        decision: Decision,
        deadline: Deadline,
    ) -> None:
        """Compare with where the process is now. It waits for our reply, so it is there to be looked at."""
        place, fault = None, ""
        try:
            place = await self._workers.run(lambda: self._jobs.job_of_process(process.pid), deadline)
        except (JobManagerError, Ambiguous, OutOfTime, Overloaded) as error:
            fault = str(error)
        would = _WOULD.get(decision.outcome, Would.LEAVE_OUT)
        sight = Sight(request.uid, request.user, request.connection, would, decision.reason, decision.job, place, fault)
        if request.phase is Phase.ACCOUNT:
            observations.account(sight)
        else:
            observations.session(sight)

    def after_reply(self, request: PamRequest, decision: Decision) -> None:
        """What a login need not wait for: its counters, and the files by which the next agent knows it."""
        if self._sessions is not None:
            self._sessions.write_due()
        self._pending.write_due()
        self._metrics.count_adoption(
            request.phase.name.lower(),
            request.mode.name.lower(),
            decision.outcome,
            decision.reason,
            decision.witness,
            decision.story.request_id,
        )
        for stage in decision.stages:
            if stage.fault is not None:
                self._metrics.count_job_fault(stage.name, stage.fault)

    async def explain(self, login: Login, deadline: Deadline, reader_uid: int = 0) -> Decision:
        """The decision that ``login``'s account phase would get now, as ``reader_uid`` may be told of it.

        Moves nothing, remembers nothing.
        """
        return await self._decide(login, None, Trail(""), deadline, reader_uid)

    def _keep(self, request: PamRequest, process: ProcessHandle, decision: Decision) -> None:
        """Note the session. Without it the login is as right; it is then not watched, nor seen by its user."""
        if self._sessions is None or decision.job is None or not decision.adopted:
            return
        try:
            self._sessions.add(
                process,
                uid=request.uid,
                user=request.user,
                job=decision.job,
                witness=decision.witness,
                reason=decision.story.because or decision.reason,
                connection=request.connection,
                service=request.service,
                nodename=request.nodename,
                stages=decision.story.stages,
                write_now=False,
            )
        except OSError as error:
            log.error("session_not_kept", pid=process.pid, uid=request.uid, error=str(error))

    async def _account(self, login: Login, mover: Optional[_Mover], deadline: Deadline) -> Decision:
        decision = await self._decide(login, mover, Trail(_new_request_id()), deadline)
        if login.connection is not None:
            settlement = Settlement(decision.step, decision.situation, decision.job, decision.witness, decision.story)
            self._pending.remember(login.uid, login.connection, settlement)
        return decision

    async def _session(self, login: Login, mover: Optional[_Mover], deadline: Deadline) -> Decision:
        """Adopt this process where the account phase put its own.

        The account phase is the gate. A login that it let through without a job, or that another
        module let in after we refused it, is not turned away here.
        """
        settled = None if login.connection is None else self._pending.take(login.uid, login.connection)
        trail = Trail(_new_request_id(), None if settled is None else settled.story)
        if settled is not None and settled.job is not None:
            trail.add("account_phase", f"job {settled.job.id}")
            try:
                return await self._adopt_again(settled, settled.job, mover, trail, deadline)
            except (AdoptionFailed, JobManagerError, OutOfTime, Overloaded) as error:
                # The job ended, or is another one by the same name: everything is open again.
                trail.add("adopt", f"failed: {error}", _fault_of(error))
                return await self._decide(login, mover, trail, deadline)
        if settled is not None and settled.situation in (Situation.NO_JOBS, Situation.UNKNOWN, Situation.NAMED_FAILED):
            trail.add("account_phase", f"{settled.situation.value}, not adopted")
            step = Step.SUCCEED if settled.step is Step.SUCCEED else Step.IGNORE
            return self._finish(step, settled.situation, (), trail)
        decision = await self._decide(login, mover, trail, deadline)
        if decision.situation is Situation.NO_JOBS and decision.step is Step.DENY:
            trail.add("account_phase", "not known here; it let the user in")
            return replace(decision, step=Step.IGNORE, message="", stages=trail.stages, story=trail.story())
        return decision

    async def _adopt_again(
        self, settled: Settlement, job: Job, mover: Optional[_Mover], trail: Trail, deadline: Deadline
    ) -> Decision:
        session = await self._adopt(job, mover, deadline)
        trail.add("adopt", _adopted_words(job, mover))
        return Decision(
            step=Step.SUCCEED,
            situation=settled.situation,
            reason="account_phase",
            adopted=mover is not None,
            job=job,
            witness=settled.witness,
            message="",
            stages=trail.stages,
            story=trail.story(),
            session=session,
        )

    def _notice(self, decision: Decision) -> str:
        """What the session phase tells the user who is let in."""
        story = decision.story
        if decision.job is not None:
            return self._texts.welcome(decision.job.id, story.because, story.choices)
        return "" if decision.step is Step.DENY else self._texts.outside(decision.situation)

    async def _decide(
        self, login: Login, mover: Optional[_Mover], trail: Trail, deadline: Deadline, reader_uid: int = 0
    ) -> Decision:
        look = await self._look(login, mover, trail, deadline)
        situation = situation_of(None if look.jobs is None else len(look.jobs))
        named: Optional[Job] = None
        told: Optional[Told] = None
        while True:
            here = look.jobs or ()
            step = next_step(situation, login.options)
            if step is Step.ASK_SOURCE:
                # Once: who ends their jobs one by one is not to use up the time of the login with it.
                if told is None:
                    told = await self._ask(login, here, deadline)
                    told = replace(told, reason=reason_told(reader_uid, told.reason))
                    foreign = any(job.id == told.job_id and _of_other_cluster(told, job) for job in here)
                    words = _words(told, _named_here(told, here))
                    trail.add("ask_source", words, JobFault.OTHER_CLUSTER if foreign else None)
                named = _named_here(told, here)
                situation = Situation.UNKNOWN if named is None else Situation.NAMED
            elif step in AFTER_FAILURE:
                job = named if step is Step.ADOPT_NAMED and named is not None else here[0]
                try:
                    session = look.take() if look.tried else await self._adopt(job, mover, deadline)
                except (AdoptionFailed, JobManagerError, OutOfTime, Overloaded) as error:
                    fault = _fault_of(error)
                    trail.add("adopt", f"job {job.id} failed: {error}", fault)
                    left = await self._left_without(job, fault, here, login, deadline)
                    if left is None:
                        situation = AFTER_FAILURE[step]
                    else:
                        _say_jobs(left, trail)
                        look, situation = left, situation_of(len(left.jobs or ()))
                    continue
                trail.add("adopt", _adopted_words(job, mover))
                return Decision(
                    step=Step.SUCCEED,
                    situation=situation,
                    reason=step.value,
                    adopted=mover is not None,
                    job=job,
                    witness=told.witness if told is not None and step is Step.ADOPT_NAMED else None,
                    message="",
                    stages=trail.stages,
                    story=trail.story(step.value),
                    session=session,
                )
            else:
                return self._finish(step, situation, here, trail, look.suspended)

    async def _look(self, login: Login, mover: Optional[_Mover], trail: Trail, deadline: Deadline) -> _Look:
        """The user's jobs here and, where the rules adopt into one at once, that adoption: one trip to a thread."""
        look = _Look()

        def find_and_adopt() -> None:
            with self._jobs.here(login.uid, deadline) as here:
                look.suspended = here.suspended
                look.at_s, look.jobs = time.monotonic(), here.jobs
                if mover is None or next_step(situation_of(len(here.jobs)), login.options) not in AFTER_FAILURE:
                    return
                look.tried = True
                try:
                    look.session = self._put(mover, here.jobs[0], here.adopt, deadline)
                except (AdoptionFailed, JobManagerError) as error:
                    look.error = error

        try:
            await self._workers.run(find_and_adopt, deadline)
        except (JobManagerError, OutOfTime, Overloaded) as error:
            if look.jobs is None:
                trail.add("jobs_here", f"cannot be asked: {error}", _fault_of(error))
                # Or a thread that was given up a moment too early would change what was just said.
                return _Look()
            look.error = error
        _say_jobs(look, trail)
        return look

    async def _left_without(
        self, tried: Job, fault: JobFault, here: Tuple[Job, ...], login: Login, deadline: Deadline
    ) -> Optional[_Look]:
        """What is left of ``here`` if ``tried`` was not to be adopted into because it has ended since, or is suspended.

        None: it has not, as far as can be told, and this is the failure it looks like. A job less is no failure, by
        which the rules may let in: whoever ends their jobs while a silent source is asked would have a session in none.
        What has begun since does not count, so that this comes to an end whatever the user begins and ends.
        """
        # It may be a manager that hangs, and what is decided then has to be said in time.
        half = deadline.earlier(deadline.remaining_s() * 1000.0 / 2.0)

        def find() -> _Look:
            look = _Look()
            with self._jobs.here(login.uid, half) as now:
                look.suspended, look.jobs = now.suspended, now.jobs
            look.at_s = time.monotonic()
            return look

        try:
            now = await self._workers.run(find, half)
        except (JobManagerError, OutOfTime, Overloaded):
            if fault is not JobFault.JOB_ENDED:
                return None
            # The backend itself has said so of this one.
            now = _Look()
            now.jobs, now.at_s = tuple(job for job in here if job != tried), time.monotonic()
        found = now.jobs or ()
        if tried in found and fault is not JobFault.JOB_ENDED:
            return None
        # A job that took nobody in because it was suspended is out of it, also if it runs again by now: whoever
        # suspends and resumes it would else have a failure to be let in by.
        now.jobs = tuple(job for job in here if job in found and job != tried)
        return now

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
        return await self._workers.run(lambda: self._put(mover, job, self._jobs.adopt_for_session, deadline), deadline)

    def _put(self, mover: _Mover, job: Job, adopt: Adopt, deadline: Deadline) -> JobSession:
        """In a thread: move the process, and what its session is given."""
        session = adopt(mover.process, job, mover.x11, mover.namespaces(), deadline)
        if self._environment is not None:
            # In both phases: many a site has the account line alone.
            session.environment = self._environment.added_to(session.environment, self._jobs, job, deadline)
        return session

    def _finish(
        self,
        step: Step,
        situation: Situation,
        here: Tuple[Job, ...],
        trail: Trail,
        suspended: Tuple[Job, ...] = (),
    ) -> Decision:
        denied = step is Step.DENY
        trail.add("decide", f"{situation.value}: {step.value}")
        return Decision(
            step=step,
            situation=situation,
            reason=situation.value,
            adopted=False,
            job=None,
            witness=None,
            message=self._texts.denial(situation, here, trail.request_id, suspended) if denied else "",
            stages=trail.stages,
            story=trail.story(),
        )


def _say_jobs(look: _Look, trail: Trail) -> None:
    """Note what was found, for all who read the trail, and that it is these the user has to choose from."""
    trail.choices = tuple(job.id for job in look.jobs or ())
    suspended = ", ".join(job.id for job in look.suspended)
    running = ", ".join(trail.choices) or "none"
    trail.add("jobs_here", running + (f"; suspended: {suspended}" if suspended else ""), at_s=look.at_s)


def _fault_of(error: Union[AdoptionFailed, JobManagerError, OutOfTime, Overloaded]) -> JobFault:
    return error.fault if isinstance(error, (AdoptionFailed, JobManagerError)) else JobFault.OUT_OF_TIME


def _new_request_id() -> str:
    """A name for one login in the log, in events and in what the user is told: short enough to be read out."""
    return secrets.token_hex(4)


def _adopted_words(job: Job, mover: Optional[_Mover]) -> str:
    return f"would be job {job.id}" if mover is None else f"in job {job.id}"


def _named_here(told: Told, here: Tuple[Job, ...]) -> Optional[Job]:
    # The job must be here and the user's whatever the answer says: ``here`` holds only such jobs.
    if told.outcome is Outcome.JOB:
        named = told.job_id
    elif told.outcome is Outcome.NO_JOB:
        named = told.hint
    else:
        return None
    return next((job for job in here if job.id == named and not _of_other_cluster(told, job)), None)


def _of_other_cluster(told: Told, job: Job) -> bool:
    """Whether the answer names a job of another cluster that has the same id: every cluster counts for itself."""
    return bool(told.cluster and job.cluster and told.cluster != job.cluster)


def _words(told: Told, named: Optional[Job]) -> str:
    if named is not None and told.witness is not None:
        return f"job {named.id} by {told.witness.value}"
    if told.outcome is Outcome.JOB:
        of_cluster = f" of cluster {told.cluster}" if told.cluster else ""
        return f"job {told.job_id}{of_cluster}, which is not a job of this user here"
    if told.hint is not None:
        return f"{told.outcome.value}: hint of job {told.hint}, which is not a job of this user here"
    return f"{told.outcome.value}: {told.reason}" + (f" ({told.detail})" if told.detail else "")
