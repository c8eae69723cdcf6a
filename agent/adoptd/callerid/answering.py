"""The source's side: which job owns a connection that left this node.

Owns the stages of an answer (:meth:`Responder.answer`, :meth:`Inquiry.settle`), in the order that is the
security argument: nothing is looked up for somebody whose seal is not open, nothing is told that the
asker may not know. Must never guess: where witnesses disagree, or time runs out, the outcome is UNKNOWN.
Called by the peers' door and by ``adoptctl whois``.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import threading
import time
from dataclasses import dataclass
from typing import Callable, Hashable, Iterator, Optional, Tuple

from adoptd.callerid.sealing import AGENT_UID, Refused, SealRoom
from adoptd.connections import Disagreement, Testimony, Witnesses
from adoptd.deadline import Deadline
from adoptd.environment import environment_of
from adoptd.jobs import CgroupFinding, CgroupVerdict, JobBackend
from adoptd.metrics import Refusal
from adoptd.model import (
    AdoptdError,
    AdoptionFailed,
    Ambiguous,
    Connection,
    IPAddress,
    Job,
    JobManagerError,
    Owner,
    ProtocolError,
    Witness,
    is_job_id,
)
from adoptd.notes import Notes
from adoptd.process import open_process, was_started_before
from adoptd.seal import Opened, SealError
from adoptd.seal.replay import Admission, ReplayCache
from adoptd.wire.callerid import (
    Answer,
    OtherVersion,
    Outcome,
    Question,
    Reason,
    decode_question,
    encode_answer,
)
from adoptd.workers import OutOfTime, Overloaded, Turns, Workers

# Questions settled at once, and how many of them for the logins of one user: each may cost a walk of /proc that takes
# all its time, and whoever can make many of those must delay nobody's but their own.
SETTLED_AT_ONCE = 16
SETTLED_AT_ONCE_OF_ONE = 4
# Seals opened at once, and how many of them from one address: a flood of one node's must not have every thread.
OPENED_AT_ONCE = 16
OPENED_AT_ONCE_OF_ONE = 8
# What ordinary users seal and ask themselves, all of them together.
_ASKED_BY_USERS = "users"
_USERS_REPLAYS = 8192


class AnswerStage(enum.Enum):
    """What an answer's time is spent on; the values are a metric's label."""

    OPEN_SEAL = "open_seal"
    FIND_OWNER = "find_owner"
    SEAL_ANSWER = "seal_answer"


@dataclass(frozen=True)
class Settled:
    """What this node says about a connection, with the evidence, which stays on this node."""

    outcome: Outcome
    reason: Reason
    job: Optional[Job] = None
    owner: Optional[Owner] = None
    moved: bool = False
    detail: str = ""
    hint: Optional[str] = None


class _Unsettled(AdoptdError):
    """A stage ended the search: the outcome is UNKNOWN for ``reason``."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Look:
    """What was found without asking the slow witnesses. ``settled`` None: they have to be asked, and there is time."""

    testimony: Testimony
    settled: Optional[Settled] = None


