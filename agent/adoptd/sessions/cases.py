"""The guard's books: which session is to be looked at and when, and what is held against it.

Owns the bounds on both: how many processes are remembered, how often one is looked at again, how often a session is
moved back. No I/O and no clock: times are monotonic seconds and come from the caller. Called by the guard, in its
event loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Dict, Iterable, List, Mapping, Optional, Tuple

from adoptd.probe.record import Move
from adoptd.sessions.escapes import EscapeOutcome, OnEscape, Patience
from adoptd.sessions.kept import Session
from adoptd.sessions.whereabouts import Found, Return, Strays

# Sessions looked at in one round.
AT_ONCE = 16
# Processes of one session that are remembered to be looked at; of one with more, all are.
SUSPECTS_MAX = 64
# A process that cannot be told to be in or out is looked at again so often, each time after twice as long.
RETRIES = 4
RETRY_S = 0.5
# Lines in the log about one session, in as much time as an escape is held against it.
LINES_MAX = 16


@dataclass
class _Case:
    """What is known against one session."""

    moves: Dict[int, Move] = field(default_factory=dict)
    whole: bool = False
    due_s: Optional[float] = None
    retries: int = 0
    patience: Patience = field(default_factory=Patience)
    lines: int = 0
    # Processes that were reported to be outside, and the cgroups they were in.
    reported: Dict[int, str] = field(default_factory=dict)
    # Processes that were out of the job when they were last looked at, and stayed so. How often the session was put
    # into a job: what was seen of it before says nothing of it now.
    strays: Dict[int, Found] = field(default_factory=dict)
    assigned: int = 0


@dataclass(frozen=True)
class Task:
    """One session to be looked at: the processes that were moved and, with ``whole``, all of it.

    ``returns``: what is outside is to be moved back. ``last``: what cannot be told is not looked at again.
    ``assigned``: which of the session's assignments to a job it is about.
    """

    session: Session
    moves: Mapping[int, Move]
    whole: bool
    returns: bool
    last: bool
    assigned: int


@dataclass(frozen=True)
class Finding:
    """What came of a task. ``returned``: of moving ``outside`` back, None if that was not tried.

    ``ended``: those that are out of a job that has ended, to which there is no way back.
    """

    task: Task
    outside: Tuple[Found, ...]
    unsure: Tuple[Found, ...]
    returned: Optional[Return]
    ended: Tuple[Found, ...] = ()

    @property
    def strays(self) -> Tuple[Found, ...]:
        """Those that are out of the job after all that was done."""
        return (*(self.outside if self.returned is None else self.returned.left), *self.ended)


class Cases:
    """One case for each session that there is something to do about, or was of late."""

    def __init__(self, on_escape: Callable[[], OnEscape]) -> None:
        """``on_escape`` is asked each time: the configuration may be read again."""
        self._on_escape = on_escape
        self._cases: Dict[str, _Case] = {}

    def suspect(self, session: Session, due_s: float, move: Optional[Move] = None) -> None:
        """Have ``session`` looked at by ``due_s``: the process that was moved, or all of it."""
        case = self._cases.setdefault(session.id, _Case())
        if move is None or (len(case.moves) >= SUSPECTS_MAX and move.pid not in case.moves):
            case.whole = True
        else:
            case.moves[move.pid] = move
        case.due_s = due_s if case.due_s is None else min(case.due_s, due_s)

    def next_due_s(self) -> Optional[float]:
        """When something is to be looked at next."""
        return min((case.due_s for case in self._cases.values() if case.due_s is not None), default=None)

    def keep(self, known: Callable[[str], object]) -> None:
        """Forget the cases of sessions of which ``known`` is None."""
        for identity in [each for each in self._cases if known(each) is None]:
            del self._cases[identity]

    def reassigned(self, session: Session) -> bool:
        """The session was put into a job: where it was found to be before is no longer the point.

        Returns whether some of it was outside then. Those have as many tries to be moved back as any others: whoever
        put it there (``adoptctl join``) may have ended what moved them.
        """
        case = self._cases.get(session.id)
        if case is None:
            return False
        had_strays = bool(case.strays)
        if had_strays:
            case.patience = Patience()
        case.assigned += 1
        case.reported.clear()
        case.strays.clear()
        return had_strays

    def strays(self) -> Dict[str, Strays]:
        """Sessions of which something was out of its job at the last look, by id."""
        return {identity: Strays(dict(case.strays)) for identity, case in self._cases.items() if case.strays}

    def take(
        self, now_s: float, known: Callable[[str], Optional[Session]], waits: Callable[[Session], bool]
    ) -> List[Task]:
        """What is due now, longest first, at most AT_ONCE of it. A session that ``waits`` has its turn later."""
        ready = sorted((case.due_s, name) for name, case in self._cases.items() if case.due_s is not None)
        tasks: List[Task] = []
        for due_s, name in ready:
            if due_s > now_s or len(tasks) >= AT_ONCE:
                break
            session, case = known(name), self._cases[name]
            if session is None:
                del self._cases[name]
                continue
            if waits(session):
                case.due_s = now_s + RETRY_S
                continue
            patience = case.patience.as_of(now_s)
            returns = self._returns(patience) and now_s >= patience.next_at_s
            last = case.retries >= RETRIES
            tasks.append(Task(session, dict(case.moves), case.whole, returns, last, case.assigned))
            case.moves.clear()
            case.whole, case.due_s = False, None
        return tasks

    def again(self, task: Task, pids: Iterable[int], now_s: float) -> None:
        """Have what could not be told looked at again, unless that was done often enough."""
        case = self._cases.setdefault(task.session.id, _Case())
        if task.last:
            case.retries = 0
            return
        case.retries += 1
        due_s = now_s + RETRY_S * 2 ** (case.retries - 1)
        for pid in pids:
            self.suspect(task.session, due_s, task.moves.get(pid))

    def settle(self, finding: Finding, now_s: float) -> Optional[EscapeOutcome]:
        """Note what came of a task. Returns what is to be told of it, None: nothing."""
        task = finding.task
        case = self._cases.setdefault(task.session.id, _Case())
        if task.assigned == case.assigned:
            _note_strays(case, finding)
        if finding.unsure:
            self.again(task, [each.pid for each in finding.unsure], now_s)
        else:
            case.retries = 0
        if not finding.outside:
            return None
        patience = case.patience.as_of(now_s)
        if patience != case.patience:
            case.lines = 0
        case.patience = patience.seen(now_s)
        if finding.returned is not None:
            if not finding.returned.moved and not finding.returned.failed:
                return None
            case.patience = patience.spent(now_s)
            return EscapeOutcome.FAILED if finding.returned.failed else EscapeOutcome.READOPTED
        if self._returns(patience):
            # It was moved back a moment ago: its turn comes.
            for each in finding.outside:
                self.suspect(task.session, max(patience.next_at_s, now_s), task.moves.get(each.pid))
            return None
        news = {each.pid: each.cgroups for each in finding.outside if case.reported.get(each.pid) != each.cgroups}
        if len(case.reported) + len(news) > SUSPECTS_MAX:
            case.reported.clear()
        case.reported.update(list(news.items())[:SUSPECTS_MAX])
        return EscapeOutcome.REPORTED if news else None

    def line(self, session: Session) -> Optional[bool]:
        """Count one line about ``session``: whether it is to be logged; None if it is, as the last for a while."""
        case = self._cases.setdefault(session.id, _Case())
        case.lines += 1
        return None if case.lines == LINES_MAX else case.lines < LINES_MAX

    def is_given_up(self, session: Session) -> bool:
        """Whether the session has been moved back so often that it is only reported now."""
        case = self._cases.get(session.id)
        return case is not None and case.patience.exhausted

    def _returns(self, patience: Patience) -> bool:
        return self._on_escape() is OnEscape.READOPT and not patience.exhausted


def _note_strays(case: _Case, finding: Finding) -> None:
    """What was looked at is as it was found; what could not be told, or was not looked at, is as it was before."""
    task, unsure = finding.task, {each.pid for each in finding.unsure}
    kept = {pid: each for pid, each in case.strays.items() if pid in unsure or not (task.whole or pid in task.moves)}
    found = {**kept, **{each.pid: each for each in finding.strays}}
    case.strays = dict(list(found.items())[:SUSPECTS_MAX])
