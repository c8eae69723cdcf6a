"""Which processes were adopted, into which job, and why: one entry for each that still lives.

Owns the pidfds that make an entry mean one process and no later one of its number, and what of it is kept for
the next agent. An entry says where a session was put; it must never be taken for where the session is now, which
only the job backend knows. For one event loop. Called by adoption (to add), by users' commands (to look up) and
by the watch for escapes.
"""

from __future__ import annotations

import contextlib
import select
import threading
from collections import Counter, OrderedDict
from dataclasses import replace
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Tuple
from weakref import WeakValueDictionary

from adoptd import log
from adoptd.deadline import Deadline
from adoptd.model import AdoptionFailed, Connection, Job, ProtocolError, Witness
from adoptd.process import ProcessHandle, open_process, parent_of
from adoptd.sessions.fields import Stages
from adoptd.sessions.kept import Session, decode_session, encode_session, session_id
from adoptd.sessions.store import SessionStore, StoreError, boot_id
from adoptd.sessions.whereabouts import Strays

# Each holds a descriptor and about 2 KiB. A node has a few hundred sessions; who makes thousands loses their own.
CAPACITY = 4096
# A shell within a shell is a few levels deep. Who nests deeper is found all the same, by the probe's own list.
_GENERATIONS_MAX = 64
# Sessions that have ended, of which a daemon may live on: watched still.
_ENDED_MAX = 1024

# Files that are refused at a start and named one by one; of the rest it is said how many there are.
_REFUSALS_SAID = 20