class Inquiry:
    """Finds the job of a connection that left this node."""

    def __init__(
        self,
        witnesses: Witnesses,
        jobs: JobBackend,
        workers: Workers,
        hints: bool = True,
        notes: Optional[Notes] = None,
    ) -> None:
        """``hints``: whether to look for a job in the environment of an owner that is in none.

        ``notes``: what was noted of connections as they were made, where cgroup ids do not tell.
        """
        self._witnesses = witnesses
        self._jobs = jobs
        self._workers = workers
        self._hints = hints
        self._notes = notes

    async def settle(self, connection: Connection, login_uid: Optional[int], deadline: Deadline) -> Settled:
        """Which job owns ``connection``, said only if it is ``login_uid``'s (None: anybody's). Never raises."""
        try:
            look = await self._workers.run(lambda: self.look(connection, login_uid, deadline), deadline)
        except (OutOfTime, Overloaded) as error:
            return Settled(Outcome.UNKNOWN, Reason.OUT_OF_TIME, detail=str(error))
        return await self.look_further(look, login_uid, deadline)

    def look(self, connection: Connection, login_uid: Optional[int], deadline: Deadline) -> Look:
        """As :meth:`settle`, by the fast witnesses alone. Never raises; blocks on /proc and the job manager."""
        return self._judged(self._witnesses.fast_testimony(connection, deadline), login_uid)

    async def look_further(self, look: Look, login_uid: Optional[int], deadline: Deadline) -> Settled:
        """What has been settled, or what the slow witnesses add to it. Never raises."""
        if look.settled is not None:
            return look.settled
        testimony = await self._witnesses.slow_testimony(look.testimony, deadline)
        try:
            look = await self._workers.run(lambda: self._judged(testimony, login_uid), deadline)
        except (OutOfTime, Overloaded) as error:
            return Settled(Outcome.UNKNOWN, Reason.OUT_OF_TIME, detail=str(error))
        return look.settled or _not_told(testimony)

    def _judged(self, testimony: Testimony, login_uid: Optional[int]) -> Look:
        """What ``testimony`` comes to; nothing settled if more witnesses have to be heard."""
        try:
            told = self._job_of(testimony)
            if told is None:
                return Look(testimony, _not_told(testimony) if testimony.complete else None)
            owner, job, moved = told
            if login_uid is not None and (owner.uid != login_uid or (job is not None and job.uid != login_uid)):
                settled = Settled(Outcome.UNKNOWN, Reason.OTHER_USER, owner=owner, detail="the owner is another user")
            elif job is None:
                hint = self._hint_of(owner) if self._hints else None
                settled = Settled(Outcome.NO_JOB, Reason.OWNER, owner=owner, hint=hint)
            else:
                settled = Settled(Outcome.JOB, Reason.OWNER, job=job, owner=owner, moved=moved)
        except _Unsettled as error:
            settled = Settled(Outcome.UNKNOWN, error.reason, detail=str(error))
        except Disagreement as error:
            settled = Settled(Outcome.UNKNOWN, Reason.DISAGREEMENT, detail=str(error))
        except Ambiguous as error:
            settled = Settled(Outcome.UNKNOWN, Reason.AMBIGUOUS, detail=str(error))
        except JobManagerError as error:
            settled = Settled(Outcome.UNKNOWN, Reason.JOB_MANAGER, detail=str(error))
        return Look(testimony, settled)

    def _hint_of(self, owner: Owner) -> Optional[str]:
        """The job that the environment of the owner's process names, if it is still that process. Blocks."""
        if owner.pid is None:
            return None
        try:
            process = open_process(owner.pid)
        except AdoptionFailed:
            return None
        with process:
            # Held first, then looked at: the pid cannot come to mean another between the two.
            if not self._still_that_process(owner):
                return None
            job_id = (environment_of(process, owner.uid) or {}).get(self._jobs.job_variable)
        return job_id if job_id is not None and is_job_id(job_id) else None

    def _job_of(self, testimony: Testimony) -> Optional[Tuple[Owner, Optional[Job], bool]]:
        """The agreed owner, its job, and whether it has left that job. None: no evidence so far tells.

        Blocks on /proc and the job manager. Raises Ambiguous, _Unsettled, JobManagerError.
        """
        agreed = testimony.agreed_owner()
        if agreed is None:
            return None
        # Witnesses mostly name one cgroup, and what job it is takes longer to find out than all else here.
        with_both = (owner for owner in testimony.owners if owner.pid is not None and owner.cgroup_id is not None)
        pid = next((owner.pid for owner in with_both), None)
        verdict_of = functools.lru_cache(maxsize=None)(lambda cgroup: self._jobs.job_of_cgroup(cgroup, pid))
        found = [(owner, *told) for owner in testimony.owners for told in self._job_of_one(owner, verdict_of)]
        if not found:
            return None
        owner, job, holds = found[0]
        if any(other != job for _, other, _ in found):
            words = ", ".join(f"{o.witness.value}: {'no job' if j is None else 'job ' + j.id}" for o, j, _ in found)
            raise _Unsettled(Reason.DISAGREEMENT, f"witnesses name different jobs ({words})")
        return owner, job, holds is False and owner.pid == pid and self._still_that_process(owner)

    def _job_of_one(
        self, owner: Owner, verdict_of: Callable[[int], CgroupVerdict]
    ) -> Tuple[Tuple[Optional[Job], Optional[bool]], ...]:
        """The job (None: in no job) that this owner's evidence tells, and whether its process is in that still;
        empty if it does not tell."""
        removed = False
        if owner.cgroup_id is not None:
            verdict = verdict_of(owner.cgroup_id)
            if verdict.finding in (CgroupFinding.JOB, CgroupFinding.NO_JOB):
                return ((verdict.job, verdict.holds),)
            removed = verdict.finding is CgroupFinding.GONE
        note = None if self._notes is None else self._notes.of(owner)
        if note is not None and owner.pid is not None:
            return ((note.job, None if note.job is None else self._jobs.contains(note.job, owner.pid)),)
        if owner.pid is None or not self._still_that_process(owner):
            return ()
        # Where the process is now is all that is known: it has not left or, where what it connected from is no more,
        # was moved there.
        told = self._jobs.job_of_process(owner.pid)
        # It may have ended before that was read, and its pid have passed to another.
        return ((told, not removed),) if self._still_that_process(owner) else ()

    @staticmethod
    def _still_that_process(owner: Owner) -> bool:
        if owner.pid is None:
            return False
        if owner.connected_at_ns is None:
            # Seeded sockets and /proc: the witness saw this pid hold the socket, and no connect time says otherwise.
            return owner.witness is Witness.PROC
        return was_started_before(owner.pid, owner.connected_at_ns)


