"""The doctor's look at the job manager: found or not, set up so that sessions can be adopted, and tried.

Owns what is said of slurm.conf and of job directories, as functions of their values. The trial puts a process of its
own into a job that is there, reads it back and ends it; only where it is asked for. Called through the table of checks.
"""

from __future__ import annotations

import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Mapping, Optional, Sequence, Tuple

from adoptd.assembly import make_backend
from adoptd.config import Config
from adoptd.deadline import Deadline
from adoptd.doctor.findings import FileRule, Finding, Scene, failure, fault_of, ok, status_of, warning
from adoptd.doctor.pam import last_options
from adoptd.hierarchy import read_hierarchies
from adoptd.jobs import JobBackend
from adoptd.jobs.slurm_conf import SlurmSettings, values_of
from adoptd.jobs.slurm_hosts import RunningSlurmd, find_slurmd
from adoptd.jobs.template import JobPath
from adoptd.metrics import Metrics
from adoptd.model import AdoptionFailed, Job, JobManagerError
from adoptd.pam_lines import adopt_lines
from adoptd.process import open_process
from adoptd.slurm_callerid import NoWord, helper_at
from adoptd.slurm_site import slurm_conf

_JOBS_MS = 4_000.0
_TRIAL_MS = 3_000.0
_TRIAL_S = 20
_SPOOL = FileRule("a directory", 0o022, stat.S_ISDIR)
_CONF = FileRule("a regular file", 0o022, stat.S_ISREG)
# Job directories looked at for their owner.
_DIRECTORIES_MAX = 256


def _is_slurm(settings: Config) -> bool:
    section = settings.jobs
    return section.backend == "slurm" or (section.backend == "auto" and slurm_conf(settings).is_there())


@dataclass(frozen=True)
class SlurmFacts:
    """``values`` and ``cgroup`` are of slurm.conf and cgroup.conf, by lower-case key; statuses (st_mode, st_uid)."""

    settings: SlurmSettings
    values: Mapping[str, str]
    cgroup: Mapping[str, str]
    slurmd: RunningSlurmd
    spool: Optional[Tuple[int, int]]
    conf: Optional[Tuple[int, int]]


def look_at_slurm(scene: Scene) -> Iterator[Finding]:
    """Slurm's settings, where jobs are Slurm's."""
    if not _is_slurm(scene.settings):
        return
    try:
        found = slurm_conf(scene.settings).settings()
        values = {} if found.conf_file is None else values_of(found.conf_file)
        beside = None if found.conf_file is None else Path(found.conf_file).with_name("cgroup.conf")
        cgroup = values_of(str(beside)) if beside is not None and beside.is_file() else {}
        slurmd = find_slurmd()
    except JobManagerError as error:
        yield failure("slurm", f"no job is found here: {error}", remedy_for(str(error)))
        return
    conf = None if found.conf_file is None else status_of(found.conf_file, follow=True)
    yield from judge_slurm(SlurmFacts(found, values, cgroup, slurmd, status_of(found.spool_dir, follow=True), conf))


# What Slurm's configuration is refused for, and what to do. The last is for all else.
_REMEDIES: Tuple[Tuple[str, str], ...] = (
    ("everybody can write it", "chmod go-w {file}"),
    ("owned by uid", "chown root {file}"),
    ("no slurm.conf", "put it where slurmd has it, or name it: [jobs] slurm_conf; or set [jobs] backend to cgroup"),
    ("is no user of this host", "getent passwd must know that user: add it, or put the name service right"),
    ("No such file", "put {file} there, or take it out of what includes it"),
    ("several", "name the one that counts: [jobs] slurm_node_name and slurm_conf"),
    ("", "put it right; until then logins go by action_generic_failure"),
)


def remedy_for(error: str) -> str:
    """What to do about an error of Slurm's configuration, which begins with the file's name where it has one."""
    file = error.partition(":")[0]
    return next(remedy.format(file=file) for words, remedy in _REMEDIES if words in error)