class _Turn:
    """Whose turn it is to move one session's processes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class Sessions:
    """The sessions of this node."""

    def __init__(
        self,
        clock: Callable[[], float],
        store: Optional[SessionStore] = None,
        capacity: int = CAPACITY,
        proc_root: str = "/proc",
    ) -> None:
        """``clock`` gives Unix time in seconds. ``store``: where sessions outlive the agent; None: nowhere."""
        self._clock = clock
        self._store = store
        self._capacity = capacity
        self._proc_root = proc_root
        # By pid: at any time one process has it, and an entry goes when its process does. The oldest first.
        self._entries: Dict[int, Tuple[Session, ProcessHandle]] = {}
        # Readable as soon as one of the processes has ended.
        self._ended = select.epoll()
        self._past: OrderedDict[str, Session] = OrderedDict()
        self._boot_id = "" if store is None else boot_id(proc_root)
        # In words, who says when one of their processes is moved: for people.
        self.watched_by = "nobody yet"
        # By id, what the guard found out of its job when it last looked, and did not get back into it.
        self.strays: Mapping[str, Strays] = {}
        self._unwritten = False
        # To be written as soon as nobody waits for it, by id.
        self._due: Dict[str, Session] = {}
        self._heard: List[Callable[[Session], None]] = []
        self._turns: WeakValueDictionary[str, _Turn] = WeakValueDictionary()
        self._turns_lock = threading.Lock()
        self._listed: Callable[[int], Optional[Tuple[int, int]]] = lambda pid: None

    def __len__(self) -> int:
        self.drop_ended()
        return len(self._entries)

    @property
    def count(self) -> int:
        """How many are kept now. From any thread."""
        return len(self._entries)

    def add(
        self,
        process: ProcessHandle,
        *,
        uid: int,
        user: str,
        job: Job,
        witness: Optional[Witness],
        reason: str,
        connection: Optional[Connection],
        service: str,
        stages: Stages,
        nodename: str = "",
        write_now: bool = True,
    ) -> Session:
        """Note that ``process`` was put into ``job``, in place of what was noted of it before.

        ``write_now`` False: all is done but the file, which :meth:`write_due` writes. The caller keeps its
        handle. Raises OSError if there is no descriptor left to hold the process with.
        """
        session = Session(
            id=session_id(process.pid, process.start_ticks),
            pid=process.pid,
            start_ticks=process.start_ticks,
            uid=uid,
            user=user,
            job=job,
            witness=witness,
            reason=reason,
            since_s=self._clock(),
            connection=connection,
            service=service,
            stages=stages,
            nodename=nodename,
        )
        self._keep(session, process.duplicate())
        if write_now:
            self._write(session)
        else:
            self._due[session.id] = session
        self._make_room()
        for heard in self._heard:
            heard(session)
        return session

    def write_due(self) -> None:
        """Write what :meth:`add` has left to be written, of sessions that live."""
        due, self._due = self._due, {}
        for session in due.values():
            entry = self._entries.get(session.pid)
            if entry is not None and entry[0] is session:
                self._write(session)

    def restore(self) -> int:
        """Take up the sessions that an agent before this one kept. Returns how many live.

        Of those that have ended daemons may live, and the newest are known. What is no file of ours, or of another
        boot, is removed, and said. Raises StoreError if the directory cannot be read.
        """
        if self._store is None:
            return 0
        refused = 0
        ended: List[Session] = []
        for name, data in self._store.files():
            try:
                if isinstance(data, str):
                    raise ProtocolError(data)
                session = decode_session(data, name, self._boot_id)
                if not self._take_up(session):
                    ended.append(session)
                continue
            except ProtocolError as error:
                fault = str(error)
            refused += 1
            if refused <= _REFUSALS_SAID:
                log.warning("session_refused", file=name, error=fault)
            self._remove(name)
        if refused > _REFUSALS_SAID:
            log.warning("sessions_refused", files=refused)
        self._entries = dict(sorted(self._entries.items(), key=lambda item: item[1][0].since_s))
        for session in sorted(ended, key=lambda each: each.since_s):
            self._note_ended(session)
        self._make_room()
        return len(self._entries)

    def on_change(self, heard: Callable[[Session], None]) -> None:
        """Call ``heard`` with each session that is added or put into another job, at once."""
        self._heard.append(heard)

    def use_list(self, listed: Callable[[int], Optional[Tuple[int, int]]]) -> None:
        """Believe ``listed`` of whose a process is: the pid and start of its session's first process, if any."""
        self._listed = listed

    def known(self, identity: str) -> Optional[Session]:
        """The session with this id, also if it has ended not long ago: a daemon of it may be alive."""
        return self.find(identity) or self._past.get(identity)

    def all(self) -> Tuple[Session, ...]:
        """Every session that lives, the oldest entry first."""
        self.drop_ended()
        return tuple(session for session, _ in self._entries.values())

    def watched(self) -> Tuple[Session, ...]:
        """Every session, and those that ended not long ago: a daemon of theirs may be alive."""
        return (*self.all(), *self._past.values())

    def has_ended(self, session: Session) -> bool:
        """Whether it is known as one that ended not long ago."""
        return session.id in self._past

    def find(self, id_or_pid: str) -> Optional[Session]:
        """The session with this id or of the process with this pid."""
        self.drop_ended()
        pid, dash, _ = id_or_pid.partition("-")
        if not pid.isascii() or not pid.isdigit() or len(pid) > 10:
            return None
        entry = self._entries.get(int(pid))
        return None if entry is None or (dash and entry[0].id != id_or_pid) else entry[0]

    def of_process(self, pid: int) -> Optional[Session]:
        """The session that a process came from: by the probe's list or, without one, by its parents as they are."""
        self.drop_ended()
        listed = self._listed(pid)
        if listed is not None:
            return self.find(session_id(*listed))
        at: Optional[int] = pid
        for _ in range(_GENERATIONS_MAX):
            if at is None or at <= 1:
                return None
            entry = self._entries.get(at)
            if entry is not None and entry[1].alive():
                return entry[0]
            at = parent_of(at, self._proc_root)
        return None

    def moved(self, session: Session, job: Job, reason: str = "", stages: Optional[Stages] = None) -> Session:
        """Note that the session was put into another job of its user's. Returns the new entry.

        ``reason`` and ``stages`` take the place of what was noted, where they are given. Raises KeyError if the
        session has ended.
        """
        self.drop_ended()
        known, handle = self._entries[session.pid]
        if known.id != session.id:
            raise KeyError(session.id)
        stages = known.stages if stages is None else stages
        fresh = replace(known, job=job, reason=reason or known.reason, stages=stages)
        self._entries[session.pid] = (fresh, handle)
        self._write(fresh)
        for heard in self._heard:
            heard(fresh)
        return fresh

    @contextlib.contextmanager
    def alone(self, session: Session, deadline: Deadline) -> Iterator[bool]:
        """Hold off everybody else who would move the session's processes. Blocks, in any thread but the event loop's.

        False: it is to be in another job than ``session.job`` by now, or the turn did not come in time; then it is not
        to be moved. Whoever wants it elsewhere says so first (:meth:`moved`) and moves in a turn of their own, so that
        what is moved in this one is moved on in that.
        """
        with self._turns_lock:
            turn = self._turns.setdefault(session.id, _Turn())
        if not turn.lock.acquire(timeout=max(0.0, deadline.remaining_s())):
            yield False
            return
        try:
            yield self._job_of(session) == session.job
        finally:
            turn.lock.release()

    def _job_of(self, session: Session) -> Optional[Job]:
        """The job it is to be in now; None if it is not known any more. In any thread."""
        entry = self._entries.get(session.pid)
        known = entry[0] if entry is not None and entry[0].id == session.id else self._past.get(session.id)
        return None if known is None else known.job

    def hold(self, session: Session) -> Optional[ProcessHandle]:
        """The session's process, for the caller to close; None if it has ended. Raises OSError without descriptors."""
        entry = self._entries.get(session.pid)
        if entry is None or entry[0].id != session.id or not entry[1].alive():
            return None
        return entry[1].duplicate()

    def fileno(self) -> int:
        """Readable when a session has ended, until :meth:`drop_ended`."""
        return self._ended.fileno()

    def drop_ended(self) -> None:
        """Forget the sessions whose process has ended."""
        while True:
            ended = {descriptor for descriptor, _ in self._ended.poll(0)}
            if not ended:
                return
            for pid, (session, handle) in list(self._entries.items()):
                if handle.fileno() in ended:
                    self._release(pid)
                    self._note_ended(session)

    def close(self) -> None:
        """Let go of every process. What is kept on disk stays."""
        self.write_due()
        for _, handle in self._entries.values():
            handle.close()
        self._entries.clear()
        self._ended.close()
        if self._store is not None:
            self._store.close()

    def _keep(self, session: Session, handle: ProcessHandle) -> None:
        known = self._entries.get(session.pid)
        if known is not None and known[0].id != session.id:
            self._forget(session.pid)
        elif known is not None:
            self._release(session.pid)
        self._ended.register(handle.fileno(), select.EPOLLIN)
        self._entries[session.pid] = (session, handle)

    def _take_up(self, session: Session) -> bool:
        """Keep the session if its process lives."""
        try:
            handle = open_process(session.pid, self._proc_root)
        except AdoptionFailed:
            return False
        if handle.start_ticks != session.start_ticks:
            handle.close()
            return False
        self._keep(session, handle)
        return True

    def _note_ended(self, session: Session) -> None:
        # Its file stays: the probe's list has its daemons, and the next agent is to know whose they are.
        self._past[session.id] = session
        while len(self._past) > _ENDED_MAX:
            self._remove(self._past.popitem(last=False)[0])

    def _remove(self, identity: str) -> None:
        if self._store is not None:
            with contextlib.suppress(StoreError):
                self._store.remove(identity)

    def _write(self, session: Session) -> None:
        if self._store is None:
            return
        try:
            self._store.write(session.id, encode_session(session, self._boot_id))
            self._unwritten = False
        except StoreError as error:
            # Once for a disk that is full or gone, not for each login.
            if not self._unwritten:
                log.error("session_not_written", error=str(error), effect="not known after a restart")
            self._unwritten = True

    def _forget(self, pid: int) -> None:
        entry = self._entries.get(pid)
        if entry is None:
            return
        self._release(pid)
        self._remove(entry[0].id)

    def _release(self, pid: int) -> None:
        _, handle = self._entries.pop(pid)
        with contextlib.suppress(OSError):
            self._ended.unregister(handle.fileno())
        handle.close()

    def _make_room(self) -> None:
        while len(self._entries) > self._capacity:
            self.drop_ended()
            if len(self._entries) <= self._capacity:
                return
            counts = Counter(session.uid for session, _ in self._entries.values())
            most = max(counts, key=lambda uid: counts[uid])
            oldest = next(session for session, _ in self._entries.values() if session.uid == most)
            log.warning("session_dropped", session=oldest.id, uid=most, sessions=len(self._entries))
            self._forget(oldest.pid)
