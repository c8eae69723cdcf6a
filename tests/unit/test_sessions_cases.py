"""The guard's books: bounded, patient for so long, and nobody's moves delay another's."""

from __future__ import annotations

import dataclasses
from typing import Dict, List, Optional, Tuple

import pytest
from fakes import ALICE, BOB, job

from adoptd.config import SessionConfig
from adoptd.probe.record import Move
from adoptd.sessions.cases import AT_ONCE, LINES_MAX, RETRIES, SUSPECTS_MAX, Cases, Finding, Task
from adoptd.sessions.escapes import (
    FIRST_WAIT_S,
    FORGIVEN_AFTER_S,
    READOPTIONS_MAX,
    EscapeOutcome,
    Mover,
    OnEscape,
    mover_of,
)
from adoptd.sessions.kept import Session
from adoptd.sessions.whereabouts import Found, Place, Return


def session(pid: int = 100, uid: int = ALICE) -> Session:
    return Session(f"{pid}-7", pid, 7, uid, "u", job("17", uid=uid), None, "x", 0.0, None, "sshd", ())


def move(pid: int, actor: int = 999, actor_uid: int = 0, told: bool = True) -> Move:
    return Move(told, pid, 1, 100, 7, ALICE, 1, 0, actor, actor_uid, "sh", "/")


def outside(pid: int, where: str = "0::/\n") -> Found:
    return Found(pid, Place.OUTSIDE, where)


class Book:
    def __init__(self, *sessions: Session) -> None:
        self.on_escape = OnEscape.READOPT
        self.cases = Cases(lambda: self.on_escape)
        self.known: Dict[str, Session] = {each.id: each for each in sessions}
        self.waiting: List[str] = []

    def take(self, now_s: float) -> List[Task]:
        return self.cases.take(now_s, self.known.get, lambda session: session.id in self.waiting)

    def settle(self, task: Task, now_s: float, *found: Found, back: Optional[Return] = None) -> Optional[EscapeOutcome]:
        return self.cases.settle(Finding(task, found, (), back), now_s)


def test_a_user_who_moves_thousands_is_one_task_and_comes_after_who_waits_longer() -> None:
    alice, bob = session(), session(200, BOB)
    book = Book(alice, bob)
    book.cases.suspect(bob, 0.5, move(201))
    for pid in range(1000, 9000):
        book.cases.suspect(alice, 1.0, move(pid))
    first, second = book.take(2.0)
    assert first.session == bob
    assert (len(second.moves), second.whole) == (SUSPECTS_MAX, True)
    assert book.take(2.0) == []


def test_no_more_than_a_round_at_once() -> None:
    sessions = [session(pid) for pid in range(100, 100 + 3 * AT_ONCE)]
    book = Book(*sessions)
    for number, each in enumerate(sessions):
        book.cases.suspect(each, float(number))
    rounds = [[task.session for task in book.take(1e6)] for _ in range(4)]
    assert [len(each) for each in rounds] == [AT_ONCE, AT_ONCE, AT_ONCE, 0]
    assert [each for those in rounds for each in those] == sessions


def test_not_before_it_is_due_and_not_of_a_session_that_is_forgotten() -> None:
    book = Book(session())
    book.cases.suspect(session(), 5.0, move(1))
    book.cases.suspect(session(300), 1.0)
    assert book.cases.next_due_s() == 1.0
    assert book.take(4.0) == []
    assert book.cases.next_due_s() == 5.0
    book.cases.keep({}.get)
    assert book.cases.next_due_s() is None


def test_a_login_under_way_waits_and_is_not_forgotten() -> None:
    book = Book(session())
    book.waiting = [session().id]
    book.cases.suspect(session(), 1.0, move(1))
    assert book.take(1.0) == []
    book.waiting = []
    (task,) = book.take(2.0)
    assert set(task.moves) == {1}


