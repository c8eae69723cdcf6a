"""The source's side: the answer to another node's question, from the sealed bytes to the sealed bytes.

Owns the stages of an answer (:meth:`Responder.answer`), in the order that is the security argument: nothing is looked
up for somebody whose seal is not open, nothing is told that the asker may not know. What the answer is, is for the
inquiry. Called by the peers' door.
"""

from __future__ import annotations

import contextlib
import enum
import threading
import time
from dataclasses import dataclass
from typing import AsyncIterator, Callable, Hashable, Iterator, Optional, Tuple

from adoptd.callerid.inquiry import Inquiry, Look, Settled, reason_for
from adoptd.callerid.sealing import AGENT_UID, Refused, SealRoom
from adoptd.deadline import Deadline
from adoptd.metrics import Refusal
from adoptd.model import IPAddress, Job, ProtocolError, is_job_id
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
# Of them, how many wait for a turn. Each holds a place at the door, of the share that its address has there, and that
# is the share of the agent at that address as well. Not none: whoever waits is not asking anew, and what costs most is
# to open a seal.
USERS_WAITING = 120


class AnswerStage(enum.Enum):
    """What an answer's time is spent on; the values are a metric's label."""

    OPEN_SEAL = "open_seal"
    FIND_OWNER = "find_owner"
    SEAL_ANSWER = "seal_answer"


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
        self._users_waiting = 0
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
            async with self._turn(question, asker_uid, deadline):
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

    @contextlib.asynccontextmanager
    async def _turn(self, question: Question, asker_uid: int, deadline: Deadline) -> AsyncIterator[None]:
        """A turn for what takes longer. Raises OutOfTime, or Refused where too many of users' questions wait."""
        turn = _turn_of(question, asker_uid)
        if asker_uid == AGENT_UID:
            await self._turns.take(turn, deadline)
        elif self._users_waiting >= USERS_WAITING:
            raise Refused(Refusal.TOO_MANY, f"{self._users_waiting} questions of users' wait already")
        else:
            self._users_waiting += 1
            try:
                await self._turns.take(turn, deadline)
            finally:
                self._users_waiting -= 1
        try:
            yield
        finally:
            self._turns.give_back(turn)

    def _sealed(self, question: Question, settled: Settled, reader_uid: int) -> bytes:
        answer = Answer(
            nonce=question.nonce,
            responder=question.responder,
            connection=question.connection,
            outcome=settled.outcome,
            reason=reason_for(reader_uid, settled.reason),
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
