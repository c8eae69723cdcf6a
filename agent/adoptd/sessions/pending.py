"""What the account phase decided, kept until the session phase of the same login asks.

sshd runs the account phase of a keyboard-interactive login in a short-lived child, and the session
phase in the process that will be the session's parent; the two share a connection and a user, nothing
else. Bounded in number and time. Losing an entry is harmless: the session phase then decides anew.
Called by :mod:`adoptd.adoption` only.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Callable, Optional, Tuple

from adoptd.model import Connection, Job, Witness
from adoptd.policy import Situation, Step

# sshd gives a login 120 s (LoginGraceTime) between its connection and its session; sites raise it for
# slow second factors. Ten minutes covers them, and an entry is about 1 KiB.
KEEP_S = 600.0
CAPACITY = 4096


@dataclass(frozen=True)
class Settlement:
    """How the account phase ended. ``job`` is the one adopted into, None if none was."""

    step: Step
    situation: Situation
    job: Optional[Job]
    witness: Optional[Witness]


class PendingLogins:
    """Settlements by user and connection; the oldest go first when there are too many."""

    def __init__(self, clock: Callable[[], float], keep_s: float = KEEP_S, capacity: int = CAPACITY) -> None:
        self._clock = clock
        self._keep_s = keep_s
        self._capacity = capacity
        self._entries: OrderedDict[Tuple[int, Connection], Tuple[float, Settlement]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def remember(self, uid: int, connection: Connection, settlement: Settlement) -> None:
        """Keep ``settlement`` in place of an earlier one of the same login."""
        self._entries.pop((uid, connection), None)
        self._entries[(uid, connection)] = (self._clock() + self._keep_s, settlement)
        self._drop_old()

    def take(self, uid: int, connection: Connection) -> Optional[Settlement]:
        """The settlement of this login, once; None if there is none or it is too old."""
        entry = self._entries.pop((uid, connection), None)
        if entry is None or entry[0] <= self._clock():
            return None
        return entry[1]

    def _drop_old(self) -> None:
        now = self._clock()
        while self._entries:
            _, (expires_at, _) = next(iter(self._entries.items()))
            if expires_at > now and len(self._entries) <= self._capacity:
                return
            self._entries.popitem(last=False)
