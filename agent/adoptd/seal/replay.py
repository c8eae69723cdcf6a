"""Which nonces have been seen, for as long as a message bearing them could still be accepted.

Owns the one rule that makes a replay cache safe when it is flooded: a live entry is never evicted, so
a full cache refuses what is new instead of forgetting what is old. Called by :mod:`adoptd.seal.token`,
and by the callerid responder under every scheme.
"""

from __future__ import annotations

import enum
import math
import threading
from typing import Callable, Dict, List, Set

# 3,277 a second, more than one core can open; and the most there is room for: 100 MB, which a ttl_s over 80 needs when
# as many come for as long as that.
_PER_S = 3277
_CAPACITY_MIN = 65_536
_CAPACITY_MAX = 524_288


def capacity_for(life_s: float) -> int:
    """How many nonces to keep room for where each is kept for ``life_s`` seconds."""
    return max(_CAPACITY_MIN, min(_CAPACITY_MAX, int(_PER_S * life_s)))


class Admission(enum.Enum):
    """What became of a nonce that was offered. Only NEW is a reason to go on."""

    NEW = "new"
    SEEN = "seen"
    EXPIRED = "expired"
    FULL = "full"


class ReplayCache:
    """At most ``capacity`` live nonces, in constant amortised time each; safe to share between threads.

    ``clock`` gives seconds on the time scale of ``expires_at``, whichever that is. Entries are kept by
    whole seconds and so up to one second longer than needed, never shorter. An entry takes about 200
    bytes with a 32-character nonce.
    """

    def __init__(self, capacity: int, clock: Callable[[], float]) -> None:
        if capacity < 1:
            raise ValueError(f"capacity {capacity} is not positive")
        self._capacity = capacity
        self._clock = clock
        self._lock = threading.Lock()
        self._live: Set[str] = set()
        # Buckets by the second they expire in: expiry times do not arrive in order, and a heap would
        # make a flood cost more per message the longer it lasts.
        self._by_expiry: Dict[int, List[str]] = {}
        self._purged_at_s = 0

    def admit(self, nonce: str, expires_at: float) -> bool:
        """Whether ``nonce`` is new, and now remembered until ``expires_at``."""
        return self.offer(nonce, expires_at) is Admission.NEW

    def offer(self, nonce: str, expires_at: float) -> Admission:
        """As :meth:`admit`, saying why not. Raises ValueError or OverflowError if expires_at is not finite."""
        expiry_s = math.ceil(expires_at)
        with self._lock:
            now = self._clock()
            self._purge(now)
            if nonce in self._live:
                return Admission.SEEN
            if expires_at <= now:
                return Admission.EXPIRED
            if len(self._live) >= self._capacity:
                return Admission.FULL
            self._live.add(nonce)
            self._by_expiry.setdefault(expiry_s, []).append(nonce)
            return Admission.NEW

    def make_room(self, capacity: int) -> None:
        """Keep at most ``capacity`` from now on. What is there stays its time, also where that is more."""
        with self._lock:
            self._capacity = capacity

    def __contains__(self, nonce: str) -> bool:
        with self._lock:
            return nonce in self._live

    def __len__(self) -> int:
        with self._lock:
            return len(self._live)

    def _purge(self, now: float) -> None:
        now_s = math.floor(now)
        if now_s == self._purged_at_s:
            return
        self._purged_at_s = now_s
        for expiry_s in [second for second in self._by_expiry if second <= now_s]:
            self._live.difference_update(self._by_expiry.pop(expiry_s))
