"""The source's side: which job owns a connection that left this node.

Owns the stages of an answer (:meth:`Responder.answer`, :meth:`Inquiry.settle`), in the order that is the
security argument: nothing is looked up for somebody whose seal is not open, nothing is told that the
asker may not know. Must never guess: where witnesses disagree, or time runs out, the outcome is UNKNOWN.
Called by the peers' door and by ``adoptctl whois``.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Callable, Hashable, Optional, Tuple

from adoptd.callerid.sealing import AGENT_UID, Refused, SealRoom
from adoptd.connections import Testimony, Witnesses
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
from adoptd.process import open_process, was_started_before
from adoptd.seal import Opened, SealError
from adoptd.seal.replay import Admission, ReplayCache
from adoptd.wire.callerid import (
    Answer,
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
# What ordinary users seal and ask themselves, all of them together.
_ASKED_BY_USERS = "users"
_USERS_REPLAYS = 8192


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


class Inquiry:
    """Finds the job of a connection that left this node."""

    def __init__(self, witnesses: Witnesses, jobs: JobBackend, workers: Workers, hints: bool = True) -> None:
        """``hints``: whether to look for a job in the environment of an owner that is in none."""
        self._witnesses = witnesses
        self._jobs = jobs
        self._workers = workers
        self._hints = hints

    async def settle(self, connection: Connection, login_uid: Optional[int], deadline: Deadline) -> Settled:
        """Which job owns ``connection``, said only if it is ``login_uid``'s (None: anybody's). Never raises."""
        try:
            owner, job, moved = await self._owner_and_job(connection, deadline)
            if login_uid is not None and (owner.uid != login_uid or (job is not None and job.uid != login_uid)):
                return Settled(Outcome.UNKNOWN, Reason.OTHER_USER, owner=owner, detail="the owner is another user")
            if job is None:
                hint = await self._hint(owner, deadline)
                return Settled(Outcome.NO_JOB, Reason.OWNER, owner=owner, hint=hint)
            return Settled(Outcome.JOB, Reason.OWNER, job=job, owner=owner, moved=moved)
        except _Unsettled as error:
            return Settled(Outcome.UNKNOWN, error.reason, detail=str(error))
        except Ambiguous as error:
            return Settled(Outcome.UNKNOWN, Reason.AMBIGUOUS, detail=str(error))
        except JobManagerError as error:
            return Settled(Outcome.UNKNOWN, Reason.JOB_MANAGER, detail=str(error))
        except (OutOfTime, Overloaded) as error:
            return Settled(Outcome.UNKNOWN, Reason.OUT_OF_TIME, detail=str(error))

    async def _hint(self, owner: Owner, deadline: Deadline) -> Optional[str]:
        if not self._hints:
            return None
        try:
            return await self._workers.run(lambda: self._hint_of(owner), deadline)
        except (OutOfTime, Overloaded):
            # That the owner is in no job is known and worth saying without it.
            return None

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

    async def _owner_and_job(self, connection: Connection, deadline: Deadline) -> Tuple[Owner, Optional[Job], bool]:
        testimony = await self._witnesses.testimony(connection, deadline)
        while True:
            told = await self._workers.run(functools.partial(self._job_of, testimony), deadline)
            if told is not None:
                return told
            if testimony.complete:
                break
            testimony = await self._witnesses.slow_testimony(testimony, deadline)
        if testimony.owners:
            raise _Unsettled(Reason.JOB_NOT_TOLD, "the owner is known but not whether it is in a job")
        if testimony.consulted:
            raise _Unsettled(Reason.NOT_FOUND, f"nobody on this node is known to own {connection}")
        raise _Unsettled(Reason.NO_WITNESS, "; ".join(f"{r.witness.value}: {r.reason}" for r in testimony.unavailable))

    def _job_of(self, testimony: Testimony) -> Optional[Tuple[Owner, Optional[Job], bool]]:
        """The agreed owner, its job, and whether it has left that job. None: no evidence so far tells.

        Blocks on /proc and the job manager. Raises Ambiguous, _Unsettled, JobManagerError.
        """
        agreed = testimony.agreed_owner()
        if agreed is None:
            return None
        # Witnesses mostly name one cgroup, and what job it is takes longer to find out than all else here.
        verdict_of = functools.lru_cache(maxsize=None)(self._jobs.job_of_cgroup)
        found = [(owner, job) for owner in testimony.owners for job in self._job_of_one(owner, verdict_of)]
        if not found:
            return None
        owner, job = found[0]
        if any(other != job for _, other in found):
            words = ", ".join(f"{o.witness.value}: {'no job' if j is None else 'job ' + j.id}" for o, j in found)
            raise _Unsettled(Reason.DISAGREEMENT, f"witnesses name different jobs ({words})")
        return owner, job, job is not None and self._has_left(owner, job)

    def _job_of_one(self, owner: Owner, verdict_of: Callable[[int], CgroupVerdict]) -> Tuple[Optional[Job], ...]:
        """The job (None: in no job) that this owner's evidence tells; empty if it does not tell."""
        if owner.cgroup_id is not None:
            verdict = verdict_of(owner.cgroup_id)
            if verdict.finding is not CgroupFinding.CANNOT_TELL:
                return (verdict.job,)
        if owner.pid is None or not self._still_that_process(owner):
            return ()
        return (self._jobs.job_of_process(owner.pid),)

    @staticmethod
    def _still_that_process(owner: Owner) -> bool:
        if owner.pid is None:
            return False
        if owner.connected_at_ns is None:
            # Seeded sockets and /proc: the witness saw this pid hold the socket, and no connect time says otherwise.
            return owner.witness is Witness.PROC
        return was_started_before(owner.pid, owner.connected_at_ns)

    def _has_left(self, owner: Owner, job: Job) -> bool:
        if owner.pid is None or not self._still_that_process(owner):
            return False
        return not self._jobs.contains(job, owner.pid)