def test_each_time_it_has_to_be_waited_for_longer_and_then_it_is_only_reported() -> None:
    book, now = Book(session()), 1000.0
    for number in range(READOPTIONS_MAX):
        book.cases.suspect(session(), now, move(1))
        (task,) = book.take(now)
        assert task.returns
        assert book.settle(task, now, outside(1), back=Return(1, ())) is EscapeOutcome.READOPTED
        wait_s = FIRST_WAIT_S * 2**number
        if number == READOPTIONS_MAX - 1:
            break
        # Out again at once: looked at, and left until its time has come.
        book.cases.suspect(session(), now, move(1))
        (task,) = book.take(now)
        assert not task.returns
        assert book.settle(task, now, outside(1)) is None
        assert book.cases.next_due_s() == now + wait_s
        now += wait_s
        book.take(now)
    assert book.cases.is_given_up(session())
    now += 300.0
    book.cases.suspect(session(), now, move(1))
    (task,) = book.take(now)
    assert not task.returns
    assert book.settle(task, now, outside(1)) is EscapeOutcome.REPORTED
    # Seen outside again and again it is never forgiven; quiet for long enough it is.
    now += FORGIVEN_AFTER_S - 1
    book.cases.suspect(session(), now)
    (task,) = book.take(now)
    assert (task.returns, book.settle(task, now, outside(1))) == (False, None)
    now += FORGIVEN_AFTER_S
    book.cases.suspect(session(), now)
    assert [task.returns for task in book.take(now)] == [True]


@pytest.mark.parametrize(("back", "outcome"), [(Return(1, ("no",)), "failed"), (Return(0, ("no",)), "failed")])
def test_a_process_that_could_not_be_moved_is_a_failure(back: Return, outcome: str) -> None:
    book = Book(session())
    book.cases.suspect(session(), 0.0, move(1))
    (task,) = book.take(1000.0)
    found = book.settle(task, 1000.0, outside(1), outside(2), back=back)
    assert found is not None
    assert found.value == outcome


def test_what_went_back_or_ended_by_itself_is_nothing() -> None:
    book = Book(session())
    book.cases.suspect(session(), 0.0, move(1))
    (task,) = book.take(1000.0)
    assert book.settle(task, 1000.0, outside(1), back=Return(0, ())) is None
    assert book.cases.next_due_s() is None


def test_reported_once_for_each_place() -> None:
    book = Book(session())
    book.on_escape = OnEscape.REPORT
    seen: List[Optional[EscapeOutcome]] = []
    for number, where in enumerate(("a", "a", "b", "b", "a")):
        book.cases.suspect(session(), float(number))
        (task,) = book.take(1000.0)
        seen.append(book.settle(task, 1000.0, outside(1, where)))
    reported = EscapeOutcome.REPORTED
    assert seen == [reported, None, reported, None, reported]
    book.cases.reassigned(session())
    book.cases.suspect(session(), 0.0)
    (task,) = book.take(1000.0)
    assert book.settle(task, 1000.0, outside(1, "a")) is reported


def test_what_cannot_be_told_is_looked_at_a_few_times() -> None:
    """And the last time it is known to be the last."""
    book, now, looks = Book(session()), 0.0, 0
    book.cases.suspect(session(), now, move(1))
    while True:
        due_s = book.cases.next_due_s()
        if due_s is None:
            break
        now = due_s
        (task,) = book.take(now)
        looks += 1
        assert task.last == (looks == RETRIES + 1)
        book.cases.settle(Finding(task, (), (Found(1, Place.UNSURE),), None), now)
    assert looks == RETRIES + 1


# ---- what is outside now


def gone(pid: int) -> Found:
    return Found(pid, Place.JOB_ENDED, "0::/\n")


def strays(book: Book) -> Dict[str, List[int]]:
    return {name: sorted(each.found) for name, each in book.cases.strays().items()}


def look(book: Book, *pids: int) -> Task:
    """The next look at the session: at the processes named, or at all of it."""
    for pid in pids:
        book.cases.suspect(session(), 0.0, move(pid))
    if not pids:
        book.cases.suspect(session(), 0.0)
    (task,) = book.take(1e9)
    return task


def test_what_is_outside_is_known_until_it_is_seen_elsewhere() -> None:
    book = Book(session())
    book.on_escape = OnEscape.REPORT
    book.settle(look(book, 1, 2), 0.0, outside(1), outside(2))
    assert strays(book) == {"100-7": [1, 2]}
    # A look at one says nothing of the other; one that cannot tell says nothing at all.
    book.settle(look(book, 1), 0.0)
    assert strays(book) == {"100-7": [2]}
    book.cases.settle(Finding(look(book), (), (Found(2, Place.UNSURE),), None), 0.0)
    assert strays(book) == {"100-7": [2]}
    book.settle(look(book), 0.0, outside(3))
    assert strays(book) == {"100-7": [3]}
    book.settle(look(book), 0.0)
    assert strays(book) == {}


