"""The processes of a session: its leader, all that came from it and still has its parents, and their shells' jobs.

Reads /proc once per look. A look is out of date when it returns: whoever acts on it holds each process by a
pidfd, compares its start, and looks again. Used by ``join``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Dict, FrozenSet, List, Mapping, Optional, Set, Tuple

from adoptd.process import stat_of

# A pid and when it started.
Key = Tuple[int, int]


@dataclass(frozen=True)
class Row:
    """One process: its parent, its kernel session (setsid(2)) and when it started, in ticks."""

    pid: int
    parent: int
    sid: int
    start_ticks: int

    @property
    def key(self) -> Key:
        """What no other process has until the next boot."""
        return self.pid, self.start_ticks


def look(proc_root: str = "/proc") -> Dict[int, Row]:
    """Every process that has not ended, by pid."""
    rows = (look_at(int(name), proc_root) for name in os.listdir(proc_root) if name.isdigit())
    return {row.pid: row for row in rows if row is not None}


def members(leader: int, rows: Mapping[int, Row], others: FrozenSet[int]) -> Tuple[Row, ...]:
    """The leader first, then what came from it, parents before children; () if it is not there.

    A process whose parent has ended is found while the process that made its kernel session is a member: the kernel
    gives a session's number to nobody else as long as it has a process. ``others`` lead sessions of their own, which
    are left out with all that is below them.
    """
    if leader not in rows:
        return ()
    children: Dict[int, List[Row]] = {}
    by_sid: Dict[int, List[Row]] = {}
    for row in rows.values():
        children.setdefault(row.parent, []).append(row)
        by_sid.setdefault(row.sid, []).append(row)
    found: List[Row] = []
    seen: Set[int] = set(others - {leader})
    waiting = [rows[leader]]
    while waiting:
        row = waiting.pop(0)
        if row.pid in seen:
            continue
        seen.add(row.pid)
        found.append(row)
        waiting += children.get(row.pid, [])
        waiting += [each for each in by_sid.get(row.pid, []) if _has_lost_its_parents(each, rows)]
    return tuple(found)


def _has_lost_its_parents(row: Row, rows: Mapping[int, Row]) -> bool:
    # Somebody of another session took it over: init, or a subreaper (PR_SET_CHILD_SUBREAPER).
    parent = rows.get(row.parent)
    return parent is None or parent.sid != row.sid


def look_at(pid: int, proc_root: str = "/proc") -> Optional[Row]:
    """One process; None if it has ended."""
    stat = stat_of(pid, proc_root)
    return None if stat is None or stat.ended else Row(pid, stat.parent, stat.sid, stat.start_ticks)
