"""Callerid on both sides: what is refused, what is not believed, what is not told, and then what is."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import AsyncIterator, Awaitable, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from fakes import ALICE, BOB, HERE, FakeBackend, FakeSeal, FakeWitness, connection, job, sample, soon

from adoptd import __version__
from adoptd.callerid import (
    OPENED_AT_ONCE,
    OPENED_AT_ONCE_OF_ONE,
    SETTLED_AT_ONCE_OF_ONE,
    Asker,
    AskFault,
    Inquiry,
    Peer,
    Refused,
    Responder,
    SealRoom,
    Settled,
    Told,
)
from adoptd.connections import Witnesses
from adoptd.deadline import Deadline
from adoptd.jobs import CgroupFinding, CgroupVerdict
from adoptd.metrics import Metrics, Refusal
from adoptd.model import Ambiguous, Connection, Job, JobManagerError, Owner, Witness, WitnessUnavailable
from adoptd.seal import SealError, SealFault
from adoptd.seal.key import KeySeal
from adoptd.seal.replay import ReplayCache
from adoptd.slurm_callerid import SlurmdFault
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
from adoptd.workers import Workers
from lab.waiting import DEADLINE_S

ENDS = connection()
NONCE = "0123456789abcdef" * 2
# For so long a fake hangs that is not let go on, and for so long a peer is waited for that need not be.
HANGS_S = DEADLINE_S
PATIENT_MS = int(HANGS_S * 1000)
CGROUP = 4711
JOB_A = job("17")
JOB_B = job("18")


def boottime_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def owner(
    uid: int = ALICE,
    witness: Witness = Witness.BPF,
    pid: Optional[int] = None,
    cgroup: Optional[int] = CGROUP,
    connected: Optional[int] = None,
) -> Owner:
    return Owner(witness, uid, pid, cgroup, connected)


def in_job(found: Optional[object]) -> CgroupVerdict:
    if found is None:
        return CgroupVerdict(CgroupFinding.NO_JOB, "test")
    return CgroupVerdict(CgroupFinding.JOB, "test", found)  # type: ignore[arg-type]


class Node:
    """A source node: its witnesses, jobs and seal, and what its responder says."""

    def __init__(self, *witnesses: FakeWitness, seal: Optional[object] = None) -> None:
        self.backend = FakeBackend(JOB_A, JOB_B)
        self.backend.of_cgroup[CGROUP] = in_job(JOB_A)
        self.workers = Workers("jobs", 4, 16)
        self.witnesses = Witnesses(witnesses)
        self.seal = FakeSeal() if seal is None else seal
        self.inquiry = Inquiry(self.witnesses, self.backend, self.workers)
        rooms = SealRoom(self.seal, self.workers)  # type: ignore[arg-type]
        self.responder = Responder(self.inquiry, rooms, ReplayCache(100, time.time), 10, self.workers)

    def settle(self, login_uid: Optional[int] = ALICE, ms: float = 30_000.0) -> Settled:
        return asyncio.run(self.inquiry.settle(ENDS, login_uid, Deadline.after_ms(ms)))

    def answer(self, sealed: bytes, ms: float = 30_000.0) -> Tuple[bytes, Settled]:
        return asyncio.run(self.responder.answer(sealed, HERE, Deadline.after_ms(ms)))

    def close(self) -> None:
        self.workers.close()
        self.witnesses.close()


@pytest.fixture
def node() -> Iterator[Callable[..., Node]]:
    """Makes nodes, and closes them."""
    with contextlib.ExitStack() as stack:

        def make(*witnesses: FakeWitness, seal: Optional[object] = None) -> Node:
            made = Node(*witnesses, seal=seal)
            stack.callback(made.close)
            return made

        yield make


def bpf(found: Optional[Owner] = None) -> FakeWitness:
    return FakeWitness(Witness.BPF, {ENDS: owner() if found is None else found})


def question(uid: Optional[int] = ALICE, nonce: str = NONCE, to: str = "127.0.0.1") -> bytes:
    return encode_question(Question(nonce, ipaddress.ip_address(to), ENDS, uid))


def sealed_by(uid: int, payload: bytes) -> bytes:
    return b"FAKE %d " % uid + payload


NodeMaker = Callable[..., Node]


# ---- the responder: who gets nothing at all


@pytest.mark.parametrize("fault", list(SealFault))
def test_a_seal_that_does_not_open_is_refused_by_its_fault(node: NodeMaker, fault: SealFault) -> None:
    """Before anything is read or looked up; every fault of a seal is a reason of the metric."""
    seal, witness = FakeSeal(), bpf()
    seal.open_fault = fault
    there = node(witness, seal=seal)
    with pytest.raises(Refused) as refusal:
        there.answer(sealed_by(0, question()))
    assert refusal.value.reason is Refusal(fault.value)
    assert witness.asked == []


def test_a_seal_service_that_hangs_is_out_of_time(node: NodeMaker, gate: threading.Event) -> None:
    """A stuck munged costs one question its deadline."""
    seal = FakeSeal(may_block=True)
    seal.hang = gate
    started = time.monotonic()
    with pytest.raises(Refused) as refusal:
        node(bpf(), seal=seal).answer(sealed_by(0, question()), ms=50)
    assert refusal.value.reason is Refusal.UNAVAILABLE
    assert time.monotonic() - started < HANGS_S / 2


@pytest.mark.parametrize(
    "payload",
    [
        b"x",
        b"{}",
        b"[" * 1000,
        question().replace(b'"v":1', b'"v":true'),
        question()[:-1],
        encode_answer(Answer(NONCE, HERE, ENDS, Outcome.UNKNOWN, Reason.NOT_FOUND)),
    ],
)
def test_a_genuine_seal_over_no_question_is_malformed(node: NodeMaker, payload: bytes) -> None:
    """The seal says who speaks, not that it makes sense; an answer of ours sent back to us is no question."""
    witness = bpf()
    with pytest.raises(Refused) as refusal:
        node(witness).answer(sealed_by(0, payload))
    assert refusal.value.reason is Refusal.MALFORMED
    assert witness.asked == []


def test_a_question_of_another_version_is_refused_as_that(node: NodeMaker) -> None:
    """On call, half-way through an upgrade: no attack, and no fault of the network's."""
    witness = bpf()
    with pytest.raises(Refused, match="version 2 of the protocol, expected 1") as refusal:
        node(witness).answer(sealed_by(0, question().replace(b'"v":1', b'"v":2')))
    assert refusal.value.reason is Refusal.OTHER_VERSION
    assert witness.asked == []


