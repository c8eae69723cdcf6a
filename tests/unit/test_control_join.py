"""join, whereami, sessions: who may move what, and see what. Real processes, a backend that notes what it moves."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import signal
import subprocess
from pathlib import Path
from typing import Dict, Iterator, List, Sequence

import pytest
from control_scene import ControlScene
from fakes import ALICE, BOB, FakeBackend, connection, job, sample, until

from adoptd.control import Asking, CommandRefused, Rates, joining, tree
from adoptd.control.joining import JoinOutcome, JoinRefused
from adoptd.control.rates import JOINS_MAX, JOINS_WITHIN_S
from adoptd.deadline import Deadline
from adoptd.events import Event, EventKind
from adoptd.model import AdoptionFailed, Ambiguous, Job
from adoptd.process import ProcessHandle, open_process
from adoptd.sessions import Session
from adoptd.wire.control import Command, Result
from lab import kernel

OLD = job("17", created=1)
NEW = job("18", created=2, identity=(2,))
BOBS = job("7", BOB, identity=(7,))

# Says the pids of its children, then waits.
# They end with the shell, and that with the test.
STAYS = "setpriv --pdeathsig KILL sleep 300"
FAMILY = f"{STAYS} & echo $!; {STAYS} & echo $!; echo; wait"


class MovingBackend(FakeBackend):
    """What it adopts is in the job from then on. ``moves`` is the order; ``refuses`` are pids it does not take."""

    def __init__(self, *jobs: Job) -> None:
        super().__init__(*jobs)
        self.moves: List[int] = []
        self.refuses: Dict[int, str] = {}

    def adopt(self, process: ProcessHandle, job: Job, deadline: Deadline) -> None:
        if process.pid in self.refuses:
            raise AdoptionFailed(self.refuses[process.pid])
        super().adopt(process, job, deadline)
        self.moves.append(process.pid)
        self.of_process[process.pid] = job


class Node(ControlScene):
    """A Control over fakes, and one session of alice's in job 17."""

    def __init__(self) -> None:
        self.now = 0.0
        self.backend = MovingBackend(NEW, OLD, BOBS)
        super().__init__(self.backend, clock=lambda: self.now)
        self.published: List[Event] = []
        self.events.subscribe(self._note)
        self.processes: List[subprocess.Popen[str]] = []
        self.handles: List[ProcessHandle] = []

    def _note(self, event: Event) -> bool:
        self.published.append(event)
        return False

    def family(self, script: str = FAMILY, uid: int = ALICE) -> List[int]:
        """A process of ``uid`` and those it started, in job 17; the leader first."""
        leader = subprocess.Popen(
            ["/bin/sh", "-c", script],
            stdout=subprocess.PIPE,
            text=True,
            user=uid,
            group=uid,
            extra_groups=[],
            cwd="/",
            start_new_session=True,
            preexec_fn=lambda: kernel.die_with_parent(signal.SIGKILL),
        )
        self.processes.append(leader)
        pids = [leader.pid]
        assert leader.stdout is not None
        for line in iter(leader.stdout.readline, "\n"):
            pids.append(int(line))
        for pid in pids:
            self.backend.of_process[pid] = OLD
        return pids

    def handle(self, pid: int) -> ProcessHandle:
        self.handles.append(open_process(pid))
        return self.handles[-1]

    def session(self, leader: int, uid: int = ALICE, job: Job = OLD) -> Session:
        return self.sessions.add(
            self.handle(leader),
            uid=uid,
            user={ALICE: "alice", BOB: "bob"}[uid],
            job=job,
            witness=None,
            reason="newest",
            connection=connection(),
            service="sshd",
            stages=(("adopt", f"in job {job.id}", 1.0),),
        )

    def join(self, job_id: str, asking: Asking, **more: str) -> Result:
        return asyncio.run(self.control.execute(Command("join", {"job": job_id, **more}), asking))

    def refused(self, job_id: str, asking: Asking, **more: str) -> JoinOutcome:
        """The outcome of a join that must move nothing, and must be counted as what it was."""
        before = list(self.backend.moves)
        with pytest.raises(JoinRefused) as refusal:
            self.join(job_id, asking, **more)
        assert self.backend.moves == before
        assert self.counted(refusal.value.outcome) >= 1
        self.words = str(refusal.value)
        return refusal.value.outcome

    def counted(self, outcome: JoinOutcome) -> float:
        return sample(self.metrics, "adoptd_joins_total", outcome=outcome.value)

    def told(self) -> List[Event]:
        """What was published since this was last asked."""
        told, self.published = self.published, []
        return told

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.communicate(timeout=60)
        for handle in self.handles:
            handle.close()
        super().close()


