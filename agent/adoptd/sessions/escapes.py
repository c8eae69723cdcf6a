"""What an escape is called and how often one is answered: the rules, without a clock or a process.

Owns the closed sets of movers and outcomes, and the bound on moving one session back: whoever keeps moving it out
is not fought for ever. Called by the guard.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Optional

from adoptd.probe.record import Move
from adoptd.sessions.kept import Session

# A session is moved back so often, and each time it has to be waited for twice as long; then it is only reported,
# until none of its processes has been seen outside for this long.
READOPTIONS_MAX = 6
FIRST_WAIT_S = 1.0
FORGIVEN_AFTER_S = 600.0

SYSTEMD_PID = 1


class Mover(enum.Enum):
    """Who moved a session's process out of its job."""

    SYSTEMD = "systemd"
    SELF = "self"
    ROOT = "root"
    OTHER_USER = "other_user"
    UNKNOWN = "unknown"


class EscapeOutcome(enum.Enum):
    """What came of an escape."""

    READOPTED = "readopted"
    FAILED = "failed"
    REPORTED = "reported"


class OutsideOf(enum.Enum):
    """What a session is outside of: one takes it back, the other is no more."""

    RUNNING_JOB = "running_job"
    ENDED_JOB = "ended_job"


class OnEscape(enum.Enum):
    """What is to be done about one: [session] on_escape."""

    READOPT = "readopt"
    REPORT = "report"


def mover_of(move: Optional[Move], session: Session) -> Mover:
    """Who made ``move``; UNKNOWN where it was not seen being made."""
    if move is None or not move.told:
        return Mover.UNKNOWN
    # systemd moves on behalf of logind, and of users' own managers, as pid 1 (systemd 247 and later for the latter).
    if move.actor_pid == SYSTEMD_PID:
        return Mover.SYSTEMD
    if move.actor_uid == session.uid or move.actor_pid in (move.pid, session.pid):
        return Mover.SELF
    return Mover.ROOT if move.actor_uid == 0 else Mover.OTHER_USER


@dataclass(frozen=True)
class Patience:
    """How often a session was moved back of late, and when it may be next. Times are monotonic seconds."""

    readoptions: int = 0
    next_at_s: float = 0.0
    escaped_at_s: float = 0.0

    @property
    def exhausted(self) -> bool:
        """Whether it is only reported from now on."""
        return self.readoptions >= READOPTIONS_MAX

    def as_of(self, now_s: float) -> Patience:
        """This, or nothing held against the session if it is long ago."""
        return Patience() if now_s - self.escaped_at_s >= FORGIVEN_AFTER_S else self

    def seen(self, now_s: float) -> Patience:
        """This, after a process was seen outside now."""
        return replace(self, escaped_at_s=now_s)

    def spent(self, now_s: float) -> Patience:
        """This, after the session was moved back now."""
        wait_s = FIRST_WAIT_S * 2**self.readoptions
        return Patience(self.readoptions + 1, now_s + wait_s, now_s)
