"""``explain`` and ``sessions``: why a login would land where it would, and why a session did.

Changes nothing. Who asks is told of their own logins and sessions only, root of all. Called by
:class:`adoptd.control.Control`.
"""

from __future__ import annotations

from typing import Dict, List, Mapping, Optional

from adoptd.control.asking import (
    Asking,
    CommandRefused,
    Parts,
    connect,
    local_end,
    parse_endpoint,
    parse_options,
    shown_stages,
    uid_of_user,
)
from adoptd.deadline import Deadline
from adoptd.decision import Login
from adoptd.model import Ambiguous, JobManagerError
from adoptd.sessions import Session
from adoptd.wire.control import Result


async def explain(parts: Parts, arguments: Mapping[str, str], asking: Asking, deadline: Deadline) -> Result:
    """The decision that a user's login would get now, or how a session's came about. Raises CommandRefused."""
    if ("session" in arguments) == ("user" in arguments):
        raise CommandRefused("explain takes either a session or a user")
    if "session" in arguments:
        if len(arguments) > 1:
            raise CommandRefused("a session is explained as it was decided; from, to and options are for a user")
        return await _explain_session(parts, arguments["session"], asking, deadline)
    return await _explain_login(parts, arguments, asking, deadline)


async def list_sessions(parts: Parts, arguments: Mapping[str, str], asking: Asking, deadline: Deadline) -> Result:
    """The sessions that live: root all, others their own."""
    mine = (session for session in parts.sessions.all() if asking.uid in (0, session.uid))
    return {"sessions": [shown_session(session) for session in mine]}


def shown_session(session: Session) -> Dict[str, object]:
    """A session as a row of the table; ``since`` is Unix time."""
    return {
        "session": session.id,
        "pid": session.pid,
        "user": session.user,
        "uid": session.uid,
        "job": session.job.id,
        "since": round(session.since_s, 3),
        "reason": session.reason,
        "witness": None if session.witness is None else session.witness.value,
        "from": None if session.connection is None else str(session.connection.source),
        "service": session.service,
    }


async def _explain_session(parts: Parts, named: str, asking: Asking, deadline: Deadline) -> Result:
    session = parts.sessions.find(named)
    if session is None and named.isascii() and named.isdigit() and len(named) <= 10:
        session = parts.sessions.of_process(int(named))
    if session is None or asking.uid not in (0, session.uid):
        # The same words for one that is another user's.
        raise CommandRefused(f"there is no session {named!r}, and no process of one; adoptctl sessions lists them")
    known = session

    def job_now() -> Optional[str]:
        job = parts.jobs.for_node(known.nodename).job_of_process(known.pid)
        return None if job is None else job.id

    now: Optional[str]
    try:
        now, why = await parts.workers.run(job_now, deadline), ""
    except (Ambiguous, JobManagerError) as error:
        now, why = None, str(error)
    stages: List[Dict[str, object]] = shown_stages(known.stages)
    return {**shown_session(known), "job_now": now, "job_now_unknown": why, "stages": stages}


async def _explain_login(parts: Parts, arguments: Mapping[str, str], asking: Asking, deadline: Deadline) -> Result:
    name = arguments["user"]
    uid = await uid_of_user(name, asking, parts.workers, deadline)
    connection = None
    if "from" in arguments:
        remote = parse_endpoint(arguments["from"])
        local = parse_endpoint(arguments["to"]) if "to" in arguments else local_end(remote)
        connection = connect(remote, local)
    options, root_passes = parse_options(arguments.get("options", ""))
    if uid == 0 and root_passes:
        # By pam_adopt.so itself, which asks nobody then.
        return {
            "user": name,
            "verdict": "ignore",
            "outcome": "ignored",
            "reason": "root",
            "job": None,
            "witness": None,
            "message": "",
            "stages": [],
        }
    decision = await parts.adoptions.explain(Login(uid, name, connection, options), deadline)
    return {
        "user": name,
        "verdict": decision.step.value,
        "outcome": decision.outcome,
        "reason": decision.reason,
        "job": None if decision.job is None else decision.job.id,
        "witness": None if decision.witness is None else decision.witness.value,
        "message": decision.message,
        "stages": shown_stages([(stage.name, stage.found, stage.at_ms) for stage in decision.stages]),
    }
