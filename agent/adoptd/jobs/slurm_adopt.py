"""Having a job's extern step take a process in, and reading back that it has.

Owns the order of that: a turn, a connection, the request, the proof; and what is said where it fails half-way. It must
never move a process itself (only the step does it completely: accounting, signals, limits), nor report an adoption
that it has not read back. Called by the slurm backend.
"""

from __future__ import annotations

import itertools
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Mapping, Optional, Tuple

from adoptd.deadline import Deadline
from adoptd.hierarchy import CgroupMounts
from adoptd.jobs.slurm_homes import Homes
from adoptd.jobs.slurm_spool import Heard, Spool, Step
from adoptd.jobs.slurm_step import StepConnection, StepError, StepSilent
from adoptd.jobs.slurm_turns import Turns
from adoptd.jobs.slurm_wire import Op, StepState
from adoptd.model import AdoptionFailed, Job, JobFault, JobManagerError
from adoptd.process import ProcessHandle

# What a job whose step hangs leaves of a login's time, for the job that it may have to go into instead.
_RESERVE_MS = 200.0
# Whoever called waits no longer than the deadline either, and is to hear what was wrong.
_REPORT_MS = 20.0

# What a step has said of itself is believed so long, for an adoption over the same connection. Beyond it, as after a
# wait for a turn, the job may have ended and come again.
_HEARD_FOR_S = 0.05


@dataclass(frozen=True)
class Move:
    """A process that is to be put into a job, and what its session is to be given.

    ``login``: it is sshd's, in a login. In a suspended job it would stand still before the login is through, where each
    holds one of sshd's MaxStartups, and neither LoginGraceTime nor, in cgroup v1, SIGKILL ends it.
    """

    process: ProcessHandle
    job: Job
    x11: bool = False
    namespaces: bool = False
    login: bool = False


class StepAdoptions:
    """Adoptions into the jobs of one slurmd."""

    def __init__(self, spool: Spool, homes: Homes, mounts: CgroupMounts) -> None:
        self._spool = spool
        self._homes = homes
        self._mounts = mounts
        self._turns = Turns()

    def adopt(self, wanted: Move, deadline: Deadline, heard: Optional[Heard], held: ExitStack) -> StepConnection:
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
                    self._through(connection, step, wanted, deadline)
                except StepSilent:
                    owed = connection.owed()
                    if owed is not None:
                        self._turns.owes(job, owed)
                    raise
                return connection
            except (StepError, JobManagerError) as error:
                raise AdoptionFailed(f"job {job.id} of uid {job.uid}: {error}", error.fault) from None

    def _through(self, connection: StepConnection, step: Step, wanted: Move, deadline: Deadline) -> None:
        """Raises AdoptionFailed, StepError, JobManagerError."""
        process, job = wanted.process, wanted.job
        if step.state is StepState.ENDING:
            raise AdoptionFailed(f"job {job.id} is ending", JobFault.JOB_ENDED)
        before = self._where(process)
        looked_for = self._homes.of(job, step.sluid)
        homes = list(itertools.islice(looked_for, 1))
        if not homes:
            # Then the step would say yes and move nothing: proctrack/linuxproc, proctrack/pgid.
            text = f"job {job.id} has no cgroup here: ProctrackType=proctrack/cgroup is needed"
            raise AdoptionFailed(text, JobFault.NO_CGROUP)
        if not self._homes.missing(job, step.sluid, homes, before):
            homes += looked_for
            if not self._homes.missing(job, step.sluid, homes, before):
                return
        if deadline.expired:
            # A move must not happen after its login was told that it failed.
            raise AdoptionFailed(
                f"process {process.pid} could not be put into job {job.id} in time", JobFault.OUT_OF_TIME
            )
        if wanted.login and self._homes.is_frozen(job, step.sluid):
            # Since the jobs were listed. No fault of the manager's, and for a login as good as ended.
            raise AdoptionFailed(f"job {job.id} is suspended", JobFault.JOB_ENDED)
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
            missing = self._homes.missing(job, step.sluid, homes, self._where(process))
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
        stuck = [] if now is None else self._homes.entered(before, now)
        return f"; process {process.pid} is stuck in {', '.join(stuck)}" if stuck else ""


def _sparing(deadline: Deadline, reserve_ms: float) -> Deadline:
    """An earlier deadline: ``reserve_ms`` before it, or half of the time that is left if that is more."""
    remaining_ms = deadline.remaining_s() * 1000.0
    return deadline.earlier(max(remaining_ms - reserve_ms, remaining_ms / 2.0))


def _still_fresh(heard: Optional[Heard]) -> Optional[Tuple[StepConnection, Step]]:
    if heard is None or heard.connection is None or time.monotonic() - heard.at_s > _HEARD_FOR_S:
        return None
    return heard.connection, heard.step
