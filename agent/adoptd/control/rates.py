"""How often one user may do what costs the node or another user something: so many times in a while.

Owns a bounded table of uids. Must never refuse one user for what another does. Used by ``join``.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Callable, Deque

# A person changes their mind a few times. Each join writes to cgroups, which stops every fork on the node for a moment.
JOINS_MAX = 10
JOINS_WITHIN_S = 60.0

# As many users as a node will ever have at a time; past it whoever has not asked for longest is forgotten.
_USERS_MAX = 1024


class Rates:
    """At most ``at_most`` times ``within_s`` seconds for each uid. For one event loop."""

    def __init__(self, clock: Callable[[], float], at_most: int = JOINS_MAX, within_s: float = JOINS_WITHIN_S) -> None:
        """``clock`` is monotonic, in seconds."""
        self._clock = clock
        self._at_most = at_most
        self._within_s = within_s
        self._times: OrderedDict[int, Deque[float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._times)

    def wait_s(self, uid: int) -> float:
        """0 if ``uid`` may go on, which is counted; else after how many seconds it may, and nothing is counted."""
        now = self._clock()
        times = self._times.setdefault(uid, deque())
        self._times.move_to_end(uid)
        while times and times[0] <= now - self._within_s:
            times.popleft()
        if len(times) >= self._at_most:
            return times[0] + self._within_s - now
        times.append(now)
        if len(self._times) > _USERS_MAX:
            self._times.popitem(last=False)
        return 0.0

    def charge(self, uid: int, times: int) -> None:
        """Count ``times`` more for what ``uid`` was let do, because it was large."""
        self._times.setdefault(uid, deque()).extend([self._clock()] * min(times, self._at_most))
