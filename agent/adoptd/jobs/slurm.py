"""Slurm's jobs, as the extern steps of this node know them.

Owns the answers of the JobBackend protocol. It must never take a cgroup path for a job without asking the job's
step. Built by the service, called by callerid, adoption and sessions.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from adoptd import log
from adoptd.deadline import Deadline
from adoptd.hierarchy import CgroupMounts, HierarchyKind, path_of_id
from adoptd.jobs import CgroupFinding, CgroupVerdict, JobSession, JobsHere
from adoptd.jobs.environment import processes_below
from adoptd.jobs.looks import job_by_paths
from adoptd.jobs.slurm_adopt import Move, StepAdoptions
from adoptd.jobs.slurm_conf import SlurmConf
from adoptd.jobs.slurm_homes import Homes
from adoptd.jobs.slurm_paths import NamedJob
from adoptd.jobs.slurm_spool import STEP_MS, Heard, Silent, Spool, Step, Steps
from adoptd.jobs.slurm_step import StepConnection, StepError
from adoptd.jobs.slurm_wire import Namespace, StepState, X11Display
from adoptd.model import Job, JobFault, JobManagerError
from adoptd.process import ProcessHandle

# One per slurmd on this host; the names come from root's PAM files.
_NODE_NAMES_MAX = 16


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
        self._homes = Homes(conf, self._mounts)
        self._adoptions = StepAdoptions(self._spool, self._homes, self._mounts)
        self._others: Dict[str, SlurmJobs] = {}
        self._others_lock = threading.Lock()

    def jobs_of(self, uid: int, deadline: Deadline) -> Tuple[Job, ...]:
        """The user's jobs, newest first by their steps' age, then by id. Raises JobManagerError.

        Also raised if a step does not answer and never has: it may be the user's. A silent step that is known
        to be the user's counts as a job; one that is known to be another's costs nothing.
        """
        with self._asked_of(uid, deadline) as mine:
            return _newest_first([each.step for each in mine])

    @contextmanager
    def here(self, uid: int, deadline: Deadline) -> Iterator[JobsHere]:
        """jobs_of(), and an adoption into one of them over the connection that its step was just asked on."""
        with self._asked_of(uid, deadline) as mine:
            by_identity = {each.step.job.identity: each for each in mine}
            jobs = _newest_first([each.step for each in mine])
            frozen = {job for job in jobs if self._homes.is_frozen(job, by_identity[job.identity].step.sluid)}

            def adopt(process: ProcessHandle, job: Job, x11: bool, namespaces: bool, deadline: Deadline) -> JobSession:
                # For one adoption: what follows one that has failed may be the answer to it.
                asked = by_identity.pop(job.identity, None)
                return self._adopt_for_session(Move(process, job, x11, namespaces, login=True), deadline, asked)

            running = tuple(job for job in jobs if job not in frozen)
            yield JobsHere(running, adopt, tuple(job for job in jobs if job in frozen))

    @contextmanager
    def _asked_of(self, uid: int, deadline: Deadline) -> Iterator[List[Heard]]:
        """The user's steps, ending ones among them, as they were heard now or before. Raises JobManagerError."""
        _check_time(deadline)
        with self._spool.asked(deadline, uid=uid) as (heard, silent):
            _raise_for([each for each in silent if self._homes.may_be_of(uid, each.job_id)])
            yield [each for each in heard if each.step.uid == uid]

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

        def jobs_at(where: Mapping[int, str]) -> Iterator[Job]:
            return (job for job in map(self._believed, self._homes.named(where)) if job is not None)

        return job_by_paths(pid, self._mounts, jobs_at)

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
            finding = CgroupFinding.GONE if self._homes.are_in_v2_alone() else CgroupFinding.CANNOT_TELL
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
        if not self._homes.are_in_v2_alone():
            return CgroupVerdict(CgroupFinding.CANNOT_TELL, "Slurm does not keep its jobs in cgroup v2 on this host")
        return CgroupVerdict(CgroupFinding.NO_JOB, f"{path!r} is in no job")

    def job_cgroups(self, where: Mapping[int, str]) -> Mapping[int, str]:
        """Of a process at ``where``, its job's cgroup by hierarchy: that of all its steps."""
        return self._homes.job_cgroups(where)

    def adopt(self, process: ProcessHandle, job: Job, deadline: Deadline) -> None:
        """Have the job's extern step take the process in, and read back that it is there. Raises AdoptionFailed.

        One at a time per job. A process that is in the job already is left as it is, in whichever step. What a
        step has done by half cannot be undone by anybody else: the message then says where the process is.
        """
        with ExitStack() as held:
            self._adoptions.adopt(Move(process, job), deadline, None, held)

    def adopt_for_session(
        self, process: ProcessHandle, job: Job, x11: bool, namespaces: bool, deadline: Deadline
    ) -> JobSession:
        """adopt() and session() by one connection to the step: each takes a thread of its own there to serve it."""
        return self._adopt_for_session(Move(process, job, x11, namespaces, login=True), deadline, None)

    def _adopt_for_session(self, wanted: Move, deadline: Deadline, heard: Optional[Heard]) -> JobSession:
        with ExitStack() as held:
            connection = self._adoptions.adopt(wanted, deadline, heard, held)
            return self._session(wanted.job, wanted.x11, wanted.namespaces, deadline, connection)

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
        return self._homes.hold(job, step.sluid, where)

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
        for steps in self._homes.other_steps(job, step.sluid) if step is not None else ():
            pids = tuple(pid for directory in steps for pid in processes_below(directory, deadline))
            if pids:
                return pids
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


def _is_of(step: Step, job: Job) -> bool:
    return (step.job.identity, step.uid) == (job.identity, job.uid)


def _newest_first(steps: List[Step]) -> Tuple[Job, ...]:
    """The jobs of steps that are not ending."""
    running = [step for step in steps if step.state is not StepState.ENDING]
    running.sort(key=lambda step: (step.file.ctime_ns, step.file.job_id), reverse=True)
    return tuple(step.job for step in running)
