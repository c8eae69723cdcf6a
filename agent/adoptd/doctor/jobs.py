"""The doctor's look at the jobs of this node: found or not, by whom they can be changed, and an adoption tried.

Owns what is said of job directories, as functions of their values. The trial is a child's (trial.py), and only where it
is asked for. Called through the table of checks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Iterator, List, Mapping, Optional, Sequence

from adoptd.assembly import make_backend
from adoptd.deadline import Deadline
from adoptd.doctor.directories import look_at_directories, names_beside
from adoptd.doctor.findings import Finding, Grade, Scene, failure, ok, status_of, warning
from adoptd.doctor.likeness import ask_child
from adoptd.doctor.role import is_login_node
from adoptd.hierarchy import read_hierarchies
from adoptd.jobs.template import JobPath
from adoptd.metrics import Metrics
from adoptd.model import Job, JobManagerError
from adoptd.pam_lines import adopt_lines, options_of
from adoptd.slurm_site import slurm_conf

_JOBS_MS = 4_000.0
# Where systemd has much besides.
_SHARED = frozenset(("", "system.slice", "user.slice", "machine.slice"))
# Of a check's time: what comes before the trial needs some, too.
_TRIAL_SHARE = 0.7
# Job directories looked at for their owner.
_DIRECTORIES_MAX = 256


def look_at_jobs(scene: Scene) -> Iterator[Finding]:
    """Ask the job manager which jobs there are, as the agent does; with --deep adopt into one."""
    if not scene.root:
        yield warning("jobs", "only root can ask for them", "sudo adoptd doctor")
        return
    if is_login_node(scene):
        yield ok("jobs", "none here, as is right on a login node")
        return
    backend = make_backend(scene.settings, Metrics())
    try:
        if backend.name == "slurm":
            slurm_conf(scene.settings).settings()
    except JobManagerError:
        return  # said by the look at Slurm
    try:
        jobs = backend.all_jobs(Deadline.after_ms(_JOBS_MS))
    except JobManagerError as error:
        yield judge_unlisted(backend.name, str(error))
        return
    how = "auto" if scene.settings.jobs.backend == "auto" else "configured"
    users = len({job.uid for job in jobs})
    if jobs:
        yield ok("jobs", f"{backend.name} ({how}): {len(jobs)} jobs of {users} users here")
    elif backend.name == "cgroup":
        path = scene.settings.jobs.path
        yield from judge_no_directories(path, _parents(path), *names_beside(path))
    else:
        yield ok("jobs", f"{backend.name} ({how}): no job here now; users without one are refused")
    if backend.name == "cgroup":
        yield from look_at_directories(scene.settings.jobs, jobs)
        yield from _delegated(scene, jobs)
    if scene.deep:
        yield from _tried(ask_child(scene, "adopt", (str(scene.file),), _TRIAL_SHARE * scene.timeout_s))
    elif jobs:
        yield ok("jobs", "--deep tries an adoption for real")


def judge_unlisted(backend: str, error: str) -> Finding:
    """The jobs cannot be had; where the look at what they are had from fails too, that is why."""
    seen = f"the jobs of this node cannot be listed, and logins go by action_generic_failure: {error}"
    remedy = "docs/faults.md has a row for it; put right what is said of the job manager"
    return failure("jobs", seen, remedy, cause="slurm" if backend == "slurm" else "cgroups")


def _tried(said: Optional[Mapping[str, object]]) -> Iterator[Finding]:
    """What the child that tried an adoption found."""
    if said is None:
        yield failure("jobs", "an adoption for trial did not end in time", "adoptd doctor --deep --timeout 30")
    elif "error" in said:
        seen = f"an adoption could not be tried with the agent's rights: {said['error']}"
        yield failure("jobs", seen, "look at what systemctl cat adoptd takes away from it, and at docs/faults.md")
    else:
        yield Finding("jobs", Grade[str(said["grade"])], str(said["seen"]), str(said["remedy"]))


def judge_no_directories(
    path: str, parents: Sequence[str], likely: Sequence[str] = (), others: Sequence[str] = ()
) -> Iterator[Finding]:
    """``parents``: the directories above the jobs that are there; ``likely`` and ``others``: see names_beside()."""
    fixed = JobPath.parse_template(path).fixed
    if parents and others and not likely and ("", *fixed)[-1] not in _SHARED:
        seen = f"no job in {', '.join(parents)}: nothing there has a name as in {path}, {others[0]} has not"
        yield warning("jobs", seen, "set [jobs] path to how the job manager names its cgroups: {uid} is a number")
    elif parents:
        yield ok("jobs", f"cgroup: no job in {', '.join(parents)} now; users without one are refused")
    else:
        seen = f"no hierarchy has the directory above {path}: no job is ever found, and every user is refused"
        yield warning("jobs", seen, "set [jobs] path to where the job manager makes its cgroups, or backend to slurm")


def _parents(path: str) -> List[str]:
    fixed = JobPath.parse_template(path).fixed
    found = (Path(each.mount_point, *fixed) for each in read_hierarchies())
    return [str(each) for each in found if each.is_dir()]


def _delegated(scene: Scene, jobs: Sequence[Job]) -> Iterator[Finding]:
    """Jobs whose directory is their user's, where a failed adoption lets in."""
    try:
        lines = [line for line in adopt_lines(scene.service, scene.pam_directory) if line.kind == "account"]
    except OSError:
        return
    allowing = [line for line in lines if options_of(line).get("action_adopt_failure", "allow").lower() == "allow"]
    template = JobPath.parse_template(scene.settings.jobs.path)
    owned: List[str] = []
    for job in jobs[:_DIRECTORIES_MAX]:
        for each in read_hierarchies():
            directory = Path(each.mount_point + template.render(job.uid if template.has_uid else None, job.id))
            status = status_of(str(directory), follow=True)
            if status is not None and status[1] != 0:
                owned.append(str(directory))
    yield from judge_delegated(owned, str(allowing[0]) if allowing else None)


def judge_delegated(owned: Sequence[str], allowing: Optional[str]) -> Iterator[Finding]:
    """``owned``: job directories that belong to users. ``allowing``: a line that lets in whom it cannot adopt."""
    if owned and allowing is not None:
        seen = f"{owned[0]} is its user's, who can make adoptions fail, and {allowing} then lets them in unadopted"
        yield warning("jobs", seen, "add action_adopt_failure=deny to that line")