def test_a_question_for_another_node_is_refused(node: NodeMaker) -> None:
    """A sealed question carried here from the node it was meant for."""
    witness = bpf()
    with pytest.raises(Refused, match=r"question for 127\.0\.0\.2 arrived at 127\.0\.0\.1") as refusal:
        node(witness).answer(sealed_by(0, question(to="127.0.0.2")))
    assert refusal.value.reason is Refusal.WRONG_HOST
    assert witness.asked == []


def test_a_question_seen_before_is_refused(node: NodeMaker) -> None:
    """Under every scheme, and also in a new seal: the nonce is what counts."""
    there = node(bpf())
    there.answer(sealed_by(0, question()))
    with pytest.raises(Refused) as refusal:
        there.answer(sealed_by(1001, question()))
    assert refusal.value.reason is Refusal.REPLAYED
    assert there.answer(sealed_by(0, question(nonce=NONCE[::-1])))[1].outcome is Outcome.JOB


def test_a_flood_of_questions_is_unavailable_and_not_replayed(node: NodeMaker) -> None:
    """With no room for another nonce nothing more is answered: forgetting an old one would let it be replayed."""
    there = node(bpf())
    nonces = [f"{number:032x}" for number in range(101)]
    for nonce in nonces[:100]:
        there.answer(sealed_by(0, question(nonce=nonce)))
    with pytest.raises(Refused) as refusal:
        there.answer(sealed_by(0, question(nonce=nonces[100])))
    assert refusal.value.reason is Refusal.UNAVAILABLE
    with pytest.raises(Refused) as refusal:
        there.answer(sealed_by(0, question(nonce=nonces[0])))
    assert refusal.value.reason is Refusal.REPLAYED


def test_a_question_for_another_node_does_not_use_its_nonce_up(node: NodeMaker) -> None:
    """Refused for its address, it can still be asked where it belongs."""
    there = node(bpf())
    with pytest.raises(Refused):
        there.answer(sealed_by(0, question(to="127.0.0.2")))
    assert there.answer(sealed_by(0, question()))[1].outcome is Outcome.JOB


# ---- the responder: who is told "unknown"


def test_only_root_may_ask_about_others(node: NodeMaker) -> None:
    """An ordinary user who seals a question about somebody else, or about anybody, costs no look-up."""
    witness = bpf()
    there = node(witness)
    for nonce, uid in ((NONCE, ALICE), (NONCE[::-1], None), ("0" * 32, 0)):
        sealed, settled = there.answer(sealed_by(BOB, question(uid, nonce)))
        told = decode_answer(sealed.split(b" ", 2)[2])
        assert (settled.outcome, settled.reason) == (Outcome.UNKNOWN, Reason.NOT_ALLOWED)
        assert (told.outcome, told.reason, told.job_id, told.witness) == (
            Outcome.UNKNOWN,
            Reason.NOT_ALLOWED,
            None,
            None,
        )
    assert witness.asked == []


def test_a_user_may_ask_about_their_own(node: NodeMaker) -> None:
    """And gets the answer sealed for themselves."""
    seal = FakeSeal()
    _, settled = node(bpf(), seal=seal).answer(sealed_by(ALICE, question(ALICE)))
    assert settled.job == JOB_A
    assert seal.sealed_for == [ALICE]


@pytest.mark.parametrize(
    ("login", "of_process", "of_job"),
    [
        pytest.param(ALICE, BOB, ALICE, id="bob's process inside alice's job, for alice's login"),
        pytest.param(BOB, BOB, ALICE, id="bob's process inside alice's job, for bob's login"),
        pytest.param(BOB, ALICE, ALICE, id="alice's own, for bob's login"),
        pytest.param(ALICE, 0, ALICE, id="root's process inside alice's job"),
        pytest.param(0, ALICE, ALICE, id="alice's own, for root's login: uid 0 is no wildcard"),
    ],
)
def test_another_user_s_is_not_told(node: NodeMaker, login: int, of_process: int, of_job: int) -> None:
    """The process and the job must both be the login user's; the answer names neither."""
    there = node(bpf(owner(of_process)))
    there.backend.of_cgroup[CGROUP] = in_job(job("17", of_job))
    sealed, settled = there.answer(sealed_by(0, question(login)))
    assert (settled.outcome, settled.reason, settled.job) == (Outcome.UNKNOWN, Reason.OTHER_USER, None)
    told = decode_answer(sealed.split(b" ", 2)[2])
    assert (told.outcome, told.reason, told.job_id, told.witness) == (Outcome.UNKNOWN, Reason.OTHER_USER, None, None)
    assert b"17" not in sealed.replace(NONCE.encode(), b"")


def test_who_asks_for_themselves_is_told_one_thing_of_all_that_is_not_theirs(node: NodeMaker) -> None:
    """The same bytes whether another user has the connection, nobody has, or its owner or job is not certain."""
    diag = FakeWitness(Witness.DIAG, {ENDS: owner(BOB, Witness.DIAG)})
    down = node(bpf(owner(BOB)))
    down.backend.down = "no cgroup mount"
    cases = {
        Reason.OTHER_USER: node(bpf()),
        Reason.NOT_FOUND: node(FakeWitness(Witness.BPF)),
        Reason.JOB_NOT_TOLD: node(bpf(owner(cgroup=None))),
        Reason.DISAGREEMENT: node(bpf(), diag),
        Reason.AMBIGUOUS: node(FakeWitness(Witness.BPF, error=Ambiguous("two sockets"))),
        Reason.NO_WITNESS: node(FakeWitness(Witness.BPF, error=WitnessUnavailable("no probe"))),
        Reason.JOB_MANAGER: down,
    }
    told = {reason: there.answer(sealed_by(BOB, question(BOB))) for reason, there in cases.items()}
    assert {reason: settled.reason for reason, (_, settled) in told.items()} == {reason: reason for reason in told}
    assert len({sealed for sealed, _ in told.values()}) == 1
    for reason, there in cases.items():
        sealed, _ = there.answer(sealed_by(0, question(BOB, NONCE[::-1])))
        assert decode_answer(sealed.split(b" ", 2)[2]).reason is reason, "an agent is told which"


