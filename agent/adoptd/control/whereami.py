"""``whereami``: in which job the caller is, what it may use there, and what else is its user's on this node.

Everything is about the process that connected, as the kernel names it, and about its uid. Changes nothing.
Called by :class:`adoptd.control.Control`.
"""

from __future__ import annotations

import dataclasses
from typing import Mapping, Optional, Tuple

from adoptd.control.asking import Asking, CommandRefused, Parts
from adoptd.deadline import Deadline
from adoptd.hierarchy import CgroupMounts
from adoptd.jobs import JobBackend
from adoptd.limits import Limits, limits_of
from adoptd.model import AdoptdError, Ambiguous, Job, JobFault, JobManagerError
from adoptd.process import ProcessHandle
from adoptd.sessions import Session
from adoptd.wire.control import Result

_NONE_HERE = "You have no job on this node, and nothing here limits or accounts what you do."
_ELSEWHERE = "This process is in no job. Log in from inside the job you mean, or run your program through its manager."
_NO_MANAGER = (
    "no job runs on this node ({error}). If it is a login node, that is as it should be: ask on a node of your job "
    "(squeue --me lists them). If it is not, tell your administrators"
)
_JOIN = "This process is in no job. adoptctl join JOB moves your session into one of yours."

_MOUNTS = CgroupMounts()


async def whereami(parts: Parts, arguments: Mapping[str, str], asking: Asking, deadline: Deadline) -> Result:
    """The result of the command. Raises CommandRefused, or AdoptdError if the jobs cannot be looked up."""
    process = asking.caller()
    found = parts.sessions.of_process(process.pid)
    # Within su or sudo: whose session this is, is not the business of whom it became.
    session = found if found is not None and asking.uid in (0, found.uid) else None
    backend = parts.jobs.for_node("" if session is None else session.nodename)
    try:
        job, why, limits, theirs = await parts.workers.run(
            lambda: _look(backend, process, asking.uid, deadline), deadline
        )
    except JobManagerError as error:
        raise in_words(error) from None
    if not process.alive():
        raise CommandRefused("the process that connected to the agent has ended")
    others = [each.id for each in theirs if job is None or each.id != job.id]
    advice = ""
    if job is None:
        advice = _NONE_HERE if not others else _JOIN if session is not None else _ELSEWHERE
    return {
        "node": parts.config.agent.shown_name(),
        "uid": asking.uid,
        "pid": process.pid,
        "job": None if job is None else job.id,
        "why": why,
        "limits": dataclasses.asdict(limits),
        "session": _shown(session),
        "other_jobs": others,
        "advice": advice,
    }


def in_words(error: JobManagerError) -> AdoptdError:
    """What a user is told: of a manager that is not set up here more than which of its directories is missing."""
    missing = error.fault is JobFault.SPOOL_UNREADABLE
    return CommandRefused(_NO_MANAGER.format(error=error)) if missing else error


def _shown(session: Optional[Session]) -> Optional[Result]:
    if session is None:
        return None
    return {
        "session": session.id,
        "job": session.job.id,
        "reason": session.reason,
        "witness": None if session.witness is None else session.witness.value,
        "since": session.since_s,
        "from": None if session.connection is None else str(session.connection.source),
    }


def _look(
    backend: JobBackend, process: ProcessHandle, uid: int, deadline: Deadline
) -> Tuple[Optional[Job], str, Limits, Tuple[Job, ...]]:
    """The process's job, why it is not known, its limits, and the jobs of ``uid`` here. Raises JobManagerError."""
    job, why = None, ""
    try:
        job = backend.job_of_process(process.pid)
    except Ambiguous as error:
        why = str(error)
    if job is not None and uid not in (0, job.uid):
        # Within su: the name of another user's job.
        job, why = None, "in a job of another user's"
    cgroups = {} if job is None else backend.job_cgroups(_MOUNTS.membership(process.pid) or {})
    return job, why, limits_of(process.pid, _MOUNTS, cgroups), backend.jobs_of(uid, deadline)
