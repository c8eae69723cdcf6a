"""``explain`` and ``sessions``: why a login would land where it would, and why a session did.

Changes nothing. Who asks is told of their own logins and sessions only, root of all. Called by
:class:`adoptd.control.Control`.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Set

from adoptd.adoption import Adoptions
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
from adoptd.pam_lines import adopt_lines
from adoptd.sessions import Session, Strays
from adoptd.wire.control import Result

# Processes outside that one list names, of all sessions and of one: whoever may move their own out of their job makes
# as many as they like, in cgroups of any name, and the answer has a bound (frame.CONTROL_MAX_BYTES).
_NAMED_MAX = 256
_NAMED_OF_ONE = 8


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
    """The sessions that live, and those that left something outside of their job: root all, others their own."""
    strays = parts.sessions.strays
    rows: List[Dict[str, object]] = []
    named = 0
    for session in parts.sessions.watched():
        ended = parts.sessions.has_ended(session)
        if asking.uid in (0, session.uid) and (not ended or session.id in strays):
            shown = shown_strays(strays.get(session.id), min(_NAMED_OF_ONE, _NAMED_MAX - named))
            named += min(_NAMED_OF_ONE, _NAMED_MAX - named, shown["outside_count"])
            rows.append({**shown_session(session), **shown, "ended": ended})
    return {"sessions": rows}


def shown_strays(strays: Optional[Strays], most: int) -> Dict[str, Any]:
    """What of a session was out of its job at the last look, and whether there is a job to go back to."""
    found = () if strays is None else tuple(strays.found.values())
    return {
        "outside": [{"pid": each.pid, "cgroup": each.shown} for each in found[:most]],
        "outside_count": len(found),
        "job_ended": strays is not None and strays.job_ended,
    }


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
    """What the account phase would decide, if every job takes in whom it is asked to, and in the time of a command."""
    name = arguments["user"]
    uid = await uid_of_user(name, asking, parts.workers, deadline)
    connection = None
    if "from" in arguments:
        remote = parse_endpoint(arguments["from"])
        local = parse_endpoint(arguments["to"]) if "to" in arguments else local_end(remote)
        connection = connect(remote, local)
    words = parse_options(arguments.get("options", ""))
    if uid == 0 and words.root_passes:
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
    adoptions = await _adoptions_at(words.nodename, parts, asking, deadline)
    decision = await adoptions.explain(Login(uid, name, connection, words.options), deadline, asking.uid)
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


async def _adoptions_at(nodename: str, parts: Parts, asking: Asking, deadline: Deadline) -> Adoptions:
    """Those that the PAM option nodename= would have. Raises CommandRefused, JobManagerError."""
    # Each name takes one of a few places, which are for those that root has written into the PAM stack.
    if nodename and asking.uid != 0 and nodename not in await parts.workers.run(_nodenames, deadline):
        raise CommandRefused(f"no PAM line of sshd's here says nodename={nodename}; only root may ask as if one did")
    return parts.adoptions.at(nodename)


def _nodenames() -> Set[str]:
    """What nodename= is in the PAM stack of sshd. Blocks on its files."""
    try:
        lines = adopt_lines("sshd")
    except OSError:
        return set()
    pairs = (word.partition("=") for line in lines for word in line.words)
    return {value for name, _, value in pairs if name == "nodename"}
