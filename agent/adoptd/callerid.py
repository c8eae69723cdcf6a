"""Callerid: which job owns a connection that left this node, and the asking of other nodes.

Owns both sides of the question. The stages of an answer stand in :meth:`Responder.answer` and
:meth:`Inquiry.settle`, in the order that is the security argument: nothing is looked up for
somebody whose seal is not open, nothing is told that the asker may not know. Must never guess: when
witnesses disagree, or time runs out, the outcome is UNKNOWN. Called by the peer server, by adoption
and by ``adoptctl whois``.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import secrets
import time
from dataclasses import dataclass
from typing import Callable, Optional, Tuple

from adoptd.connections import Testimony, Witnesses
from adoptd.deadline import Deadline
from adoptd.jobs import CgroupFinding, CgroupVerdict, JobBackend
from adoptd.metrics import Metrics, Refusal
from adoptd.model import (
    AdoptdError,
    Ambiguous,
    Connection,
    IPAddress,
    Job,
    JobManagerError,
    Owner,
    ProtocolError,
    Witness,
)
from adoptd.process import was_started_before
from adoptd.seal import Opened, Seal, SealError
from adoptd.seal.replay import Admission, ReplayCache
from adoptd.wire import frame
from adoptd.wire.callerid import (
    Answer,
    Outcome,
    Question,
    Reason,
    decode_answer,
    decode_question,
    encode_answer,
    encode_question,
)
from adoptd.workers import OutOfTime, Overloaded, Workers

# Agents run as root; only root may ask for another user, and only root's answer is believed. On a
# cluster root is root everywhere, as it is for Slurm's own callerid (src/slurmd/slurmd/req.c, 22.05).
AGENT_UID = 0


class AskFault(enum.Enum):
    """Why a question brought no answer. The values join :class:`Reason`'s as one metric label."""

    DISABLED = "disabled"
    NO_CONNECTION = "connection_not_known"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    CLOSED = "closed"
    MALFORMED = "malformed"
    BAD_SEAL = "bad_seal"
    SEAL_UNAVAILABLE = "seal_unavailable"
    FOREIGN = "sealed_by_other"
    WRONG_NONCE = "wrong_nonce"
    WRONG_CONNECTION = "wrong_connection"
    WRONG_HOST = "wrong_host"


@dataclass(frozen=True)
class Told:
    """What came of asking a source node. ``reason`` is a value of :class:`Reason` or :class:`AskFault`."""

    outcome: Outcome
    reason: str
    job_id: Optional[str] = None
    witness: Optional[Witness] = None
    moved: bool = False
    detail: str = ""


@dataclass(frozen=True)
class Settled:
    """What this node says about a connection, with the evidence, which stays on this node."""

    outcome: Outcome
    reason: Reason
    job: Optional[Job] = None
    owner: Optional[Owner] = None
    moved: bool = False
    detail: str = ""


