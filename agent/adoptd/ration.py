"""How many lines of one kind the log gets from one caller, and how many were left out.

Owns the counting, in bounded memory; what is left out is for the metrics alone. Must never leave out the
first line of a caller. Used by the handlers and by the doors, whose callers are the reasons, in the event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Callable, Hashable, Optional, Tuple


class Ration:
    """At most ``lines`` within ``seconds`` for each caller, and a memory of the ``callers`` heard of last."""

    def __init__(self, lines: int, seconds: float, callers: int, clock: Callable[[], float]) -> None:
        """``clock`` gives seconds, and never goes back."""
        self._lines = lines
        self._seconds = seconds
        self._callers = callers
        self._clock = clock
        # When the caller's time began, and how many lines there were since, left out ones included.
        self._said: OrderedDict[Hashable, Tuple[float, int]] = OrderedDict()

    def take(self, caller: Hashable) -> Optional[int]:
        """None: leave this line out. Else how many of the caller's were left out before it."""
        now_s = self._clock()
        since_s, count = self._said.pop(caller, (now_s, 0))
        unsaid = 0
        if now_s - since_s >= self._seconds:
            unsaid = max(0, count - self._lines)
            since_s, count = now_s, 0
        self._said[caller] = (since_s, count + 1)
        if len(self._said) > self._callers:
            self._said.popitem(last=False)
        return unsaid if count < self._lines else None