# ---- the inquiry: what is not believed


def test_witnesses_that_disagree_about_the_user(node: NodeMaker) -> None:
    """Neither is picked, it is counted apart from other doubts, and what is logged names both."""
    there = node(bpf(owner(ALICE)), FakeWitness(Witness.DIAG, {ENDS: owner(BOB, Witness.DIAG)}))
    settled = there.settle()
    assert (settled.outcome, settled.reason) == (Outcome.UNKNOWN, Reason.DISAGREEMENT)
    assert "bpf says uid 1001, diag says uid 1002" in settled.detail


def test_witnesses_that_disagree_about_the_job(node: NodeMaker) -> None:
    """One user, two jobs: the wrong one of two own jobs is wrong as well."""
    there = node(bpf(owner(cgroup=1)), FakeWitness(Witness.DIAG, {ENDS: owner(witness=Witness.DIAG, cgroup=2)}))
    there.backend.of_cgroup.update({1: in_job(JOB_A), 2: in_job(JOB_B)})
    settled = there.settle()
    assert (settled.outcome, settled.reason) == (Outcome.UNKNOWN, Reason.DISAGREEMENT)
    assert "bpf: job 17, diag: job 18" in settled.detail
    there.backend.of_cgroup[2] = in_job(None)
    assert there.settle().reason is Reason.DISAGREEMENT
    there.backend.of_cgroup[2] = in_job(job("17", identity=(2,)))
    assert there.settle().reason is Reason.DISAGREEMENT


def test_a_witness_that_knows_two_owners(node: NodeMaker) -> None:
    """Two sockets with one 4-tuple: nobody is asked further."""
    slow = FakeWitness(Witness.PROC, {ENDS: owner(witness=Witness.PROC)}, may_block=True)
    settled = node(FakeWitness(Witness.BPF, error=Ambiguous("two sockets")), slow).settle()
    assert (settled.outcome, settled.reason) == (Outcome.UNKNOWN, Reason.AMBIGUOUS)
    assert slow.asked == []


def test_nobody_knows_it(node: NodeMaker) -> None:
    """All witnesses heard, none knows the connection."""
    settled = node(FakeWitness(Witness.BPF), FakeWitness(Witness.PROC, may_block=True)).settle()
    assert (settled.outcome, settled.reason) == (Outcome.UNKNOWN, Reason.NOT_FOUND)
    assert str(ENDS) in settled.detail


def test_no_witness_can_be_asked(node: NodeMaker) -> None:
    """Not the same as an unknown connection; the detail says why for each."""
    settled = node(
        FakeWitness(Witness.BPF, error=WitnessUnavailable("no probe")),
        FakeWitness(Witness.PROC, may_block=True, error=WitnessUnavailable("no /proc")),
    ).settle()
    assert (settled.outcome, settled.reason) == (Outcome.UNKNOWN, Reason.NO_WITNESS)
    assert settled.detail == "bpf: no probe; proc: no /proc"


def test_the_job_manager_is_down(node: NodeMaker) -> None:
    """Not the same as "in no job"."""
    there = node(bpf())
    there.backend.down = "no cgroup mount"
    assert (there.settle().outcome, there.settle().reason) == (Outcome.UNKNOWN, Reason.JOB_MANAGER)


def test_the_job_manager_hangs(node: NodeMaker, gate: threading.Event) -> None:
    """Out of time, within the time."""
    there = node(bpf())
    there.backend.hang = gate
    started = time.monotonic()
    settled = there.settle(ms=50)
    assert (settled.outcome, settled.reason) == (Outcome.UNKNOWN, Reason.OUT_OF_TIME)
    assert time.monotonic() - started < HANGS_S / 2


def test_a_witness_hangs(node: NodeMaker, gate: threading.Event) -> None:
    """A slow walk of /proc ends with the deadline and names nobody."""
    slow = FakeWitness(Witness.PROC, {ENDS: owner(witness=Witness.PROC)}, may_block=True, hang=gate)
    started = time.monotonic()
    settled = node(FakeWitness(Witness.BPF), slow).settle(ms=60)
    assert settled.outcome is Outcome.UNKNOWN
    assert time.monotonic() - started < HANGS_S / 2


def test_a_pid_that_was_used_again_is_not_believed(node: NodeMaker) -> None:
    """A process that started after the connect() is another one, whatever job it is in."""
    there = node(bpf(owner(pid=os.getpid(), cgroup=None, connected=1)))
    there.backend.of_process[os.getpid()] = JOB_A
    settled = there.settle()
    assert (settled.outcome, settled.reason) == (Outcome.UNKNOWN, Reason.JOB_NOT_TOLD)


def test_a_pid_that_is_gone_is_not_believed(node: NodeMaker) -> None:
    """The owner may have exited; then only its cgroup can tell."""
    child = subprocess.Popen(["true"])
    child.wait()
    there = node(bpf(owner(pid=child.pid, cgroup=None, connected=boottime_ns())))
    there.backend.of_process[child.pid] = JOB_A
    assert there.settle().reason is Reason.JOB_NOT_TOLD


def test_a_process_that_ends_while_its_job_is_looked_up_is_not_believed(node: NodeMaker) -> None:
    """What was read may be of whoever has the pid since."""
    with subprocess.Popen(["sleep", "60"]) as child:
        there = node(bpf(owner(pid=child.pid, cgroup=None, connected=boottime_ns())))
        job_of_process = there.backend.job_of_process

        def meanwhile(pid: int) -> Optional[Job]:
            child.kill()
            child.wait()
            return job_of_process(pid)

        there.backend.of_process[child.pid] = JOB_A
        assert there.settle().job == JOB_A
        there.backend.job_of_process = meanwhile  # type: ignore[method-assign]
        settled = there.settle()
    assert (settled.outcome, settled.reason) == (Outcome.UNKNOWN, Reason.JOB_NOT_TOLD)


