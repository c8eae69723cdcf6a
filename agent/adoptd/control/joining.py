"""``join JOB``: the caller's session, from its leader down, into another job of the same user on this node.

Owns the order, which is the security argument: who asks (the process that connected, by its pidfd), which session
it is in, how often its user asks, which jobs are the session's user's here, whether the job is entered by cgroups
alone, and only then the moves. Must never move a process that is not of this session, nor say "joined" of one
that was not read back. Called by :class:`adoptd.control.Control`.
"""

from __future__ import annotations

import contextlib
import enum
import os
import time
from dataclasses import dataclass
from typing import Dict, FrozenSet, Mapping, Optional, Tuple

from adoptd import log
from adoptd.control.asking import Asking, CommandRefused, Parts
from adoptd.control.tree import Key, Row, look, look_at, members
from adoptd.deadline import Deadline
from adoptd.environment import uids_of
from adoptd.events import Event, EventKind
from adoptd.jobs import JobBackend
from adoptd.model import AdoptionFailed, Job, JobManagerError
from adoptd.process import ProcessHandle, open_process
from adoptd.sessions import Session
from adoptd.wire.control import Result
from adoptd.workers import OutOfTime, Overloaded

# Looks at /proc until one finds nothing new. Children of what was moved are born in the job, so only what forks
# faster than it is moved, and ends at once, can make this many necessary.
LOOKS_MAX = 16
# A session with more processes than this is a job of its own; each costs a thread of Slurm's step.
PROCESSES_MAX = 1024
# So many processes moved count as one more join of their user's: each move holds up every fork on the node.
PROCESSES_PER_JOIN = 25
# What the last move and its read-back may take after the deadline for beginning it.
_MARGIN_S = 1.0
# Left-behind processes that a reply names.
_LEFT_NAMED = 20
# How much of a session's history is kept.
_STAGES_MAX = 32


class JoinOutcome(enum.Enum):
    """What came of a join; the values are a metric's label."""

    JOINED = "joined"
    PARTLY = "partly"
    ALREADY = "already"
    FAILED = "failed"
    NO_SESSION = "no_session"
    NO_SUCH_JOB = "no_such_job"
    CONTAINER = "container"
    RATE = "rate"
    UNAVAILABLE = "unavailable"


class JoinRefused(CommandRefused):
    """No process was moved. The text is for the user."""

    def __init__(self, outcome: JoinOutcome, text: str) -> None:
        super().__init__(text)
        self.outcome = outcome


@dataclass(frozen=True)
class Left:
    """A process of the session that is not in the job, and why."""

    pid: int
    why: str


@dataclass(frozen=True)
class Moved:
    """How many processes were read back in the job, and those that were not."""

    count: int
    left: Tuple[Left, ...]


