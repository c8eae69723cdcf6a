"""The destination's side: asking the node that a connection came from, and believing only its answer.

Owns every way in which a question can bring nothing; each is a reason in a metric, and none is an error
of the login. Called by adoption and by ``adoptctl whois --at``.
"""

from __future__ import annotations

import enum
import secrets
import socket
import time
from dataclasses import dataclass
from typing import FrozenSet, Optional, Tuple, Union

from adoptd.callerid.inquiry import reason_for
from adoptd.callerid.peers import Peers
from adoptd.callerid.sealing import AGENT_UID, SealRoom
from adoptd.connections.links import is_link_local, scope_of
from adoptd.deadline import Deadline
from adoptd.metrics import Metrics
from adoptd.model import AdoptdError, Connection, IPAddress, ProtocolError, Witness
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
    user's own word, good for choosing among the user's own jobs and for nothing else. ``cluster`` is the one that
    ``job_id`` is of, where the source node said. ``release`` is its agent's, "" where no agent's word is told.
    """

    outcome: Outcome
    reason: str
    job_id: Optional[str] = None
    witness: Optional[Witness] = None
    moved: bool = False
    detail: str = ""
    hint: Optional[str] = None
    cluster: Optional[str] = None
    release: str = ""


_REASONS = frozenset(each.value for each in Reason)


def reason_told(reader_uid: int, reason: str) -> str:
    """The reason of a :class:`Told` as who is not root may read it: of others' connections as if they were nobody's.

    Why no answer came is no secret of anybody's.
    """
    if reader_uid != 0 and reason == SlurmdFault.OTHER_NAMED.value:
        return SlurmdFault.NONE_NAMED.value
    return reason_for(reader_uid, Reason(reason)).value if reason in _REASONS else reason


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
        # What came of asking each node last.
        self.peers = Peers(time.monotonic)

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
            if error.fault is not AskFault.SEAL_UNAVAILABLE:
                self.peers.silent(responder, error.fault.value)
            told = Told(Outcome.UNKNOWN, error.fault.value, detail=str(error))
            # Refused, and nothing else: a host that answers at all, and has nobody on our port, has no agent.
            if error.fault is AskFault.REFUSED and self._fallback is not None and theirs and at is None:
                told = await self._ask_slurmd(self._fallback, connection, theirs, deadline)
        self._metrics.count_asked(told.outcome, told.reason, told.witness, time.monotonic() - started)
        return told

    async def _ask(
        self, responder: IPAddress, connection: Connection, login_uid: Optional[int], deadline: Deadline
    ) -> Told:
        try:
            answer = await self._answered(responder, connection, login_uid, deadline)
        except _HungUp as hung_up:
            # An agent that is killed hangs up, and the next is there at once. It is asked with a nonce and a seal of
            # their own: the one before may have opened the first.
            try:
                answer = await self._answered(responder, connection, login_uid, deadline)
            except _NoAnswer as error:
                # Nobody there yet is not the same as a host without an agent.
                raise (hung_up if error.fault is AskFault.REFUSED else error) from None
        self.peers.answered(responder, answer.release)
        if answer.hint is not None and self._hints:
            return Told(
                answer.outcome, answer.reason.value, witness=Witness.HINT, hint=answer.hint, release=answer.release
            )
        return Told(
            answer.outcome,
            answer.reason.value,
            answer.job_id,
            answer.witness,
            answer.moved,
            cluster=answer.cluster,
            release=answer.release,
        )

    async def _answered(
        self, responder: IPAddress, connection: Connection, login_uid: Optional[int], deadline: Deadline
    ) -> Answer:
        """The answer to one question, which was about it. Raises _NoAnswer."""
        question = Question(
            nonce=secrets.token_hex(16),
            responder=responder,
            connection=connection,
            login_uid=login_uid,
        )
        trip = _Trip(question, self._seals, self._port, deadline)
        try:
            answer = await self._seals.run(trip.make, deadline)
        except (OutOfTime, Overloaded) as error:
            raise _NoAnswer(trip.waits_for, f"{responder} port {self._port}: {error}") from None
        self._about_our_question(question, answer)
        return answer

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


class _HungUp(_NoAnswer):
    """The connection ended without a byte of an answer."""


class _Trip:
    """A question's way there and back, made whole in one thread: each change of thread costs as much as the network.

    ``waits_for`` says what the asker gave up on, when it did.
    """

    def __init__(self, question: Question, seals: SealRoom, port: int, deadline: Deadline) -> None:
        self._question = question
        self._seals = seals
        self._port = port
        self._deadline = deadline
        self._heard = False
        self.waits_for = AskFault.SEAL_UNAVAILABLE

    def make(self) -> Answer:
        """The answer, sealed by root, to whatever question. Raises _NoAnswer."""
        sealed = self._sealed()
        self.waits_for = AskFault.TIMEOUT
        reply = self._exchange(sealed)
        self.waits_for = AskFault.SEAL_UNAVAILABLE
        return self._opened(reply)

    def _sealed(self) -> bytes:
        try:
            sealed = self._seals.seal(encode_question(self._question), AGENT_UID)
        except SealError as error:
            raise _NoAnswer(AskFault.SEAL_UNAVAILABLE, str(error)) from None
        return frame.encode_frame(sealed, frame.CALLERID_MAX_BYTES)

    def _exchange(self, sealed: bytes) -> bytes:
        where = f"{self._question.responder} port {self._port}"
        try:
            return self._send_and_receive(sealed)
        except socket.timeout:
            raise _NoAnswer(AskFault.TIMEOUT, f"{where}: no answer in time") from None
        except ConnectionRefusedError:
            raise _NoAnswer(AskFault.REFUSED, f"{where}: connection refused") from None
        except ConnectionError:
            fault = AskFault.CLOSED
            raise (_NoAnswer if self._heard else _HungUp)(fault, f"{where}: closed without an answer") from None
        except ProtocolError as error:
            raise _NoAnswer(AskFault.MALFORMED, f"{where}: {error}") from None
        except OSError as error:
            raise _NoAnswer(AskFault.UNREACHABLE, f"{where}: {error.strerror}") from None

    def _name(self) -> Tuple[Union[str, int], ...]:
        """Where the asked agent is, for connect(). Raises OSError if it is on a link, and that is not known."""
        responder, ours = self._question.responder, self._question.connection.destination.address
        if not is_link_local(responder):
            return str(responder), self._port
        # They reached us on our own link-local address, or it cannot be told which link they are on.
        return str(responder), self._port, 0, scope_of(ours)

    def _send_and_receive(self, sealed: bytes) -> bytes:
        family = socket.AF_INET if self._question.responder.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_STREAM) as peer:
            self._patient(peer).connect(self._name())
            self._patient(peer).sendall(sealed)
            reply = b""
            length: Optional[int] = None
            while length is None or len(reply) < length:
                chunk = self._patient(peer).recv(frame.PREFIX_BYTES + frame.CALLERID_MAX_BYTES - len(reply))
                if not chunk:
                    raise ConnectionResetError
                reply += chunk
                self._heard = True
                if length is None and len(reply) >= frame.PREFIX_BYTES:
                    length = frame.PREFIX_BYTES + frame.decode_length(
                        reply[: frame.PREFIX_BYTES], frame.CALLERID_MAX_BYTES
                    )
            return reply[frame.PREFIX_BYTES : length]

    def _patient(self, peer: socket.socket) -> socket.socket:
        """``peer``, which waits for its next step until the deadline. Raises socket.timeout if that is past."""
        remaining_s = self._deadline.remaining_s()
        if remaining_s <= 0:
            raise socket.timeout
        peer.settimeout(remaining_s)
        return peer

    def _opened(self, reply: bytes) -> Answer:
        try:
            opened = self._seals.open(reply)
        except SealError as error:
            raise _NoAnswer(AskFault.BAD_SEAL, str(error)) from None
        if opened.uid != AGENT_UID:
            # Any user of the node could listen on our port while the agent is down.
            raise _NoAnswer(AskFault.FOREIGN, f"answer sealed by uid {opened.uid}, expected {AGENT_UID}")
        try:
            return decode_answer(opened.payload)
        except ProtocolError as error:
            raise _NoAnswer(AskFault.MALFORMED, str(error)) from None