def test_a_pid_without_a_connect_time_is_believed_of_proc_only(node: NodeMaker) -> None:
    """/proc saw this very process hold the socket; any other witness's pid may have been used again."""
    there = node(bpf(owner(pid=os.getpid(), cgroup=None)))
    there.backend.of_process[os.getpid()] = JOB_A
    assert there.settle().reason is Reason.JOB_NOT_TOLD
    slow = FakeWitness(Witness.PROC, {ENDS: owner(witness=Witness.PROC, pid=os.getpid(), cgroup=None)}, may_block=True)
    there = node(slow)
    there.backend.of_process[os.getpid()] = JOB_A
    assert there.settle().job == JOB_A


def test_a_process_in_two_jobs_is_ambiguous(node: NodeMaker) -> None:
    """Hierarchies that disagree are no answer."""
    there = node(bpf(owner(pid=os.getpid(), cgroup=None, connected=boottime_ns())))
    there.backend.of_process[os.getpid()] = Ambiguous("memory says 17, freezer 18")
    assert there.settle().reason is Reason.AMBIGUOUS
    there.backend.of_process[os.getpid()] = JobManagerError("gone")
    assert there.settle().reason is Reason.JOB_MANAGER


def test_an_owner_of_whom_nothing_more_is_known(node: NodeMaker) -> None:
    """A uid alone names no job, even where the user has only one."""
    there = node(bpf(owner(cgroup=None)))
    settled = there.settle()
    assert (settled.outcome, settled.reason) == (Outcome.UNKNOWN, Reason.JOB_NOT_TOLD)


def test_a_slow_witness_may_contradict_a_fast_one(node: NodeMaker) -> None:
    """Asked because the fast one could not tell the job, it is heard about the user as well."""
    slow = FakeWitness(Witness.PROC, {ENDS: owner(BOB, Witness.PROC)}, may_block=True)
    assert node(bpf(owner(cgroup=None)), slow).settle().reason is Reason.DISAGREEMENT


# ---- what is told


def test_the_job_of_the_cgroup_at_connect_time(node: NodeMaker) -> None:
    """The whole way: sealed for the asker, repeating nonce, host and connection."""
    seal = FakeSeal()
    sealed, settled = node(bpf(), seal=seal).answer(sealed_by(0, question()))
    assert decode_answer(sealed.split(b" ", 2)[2]) == Answer(
        NONCE, HERE, ENDS, Outcome.JOB, Reason.OWNER, "17", Witness.BPF
    )
    assert settled.owner == owner()
    assert seal.sealed_for == [0]


def test_an_owner_that_exited_is_told_by_its_cgroup(node: NodeMaker) -> None:
    """The pid is gone, the job is not: identity was taken in connect()."""
    child = subprocess.Popen(["true"])
    child.wait()
    settled = node(bpf(owner(pid=child.pid, connected=boottime_ns()))).settle()
    assert (settled.outcome, settled.job, settled.moved) == (Outcome.JOB, JOB_A, False)


def test_an_owner_in_no_job(node: NodeMaker) -> None:
    """Known to be in none, which is not "unknown"."""
    there = node(bpf())
    there.backend.of_cgroup[CGROUP] = in_job(None)
    sealed, settled = there.answer(sealed_by(0, question()))
    assert (settled.outcome, settled.reason, settled.job) == (Outcome.NO_JOB, Reason.OWNER, None)
    assert decode_answer(sealed.split(b" ", 2)[2]).outcome is Outcome.NO_JOB