@pytest.fixture
def node() -> Iterator[Node]:
    with contextlib.closing(Node()) as made:
        yield made


# ---- what is moved


def test_the_whole_session_leader_first(node: Node) -> None:
    """Noted, counted and told; the history says how it came there."""
    pids = node.family()
    session = node.session(pids[0])
    told = node.join("18", Asking(ALICE, node.handle(pids[1])))
    assert (told["outcome"], told["from"], told["job"], told["moved"], told["left"]) == ("joined", "17", "18", 3, [])
    assert node.backend.moves[0] == pids[0]
    assert sorted(node.backend.moves) == sorted(pids)
    after = node.sessions.find(session.id)
    assert after is not None
    assert (after.job, after.reason, after.stages[-1][:2]) == (NEW, "join", ("join", "job 18, from job 17"))
    assert node.counted(JoinOutcome.JOINED) == 1
    (event,) = node.told()
    assert (event.kind, event.uid, event.fields["job"], event.fields["outcome"]) == (
        EventKind.JOIN,
        ALICE,
        "18",
        "joined",
    )


def test_other_processes_of_the_user_stay(node: Node) -> None:
    """A second session of the same user, in the same job."""
    mine, other = node.family(), node.family()
    node.session(mine[0])
    node.session(other[0])
    node.join("18", Asking(ALICE, node.handle(mine[1])))
    assert sorted(node.backend.moves) == sorted(mine)


def test_a_session_within_the_session_stays(node: Node) -> None:
    """With all that is below it: su with a PAM stack of its own."""
    pids = node.family("sh -c 'echo $$; sleep 300 & echo $!; wait' & sleep 300 & echo $!; sleep 0.2; echo; wait")
    inner, below = sorted(
        pid for pid in pids[1:] if Path(f"/proc/{pid}/comm").read_text() == "sh\n" or _parent(pid) != pids[0]
    )
    node.session(pids[0])
    node.session(inner, BOB, BOBS)
    node.join("18", Asking(ALICE, node.handle(next(pid for pid in pids[1:] if pid not in (inner, below)))))
    assert set(node.backend.moves) == set(pids) - {inner, below}


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("still_there", [True, False])
def test_a_process_of_another_user_in_the_session(node: Node, still_there: bool) -> None:
    """sshd's own root process, what sudo started: along if it is where the session put it, and nowhere else."""
    pids = node.family(uid=0)
    (hers,) = node.family("echo; sleep 300")
    node.session(pids[0])
    if not still_there:
        node.backend.of_process[pids[1]] = BOBS
    told = node.join("18", Asking(0, node.handle(pids[2])), session=str(pids[0]))
    left = told["left"]
    assert isinstance(left, list)
    if still_there:
        assert (told["outcome"], left) == ("joined", [])
        assert sorted(node.backend.moves) == sorted(pids)
    else:
        assert (told["outcome"], told["moved"]) == ("partly", 2)
        assert left == [{"pid": pids[1], "why": "runs as another user, and elsewhere"}]
        assert pids[1] not in node.backend.moves
    assert hers not in node.backend.moves


def test_what_cannot_be_moved_is_said(node: Node) -> None:
    """The rest is moved, the outcome is not "joined", and the process is named with its reason."""
    pids = node.family()
    node.session(pids[0])
    node.backend.refuses[pids[1]] = "the kernel says no"
    told = node.join("18", Asking(ALICE, node.handle(pids[2])))
    assert (told["outcome"], told["moved"]) == ("partly", 2)
    assert told["left"] == [{"pid": pids[1], "why": "the kernel says no"}]
    assert told["message"] == "2 of 3 processes of this session are in job 18 now"
    assert (node.counted(JoinOutcome.PARTLY), node.counted(JoinOutcome.JOINED)) == (1, 0)