class Refused(AdoptdError):
    """A message gets no answer. ``reason`` is for the metric, the text for the log."""

    def __init__(self, reason: Refusal, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class _Unsettled(AdoptdError):
    """A stage ended the search: the outcome is UNKNOWN for ``reason``."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


class SealRoom:
    """Sealing and opening within a deadline: in a thread where the scheme may block, inline where not."""

    def __init__(self, seal: Seal, workers: Workers) -> None:
        self._seal = seal
        self._workers = workers

    @property
    def scheme(self) -> str:
        """The scheme in force."""
        return self._seal.scheme

    async def seal(self, payload: bytes, reader_uid: int, deadline: Deadline) -> bytes:
        """``payload`` sealed for ``reader_uid``. Raises SealError, OutOfTime, Overloaded."""
        if not self._seal.may_block:
            return self._seal.seal(payload, reader_uid)
        return await self._workers.run(lambda: self._seal.seal(payload, reader_uid), deadline)

    async def open(self, sealed: bytes, deadline: Deadline) -> Opened:
        """The opened seal. Raises SealError, OutOfTime, Overloaded."""
        if not self._seal.may_block:
            return self._seal.open(sealed)
        return await self._workers.run(lambda: self._seal.open(sealed), deadline)


class Inquiry:
    """Finds the job of a connection that left this node."""

    def __init__(self, witnesses: Witnesses, jobs: JobBackend, workers: Workers) -> None:
        self._witnesses = witnesses
        self._jobs = jobs
        self._workers = workers

    async def settle(self, connection: Connection, login_uid: Optional[int], deadline: Deadline) -> Settled:
        """Which job owns ``connection``, said only if it is ``login_uid``'s (None: anybody's). Never raises."""
        try:
            owner, job, moved = await self._owner_and_job(connection, deadline)
            if login_uid is not None and (owner.uid != login_uid or (job is not None and job.uid != login_uid)):
                return Settled(Outcome.UNKNOWN, Reason.OTHER_USER, owner=owner, detail="the owner is another user")
            if job is None:
                return Settled(Outcome.NO_JOB, Reason.OWNER, owner=owner)
            return Settled(Outcome.JOB, Reason.OWNER, job=job, owner=owner, moved=moved)
        except _Unsettled as error:
            return Settled(Outcome.UNKNOWN, error.reason, detail=str(error))
        except Ambiguous as error:
            return Settled(Outcome.UNKNOWN, Reason.AMBIGUOUS, detail=str(error))
        except JobManagerError as error:
            return Settled(Outcome.UNKNOWN, Reason.JOB_MANAGER, detail=str(error))
        except (OutOfTime, Overloaded) as error:
            return Settled(Outcome.UNKNOWN, Reason.OUT_OF_TIME, detail=str(error))

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
        self._ttl_s = ttl_s

    async def answer(self, sealed: bytes, reached_at: IPAddress, deadline: Deadline) -> Tuple[bytes, Settled]:
        """The sealed answer to a sealed question that arrived at our address ``reached_at``.

        Raises Refused where the sender gets nothing, AdoptdError where an answer could not be sealed.
        """
        opened = await self._open(sealed, deadline)
        question = self._read(opened)
        self._addressed_to_us(question, reached_at)
        self._first_time(question)
        settled = await self._may_ask_and_settle(question, opened.uid, deadline)
        answer = Answer(
            nonce=question.nonce,
            responder=question.responder,
            connection=question.connection,
            outcome=settled.outcome,
            reason=settled.reason,
            job_id=None if settled.job is None else settled.job.id,
            witness=None if settled.job is None or settled.owner is None else settled.owner.witness,
            moved=settled.moved,
        )
        return await self._seals.seal(encode_answer(answer), opened.uid, deadline), settled

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

    def _first_time(self, question: Question) -> None:
        # The seal refuses what is older than ttl_s, and MUNGE allows as much again for clocks that differ.
        admission = self._replays.offer(question.nonce, time.time() + 2 * self._ttl_s)
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


class Asker:
    """Asks source nodes, and believes only an answer to the question it asked."""

    def __init__(self, seals: SealRoom, port: int, timeout_ms: int, metrics: Metrics) -> None:
        self._seals = seals
        self._port = port
        self._timeout_ms = timeout_ms
        self._metrics = metrics

    async def ask(
        self, connection: Connection, login_uid: Optional[int], deadline: Deadline, at: Optional[IPAddress] = None
    ) -> Told:
        """What the node at ``at`` (None: at ``connection.source``) says.

        Never raises: what went wrong is the reason.
        """
        started = time.monotonic()
        responder = connection.source.address if at is None else at
        try:
            told = await self._ask(responder, connection, login_uid, deadline.earlier(self._timeout_ms))
        except _NoAnswer as error:
            told = Told(Outcome.UNKNOWN, error.fault.value, detail=str(error))
        self._metrics.count_asked(told.outcome, told.reason, told.witness, time.monotonic() - started)
        return told

    async def _ask(
        self, responder: IPAddress, connection: Connection, login_uid: Optional[int], deadline: Deadline
    ) -> Told:
        question = Question(
            nonce=secrets.token_hex(16),
            responder=responder,
            connection=connection,
            login_uid=login_uid,
        )
        sealed = await self._sealed(question, deadline)
        reply = await self._exchange(question.responder, sealed, deadline)
        answer = await self._opened(reply, deadline)
        self._about_our_question(question, answer)
        return Told(answer.outcome, answer.reason.value, answer.job_id, answer.witness, answer.moved)

    async def _sealed(self, question: Question, deadline: Deadline) -> bytes:
        try:
            sealed = await self._seals.seal(encode_question(question), AGENT_UID, deadline)
        except (SealError, OutOfTime, Overloaded) as error:
            raise _NoAnswer(AskFault.SEAL_UNAVAILABLE, str(error)) from None
        return frame.encode_frame(sealed, frame.CALLERID_MAX_BYTES)

    async def _exchange(self, responder: IPAddress, sealed: bytes, deadline: Deadline) -> bytes:
        where = f"{responder} port {self._port}"
        try:
            return await asyncio.wait_for(self._send_and_receive(responder, sealed), deadline.remaining_s())
        except asyncio.TimeoutError:
            raise _NoAnswer(AskFault.TIMEOUT, f"{where}: no answer in time") from None
        except ConnectionRefusedError:
            raise _NoAnswer(AskFault.REFUSED, f"{where}: connection refused") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise _NoAnswer(AskFault.CLOSED, f"{where}: closed without an answer") from None
        except ProtocolError as error:
            raise _NoAnswer(AskFault.MALFORMED, f"{where}: {error}") from None
        except OSError as error:
            raise _NoAnswer(AskFault.UNREACHABLE, f"{where}: {error.strerror}") from None

    async def _send_and_receive(self, responder: IPAddress, sealed: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(str(responder), self._port, limit=frame.CALLERID_MAX_BYTES)
        try:
            writer.write(sealed)
            prefix = await reader.readexactly(frame.PREFIX_BYTES)
            return await reader.readexactly(frame.decode_length(prefix, frame.CALLERID_MAX_BYTES))
        finally:
            # abort, not close: nothing more is owed to the peer, and a FIN_WAIT per question would pile up.
            writer.transport.abort()

    async def _opened(self, reply: bytes, deadline: Deadline) -> Answer:
        try:
            opened = await self._seals.open(reply, deadline)
        except SealError as error:
            raise _NoAnswer(AskFault.BAD_SEAL, str(error)) from None
        except (OutOfTime, Overloaded) as error:
            raise _NoAnswer(AskFault.SEAL_UNAVAILABLE, str(error)) from None
        if opened.uid != AGENT_UID:
            # Any user of the node could listen on our port while the agent is down.
            raise _NoAnswer(AskFault.FOREIGN, f"answer sealed by uid {opened.uid}, expected {AGENT_UID}")
        try:
            return decode_answer(opened.payload)
        except ProtocolError as error:
            raise _NoAnswer(AskFault.MALFORMED, str(error)) from None

    @staticmethod
    def _about_our_question(question: Question, answer: Answer) -> None:
        for fault, found, expected in (
            (AskFault.WRONG_NONCE, answer.nonce, question.nonce),
            (AskFault.WRONG_HOST, answer.responder, question.responder),
            (AskFault.WRONG_CONNECTION, answer.connection, question.connection),
        ):
            if found != expected:
                raise _NoAnswer(fault, f"answer is for {found}, asked {expected}")


class _NoAnswer(AdoptdError):
    """The question brought nothing that can be believed."""

    def __init__(self, fault: AskFault, text: str) -> None:
        super().__init__(text)
        self.fault = fault
