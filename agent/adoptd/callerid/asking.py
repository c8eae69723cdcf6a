"""The destination's side: asking the node that a connection came from, and believing only its answer.

Owns every way in which a question can bring nothing; each is a reason in a metric, and none is an error
of the login. Called by adoption and by ``adoptctl whois --at``.
"""

from __future__ import annotations

import asyncio
import enum
import secrets
import time
from dataclasses import dataclass
from typing import FrozenSet, Optional

from adoptd.callerid.sealing import AGENT_UID, SealRoom
from adoptd.deadline import Deadline
from adoptd.metrics import Metrics
from adoptd.model import (
    AdoptdError,
    Connection,
    IPAddress,
    ProtocolError,
    Witness,
)
from adoptd.seal import SealError
from adoptd.slurm_callerid import NoWord, SlurmdCallerid, SlurmdFault
from adoptd.wire import frame
from adoptd.wire.callerid import (
    Answer,
    Outcome,
    Question,
    Reason,
    decode_answer,
    encode_question,
)
from adoptd.workers import OutOfTime, Overloaded


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
    """What came of asking a source node. ``reason`` is a value of Reason, AskFault or SlurmdFault.

    ``hint`` goes with NO_JOB and Witness.HINT: a job that the connecting process's environment names. It is the
    user's own word, good for choosing among the user's own jobs and for nothing else.
    """

    outcome: Outcome
    reason: str
    job_id: Optional[str] = None
    witness: Optional[Witness] = None
    moved: bool = False
    detail: str = ""
    hint: Optional[str] = None


class Asker:
    """Asks source nodes, and believes only an answer to the question it asked."""

    def __init__(
        self,
        seals: SealRoom,
        port: int,
        timeout_ms: int,
        metrics: Metrics,
        fallback: Optional[SlurmdCallerid] = None,
        hints: bool = True,
    ) -> None:
        """``fallback`` None: nodes without an agent are not asked. ``hints``: whether hints are told."""
        self._seals = seals
        self._port = port
        self._timeout_ms = timeout_ms
        self._metrics = metrics
        self._fallback = fallback
        self._hints = hints

    async def ask(
        self,
        connection: Connection,
        login_uid: Optional[int],
        deadline: Deadline,
        at: Optional[IPAddress] = None,
        theirs: FrozenSet[str] = frozenset(),
    ) -> Told:
        """What the node at ``at`` (None: at ``connection.source``) says.

        ``theirs`` are the login user's jobs on this node. A node without an agent is asked through the fallback,
        whose word says nothing about the user: it is told only where it names one of these.
        Never raises: what went wrong is the reason.
        """
        started = time.monotonic()
        responder = connection.source.address if at is None else at
        deadline = deadline.earlier(self._timeout_ms)
        try:
            told = await self._ask(responder, connection, login_uid, deadline)
        except _NoAnswer as error:
            told = Told(Outcome.UNKNOWN, error.fault.value, detail=str(error))
            # Refused, and nothing else: a host that answers at all, and has nobody on our port, has no agent.
            if error.fault is AskFault.REFUSED and self._fallback is not None and theirs and at is None:
                told = await self._ask_slurmd(self._fallback, connection, theirs, deadline)
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
        if answer.hint is not None and self._hints:
            return Told(answer.outcome, answer.reason.value, witness=Witness.HINT, hint=answer.hint)
        return Told(answer.outcome, answer.reason.value, answer.job_id, answer.witness, answer.moved)

    @staticmethod
    async def _ask_slurmd(
        fallback: SlurmdCallerid, connection: Connection, theirs: FrozenSet[str], deadline: Deadline
    ) -> Told:
        try:
            job_id = await fallback.job_of(connection, deadline)
        except NoWord as error:
            return Told(Outcome.UNKNOWN, error.fault.value, detail=str(error))
        if job_id not in theirs:
            # Not which one: slurmd answers root about anybody's job, and a user may read what is told here.
            return Told(
                Outcome.UNKNOWN, SlurmdFault.OTHER_NAMED.value, detail="slurmd names no job of this user's here"
            )
        return Told(Outcome.JOB, Reason.OWNER.value, job_id, Witness.SLURMD)

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