def judge_slurm(facts: SlurmFacts) -> Iterator[Finding]:
    """Each setting that an adoption depends on."""
    found, where = facts.settings, facts.settings.conf_file or "slurm.conf"
    if found.conf_file is None:
        yield warning("slurm", "no slurm.conf here: its settings cannot be checked", "set [jobs] slurm_conf")
    name = found.node_name
    if found.node_name_certain:
        yield ok("slurm", f"{where}, this is node {name}")
    else:
        seen = f"{where} has no node of this host's name: {name} is a guess"
        yield warning("slurm", seen, "set [jobs] slurm_node_name to the NodeName of this host")
    if facts.slurmd.pid:
        yield ok("slurm", f"slurmd runs (pid {facts.slurmd.pid})")
    else:
        yield warning(
            "slurm", "slurmd is not running: jobs that run are served, none can start", "systemctl start slurmd"
        )
    fault = fault_of(facts.spool, _SPOOL, found.trusted_uids)
    if fault is None:
        yield ok("slurm", f"spool directory {found.spool_dir}")
    else:
        seen = f"spool directory {found.spool_dir} {fault}: no step in it can be found, or believed"
        owner = f"chown root {found.spool_dir} && chmod 0755 {found.spool_dir}"
        remedy = (
            "set [jobs] slurm_spool_dir to slurmd's SlurmdSpoolDir, or start slurmd" if "missing" in fault else owner
        )
        yield failure("slurm", seen, remedy)
    conf_fault = fault_of(facts.conf, _CONF, found.trusted_uids) if facts.conf is not None else None
    if conf_fault is not None:
        yield failure(
            "slurm", f"{where} {conf_fault}: others can change it", f"chown root {where} && chmod 0644 {where}"
        )
    if found.conf_file is not None:
        yield from _judge_values(where, facts.values, facts.cgroup)


def _judge_values(where: str, values: Mapping[str, str], cgroup: Mapping[str, str]) -> Iterator[Finding]:
    if not values.keys() & {"slurmctldhost", "controlmachine"}:
        yield failure("slurm", f"{where} names no SlurmctldHost: it is not whole", "copy it from the controller again")
        return
    flags = {flag.strip().lower() for flag in values.get("prologflags", "").split(",")} - {""}
    # X11 and the like imply contain (slurm.conf(5)).
    if flags & {"contain", "x11"}:
        yield ok("slurm", f"PrologFlags={values['prologflags']}")
    else:
        seen = f"{where}: PrologFlags lacks contain: jobs have no extern step, so every user has no job here"
        yield failure("slurm", seen, "PrologFlags=contain on all nodes and the controller, then scontrol reconfigure")
    tracking = values.get("proctracktype", "proctrack/cgroup").lower()
    if tracking == "proctrack/cgroup":
        yield ok("slurm", "ProctrackType=proctrack/cgroup")
    else:
        seen = f"{where}: ProctrackType={tracking}: a step says yes to a session and leaves it where it is"
        yield failure("slurm", seen, "ProctrackType=proctrack/cgroup, then restart slurmd on all nodes")
    tasks = {plugin.strip().lower() for plugin in values.get("taskplugin", "").split(",")}
    if "task/cgroup" in tasks:
        yield ok("slurm", f"TaskPlugin={values['taskplugin']}")
    else:
        seen = f"{where}: TaskPlugin lacks task/cgroup: sessions are in their job, and limited by nothing"
        yield warning("slurm", seen, "TaskPlugin=task/cgroup,task/affinity, then restart slurmd")
    held = [key for key in ("Cores", "RAMSpace", "SwapSpace", "Devices") if _is_yes(cgroup, f"constrain{key.lower()}")]
    if "task/cgroup" in tasks and not held:
        seen = "cgroup.conf constrains nothing: sessions are in their job, and limited by nothing"
        yield warning("slurm", seen, "ConstrainCores=yes and ConstrainRAMSpace=yes in cgroup.conf")
    elif held:
        yield ok("slurm", f"constrained: {', '.join(held)}")
    container = values.get("jobcontainertype", "")
    facts: List[str] = []
    if container and container.lower() != "job_container/none":
        facts.append(f"JobContainerType={container}: sessions enter the job's namespaces")
    if "x11" not in flags:
        facts.append("no PrologFlags=x11: no DISPLAY is handed to sessions")
    for fact in facts:
        yield ok("slurm", fact)
    tmpfs = container.lower() == "job_container/tmpfs"
    if tmpfs and not flags & {"contain"}:
        yield warning("slurm", f"{where}: job_container/tmpfs needs PrologFlags=contain", "PrologFlags=contain")


