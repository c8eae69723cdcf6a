"""Where processes are taken to be, and that only a session's own are ever moved."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Set

import pytest
from fakes import ALICE, BOB, FakeBackend, job, soon

from adoptd.deadline import Deadline
from adoptd.model import Ambiguous, Job
from adoptd.process import ProcessHandle, open_process
from adoptd.sessions.descent import Descent
from adoptd.sessions.kept import Session
from adoptd.sessions.whereabouts import Found, Place, Whereabouts

MINE, MY_OTHER, BOBS = job("17"), job("18", identity=(2,)), job("19", uid=BOB, identity=(3,))


def session_of(pid: int, start_ticks: int = 1) -> Session:
    return Session(f"{pid}-{start_ticks}", pid, start_ticks, ALICE, "alice", MINE, None, "x", 0.0, None, "sshd", ())


class Counting(FakeBackend):
    """Says what it was told to of every process, and how often it was asked."""

    def __init__(self, place: object, *jobs: Job) -> None:
        super().__init__(*jobs)
        self.place = place
        self.asked = 0

    def contains(self, job: Job, pid: int) -> bool:
        self.asked += 1
        if self.down is not None:
            return super().contains(job, pid)
        return self.place == job or self.adopted.get(pid) == job

    def job_of_process(self, pid: int) -> Optional[Job]:
        if isinstance(self.place, Exception):
            raise self.place
        return self.place if isinstance(self.place, Job) else None


@contextlib.contextmanager
def at_once(session: Session, deadline: Deadline) -> Iterator[bool]:
    """Nobody else moves the session, and it is to be where it was to be."""
    yield True


class Relatives:
    def __init__(self, *pids: int) -> None:
        self.mine = set(pids)

    def pids(self) -> Set[int]:
        return self.mine

    def has(self, pid: int, process: ProcessHandle) -> bool:
        return pid in self.mine


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    yield process
    process.communicate()


def places(found: List[Found]) -> List[Place]:
    return [each.place for each in found]


@pytest.mark.parametrize(
    ("where", "place"),
    [
        (None, Place.OUTSIDE),
        (BOBS, Place.OUTSIDE),
        (MY_OTHER, Place.OTHER_JOB),
        (MINE, Place.INSIDE),
        (Ambiguous("it is being moved"), Place.BETWEEN),
    ],
)
def test_where_a_process_is(child: subprocess.Popen[bytes], where: object, place: Place) -> None:
    backend = Counting(where, MINE, MY_OTHER, BOBS)
    assert places(Whereabouts().look(backend, session_of(child.pid), [child.pid], soon())) == [place]


def test_in_one_hierarchy_of_its_job_only_is_outside(child: subprocess.Popen[bytes]) -> None:
    """The manager names the job and says that the process is not wholly in it: one of its limits does not hold."""

    class Torn(Counting):
        def contains(self, job: Job, pid: int) -> bool:
            return False

    found = Whereabouts().look(Torn(MINE, MINE), session_of(child.pid), [child.pid], soon())
    assert places(found) == [Place.OUTSIDE]


def test_a_job_that_has_ended_is_no_escape(child: subprocess.Popen[bytes]) -> None:
    """Also if there is another of its id by now."""
    later = job("17", identity=(99,))
    found = Whereabouts().look(Counting(None, later), session_of(child.pid), [child.pid], soon())
    assert places(found) == [Place.JOB_ENDED]


@pytest.mark.parametrize(
    ("where", "place"), [(MY_OTHER, Place.OTHER_JOB), (BOBS, Place.JOB_ENDED), (Ambiguous("moved"), Place.JOB_ENDED)]
)
def test_after_its_job_a_process_may_be_in_another(child: subprocess.Popen[bytes], where: object, place: Place) -> None:
    found = Whereabouts().look(Counting(where, MY_OTHER, BOBS), session_of(child.pid), [child.pid], soon())
    assert places(found) == [place]


def test_a_manager_that_cannot_be_asked_is_no_escape(child: subprocess.Popen[bytes]) -> None:
    backend = Counting(None, MINE)
    backend.down = "slurmstepd does not answer"
    (found,) = Whereabouts().look(backend, session_of(child.pid), [child.pid], soon())
    assert (found.place, found.why) == (Place.UNSURE, "slurmstepd does not answer")


def test_a_job_of_another_manager_is_no_escape(child: subprocess.Popen[bytes]) -> None:
    """A session from before [jobs] backend was changed."""

    class Numbers(Counting):
        def contains(self, job: Job, pid: int) -> bool:
            return int("j17") == 0

    found = Whereabouts().look(Numbers(None, MINE), session_of(child.pid), [child.pid], soon())
    assert places(found) == [Place.UNSURE]


def test_no_time_left_is_no_escape(child: subprocess.Popen[bytes]) -> None:
    found = Whereabouts().look(Counting(None, MINE), session_of(child.pid), [child.pid], soon(0.0))
    assert places(found) == [Place.UNSURE]


def test_an_ended_process_is_gone(child: subprocess.Popen[bytes]) -> None:
    child.communicate()
    assert places(Whereabouts().look(Counting(None, MINE), session_of(child.pid), [child.pid], soon())) == [Place.GONE]


@pytest.mark.parametrize("where", [None, MINE])
def test_a_thousand_processes_in_one_cgroup_are_one_question(child: subprocess.Popen[bytes], where: object) -> None:
    backend, whereabouts = Counting(where, MINE), Whereabouts()
    found = whereabouts.look(backend, session_of(child.pid), [child.pid] * 1000, soon())
    assert (len(found), backend.asked) == (1000, 1)
    whereabouts.look(backend, session_of(child.pid), [child.pid] * 1000, soon())
    # What is inside stays known; what was outside has to be asked about again.
    assert backend.asked == (1 if where == MINE else 2)


def test_a_pid_that_is_another_process_by_now_is_not_touched(child: subprocess.Popen[bytes]) -> None:
    """Between the look and the move the session's process ended, and its number went to somebody else's."""
    backend = Counting(None, MINE)
    outside = [Found(child.pid, Place.OUTSIDE, "0::/\n")]
    back = Whereabouts().bring_back(backend, session_of(child.pid), outside, Relatives(), at_once, soon())
    assert (back.moved, back.failed, backend.tried) == (0, (), [])


def test_one_that_cannot_be_moved_is_named(child: subprocess.Popen[bytes]) -> None:
    backend = Counting(None, MINE)
    backend.cannot_adopt["17"] = "EBUSY"
    outside = [Found(child.pid, Place.OUTSIDE, "0::/\n")]
    back = Whereabouts().bring_back(backend, session_of(child.pid), outside, Relatives(child.pid), at_once, soon())
    assert (back.moved, back.failed, back.left) == (0, ("EBUSY",), tuple(outside))
    assert len(backend.tried) == 1


def test_whose_turn_it_is_not_stays_outside(child: subprocess.Popen[bytes]) -> None:
    @contextlib.contextmanager
    def never(session: Session, deadline: Deadline) -> Iterator[bool]:
        yield False

    outside = [Found(child.pid, Place.OUTSIDE, "0::/\n"), Found(1, Place.OUTSIDE, "0::/\n")]
    relatives = Relatives(child.pid)
    back = Whereabouts().bring_back(Counting(None, MINE), session_of(child.pid), outside, relatives, never, soon())
    assert (back.moved, back.failed, back.left) == (0, (), tuple(outside))


@pytest.mark.parametrize(
    ("cgroups", "shown"),
    [
        ("", ""),
        ("0::/\n", "/"),
        ("4:memory:/a:b\n2:cpu:/\n0::/c\n", "/a:b, /c"),
        ("4:memory:/a\n0::/a\n", "/a"),
        ("0::/" + "x" * 999, "/" + "x" * 255),
    ],
)
def test_what_people_are_shown(cgroups: str, shown: str) -> None:
    assert Found(1, Place.OUTSIDE, cgroups).shown == shown


# ---- which processes are a session's, where the kernel has no list


def made(root: Path, processes: Dict[int, str]) -> None:
    """``processes``: PARENT:START by pid."""
    for path in root.iterdir():
        (path / "stat").unlink()
        path.rmdir()
    for pid, words in processes.items():
        parent, _, start = words.partition(":")
        (root / str(pid)).mkdir()
        after = ["S", parent, *["0"] * 17, start, *["0"] * 30]
        (root / str(pid) / "stat").write_text(f"{pid} (a ) b) {' '.join(after)}\n")


def test_descent(tmp_path: Path) -> None:
    descent, one, two = Descent(str(tmp_path)), session_of(100), session_of(200)
    made(tmp_path, {1: "0:1", 100: "1:1", 101: "100:2", 102: "101:3", 200: "102:1", 201: "200:5", 300: "1:1"})
    # A session within another has its own processes.
    assert descent.look([one, two]) == {one.id: {100, 101, 102}, two.id: {200, 201}}
    # Their parents have ended, and they and their children are still who they were.
    made(tmp_path, {1: "0:1", 102: "1:3", 103: "102:4", 201: "1:5", 300: "1:1"})
    assert descent.look([one, two]) == {one.id: {102, 103}, two.id: {201}}
    assert descent.is_of(one.id, 103, 4)
    assert not descent.is_of(one.id, 103, 5)
    assert not descent.is_of(two.id, 103, 4)
    # Another has its number, and is nobody's.
    made(tmp_path, {1: "0:1", 102: "1:9", 103: "1:9", 201: "1:5", 100: "1:9"})
    assert descent.look([one, two]) == {one.id: set(), two.id: {201}}
    # A session that is not asked about any more is forgotten.
    assert descent.look([one]) == {one.id: set()}
    assert descent.look([one, two]) == {one.id: set(), two.id: set()}


def test_a_real_one(child: subprocess.Popen[bytes]) -> None:
    with open_process(child.pid) as process:
        session = session_of(child.pid, process.start_ticks)
    assert Descent().look([session]) == {session.id: {child.pid}}
