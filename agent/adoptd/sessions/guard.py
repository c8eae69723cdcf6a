"""Sees that sessions stay where they were put: hears of moves, looks, and has those outside moved back or reported.

Owns when what is looked at (the books are cases.py's): what the kernel told at once, everything now and then, and
everything often where the kernel does not tell. All of it is bounded in number, and in time to a fifth of one core,
whatever users do. Must never act on an event alone: where a process is, is asked when its turn comes. For one event
loop. Started by the service.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Set, Tuple

from adoptd import log
from adoptd.daemon import woken
from adoptd.deadline import Deadline
from adoptd.events import Events
from adoptd.jobs import JobBackend
from adoptd.metrics import Metrics
from adoptd.model import JobManagerError, ProbeError
from adoptd.probe.record import EVENT_WINDOW_S, Move, decode_move
from adoptd.probe.watching import OpenWatch
from adoptd.sessions.cases import Cases, Finding, Task
from adoptd.sessions.descent import Descent
from adoptd.sessions.escapes import SYSTEMD_PID, OnEscape, OutsideOf
from adoptd.sessions.families import Followed, KnownFamily, Listed, put_on_list
from adoptd.sessions.kept import Session, session_id
from adoptd.sessions.registry import Sessions
from adoptd.sessions.telling import Teller
from adoptd.sessions.whereabouts import Found, Place, Whereabouts
from adoptd.workers import OutOfTime, Overloaded, Workers

# A move into one job is a move in each of its hierarchies; this long after the first all are made.
_SETTLE_S = 0.05
# systemd answers logind, and that pam_systemd, when the scope it moved a process into has started: a process that is
# taken out of it before breaks the login.
_SYSTEMD_SETTLE_S = 1.0
# For the same reason a session is left alone between its account phase and its session phase, which follow one another
# at once; where PAM has no session line of ours, for so long.
_LOGIN_S = 30.0
# How often everything is looked at where the kernel tells of moves (in case it could not), and where it does not.
SWEEP_S = 60.0
POLL_S = 5.0
# How often the pins are looked at: the probe may have been loaded, or loaded again. Less often while there is nothing.
ATTACH_S = 5.0
ATTACH_MAX_S = 60.0
# Events read in one turn of the event loop.
_EVENTS_AT_ONCE = 256
_ROUND_MS = 5_000.0
# After a round it rests for this many times as long as the round took.
_REST = 4.0


@dataclass(frozen=True)
class GuardStatus:
    """``told``: whether the kernel tells of moves; else ``reason`` says why sessions are only looked at."""

    told: bool
    reason: str


class Guard:
    """The watch over the sessions of one node."""

    def __init__(
        self,
        sessions: Sessions,
        jobs: Callable[[], Optional[JobBackend]],
        on_escape: Callable[[], OnEscape],
        opened: Callable[[], OpenWatch],
        workers: Workers,
        metrics: Metrics,
        events: Events,
        in_login: Callable[[Session], bool],
    ) -> None:
        """``jobs`` and ``on_escape`` are asked each time. ``opened`` gives the pinned watch or raises ProbeError.

        ``in_login``: whether a session's account phase has been, and its session phase has not.
        """
        self._sessions = sessions
        self._jobs = jobs
        self._opened = opened
        self._workers = workers
        self._metrics = metrics
        self._watch: Optional[OpenWatch] = None
        self._status = GuardStatus(False, "not tried yet")
        self._in_login = in_login
        self._cases = Cases(on_escape)
        self._teller = Teller(self._cases, metrics, events)
        self._news = asyncio.Event()
        self._own_pid = os.getpid()
        # Of the worker thread alone.
        self._descent = Descent()
        self._whereabouts = Whereabouts()
        sessions.on_change(self._changed)
        sessions.use_list(self._listed)
        metrics.watch_sessions(lambda: sessions.count)

    @property
    def status(self) -> GuardStatus:
        """What is known now."""
        return self._status

    async def run(self) -> None:
        """Watch for ever."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._sessions.fileno(), self._sessions.drop_ended)
        try:
            attach_at = sweep_at = 0.0
            attach_s = ATTACH_S
            while True:
                now = time.monotonic()
                if now >= attach_at:
                    if await self._attach():
                        sweep_at = 0.0
                        # What was out of its job before an agent before us ended, and is told of no more.
                        self._suspect_ended(now + ATTACH_S)
                    attach_s = ATTACH_S if self._watch is not None else min(2 * attach_s, ATTACH_MAX_S)
                    attach_at = time.monotonic() + attach_s
                if now >= sweep_at:
                    # What the kernel told meanwhile is read first: it knows who it was.
                    self._read()
                    self._suspect_all(now + 2 * _SETTLE_S)
                    sweep_at = now + (SWEEP_S if self._watch is not None else POLL_S)
                started = time.monotonic()
                looked = await self._round(started)
                self._show_strays()
                if looked:
                    await asyncio.sleep(max(_SETTLE_S, _REST * (time.monotonic() - started)))
                else:
                    await self._wait(min(attach_at, sweep_at))
        finally:
            loop.remove_reader(self._sessions.fileno())
            self._let_go()

    def _let_go(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            asyncio.get_running_loop().remove_reader(watch.ring.fileno())
            # A call that was given up may still be using it; then this process is at its end.
            if not self._workers.pending:
                watch.close()

    async def _wait(self, until_s: float) -> None:
        due_s = self._cases.next_due_s()
        self._news.clear()
        wake_s = until_s if due_s is None else min(until_s, due_s)
        await woken(self._news, max(0.0, wake_s - time.monotonic()))

    # ---- what to look at

    def _read(self) -> None:
        """The kernel has told something."""
        if self._watch is None:
            return
        for record in self._watch.ring.read(_EVENTS_AT_ONCE):
            try:
                self._note(decode_move(record))
            except ProbeError as error:
                log.warning("event_refused", error=str(error))

    def _note(self, move: Move) -> None:
        now = time.monotonic()
        if not move.told:
            for session in self._sessions.all():
                if session.uid == move.uid:
                    # Once the window is over: what is told from then on is told again.
                    self._suspect(session, now + 2 * EVENT_WINDOW_S)
            return
        # What we do ourselves is read back by whoever does it.
        session_or_none = None if move.actor_pid == self._own_pid else self._of(move)
        if session_or_none is not None:
            settle_s = _SYSTEMD_SETTLE_S if move.actor_pid == SYSTEMD_PID else _SETTLE_S
            self._suspect(session_or_none, now + settle_s, move)

    def _waits(self, session: Session) -> bool:
        return self._in_login(session) and 0 <= time.time() - session.since_s < _LOGIN_S

    def _of(self, move: Move) -> Optional[Session]:
        return self._sessions.known(session_id(move.leader, move.start_ticks))

    def _suspect(self, session: Session, due_s: float, move: Optional[Move] = None) -> None:
        self._cases.suspect(session, due_s, move)
        self._news.set()

    def _suspect_all(self, now_s: float) -> None:
        self._cases.keep(self._sessions.known)
        strays = self._cases.strays()
        # The list has daemons of sessions that have ended, and tells of their moves; without it they are looked at.
        for session in self._sessions.watched():
            if self._watch is None or session.id in strays or not self._sessions.has_ended(session):
                self._suspect(session, now_s)

    def _suspect_ended(self, now_s: float) -> None:
        for session in self._sessions.watched():
            if self._sessions.has_ended(session):
                self._suspect(session, now_s)

    def _show_strays(self) -> None:
        strays = self._cases.strays()
        self._sessions.strays = strays
        ended = sum(each.job_ended for each in strays.values())
        self._metrics.show_outside({OutsideOf.RUNNING_JOB.value: len(strays) - ended, OutsideOf.ENDED_JOB.value: ended})

    def _changed(self, session: Session) -> None:
        """A session was added, or put into another job."""
        if self._cases.reassigned(session):
            # The rest of what was outside: whoever put it there has no list of all of it.
            self._suspect(session, time.monotonic() + _SYSTEMD_SETTLE_S)
            self._show_strays()
        watch = self._watch
        if watch is None:
            return
        try:
            put_on_list(watch, session, [session.pid])
        except (JobManagerError, ProbeError) as error:
            log.error("session_not_watched", session=session.id, error=str(error), effect="looked at now and then")

    def _listed(self, pid: int) -> Optional[Tuple[int, int]]:
        try:
            return None if self._watch is None else self._watch.session_of(pid)
        except ProbeError:
            return None

    # ---- the pins

    async def _attach(self) -> bool:
        """Use the watch that is pinned now. Returns whether it is another than before, or none any more."""
        had = self._watch
        sessions = self._sessions.watched()
        try:
            fresh = await self._workers.run(lambda: self._open(sessions), Deadline.after_ms(_ROUND_MS))
        except (JobManagerError, OutOfTime, Overloaded) as error:
            log.debug("session_watch_not_checked", error=str(error))
            return False
        except ProbeError as error:
            self._let_go()
            self._lose(str(error))
            return had is not None
        if fresh is None:
            return False
        self._let_go()
        self._watch = fresh
        asyncio.get_running_loop().add_reader(fresh.ring.fileno(), self._read)
        # Those that came while the list was filled.
        for session in self._sessions.all():
            self._changed(session)
        self._status = GuardStatus(True, "attached")
        self._sessions.watched_by = "kernel"
        self._metrics.session_watch_attached.set(1)
        log.info("session_watch_attached", schema=fresh.schema)
        return True

    def _open(self, sessions: Tuple[Session, ...]) -> Optional[OpenWatch]:
        """In the worker: the pinned watch with the sessions on its list; None if it is the one we have."""
        fresh = self._opened()
        if self._watch is not None and fresh.number == self._watch.number:
            fresh.close()
            return None
        try:
            # Twice: what was forked between the look and the entry is found by the second look.
            for _ in range(2):
                of_session = self._descent.look(sessions)
                for session in sessions:
                    put_on_list(fresh, session, sorted(of_session[session.id]))
        except BaseException:
            fresh.close()
            raise
        return fresh

    def _lose(self, reason: str) -> None:
        if reason != self._status.reason:
            log.warning(
                "session_watch_polling", error=reason, effect=f"sessions are looked at every {POLL_S:.0f} s instead"
            )
        self._status = GuardStatus(False, reason)
        self._sessions.watched_by = f"looking every {POLL_S:.0f} s: {reason}"
        self._metrics.session_watch_attached.set(0)

    # ---- looking

    async def _round(self, now_s: float) -> bool:
        """Look at what is due. Returns whether there was anything."""
        backend = self._jobs()
        tasks = [] if backend is None else self._cases.take(now_s, self._sessions.known, self._waits)
        if not tasks or backend is None:
            return False
        everyone, deadline = self._sessions.watched(), Deadline.after_ms(_ROUND_MS)
        try:
            # Longer than what is done in it: a call that is given up goes on, and what it found is lost.
            findings = await self._workers.run(
                lambda: self._look(backend, everyone, tasks, deadline), Deadline.after_ms(2 * _ROUND_MS)
            )
        except (JobManagerError, ProbeError, OutOfTime, Overloaded) as error:
            log.debug("sessions_not_looked_at", error=str(error))
            for task in tasks:
                self._cases.again(task, [*task.moves, *([0] if task.whole else [])], time.monotonic())
            return True
        for finding in findings:
            outcome = self._cases.settle(finding, time.monotonic())
            if outcome is not None:
                self._teller.tell(finding, outcome)
            if finding.unsure and finding.task.last:
                self._teller.give_up(finding)
        return True

    def _look(
        self, backend: JobBackend, everyone: Tuple[Session, ...], tasks: List[Task], deadline: Deadline
    ) -> List[Finding]:
        """In the worker."""
        watch = self._watch
        members: Dict[Tuple[int, int], Set[int]] = defaultdict(set)
        if watch is not None and any(task.whole for task in tasks):
            for pid, leader, start_ticks, _ in watch.members():
                members[leader, start_ticks].add(pid)
        findings = []
        for task in tasks:
            session = task.session
            family: KnownFamily = (
                Followed(self._descent, everyone, session)
                if watch is None
                else Listed(watch, session, members.get((session.pid, session.start_ticks), set()))
            )
            pids = {*task.moves, *(family.before if task.whole else ())}
            try:
                jobs = backend.for_node(session.nodename)
            except JobManagerError as error:
                unclear = tuple(Found(pid, Place.UNSURE, why=str(error)) for pid in sorted(pids))
                findings.append(Finding(task, (), unclear, None))
                continue
            found = self._whereabouts.look(jobs, session, sorted(pids), deadline)
            # Of a pid that was told, the process may have ended and another have it.
            ended = tuple(each for each in found if each.place is Place.JOB_ENDED and family.has_now(each.pid))
            escaped = (Place.OUTSIDE, Place.BETWEEN) if task.last else (Place.OUTSIDE,)
            outside = [each for each in found if each.place in escaped and family.has_now(each.pid)]
            returned = None
            if outside and task.returns:
                # ``session`` is as old as the round; what it is to be by now is asked before each move.
                returned = self._whereabouts.bring_back(jobs, session, outside, family, self._sessions.alone, deadline)
            unsure = tuple(
                each for each in found if each.place in (Place.UNSURE, Place.BETWEEN) and each not in outside
            )
            findings.append(Finding(task, tuple(outside), unsure, returned, ended))
        return findings
