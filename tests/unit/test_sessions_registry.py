"""The list of sessions: an entry is of one process, and of no other that comes to have its number."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
from typing import Iterator, List

import pytest
from fakes import ALICE, BOB, connection, job
from logs import LogLines, log_lines

from adoptd.model import Job, Witness
from adoptd.process import ProcessHandle, open_process, parent_of
from adoptd.sessions import Session, Sessions

__all__ = ["log_lines"]

JOB = job("17")

NEST = """
import os, sys
for _ in range(int(sys.argv[1])):
    if os.fork():
        os.wait()
        os._exit(0)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


class Child:
    """A process of the test's own, ended with the test."""

    def __init__(self, nested: int = 0) -> None:
        self._started = subprocess.Popen(
            [sys.executable, "-I", "-c", NEST, str(nested)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._started.stdout is not None
        self.innermost = int(self._started.stdout.readline())
        self.pid = self._started.pid

    def end(self) -> None:
        self._started.communicate()


class Place:
    """Sessions, and processes to put into them."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sessions = Sessions(lambda: self.now, capacity=4)
        self.children: List[Child] = []

    def child(self, nested: int = 0) -> Child:
        self.children.append(Child(nested))
        return self.children[-1]

    def add(self, child: Child, uid: int = ALICE, into: Job = JOB, reason: str = "single_job") -> Session:
        with open_process(child.pid) as process:
            return self.add_held(process, uid, into, reason)

    def add_held(self, process: ProcessHandle, uid: int = ALICE, into: Job = JOB, reason: str = "x") -> Session:
        return self.sessions.add(
            process,
            uid=uid,
            user="alice",
            job=into,
            witness=Witness.BPF,
            reason=reason,
            connection=connection(),
            service="sshd",
            stages=(("jobs_here", "17", 0.5),),
        )

    def close(self) -> None:
        for child in self.children:
            child.end()
        self.sessions.close()


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    with contextlib.closing(made):
        yield made


def test_an_id_of_an_earlier_process_of_that_pid_finds_nothing(place: Place) -> None:
    session = place.add(place.child())
    earlier = f"{session.pid}-{session.start_ticks - 1}"
    assert place.sessions.find(earlier) is None
    assert place.sessions.find(session.id) == session


@pytest.mark.parametrize("text", ["", "-", "-1", "0", "x", "12x", "99999999999999999999", "١٢", " 1", "1 "])
def test_what_is_no_id_finds_nothing(place: Place, text: str) -> None:
    place.add(place.child())
    assert place.sessions.find(text) is None


def test_a_pid_with_an_empty_start_is_no_id(place: Place) -> None:
    session = place.add(place.child())
    assert place.sessions.find(f"{session.pid}-") is None


def test_an_ended_session_is_gone_from_every_answer(place: Place) -> None:
    child, other = place.child(), place.child()
    session, stays = place.add(child), place.add(other)
    child.end()
    assert place.sessions.find(session.id) is None
    assert place.sessions.find(str(session.pid)) is None
    assert place.sessions.of_process(session.pid) is None
    assert place.sessions.hold(session) is None
    assert place.sessions.all() == (stays,)
    with pytest.raises(KeyError):
        place.sessions.moved(session, job("18"))


def test_the_callers_handle_stays_the_callers(place: Place) -> None:
    """And the entry does not need it: sshd's request is over long before its session."""
    child = place.child()
    with open_process(child.pid) as process:
        session = place.add_held(process)
        assert process.alive()
    held = place.sessions.hold(session)
    assert held is not None
    with held:
        assert held.alive()
        child.end()
        assert not held.alive()
    # Though somebody still held the process as it ended.
    assert len(place.sessions) == 0


def test_added_again_replaces(place: Place) -> None:
    """The session phase of a login in the process of its account phase."""
    child = place.child()
    place.add(child)
    place.now = 1001.0
    again = place.add(child, into=job("18"), reason="account_phase")
    assert place.sessions.all() == (again,)
    assert (again.job, again.since_s, again.reason) == (job("18"), 1001.0, "account_phase")


def test_a_process_is_of_the_session_it_descends_from(place: Place) -> None:
    child, other = place.child(nested=5), place.child()
    session = place.add(child)
    assert parent_of(child.innermost) not in (None, child.pid)
    assert place.sessions.of_process(child.innermost) == session
    assert place.sessions.of_process(child.pid) == session
    assert place.sessions.of_process(other.pid) is None
    assert place.sessions.of_process(1) is None
    assert place.sessions.of_process(0) is None


def test_moved_changes_the_job_and_nothing_else(place: Place) -> None:
    session = place.add(place.child())
    fresh = place.sessions.moved(session, job("18", identity=(2,)))
    assert place.sessions.find(session.id) == fresh
    assert (fresh.job, fresh.id, fresh.since_s, fresh.witness) == (
        job("18", identity=(2,)),
        session.id,
        session.since_s,
        session.witness,
    )


def test_who_has_most_sessions_makes_room(place: Place, log_lines: LogLines) -> None:
    """Alice's flood of sessions does not push out bob's one, though it is the oldest."""
    bobs = place.add(place.child(), uid=BOB)
    alices = [place.add(place.child()) for _ in range(5)]
    assert place.sessions.all() == (bobs, *alices[2:])
    assert sum("session_dropped" in line for line in log_lines()) == 2


def test_readable_when_a_session_ends(place: Place) -> None:
    """What the event loop waits for, so that nothing is kept of a session that nobody asks about."""
    child = place.child()
    place.add(child)
    poll = select.poll()
    poll.register(place.sessions.fileno(), select.POLLIN)
    assert not poll.poll(0)
    child.end()
    assert poll.poll(5000)
    place.sessions.drop_ended()
    assert not poll.poll(0)