def _not_told(testimony: Testimony) -> Settled:
    """All witnesses were heard, and the job is not known."""
    if testimony.owners:
        return Settled(Outcome.UNKNOWN, Reason.JOB_NOT_TOLD, detail="the owner is known but not whether it is in a job")
    if testimony.consulted:
        nobody = f"nobody on this node is known to own {testimony.connection}"
        return Settled(Outcome.UNKNOWN, Reason.NOT_FOUND, detail=nobody)
    why = "; ".join(f"{remark.witness.value}: {remark.reason}" for remark in testimony.unavailable)
    return Settled(Outcome.UNKNOWN, Reason.NO_WITNESS, detail=why)


@dataclass(frozen=True)
class _Trip:
    """What one trip to a thread has come to. ``settled`` and ``answer`` are both None, or neither is.

    ``look`` None beside them: it was not this login's turn.
    """

    question: Question
    asker_uid: int
    look: Optional[Look]
    settled: Optional[Settled] = None
    answer: Optional[bytes] = None


class Responder:
    """Answers other nodes about the connections that left this one."""

    def __init__(
        self,
        inquiry: Inquiry,
        seals: SealRoom,
        replays: ReplayCache,
        ttl_s: int,
        workers: Workers,
        took: Callable[[AnswerStage, float], None] = lambda stage, seconds: None,
    ) -> None:
        """``workers`` are for answers alone: munged may hang for 10 s, and logins must not wait for such threads.

        ``took`` is told how many seconds each stage took, from any thread.
        """
        self._inquiry = inquiry
        self._seals = seals
        self._replays = replays
        # Apart: whoever can seal can fill it, and a full one refuses what is new.
        self._users_replays = ReplayCache(_USERS_REPLAYS, time.time)
        self._nonces = threading.Lock()
        self._turns = Turns(SETTLED_AT_ONCE, SETTLED_AT_ONCE_OF_ONE)
        self._openings = Turns(OPENED_AT_ONCE, OPENED_AT_ONCE_OF_ONE)
        self._ttl_s = ttl_s
        self._workers = workers
        self._took = took

    async def answer(
        self, sealed: bytes, reached_at: IPAddress, deadline: Deadline, peer: str = ""
    ) -> Tuple[bytes, Settled]:
        """The sealed answer to a sealed question of ``peer``'s that arrived at our address ``reached_at``.

        Raises Refused where the sender gets nothing.
        """
        try:
            async with self._openings.taken(peer, deadline):
                trip = await self._workers.run(lambda: self._one_trip(sealed, reached_at, deadline), deadline)
            if trip.answer is not None and trip.settled is not None:
                return trip.answer, trip.settled
            question, asker_uid = trip.question, trip.asker_uid
            async with self._turns.taken(_turn_of(question, asker_uid), deadline):
                with self._timed(AnswerStage.FIND_OWNER):
                    if trip.look is None:
                        settled = await self._inquiry.settle(question.connection, question.login_uid, deadline)
                    else:
                        settled = await self._inquiry.look_further(trip.look, question.login_uid, deadline)
            return await self._workers.run(lambda: self._sealed(question, settled, asker_uid), deadline), settled
        except (OutOfTime, Overloaded) as error:
            raise Refused(Refusal.UNAVAILABLE, str(error)) from None

    def _one_trip(self, sealed: bytes, reached_at: IPAddress, deadline: Deadline) -> _Trip:
        """All of an answer that needs no walk of /proc, in one thread: each way there and back costs 0.1 ms.

        The order is the security argument. Raises Refused, OutOfTime.
        """
        opened = self._open(sealed)
        question = self._read(opened)
        self._addressed_to_us(question, reached_at)
        self._first_time(question, opened.uid)
        if not _may_ask(question, opened.uid):
            detail = f"uid {opened.uid} asked about uid {question.login_uid}"
            settled: Optional[Settled] = Settled(Outcome.UNKNOWN, Reason.NOT_ALLOWED, detail=detail)
            look = None
        else:
            look = self._look(question, opened.uid, deadline)
            settled = None if look is None else look.settled
        if settled is None:
            return _Trip(question, opened.uid, look)
        return _Trip(question, opened.uid, look, settled, self._sealed(question, settled, opened.uid))

    def _look(self, question: Question, asker_uid: int, deadline: Deadline) -> Optional[Look]:
        """None: too many questions of this login's are under way; it waits for its turn, and holds no thread."""
        turn = _turn_of(question, asker_uid)
        if not self._turns.take_now(turn):
            return None
        try:
            # munged may have taken all the time there was.
            if deadline.expired:
                raise OutOfTime("no time left when the seal was open")
            with self._timed(AnswerStage.FIND_OWNER):
                return self._inquiry.look(question.connection, question.login_uid, deadline)
        finally:
            self._turns.give_back(turn)

    def _sealed(self, question: Question, settled: Settled, reader_uid: int) -> bytes:
        answer = Answer(
            nonce=question.nonce,
            responder=question.responder,
            connection=question.connection,
            outcome=settled.outcome,
            reason=settled.reason,
            job_id=None if settled.job is None else settled.job.id,
            witness=None if settled.job is None or settled.owner is None else settled.owner.witness,
            moved=settled.moved,
            hint=settled.hint,
            cluster=None if settled.job is None else _cluster_of(settled.job),
        )
        try:
            with self._timed(AnswerStage.SEAL_ANSWER):
                return self._seals.seal(encode_answer(answer), reader_uid)
        except SealError as error:
            raise Refused(Refusal.UNAVAILABLE, f"the answer cannot be sealed: {error}") from None

    @contextlib.contextmanager
    def _timed(self, stage: AnswerStage) -> Iterator[None]:
        begun_s = time.monotonic()
        try:
            yield
        finally:
            self._took(stage, time.monotonic() - begun_s)

    def _open(self, sealed: bytes) -> Opened:
        try:
            with self._timed(AnswerStage.OPEN_SEAL):
                return self._seals.open(sealed)
        except SealError as error:
            raise Refused(Refusal(error.fault.value), str(error)) from None

    @staticmethod
    def _read(opened: Opened) -> Question:
        try:
            return decode_question(opened.payload)
        except OtherVersion as error:
            raise Refused(Refusal.OTHER_VERSION, str(error)) from None
        except ProtocolError as error:
            raise Refused(Refusal.MALFORMED, str(error)) from None

    @staticmethod
    def _addressed_to_us(question: Question, reached_at: IPAddress) -> None:
        # A sealed question is good on every node of the cluster; without this, one that was sent to another
        # node could be carried here.
        if question.responder != reached_at:
            raise Refused(Refusal.WRONG_HOST, f"question for {question.responder} arrived at {reached_at}")

    def _first_time(self, question: Question, asker_uid: int) -> None:
        # The seal refuses what is older than ttl_s, and MUNGE allows as much again for clocks that differ.
        replays, others = self._replays, self._users_replays
        if asker_uid != AGENT_UID:
            replays, others = others, replays
        # Held over both: of two threads with one nonce only one may find it new in the one and in the other.
        with self._nonces:
            if question.nonce in others:
                raise Refused(Refusal.REPLAYED, f"nonce {question.nonce} was seen before")
            admission = replays.offer(question.nonce, time.time() + 2 * self._ttl_s)
        if admission is Admission.FULL:
            raise Refused(Refusal.UNAVAILABLE, "more questions than nonces can be kept of")
        if admission is not Admission.NEW:
            raise Refused(Refusal.REPLAYED, f"nonce {question.nonce} was seen before")


def _may_ask(question: Question, asker_uid: int) -> bool:
    """Root about anything, others about their own."""
    return asker_uid == AGENT_UID or question.login_uid == asker_uid


def _cluster_of(job: Job) -> Optional[str]:
    return job.cluster if is_job_id(job.cluster) else None


def _turn_of(question: Question, asker_uid: int) -> Hashable:
    return question.login_uid if asker_uid == AGENT_UID else _ASKED_BY_USERS
