"""What happens behind each door: from a message's bytes to the reply, and the line in the log.

Owns the order: who is calling, then the message, then the deadline, then the work. Called by the
doorkeepers of :mod:`adoptd.server`; the work is done by callerid, adoption and control.
"""

from __future__ import annotations

import contextlib
import ipaddress
import time
from dataclasses import dataclass
from typing import AsyncIterator, Callable, Optional

from adoptd import log
from adoptd.adoption import Adoptions, Decision
from adoptd.callerid import Refused, Responder
from adoptd.control import Control
from adoptd.deadline import Deadline
from adoptd.jobs import JobSession
from adoptd.metrics import Metrics, Refusal
from adoptd.model import AdoptdError, AdoptionFailed, ProtocolError
from adoptd.process import open_peer
from adoptd.server import Caller, Conversation
from adoptd.wire import control as control_wire
from adoptd.wire import frame
from adoptd.wire.pam import REQUEST_BYTES, PamRequest, decode_request, encode_reply
from adoptd.workers import OutOfTime, Turns

# The module waits for the whole of its timeout_ms; the reply has to be written and read within it.
_REPLY_MARGIN_MS = 30.0


# Logins that are worked on at once (answers: see callerid). The rest wait for their turn in the order they came, so
# that in a storm those that are begun end within their budget instead of all of them being late together.
_AT_ONCE = 16
# Of one user: logins from a source that drops packets hold their turn for the whole of callerid's timeout.
_AT_ONCE_OF_ONE = 8


@dataclass(frozen=True)
class Desk:
    """What the handlers work with; replaced as a whole when the configuration is read again."""

    adoptions: Adoptions
    responder: Optional[Responder]
    control: Control
    callerid_timeout_ms: int


class Handlers:
    """The three handlers. ``desk`` gives the desk in force, asked once per request."""

    def __init__(self, desk: Callable[[], Desk], metrics: Metrics) -> None:
        self._desk = desk
        self._metrics = metrics
        self._logins = Turns(_AT_ONCE, _AT_ONCE_OF_ONE)

    async def pam(self, conversation: Conversation) -> None:
        """One phase of one login, asked by pam_adopt.so in sshd."""
        caller = Caller.of(conversation.sock)
        if caller.uid != 0:
            raise Refused(Refusal.NOT_ROOT, f"pid {caller.pid} is of uid {caller.uid}, only root may ask")
        record = await conversation.read_exactly(REQUEST_BYTES)
        conversation.heard()
        started = time.monotonic()
        try:
            request = decode_request(record)
        except ProtocolError as error:
            raise Refused(Refusal.MALFORMED, str(error)) from None
        deadline = Deadline.after_ms(max(request.timeout_ms - _REPLY_MARGIN_MS, request.timeout_ms / 2))
        try:
            process = open_peer(conversation.sock, caller.pid)
        except AdoptionFailed as error:
            raise Refused(Refusal.PROCESS_GONE, str(error)) from None
        with process:
            async with self._turn(request.uid, deadline):
                adoptions = self._desk().adoptions.at(request.nodename)
                reply, decision = await adoptions.serve(request, process, deadline)
            session = JobSession({}) if decision.session is None else decision.session
            try:
                await conversation.send(encode_reply(reply, len(session.descriptors)), session.descriptors)
            finally:
                session.close()
                # What was done is said also where the asker has gone meanwhile.
                seconds = time.monotonic() - started
                self._metrics.adoption_seconds.labels(request.phase.name.lower()).observe(seconds)
                _log_adoption(request, decision, caller.pid, seconds * 1000.0)

    @contextlib.asynccontextmanager
    async def _turn(self, uid: int, deadline: Deadline) -> AsyncIterator[None]:
        try:
            async with self._logins.taken(uid, deadline):
                yield
        except OutOfTime as error:
            raise Refused(Refusal.TOO_MANY, f"login of uid {uid}: {error}") from None

    async def peer(self, conversation: Conversation) -> None:
        """A callerid question of another node's agent."""
        responder, timeout_ms = self._desk().responder, self._desk().callerid_timeout_ms
        sealed = await conversation.read_frame(frame.CALLERID_MAX_BYTES)
        conversation.heard()
        started = time.monotonic()
        if responder is None:
            raise Refused(Refusal.UNAVAILABLE, "there is nothing to open seals with")
        reached_at = ipaddress.ip_address(str(conversation.sock.getsockname()[0]).partition("%")[0])
        deadline = Deadline.after_ms(timeout_ms)
        answer, settled = await responder.answer(sealed, reached_at, deadline)
        await conversation.send(frame.encode_frame(answer, frame.CALLERID_MAX_BYTES))
        witness = None if settled.job is None or settled.owner is None else settled.owner.witness
        seconds = time.monotonic() - started
        self._metrics.count_answered(settled.outcome, settled.reason.value, witness, seconds)
        log.info(
            "callerid_answered",
            peer=conversation.peer,
            outcome=settled.outcome.value,
            reason=settled.reason.value,
            job=None if settled.job is None else settled.job.id,
            witness=None if witness is None else witness.value,
            uid=None if settled.owner is None else settled.owner.uid,
            pid=None if settled.owner is None else settled.owner.pid,
            moved=settled.moved or None,
            hint=settled.hint,
            detail=settled.detail or None,
            latency_ms=seconds * 1000.0,
        )

    async def user(self, conversation: Conversation) -> None:
        """A command of adoptctl."""
        caller = Caller.of(conversation.sock)
        body = await conversation.read_frame(control_wire.COMMAND_MAX_BYTES)
        conversation.heard()
        try:
            command = control_wire.decode_command(body)
        except ProtocolError as error:
            raise Refused(Refusal.MALFORMED, str(error)) from None
        try:
            reply = control_wire.encode_result(await self._desk().control.execute(command, caller.uid))
        except AdoptdError as error:
            reply = control_wire.encode_error(str(error))
        await conversation.send(frame.encode_frame(reply, frame.CONTROL_MAX_BYTES))


def _log_adoption(request: PamRequest, decision: Decision, pid: int, latency_ms: float) -> None:
    log.info(
        "adoption",
        phase=request.phase.name.lower(),
        mode=request.mode.name.lower(),
        decision=decision.outcome,
        reason=decision.reason,
        witness=None if decision.witness is None else decision.witness.value,
        job=None if decision.job is None else decision.job.id,
        user=request.user,
        uid=request.uid,
        pid=pid,
        connection=None if request.connection is None else str(request.connection),
        service=request.service,
        stages="; ".join(f"{stage.name}: {stage.found}" for stage in decision.stages),
        latency_ms=latency_ms,
    )
