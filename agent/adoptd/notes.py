"""Which job connections were made in, where only processes tell: noted while the process is there to be asked.

On cgroup v2 the label's cgroup id tells the job for as long as the job is there. On v1 the kernel keeps no such id, and
a process that has ended is in no cgroup any more. So the probe tells of connections to watched ports as they are made,
and the job is noted then. Owns the notes, bounded in number, in age and for each user. Never guesses: of a process that
is gone, or on its way out, nothing is noted. Notes are asked for by callerid, in any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from adoptd import log
from adoptd.daemon import woken
from adoptd.deadline import Deadline
from adoptd.hierarchy import CgroupMounts, HierarchyKind
from adoptd.jobs import JobBackend
from adoptd.model import AdoptdError, Ambiguous, Job, JobManagerError, Owner, ProbeError
from adoptd.probe.connects import OpenConnects
from adoptd.probe.record import decode_connected
from adoptd.process import uids_in, was_started_before
from adoptd.workers import OutOfTime, Overloaded, Workers

# A question about a connection comes with the login over it: sshd gives that two minutes (LoginGraceTime).
NOTES_S = 600.0
NOTES_MAX = 16_384
NOTES_OF_USER_MAX = 512
# Looked at in one go, some 0.1 ms each; after it, as many times its length is rested: a fifth of a core at most.
_AT_ONCE = 64
_REST = 4.0
_ROUND_MS = 5_000.0
# How often the pins and the mounts are looked at: the probe may have been loaded again, v1 mounted by a job manager.
ATTACH_S = 10.0


@dataclass(frozen=True)
class Note:
    """The job a connection was made in; ``job`` None: in none. ``noted_at_s`` is monotonic."""

    job: Optional[Job]
    noted_at_s: float


class Notes:
    """The notes of one agent, by pid and time of connect(): no two are alike. Safe to share between threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._notes: Dict[Tuple[int, int], Note] = {}
        self._of_users: Dict[int, OrderedDict[Tuple[int, int], None]] = {}

    def __len__(self) -> int:
        with self._lock:
            return len(self._notes)

    def put(self, pid: int, connected_at_ns: int, uid: int, job: Optional[Job]) -> None:
        """Note what a connection was made in. ``uid``: whose share it counts in."""
        with self._lock:
            key = (pid, connected_at_ns)
            mine = self._of_users.setdefault(uid, OrderedDict())
            self._notes[key] = Note(job, self._clock())
            mine[key] = None
            if len(mine) > NOTES_OF_USER_MAX:
                self._drop_oldest(uid)
            elif len(self._notes) > NOTES_MAX:
                self._drop_oldest(max(self._of_users, key=lambda each: len(self._of_users[each])))

    def of(self, owner: Owner) -> Optional[Note]:
        """The note of a witness's owner, if its connection was noted and that is not too long ago."""
        if owner.pid is None or owner.connected_at_ns is None:
            return None
        with self._lock:
            note = self._notes.get((owner.pid, owner.connected_at_ns))
            return note if note is not None and self._clock() - note.noted_at_s <= NOTES_S else None

    def expire(self) -> None:
        """Forget what is too old."""
        with self._lock:
            oldest_s = self._clock() - NOTES_S
            for uid in list(self._of_users):
                while uid in self._of_users:
                    key = next(iter(self._of_users[uid]))
                    if self._notes[key].noted_at_s >= oldest_s:
                        break
                    self._drop_oldest(uid)

    def _drop_oldest(self, uid: int) -> None:
        key, _ = self._of_users[uid].popitem(last=False)
        del self._notes[key]
        if not self._of_users[uid]:
            del self._of_users[uid]


def look(jobs: JobBackend, pid: int, connected_at_ns: int) -> Optional[Tuple[int, Optional[Job]]]:
    """The uid and the job of a process that connected at that time; None if it is not there to tell. Blocks on /proc.

    Raises JobManagerError, Ambiguous.
    """
    if not was_started_before(pid, connected_at_ns):
        return None
    job = jobs.job_of_process(pid)
    uid = _real_uid(pid)
    # Asked again afterwards: had it ended meanwhile, it was in the root of every hierarchy, and in no job.
    if uid is None or not was_started_before(pid, connected_at_ns):
        return None
    return uid, job


