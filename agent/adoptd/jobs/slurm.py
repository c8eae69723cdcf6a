"""Slurm's jobs, as the extern steps of this node know them.

Owns the answers of the JobBackend protocol. It must never move a process itself (only the step does it
completely: accounting, signals, limits), take a cgroup path for a job without asking the job's step, nor
report an adoption it has not read back. Built by the service, called by callerid, adoption and sessions.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Dict, List, Mapping, Optional, Sequence, Set, Tuple

from adoptd.deadline import Deadline
from adoptd.hierarchy import CgroupMounts, Hierarchy, HierarchyKind, path_of_id
from adoptd.jobs import CgroupFinding, CgroupVerdict, JobSession
from adoptd.jobs.environment import processes_below
from adoptd.jobs.slurm_conf import SlurmConf
from adoptd.jobs.slurm_paths import NamedJob
from adoptd.jobs.slurm_spool import STEP_MS, Silent, Spool, Step, Steps
from adoptd.jobs.slurm_step import StepConnection, StepError, StepSilent
from adoptd.jobs.slurm_turns import Turns
from adoptd.jobs.slurm_wire import Namespace, StepState, X11Display
from adoptd.model import AdoptionFailed, Ambiguous, Job, JobManagerError
from adoptd.process import ProcessHandle

# As in the cgroup backend: one that is elsewhere at every look is not followed.
_LOOKS_MAX = 3

# One per slurmd on this host; the names come from root's PAM files.
_NODE_NAMES_MAX = 16

_log = logging.getLogger(__name__)


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
    ) -> None:
        """Nothing is read before it is asked for. ``step_ms`` is how long steps are waited for, all together."""
        self._conf = conf
        self._mounts = mounts if mounts is not None else CgroupMounts(proc_root)
        self._spool = Spool(conf, proc_root, step_ms)
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
        _check_time(deadline)
        found = self._spool.steps(deadline, uid=uid)
        _raise_for([each for each in found.silent if self._may_be_of(uid, each)])
        return _newest_first([step for step in found.steps if step.uid == uid])

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

    def job_of_cgroup(self, cgroup_id: int) -> CgroupVerdict:
        """What a cgroup-v2 id says about the job of whatever had it. Raises JobManagerError.

        NO_JOB only where Slurm keeps its jobs in v2 and nowhere else: with v1, every process of a job may well
        be in the v2 root.
        """
        unified = next((each for each in self._mounts.hierarchies() if each.kind is HierarchyKind.V2), None)
        if unified is None:
            return CgroupVerdict(CgroupFinding.CANNOT_TELL, "no cgroup v2 hierarchy is mounted")
        path = path_of_id(unified, cgroup_id)
        if path is None:
            return CgroupVerdict(CgroupFinding.CANNOT_TELL, f"cgroup {cgroup_id} has been removed")
        if path == "/":
            return CgroupVerdict(CgroupFinding.CANNOT_TELL, "the root cgroup is where nothing has been moved")
        named = self._conf.settings().paths.parse(HierarchyKind.V2, path)
        if named is not None:
            job = self._believed(named)
            # Still there: then it was this job's all the time the step was asked.
            if job is not None and path_of_id(unified, cgroup_id) == path:
                return CgroupVerdict(CgroupFinding.JOB, f"{path!r}", job)
            return CgroupVerdict(CgroupFinding.CANNOT_TELL, f"{path!r} is of no job that has an extern step here")
        homes = [each.kind for each in self._mounts.hierarchies() if self._holds_jobs(each)]
        if HierarchyKind.V1 in homes or HierarchyKind.V2 not in homes:
            return CgroupVerdict(CgroupFinding.CANNOT_TELL, "Slurm does not keep its jobs in cgroup v2 on this host")
        return CgroupVerdict(CgroupFinding.NO_JOB, f"{path!r} is in no job")

    def adopt(self, process: ProcessHandle, job: Job, deadline: Deadline) -> None:
        """Have the job's extern step take the process in, and read back that it is there. Raises AdoptionFailed.

        One at a time per job. A process that is in the job already is left as it is, in whichever step. What a
        step has done by half cannot be undone by anybody else: the message then says where the process is.
        """
        with self._turns.of(job, deadline):
            try:
                with self._spool.connected(job, deadline) as (connection, step):
                    self._adopt_through(connection, step, process, job, deadline)
            except StepSilent as error:
                self._turns.spare(job)
                raise AdoptionFailed(f"job {job.id} of uid {job.uid}: {error}") from None
            except (StepError, JobManagerError) as error:
                raise AdoptionFailed(f"job {job.id} of uid {job.uid}: {error}") from None

    def contains(self, job: Job, pid: int) -> bool:
        """Whether the process is in this very job, in every hierarchy that has it. Raises JobManagerError."""
        # Read first: if the job is found to be the same afterwards, it was the same when this was read.
        where = self._mounts.membership(pid)
        if where is None:
            return False
        found = self._spool.steps(Deadline.after_ms(self._step_ms), job_id=int(job.id))
        _raise_for(found.silent)
        step = next((step for step in found.steps if _is_of(step, job)), None)
        if step is None:
            return False
        homes = self._homes(job, step.sluid)
        return bool(homes) and not self._missing(job, step.sluid, homes, where)

    def session(self, job: Job, x11: bool, namespaces: bool, deadline: Deadline) -> JobSession:
        """SLURM_JOB_ID, as pam_slurm_adopt sets it, DISPLAY and XAUTHORITY, and the job's namespaces.

        A display that cannot be had is left out with a warning: the session is as right without it. Raises
        JobManagerError if the namespaces cannot be had: outside them the session is not in its job.
        """
        environment = {"SLURM_JOB_ID": job.id}
        if x11:
            try:
                display = self.x11(job, deadline)
            except JobManagerError as error:
                _log.warning("no X11 display for a session: %s", error)
                display = None
            if display is not None:
                environment["DISPLAY"] = f"localhost:{display.number}.0"
                if display.authority is not None:
                    environment["XAUTHORITY"] = display.authority
        entered = self.namespaces(job, deadline) if namespaces else ()
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
                pids += (pid for name in steps for pid in processes_below(f"{directory}/{name}"))
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
                known = SlurmJobs(self._conf.for_node(node_name), self._mounts, self._proc_root, self._step_ms)
                self._others[node_name] = known
            return known

    def x11(self, job: Job, deadline: Deadline) -> Optional[X11Display]:
        """The job's X11 tunnel, None if it has none. Raises JobManagerError."""
        try:
            with self._spool.connected(job, deadline) as (connection, _):
                return connection.x11(deadline)
        except StepError as error:
            raise JobManagerError(f"job {job.id}: {error}") from None

    def namespaces(self, job: Job, deadline: Deadline) -> Tuple[Namespace, ...]:
        """The namespaces a session in this job has to enter; the caller closes the descriptors.

        () if the job has none of its own. Raises JobManagerError.
        """
        try:
            with self._spool.connected(job, deadline) as (connection, _):
                return connection.namespaces(deadline)
        except StepError as error:
            raise JobManagerError(f"job {job.id}: {error}") from None

    def _adopt_through(
        self, connection: StepConnection, step: Step, process: ProcessHandle, job: Job, deadline: Deadline
    ) -> None:
        """Raises AdoptionFailed, StepError, JobManagerError."""
        if step.state is StepState.ENDING:
            raise AdoptionFailed(f"job {job.id} is ending")
        homes = self._homes(job, step.sluid)
        before = self._where(process)
        if not homes:
            # Then the step would say yes and move nothing: proctrack/linuxproc, proctrack/pgid.
            raise AdoptionFailed(f"job {job.id} has no cgroup here: ProctrackType=proctrack/cgroup is needed")
        if not self._missing(job, step.sluid, homes, before):
            return
        try:
            code, held = connection.add(process.pid, deadline)
            if code != 0:
                raise AdoptionFailed(f"the step of job {job.id} refuses process {process.pid}: error {code}")
            missing = self._missing(job, step.sluid, homes, self._where(process))
            if missing:
                raise AdoptionFailed(f"the step of job {job.id} has not moved process {process.pid}: {missing}")
            if not held:
                raise AdoptionFailed(f"the step of job {job.id} does not know process {process.pid}")
        except (AdoptionFailed, StepError, JobManagerError) as error:
            raise type(error)(f"{error}{self._stuck_in(process, before)}") from None

    def _where(self, process: ProcessHandle) -> Mapping[int, str]:
        where = self._mounts.membership(process.pid)
        # Asked after reading: while the pidfd says alive, the pid was this process's all along.
        if where is None or not process.alive():
            raise AdoptionFailed(f"process {process.pid} has exited")
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

    def _homes(self, job: Job, sluid: Optional[int]) -> List[Hierarchy]:
        """The hierarchies in which the job's extern step has a cgroup."""
        paths = self._conf.settings().paths
        return [
            each
            for each in self._mounts.hierarchies()
            if any(
                os.path.isdir(each.mount_point + path)
                for path in paths.extern_steps(each.kind, job.uid, int(job.id), sluid)
            )
        ]

    def _missing(self, job: Job, sluid: Optional[int], homes: Sequence[Hierarchy], where: Mapping[int, str]) -> str:
        """In words, the hierarchies among ``homes`` in which a process at ``where`` is not in the job; or ""."""
        paths = self._conf.settings().paths
        number = int(job.id)
        mine = (NamedJob(number, None, job.uid), NamedJob(number, None, None), NamedJob(None, sluid, None))
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
                _log.warning(
                    "cgroups say that job %d is uid %d's, its step says %d", step.file.job_id, named.uid, step.uid
                )
                continue
            return step.job
        _raise_for(found.silent)
        return None


def _check_time(deadline: Deadline) -> None:
    if deadline.expired:
        raise JobManagerError("Slurm's steps could not be asked in time")


def _raise_for(silent: Sequence[Silent]) -> None:
    if silent:
        raise JobManagerError("; ".join(each.words for each in silent))


def _entries(directory: str) -> List[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _is_of(step: Step, job: Job) -> bool:
    return (step.job.identity, step.uid) == (job.identity, job.uid)


def _newest_first(steps: List[Step]) -> Tuple[Job, ...]:
    """The jobs of steps that are not ending."""
    running = [step for step in steps if step.state is not StepState.ENDING]
    running.sort(key=lambda step: (step.file.ctime_ns, step.file.job_id), reverse=True)
    return tuple(step.job for step in running)
