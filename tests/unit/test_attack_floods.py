"""Floods by an ordinary user: of questions and of nonsense. They delay and hide nothing that is not the user's own."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
import time
from typing import Iterator, List

import pytest
from fakes import ALICE, BOB, HERE, FakeBackend, FakeSeal, FakeWitness, connection, job, sample, soon, until
from logs import LogLines, log_lines

from adoptd import server
from adoptd.callerid import (
    SETTLED_AT_ONCE,
    SETTLED_AT_ONCE_OF_ONE,
    USERS_WAITING,
    Inquiry,
    Refused,
    Responder,
    SealRoom,
)
from adoptd.connections import Witnesses
from adoptd.deadline import Deadline
from adoptd.jobs import CgroupFinding, CgroupVerdict
from adoptd.metrics import Door, Metrics, Refusal
from adoptd.model import Owner, Witness
from adoptd.seal.replay import ReplayCache
from adoptd.server import Conversation, Doorkeeper
from adoptd.sockets import bind_tcp
from adoptd.wire.callerid import Outcome, Question, Reason, encode_question
from adoptd.workers import OutOfTime, Turns, Workers
from lab.waiting import DEADLINE_S

__all__ = ["log_lines"]

CGROUP = 4711
ALICES = connection()
UNKNOWN = connection(source_port=50000)
JOB = job("17")


def question(number: int, sealer: int, uid: int, known: bool = False) -> bytes:
    asked = Question(f"{number:032x}", ipaddress.ip_address("127.0.0.1"), ALICES if known else UNKNOWN, uid)
    return b"FAKE %d " % sealer + encode_question(asked)


@contextlib.contextmanager
def source_node(slow: threading.Event, replays: int = 1000) -> Iterator[Responder]:
    """A node that knows alice's connection at once, and needs ``slow`` to be set to say that it knows no other."""
    backend = FakeBackend(JOB)
    backend.of_cgroup[CGROUP] = CgroupVerdict(CgroupFinding.JOB, "test", JOB)
    fast = FakeWitness(Witness.BPF, {ALICES: Owner(Witness.BPF, ALICE, cgroup_id=CGROUP)})
    witnesses = Witnesses([fast, FakeWitness(Witness.PROC, may_block=True, hang=slow)], threads=8, pending_max=4096)
    workers = Workers("jobs", 4, 4096)
    try:
        seals = SealRoom(FakeSeal(), workers)
        yield Responder(Inquiry(witnesses, backend, workers), seals, ReplayCache(replays, time.time), 10, workers)
    finally:
        slow.set()
        workers.close()
        witnesses.close()


@pytest.mark.parametrize(
    ("sealer", "uid"),
    [pytest.param(BOB, BOB, id="asked by bob himself"), pytest.param(0, BOB, id="asked by root for bob's logins")],
)
def test_questions_that_cost_a_walk_delay_only_who_asks_them(gate: threading.Event, sealer: int, uid: int) -> None:
    """Otherwise 200 of bob's at once have every login of alice's answered too late, and it lands in her newest job."""

    async def main() -> None:
        with source_node(gate) as responder:
            flood = [
                asyncio.create_task(responder.answer(question(n, sealer, uid), HERE, soon()))
                for n in range(4 * SETTLED_AT_ONCE)
            ]
            await asyncio.sleep(0)
            started = time.monotonic()
            _, settled = await responder.answer(question(9999, 0, ALICE, known=True), HERE, soon())
            assert settled.outcome is Outcome.JOB
            assert time.monotonic() - started < DEADLINE_S / 2
            gate.set()
            await asyncio.gather(*flood, return_exceptions=True)

    asyncio.run(main())


