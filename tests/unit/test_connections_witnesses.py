"""Who is asked, in which order, and what is left behind when a witness fails, stalls, or nobody waits any more."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import List, Optional, Sequence, Union

import pytest
from fakes import longer, until
from hypothesis import given
from hypothesis import strategies as st

from adoptd import connections
from adoptd.connections import ConnectionWitness, Remark, Witnesses, agreed_owner
from adoptd.deadline import Deadline
from adoptd.model import Ambiguous, Connection, Endpoint, Owner, Witness, WitnessUnavailable

CONNECTION = Connection(Endpoint.parse("192.0.2.1:1"), Endpoint.parse("192.0.2.2:2"))
BUDGET_MS = 30_000
Answer = Union[Owner, Exception, None]

BPF_OWNER = Owner(Witness.BPF, 1001, pid=10, cgroup_id=100)
DIAG_OWNER = Owner(Witness.DIAG, 1001, cgroup_id=100)
PROC_OWNER = Owner(Witness.PROC, 1001, pid=10)


class FakeWitness:
    """Answers from a list, the last for ever; counts and notes the thread."""

    def __init__(self, name: Witness, *answers: Answer, may_block: bool = False) -> None:
        self.name, self.may_block = name, may_block
        self._answers = list(answers)
        self.threads: List[str] = []
        self.deadlines: List[Deadline] = []

    def owner_of(self, connection: Connection, deadline: Deadline) -> Optional[Owner]:
        assert connection == CONNECTION
        self.threads.append(threading.current_thread().name)
        self.deadlines.append(deadline)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


class StalledWitness:
    """Blocks until released, whatever its deadline says."""

    name = Witness.PROC
    may_block = True

    def __init__(self) -> None:
        self.released = threading.Event()
        self.started = 0
        self.finished = 0

    def owner_of(self, connection: Connection, deadline: Deadline) -> Optional[Owner]:
        self.started += 1
        assert self.released.wait(120), "the test did not release it"
        self.finished += 1
        return PROC_OWNER


def bpf(*answers: Answer) -> FakeWitness:
    return FakeWitness(Witness.BPF, *answers)


def diag(*answers: Answer) -> FakeWitness:
    return FakeWitness(Witness.DIAG, *answers)


def proc(*answers: Answer) -> FakeWitness:
    return FakeWitness(Witness.PROC, *answers, may_block=True)


def hear(*witnesses: ConnectionWitness, budget_ms: float = BUDGET_MS, slow: bool = False) -> connections.Testimony:
    """One question to a fresh set of witnesses; with ``slow`` the caller then asks for more."""
    heard = Witnesses(witnesses)
    try:
        return asyncio.run(_hear(heard, budget_ms, slow))
    finally:
        heard.close()


async def _hear(witnesses: Witnesses, budget_ms: float, slow: bool) -> connections.Testimony:
    deadline = Deadline.after_ms(budget_ms)
    testimony = await witnesses.testimony(CONNECTION, deadline)
    return await witnesses.slow_testimony(testimony, deadline) if slow else testimony


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_owners_agree_only_if_all_uids_are_one(uids: Sequence[int]) -> None:
    """The first is returned, or nobody: no majority, no preference."""
    owners = [Owner(Witness.BPF, uid, pid=pid) for pid, uid in enumerate(uids)]
    if len(set(uids)) > 1:
        with pytest.raises(Ambiguous):
            agreed_owner(owners)
    else:
        assert agreed_owner(owners) is owners[0]


def test_no_owners_cannot_agree() -> None:
    """None is not an agreement; the testimony says None instead."""
    with pytest.raises(ValueError, match="no owners"):
        agreed_owner([])
    assert connections.Testimony(CONNECTION).agreed_owner() is None


def test_witnesses_that_disagree_are_both_heard_and_neither_believed() -> None:
    """bpf says 1001, sock_diag says root."""
    heard = hear(bpf(BPF_OWNER), diag(Owner(Witness.DIAG, 0)))
    assert len(heard.owners) == 2
    with pytest.raises(Ambiguous, match="bpf says uid 1001, diag says uid 0"):
        heard.agreed_owner()


def test_one_witness_in_doubt_leaves_no_owner() -> None:
    """An owner named by another does not settle what one of them knows to be ambiguous."""
    slow = proc(PROC_OWNER)
    heard = hear(bpf(BPF_OWNER), diag(Ambiguous("two sockets")), slow)
    assert heard.ambiguous == (Remark(Witness.DIAG, "two sockets"),)
    assert slow.threads == []
    with pytest.raises(Ambiguous, match="diag: two sockets"):
        heard.agreed_owner()


def test_doubt_alone_is_not_taken_for_ignorance() -> None:
    """With no owner but an ambiguity the slow witnesses, who know less, are not asked to settle it."""
    slow = proc(PROC_OWNER)
    with pytest.raises(Ambiguous):
        hear(diag(Ambiguous("two sockets")), slow).agreed_owner()
    assert slow.threads == []


def test_a_witness_that_breaks_costs_only_itself() -> None:
    """Any exception is a witness that could not be asked, named with its type."""
    heard = hear(bpf(ZeroDivisionError("by zero")), diag(DIAG_OWNER))
    assert heard.owners == (DIAG_OWNER,)
    assert heard.unavailable == (Remark(Witness.BPF, "failed unexpectedly with ZeroDivisionError: by zero"),)
    assert heard.consulted == (Witness.DIAG,)


def test_without_time_nobody_is_asked() -> None:
    """Every witness is reported as not asked, and none is disturbed."""
    fast, slow = bpf(BPF_OWNER), proc(PROC_OWNER)
    heard = hear(fast, slow, budget_ms=-1)
    assert [remark.reason for remark in heard.unavailable] == ["no time left to ask"] * 2
    assert (heard.owners, fast.threads, slow.threads) == ((), [], [])


def test_fast_witnesses_are_all_asked_in_the_event_loop() -> None:
    """Also when the first named an owner: disagreement cannot be seen otherwise. The slow one is left alone."""
    first, second, slow = bpf(BPF_OWNER), diag(DIAG_OWNER), proc(PROC_OWNER)
    heard = hear(first, second, slow)
    assert first.threads == second.threads == [threading.current_thread().name]
    assert slow.threads == []
    assert heard == connections.Testimony(CONNECTION, (BPF_OWNER, DIAG_OWNER), (Witness.BPF, Witness.DIAG))
    assert heard.agreed_owner() == BPF_OWNER


@pytest.mark.parametrize("answer", [None, WitnessUnavailable("no tcp_diag")])
def test_the_slow_witness_is_asked_when_no_fast_one_knows(answer: Answer) -> None:
    """In a thread of its own pool, stopping a little before the asker does."""
    slow = proc(PROC_OWNER)
    heard = hear(diag(answer), slow)
    assert heard.owners == (PROC_OWNER,)
    assert heard.complete
    assert slow.threads[0].startswith("adoptd-witness")
    assert Witness.PROC in heard.consulted


def test_more_evidence_on_request() -> None:
    """A caller that cannot tell the job from what the fast ones know gets the rest, in the order of trust, once."""
    slow = proc(PROC_OWNER)
    heard = hear(slow, diag(DIAG_OWNER), slow=True)
    assert heard.owners == (PROC_OWNER, DIAG_OWNER)
    assert heard.consulted == (Witness.PROC, Witness.DIAG)
    assert heard.complete
    assert len(slow.threads) == 1
    assert len(hear(diag(None), proc(None), slow=True).consulted) == 2


def test_a_complete_testimony_is_not_asked_for_again() -> None:
    """testimony() asked the slow witness already; slow_testimony() returns the same."""
    slow = proc(None)
    assert hear(diag(None), slow, slow=True).complete
    assert len(slow.threads) == 1


def test_the_slow_witness_gets_an_earlier_deadline() -> None:
    """So that its own words about how far it came arrive in time."""
    slow = proc(None)
    witnesses = Witnesses([slow])
    deadline = Deadline.after_ms(BUDGET_MS)
    asyncio.run(witnesses.testimony(CONNECTION, deadline))
    witnesses.close()
    assert slow.deadlines[0].at_s < deadline.at_s


def test_a_stalled_witness_does_not_hold_its_asker() -> None:
    """The asker goes on at its deadline; the event loop was free meanwhile."""

    async def scenario() -> None:
        stalled = StalledWitness()
        witnesses = Witnesses([stalled])
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.ensure_future(tick())
        # One that no thread has begun by then is not asked at all.
        for ms in longer(100):
            heard = await witnesses.testimony(CONNECTION, Deadline.after_ms(ms))
            if stalled.started:
                break
        ticking.cancel()
        assert heard.unavailable == (Remark(Witness.PROC, "no answer in time"),)
        assert ticks > 1
        assert stalled.finished == 0
        witnesses.close()
        assert witnesses.pending == 1
        stalled.released.set()
        await until(lambda: stalled.finished == 1 and not witnesses.pending)

    asyncio.run(scenario())


def test_a_cancelled_asker_leaves_its_place_taken_until_the_thread_is_done() -> None:
    """Otherwise askers that hang up at once would pile up work without bound."""

    async def scenario() -> None:
        stalled = StalledWitness()
        witnesses = Witnesses([stalled], threads=1, pending_max=1)

        def ask(budget_ms: float = BUDGET_MS) -> asyncio.Future[connections.Testimony]:
            return asyncio.ensure_future(witnesses.testimony(CONNECTION, Deadline.after_ms(budget_ms)))

        asker = ask()
        await until(lambda: stalled.started == 1)
        asker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asker
        refused = await ask()
        assert refused.unavailable == (Remark(Witness.PROC, "too many questions are waiting for it"),)
        stalled.released.set()
        await until(lambda: stalled.finished == 1)

        async def answered() -> bool:
            return (await ask()).owners == (PROC_OWNER,)

        end = time.monotonic() + 60
        while not await answered():
            assert time.monotonic() < end, "the place was never given back"
        witnesses.close()

    asyncio.run(scenario())


def test_a_cancelled_question_that_waits_for_a_thread_is_never_asked() -> None:
    """Its place is free at once, and its work is not done for nobody."""

    async def scenario() -> None:
        stalled = StalledWitness()
        witnesses = Witnesses([stalled], threads=1, pending_max=2)

        def ask() -> asyncio.Future[connections.Testimony]:
            return asyncio.ensure_future(witnesses.testimony(CONNECTION, Deadline.after_ms(BUDGET_MS)))

        first, second = ask(), ask()
        await until(lambda: stalled.started == 1)
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        third = ask()
        stalled.released.set()
        assert (await first).owners == (await third).owners == (PROC_OWNER,)
        witnesses.close()
        await until(lambda: not witnesses.pending)
        assert stalled.started == stalled.finished == 2

    asyncio.run(scenario())


def test_closed_witnesses_refuse_instead_of_raising() -> None:
    """A question that comes during shutdown is answered without the slow ones."""
    witnesses = Witnesses([proc(PROC_OWNER)])
    witnesses.close()
    heard = asyncio.run(witnesses.testimony(CONNECTION, Deadline.after_ms(BUDGET_MS)))
    assert heard.owners == ()
    assert heard.unavailable[0].witness is Witness.PROC


def test_a_change_of_state_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A hundred questions to a witness that is away make one line, its return another, flapping in between none."""
    now_s = 0.0
    gone = WitnessUnavailable("no tcp_diag")
    witness = diag(*[gone] * 100, None, *[gone, None] * 50, None)
    witnesses = Witnesses([witness], clock=lambda: now_s)

    async def ask(times: int) -> None:
        for _ in range(times):
            await witnesses.testimony(CONNECTION, Deadline.after_ms(BUDGET_MS))

    with caplog.at_level(logging.INFO):
        asyncio.run(ask(202))
        assert caplog.messages == ['witness_unavailable witness=diag error="no tcp_diag"']
        now_s = 61.0
        asyncio.run(ask(2))
    witnesses.close()
    assert caplog.messages[1:] == ["witness_answers_again witness=diag"]


def test_lack_of_time_is_no_change_of_state(caplog: pytest.LogCaptureFixture) -> None:
    """An asker without time says nothing about the witness."""
    hear(diag(None), budget_ms=-1)
    assert caplog.messages == []
