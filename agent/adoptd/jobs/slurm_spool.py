"""The extern steps of this node, and what each says of itself.

Owns the asking of all of them at once, and the memory of what a step once said. It must never ask a step that is known
to be another user's, nor take silence for "no job". Called by the slurm backend.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Callable, Dict, Iterator, List, Optional, Set, Tuple, Union

from adoptd import log
from adoptd.deadline import Deadline
from adoptd.jobs import slurm_wire as wire
from adoptd.jobs.slurm_conf import SlurmConf, SlurmSettings
from adoptd.jobs.slurm_sockets import Complaints, SpoolDirectory, StepFile, StepSockets
from adoptd.jobs.slurm_step import (
    StepClosed,
    StepConnection,
    StepError,
    StepForeign,
    StepGone,
    StepLeftBehind,
    StepSilent,
    connect,
)
from adoptd.jobs.slurm_wire import Op, StepState
from adoptd.model import Job, JobFault
from adoptd.process import started_ns

# An idle step answers within 0.1 ms, one on a node with more to do than CPUs within tens. Steps are waited for
# together, so this is also the most that any number of hanging ones can take of a login's budget of 1 s.
STEP_MS = 400.0
# One that was silent a moment ago, and whose owner is known, has only its state to add: it is not waited for that long
# at every login while it hangs. As soon as it answers again it is heard again.
HASTY_MS = 20.0
_HASTY_FOR_S = 10.0
_STALE_NAMED = 5
_HELLO = wire.hello() + wire.request(Op.STATE) + wire.request(Op.UID)


@dataclass(frozen=True)
class Step:
    """An extern step that answered, now or (``state`` None) at another time and is silent now."""

    file: StepFile
    daemon_pid: int
    daemon_started_ns: int
    uid: int
    sluid: Optional[int]
    state: Optional[StepState]
    cluster: str = ""

    @property
    def job(self) -> Job:
        """The step's job. A requeued job of the same id has another step daemon and another socket.

        The daemon's pid and start are unique in a boot. The socket's ctime orders jobs but is no part of the
        identity: whoever changes the file's mode or owner changes it, and the job is the same.
        """
        identity = (self.file.job_id, self.daemon_pid, self.daemon_started_ns, self.file.inode)
        return Job(str(self.file.job_id), self.uid, self.file.ctime_ns, identity, self.cluster)


@dataclass(frozen=True)
class Heard:
    """A step, and the connection on which it answered at ``at_s`` (monotonic clock), with nothing outstanding.

    ``connection`` is None if it is silent now, and ``step`` what it said before.
    """

    step: Step
    connection: Optional[StepConnection]
    at_s: float


@dataclass(frozen=True)
class Silent:
    """A step that is there and has never said whose it is; ``words`` say what it did instead."""

    job_id: int
    words: str
    fault: JobFault


@dataclass(frozen=True)
class Steps:
    """What was found: the steps, and those that cannot be told."""

    steps: Tuple[Step, ...]
    silent: Tuple[Silent, ...]


class Spool:
    """The steps of one node. Safe to share between threads."""

    def __init__(
        self,
        conf: SlurmConf,
        proc_root: str = "/proc",
        step_ms: float = STEP_MS,
        noted: Callable[[JobFault], None] = lambda _: None,
    ) -> None:
        """Nothing is read before it is asked for. ``step_ms`` is how long steps are waited for, all together.

        ``noted`` is told of each fault that no login fails of.
        """
        self._proc_root = proc_root
        self._step_ms = step_ms
        self._lock = threading.Lock()
        self._known: Dict[StepFile, Step] = {}
        self._noted = noted
        self._hasty_until_s: Dict[StepFile, float] = {}
        self._stale: Set[StepFile] = set()
        self._complaints = Complaints()
        self._sockets = StepSockets(conf, self._complaints, noted)

    def steps(self, deadline: Deadline, uid: Optional[int] = None, job_id: Optional[int] = None) -> Steps:
        """The extern steps here, of one user or one job if given, ending ones included; one per job.

        All are asked at once and waited for together. Raises JobManagerError if the directory cannot be read
        or believed.
        """
        with self.asked(deadline, uid, job_id) as (heard, silent):
            return Steps(tuple(each.step for each in heard), silent)

    @contextmanager
    def asked(
        self, deadline: Deadline, uid: Optional[int] = None, job_id: Optional[int] = None
    ) -> Iterator[Tuple[Tuple[Heard, ...], Tuple[Silent, ...]]]:
        """As :meth:`steps`, with the connections, which are open as long as this is."""
        found: Dict[int, Heard] = {}
        silent: List[Silent] = []
        stale: List[StepFile] = []
        with ExitStack() as connections:
            with self._sockets.opened() as spool:
                files = [file for file in self._files(spool) if job_id in (None, file.job_id)]
                with self._lock:
                    memory = {file: self._known[file] for file in files if file in self._known}
                wanted = [file for file in files if uid is None or file not in memory or memory[file].uid == uid]
                # Connecting and writing never wait, so every step works on its answer while the first is read.
                asked = [(file, self._begin(spool, file, connections)) for file in wanted]
                together, hasty = deadline.earlier(self._step_ms), deadline.earlier(HASTY_MS)
                for file, connection in asked:
                    wait = hasty if file in memory and self._was_silent(file) else together
                    answer = self._finish(spool, file, connection, memory.get(file), wait, connections)
                    if isinstance(answer, Heard):
                        if file.job_id not in found or found[file.job_id].step.file.ctime_ns < file.ctime_ns:
                            found[file.job_id] = answer
                    elif isinstance(answer, StepLeftBehind):
                        stale.append(file)
                    elif not isinstance(answer, StepGone):
                        silent.append(Silent(file.job_id, str(answer), answer.fault))
                self._report_stale(spool, stale)
            yield tuple(found.values()), tuple(silent)

    def remembered(self, job_id: int) -> Optional[Step]:
        """The job's extern step as it once said itself, without asking it again; None if it has to be asked.

        Whose a step is never changes: the same socket and the same living daemon are the same step. A step that
        competes with its own job's processes for a core may need longer to answer than a login may take. Only for
        the question which job something is in; ``state`` is None. Raises JobManagerError as steps() does.
        """
        with self._lock:
            known = [step for file, step in self._known.items() if file.job_id == job_id]
        # Two sockets of one job: one is left over, and only asking tells which.
        step = known[0] if len(known) == 1 else None
        if step is None:
            return None
        with self._sockets.opened() as spool:
            of_this_node = step.file.name.startswith(f"{spool.settings.node_name}_{job_id}.")
            if not of_this_node or not spool.has(step.file) or not self._is_alive(step):
                return None
        return replace(step, state=None, cluster=spool.settings.cluster_name)

    @contextmanager
    def connected(self, job: Job, deadline: Deadline) -> Iterator[Tuple[StepConnection, Step]]:
        """A connection to the extern step of this very job, and what the step says.

        Raises StepGone if the job has ended or is another one by now, StepError, JobManagerError.
        """
        with self._sockets.opened() as spool, ExitStack() as connections:
            for file in self._files(spool):
                if str(file.job_id) != job.id or file.inode != job.identity[-1]:
                    continue
                connection = self._begin(spool, file, connections)
                if isinstance(connection, StepError):
                    raise connection
                step = self._read(file, connection, None, spool.settings, deadline)
                if (step.job.identity, step.uid) != (job.identity, job.uid):
                    continue
                yield connection, step
                return
        raise StepGone(f"job {job.id} has ended")

    def _files(self, spool: SpoolDirectory) -> List[StepFile]:
        """The sockets that are there; what is remembered of others is forgotten. Raises JobManagerError."""
        files = self._sockets.files(spool)
        with self._lock:
            here = set(files)
            self._known = {file: step for file, step in self._known.items() if file in here}
            self._hasty_until_s = {file: until for file, until in self._hasty_until_s.items() if file in here}
            self._stale &= here
        return files

    def _begin(self, spool: SpoolDirectory, file: StepFile, connections: ExitStack) -> Union[StepConnection, StepError]:
        try:
            step = connect(spool.descriptor, file.name, f"step {file.name}", spool.settings.trusted_uids)
            connection = connections.enter_context(step)
            connection.send(_HELLO)
            return connection
        except StepError as error:
            return error

    def _finish(
        self,
        spool: SpoolDirectory,
        file: StepFile,
        begun: Union[StepConnection, StepError],
        known: Optional[Step],
        deadline: Deadline,
        connections: ExitStack,
    ) -> Union[Heard, StepError]:
        """What the step says; the error if it cannot be told and nothing is known of it."""
        for attempt in range(2):
            try:
                if isinstance(begun, StepError):
                    raise begun
                step = self._read(file, begun, known, spool.settings, deadline)
                with self._lock:
                    self._known[file] = step
                    self._hasty_until_s.pop(file, None)
                self._complaints.withdraw(file.name)
                return Heard(step, begun, time.monotonic())
            except StepForeign as error:
                self._complaints.say(file.name, error.fault, f"{error}, ignored")
                self._noted(error.fault)
                return error
            except StepGone as error:
                return error
            except StepClosed as error:
                failure: StepError = error
                # One that ends closes what is open, and is gone when looked for again.
                if attempt == 0:
                    begun = self._begin(spool, file, connections)
            except StepError as error:
                failure = error
                break
        if known is not None and not self._is_alive(known):
            known = None
        told = "is still counted" if known else "cannot be told"
        self._complaints.say(file.name, failure.fault, f"{failure}; its job {told}")
        if known is not None:
            self._noted(failure.fault)
        if isinstance(failure, StepSilent):
            with self._lock:
                self._hasty_until_s.setdefault(file, time.monotonic() + _HASTY_FOR_S)
        # Its owner is known for good, and that it runs: somebody holds the socket. Only its state is open, and
        # an adoption will find that out; leaving it out could put the user's session into another job.
        return failure if known is None else Heard(replace(known, state=None), None, time.monotonic())

    def _read(
        self,
        file: StepFile,
        connection: StepConnection,
        known: Optional[Step],
        settings: SlurmSettings,
        deadline: Deadline,
    ) -> Step:
        """The answer to what _begin() asked. Raises StepError."""
        if connection.daemon_pid == 0:
            raise StepError(f"step {file.name}: its daemon is outside our pid namespace, so pids differ")
        started = started_ns(connection.daemon_pid, self._proc_root)
        if started is None:
            raise StepGone(f"step {file.name}: its daemon, process {connection.daemon_pid}, has ended")
        version = connection.greeted(deadline)
        state = connection.receive(wire.read_state(), deadline)
        uid = connection.receive(wire.read_uid(), deadline)
        same = known is not None and (known.daemon_pid, known.daemon_started_ns) == (connection.daemon_pid, started)
        sluid = known.sluid if same and known is not None else None
        if sluid is None and version >= wire.VERSION_25_11:
            connection.send(wire.request(Op.SLUID))
            sluid = connection.receive(wire.read_sluid(), deadline) or None
        return Step(file, connection.daemon_pid, started, uid, sluid, state, settings.cluster_name)

    def _is_alive(self, step: Step) -> bool:
        return started_ns(step.daemon_pid, self._proc_root) == step.daemon_started_ns

    def _was_silent(self, file: StepFile) -> bool:
        now = time.monotonic()
        with self._lock:
            until = self._hasty_until_s.get(file)
            if until is not None and until <= now:
                # Waited for in full once more, and from then on not again for a while.
                del self._hasty_until_s[file]
            return until is not None and until > now

    def _report_stale(self, spool: SpoolDirectory, files: List[StepFile]) -> None:
        """One line for all that are new: a node may have hundreds after a bad day, and none is ours to remove."""
        with self._lock:
            fresh = [file for file in files if file not in self._stale]
        # Looked at again: a step that ends hangs up first and removes its socket then.
        fresh = [file for file in fresh if spool.has(file)]
        if not fresh:
            return
        with self._lock:
            self._stale.update(fresh)
        names = ", ".join(sorted(file.name for file in fresh)[:_STALE_NAMED])
        more = f" and {len(fresh) - _STALE_NAMED} more" if len(fresh) > _STALE_NAMED else ""
        text = f"{spool.settings.spool_dir}: nobody listens on {len(fresh)} step sockets ({names}{more}): no jobs"
        log.warning("job_fault", fault=JobFault.STALE_SOCKET.value, detail=text)
        for _ in fresh:
            self._noted(JobFault.STALE_SOCKET)