def _real_uid(pid: int) -> Optional[int]:
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as stream:
            uids = uids_in(stream.read())
    except OSError:
        return None
    return None if uids is None else uids[0]


class NoteTaker:
    """Reads what the probe tells and notes it, for one event loop. Started by the service."""

    def __init__(
        self,
        notes: Notes,
        jobs: Callable[[], Optional[JobBackend]],
        opened: Callable[[], OpenConnects],
        ports: Sequence[int],
        workers: Workers,
        mounts: Optional[CgroupMounts] = None,
    ) -> None:
        """``jobs`` and ``opened`` are asked each time; the second raises ProbeError. ``workers`` are for this alone."""
        self._notes = notes
        self._jobs = jobs
        self._opened = opened
        self._ports = tuple(ports)
        self._workers = workers
        self._mounts = mounts if mounts is not None else CgroupMounts()
        self._connects: Optional[OpenConnects] = None
        self._news = asyncio.Event()
        self._looked = False

    @property
    def attached(self) -> bool:
        """Whether the probe tells of connections."""
        return self._connects is not None

    @property
    def looked(self) -> bool:
        """Whether it was tried at all."""
        return self._looked

    async def run(self) -> None:
        """Take notes for ever."""
        attach_at_s = 0.0
        try:
            while True:
                if time.monotonic() >= attach_at_s:
                    await self._attach()
                    self._looked = True
                    self._notes.expire()
                    attach_at_s = time.monotonic() + ATTACH_S
                started_s = time.monotonic()
                if await self._round():
                    await asyncio.sleep(_REST * (time.monotonic() - started_s))
                else:
                    await self._wait(attach_at_s)
        finally:
            self._let_go()
            self._mounts.close()

    async def _round(self) -> bool:
        """Look at some of what was told; whether there was anything."""
        self._news.clear()
        events = [] if self._connects is None else self._connects.ring.read(_AT_ONCE)
        jobs = self._jobs()
        if events and jobs is not None:
            backend = jobs
            with contextlib.suppress(OutOfTime, Overloaded):
                await self._workers.run(lambda: self._note_all(backend, events), Deadline.after_ms(_ROUND_MS))
        return bool(events)

    async def _wait(self, until_s: float) -> None:
        loop = asyncio.get_running_loop()
        connects = self._connects
        if connects is not None:
            # Once, and then not until this has been read: a buffer that has more is looked at in the next round.
            loop.add_reader(connects.ring.fileno(), self._news.set)
        try:
            await woken(self._news, max(0.0, until_s - time.monotonic()))
        finally:
            if connects is not None:
                loop.remove_reader(connects.ring.fileno())

    def _note_all(self, jobs: JobBackend, events: Sequence[bytes]) -> None:
        """In a thread."""
        failures: List[AdoptdError] = []
        for event in events:
            try:
                pid, connected_at_ns = decode_connected(event)
                found = look(jobs, pid, connected_at_ns)
            except (ProbeError, JobManagerError, Ambiguous) as error:
                failures.append(error)
                continue
            if found is not None:
                uid, job = found
                self._notes.put(pid, connected_at_ns, uid, job)
        if failures:
            log.warning("connections_not_noted", count=len(failures), error=str(failures[0]))

    async def _attach(self) -> None:
        """Open the pins if they are not, or are others now; say which ports matter. In milliseconds, in a thread."""
        try:
            found = await self._workers.run(self._opened_or_none, Deadline.after_ms(_ROUND_MS))
        except (ProbeError, JobManagerError, OutOfTime, Overloaded) as error:
            if self._connects is not None:
                log.warning("connections_not_told", error=str(error))
            self._let_go()
            return
        if found is None:
            self._let_go()
        elif self._connects is not None and found.number == self._connects.number:
            found.close()
        else:
            self._let_go()
            self._connects = found

    def _opened_or_none(self) -> Optional[OpenConnects]:
        wanted = any(each.kind is HierarchyKind.V1 for each in self._mounts.hierarchies())
        found = self._opened()
        try:
            found.watch(self._ports if wanted else ())
        except ProbeError:
            found.close()
            raise
        if wanted and self._ports:
            return found
        found.close()
        return None

    def _let_go(self) -> None:
        connects, self._connects = self._connects, None
        if connects is not None:
            connects.close()
