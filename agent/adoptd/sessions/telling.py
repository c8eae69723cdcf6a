"""Says of an escape what is known of it: to the log, the metrics and those who watch.

Owns the words. Must never say who moved a process unless that was seen, nor let one session fill the log. Called by
the guard.
"""

from __future__ import annotations

from typing import Dict

from adoptd import log
from adoptd.events import Event, EventKind, Events
from adoptd.log import Field
from adoptd.metrics import Metrics
from adoptd.sessions.cases import Cases, Finding
from adoptd.sessions.escapes import EscapeOutcome, Mover, mover_of

_DETAIL_MAX = 1024


class Teller:
    """Tells of findings."""

    def __init__(self, cases: Cases, metrics: Metrics, events: Events) -> None:
        self._cases = cases
        self._metrics = metrics
        self._events = events

    def give_up(self, finding: Finding) -> None:
        """Log that a session's processes could not be told to be in its job or out of it."""
        session = finding.task.session
        if self._cases.line(session) is not False:
            log.warning(
                "session_unclear",
                session=session.id,
                job=session.job.id,
                error=next((each.why for each in finding.unsure if each.why), None),
                effect="looked at again with all others",
            )

    def tell(self, finding: Finding, outcome: EscapeOutcome) -> None:
        """Count it, publish it, and log it unless much was logged of this session already."""
        session, moves, returned = finding.task.session, finding.task.moves, finding.returned
        first = next((each for each in finding.outside if each.pid in moves), finding.outside[0])
        move = moves.get(first.pid)
        mover = mover_of(move, session)
        seen = move if mover is not Mover.UNKNOWN else None
        self._metrics.count_escape(mover.value, outcome.value)
        fields: Dict[str, Field] = {
            "session": session.id,
            "user": session.user,
            "uid": session.uid,
            "job": session.job.id,
            "remote": None if session.connection is None else str(session.connection.source.address),
            "pid": first.pid,
            "processes": len(finding.outside),
            "mover": mover.value,
            "mover_pid": None if seen is None else seen.actor_pid,
            "mover_uid": None if seen is None else seen.actor_uid,
            "mover_comm": None if seen is None else seen.actor_comm,
            "to": first.shown,
            "outcome": outcome.value,
            "detail": None if returned is None else "; ".join(returned.failed)[:_DETAIL_MAX] or None,
        }
        self._events.publish(Event(EventKind.ESCAPE, session.uid, fields))
        logged = self._cases.line(session)
        if logged is not False:
            log.warning("escape", **fields)
        if logged is None:
            log.warning("escapes_not_logged", session=session.id, effect="only counted until it is quiet for a while")
        if returned is not None and self._cases.is_given_up(session):
            log.warning("escape_given_up", session=session.id, effect="only reported until it is quiet for a while")
