"""Where a session's processes are, and the way back into its job.

Owns the order in which an escape is told from what is none: a job that has ended, a process that has, another job
of the same user's. Must never move a process that it has not held and found outside just before, nor by hand where
the job manager has a way of its own. Called by the guard, in its worker thread only.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass
from typing import Callable, ContextManager, Dict, FrozenSet, Iterable, List, Mapping, Optional, Protocol, Set, Tuple

from adoptd.deadline import Deadline
from adoptd.environment import uids_of
from adoptd.jobs import JobBackend
from adoptd.model import AdoptionFailed, Ambiguous, Job, JobManagerError
from adoptd.process import ProcessHandle, open_process, thread_group_of
from adoptd.sessions.kept import Session

# Memberships that were found to be inside a job: a job has few, and whoever makes thousands is looked at each time.
_KNOWN_MAX = 4096
# After moving back what is outside, what that forked meanwhile is outside too.
_PASSES = 3
# Processes moved back in one go; each move waits for a grace period of the kernel's, some 10 ms.
_MOVES_MAX = 128
_SHOWN_MAX = 256


class Place(enum.Enum):
    """Where a process is, as far as its session is concerned. OUTSIDE is an escape.

    BETWEEN: not in its job, and in no one place long enough to say where. Somebody is moving it into another job of
    its user's or, if it stays so, keeps it moving.
    """

    INSIDE = "inside"
    GONE = "gone"
    JOB_ENDED = "job_ended"
    OTHER_JOB = "other_job"
    OUTSIDE = "outside"
    BETWEEN = "between"
    UNSURE = "unsure"


@dataclass(frozen=True)
class Found:
    """What a look at one process said. ``cgroups`` is its /proc/PID/cgroup, "" if it is gone; ``why`` for UNSURE."""

    pid: int
    place: Place
    cgroups: str = ""
    why: str = ""

    @property
    def shown(self) -> str:
        """The cgroups it is in, for people: each path once, the root not at all if there is another."""
        paths = list(dict.fromkeys(line.split(":", 2)[2] for line in self.cgroups.splitlines() if line.count(":") > 1))
        return ", ".join([path for path in paths if path != "/"] or paths)[:_SHOWN_MAX]


@dataclass(frozen=True)
class Strays:
    """The processes of one session that were out of its job when they were last looked at, by pid."""

    found: Mapping[int, Found]

    @property
    def job_ended(self) -> bool:
        """Whether the job has ended, and takes nobody back."""
        return any(each.place is Place.JOB_ENDED for each in self.found.values())


class Family(Protocol):
    """The processes of one session."""

    def pids(self) -> Set[int]:
        """Their pids now, those of threads among them or not."""

    def has(self, pid: int, process: ProcessHandle) -> bool:
        """Whether ``pid``, which is ``process`` or a thread of it, is one of them."""


# Sessions.alone().
Turn = Callable[[Session, Deadline], ContextManager[bool]]


@dataclass(frozen=True)
class Return:
    """What came of moving processes back: how many are, in words why others are not, and those that are outside."""

    moved: int
    failed: Tuple[str, ...]
    left: Tuple[Found, ...] = ()


class Whereabouts:
    """Looks, and moves back."""

    def __init__(self, proc_root: str = "/proc") -> None:
        self._proc_root = proc_root
        # A process that is in the same cgroups as one that was inside is inside: while it is there they cannot be
        # removed, and so not be another job's of the same name.
        self._inside: OrderedDict[Tuple[Tuple[int, ...], str], None] = OrderedDict()

    def look(self, jobs: JobBackend, session: Session, pids: Iterable[int], deadline: Deadline) -> List[Found]:
        """Where each of ``pids`` is; those of the same users in the same cgroups once."""
        found: List[Found] = []
        asked: Dict[Tuple[str, FrozenSet[int]], Found] = {}
        for pid in pids:
            cgroups = self._cgroups(pid)
            if cgroups == "":
                found.append(Found(pid, Place.GONE))
                continue
            if (session.job.identity, cgroups) in self._inside:
                found.append(Found(pid, Place.INSIDE, cgroups))
                continue
            uids = self._uids(pid)
            known = asked.get((cgroups, uids))
            if known is not None and known.place is not Place.GONE:
                found.append(Found(pid, known.place, cgroups, known.why))
            elif deadline.expired:
                found.append(Found(pid, Place.UNSURE, cgroups, "no time left"))
            else:
                found.append(self._ask(jobs, session, pid, cgroups, uids, deadline))
                asked[cgroups, uids] = found[-1]
        return found

    def bring_back(
        self, jobs: JobBackend, session: Session, outside: List[Found], family: Family, turn: Turn, deadline: Deadline
    ) -> Return:
        """Move ``outside`` back into the session's job, and whatever of its ``family`` is outside then.

        Each in a ``turn`` of its own, and none that says no: the session was put into another job meanwhile.
        """
        moved: Set[int] = set()
        failed: Dict[int, str] = {}
        left: Dict[int, Found] = {}
        for _ in range(_PASSES):
            for done, each in enumerate(outside):
                rest = (*left.values(), *outside[done:])
                if len(moved) + len(failed) >= _MOVES_MAX:
                    words = f"more than {_MOVES_MAX} processes are outside"
                    return Return(len(moved), (*failed.values(), words), rest)
                with turn(session, deadline) as ours:
                    if not ours:
                        return Return(len(moved), tuple(failed.values()), rest)
                    is_back, fault = self._bring(jobs, session, each.pid, family, deadline)
                if is_back:
                    moved.add(each.pid)
                if fault is not None:
                    failed[each.pid], left[each.pid] = fault, each
            now = self.look(jobs, session, sorted(family.pids()), deadline)
            outside = [each for each in now if each.place is Place.OUTSIDE and each.pid not in failed]
            if not outside:
                return Return(len(moved), tuple(failed.values()), tuple(left.values()))
        more = f"{len(outside)} more processes are outside after {_PASSES} passes"
        return Return(len(moved), (*failed.values(), more), (*left.values(), *outside))

    def _ask(
        self,
        jobs: JobBackend,
        session: Session,
        pid: int,
        cgroups: str,
        uids: FrozenSet[int],
        deadline: Deadline,
    ) -> Found:
        try:
            if jobs.contains(session.job, pid):
                if self._cgroups(pid) == cgroups:
                    self._remember(session, cgroups)
                return Found(pid, Place.INSIDE, cgroups)
            if self._is_ending(pid):
                return Found(pid, Place.GONE)
            if session.job not in jobs.jobs_of(session.uid, deadline):
                return Found(pid, _after_its_job(jobs, session, pid, uids), cgroups)
            job = jobs.job_of_process(pid)
        except Ambiguous as error:
            return Found(pid, Place.BETWEEN, cgroups, str(error))
        except (JobManagerError, ValueError) as error:
            # ValueError: its job's id is none of this manager's; the configuration names another than it did then.
            return Found(pid, Place.UNSURE, cgroups, str(error))
        # OUTSIDE also where one hierarchy still names its job: it is out of the limits of another.
        return Found(pid, Place.OTHER_JOB if _is_anothers(job, session, uids) else Place.OUTSIDE, cgroups)

    def _bring(
        self, jobs: JobBackend, session: Session, pid: int, family: Family, deadline: Deadline
    ) -> Tuple[bool, Optional[str]]:
        """Move one process back. Whether it was, and in words why not; neither if there was no need any more."""
        group = thread_group_of(pid, self._proc_root)
        if group is None:
            return False, None
        try:
            with open_process(group, self._proc_root) as process:
                # Held now: what is found of it is of this very process, and no later one of its pid.
                if not family.has(pid, process):
                    return False, None
                (now,) = self.look(jobs, session, [pid], deadline)
                if now.place not in (Place.OUTSIDE, Place.BETWEEN):
                    return False, now.why or None
                try:
                    jobs.adopt(process, session.job, deadline)
                except AdoptionFailed as error:
                    return False, None if process.exiting() else str(error)
                (now,) = self.look(jobs, session, [pid], deadline)
                if now.place in (Place.OUTSIDE, Place.BETWEEN):
                    return False, f"thread {pid} of process {group} is outside, though its process is in the job"
                return True, None
        except AdoptionFailed:
            return False, None

    def _remember(self, session: Session, cgroups: str) -> None:
        self._inside[session.job.identity, cgroups] = None
        if len(self._inside) > _KNOWN_MAX:
            self._inside.popitem(last=False)

    def _uids(self, pid: int) -> FrozenSet[int]:
        """All uids of a thread's process; empty if it has ended."""
        try:
            with open_process(thread_group_of(pid, self._proc_root) or pid, self._proc_root) as process:
                return uids_of(process, self._proc_root) or frozenset()
        except AdoptionFailed:
            return frozenset()

    def _is_ending(self, pid: int) -> bool:
        try:
            with open_process(thread_group_of(pid, self._proc_root) or pid, self._proc_root) as process:
                return process.exiting()
        except AdoptionFailed:
            return True

    def _cgroups(self, pid: int) -> str:
        try:
            with open(f"{self._proc_root}/{pid}/cgroup", "rb", buffering=0) as stream:
                return (stream.read() or b"").decode("utf-8", "surrogateescape")
        except OSError:
            return ""


def _is_anothers(job: Optional[Job], session: Session, uids: FrozenSet[int]) -> bool:
    """Whether a process with these uids, which was found in ``job``, is well placed there, though it is not its own."""
    if job is None or job == session.job:
        return False
    # Its user's: as `adoptctl join` does it, which may not have said so yet; limited and accounted all the same.
    # Another user's process in that user's own: of a job manager that was started by hand, with sudo.
    return job.uid == session.uid or uids == frozenset((job.uid,))


def _after_its_job(jobs: JobBackend, session: Session, pid: int, uids: FrozenSet[int]) -> Place:
    """Where a process is that is not in the session's job, which has ended."""
    try:
        elsewhere = _is_anothers(jobs.job_of_process(pid), session, uids)
    except (Ambiguous, JobManagerError, ValueError):
        elsewhere = False
    return Place.OTHER_JOB if elsewhere else Place.JOB_ENDED
