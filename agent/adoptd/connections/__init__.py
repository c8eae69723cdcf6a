"""Who owns a TCP connection: the witnesses, and the one place that hears them all.

Owns the ConnectionWitness interface, the Testimony that a hearing ends with, and the rule for when
witnesses agree. Never decides which job an owner is in and never picks between two answers: a wrong
owner is worse than none. Called by the callerid stage.

Witnesses that answer in microseconds are asked where the caller is, in whichever thread, all of them, on every
question. Those that may block are asked in a bounded pool of threads, when no fast one named an owner or
when the caller says that what the fast ones know is not enough to tell the job.
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from typing import Callable, Dict, Optional, Protocol, Sequence, Tuple

from adoptd import log
from adoptd.deadline import Deadline
from adoptd.model import Ambiguous, Connection, Owner, Witness, WitnessUnavailable
from adoptd.workers import OutOfTime, Overloaded, Workers

# A walk through /proc is system calls that hold kernel locks and the interpreter in turns: two at once keep
# a slow one from delaying everybody, more would only slow each other and the event loop down.
BLOCKING_THREADS = 2
# Questions that may wait for a thread. Each waits no longer than its own deadline, so this bounds memory, not time.
BLOCKING_PENDING_MAX = 64
# A blocking witness stops this much before its asker, so that its own account of how far it came is heard.
HANDOVER_S = 0.005
# A witness that fails for some connections and not for others must not write a line for each of them.
QUIET_S = 60.0


class ConnectionWitness(Protocol):
    """One source of knowledge about who owns connections.

    A witness answers about the connection's socket on this host, whichever address family that
    socket is of, and in whichever namespace or spelling (before source NAT, say) it knows it by.
    """

    @property
    def name(self) -> Witness:
        """Its name in answers, metrics and the log."""
        ...

    @property
    def may_block(self) -> bool:
        """False: done in microseconds, in any thread, by several at once. True: asked in a thread of the pool."""
        ...

    def owner_of(self, connection: Connection, deadline: Deadline) -> Optional[Owner]:
        """The owner, or None: this witness does not know this connection.

        Raises WitnessUnavailable (it could not be asked, or not to the end) and Ambiguous (it knows
        more than one owner).
        """
        ...


class Disagreement(Ambiguous):
    """Two witnesses name different users. Says what each named."""


@dataclass(frozen=True)
class Remark:
    """Why one witness named nobody."""

    witness: Witness
    reason: str


@dataclass(frozen=True)
class Testimony:
    """What the witnesses said about one connection, each tuple in the order of trust.

    ``consulted`` heard the question to the end, whether or not they knew the connection;
    ``unavailable`` and ``ambiguous`` are the rest of those asked. ``complete``: no witness is left to ask.
    """

    connection: Connection
    owners: Tuple[Owner, ...] = ()
    consulted: Tuple[Witness, ...] = ()
    unavailable: Tuple[Remark, ...] = ()
    ambiguous: Tuple[Remark, ...] = ()
    complete: bool = False

    def agreed_owner(self) -> Optional[Owner]:
        """The owner all witnesses agree on, or None if none named one. Raises Ambiguous.

        Agreement is about the uid. Whether all ``owners`` are in one job is for the caller to compare,
        by the pid and cgroup id of each.
        """
        if self.ambiguous:
            doubts = "; ".join(f"{remark.witness.value}: {remark.reason}" for remark in self.ambiguous)
            raise Ambiguous(f"{self.connection} has no certain owner ({doubts})")
        return agreed_owner(self.owners) if self.owners else None


def agreed_owner(owners: Sequence[Owner]) -> Owner:
    """The first, most trusted of ``owners`` if all have one uid.

    Raises Disagreement if they have not, ValueError if there is none.
    """
    if not owners:
        raise ValueError("no owners to agree")
    if len({owner.uid for owner in owners}) > 1:
        words = ", ".join(f"{owner.witness.value} says uid {owner.uid}" for owner in owners)
        raise Disagreement(f"witnesses disagree: {words}")
    return owners[0]


@dataclass(frozen=True)
class _Answer:
    """One witness's answer. Both fields None: it does not know the connection."""

    owner: Optional[Owner] = None
    refusal: Optional[str] = None
    ambiguous: bool = False
    # Its reason is about this moment (no time, no thread) and says nothing about the witness's health.
    not_asked: bool = False


_NO_TIME = _Answer(refusal="no time left to ask", not_asked=True)


