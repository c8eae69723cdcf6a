"""What happens behind each door: from a message's bytes to the reply, and the line in the log.

Owns the order: who is calling, then the message, then the deadline, then the work. Called by the
doorkeepers of :mod:`adoptd.server`; the work is done by callerid, adoption and control.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import time
from collections import Counter
from dataclasses import dataclass
from typing import AsyncIterator, Callable, Dict, List, Optional, Sequence, Tuple

from adoptd import log
from adoptd.adoption import Adoptions
from adoptd.callerid import Refused, Responder
from adoptd.control import ABOUT_THE_CALLER, COMMAND_MS, WATCH, Asking, CommandRefused, Control
from adoptd.deadline import Deadline
from adoptd.decision import Decision, Stage
from adoptd.events import Event, EventKind, Events
from adoptd.jobs import JobSession
from adoptd.metrics import Metrics, Refusal
from adoptd.model import AdoptdError, AdoptionFailed, OutOfDescriptors, ProtocolError
from adoptd.policy import Step
from adoptd.process import ProcessHandle, open_peer
from adoptd.ration import Ration
from adoptd.server import USER_MAX_PER_UID, Conversation, PeerGone
from adoptd.sockets import Caller
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
# Answers to one peer that the log has within so many seconds: a storm of logins whole, a flood of questions not.
ANSWERS_SAID = 300
ANSWERS_SAID_S = 10.0
_PEERS_REMEMBERED = 4096

# Commands of one user, root's excepted, are carried out one after the other: what they wait for is shared by all.
_COMMANDS_AT_ONCE = 8
_COMMANDS_OF_ONE = 1


@dataclass(frozen=True)
class Desk:
    """What the handlers work with; replaced as a whole when the configuration is read again."""

    adoptions: Adoptions
    responder: Optional[Responder]
    control: Control
    callerid_timeout_ms: int


class Handlers:
    """The three handlers. ``desk`` gives the desk in force, asked once per request."""

    def __init__(self, desk: Callable[[], Desk], metrics: Metrics, events: Events) -> None:
        self._desk = desk
        self._metrics = metrics
        self._events = events
        self._logins = Turns(_AT_ONCE, _AT_ONCE_OF_ONE)
        self._answers_said = Ration(ANSWERS_SAID, ANSWERS_SAID_S, _PEERS_REMEMBERED, time.monotonic)
        self._commands = Turns(_COMMANDS_AT_ONCE, _COMMANDS_OF_ONE)
        # Commands under way or waiting, by uid; root's are not counted.
        self._waiting: Counter[int] = Counter()

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
        except OutOfDescriptors as error:
            raise Refused(Refusal.UNAVAILABLE, str(error)) from None
        except AdoptionFailed as error:
            raise Refused(Refusal.PROCESS_GONE, str(error)) from None
        with process:
            async with self._turn(request.uid, deadline):
                conversation.check_peer()
                adoptions = self._desk().adoptions.at(request.nodename)
                reply, decision = await adoptions.serve(request, process, deadline)
            session = JobSession({}) if decision.session is None else decision.session
            try:
                await conversation.send(encode_reply(reply, len(session.descriptors)), session.descriptors)
            finally:
                session.close()
                adoptions.after_reply(request, decision)
                # What was done is said also where the asker has gone meanwhile.
                seconds = time.monotonic() - started
                self._metrics.observe_login(
                    request.phase.name.lower(),
                    seconds,
                    request.timeout_ms / 1000.0,
                    _stage_times(decision.stages),
                    decision.story.request_id,
                )
                self._tell_adoption(request, decision, caller.pid, seconds * 1000.0)

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
        answer, settled = await responder.answer(sealed, reached_at, deadline, conversation.peer)
        await conversation.send(frame.encode_frame(answer, frame.CALLERID_MAX_BYTES))
        witness = None if settled.job is None or settled.owner is None else settled.owner.witness
        seconds = time.monotonic() - started
        self._metrics.count_answered(settled.outcome, settled.reason.value, witness, seconds)
        uid = None if settled.owner is None else settled.owner.uid
        fields: Dict[str, log.Field] = {
            "peer": conversation.peer,
            "outcome": settled.outcome.value,
            "reason": settled.reason.value,
            "job": None if settled.job is None else settled.job.id,
            "witness": None if witness is None else witness.value,
            "uid": uid,
            "pid": None if settled.owner is None else settled.owner.pid,
            "moved": settled.moved or None,
            "hint": settled.hint,
            "detail": settled.detail or None,
            "latency_ms": seconds * 1000.0,
        }
        unsaid = self._answers_said.take(conversation.peer)
        if unsaid is not None:
            log.info("callerid_answered", **fields, unsaid=unsaid or None)
        self._events.publish(Event(EventKind.CALLERID, uid, fields))

    async def user(self, conversation: Conversation) -> None:
        """A command of adoptctl."""
        caller = Caller.of(conversation.sock)
        body = await conversation.read_frame(control_wire.COMMAND_MAX_BYTES)
        conversation.heard()
        try:
            command = control_wire.decode_command(body)
        except ProtocolError as error:
            raise Refused(Refusal.MALFORMED, str(error)) from None
        # Before it waits for anything: the kernel has the process's own pidfd only while it lives.
        process = _held(conversation, caller) if command.name in ABOUT_THE_CALLER else None
        try:
            asking = Asking(caller.uid, process)
            if command.name == WATCH:
                await self._watch(conversation, command, asking)
                return
            try:
                async with self._command_turn(caller.uid):
                    reply = control_wire.encode_result(await self._desk().control.execute(command, asking))
            except AdoptdError as error:
                reply = control_wire.encode_error(str(error))
            if len(reply) > frame.CONTROL_MAX_BYTES:
                words = f"the answer has {len(reply)} bytes, and no more than {frame.CONTROL_MAX_BYTES} can be sent"
                reply = control_wire.encode_error(words)
            await conversation.send(frame.encode_frame(reply, frame.CONTROL_MAX_BYTES))
        finally:
            if process is not None:
                process.close()

    @contextlib.asynccontextmanager
    async def _command_turn(self, uid: int) -> AsyncIterator[None]:
        if uid == 0:
            yield
            return
        if self._waiting[uid] >= USER_MAX_PER_UID:
            # Each that waits keeps a connection open, and logins need descriptors too.
            raise CommandRefused(f"{self._waiting[uid]} commands of yours are being carried out already")
        self._waiting[uid] += 1
        try:
            async with self._commands.taken(uid, Deadline.after_ms(COMMAND_MS)):
                yield
        except OutOfTime as error:
            raise CommandRefused(f"commands of yours are still being carried out: {error}") from None
        finally:
            self._waiting[uid] -= 1
            if not self._waiting[uid]:
                del self._waiting[uid]

    async def _watch(self, conversation: Conversation, command: control_wire.Command, asking: Asking) -> None:
        """Send events until the watcher goes or the agent stops. A watcher who does not read loses events, not us."""
        sending = asyncio.ensure_future(self._send_events(conversation, command, asking))
        leaving = asyncio.ensure_future(conversation.read_exactly(1))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
            ended = await asyncio.gather(sending, leaving, return_exceptions=True)
        if isinstance(ended[0], Exception) and not isinstance(ended[0], PeerGone):
            raise ended[0]

    async def _send_events(self, conversation: Conversation, command: control_wire.Command, asking: Asking) -> None:
        loop = asyncio.get_running_loop()
        watching = self._desk().control.watch(command, asking)
        try:
            async for result in watching:
                data = frame.encode_frame(control_wire.encode_result(result), frame.CONTROL_MAX_BYTES)
                await loop.sock_sendall(conversation.sock, data)
        except AdoptdError as error:
            await conversation.send(frame.encode_frame(control_wire.encode_error(str(error)), frame.CONTROL_MAX_BYTES))
        except OSError as error:
            raise PeerGone(error.errno, error.strerror) from None
        finally:
            await watching.aclose()

    def _tell_adoption(self, request: PamRequest, decision: Decision, pid: int, latency_ms: float) -> None:
        """The line in the log, and the event."""
        fields = _adoption_fields(request, decision, pid, latency_ms)
        log.info("adoption", **fields)
        kind = EventKind.DENIAL if decision.step is Step.DENY else EventKind.ADOPTION
        self._events.publish(Event(kind, request.uid, fields))


def _held(conversation: Conversation, caller: Caller) -> Optional[ProcessHandle]:
    """The process that connected; None if it has ended, or is of a pid namespace that ours does not see."""
    try:
        return open_peer(conversation.sock, caller.pid)
    except AdoptionFailed:
        return None


def _stage_times(stages: Sequence[Stage]) -> List[Tuple[str, float]]:
    """Name and seconds of each: a stage is noted when it ends, so it took what has gone by since the one before."""
    ends = [stage.at_ms for stage in stages]
    return [(stage.name, (end - begun) / 1000.0) for stage, begun, end in zip(stages, [0.0, *ends], ends)]


def _adoption_fields(request: PamRequest, decision: Decision, pid: int, latency_ms: float) -> Dict[str, log.Field]:
    return {
        "phase": request.phase.name.lower(),
        "mode": request.mode.name.lower(),
        "decision": decision.outcome,
        "reason": decision.reason,
        "witness": None if decision.witness is None else decision.witness.value,
        "job": None if decision.job is None else decision.job.id,
        "because": None if decision.story.because in ("", decision.reason) else decision.story.because,
        "user": request.user,
        "uid": request.uid,
        "pid": pid,
        "connection": None if request.connection is None else str(request.connection),
        "service": request.service,
        "remote": None if request.connection is None else str(request.connection.source.address),
        "faults": ",".join(fault.value for fault in decision.faults) or None,
        "stages": "; ".join(f"{stage.name}: {stage.found}" for stage in decision.stages),
        "latency_ms": latency_ms,
        "request": decision.story.request_id,
    }