class Responder:
    """Answers other nodes about the connections that left this one."""

    def __init__(self, inquiry: Inquiry, seals: SealRoom, replays: ReplayCache, ttl_s: int) -> None:
        self._inquiry = inquiry
        self._seals = seals
        self._replays = replays
        # Apart: whoever can seal can fill it, and a full one refuses what is new.
        self._users_replays = ReplayCache(_USERS_REPLAYS, time.time)
        self._turns = Turns(SETTLED_AT_ONCE, SETTLED_AT_ONCE_OF_ONE)
        self._ttl_s = ttl_s

    async def answer(self, sealed: bytes, reached_at: IPAddress, deadline: Deadline) -> Tuple[bytes, Settled]:
        """The sealed answer to a sealed question that arrived at our address ``reached_at``.

        Raises Refused where the sender gets nothing.
        """
        opened = await self._open(sealed, deadline)
        question = self._read(opened)
        self._addressed_to_us(question, reached_at)
        self._first_time(question, opened.uid)
        try:
            async with self._turns.taken(_turn_of(question, opened.uid), deadline):
                settled = await self._may_ask_and_settle(question, opened.uid, deadline)
        except OutOfTime as error:
            raise Refused(Refusal.UNAVAILABLE, str(error)) from None
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
        )
        return await self._sealed(answer, opened.uid, deadline), settled

    async def _sealed(self, answer: Answer, reader_uid: int, deadline: Deadline) -> bytes:
        try:
            return await self._seals.seal(encode_answer(answer), reader_uid, deadline)
        except (SealError, OutOfTime, Overloaded) as error:
            raise Refused(Refusal.UNAVAILABLE, f"the answer cannot be sealed: {error}") from None

    async def _open(self, sealed: bytes, deadline: Deadline) -> Opened:
        try:
            return await self._seals.open(sealed, deadline)
        except SealError as error:
            raise Refused(Refusal(error.fault.value), str(error)) from None
        except (OutOfTime, Overloaded) as error:
            raise Refused(Refusal.UNAVAILABLE, str(error)) from None

    @staticmethod
    def _read(opened: Opened) -> Question:
        try:
            return decode_question(opened.payload)
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
        if question.nonce in others:
            raise Refused(Refusal.REPLAYED, f"nonce {question.nonce} was seen before")
        admission = replays.offer(question.nonce, time.time() + 2 * self._ttl_s)
        if admission is Admission.FULL:
            raise Refused(Refusal.UNAVAILABLE, "more questions than nonces can be kept of")
        if admission is not Admission.NEW:
            raise Refused(Refusal.REPLAYED, f"nonce {question.nonce} was seen before")

    async def _may_ask_and_settle(self, question: Question, asker_uid: int, deadline: Deadline) -> Settled:
        if asker_uid != AGENT_UID and question.login_uid != asker_uid:
            return Settled(
                Outcome.UNKNOWN, Reason.NOT_ALLOWED, detail=f"uid {asker_uid} asked about uid {question.login_uid}"
            )
        return await self._inquiry.settle(question.connection, question.login_uid, deadline)


def _turn_of(question: Question, asker_uid: int) -> Hashable:
    return question.login_uid if asker_uid == AGENT_UID else _ASKED_BY_USERS