def test_a_leader_that_cannot_be_moved_leaves_everything(node: Node) -> None:
    """And what is noted of the session is as before."""
    pids = node.family()
    session = node.session(pids[0])
    node.backend.refuses[pids[0]] = "the job is frozen"
    assert node.refused("18", Asking(ALICE, node.handle(pids[1]))) is JoinOutcome.FAILED
    assert node.words == "nothing was moved: the job is frozen"
    assert node.sessions.find(session.id) == session


def test_more_processes_than_are_moved_are_said(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound, and each beyond it is named."""
    monkeypatch.setattr(joining, "PROCESSES_MAX", 1)
    pids = node.family()
    node.session(pids[0])
    told = node.join("18", Asking(ALICE, node.handle(pids[1])))
    assert (told["outcome"], told["moved"]) == ("partly", 2)
    (left,) = told["left"]  # type: ignore[misc]
    assert left["why"] == "more than 1 processes"


def test_a_session_that_never_comes_to_rest_is_said(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks are bounded; what was moved is moved, and nobody is told that all is well."""
    monkeypatch.setattr(joining, "LOOKS_MAX", 1)
    pids = node.family()
    node.session(pids[0])
    told = node.join("18", Asking(ALICE, node.handle(pids[1])))
    assert (told["outcome"], told["moved"]) == ("partly", 3)
    (left,) = told["left"]  # type: ignore[misc]
    assert "faster than they are moved" in left["why"]


def test_processes_that_come_while_it_is_moved(node: Node) -> None:
    """Found by the next look: here one that another starts just as it is about to be moved."""
    pids = node.family("sleep 300 & echo $!; echo; while :; do sh -c 'sleep 0.01'; done")
    node.session(pids[0])
    told = node.join("18", Asking(ALICE, node.handle(pids[1])))
    assert (told["outcome"], told["left"]) == ("joined", [])
    assert set(pids) <= set(node.backend.moves)


# ---- what is refused


def _asking(node: Node, who: str, pids: Sequence[int]) -> Asking:
    if who == "no process":
        return Asking(ALICE, None)
    if who == "ended":
        gone = subprocess.Popen(["sleep", "300"], user=ALICE)
        handle = node.handle(gone.pid)
        gone.kill()
        gone.wait()
        return Asking(ALICE, handle)
    if who == "outside":
        return Asking(ALICE, node.handle(node.family("echo; sleep 300")[0]))
    if who == "su":
        return Asking(BOB, node.handle(node.family("echo; sleep 300", BOB)[0]))
    if who == "rights of two":
        return Asking(BOB, node.handle(pids[1]))
    raise AssertionError(who)


@pytest.mark.parametrize(
    ("who", "words"),
    [
        ("no process", "the process that connected to the agent has ended"),
        ("ended", "the process that connected to the agent has ended"),
        ("outside", "not a session that was put into a job"),
        ("su", "not a session that was put into a job"),
        ("rights of two", "runs with the rights of more than one user"),
    ],
)
def test_who_asks_is_in_no_session_of_their_own(node: Node, who: str, words: str) -> None:
    """What the kernel says of the process that connected is all that counts."""
    pids = node.family()
    node.session(pids[0])
    assert node.refused("18", _asking(node, who, pids)) is JoinOutcome.NO_SESSION
    assert words in node.words


def test_within_su_the_session_is_not_its_new_user_s(node: Node) -> None:
    """bob's process below alice's shell moves nothing of hers, and is told nothing of her session."""
    pids = node.family("sleep 300 & echo $!; echo; wait", uid=0)
    node.session(pids[0])
    shell = subprocess.Popen(["sleep", "300"], user=BOB)
    node.processes.append(shell)  # type: ignore[arg-type]
    inner = Asking(BOB, node.handle(shell.pid))
    node.sessions.of_process = lambda pid: node.sessions.find(str(pids[0]))  # type: ignore[method-assign]
    assert node.refused("7", inner) is JoinOutcome.NO_SESSION
    assert "alice" not in node.words


@pytest.mark.parametrize(
    ("job_id", "outcome", "words"),
    [
        ("99", JoinOutcome.NO_SUCH_JOB, "alice has no job '99' running on this node"),
        ("7", JoinOutcome.NO_SUCH_JOB, "alice has no job '7' running on this node"),
        ("../17", JoinOutcome.NO_SUCH_JOB, "alice has no job '../17' running on this node"),
        ("17", JoinOutcome.ALREADY, "this session is in job 17 already"),
    ],
)
def test_the_job_cannot_be_joined(node: Node, job_id: str, outcome: JoinOutcome, words: str) -> None:
    """Another user's job is refused in the very words of one that is not there, by alice and for root alike."""
    pids = node.family()
    node.session(pids[0])
    assert node.refused(job_id, Asking(ALICE, node.handle(pids[1]))) is outcome
    assert node.words == words
    assert node.refused(job_id, Asking(0, None), session=str(pids[0])) is outcome


def test_a_session_that_has_left_its_job_may_go_back(node: Node) -> None:
    """Noted in job 17 and not there: that is no "already"."""
    pids = node.family()
    node.session(pids[0])
    for pid in pids:
        del node.backend.of_process[pid]
    assert node.join("17", Asking(ALICE, node.handle(pids[1])))["outcome"] == "joined"


def test_a_session_one_of_whose_processes_has_left_is_brought_together(node: Node) -> None:
    """The watch has given it up, or only reported it: "already" would leave nobody a way to put it back."""
    pids = node.family()
    node.session(pids[0])
    del node.backend.of_process[pids[-1]]
    told = node.join("17", Asking(ALICE, node.handle(pids[1])))
    assert (told["outcome"], told["moved"]) == ("joined", len(pids))
    assert node.backend.of_process[pids[-1]] == OLD
    assert node.refused("17", Asking(ALICE, node.handle(pids[1]))) is JoinOutcome.ALREADY


def test_the_job_manager_cannot_be_asked(node: Node) -> None:
    """No guess, and nothing is moved."""
    pids = node.family()
    node.session(pids[0])
    node.backend.down = "no mount"
    assert node.refused("18", Asking(ALICE, node.handle(pids[1]))) is JoinOutcome.UNAVAILABLE
    assert "no mount" in node.words


def test_only_root_names_a_session(node: Node) -> None:
    """A user's is the one they ask from."""
    pids = node.family()
    session = node.session(pids[0])
    assert node.refused("18", Asking(ALICE, node.handle(pids[1])), session=session.id) is JoinOutcome.NO_SESSION
    assert node.refused("18", Asking(0, None), session="1-1") is JoinOutcome.NO_SESSION
    assert node.join("18", Asking(0, None), session=session.id)["outcome"] == "joined"


def test_a_job_with_a_container_is_not_entered_from_outside(node: Node) -> None:
    """Its cgroups alone would be half of it. Where the session is in those namespaces already, it is no obstacle."""
    pids = node.family()
    node.session(pids[0])
    other = subprocess.Popen(["unshare", "--ipc", "sleep", "300"])
    node.processes.append(other)  # type: ignore[arg-type]
    asyncio.run(until(lambda: Path(f"/proc/{other.pid}/comm").read_text() == "sleep\n"))
    spaces = {"17": [], "18": [f"/proc/{other.pid}/ns/ipc"]}
    node.backend.spaces = spaces  # type: ignore[attr-defined]
    original = node.backend.session

    def session(job: Job, x11: bool, namespaces: bool, deadline: Deadline) -> object:
        node.backend.namespaces = spaces[job.id]
        return original(job, x11, namespaces, deadline)

    node.backend.session = session  # type: ignore[method-assign, assignment]
    asking = Asking(ALICE, node.handle(pids[1]))
    assert node.refused("18", asking) is JoinOutcome.CONTAINER
    assert node.words.startswith("job 18 has a container (namespaces of its own)")
    # In that of the job to leave: half of it would stay behind.
    spaces["17"], spaces["18"] = [f"/proc/{pids[0]}/ns/ipc"], []
    assert node.refused("18", asking) is JoinOutcome.CONTAINER
    assert node.words.startswith("this session is in the container of job 17")
    # In both jobs' already; and where sessions enter no containers at all, in that of neither.
    spaces["18"] = [f"/proc/{pids[0]}/ns/ipc"]
    assert node.join("18", asking)["outcome"] == "joined"
    spaces["17"] = spaces["18"] = [f"/proc/{other.pid}/ns/ipc"]
    assert node.join("17", asking)["outcome"] == "joined"


@pytest.mark.parametrize("ended", [True, False])
def test_a_session_whose_namespaces_cannot_be_seen(node: Node, monkeypatch: pytest.MonkeyPatch, ended: bool) -> None:
    """It ended in the meantime, or the agent has no descriptor left: said in words, and nothing is moved."""
    pids = node.family()
    node.session(pids[0])
    asking = Asking(ALICE, node.handle(pids[1]))
    listed = os.listdir

    def list_or_fail(path: str) -> List[str]:
        if path != f"/proc/{pids[0]}/ns":
            return listed(path)
        if not ended:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        node.processes[0].kill()
        node.processes[0].wait()
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(os, "listdir", list_or_fail)
    assert node.refused("18", asking) is (JoinOutcome.NO_SESSION if ended else JoinOutcome.UNAVAILABLE)
    assert node.words == "the session has ended" if ended else "Too many open files" in node.words
    assert node.backend.moves == []


def test_a_session_that_cannot_be_listed_is_joined_as_far_as_it_was(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader is in the job by then: that is what is said, and not that nothing was moved."""
    pids = node.family()
    node.session(pids[0])

    def look() -> Dict[int, tree.Row]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(joining, "look", look)
    result = node.join("18", Asking(ALICE, node.handle(pids[1])))
    assert (result["outcome"], result["moved"]) == ("partly", 1)
    left = result["left"]
    assert isinstance(left, list)
    assert [(each["pid"], "Too many open files" in each["why"]) for each in left] == [(pids[0], True)]
    assert node.backend.moves == [pids[0]]


# ---- how often


def test_joins_are_counted_per_user_and_forgotten_in_time(node: Node) -> None:
    """Refused ones count as well, and what is refused for its rate is not told of each time; root is not counted."""
    pids = node.family()
    node.session(pids[0])
    asking = Asking(ALICE, node.handle(pids[1]))
    for _ in range(JOINS_MAX):
        assert node.refused("99", asking) is JoinOutcome.NO_SUCH_JOB
    told = len(node.told())
    assert node.refused("18", asking) is JoinOutcome.RATE
    assert node.words == f"too many joins; the next one may be in {JOINS_WITHIN_S:.0f} s"
    assert (told, len(node.told())) == (JOINS_MAX, 0)
    assert node.refused("18", Asking(BOB, None)) is JoinOutcome.NO_SESSION
    assert node.join("18", Asking(0, None), session=str(pids[0]))["outcome"] == "joined"
    node.now = JOINS_WITHIN_S
    assert node.join("17", asking)["outcome"] == "joined"


def test_a_large_session_counts_for_more(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each so many processes are a join more; a single one never for more than all there are in a minute."""
    monkeypatch.setattr(joining, "PROCESSES_PER_JOIN", 1)
    pids = node.family()
    node.session(pids[0])
    asking = Asking(ALICE, node.handle(pids[1]))
    allowed = [node.join(("18", "17")[count % 2], asking)["moved"] for count in range(JOINS_MAX // 4 + 1)]
    assert allowed == [len(pids)] * len(allowed)
    assert node.refused("17", asking) is JoinOutcome.RATE
    node.now = JOINS_WITHIN_S
    assert node.join("17", asking)["moved"] == len(pids)


def test_the_table_of_users_is_bounded() -> None:
    """Who has not asked for longest is forgotten first; a user who asks all the time is not."""
    rates = Rates(lambda: 0.0, at_most=1)
    assert rates.wait_s(1) == 0.0
    for uid in range(10, 5000):
        assert rates.wait_s(uid) == 0.0
        assert rates.wait_s(1) > 0
    assert len(rates) <= 1024


# ---- where am I, on the same processes


def whereami(node: Node, asking: Asking) -> Result:
    return asyncio.run(node.control.execute(Command("whereami", {}), asking))


def test_whereami_tells_of_the_process_that_connected(node: Node) -> None:
    """Its job, its session, its user's other jobs."""
    pids = node.family()
    session = node.session(pids[0])
    told = whereami(node, Asking(ALICE, node.handle(pids[1])))
    assert (told["job"], told["other_jobs"], told["pid"], told["uid"]) == ("17", ["18"], pids[1], ALICE)
    assert isinstance(told["session"], dict)
    assert (told["session"]["session"], told["advice"]) == (session.id, "")


def test_whereami_within_su_tells_nothing_of_the_session_s_user(node: Node) -> None:
    """Neither the job that it is in nor the session."""
    pids = node.family("echo; sleep 300", BOB)
    node.session(pids[0])
    told = whereami(node, Asking(BOB, node.handle(pids[0])))
    assert (told["job"], told["why"], told["session"]) == (None, "in a job of another user's", None)
    assert told["other_jobs"] == ["7"]
    assert "17" not in str({name: value for name, value in told.items() if name not in ("pid", "limits")})


def test_whereami_where_it_cannot_be_told(node: Node) -> None:
    """In two jobs at once: said, and no guess."""
    pids = node.family()
    node.backend.of_process[pids[0]] = Ambiguous("process is in jobs 17, 18 at once")
    told = whereami(node, Asking(ALICE, node.handle(pids[0])))
    assert (told["job"], told["why"]) == (None, "process is in jobs 17, 18 at once")


@pytest.mark.parametrize("who", ["no process", "ended", "rights of two"])
def test_whereami_of_nobody(node: Node, who: str) -> None:
    """Refused in words."""
    pids = node.family()
    with pytest.raises(CommandRefused):
        whereami(node, _asking(node, who, pids))


# ---- sessions and their stories


def test_sessions_are_shown_to_their_users_and_root(node: Node) -> None:
    """The table and the story; another user's session is as unknown as none."""
    hers, his = node.family(), node.family(uid=BOB)
    session = node.session(hers[0])
    node.session(his[0], BOB, BOBS)

    def do(name: str, uid: int, **arguments: str) -> Result:
        return asyncio.run(node.control.execute(Command(name, arguments), Asking(uid)))

    def listed(uid: int) -> List[object]:
        rows = do("sessions", uid)["sessions"]
        assert isinstance(rows, list)
        return [row["pid"] for row in rows]

    assert (listed(0), listed(ALICE), listed(4242)) == ([hers[0], his[0]], [hers[0]], [])
    for name in (session.id, str(hers[0]), str(hers[1])):
        told = do("explain", ALICE, session=name)
        assert (told["session"], told["job"], told["job_now"]) == (session.id, "17", "17")
        assert told["stages"] == [{"stage": "adopt", "found": "in job 17", "at_ms": 1.0}]
    refusals = set()
    for name in (session.id, str(hers[1]), "1-1", "x", "9" * 40, ""):
        with pytest.raises(CommandRefused, match="there is no session") as refusal:
            do("explain", BOB, session=name)
        refusals.add(str(refusal.value).replace(repr(name), "it"))
    assert len(refusals) == 1
    node.backend.of_process[hers[0]] = NEW
    assert do("explain", 0, session=session.id)["job_now"] == "18"


@pytest.mark.parametrize("arguments", [{}, {"session": "1", "user": "root"}, {"session": "1", "to": "127.0.0.1:22"}])
def test_explain_takes_one_or_the_other(node: Node, arguments: Dict[str, str]) -> None:
    """A session, or a user with what goes with one."""
    with pytest.raises(CommandRefused):
        asyncio.run(node.control.execute(Command("explain", arguments), Asking(0)))


def test_a_pid_that_has_passed_to_another_process_is_not_moved(node: Node) -> None:
    """Between the look at the session and the move: the one that was seen has ended, and is not spoken of."""
    leader, child, _ = node.family()
    session = node.session(leader)
    row = tree.look_at(child)
    assert row is not None
    seen = dataclasses.replace(row, start_ticks=row.start_ticks - 1)
    deadline = Deadline.after_ms(30_000)
    assert joining._move_one(node.backend, session, NEW, seen, deadline) is None
    assert node.backend.moves == []
    assert joining._move_one(node.backend, session, NEW, row, deadline) is None
    assert node.backend.moves == [child]