async def join(parts: Parts, arguments: Mapping[str, str], asking: Asking, deadline: Deadline) -> Result:
    """Carry out the command. Raises CommandRefused; nothing was moved then."""
    started = time.monotonic()
    wait_s = 0.0 if asking.uid == 0 else parts.rates.wait_s(asking.uid)
    if wait_s > 0:
        # Counted and no more: what is said of each would be a flood of its own.
        parts.metrics.joins.labels(JoinOutcome.RATE.value).inc()
        raise JoinRefused(JoinOutcome.RATE, f"too many joins; the next one may be in {wait_s:.0f} s")
    session: Optional[Session] = None
    try:
        session = _session(parts, arguments.get("session"), asking)
        result, outcome = await _join(parts, session, arguments["job"], deadline)
    except JoinRefused as refused:
        _tell(parts, asking, session, arguments["job"], refused.outcome, str(refused), started)
        raise
    _tell(parts, asking, session, arguments["job"], outcome, str(result["message"]), started)
    moved = result["moved"]
    if asking.uid != 0 and isinstance(moved, int):
        parts.rates.charge(asking.uid, moved // PROCESSES_PER_JOIN)
    return result


async def _join(parts: Parts, session: Session, job_id: str, deadline: Deadline) -> Tuple[Result, JoinOutcome]:
    leader = parts.sessions.hold(session)
    if leader is None:
        raise JoinRefused(JoinOutcome.NO_SESSION, "the session has ended")
    others = frozenset(each.pid for each in parts.sessions.all()) - {session.pid}
    strays = session.id in parts.sessions.strays
    with leader:
        try:
            backend = parts.jobs.for_node(session.nodename)
            job = await parts.workers.run(
                lambda: _job_to_join(backend, session, job_id, leader, others, strays, deadline), deadline
            )
        except (JobManagerError, OutOfTime, Overloaded) as error:
            raise JoinRefused(JoinOutcome.UNAVAILABLE, f"the job cannot be joined now: {error}") from None
        fresh = _noted(parts, session, job)
        # Ends by itself before it would be abandoned half done.
        within = Deadline(deadline.at_s - _MARGIN_S)
        try:
            moved = await parts.workers.run(
                lambda: _move_alone(parts, backend, session, fresh, leader, others, within), deadline
            )
        except (AdoptionFailed, Overloaded) as error:
            _noted(parts, fresh, session.job, session)
            raise JoinRefused(JoinOutcome.FAILED, f"nothing was moved: {error}") from None
        except OutOfTime:
            words = "it was not done in time, and may be half done; adoptctl whereami says where you are"
            raise JoinRefused(JoinOutcome.FAILED, words) from None
    outcome = JoinOutcome.PARTLY if moved.left else JoinOutcome.JOINED
    words = f"{moved.count} of {moved.count + len(moved.left)} processes of this session are in job {job.id} now"
    return {
        "outcome": outcome.value,
        "session": session.id,
        "from": session.job.id,
        "job": job.id,
        "moved": moved.count,
        "left": [{"pid": each.pid, "why": each.why} for each in moved.left[:_LEFT_NAMED]],
        "message": words,
    }, outcome


def _session(parts: Parts, named: Optional[str], asking: Asking) -> Session:
    """The session to move: the caller's own or, for root, any that is named."""
    if named is not None and asking.uid != 0:
        raise JoinRefused(JoinOutcome.NO_SESSION, "only root may name a session; yours is the one you ask from")
    if named is not None:
        session = parts.sessions.find(named)
        words = f"there is no session {named!r}; adoptctl sessions lists them"
    else:
        try:
            session = parts.sessions.of_process(asking.caller().pid)
        except CommandRefused as refused:
            raise JoinRefused(JoinOutcome.NO_SESSION, str(refused)) from None
        words = "this is not a session that was put into a job at its login, so there is nothing to move"
    # Another user's: su within a session. Which job it is in is the business of who logged in.
    if session is None or asking.uid not in (0, session.uid):
        raise JoinRefused(JoinOutcome.NO_SESSION, words)
    return session


def _job_to_join(
    backend: JobBackend,
    session: Session,
    job_id: str,
    leader: ProcessHandle,
    others: FrozenSet[int],
    strays: bool,
    deadline: Deadline,
) -> Job:
    """The job, if it is one the session can be moved to. Raises JoinRefused, JobManagerError.

    ``strays``: the guard saw something of the session outside; it has a list, and puts back what is not found here.
    """
    job = next((job for job in backend.jobs_of(session.uid, deadline) if job.id == job_id), None)
    if job is None:
        # One sentence for a job that never was, has ended or is another user's: the difference is not theirs to know.
        raise JoinRefused(JoinOutcome.NO_SUCH_JOB, f"{session.user} has no job {job_id!r} running on this node")
    if (
        job == session.job
        and backend.contains(job, session.pid)
        and not (strays or _has_strays(backend, session, others, deadline))
    ):
        raise JoinRefused(JoinOutcome.ALREADY, f"this session is in job {job.id} already")
    fault = _container_fault(backend, session, job, leader, deadline)
    if fault is not None:
        words = "a session enters and leaves it at its login only; log in anew from inside the job you want"
        raise JoinRefused(JoinOutcome.CONTAINER, f"{fault} (namespaces of its own), and {words}")
    return job


def _has_strays(backend: JobBackend, session: Session, others: FrozenSet[int], deadline: Deadline) -> bool:
    """Whether one of the session's processes, its user's own, is not in the session's job, as far as there is time."""
    for row in _processes_of(session, others)[1:PROCESSES_MAX]:
        if deadline.expired:
            return False
        if not backend.contains(session.job, row.pid):
            with contextlib.suppress(AdoptionFailed), open_process(row.pid) as process:
                if process.start_ticks == row.start_ticks and _not_ours(backend, session, process) is None:
                    return True
    return False


def _container_fault(
    backend: JobBackend, session: Session, job: Job, leader: ProcessHandle, deadline: Deadline
) -> Optional[str]:
    """Why moving the cgroups alone would leave the session half in one job and half in another; None: it would not.

    Where sessions do not enter containers at all (join_container=0), none is in that of its own job either.
    """
    try:
        left = _namespaces(backend, session.job, deadline)
    except JobManagerError:
        # A job that has ended has nothing to leave behind.
        left = frozenset()
    entered = _namespaces(backend, job, deadline)
    mine = set()
    try:
        names = os.listdir(f"/proc/{leader.pid}/ns")
    except OSError as error:
        # Held, so the pid is nobody else's: it has ended.
        if not leader.alive():
            raise JoinRefused(JoinOutcome.NO_SESSION, "the session has ended") from None
        raise JobManagerError(f"the namespaces of process {leader.pid} cannot be seen: {error.strerror}") from None
    for name in names:
        with contextlib.suppress(OSError):
            mine.add(_identity(os.stat(f"/proc/{leader.pid}/ns/{name}")))
    if left & mine and left != entered:
        return f"this session is in the container of job {session.job.id}"
    if entered <= mine or (left and not left & mine):
        return None
    return f"job {job.id} has a container"


def _namespaces(backend: JobBackend, job: Job, deadline: Deadline) -> FrozenSet[Tuple[int, int]]:
    """The namespaces that a session of the job's enters at its login, by inode. Raises JobManagerError."""
    given = backend.session(job, x11=False, namespaces=True, deadline=deadline)
    try:
        return frozenset(_identity(os.fstat(descriptor)) for descriptor in given.descriptors)
    finally:
        given.close()


def _identity(status: os.stat_result) -> Tuple[int, int]:
    return status.st_dev, status.st_ino


def _move_alone(
    parts: Parts,
    backend: JobBackend,
    before: Session,
    fresh: Session,
    leader: ProcessHandle,
    others: FrozenSet[int],
    deadline: Deadline,
) -> Moved:
    """:meth:`move`, with nobody else moving the session, who may have begun before it was said to be in ``fresh.job``.

    Raises AdoptionFailed.
    """
    with parts.sessions.alone(fresh, deadline) as ours:
        if not ours:
            raise AdoptionFailed("the session is being moved by somebody else")
        return move(backend, before, fresh.job, leader, others, deadline)


def move(
    backend: JobBackend,
    session: Session,
    job: Job,
    leader: ProcessHandle,
    others: FrozenSet[int],
    deadline: Deadline,
) -> Moved:
    """Move the session's processes, the leader first; each is read back. ``others`` lead other sessions.

    Raises AdoptionFailed if the leader cannot be moved; nothing is, then.
    """
    backend.adopt(leader, job, deadline)
    done: Dict[Key, Optional[str]] = {}
    for _ in range(LOOKS_MAX):
        try:
            rows = _processes_of(session, others)
        except JobManagerError as error:
            left = tuple(Left(pid, why) for (pid, _), why in done.items() if why is not None)
            return Moved(1 + len(done) - len(left), (*left, Left(session.pid, str(error))))
        fresh = [row for row in rows if row.pid != session.pid and row.key not in done]
        if not fresh:
            return _counted(rows, done)
        for row in fresh:
            if len(done) >= PROCESSES_MAX:
                done[row.key] = f"more than {PROCESSES_MAX} processes"
            elif deadline.expired:
                done[row.key] = "no time was left"
            else:
                done[row.key] = _move_one(backend, session, job, row, deadline)
        if deadline.expired:
            return _counted(rows, done)
    moved = _counted(rows, done)
    words = "the session starts processes faster than they are moved"
    return Moved(moved.count, (*moved.left, Left(session.pid, words)))


def _processes_of(session: Session, others: FrozenSet[int]) -> Tuple[Row, ...]:
    """The session's processes now, the leader first. Raises JobManagerError if they cannot be seen."""
    try:
        return members(session.pid, look(), others)
    except OSError as error:
        raise JobManagerError(f"the session's processes cannot be seen: {error.strerror}") from None


def _counted(rows: Tuple[Row, ...], done: Mapping[Key, Optional[str]]) -> Moved:
    """Those that are still there; the leader counts as moved."""
    alive = {row.key for row in rows}
    kept = {key: why for key, why in done.items() if key in alive}
    left = tuple(Left(pid, why) for (pid, _), why in kept.items() if why is not None)
    return Moved(1 + len(kept) - len(left), left)


def _move_one(backend: JobBackend, session: Session, job: Job, row: Row, deadline: Deadline) -> Optional[str]:
    """Why the process is not in the job; None: it is, or has ended."""
    try:
        process = open_process(row.pid)
    except AdoptionFailed as error:
        try:
            now = look_at(row.pid)
        except JobManagerError:
            return str(error)
        return None if now is None or now.key != row.key else str(error)
    with process:
        if process.start_ticks != row.start_ticks:
            return None
        try:
            why = _not_ours(backend, session, process)
            if why is None:
                backend.adopt(process, job, deadline)
        except (AdoptionFailed, JobManagerError) as error:
            why = str(error)
        return None if why is not None and process.exiting() else why


def _not_ours(backend: JobBackend, session: Session, process: ProcessHandle) -> Optional[str]:
    """Why a process that came from the session is not to be moved with it; None: it is.

    The user's own goes wherever it is. One that has another uid, such as sshd's own or what sudo started, goes along
    if it is still where the session put it: somebody else may have moved it, to a job or a session of that uid's.
    """
    uids = uids_of(process)
    if uids is None or uids == frozenset((session.uid,)):
        return None
    return None if backend.contains(session.job, process.pid) else "runs as another user, and elsewhere"


def _noted(parts: Parts, session: Session, job: Job, before: Optional[Session] = None) -> Session:
    """Note the job first: who watches over sessions must not take the move for an escape. ``before`` undoes that."""
    if before is not None:
        now = parts.sessions.find(session.id)
        if now is not None and now.job != session.job:
            # Another join has come since: what it says stands.
            return now
        stages, reason = before.stages, before.reason
    else:
        at_ms = (time.time() - session.since_s) * 1000.0
        stages = (*session.stages, ("join", f"job {job.id}, from job {session.job.id}", at_ms))[-_STAGES_MAX:]
        reason = EventKind.JOIN.value
    try:
        return parts.sessions.moved(session, job, reason, stages)
    except KeyError:
        raise JoinRefused(JoinOutcome.NO_SESSION, "the session has ended") from None


def _tell(
    parts: Parts,
    asking: Asking,
    session: Optional[Session],
    job_id: str,
    outcome: JoinOutcome,
    words: str,
    started: float,
) -> None:
    parts.metrics.joins.labels(outcome.value).inc()
    fields: Dict[str, log.Field] = {
        "outcome": outcome.value,
        "job": job_id,
        "session": None if session is None else session.id,
        "user": None if session is None else session.user,
        "by_uid": asking.uid,
        "pid": None if asking.process is None else asking.process.pid,
        "detail": words,
        "latency_ms": (time.monotonic() - started) * 1000.0,
    }
    log.info("join", **fields)
    uid = asking.uid if session is None else session.uid
    parts.events.publish(Event(EventKind.JOIN, uid, fields))
