"""What logins came to: kept between their phases, and for as long as their sessions live.

``pending`` is what an account phase decided, until its session phase asks. ``registry`` is which sessions there are
and in which job each was put. ``settled``, ``kept``, ``fields`` and ``store`` are how both outlive the agent. ``guard``
sees when a session's process leaves its job, with ``descent``, ``whereabouts`` and ``escapes``.
"""

from __future__ import annotations

from adoptd.sessions.fields import Stages
from adoptd.sessions.kept import Session
from adoptd.sessions.pending import PendingLogins
from adoptd.sessions.registry import Sessions
from adoptd.sessions.settled import Settlement, Story
from adoptd.sessions.whereabouts import Strays

__all__ = ["PendingLogins", "Session", "Sessions", "Settlement", "Stages", "Story", "Strays"]
