"""Which processes are one session's: by the kernel's list, or by looking.

Owns the two ways and what makes a pid believable in each, and the putting of processes on the kernel's list. Called
by the guard, in its worker thread.
"""

from __future__ import annotations

from typing import Protocol, Sequence, Set, Tuple

from adoptd.probe.watching import OpenWatch
from adoptd.process import ProcessHandle, stat_of
from adoptd.sessions.descent import Descent, threads_of
from adoptd.sessions.kept import Session
from adoptd.sessions.whereabouts import Family

# A look at all of /proc serves the sessions of one round.
_RECENT_S = 0.05


class KnownFamily(Family, Protocol):
    """The processes of one session, as of a moment ago (``before``) and now."""

    before: Set[int]

    def has_now(self, pid: int) -> bool:
        """Whether the process or thread that has ``pid`` now is one of them."""


class Listed:
    """A session's processes by the kernel's list, which an end is taken off in the moment it comes."""

    def __init__(self, watch: OpenWatch, session: Session, before: Set[int]) -> None:
        self._watch = watch
        self._name = (session.pid, session.start_ticks)
        self.before = before

    def pids(self) -> Set[int]:
        """Those on the list now, threads among them."""
        return {pid for pid, leader, ticks, _ in self._watch.members() if (leader, ticks) == self._name}

    def has(self, pid: int, process: ProcessHandle) -> bool:
        """Whether ``pid`` is on the list, which while ``process`` is held is of that process."""
        return self.has_now(pid)

    def has_now(self, pid: int) -> bool:
        """Whether ``pid`` is on the list."""
        return self._watch.session_of(pid) == self._name


class Followed:
    """A session's processes by looking: a pid is believed with the start time it had then."""

    def __init__(self, descent: Descent, everyone: Tuple[Session, ...], session: Session) -> None:
        self._descent = descent
        self._everyone = everyone
        self._id = session.id
        self.before = descent.recent(everyone, _RECENT_S).get(session.id, set())

    def pids(self) -> Set[int]:
        """Those found by a look now."""
        return self._descent.look(self._everyone).get(self._id, set())

    def has(self, pid: int, process: ProcessHandle) -> bool:
        """Whether the last look found ``process``."""
        return self._descent.is_of(self._id, process.pid, process.start_ticks)

    def has_now(self, pid: int) -> bool:
        """Whether the last look found the process that has ``pid`` now."""
        stat = stat_of(pid)
        return stat is not None and self._descent.is_of(self._id, pid, stat.start_ticks)


def put_on_list(watch: OpenWatch, session: Session, pids: Sequence[int]) -> None:
    """Have processes, with their threads, watched as ``session``'s. Raises ProbeError."""
    for pid in pids:
        for thread in threads_of(pid):
            _put(watch, session, thread)


def _put(watch: OpenWatch, session: Session, pid: int) -> None:
    name = (session.pid, session.start_ticks)
    if watch.session_of(pid) == name:
        return
    before = stat_of(pid)
    watch.watch(pid, *name, session.uid)
    after = stat_of(pid)
    # Its end takes it off the list, but not if that came before the entry: then another could inherit it.
    if before is None or after is None or after.start_ticks != before.start_ticks:
        watch.unwatch(pid)