class Witnesses:
    """All witnesses of this host, in the order of trust. One per agent; what is a coroutine is for one event loop."""

    def __init__(
        self,
        witnesses: Sequence[ConnectionWitness],
        *,
        threads: int = BLOCKING_THREADS,
        pending_max: int = BLOCKING_PENDING_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._witnesses = tuple(witnesses)
        self._clock = clock
        self._workers = Workers("adoptd-witness", threads, pending_max)
        # What the log last said of each witness, and when (seconds on the clock).
        self._reported: Dict[Witness, Tuple[Optional[str], float]] = {}
        self._reporting = threading.Lock()

    def fast_testimony(self, connection: Connection, deadline: Deadline) -> Testimony:
        """Ask the fast witnesses, here and now, in any thread. Never raises: what went wrong is in the result."""
        answers: Dict[Witness, _Answer] = {}
        for witness in self._witnesses:
            if not witness.may_block:
                answers[witness.name] = _ask(witness, connection, deadline)
        return self._testimony(connection, answers)

    async def testimony(self, connection: Connection, deadline: Deadline) -> Testimony:
        """Ask the fast witnesses, and the blocking ones if no fast one had anything to say of an owner.

        Raises nothing but CancelledError: what went wrong with a witness is in the result.
        """
        heard = self.fast_testimony(connection, deadline)
        if heard.owners or heard.ambiguous:
            return heard
        return await self.slow_testimony(heard, deadline)

    async def slow_testimony(self, earlier: Testimony, deadline: Deadline) -> Testimony:
        """``earlier`` and what the blocking witnesses add to it: for a caller that could not tell the job.

        A complete testimony is returned as it is, so that nothing is asked twice. Raises nothing but CancelledError.
        """
        if earlier.complete:
            return earlier
        slow = [witness for witness in self._witnesses if witness.may_block]
        found = await asyncio.gather(*(self._ask_in_thread(witness, earlier.connection, deadline) for witness in slow))
        answers = {witness.name: answer for witness, answer in zip(slow, found)}
        return _merge(earlier, self._testimony(earlier.connection, answers), [w.name for w in self._witnesses])

    @property
    def pending(self) -> int:
        """Questions to the slow ones that are under way or waiting, those that nobody waits for any more included."""
        return self._workers.pending

    def close(self) -> None:
        """Ask the slow ones no more. Who is being asked is not waited for: each has a deadline."""
        self._workers.close()

    async def _ask_in_thread(self, witness: ConnectionWitness, connection: Connection, deadline: Deadline) -> _Answer:
        if deadline.expired:
            return _NO_TIME
        begun = False

        def ask() -> _Answer:
            nonlocal begun
            begun = True
            return _ask(witness, connection, Deadline(deadline.at_s - HANDOVER_S))

        try:
            return await self._workers.run(ask, deadline)
        except Overloaded:
            return _Answer(refusal="too many questions are waiting for it", not_asked=True)
        except OutOfTime:
            return _Answer(refusal="no answer in time", not_asked=not begun)

    def _testimony(self, connection: Connection, answers: Dict[Witness, _Answer]) -> Testimony:
        for name, answer in answers.items():
            if not answer.not_asked:
                self._report(name, None if answer.ambiguous else answer.refusal)
        asked = answers.items()
        return Testimony(
            connection=connection,
            owners=tuple(answer.owner for _, answer in asked if answer.owner is not None),
            consulted=tuple(name for name, answer in asked if answer.refusal is None),
            unavailable=tuple(Remark(n, a.refusal) for n, a in asked if a.refusal is not None and not a.ambiguous),
            ambiguous=tuple(Remark(n, a.refusal) for n, a in asked if a.refusal is not None and a.ambiguous),
            complete=len(answers) == len(self._witnesses),
        )

    def _report(self, witness: Witness, refusal: Optional[str]) -> None:
        """Log that a witness became unavailable, or available again: once, and at most once per QUIET_S."""
        with self._reporting:
            said, said_at_s = self._reported.get(witness, (None, float("-inf")))
            now_s = self._clock()
            if (refusal is None) == (said is None) or now_s - said_at_s < QUIET_S:
                return
            self._reported[witness] = (refusal, now_s)
        if refusal is None:
            log.info("witness_answers_again", witness=witness.value)
        else:
            log.warning("witness_unavailable", witness=witness.value, error=refusal)


def _ask(witness: ConnectionWitness, connection: Connection, deadline: Deadline) -> _Answer:
    """Never raises: a fault in one witness must not cost the request the others."""
    if deadline.expired:
        return _NO_TIME
    try:
        return _Answer(owner=witness.owner_of(connection, deadline))
    except Ambiguous as error:
        return _Answer(refusal=str(error), ambiguous=True)
    except WitnessUnavailable as error:
        return _Answer(refusal=str(error))
    except Exception as error:
        return _Answer(refusal=f"failed unexpectedly with {type(error).__name__}: {error}")


def _merge(earlier: Testimony, later: Testimony, order: Sequence[Witness]) -> Testimony:
    rank = order.index

    def remarks(first: Tuple[Remark, ...], second: Tuple[Remark, ...]) -> Tuple[Remark, ...]:
        return tuple(sorted(first + second, key=lambda remark: rank(remark.witness)))

    return Testimony(
        connection=earlier.connection,
        owners=tuple(sorted(earlier.owners + later.owners, key=lambda owner: rank(owner.witness))),
        consulted=tuple(sorted(earlier.consulted + later.consulted, key=rank)),
        unavailable=remarks(earlier.unavailable, later.unavailable),
        ambiguous=remarks(earlier.ambiguous, later.ambiguous),
        complete=True,
    )
