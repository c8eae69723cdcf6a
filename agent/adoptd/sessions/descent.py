"""Which processes a session has, found by looking: parents, and who was seen to be its before.

Owns the walk over /proc that takes the place of the probe's list where there is none, and fills it where it is new.
A process whose parents ended between two looks is missed: only the list knows those. Called by the guard, in its
worker thread only.
"""

from __future__ import annotations

import os
import time
from typing import Dict, List, Sequence, Set, Tuple

from adoptd.process import stat_of
from adoptd.sessions.kept import Session

# As many as the probe's list has room for.
_FOLLOWED_MAX = 65_536


class Descent:
    """Sessions' processes as of the last look."""

    def __init__(self, proc_root: str = "/proc") -> None:
        self._proc_root = proc_root
        # (pid, start in ticks) of each process of a session, and the session's id.
        self._followed: Dict[Tuple[int, int], str] = {}
        self._found: Dict[str, Set[int]] = {}
        self._looked_at_s = 0.0

    def is_of(self, identity: str, pid: int, start_ticks: int) -> bool:
        """Whether this very process was found to be of the session at the last look."""
        return self._followed.get((pid, start_ticks)) == identity

    def recent(self, sessions: Sequence[Session], seconds: float) -> Dict[str, Set[int]]:
        """What a look at ``sessions`` said if it is not older than that; else what one says now."""
        names = {session.id for session in sessions}
        if time.monotonic() - self._looked_at_s > seconds or self._found.keys() != names:
            return self.look(sessions)
        return self._found

    def look(self, sessions: Sequence[Session]) -> Dict[str, Set[int]]:
        """The pids of each session, by its id; some 15 us for each process of the host."""
        started: Dict[int, int] = {}
        children: Dict[int, List[int]] = {}
        for name in os.listdir(self._proc_root):
            stat = stat_of(int(name), self._proc_root) if name.isdigit() else None
            if stat is not None:
                started[int(name)] = stat.start_ticks
                children.setdefault(stat.parent, []).append(int(name))
        firsts = {(session.pid, session.start_ticks): session.id for session in sessions}
        # Sessions first: a session within another (ssh to this host) is its own, not the outer one's.
        ids = {pid: identity for (pid, ticks), identity in firsts.items() if started.get(pid) == ticks}
        wanted = set(firsts.values())
        for (pid, ticks), identity in self._followed.items():
            if started.get(pid) == ticks and identity in wanted:
                ids.setdefault(pid, identity)
        of_session: Dict[str, Set[int]] = {identity: set() for identity in wanted}
        for pid, identity in ids.items():
            below = [pid]
            while below:
                each = below.pop()
                of_session[identity].add(each)
                below.extend(child for child in children.get(each, ()) if child not in ids)
        found = [((pid, started[pid]), identity) for identity, pids in of_session.items() for pid in pids]
        self._followed = dict(found[:_FOLLOWED_MAX])
        self._found, self._looked_at_s = of_session, time.monotonic()
        return of_session


def threads_of(pid: int, proc_root: str = "/proc") -> List[int]:
    """The process and its threads, each of which can be moved alone in cgroup v1; () if it is gone."""
    try:
        return [int(name) for name in os.listdir(f"{proc_root}/{pid}/task")]
    except OSError:
        return []
