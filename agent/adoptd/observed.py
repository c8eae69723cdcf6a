"""Observe mode: where another module has put a login, beside where we would have put it.

Owns the comparison, which is counted once per login, and the log line of each disagreement. Must never change
what becomes of a login. Called by :mod:`adoptd.adoption` for requests with mode=observe.

The session phase is what counts: by then every account line has run, in whatever order, and the process is the
session's own. The account phase alone can tell only of a process that is in a job already; where no session
follows, it is all there is, and such a login was refused by somebody, or its stack has our account line alone.
"""

from __future__ import annotations

import asyncio
import enum
from collections import OrderedDict
from dataclasses import dataclass
from typing import Optional, Tuple

from adoptd import log
from adoptd.metrics import Metrics
from adoptd.model import Connection, Job

# sshd opens the session as soon as the account phase is over. The rest is room for a node without processor time.
WAIT_S = 30.0
CAPACITY = 4096


class Would(enum.Enum):
    """What we would have done. The values are metric labels, as the next two's."""

    ADOPT = "adopt"
    DENY = "deny"
    LEAVE_OUT = "leave_out"


class Found(enum.Enum):
    """Where the login's process was found."""

    THAT_JOB = "that_job"
    OTHER_JOB = "other_job"
    NO_JOB = "no_job"
    NO_SESSION = "no_session"
    UNKNOWN = "unknown"


class Agreement(enum.Enum):
    """Whether the two are one."""

    AGREE = "agree"
    DISAGREE = "disagree"
    UNKNOWN = "unknown"


_AGREE = frozenset(
    {(Would.ADOPT, Found.THAT_JOB), (Would.DENY, Found.NO_SESSION), (Would.LEAVE_OUT, Found.NO_JOB)},
)


def agreement_of(would: Would, found: Found) -> Agreement:
    """Pure: the one column of the table that an alert is made of."""
    if found is Found.UNKNOWN:
        return Agreement.UNKNOWN
    return Agreement.AGREE if (would, found) in _AGREE else Agreement.DISAGREE


@dataclass(frozen=True)
class Sight:
    """One phase of a login as it was seen: what we would do, and the job that its process is in (None: in none).

    ``job`` is the one we would adopt it into, with ADOPT only. ``fault`` says why its place could not be read.
    """

    uid: int
    user: str
    connection: Optional[Connection]
    would: Would
    reason: str
    job: Optional[Job]
    place: Optional[Job]
    fault: str = ""


class Observations:
    """The logins whose account phase was seen, until their session phase is, or is not to be expected any more."""

    def __init__(self, metrics: Metrics, wait_s: float = WAIT_S, capacity: int = CAPACITY) -> None:
        self._metrics = metrics
        self._wait_s = wait_s
        self._capacity = capacity
        self._waiting: OrderedDict[Tuple[int, Connection], Tuple[Sight, asyncio.TimerHandle]] = OrderedDict()
        for would in Would:
            for found in Found:
                metrics.count_observed(agreement_of(would, found).value, found.value, would.value, 0)

    def __len__(self) -> int:
        return len(self._waiting)

    def account(self, sight: Sight) -> None:
        """The account phase of a login. Without its connection the session phase will be told alone."""
        if sight.connection is None:
            return
        key = (sight.uid, sight.connection)
        self._taken(key)
        timer = asyncio.get_running_loop().call_later(self._wait_s, self._without_session, key)
        self._waiting[key] = (sight, timer)
        if len(self._waiting) > self._capacity:
            oldest = self._taken(next(iter(self._waiting)))
            if oldest is not None:
                self._settle(oldest, Found.UNKNOWN, oldest, "too many logins at once")

    def session(self, sight: Sight) -> None:
        """The session phase of a login: where it is now, beside what the account phase would have made of it."""
        before = None if sight.connection is None else self._taken((sight.uid, sight.connection))
        decided = sight if before is None else before
        self._settle(decided, _found(decided, sight), sight, sight.fault)

    def _without_session(self, key: Tuple[int, Connection]) -> None:
        sight = self._taken(key)
        if sight is not None:
            found = Found.NO_SESSION if sight.place is None and not sight.fault else _found(sight, sight)
            self._settle(sight, found, sight, sight.fault)

    def _taken(self, key: Tuple[int, Connection]) -> Optional[Sight]:
        sight, timer = self._waiting.pop(key, (None, None))
        if timer is not None:
            timer.cancel()
        return sight

    def _settle(self, decided: Sight, found: Found, seen: Sight, fault: str) -> None:
        agreement = agreement_of(decided.would, found)
        self._metrics.count_observed(agreement.value, found.value, decided.would.value)
        if agreement is not Agreement.AGREE:
            log.warning(
                "observed_disagreement" if agreement is Agreement.DISAGREE else "observed_unknown",
                user=decided.user,
                uid=decided.uid,
                connection=None if decided.connection is None else str(decided.connection),
                remote=None if decided.connection is None else str(decided.connection.source.address),
                found=found.value,
                in_job=None if seen.place is None else seen.place.id,
                would=decided.would.value,
                would_be_job=None if decided.job is None else decided.job.id,
                reason=decided.reason,
                error=fault or None,
            )


def _found(decided: Sight, seen: Sight) -> Found:
    if seen.fault:
        return Found.UNKNOWN
    if seen.place is None:
        return Found.NO_JOB
    return Found.THAT_JOB if decided.job is not None and seen.place == decided.job else Found.OTHER_JOB
