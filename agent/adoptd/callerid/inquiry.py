"""Which job owns a connection that left this node: the evidence, heard and judged.

Owns the stages from a connection to a job (:meth:`Inquiry.settle`): who owns it, do all agree, is it still that
process, in which job, may that be said. Must never guess: where witnesses disagree, or time runs out, the outcome is
UNKNOWN. Called by the responder, for other nodes, and by ``adoptctl whois``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Callable, Optional, Tuple

from adoptd.connections import Disagreement, Testimony, Witnesses
from adoptd.deadline import Deadline
from adoptd.environment import environment_of
from adoptd.jobs import CgroupFinding, CgroupVerdict, JobBackend
from adoptd.model import (
    AdoptdError,
    AdoptionFailed,
    Ambiguous,
    Connection,
    Job,
    JobManagerError,
    Owner,
    Witness,
    is_job_id,
)
from adoptd.notes import Notes
from adoptd.process import open_process, was_started_before
from adoptd.wire.callerid import Outcome, Reason
from adoptd.workers import OutOfTime, Overloaded, Workers


@dataclass(frozen=True)
class Settled:
    """What this node says about a connection, with the evidence, which stays on this node."""

    outcome: Outcome
    reason: Reason
    job: Optional[Job] = None
    owner: Optional[Owner] = None
    moved: bool = False
    detail: str = ""
    hint: Optional[str] = None


# Said whoever else owns the connection: they follow from the question, or go with an outcome that only owners get.
_SAID_TO_ALL = frozenset({Reason.OWNER, Reason.NOT_FOUND, Reason.NOT_ALLOWED})


def reason_for(reader_uid: int, reason: Reason) -> Reason:
    """The reason as ``reader_uid`` is told it: NOT_FOUND for all but root, unless the connection is their own.

    Whether there is a connection that is somebody else's, and what is not certain about it, is not theirs to know.
    """
    return reason if reader_uid == 0 or reason in _SAID_TO_ALL else Reason.NOT_FOUND


class _Unsettled(AdoptdError):
    """A stage ended the search: the outcome is UNKNOWN for ``reason``."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Look:
    """What was found without asking the slow witnesses. ``settled`` None: they have to be asked, and there is time."""

    testimony: Testimony
    settled: Optional[Settled] = None