def test_few_of_users_questions_wait_and_all_of_root_s(gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that waits holds one of the places that its address has, and so the agent there."""
    monkeypatch.setattr("adoptd.callerid.answering.USERS_WAITING", 8)
    few = 8 + SETTLED_AT_ONCE_OF_ONE

    async def main() -> None:
        with source_node(gate) as responder:
            flood = [asyncio.create_task(responder.answer(question(n, BOB, BOB), HERE, soon())) for n in range(3 * few)]
            await until(lambda: sum(each.done() for each in flood) >= 2 * few)
            refused = [each.exception() for each in flood if each.done()]
            assert {each.reason for each in refused if isinstance(each, Refused)} == {Refusal.TOO_MANY}
            root_s = [
                asyncio.create_task(responder.answer(question(100 + n, 0, BOB), HERE, soon())) for n in range(3 * few)
            ]
            gate.set()
            assert {settled.reason for _, settled in await asyncio.gather(*root_s)} == {Reason.NOT_FOUND}
            ended = await asyncio.gather(*flood, return_exceptions=True)
            assert sum(not isinstance(each, BaseException) for each in ended) >= 8, "those that waited are answered"
            # None that waited is counted any more.
            await responder.answer(question(200, BOB, BOB), HERE, soon())
            assert responder._users_waiting == 0

    asyncio.run(main())


def test_users_questions_leave_half_of_an_address_s_places() -> None:
    """With those that are being settled; the rest are its agent's."""
    assert USERS_WAITING + SETTLED_AT_ONCE_OF_ONE <= server.PEER_MAX_PER_ADDRESS // 2


def test_the_room_for_nonces_is_not_the_users_to_fill(gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full cache refuses what is new; whoever can seal could otherwise have agents refused."""
    monkeypatch.setattr("adoptd.callerid.answering._USERS_REPLAYS", 10)
    gate.set()

    async def main() -> None:
        with source_node(gate, replays=20) as responder:
            for number in range(10):
                await responder.answer(question(number, BOB, BOB), HERE, soon())
            for number in range(10, 30):
                with pytest.raises(Refused) as refusal:
                    await responder.answer(question(number, BOB, BOB), HERE, soon())
                assert refusal.value.reason is Refusal.UNAVAILABLE
            _, settled = await responder.answer(question(9999, 0, ALICE, known=True), HERE, soon())
            assert settled.outcome is Outcome.JOB
            with pytest.raises(Refused) as refusal:
                await responder.answer(question(3, 0, ALICE, known=True), HERE, soon())
            assert refusal.value.reason is Refusal.REPLAYED

    asyncio.run(main())


def test_a_turn_is_not_waited_for_past_the_deadline_and_is_given_back() -> None:
    """Also by who gave up waiting, and who failed while having it."""

    async def main() -> None:
        turns = Turns(SETTLED_AT_ONCE, SETTLED_AT_ONCE_OF_ONE)
        async with contextlib.AsyncExitStack() as held:
            for _ in range(SETTLED_AT_ONCE_OF_ONE):
                await held.enter_async_context(turns.taken(BOB, soon()))
            with pytest.raises(OutOfTime):
                async with turns.taken(BOB, Deadline.after_ms(20)):
                    raise AssertionError("one too many")
            async with turns.taken(ALICE, soon()):
                pass
        for _ in range(3 * SETTLED_AT_ONCE):
            with pytest.raises(ZeroDivisionError):
                async with turns.taken(BOB, soon()):
                    raise ZeroDivisionError
        assert not turns._held
        assert not turns._waiting

    asyncio.run(main())


def test_nonsense_by_the_thousand_is_counted_and_not_all_said(
    log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4600 lines a second were written for one user who connects and closes; the log is for what else happens."""

    async def never(conversation: Conversation) -> None:
        await conversation.read_exactly(4)

    async def main() -> None:
        metrics = Metrics()
        door = Doorkeeper(Door.PEER, bind_tcp(["127.0.0.1"], 0), never, metrics, 5.0, 100)
        address = door._sockets[0].getsockname()
        door.open()

        async def nonsense(times: int) -> None:
            before = refused()
            for _ in range(times):
                with socket.create_connection(address, timeout=60):
                    pass
                await asyncio.sleep(0)
            await until(lambda: refused() == before + times)

        def refused() -> float:
            return sample(metrics, "adoptd_messages_refused_total", socket="peer", reason="truncated")

        def said() -> List[str]:
            return [line for line in log_lines() if "reason=truncated" in line]

        try:
            await nonsense(10 * server.REFUSALS_LOGGED)
            assert len(said()) == server.REFUSALS_LOGGED
            monkeypatch.setattr(door._said, "_seconds", 0.0)
            await nonsense(1)
            assert said()[-1].endswith(f"unsaid={9 * server.REFUSALS_LOGGED}")
        finally:
            await door.close(1.0)

    asyncio.run(main())


def test_the_loopback_s_addresses_have_one_share_together() -> None:
    """A user of the node has sixteen million of them, each of which would be a peer with a share of its own."""

    async def story() -> None:
        peers: List[str] = []

        async def listen(conversation: Conversation) -> None:
            peers.append(conversation.peer)
            await conversation.read_exactly(1)

        metrics = Metrics()
        door = Doorkeeper(Door.PEER, bind_tcp(["127.0.0.1"], 0), listen, metrics, 30.0, 100, 3)
        address = door._sockets[0].getsockname()
        door.open()
        clients = []
        try:
            for number in range(1, 9):
                clients.append(socket.create_connection(address, timeout=60, source_address=(f"127.0.{number}.1", 0)))
            await until(lambda: sample(metrics, "adoptd_messages_refused_total", socket="peer", reason="too_many") == 5)
            assert set(peers) <= {"127.0.0.1"}
        finally:
            for client in clients:
                client.close()
            await door.close(5.0)

    asyncio.run(story())
