"""Which source nodes were asked lately, which release of the agent answered, and which did not answer and why.

For the person who has to look there: owns a bounded memory of addresses, which are no metric's label. Called by the
asking side, in the event loop; read by ``adoptctl status`` there, and counted by the scrapes' thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Callable, Tuple

from adoptd.model import IPAddress

# The nodes that one node's users come from; of a larger cluster, those asked last.
ADDRESSES_MAX = 1024
# What was heard so long ago says nothing about now.
FORGET_S = 3600.0


@dataclass(frozen=True)
class Peer:
    """A node as it was when last asked: ``release`` of the agent that answered, or "" and the ``reason`` it did not."""

    address: IPAddress
    release: str
    reason: str
    ago_s: float


class Peers:
    """Addresses with what came of asking them last; the oldest go first when there are too many."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """``clock`` gives seconds, and never goes back."""
        self._clock = clock
        self._lock = threading.Lock()
        # The one asked last is last.
        self._asked: OrderedDict[IPAddress, Tuple[str, str, float]] = OrderedDict()

    def answered(self, address: IPAddress, release: str) -> None:
        """It answered, and is believed."""
        self._note(address, release, "")

    def silent(self, address: IPAddress, reason: str) -> None:
        """It did not answer, or not believably."""
        self._note(address, "", reason)

    def _note(self, address: IPAddress, release: str, reason: str) -> None:
        with self._lock:
            self._asked[address] = release, reason, self._clock()
            self._asked.move_to_end(address)
            if len(self._asked) > ADDRESSES_MAX:
                self._asked.popitem(last=False)

    def now(self) -> Tuple[Peer, ...]:
        """Those asked within :data:`FORGET_S`, the latest first."""
        with self._lock:
            now_s = self._clock()
            while self._asked:
                address, (_, _, at_s) = next(iter(self._asked.items()))
                if now_s - at_s <= FORGET_S:
                    break
                del self._asked[address]
            asked = tuple(self._asked.items())
        return tuple(Peer(address, release, reason, now_s - at_s) for address, (release, reason, at_s) in asked[::-1])

    def count_silent(self) -> int:
        """How many of them did not answer."""
        return sum(1 for peer in self.now() if peer.reason)
