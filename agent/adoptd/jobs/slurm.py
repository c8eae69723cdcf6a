"""Slurm's jobs, as the extern steps of this node know them.

Owns the answers of the JobBackend protocol. It must never move a process itself (only the step does it
completely: accounting, signals, limits), take a cgroup path for a job without asking the job's step, nor
report an adoption it has not read back. Built by the service, called by callerid, adoption and sessions.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from adoptd import log
from adoptd.deadline import Deadline
from adoptd.hierarchy import CgroupMounts, Hierarchy, HierarchyKind, path_of_id
from adoptd.jobs import CgroupFinding, CgroupVerdict, JobSession, JobsHere
from adoptd.jobs.environment import processes_below
from adoptd.jobs.slurm_conf import SlurmConf
from adoptd.jobs.slurm_paths import NamedJob, SlurmPaths
from adoptd.jobs.slurm_spool import STEP_MS, Heard, Silent, Spool, Step, Steps
from adoptd.jobs.slurm_step import StepConnection, StepError, StepSilent
from adoptd.jobs.slurm_turns import Turns
from adoptd.jobs.slurm_wire import Namespace, Op, StepState, X11Display
from adoptd.model import AdoptionFailed, Ambiguous, Job, JobFault, JobManagerError
from adoptd.process import ProcessHandle

# What a job whose step hangs leaves of a login's time, for the job that it may have to go into instead.
_RESERVE_MS = 200.0
# Whoever called waits no longer than the deadline either, and is to hear what was wrong.
_REPORT_MS = 20.0

# What a step has said of itself is believed so long, for an adoption over the same connection. Beyond it, as after a
# wait for a turn, the job may have ended and come again.
_HEARD_FOR_S = 0.05

# As in the cgroup backend: one that is elsewhere at every look is not followed.
_LOOKS_MAX = 3

# One per slurmd on this host; the names come from root's PAM files.
_NODE_NAMES_MAX = 16


@dataclass(frozen=True)
class _Move:
    """A process that is to be put into a job, and what its session is to be given."""

    process: ProcessHandle
    job: Job
    x11: bool = False
    namespaces: bool = False


class SlurmJobs:
    """The JobBackend for Slurm."""

    name = "slurm"
    job_variable = "SLURM_JOB_ID"

    def __init__(
        self,
        conf: SlurmConf,
        mounts: Optional[CgroupMounts] = None,
        proc_root: str = "/proc",
        step_ms: float = STEP_MS,
        noted: Callable[[JobFault], None] = lambda _: None,
    ) -> None:
        """Nothing is read before it is asked for. ``step_ms`` is how long steps are waited for, all together.

        ``noted`` is told of each fault that no login fails of; from any thread.
        """
        self._conf = conf
        self._mounts = mounts if mounts is not None else CgroupMounts(proc_root)
        self._spool = Spool(conf, proc_root, step_ms, noted)
        self._noted = noted
        self._proc_root = proc_root
        self._step_ms = step_ms
        self._turns = Turns()
        self._others: Dict[str, SlurmJobs] = {}
        self._others_lock = threading.Lock()

    def jobs_of(self, uid: int, deadline: Deadline) -> Tuple[Job, ...]:
        """The user's jobs, newest first by their steps' age, then by id. Raises JobManagerError.

        Also raised if a step does not answer and never has: it may be the user's. A silent step that is known
        to be the user's counts as a job; one that is known to be another's costs nothing.
        """
        with self.here(uid, deadline) as here:
            return here.jobs

    @contextmanager
    def here(self, uid: int, deadline: Deadline) -> Iterator[JobsHere]:
        """jobs_of(), and an adoption into one of them over the connection that its step was just asked on."""
        _check_time(deadline)
        with self._spool.asked(deadline, uid=uid) as (heard, silent):
            _raise_for([each for each in silent if self._may_be_of(uid, each)])
            mine = [each for each in heard if each.step.uid == uid]
            by_identity = {each.step.job.identity: each for each in mine}

            def adopt(process: ProcessHandle, job: Job, x11: bool, namespaces: bool, deadline: Deadline) -> JobSession:
                # For one adoption: what follows one that has failed may be the answer to it.
                asked = by_identity.pop(job.identity, None)
                return self._adopt_for_session(_Move(process, job, x11, namespaces), deadline, asked)

            yield JobsHere(_newest_first([each.step for each in mine]), adopt)

    def all_jobs(self, deadline: Deadline) -> Tuple[Job, ...]:
        """Everybody's jobs, by uid and then newest first. Raises JobManagerError.

        For the admin's eyes: a step that cannot be told is left out (a warning names it), not all of them.
        """
        _check_time(deadline)
        found = self._spool.steps(deadline)
        by_uid: Dict[int, List[Step]] = {}
        for step in found.steps:
            by_uid.setdefault(step.uid, []).append(step)
        return tuple(job for uid in sorted(by_uid) for job in _newest_first(by_uid[uid]))

    def job_of_process(self, pid: int) -> Optional[Job]:
        """The job a process is in: named by at least one hierarchy, contradicted by none, known to its step.

        A job that is ending is still an answer. Raises Ambiguous if hierarchies name different jobs or the
        process keeps being moved; JobManagerError if the step that could tell is silent.
        """
        before = self._mounts.membership(pid)
        for _ in range(_LOOKS_MAX):
            if before is None:
                return None
            named = self._named(before)
            jobs = {job.identity: job for job in map(self._believed, named) if job is not None}
            after = self._mounts.membership(pid)
            if after == before:
                if len(jobs) > 1:
                    ids = ", ".join(sorted(job.id for job in jobs.values()))
                    raise Ambiguous(f"process {pid} is in jobs {ids} at once")
                return next(iter(jobs.values()), None)
            before = after
        raise Ambiguous(f"process {pid} is being moved from cgroup to cgroup")

    def job_of_cgroup(self, cgroup_id: int, pid: Optional[int] = None) -> CgroupVerdict:
        """What a cgroup-v2 id says about the job of whatever had it. Raises JobManagerError.

        NO_JOB only where Slurm keeps its jobs in v2 and nowhere else: with v1, every process of a job may well
        be in the v2 root.
        """
        unified = next((each for each in self._mounts.hierarchies() if each.kind is HierarchyKind.V2), None)
        if unified is None:
            return CgroupVerdict(CgroupFinding.CANNOT_TELL, "no cgroup v2 hierarchy is mounted")
        path = path_of_id(unified, cgroup_id)
        if path is None:
            finding = CgroupFinding.GONE if self._is_in_v2_alone() else CgroupFinding.CANNOT_TELL
            return CgroupVerdict(finding, f"cgroup {cgroup_id} has been removed")
        if path == "/":
            return CgroupVerdict(CgroupFinding.CANNOT_TELL, "the root cgroup is where nothing has been moved")
        named = self._conf.settings().paths.parse(HierarchyKind.V2, path)
        if named is not None:
            job = self._believed(named)
            # Still there: then it was this job's all the time the step was asked.
            if job is not None and path_of_id(unified, cgroup_id) == path:
                holds = None if pid is None else self.contains(job, pid)
                return CgroupVerdict(CgroupFinding.JOB, f"{path!r}", job, holds)
            return CgroupVerdict(CgroupFinding.CANNOT_TELL, f"{path!r} is of no job that has an extern step here")
        if not self._is_in_v2_alone():
            return CgroupVerdict(CgroupFinding.CANNOT_TELL, "Slurm does not keep its jobs in cgroup v2 on this host")
        return CgroupVerdict(CgroupFinding.NO_JOB, f"{path!r} is in no job")

    def job_cgroups(self, where: Mapping[int, str]) -> Mapping[int, str]:
        """Of a process at ``where``, its job's cgroup by hierarchy: that of all its steps."""
        paths = self._conf.settings().paths
        found = {}
        for each in self._mounts.hierarchies():
            path = where.get(each.number, "")
            if paths.parse(each.kind, path) is not None:
                steps = (path[: match.start()] for match in re.finditer(r"/|$", path))
                found[each.number] = next(step for step in steps if paths.parse(each.kind, step)).rpartition("/")[0]
        return found

    def adopt(self, process: ProcessHandle, job: Job, deadline: Deadline) -> None:
        """Have the job's extern step take the process in, and read back that it is there. Raises AdoptionFailed.

        One at a time per job. A process that is in the job already is left as it is, in whichever step. What a
        step has done by half cannot be undone by anybody else: the message then says where the process is.
        """
        with ExitStack() as held:
            self._adopt(_Move(process, job), deadline, None, held)

    def adopt_for_session(
        self, process: ProcessHandle, job: Job, x11: bool, namespaces: bool, deadline: Deadline
    ) -> JobSession:
        """adopt() and session() by one connection to the step: each takes a thread of its own there to serve it."""
        return self._adopt_for_session(_Move(process, job, x11, namespaces), deadline, None)

    def _adopt_for_session(self, wanted: _Move, deadline: Deadline, heard: Optional[Heard]) -> JobSession:
        with ExitStack() as held:
            connection = self._adopt(wanted, deadline, heard, held)
            return self._session(wanted.job, wanted.x11, wanted.namespaces, deadline, connection)

    def _adopt(self, wanted: _Move, deadline: Deadline, heard: Optional[Heard], held: ExitStack) -> StepConnection:
        """The connection, open as long as ``held`` is, with nothing outstanding but what is asked ahead.

        ``heard``: the step as it was asked a moment ago, if it was. The turn ends with the adoption.
        """
        job, deadline = wanted.job, _sparing(deadline, _REPORT_MS)
        # For a turn to the end: those before us in a storm are quick, and who meets a step that hangs gives up early.
        with self._turns.of(job, deadline):
            # Until the step has been asked to take the process in, giving up is safe: another job may have to be tried.
            patience = _sparing(deadline, _RESERVE_MS)
            self._turns.settle(job, patience)
            try:
                connection, step = _still_fresh(heard) or held.enter_context(self._spool.connected(job, patience))
                try:
                    self._adopt_through(connection, step, wanted, deadline)
                except StepSilent:
                    owed = connection.owed()
                    if owed is not None:
                        self._turns.owes(job, owed)
                    raise
                return connection
            except (StepError, JobManagerError) as error:
                raise AdoptionFailed(f"job {job.id} of uid {job.uid}: {error}", error.fault) from None

    def contains(self, job: Job, pid: int) -> bool:
        """Whether the process is in this very job, in every hierarchy that has it. Raises JobManagerError."""
        # Read first: if the job is found to be the same afterwards, it was the same when this was read.
        where = self._mounts.membership(pid)
        if where is None:
            return False
        step = self._spool.remembered(int(job.id))
        if step is None or not _is_of(step, job):
            found = self._spool.steps(Deadline.after_ms(self._step_ms), job_id=int(job.id))
            _raise_for(found.silent)
            step = next((step for step in found.steps if _is_of(step, job)), None)
        if step is None:
            return False
        mine = _names_of(job, step.sluid)
        paths = self._conf.settings().paths
        inside: List[Hierarchy] = []
        outside: List[Hierarchy] = []
        for each in self._mounts.hierarchies():
            (inside if paths.parse(each.kind, where.get(each.number, "")) in mine else outside).append(each)
        # Most of the time one look settles each: whether a hierarchy has the job's extern step at all.
        return any(_is_home(paths, each, job, step.sluid) for each in inside) and not any(
            _is_home(paths, each, job, step.sluid) for each in outside
        )

    def session(self, job: Job, x11: bool, namespaces: bool, deadline: Deadline) -> JobSession:
        """SLURM_JOB_ID, as pam_slurm_adopt sets it, DISPLAY and XAUTHORITY, and the job's namespaces.

        A display that cannot be had is left out with a warning: the session is as right without it. Raises
        JobManagerError if the namespaces cannot be had: outside them the session is not in its job.
        """
        return self._session(job, x11, namespaces, deadline)

    def _session(
        self, job: Job, x11: bool, namespaces: bool, deadline: Deadline, connection: Optional[StepConnection] = None
    ) -> JobSession:
        """``connection`` to the job's step, where there is one already."""
        environment = {"SLURM_JOB_ID": job.id}
        if x11:
            try:
                display = self.x11(job, deadline) if connection is None else connection.x11(deadline)
            except (StepError, JobManagerError) as error:
                # What the step says next may be the answer to this.
                connection = None
                log.warning("session_without_display", job=job.id, error=str(error))
                display = None
            if display is not None:
                environment["DISPLAY"] = f"localhost:{display.number}.0"
                if display.authority is not None:
                    environment["XAUTHORITY"] = display.authority
        entered = self.namespaces(job, deadline, connection) if namespaces else ()
        return JobSession(environment, [namespace.descriptor for namespace in entered])

    def processes(self, job: Job, deadline: Deadline) -> Tuple[int, ...]:
        """Pids in the job's steps other than the extern step, which is where sessions are. Raises JobManagerError."""
        found = self._spool.steps(deadline.earlier(self._step_ms), job_id=int(job.id))
        _raise_for(found.silent)
        step = next((step for step in found.steps if _is_of(step, job)), None)
        paths = self._conf.settings().paths
        for home in self._homes(job, step.sluid) if step is not None else ():
            pids: List[int] = []
            for extern in paths.extern_steps(home.kind, job.uid, int(job.id), step.sluid if step else None):
                directory, _, own = (home.mount_point + extern).rpartition("/")
                steps = (name for name in _entries(directory) if name.startswith("step_") and name != own)
                pids += (pid for name in steps for pid in processes_below(f"{directory}/{name}", deadline))
            if pids:
                return tuple(pids)
        return ()

    def for_node(self, node_name: str) -> SlurmJobs:
        """The jobs of the slurmd with this NodeName (PAM's nodename= option); "" is the one that was found."""
        if not node_name:
            return self
        with self._others_lock:
            known = self._others.get(node_name)
            if known is None:
                if len(self._others) >= _NODE_NAMES_MAX:
                    raise JobManagerError(f"nodename {node_name!r} is one of more than {_NODE_NAMES_MAX} on this host")
                known = SlurmJobs(
                    self._conf.for_node(node_name), self._mounts, self._proc_root, self._step_ms, self._noted
                )
                self._others[node_name] = known
            return known

    def x11(self, job: Job, deadline: Deadline) -> Optional[X11Display]:
        """The job's X11 tunnel, None if it has none. Raises JobManagerError."""
        try:
            with self._spool.connected(job, deadline) as (connection, _):
                return connection.x11(deadline)
        except StepError as error:
            raise JobManagerError(f"job {job.id}: {error}", error.fault) from None

    def namespaces(
        self, job: Job, deadline: Deadline, connection: Optional[StepConnection] = None
    ) -> Tuple[Namespace, ...]:
        """The namespaces a session in this job has to enter; the caller closes the descriptors.

        () if the job has none of its own. Raises JobManagerError.
        """
        try:
            if connection is not None:
                return connection.namespaces(deadline)
            with self._spool.connected(job, deadline) as (another, _):
                return another.namespaces(deadline)
        except StepError as error:
            raise JobManagerError(f"job {job.id}: {error}", error.fault) from None

    def _adopt_through(self, connection: StepConnection, step: Step, wanted: _Move, deadline: Deadline) -> None:
        """Raises AdoptionFailed, StepError, JobManagerError."""
        process, job = wanted.process, wanted.job
        if step.state is StepState.ENDING:
            raise AdoptionFailed(f"job {job.id} is ending", JobFault.JOB_ENDED)
        before = self._where(process)
        looked_for = self._homes(job, step.sluid)
        homes = list(itertools.islice(looked_for, 1))
        if not homes:
            # Then the step would say yes and move nothing: proctrack/linuxproc, proctrack/pgid.
            text = f"job {job.id} has no cgroup here: ProctrackType=proctrack/cgroup is needed"
            raise AdoptionFailed(text, JobFault.NO_CGROUP)
        if not self._missing(job, step.sluid, homes, before):
            homes += looked_for
            if not self._missing(job, step.sluid, homes, before):
                return
        if deadline.expired:
            # A move must not happen after its login was told that it failed.
            raise AdoptionFailed(
                f"process {process.pid} could not be put into job {job.id} in time", JobFault.OUT_OF_TIME
            )
        ahead = [Op.X11_DISPLAY] if wanted.x11 else []
        ahead += [connection.op_of_namespaces] if wanted.namespaces else []
        try:
            connection.ask_to_add(process.pid, ahead)
            # While the step is at it.
            homes += looked_for
            code, held = connection.added(deadline)
            if code != 0:
                text = f"the step of job {job.id} refuses process {process.pid}: error {code}"
                raise AdoptionFailed(text, JobFault.STEP_REFUSES)
            missing = self._missing(job, step.sluid, homes, self._where(process))
            if missing:
                text = f"the step of job {job.id} has not moved process {process.pid}: {missing}"
                raise AdoptionFailed(text, JobFault.NOT_MOVED)
            if not held:
                text = f"the step of job {job.id} does not know process {process.pid}"
                raise AdoptionFailed(text, JobFault.NOT_MOVED)
        except (AdoptionFailed, JobManagerError) as error:
            raise type(error)(f"{error}{self._stuck_in(process, before)}", error.fault) from None
        except StepError as error:
            raise type(error)(f"{error}{self._stuck_in(process, before)}") from None

    def _where(self, process: ProcessHandle) -> Mapping[int, str]:
        where = self._mounts.membership(process.pid)
        # Asked after reading: while the pidfd says alive, the pid was this process's all along.
        if where is None or not process.alive():
            raise AdoptionFailed(f"process {process.pid} has exited", JobFault.PROCESS_GONE)
        return where

    def _stuck_in(self, process: ProcessHandle, before: Mapping[int, str]) -> str:
        """For a message: the jobs' cgroups that the process is in now and was not before."""
        try:
            now = self._mounts.membership(process.pid) if process.alive() else None
        except JobManagerError:
            now = None
        settings = self._conf.settings()
        stuck = [
            f"{now[each.number]} ({each.label})"
            for each in self._mounts.hierarchies()
            if now is not None
            and now.get(each.number) != before.get(each.number)
            and settings.paths.parse(each.kind, now.get(each.number, "")) is not None
        ]
        return f"; process {process.pid} is stuck in {', '.join(stuck)}" if stuck else ""

    def _homes(self, job: Job, sluid: Optional[int]) -> Iterator[Hierarchy]:
        """The hierarchies in which the job's extern step has a cgroup, looked for one by one. Raises JobManagerError
        before the first."""
        paths = self._conf.settings().paths
        return (each for each in self._mounts.hierarchies() if _is_home(paths, each, job, sluid))

    def _missing(self, job: Job, sluid: Optional[int], homes: Sequence[Hierarchy], where: Mapping[int, str]) -> str:
        """In words, the hierarchies among ``homes`` in which a process at ``where`` is not in the job; or ""."""
        paths = self._conf.settings().paths
        mine = _names_of(job, sluid)
        labels = [each.label for each in homes if paths.parse(each.kind, where.get(each.number, "")) not in mine]
        return f"not in its cgroup of {', '.join(labels)}" if labels else ""

    def _may_be_of(self, uid: int, silent: Silent) -> bool:
        """Whether a step that has never said whose it is may be this user's: cgroup v1 names the owner too."""
        paths = self._conf.settings().paths
        owners: Set[str] = set()
        for each in self._mounts.hierarchies():
            for top in paths.tops(HierarchyKind.V1) if each.kind is HierarchyKind.V1 else ():
                directory = each.mount_point + top
                owners.update(
                    name for name in _entries(directory) if os.path.isdir(f"{directory}/{name}/job_{silent.job_id}")
                )
        return not owners or f"uid_{uid}" in owners

    def _is_in_v2_alone(self) -> bool:
        homes = [each.kind for each in self._mounts.hierarchies() if self._holds_jobs(each)]
        return HierarchyKind.V2 in homes and HierarchyKind.V1 not in homes

    def _holds_jobs(self, hierarchy: Hierarchy) -> bool:
        tops = self._conf.settings().paths.tops(hierarchy.kind)
        return any(os.path.isdir(hierarchy.mount_point + top) for top in tops)

    def _named(self, where: Mapping[int, str]) -> Set[NamedJob]:
        paths = self._conf.settings().paths
        found = (paths.parse(each.kind, where.get(each.number, "")) for each in self._mounts.hierarchies())
        return {named for named in found if named is not None}

    def _believed(self, named: NamedJob) -> Optional[Job]:
        """The job of a path, if its extern step is here and says the same. Raises JobManagerError."""
        known = None if named.job_id is None else self._spool.remembered(named.job_id)
        if known is not None:
            found = Steps((known,), ())
        else:
            found = self._spool.steps(Deadline.after_ms(self._step_ms), job_id=named.job_id)
        for step in found.steps:
            if named.job_id is None and (step.sluid is None or step.sluid != named.sluid):
                continue
            if named.uid is not None and named.uid != step.uid:
                words = f"its cgroup is uid {named.uid}'s, its step says uid {step.uid}"
                log.warning("job_refused", job=step.file.job_id, error=words)
                continue
            return step.job
        _raise_for(found.silent)
        return None