@contextlib.contextmanager
def in_no_job(uid: int = ALICE, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of ``uid``'s with exactly this environment."""
    argv = ["/usr/bin/python3", "-ISc", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables, user=uid, group=uid
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def hint_of(node: NodeMaker, found: Owner, login_uid: Optional[int] = ALICE, hints: bool = True) -> Optional[str]:
    """What the source node adds to "in no job" about ``found``."""
    there = node(bpf(found))
    there.backend.of_cgroup[CGROUP] = in_job(None)
    inquiry = Inquiry(there.witnesses, there.backend, there.workers, hints)
    settled = asyncio.run(inquiry.settle(ENDS, login_uid, soon()))
    assert (settled.outcome, settled.job) == (Outcome.NO_JOB, None)
    return settled.hint


@pytest.mark.parametrize("value", ["", "-1", "17 ", "17\n", "../17", "a/b", "x" * 64, "\udcff"])
def test_an_environment_that_names_no_job_id_is_no_hint(node: NodeMaker, value: str) -> None:
    """Whatever its user has put there."""
    with in_no_job(FAKE_JOB_ID=value) as process:
        assert hint_of(node, owner(pid=process.pid, connected=boottime_ns())) is None


def test_only_the_backend_s_own_variable_is_a_hint(node: NodeMaker) -> None:
    """Another manager's job id may be the id of another job here."""
    with in_no_job(SLURM_JOB_ID="17", XFAKE_JOB_ID="17", fake_job_id="17") as process:
        assert hint_of(node, owner(pid=process.pid, connected=boottime_ns())) is None


def test_a_process_of_another_user_is_no_hint(node: NodeMaker) -> None:
    """Also root's: an environment counts for the uid that the process has now, all four of it."""
    for uid in (BOB, 0):
        with in_no_job(uid, FAKE_JOB_ID="17") as process:
            assert hint_of(node, owner(pid=process.pid, connected=boottime_ns())) is None


def test_a_process_that_came_after_the_connection_is_no_hint(node: NodeMaker) -> None:
    """The owner has gone, and its pid is another's now; or nobody's; or was never known."""
    with in_no_job(FAKE_JOB_ID="17") as process:
        assert hint_of(node, owner(pid=process.pid, connected=1)) is None
        assert hint_of(node, owner(pid=process.pid)) is None, "without a connect time, only /proc's word holds"
        assert hint_of(node, owner()) is None
    assert hint_of(node, owner(pid=process.pid, connected=boottime_ns())) is None


def test_hints_can_be_switched_off_where_they_are_found(node: NodeMaker) -> None:
    """[callerid] hint = false on the source node: no environment is read."""
    with in_no_job(FAKE_JOB_ID="17") as process:
        assert hint_of(node, owner(pid=process.pid, connected=boottime_ns()), hints=False) is None


def test_an_owner_in_a_job_is_given_no_hint(node: NodeMaker) -> None:
    """Evidence first: what the environment says of another job is not looked at."""
    with in_no_job(FAKE_JOB_ID="18") as process:
        settled = node(bpf(owner(pid=process.pid, connected=boottime_ns()))).settle()
    assert (settled.outcome, settled.job, settled.hint) == (Outcome.JOB, JOB_A, None)


def test_an_owner_in_no_job_with_a_hint(node: NodeMaker) -> None:
    """Still "in no job", and beside it what the confirmed process's environment names; also for root's whois."""
    with in_no_job(FAKE_JOB_ID="17", PATH="/bin") as process:
        for login_uid in (ALICE, None):
            assert hint_of(node, owner(pid=process.pid, connected=boottime_ns()), login_uid) == "17"
        there = node(bpf(owner(pid=process.pid, connected=boottime_ns())))
        there.backend.of_cgroup[CGROUP] = in_job(None)
        sealed, _ = there.answer(sealed_by(0, question()))
    assert decode_answer(sealed.split(b" ", 2)[2]) == Answer(NONCE, HERE, ENDS, Outcome.NO_JOB, Reason.OWNER, hint="17")


def test_a_hint_is_not_told_where_it_is_switched_off(key: KeySeal) -> None:
    """[callerid] hint = false on the asking node."""

    def hinting(asked: Question) -> bytes:
        return right(asked, outcome=Outcome.NO_JOB, job_id=None, witness=None, hint="17")

    told, metrics, _ = ask(answering(key, hinting), key, hints=False)
    assert told == Told(Outcome.NO_JOB, "owner", release=__version__)
    told, metrics, _ = ask(answering(key, hinting), key)
    assert told == Told(Outcome.NO_JOB, "owner", witness=Witness.HINT, hint="17", release=__version__)
    labels = {"outcome": "no_job", "reason": "owner", "witness": "hint"}
    assert sample(metrics, "adoptd_callerid_asked_total", **labels) == 1


def test_an_owner_whose_cgroup_is_no_more_is_said_to_have_moved(node: NodeMaker) -> None:
    """A cgroup with a process in it cannot be removed: who connected from it was moved, to wherever it is now."""
    there = node(bpf(owner(pid=os.getpid(), connected=boottime_ns())))
    there.backend.of_cgroup[CGROUP] = CgroupVerdict(CgroupFinding.GONE, "removed")
    there.backend.of_process[os.getpid()] = JOB_A
    settled = there.settle()
    assert (settled.outcome, settled.job, settled.moved) == (Outcome.JOB, JOB_A, True)
    there.backend.of_cgroup[CGROUP] = CgroupVerdict(CgroupFinding.CANNOT_TELL, "version 1")
    settled = there.settle()
    assert (settled.job, settled.moved) == (JOB_A, False)


def test_an_owner_that_has_left_the_job_is_said_to_have_moved(node: NodeMaker) -> None:
    """The job is the one it connected from; that it is elsewhere now is said beside it."""
    there = node(bpf(owner(pid=os.getpid(), connected=boottime_ns())))
    there.backend.of_process[os.getpid()] = JOB_B
    settled = there.settle()
    assert (settled.job, settled.moved) == (JOB_A, True)
    there.backend.of_process[os.getpid()] = JOB_A
    assert there.settle().moved is False
    there = node(bpf(owner(pid=os.getpid(), connected=1)))
    assert there.settle().moved is False, "another process with that pid says nothing about the owner"


def test_slow_witnesses_are_asked_only_when_needed(node: NodeMaker) -> None:
    """A walk of /proc is for what the fast witnesses cannot tell."""
    slow = FakeWitness(Witness.PROC, {ENDS: owner(witness=Witness.PROC)}, may_block=True)
    assert node(bpf(), slow).settle().job == JOB_A
    assert slow.asked == []
    settled = node(bpf(owner(cgroup=None)), slow).settle()
    assert (settled.job, len(slow.asked)) == (JOB_A, 1)
    assert node(FakeWitness(Witness.BPF), slow).settle().job == JOB_A
    assert len(slow.asked) == 2


def test_witnesses_that_agree_are_one_answer(node: NodeMaker) -> None:
    """The most trusted one is named; one that cannot tell the job does not contradict."""
    diag = FakeWitness(Witness.DIAG, {ENDS: owner(witness=Witness.DIAG, cgroup=None)})
    settled = node(bpf(), diag).settle()
    assert settled.job == JOB_A
    assert settled.owner is not None
    assert settled.owner.witness is Witness.BPF
    settled = node(bpf(owner(cgroup=None)), FakeWitness(Witness.DIAG, {ENDS: owner(witness=Witness.DIAG)})).settle()
    assert settled.owner is not None
    assert (settled.job, settled.owner.witness) == (JOB_A, Witness.DIAG)


def test_root_may_ask_about_anybody(node: NodeMaker) -> None:
    """No login uid: for whois, on root's word only."""
    assert node(bpf(owner(BOB))).settle(login_uid=None).job == JOB_A


# ---- the asker, against a peer that misbehaves


@pytest.fixture
def key(tmp_path: Path) -> KeySeal:
    path = tmp_path / "key"
    path.write_bytes(os.urandom(64))
    path.chmod(0o600)
    return KeySeal(path, 10)


Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def peer(script: Script) -> AsyncIterator[int]:
    """A peer on 127.0.0.1 that does what ``script`` says with every connection; its port."""
    tasks: List[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        try:
            await script(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


async def heard(reader: asyncio.StreamReader) -> bytes:
    length = frame.decode_length(await reader.readexactly(4), frame.CALLERID_MAX_BYTES)
    return await reader.readexactly(length)


def ask(
    script: Script, seal: object, timeout_ms: int = PATIENT_MS, login_uid: int = ALICE, hints: bool = True
) -> Tuple[Told, Metrics, float]:
    """What the asker makes of a peer, the metrics it left, and how long it took in seconds."""

    async def story() -> Tuple[Told, Metrics, float]:
        metrics, workers = Metrics(), Workers("seal", 2, 8)
        async with peer(script) as port:
            rooms = SealRoom(seal, workers)  # type: ignore[arg-type]
            asker = Asker(rooms, port, timeout_ms, metrics, hints=hints)
            started = time.monotonic()
            told = await asker.ask(ENDS, login_uid, soon(2 * PATIENT_MS))
            took_s = time.monotonic() - started
        workers.close()
        # The peer's end of the connection may take a few turns of the loop more; what is ours would stay.
        for _ in range(2000):
            if asyncio.all_tasks() == {asyncio.current_task()}:
                break
            await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return told, metrics, took_s

    return asyncio.run(story())


def faulty(fault: AskFault, script: Script, seal: object, timeout_ms: int = PATIENT_MS) -> None:
    """The peer of ``script`` is believed nothing, for this reason, within the time, and it is counted."""
    told, metrics, took_s = ask(script, seal, timeout_ms)
    assert (told.outcome, told.reason, told.job_id, told.witness) == (Outcome.UNKNOWN, fault.value, None, None)
    assert took_s < HANGS_S / 2
    labels = {"outcome": "unknown", "reason": fault.value, "witness": "none"}
    assert sample(metrics, "adoptd_callerid_asked_total", **labels) == 1
    assert sample(metrics, "adoptd_callerid_asked_duration_seconds_count") == 1


def test_nobody_listens(key: KeySeal) -> None:
    """Refused at once: no agent there."""

    async def story() -> Told:
        async with peer(silent) as port:
            pass
        return await Asker(SealRoom(key, Workers("w", 1, 1)), port, PATIENT_MS, Metrics()).ask(ENDS, ALICE, soon())

    started = time.monotonic()
    told = asyncio.run(story())
    assert (told.outcome, told.reason) == (Outcome.UNKNOWN, "refused")
    assert time.monotonic() - started < HANGS_S / 2


def test_no_way_there(key: KeySeal) -> None:
    """The kernel refuses to route to a multicast address: nothing is sent."""
    asker = Asker(SealRoom(key, Workers("w", 1, 1)), 6830, PATIENT_MS, Metrics())
    told = asyncio.run(asker.ask(ENDS, ALICE, soon(), ipaddress.ip_address("224.0.0.1")))
    assert (told.outcome, told.reason) == (Outcome.UNKNOWN, "unreachable")


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


def test_a_silent_peer(key: KeySeal) -> None:
    """Out of time, in time."""
    faulty(AskFault.TIMEOUT, silent, key, timeout_ms=80)


def test_the_login_s_own_deadline_is_kept(key: KeySeal) -> None:
    """What is left of the login's budget counts when it is less than callerid's own."""

    async def story() -> Tuple[Told, float]:
        async with peer(silent) as port:
            asker = Asker(SealRoom(key, Workers("w", 1, 1)), port, PATIENT_MS, Metrics())
            started = time.monotonic()
            return await asker.ask(ENDS, ALICE, Deadline.after_ms(50)), time.monotonic() - started

    told, took_s = asyncio.run(story())
    assert told.reason == "timeout"
    assert took_s < HANGS_S / 2


def test_a_peer_that_drips(key: KeySeal) -> None:
    """A byte now and then does not prolong the deadline."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\0\0\4\0")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    faulty(AskFault.TIMEOUT, drip, key, timeout_ms=80)


@pytest.mark.parametrize("sent", [b"", b"\0", b"\0\0\0\x10", b"\0\0\0\x10short"])
def test_a_peer_that_closes(key: KeySeal, sent: bytes) -> None:
    """Before, in or after the prefix, or in the body."""

    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await heard(reader)
        writer.write(sent)

    faulty(AskFault.CLOSED, close, key)


@pytest.mark.parametrize("sent", [b"", b"\0"], ids=["without a byte", "after a byte"])
def test_a_peer_that_hangs_up_without_a_byte_is_asked_once_more(key: KeySeal, sent: bytes) -> None:
    """It was killed, and the next one answers; with a question of its own, which is none that was seen before."""
    asked: List[Question] = []

    async def hang_up_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(decode_question(key.open(await heard(reader)).payload))
        writer.write(sent if len(asked) == 1 else frame.encode_frame(key.seal(right(asked[1]), 0), 4096))

    told, metrics, _ = ask(hang_up_once, key)
    if sent:
        assert (told.reason, len(asked)) == ("closed", 1)
    else:
        assert told == Told(Outcome.JOB, "owner", "17", Witness.BPF, release=__version__)
        assert len({question.nonce for question in asked}) == 2
    assert sample(metrics, "adoptd_callerid_asked_duration_seconds_count") == 1


def test_a_peer_that_always_hangs_up_is_asked_twice_and_no_more(key: KeySeal) -> None:
    """It refuses us: that is its word."""
    count = [0]

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await heard(reader)
        count[0] += 1

    faulty(AskFault.CLOSED, hang_up, key)
    assert count == [2]


@pytest.mark.parametrize("sent", [b"\xff\xff\xff\xff", b"\0\0\x10\x01" + b"x" * 4097, b"\0\0\0\0", b"HTTP/1.1 400 Bad"])
def test_a_frame_out_of_bounds(key: KeySeal, sent: bytes) -> None:
    """Refused on its length alone, without waiting for the rest."""

    async def huge(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await reader.read()

    faulty(AskFault.MALFORMED, huge, key)


def answering(seal: object, change: Callable[[Question], bytes], late_s: float = 0.0) -> Script:
    """A peer that opens the question and answers with what ``change`` makes of it, sealed."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = decode_question(seal.open(await heard(reader)).payload)  # type: ignore[attr-defined]
        await asyncio.sleep(late_s)
        sealed = seal.seal(change(asked))  # type: ignore[attr-defined]
        writer.write(frame.encode_frame(sealed, frame.CALLERID_MAX_BYTES))

    return script


def right(asked: Question, **changes: object) -> bytes:
    fields: Dict[str, object] = {
        "nonce": asked.nonce,
        "responder": asked.responder,
        "connection": asked.connection,
        "outcome": Outcome.JOB,
        "reason": Reason.OWNER,
        "job_id": "17",
        "witness": Witness.BPF,
    }
    return encode_answer(Answer(**{**fields, **changes}))  # type: ignore[arg-type]


def test_a_wrong_nonce(key: KeySeal) -> None:
    """A genuine, fresh answer to another question."""
    faulty(AskFault.WRONG_NONCE, answering(key, lambda asked: right(asked, nonce=NONCE)), key)


def test_a_wrong_host(key: KeySeal) -> None:
    """An answer that another node gave to somebody."""
    other = ipaddress.ip_address("127.0.0.3")
    faulty(AskFault.WRONG_HOST, answering(key, lambda asked: right(asked, responder=other)), key)


@pytest.mark.parametrize("other", [connection(40001), connection(destination="127.0.0.4"), connection(22, "127.0.0.2")])
def test_a_wrong_connection(key: KeySeal, other: Connection) -> None:
    """One port off, another destination, or the two ends exchanged."""
    faulty(AskFault.WRONG_CONNECTION, answering(key, lambda asked: right(asked, connection=other)), key)


def test_an_answer_sealed_by_somebody_else() -> None:
    """Any user can listen on the port while the agent is down, and under MUNGE seal what they like."""
    liar = FakeSeal(uid=BOB)
    faulty(AskFault.FOREIGN, answering(liar, right), FakeSeal())


def test_an_answer_under_another_key(key: KeySeal, tmp_path: Path) -> None:
    """A peer that does not have the key cannot answer."""
    path = tmp_path / "other"
    path.write_bytes(os.urandom(64))
    path.chmod(0o600)
    stranger = KeySeal(path, 10)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await heard(reader)
        sealed = stranger.seal(encode_answer(Answer(NONCE, HERE, ENDS, Outcome.UNKNOWN, Reason.OWNER)))
        writer.write(frame.encode_frame(sealed, frame.CALLERID_MAX_BYTES))

    faulty(AskFault.BAD_SEAL, script, key)


def test_our_own_question_sent_back(key: KeySeal) -> None:
    """Sealed by us, fresh, with our nonce: still no answer."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame.encode_frame(await heard(reader), frame.CALLERID_MAX_BYTES))

    faulty(AskFault.MALFORMED, echo, key)


@pytest.mark.parametrize(
    "change",
    [
        lambda asked: b"x",
        lambda asked: json.dumps({**json.loads(right(asked)), "outcome": "unknown"}).encode(),
        lambda asked: json.dumps({**json.loads(right(asked)), "job": "../1"}).encode(),
        lambda asked: right(asked).replace(b'"v":1', b'"v":2'),
    ],
)
def test_a_genuine_seal_over_no_answer(key: KeySeal, change: Callable[[Question], bytes]) -> None:
    """Also a job beside "unknown", and a job id that is a path."""
    faulty(AskFault.MALFORMED, answering(key, change), key)


def test_an_answer_that_comes_late(key: KeySeal) -> None:
    """Right in everything but time."""
    faulty(AskFault.TIMEOUT, answering(key, right, late_s=HANGS_S), key, timeout_ms=80)


def test_an_answer_that_was_opened_before(key: KeySeal) -> None:
    """A peer that sends one sealed answer twice is refused the second time."""
    kept: List[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = decode_question(key.open(await heard(reader)).payload)
        kept.append(key.seal(right(asked)))
        writer.write(frame.encode_frame(kept[0], frame.CALLERID_MAX_BYTES))

    assert ask(script, key)[0].outcome is Outcome.JOB
    faulty(AskFault.BAD_SEAL, script, key)


@pytest.mark.parametrize("may_block", [False, True])
def test_nothing_to_seal_with(may_block: bool) -> None:
    """No question is sent when it could not be sealed."""
    seal = FakeSeal(may_block=may_block)
    seal.seal_fault = SealFault.UNAVAILABLE
    contacted: List[bool] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        contacted.append(True)

    faulty(AskFault.SEAL_UNAVAILABLE, script, seal)
    assert contacted == []


def test_a_seal_service_that_hangs(gate: threading.Event) -> None:
    """A stuck munged on the asking side is a reason of its own, within the time."""
    seal = FakeSeal(may_block=True)
    seal.hang = gate
    faulty(AskFault.SEAL_UNAVAILABLE, silent, seal, timeout_ms=80)


def test_what_a_right_answer_tells(key: KeySeal) -> None:
    """The job, the witness and whether the owner moved, counted under the answer's own reason."""
    told, metrics, _ = ask(answering(key, lambda asked: right(asked, moved=True)), key)
    assert told == Told(Outcome.JOB, "owner", "17", Witness.BPF, True, release=__version__)
    labels = {"outcome": "job", "reason": "owner", "witness": "bpf"}
    assert sample(metrics, "adoptd_callerid_asked_total", **labels) == 1


@pytest.mark.parametrize(
    ("change", "release", "reason"),
    [
        (lambda asked: right(asked, release="0.9"), "0.9", ""),
        (lambda asked: right(asked, release="0.9", nonce="f" * 32), "", "wrong_nonce"),
        (lambda asked: right(asked).replace(b'"release":"', b'"release":"/'), "", "malformed"),
    ],
)
def test_the_version_of_who_answers_is_remembered(
    key: KeySeal, change: Callable[[Question], bytes], release: str, reason: str
) -> None:
    """Of an answer that is believed, and of no other; nothing else about the answer goes by it."""

    async def story() -> Tuple[Peer, ...]:
        async with peer(answering(key, change)) as port:
            asker = Asker(SealRoom(key, Workers("w", 2, 8)), port, PATIENT_MS, Metrics())
            told = await asker.ask(ENDS, ALICE, soon())
            assert told.release == release
            assert (told.job_id is not None) == bool(release)
            return asker.peers.now()

    (found,) = asyncio.run(story())
    assert (found.address, found.release, found.reason) == (HERE, release, reason)


def test_what_the_question_asks(key: KeySeal) -> None:
    """The login uid, the connection and the peer's own address; another nonce each time."""
    asked: List[Question] = []

    def note(question: Question) -> bytes:
        asked.append(question)
        return right(question, outcome=Outcome.UNKNOWN, reason=Reason.NOT_FOUND, job_id=None, witness=None)

    for _ in range(2):
        told = ask(answering(key, note), key, login_uid=BOB)[0]
        assert told == Told(Outcome.UNKNOWN, "not_found", release=__version__)
    assert {(q.responder, q.connection, q.login_uid) for q in asked} == {(HERE, ENDS, BOB)}
    assert asked[0].nonce != asked[1].nonce


def test_asker_and_responder_understand_each_other(key: KeySeal, node: NodeMaker) -> None:
    """The two halves together, over TCP and under a real seal."""
    there = node(bpf(), seal=key)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sealed, _ = await there.responder.answer(await heard(reader), HERE, soon())
        writer.write(frame.encode_frame(sealed, frame.CALLERID_MAX_BYTES))

    assert ask(script, key)[0] == Told(Outcome.JOB, "owner", "17", Witness.BPF, release=__version__)


def test_the_reasons_are_one_closed_set() -> None:
    """AskFault's, SlurmdFault's and Reason's values are labels of one metric: none means two things."""
    values = [each.value for kind in (AskFault, SlurmdFault, Reason) for each in kind]
    assert len(values) == len(set(values))
    assert {fault.value for fault in SealFault} <= {refusal.value for refusal in Refusal}


# ---- answers in several threads at once


class SlowMemory(ReplayCache):
    """A replay cache in which a look takes long enough for others to look as well."""

    def __contains__(self, nonce: str) -> bool:
        found = super().__contains__(nonce)
        time.sleep(0.005)
        return found


def test_one_nonce_in_many_threads_is_answered_once(node: NodeMaker) -> None:
    """Also where root has sealed it and an ordinary user has: there are two memories, and one question."""
    for turn in range(5):
        there = node(bpf())
        there.responder._replays = SlowMemory(100, time.time)
        there.responder._users_replays = SlowMemory(100, time.time)
        payload = question(nonce=f"{turn:032x}")
        sealed = [sealed_by(uid, payload) for uid in (0, ALICE, 0, ALICE)]
        started = threading.Barrier(len(sealed))
        open_seal = there.seal.open  # type: ignore[attr-defined]

        def together(data: bytes, open_seal: Callable[[bytes], object] = open_seal) -> object:
            opened = open_seal(data)
            started.wait(HANGS_S)  # noqa: B023
            return opened

        there.seal.open = together  # type: ignore[attr-defined]

        async def story(there: Node = there, sealed: List[bytes] = sealed) -> List[object]:
            answers = (there.responder.answer(each, HERE, soon()) for each in sealed)
            return list(await asyncio.gather(*answers, return_exceptions=True))

        told = asyncio.run(story())
        refused = [each.reason for each in told if isinstance(each, Refused)]
        assert refused == [Refusal.REPLAYED] * 3, told


def test_one_token_in_many_threads_is_opened_once(key: KeySeal) -> None:
    """The seal's own memory, under a real scheme."""
    for _ in range(20):
        sealed = key.seal(b"once")
        started = threading.Barrier(4)
        outcomes: List[str] = []

        def open_it(sealed: bytes = sealed, started: threading.Barrier = started) -> None:
            started.wait(HANGS_S)
            try:
                outcomes.append(key.open(sealed).payload.decode())  # noqa: B023
            except SealError as error:
                outcomes.append(error.fault.value)  # noqa: B023

        threads = [threading.Thread(target=open_it) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANGS_S)
        assert sorted(outcomes) == ["once", "replayed", "replayed", "replayed"]


def test_a_seal_that_opens_too_late_costs_no_look(node: NodeMaker, gate: threading.Event) -> None:
    """The asker has gone when munged comes back: the thread goes no further, and nothing is looked up or sealed."""
    seal, witness = FakeSeal(may_block=True), bpf()
    seal.hang = gate
    there = node(witness, seal=seal)

    async def story() -> None:
        with pytest.raises(Refused):
            await there.responder.answer(sealed_by(0, question()), HERE, Deadline.after_ms(30))
        gate.set()
        while there.workers.pending:
            await asyncio.sleep(0.002)

    asyncio.run(story())
    assert (witness.asked, seal.sealed_for) == ([], [])


def test_seals_of_one_peer_leave_threads_for_the_others(gate: threading.Event) -> None:
    """Twice as many as there are threads, all stuck in the scheme; another peer's question is answered meanwhile."""
    seal = FakeSeal(may_block=True)
    open_seal = seal.open
    seal.open = lambda sealed: (b"stuck" in sealed and gate.wait(HANGS_S), open_seal(sealed))[1]  # type: ignore[method-assign]
    backend = FakeBackend(JOB_A)
    backend.of_cgroup[CGROUP] = in_job(JOB_A)
    witnesses, workers = Witnesses([bpf()]), Workers("answers", OPENED_AT_ONCE, 1024)
    inquiry = Inquiry(witnesses, backend, workers)
    responder = Responder(inquiry, SealRoom(seal, workers), ReplayCache(100, time.time), 10, workers)

    async def story() -> None:
        flood = [
            asyncio.create_task(responder.answer(b"FAKE 0 stuck", HERE, soon(2 * PATIENT_MS), "10.0.0.66"))
            for _ in range(2 * OPENED_AT_ONCE)
        ]
        while workers.pending < OPENED_AT_ONCE_OF_ONE:
            await asyncio.sleep(0.002)
        _, settled = await responder.answer(sealed_by(0, question()), HERE, soon(), "10.0.0.1")
        assert settled.outcome is Outcome.JOB
        assert workers.pending == OPENED_AT_ONCE_OF_ONE
        gate.set()
        ended = await asyncio.gather(*flood, return_exceptions=True)
        assert {each.reason for each in ended if isinstance(each, Refused)} == {Refusal.MALFORMED}

    with contextlib.closing(witnesses), contextlib.closing(workers):
        asyncio.run(story())


def test_a_question_whose_turn_it_is_not_is_answered_later(node: NodeMaker, gate: threading.Event) -> None:
    """More at once about one login than may be looked for: the rest wait without a thread, and all are answered."""
    there = node(bpf())
    there.backend.hang = gate

    async def story() -> None:
        asked = [
            asyncio.create_task(
                there.responder.answer(sealed_by(0, question(nonce=f"{n:032x}")), HERE, soon(), f"10.0.0.{n}")
            )
            for n in range(3 * SETTLED_AT_ONCE_OF_ONE)
        ]
        await asyncio.sleep(0.1)
        gate.set()
        for _, settled in await asyncio.gather(*asked):
            assert settled.job == JOB_A

    asyncio.run(story())