class Inquiry:
    """Finds the job of a connection that left this node."""

    def __init__(
        self,
        witnesses: Witnesses,
        jobs: JobBackend,
        workers: Workers,
        hints: bool = True,
        notes: Optional[Notes] = None,
    ) -> None:
        """``hints``: whether to look for a job in the environment of an owner that is in none.

        ``notes``: what was noted of connections as they were made, where cgroup ids do not tell.
        """
        self._witnesses = witnesses
        self._jobs = jobs
        self._workers = workers
        self._hints = hints
        self._notes = notes

    async def settle(self, connection: Connection, login_uid: Optional[int], deadline: Deadline) -> Settled:
        """Which job owns ``connection``, said only if it is ``login_uid``'s (None: anybody's). Never raises."""
        try:
            look = await self._workers.run(lambda: self.look(connection, login_uid, deadline), deadline)
        except (OutOfTime, Overloaded) as error:
            return Settled(Outcome.UNKNOWN, Reason.OUT_OF_TIME, detail=str(error))
        return await self.look_further(look, login_uid, deadline)

    def look(self, connection: Connection, login_uid: Optional[int], deadline: Deadline) -> Look:
        """As :meth:`settle`, by the fast witnesses alone. Never raises; blocks on /proc and the job manager."""
        return self._judged(self._witnesses.fast_testimony(connection, deadline), login_uid)

    async def look_further(self, look: Look, login_uid: Optional[int], deadline: Deadline) -> Settled:
        """What has been settled, or what the slow witnesses add to it. Never raises."""
        if look.settled is not None:
            return look.settled
        testimony = await self._witnesses.slow_testimony(look.testimony, deadline)
        try:
            look = await self._workers.run(lambda: self._judged(testimony, login_uid), deadline)
        except (OutOfTime, Overloaded) as error:
            return Settled(Outcome.UNKNOWN, Reason.OUT_OF_TIME, detail=str(error))
        return look.settled or _not_told(testimony)

    def _judged(self, testimony: Testimony, login_uid: Optional[int]) -> Look:
        """What ``testimony`` comes to; nothing settled if more witnesses have to be heard."""
        try:
            told = self._job_of(testimony)
            if told is None:
                return Look(testimony, _not_told(testimony) if testimony.complete else None)
            owner, job, moved = told
            if login_uid is not None and (owner.uid != login_uid or (job is not None and job.uid != login_uid)):
                settled = Settled(Outcome.UNKNOWN, Reason.OTHER_USER, owner=owner, detail="the owner is another user")
            elif job is None:
                hint = self._hint_of(owner) if self._hints else None
                settled = Settled(Outcome.NO_JOB, Reason.OWNER, owner=owner, hint=hint)
            else:
                settled = Settled(Outcome.JOB, Reason.OWNER, job=job, owner=owner, moved=moved)
        except _Unsettled as error:
            settled = Settled(Outcome.UNKNOWN, error.reason, detail=str(error))
        except Disagreement as error:
            settled = Settled(Outcome.UNKNOWN, Reason.DISAGREEMENT, detail=str(error))
        except Ambiguous as error:
            settled = Settled(Outcome.UNKNOWN, Reason.AMBIGUOUS, detail=str(error))
        except JobManagerError as error:
            settled = Settled(Outcome.UNKNOWN, Reason.JOB_MANAGER, detail=str(error))
        return Look(testimony, settled)

    def _hint_of(self, owner: Owner) -> Optional[str]:
        """The job that the environment of the owner's process names, if it is still that process. Blocks."""
        if owner.pid is None:
            return None
        try:
            process = open_process(owner.pid)
        except AdoptionFailed:
            return None
        with process:
            # Held first, then looked at: the pid cannot come to mean another between the two.
            if not self._still_that_process(owner):
                return None
            job_id = (environment_of(process, owner.uid) or {}).get(self._jobs.job_variable)
        return job_id if job_id is not None and is_job_id(job_id) else None

    def _job_of(self, testimony: Testimony) -> Optional[Tuple[Owner, Optional[Job], bool]]:
        """The agreed owner, its job, and whether it has left that job. None: no evidence so far tells.

        Blocks on /proc and the job manager. Raises Ambiguous, _Unsettled, JobManagerError.
        """
        agreed = testimony.agreed_owner()
        if agreed is None:
            return None
        # Witnesses mostly name one cgroup, and what job it is takes longer to find out than all else here.
        with_both = (owner for owner in testimony.owners if owner.pid is not None and owner.cgroup_id is not None)
        pid = next((owner.pid for owner in with_both), None)
        verdict_of = functools.lru_cache(maxsize=None)(lambda cgroup: self._jobs.job_of_cgroup(cgroup, pid))
        found = [(owner, *told) for owner in testimony.owners for told in self._job_of_one(owner, verdict_of)]
        if not found:
            return None
        owner, job, holds = found[0]
        if any(other != job for _, other, _ in found):
            words = ", ".join(f"{o.witness.value}: {'no job' if j is None else 'job ' + j.id}" for o, j, _ in found)
            raise _Unsettled(Reason.DISAGREEMENT, f"witnesses name different jobs ({words})")
        return owner, job, holds is False and owner.pid == pid and self._still_that_process(owner)

    def _job_of_one(
        self, owner: Owner, verdict_of: Callable[[int], CgroupVerdict]
    ) -> Tuple[Tuple[Optional[Job], Optional[bool]], ...]:
        """The job (None: in no job) that this owner's evidence tells, and whether its process is in that still;
        empty if it does not tell."""
        removed = False
        if owner.cgroup_id is not None:
            verdict = verdict_of(owner.cgroup_id)
            if verdict.finding in (CgroupFinding.JOB, CgroupFinding.NO_JOB):
                return ((verdict.job, verdict.holds),)
            removed = verdict.finding is CgroupFinding.GONE
        note = None if self._notes is None else self._notes.of(owner)
        if note is not None and owner.pid is not None:
            return ((note.job, None if note.job is None else self._jobs.contains(note.job, owner.pid)),)
        if owner.pid is None or not self._still_that_process(owner):
            return ()
        # Where the process is now is all that is known: it has not left or, where what it connected from is no more,
        # was moved there.
        told = self._jobs.job_of_process(owner.pid)
        # It may have ended before that was read, and its pid have passed to another.
        return ((told, not removed),) if self._still_that_process(owner) else ()

    @staticmethod
    def _still_that_process(owner: Owner) -> bool:
        if owner.pid is None:
            return False
        if owner.connected_at_ns is None:
            # Seeded sockets and /proc: the witness saw this pid hold the socket, and no connect time says otherwise.
            return owner.witness is Witness.PROC
        return was_started_before(owner.pid, owner.connected_at_ns)


def _not_told(testimony: Testimony) -> Settled:
    """All witnesses were heard, and the job is not known."""
    if testimony.owners:
        return Settled(Outcome.UNKNOWN, Reason.JOB_NOT_TOLD, detail="the owner is known but not whether it is in a job")
    if testimony.consulted:
        nobody = f"nobody on this node is known to own {testimony.connection}"
        return Settled(Outcome.UNKNOWN, Reason.NOT_FOUND, detail=nobody)
    why = "; ".join(f"{remark.witness.value}: {remark.reason}" for remark in testimony.unavailable)
    return Settled(Outcome.UNKNOWN, Reason.NO_WITNESS, detail=why)