def _check_time(deadline: Deadline) -> None:
    if deadline.expired:
        raise JobManagerError("Slurm's steps could not be asked in time", JobFault.OUT_OF_TIME)


def _raise_for(silent: Sequence[Silent]) -> None:
    if silent:
        raise JobManagerError("; ".join(each.words for each in silent), silent[0].fault)


def _sparing(deadline: Deadline, reserve_ms: float) -> Deadline:
    """An earlier deadline: ``reserve_ms`` before it, or half of the time that is left if that is more."""
    remaining_ms = deadline.remaining_s() * 1000.0
    return deadline.earlier(max(remaining_ms - reserve_ms, remaining_ms / 2.0))


def _still_fresh(heard: Optional[Heard]) -> Optional[Tuple[StepConnection, Step]]:
    if heard is None or heard.connection is None or time.monotonic() - heard.at_s > _HEARD_FOR_S:
        return None
    return heard.connection, heard.step


def _entries(directory: str) -> List[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _is_of(step: Step, job: Job) -> bool:
    return (step.job.identity, step.uid) == (job.identity, job.uid)


def _names_of(job: Job, sluid: Optional[int]) -> Tuple[NamedJob, ...]:
    """What a path may call the job."""
    number = int(job.id)
    return NamedJob(number, None, job.uid), NamedJob(number, None, None), NamedJob(None, sluid, None)


def _is_home(paths: SlurmPaths, hierarchy: Hierarchy, job: Job, sluid: Optional[int]) -> bool:
    """Whether the job's extern step has a cgroup in the hierarchy."""
    steps = paths.extern_steps(hierarchy.kind, job.uid, int(job.id), sluid)
    # Twenty looks in each adoption, most of them in vain, and it is the exception that makes stat() slow. Nothing else
    # than a cgroup has such a name there.
    return any(os.access(hierarchy.mount_point + step, os.F_OK) for step in steps)


def _newest_first(steps: List[Step]) -> Tuple[Job, ...]:
    """The jobs of steps that are not ending."""
    running = [step for step in steps if step.state is not StepState.ENDING]
    running.sort(key=lambda step: (step.file.ctime_ns, step.file.job_id), reverse=True)
    return tuple(step.job for step in running)
