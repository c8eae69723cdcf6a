"""The doctor's look at Slurm's steps: whether each that runs here is one that the agent finds, and answers.

Owns the comparison of the processes that serve jobs with what is in the spool directory. Asks the steps as the agent
does, and changes nothing. What it says of a step it has from root's slurmstepd or from the kernel, never from where
users can write. Called through the table of checks.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Collection, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from adoptd.deadline import Deadline
from adoptd.doctor.findings import Finding, Scene, failure, warning
from adoptd.doctor.processes import PROC, Running, children_of, read, running
from adoptd.doctor.slurm import is_slurm
from adoptd.doctor.unix_sockets import listens_at
from adoptd.jobs.slurm import SlurmJobs
from adoptd.jobs.slurm_conf import SlurmConf, SlurmSettings
from adoptd.jobs.slurm_sockets import STEP_SOCKET
from adoptd.jobs.slurm_spool import Spool, Step
from adoptd.jobs.slurm_wire import EXTERN_STEPS
from adoptd.model import Ambiguous, JobManagerError
from adoptd.slurm_site import slurm_conf

_ASK_MS = 1_500.0
_MOMENT_S = 0.5
# Steps whose own processes are looked for, and sockets that are tried.
_LOOKED_AT_MAX = 64
_TITLE = re.compile(r"slurmstepd: \[([0-9]+)\.([^\]]+)\]")
_EXTERN = "extern"
_STOPPED = "Tt"
_NAMED_MAX = 4
_NO_SOCKET = "is no socket"


@dataclass(frozen=True)
class StepDaemon:
    """A slurmstepd. ``socket`` is where it listens, "" where that is nowhere, None where it is not known.

    ``there``: there is such a file.
    """

    pid: int
    job: str
    kind: str
    state: str
    socket: Optional[str]
    there: bool


@dataclass(frozen=True)
class StepFacts:
    """``heard``: jobs whose extern step answers; ``silent``: what each does instead.

    ``left``: sockets of extern steps on which nobody listens; ``foreign``: such that are not root's, with whose they
    are. ``outside``: the process that the extern step of a job started itself, where that is in no cgroup of the job's.
    """

    spool: str
    node: str
    daemons: Sequence[StepDaemon]
    heard: Collection[str]
    silent: Mapping[str, str]
    left: Sequence[str] = ()
    foreign: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, int] = field(default_factory=dict)


def look_at_steps(scene: Scene) -> Iterator[Finding]:
    """Ask each; and look for those that cannot be asked."""
    if not is_slurm(scene.settings) or not scene.root:
        return
    try:
        conf = slurm_conf(scene.settings)
        settings = conf.settings()
        found = list(judge_steps(_look(conf, settings)))
        if found:
            # A step that begins or ends is in between for a moment.
            time.sleep(_MOMENT_S)
            found = list(judge_steps(_look(conf, settings)))
    except JobManagerError:
        return  # said by the looks at Slurm and at the jobs
    yield from found


def _look(conf: SlurmConf, settings: SlurmSettings) -> StepFacts:
    found = Spool(conf).steps(Deadline.after_ms(_ASK_MS))
    daemons = [daemon for daemon in map(_daemon, running("slurmstepd")) if daemon is not None]
    heard = {str(step.file.job_id) for step in found.steps}
    silent = {str(each.job_id): each.words for each in found.silent}
    left, foreign = _unheard(settings, heard | silent.keys())
    outside = _outside(SlurmJobs(conf), found.steps[:_LOOKED_AT_MAX])
    return StepFacts(settings.spool_dir, settings.node_name, daemons, heard, silent, left, foreign, outside)


def judge_steps(facts: StepFacts) -> Iterator[Finding]:
    """Each job by what is wrong with it; jobs of another slurmd on this host are not ours."""
    # Its children have its title; the one that listens comes last, and counts.
    by_socket = sorted(facts.daemons, key=lambda daemon: daemon.socket or "")
    extern = {daemon.job: daemon for daemon in by_socket if daemon.kind == _EXTERN}
    for job, words in facts.silent.items():
        daemon = extern.get(job)
        stopped = daemon is not None and daemon.state in _STOPPED
        what = f"is stopped (pid {daemon.pid})" if daemon is not None and stopped else f"does not answer: {words}"
        remedy = (
            f"kill -CONT {daemon.pid}" if daemon is not None and stopped else f"scontrol listpids {job}; if it hangs"
        )
        seen = f"the extern step of job {job} {what}: its user is not adopted"
        yield failure("steps", seen, f"{remedy}; scontrol requeue {job}, or scancel {job}")
    lost = [daemon for job, daemon in extern.items() if job not in facts.heard and job not in facts.silent]
    for daemon in lost[:_NAMED_MAX]:
        yield from _judge_lost(daemon, facts)
    for job, pid in list(facts.outside.items())[:_NAMED_MAX]:
        seen = f"the extern step of job {job} answers, and what it started (pid {pid}) is in no cgroup of the job"
        remedy = "the slurmd that started it had another ProctrackType, TaskPlugin or cgroup.conf: restart slurmd, and"
        yield failure("steps", f"{seen}: sessions are adopted into nothing", f"{remedy} scontrol requeue {job}")
    without = sorted({daemon.job for daemon in facts.daemons} - extern.keys())
    if without:
        seen = f"job {', '.join(without[:_NAMED_MAX])} has no extern step, so its user has no job here"
        yield warning(
            "steps", seen, "it began before PrologFlags=contain, or its extern step was killed: scontrol requeue"
        )
    yield from _judge_sockets(facts)


def _judge_sockets(facts: StepFacts) -> Iterator[Finding]:
    for name, whose in list(facts.foreign.items())[:_NAMED_MAX]:
        file = f"{facts.spool}/{name}"
        if whose == _NO_SOCKET:
            seen = f"{file} {whose}: slurmd makes sockets of that name"
            yield failure("steps", seen, f"ls -l {file}; nothing of Slurm's is lost by removing it")
            continue
        seen = f"{file} {whose}, neither root's nor SlurmUser's: its job is not believed"
        remedy = f"ss -xlp names who listens there; if it is slurmstepd: chown -h root:root {file}"
        yield failure("steps", seen, remedy)
    if facts.left:
        more = f" and {len(facts.left) - _NAMED_MAX} more" if len(facts.left) > _NAMED_MAX else ""
        seen = f"nobody listens on {', '.join(facts.left[:_NAMED_MAX])}{more} in {facts.spool}"
        seen += ": a slurmstepd was killed, and its job is none here any more"
        remedy = "dmesg | grep -i oom; squeue has the job still? scontrol requeue it; restarting slurmd clears up"
        yield warning("steps", seen, remedy)


def _judge_lost(daemon: StepDaemon, facts: StepFacts) -> Iterator[Finding]:
    what = f"the extern step of job {daemon.job} (pid {daemon.pid})"
    if daemon.socket is None:
        seen = f"{what} runs, and is not found in {facts.spool} as one of node {facts.node}: its user has no job here"
        yield failure("steps", seen, "compare SlurmdSpoolDir and NodeName with [jobs]; restart slurmd if they changed")
        return
    place, name = Path(daemon.socket).parent, STEP_SOCKET.fullmatch(Path(daemon.socket).name)
    if not daemon.socket:
        seen = f"{what} listens nowhere: its user is not adopted"
        yield failure("steps", seen, f"it ends or hangs: scontrol listpids {daemon.job}; scancel {daemon.job}")
    elif str(place) != facts.spool:
        seen = f"{what} listens in {place}, and slurm.conf says {facts.spool}: its user has no job here"
        yield failure(
            "steps", seen, f"restart slurmd if SlurmdSpoolDir was changed, or [jobs] slurm_spool_dir = {place}"
        )
    elif name is not None and name[1] != facts.node:
        if not facts.heard:
            seen = f"{what} is of node {name[1]}, and this agent is for {facts.node}: its user has no job here"
            yield failure("steps", seen, f'[jobs] slurm_node_name = "{name[1]}", or nodename={name[1]} on the PAM line')
    elif not daemon.there:
        seen = f"{what} runs, and its socket {daemon.socket} was removed: its user has no job here"
        yield failure("steps", seen, f"keep cleaners of old files out of {place}; scontrol requeue {daemon.job}")


def _daemon(process: Running) -> Optional[StepDaemon]:
    title = _TITLE.match(process.title)
    if title is None or process.uid != 0:
        return None
    path = listens_at(process.pid)
    return StepDaemon(process.pid, title[1], title[2], process.state, path, Path(path).exists() if path else False)


def _unheard(settings: SlurmSettings, known: Collection[str]) -> Tuple[List[str], Dict[str, str]]:
    """Of this node's sockets of extern steps, those that nobody listens on, and those of others, with whose."""
    left: List[str] = []
    foreign: Dict[str, str] = {}
    try:
        directory = os.open(settings.spool_dir, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return left, foreign  # said by the look at Slurm
    try:
        matches = [STEP_SOCKET.fullmatch(name) for name in sorted(os.listdir(directory))]
        ours = [each for each in matches if each is not None and each[1] == settings.node_name]
        extern = [each[0] for each in ours if int(each[3]) in EXTERN_STEPS and str(int(each[2])) not in known]
        for name in extern[:_LOOKED_AT_MAX]:
            fault = _fault_of_socket(directory, name, settings)
            if fault is not None:
                foreign[name] = fault
            elif _is_left(directory, name):
                left.append(name)
    finally:
        os.close(directory)
    return left, foreign


def _fault_of_socket(directory: int, name: str, settings: SlurmSettings) -> Optional[str]:
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return None
    if not stat.S_ISSOCK(found.st_mode):
        return _NO_SOCKET
    return None if found.st_uid in settings.trusted_uids else f"is of uid {found.st_uid}"


def _is_left(directory: int, name: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as asking:
        try:
            # Its own path may be longer than an address can be.
            asking.connect(f"/proc/self/fd/{directory}/{name}")
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _outside(jobs: SlurmJobs, steps: Sequence[Step]) -> Dict[str, int]:
    """The first process of each extern step that is not where its job is; forks of the step's itself are no such."""
    found: Dict[str, int] = {}
    for step in steps:
        for pid in children_of(step.daemon_pid):
            # Its title is in memory of root's: nobody holds that locked.
            title = read(PROC / str(pid) / "cmdline")
            if not title or title.startswith("slurmstepd"):
                continue
            try:
                if jobs.job_of_process(pid) is None and pid in children_of(step.daemon_pid):
                    found[str(step.file.job_id)] = pid
            except (Ambiguous, JobManagerError):
                continue
    return found
