"""Which source nodes did not answer when they were last asked, and why: for the person who has to look there.

Owns a bounded memory of addresses, which are no metric's label. An answer takes its address off. Called by the
asking side, in the event loop; read by ``adoptctl status``.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Callable, Tuple

from adoptd.model import IPAddress

# More nodes than this at once are one fault, and not theirs.
ADDRESSES_MAX = 256
# Who has not been asked for so long says nothing about now.
FORGET_S = 3600.0


class Unheard:
    """Addresses with the reason and the time of their last silence; the oldest go first when there are too many."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """``clock`` gives seconds, and never goes back."""
        self._clock = clock
        self._silent: OrderedDict[IPAddress, Tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        # Read by the scrapes' thread as well, so it looks at nothing but the number.
        return len(self._silent)

    def note(self, address: IPAddress, reason: str) -> None:
        """It did not answer, or not believably."""
        self._silent.pop(address, None)
        self._silent[address] = reason, self._clock()
        if len(self._silent) > ADDRESSES_MAX:
            self._silent.popitem(last=False)

    def heard(self, address: IPAddress) -> None:
        """It answered."""
        self._silent.pop(address, None)

    def now(self) -> Tuple[Tuple[IPAddress, str, float], ...]:
        """Address, reason and seconds since, the latest first."""
        now_s = self._clock()
        while self._silent:
            address, (_, at_s) = next(iter(self._silent.items()))
            if now_s - at_s <= FORGET_S:
                break
            del self._silent[address]
        return tuple((address, reason, now_s - at_s) for address, (reason, at_s) in reversed(self._silent.items()))
