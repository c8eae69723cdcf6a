"""The doctor's look at Slurm's steps: whether each that runs here is one that the agent finds, and answers.

Owns the comparison of the processes that serve jobs with what is in the spool directory. Asks the steps as the agent
does, and changes nothing. Called through the table of checks.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Collection, Dict, Iterator, List, Mapping, Optional, Sequence

from adoptd.deadline import Deadline
from adoptd.doctor.findings import Finding, Scene, failure, warning
from adoptd.doctor.processes import PROC, Running, link, read, running
from adoptd.doctor.slurm import is_slurm
from adoptd.jobs.slurm_conf import SlurmSettings
from adoptd.jobs.slurm_spool import Spool
from adoptd.model import JobManagerError
from adoptd.slurm_site import slurm_conf

_ASK_MS = 1_500.0
_MOMENT_S = 0.5
_TITLE = re.compile(r"slurmstepd: \[([0-9]+)\.([^\]]+)\]")
_SOCKET = re.compile(r"(.+)_[0-9]+\.[0-9.]+")
_EXTERN = "extern"
_STOPPED = "Tt"
_NAMED_MAX = 4


@dataclass(frozen=True)
class StepDaemon:
    """A slurmstepd. ``socket`` is where it listens, "" where that is not known; ``there``: there is such a file."""

    pid: int
    job: str
    kind: str
    state: str
    socket: str
    there: bool


@dataclass(frozen=True)
class StepFacts:
    """``heard``: jobs whose extern step answers; ``silent``: what each does instead."""

    spool: str
    node: str
    daemons: Sequence[StepDaemon]
    heard: Collection[str]
    silent: Mapping[str, str]


def look_at_steps(scene: Scene) -> Iterator[Finding]:
    """Ask each; and look for those that cannot be asked."""
    if not is_slurm(scene.settings) or not scene.root:
        return
    try:
        conf = slurm_conf(scene.settings)
        settings, spool = conf.settings(), Spool(conf)
        found = list(judge_steps(_look(settings, spool)))
        if found:
            # A step that begins or ends is in between for a moment.
            time.sleep(_MOMENT_S)
            found = list(judge_steps(_look(settings, spool)))
    except JobManagerError:
        return  # said by the looks at Slurm and at the jobs
    yield from found


def _look(settings: SlurmSettings, spool: Spool) -> StepFacts:
    found = spool.steps(Deadline.after_ms(_ASK_MS))
    daemons = [daemon for daemon in map(_daemon, running("slurmstepd")) if daemon is not None]
    heard = {str(step.file.job_id) for step in found.steps}
    silent = {str(each.job_id): each.words for each in found.silent}
    return StepFacts(settings.spool_dir, settings.node_name, daemons, heard, silent)


def judge_steps(facts: StepFacts) -> Iterator[Finding]:
    """Each job by what is wrong with it; jobs of another slurmd on this host are not ours."""
    # Its children have its title; the one that listens comes last, and counts.
    by_socket = sorted(facts.daemons, key=lambda daemon: daemon.socket)
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
    without = sorted({daemon.job for daemon in facts.daemons} - extern.keys())
    if without:
        seen = f"job {', '.join(without[:_NAMED_MAX])} has no extern step, so its user has no job here"
        yield warning(
            "steps", seen, "it began before PrologFlags=contain, or its extern step was killed: scontrol requeue"
        )


def _judge_lost(daemon: StepDaemon, facts: StepFacts) -> Iterator[Finding]:
    place, name = Path(daemon.socket).parent, _SOCKET.fullmatch(Path(daemon.socket).name)
    what = f"the extern step of job {daemon.job} (pid {daemon.pid})"
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
    path = _bound_to(process.pid)
    return StepDaemon(process.pid, title[1], title[2], process.state, path, Path(path).exists() if path else False)


def _bound_to(pid: int) -> str:
    """Where a process listens on a unix socket, as it was bound; "" if nowhere."""
    bound: Dict[str, str] = {}
    # Num RefCount Protocol Flags Type St Inode Path (proc_net(5)); a socket that listens has the flag 10000.
    for line in read(PROC / str(pid) / "net/unix").splitlines()[1:]:
        fields: List[str] = line.split(None, 7)
        if len(fields) == 8 and fields[3] == "00010000":
            bound[f"socket:[{fields[6]}]"] = fields[7]
    place = PROC / str(pid) / "fd"
    try:
        return next((bound[each] for each in (link(fd) for fd in place.iterdir()) if each in bound), "")
    except OSError:
        return ""