def _is_yes(values: Mapping[str, str], key: str) -> bool:
    return values.get(key, "no").lower() in ("yes", "true", "up", "1")


def look_at_fallback(scene: Scene) -> Iterator[Finding]:
    """What nodes without our agent would be asked through."""
    section = scene.settings.callerid
    if section.fallback != "slurm":
        return
    try:
        yield ok("fallback", f"nodes without an agent are asked through {helper_at(section.slurm_scontrol)}")
    except NoWord as error:
        remedy = "install slurm-client, name it in [callerid] slurm_scontrol, or set fallback to none"
        yield warning("fallback", f"nodes without an agent cannot be asked: {error}", remedy)


def look_at_jobs(scene: Scene) -> Iterator[Finding]:
    """Ask the job manager which jobs there are, as the agent does; with --deep adopt into one."""
    if not scene.root:
        yield warning("jobs", "only root can ask for them", "sudo adoptd doctor")
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
        seen = f"the jobs of this node cannot be listed, and logins go by action_generic_failure: {error}"
        yield failure("jobs", seen, "docs/faults.md has a row for it; put right what is said of the job manager")
        return
    how = "auto" if scene.settings.jobs.backend == "auto" else "configured"
    users = len({job.uid for job in jobs})
    if jobs:
        yield ok("jobs", f"{backend.name} ({how}): {len(jobs)} jobs of {users} users here")
    elif backend.name == "cgroup":
        yield from judge_no_directories(scene.settings.jobs.path, _parents(scene.settings.jobs.path))
    else:
        yield ok("jobs", f"{backend.name} ({how}): no job here now; users without one are refused")
    yield from _delegated(scene, jobs)
    if scene.deep:
        yield from try_adoption(backend, jobs)
    elif jobs:
        yield ok("jobs", "--deep tries an adoption for real")


def judge_no_directories(path: str, parents: Sequence[str]) -> Iterator[Finding]:
    """``parents``: the directories above the jobs that are there."""
    if parents:
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
    if _is_slurm(scene.settings):
        return
    try:
        lines = [line for line in adopt_lines(scene.service, scene.pam_directory) if line.kind == "account"]
    except OSError:
        return
    allowing = [line for line in lines if last_options(line).get("action_adopt_failure", "allow").lower() == "allow"]
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


def try_adoption(backend: JobBackend, jobs: Sequence[Job]) -> Iterator[Finding]:
    """Put a process of ours into the newest job, read it back, and end it."""
    if not jobs:
        yield ok("jobs", "an adoption was not tried: there is no job here to try it in")
        return
    job = max(jobs, key=lambda each: each.created)
    started_s = time.monotonic()
    child = subprocess.Popen(
        ["sleep", str(_TRIAL_S)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with open_process(child.pid) as process:
            backend.adopt(process, job, Deadline.after_ms(_TRIAL_MS))
            inside = backend.contains(job, child.pid)
    except (AdoptionFailed, JobManagerError) as error:
        yield failure(
            "jobs", f"a process of ours could not be put into job {job.id}: {error}", "docs/faults.md has a row for it"
        )
        return
    finally:
        child.kill()
        child.wait()
    took_ms = (time.monotonic() - started_s) * 1000
    if inside:
        yield ok(
            "jobs", f"a process of ours was adopted into job {job.id}, read back there, and ended ({took_ms:.0f} ms)"
        )
    else:
        seen = f"job {job.id} took a process of ours, which is not in it"
        yield failure("jobs", seen, "ProctrackType=proctrack/cgroup; sessions are not adopted here")