def test_what_was_moved_back_is_not_outside_and_what_could_not_be_is() -> None:
    book = Book(session())
    book.settle(look(book), 1e6, outside(1), outside(2), back=Return(1, ("no",), (outside(2),)))
    assert strays(book) == {"100-7": [2]}
    book.settle(look(book), 2e6, outside(2), back=Return(1, ()))
    assert strays(book) == {}


def test_one_whose_turn_to_be_moved_back_has_not_come_is_outside() -> None:
    book = Book(session())
    book.settle(look(book, 1), 1000.0, outside(1), back=Return(1, ()))
    book.cases.suspect(session(), 1000.0, move(1))
    (task,) = book.take(1000.0)
    assert not task.returns
    book.settle(task, 1000.0, outside(1))
    assert strays(book) == {"100-7": [1]}


def test_out_of_a_job_that_has_ended_is_outside_and_no_escape() -> None:
    book = Book(session())
    assert book.cases.settle(Finding(look(book), (), (), None, (gone(1),)), 0.0) is None
    assert strays(book) == {"100-7": [1]}
    assert book.cases.strays()["100-7"].job_ended
    book.settle(look(book), 0.0, outside(1), back=Return(0, ("no",), (outside(1),)))
    assert not book.cases.strays()["100-7"].job_ended


def test_put_into_a_job_nothing_is_outside_and_what_was_given_up_is_tried_again() -> None:
    book, now = Book(session()), 1e6
    for _ in range(READOPTIONS_MAX):
        book.cases.suspect(session(), now)
        (task,) = book.take(now)
        book.settle(task, now, outside(1), back=Return(0, ("no",), (outside(1),)))
        now += 100.0
    assert book.cases.is_given_up(session())
    late = look(book)
    assert book.cases.reassigned(session())
    assert strays(book) == {}
    # What was seen while somebody put it there is of before.
    book.settle(late, now, outside(1))
    assert strays(book) == {}
    assert not book.cases.is_given_up(session())
    assert look(book).returns
    # Where nothing was outside nothing is forgiven: a user who joins again and again is not fought for ever.
    assert not book.cases.reassigned(session())


def test_of_a_session_that_is_forgotten_nothing_is_outside() -> None:
    book = Book(session())
    book.on_escape = OnEscape.REPORT
    book.settle(look(book), 0.0, outside(1))
    book.cases.keep({}.get)
    assert strays(book) == {}


def test_so_many_of_one_session_are_named() -> None:
    book = Book(session())
    book.on_escape = OnEscape.REPORT
    book.settle(look(book), 0.0, *(outside(pid) for pid in range(1, 1000)))
    assert len(strays(book)["100-7"]) == SUSPECTS_MAX


def test_a_session_fills_no_log() -> None:
    book = Book(session())
    said: Tuple[Optional[bool], ...] = tuple(book.cases.line(session()) for _ in range(1000))
    assert said[: LINES_MAX - 1] == (True,) * (LINES_MAX - 1)
    assert said[LINES_MAX - 1] is None
    assert not any(said[LINES_MAX:])


@pytest.mark.parametrize(
    ("made", "mover"),
    [
        (None, Mover.UNKNOWN),
        (move(5, actor=1, actor_uid=0, told=False), Mover.UNKNOWN),
        (move(5, actor=1), Mover.SYSTEMD),
        (move(5, actor=5), Mover.SELF),
        (move(5, actor=100), Mover.SELF),
        (move(5, actor=77, actor_uid=ALICE), Mover.SELF),
        (move(5, actor=77), Mover.ROOT),
        (move(5, actor=77, actor_uid=BOB), Mover.OTHER_USER),
    ],
)
def test_who_moved_it(made: Optional[Move], mover: Mover) -> None:
    assert mover_of(made, session()) is mover


def test_the_configuration_has_the_guards_words() -> None:
    rule = next(each for each in dataclasses.fields(SessionConfig) if each.name == "on_escape").metadata["rule"]
    assert all(rule.accepts(each.value) for each in OnEscape)
    assert OnEscape(SessionConfig().on_escape) is OnEscape.READOPT
