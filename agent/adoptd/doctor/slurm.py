"""The doctor's look at Slurm's settings: those that an adoption depends on, and whether they are those of this node.

Owns what is said of slurm.conf and cgroup.conf, as functions of their values. Changes nothing. Called through the table
of checks.
"""

from __future__ import annotations

import dataclasses
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Mapping, Optional, Tuple

from adoptd.config import Config
from adoptd.doctor.findings import FileRule, Finding, Scene, failure, fault_of, ok, status_of, warning
from adoptd.doctor.pam import last_options
from adoptd.doctor.processes import PROC, read
from adoptd.doctor.role import is_login_node
from adoptd.jobs.slurm_conf import SlurmSettings, values_of
from adoptd.jobs.slurm_hosts import RunningSlurmd, find_slurmd
from adoptd.model import JobManagerError
from adoptd.pam_lines import adopt_lines
from adoptd.slurm_callerid import NoWord, helper_at
from adoptd.slurm_site import slurm_conf

_SPOOL = FileRule("a directory", 0o022, stat.S_ISDIR)
_CONF = FileRule("a regular file", 0o022, stat.S_ISREG)
_STOPPED = "Tt"
# On a host with several of them the configuration says which counts.
_SEVERAL = RunningSlurmd(pid=-1)


def is_slurm(settings: Config) -> bool:
    """Whether the jobs here are Slurm's, by the configuration."""
    section = settings.jobs
    return section.backend == "slurm" or (section.backend == "auto" and slurm_conf(settings).is_there())


@dataclass(frozen=True)
class SlurmFacts:
    """``values`` and ``cgroup`` are of slurm.conf and cgroup.conf, by lower-case key; statuses (st_mode, st_uid).

    ``own_name``: what Slurm itself would call this node, whatever the agent's configuration says; "" where that is not
    known. ``stopped``: slurmd runs, and does nothing. ``seen``: whether we could see it if it runs.
    ``asked``: lines of PAM that name a node, with that name.
    """

    settings: SlurmSettings
    values: Mapping[str, str]
    cgroup: Mapping[str, str]
    slurmd: RunningSlurmd
    spool: Optional[Tuple[int, int]]
    conf: Optional[Tuple[int, int]]
    own_name: str = ""
    stopped: bool = False
    seen: bool = True
    asked: Tuple[Tuple[str, str], ...] = ()


def look_at_slurm(scene: Scene) -> Iterator[Finding]:
    """Slurm's settings, where jobs are Slurm's."""
    if not is_slurm(scene.settings):
        yield from judge_unwanted(_slurmd())
        return
    if is_login_node(scene):
        seen = "slurm.conf has no node of this host's name, and no slurmd runs: a login node"
        yield ok("slurm", f"{seen}, whose agent answers for the ssh clients here")
        return
    try:
        found = slurm_conf(scene.settings).settings()
        values = {} if found.conf_file is None else values_of(found.conf_file)
        beside = None if found.conf_file is None else Path(found.conf_file).with_name("cgroup.conf")
        cgroup = values_of(str(beside)) if beside is not None and beside.is_file() else {}
    except JobManagerError as error:
        yield failure("slurm", f"no job is found here: {error}", remedy_for(str(error)))
        return
    slurmd = _slurmd()
    conf = None if found.conf_file is None else status_of(found.conf_file, follow=True)
    status = read(PROC / str(slurmd.pid) / "stat").rpartition(")")[2].split() if slurmd.pid > 0 else []
    facts = SlurmFacts(
        found,
        values,
        cgroup,
        slurmd,
        status_of(found.spool_dir, follow=True),
        conf,
        _own_name(scene.settings),
        status[:1] != [] and status[0] in _STOPPED,
        # Only root sees which process is slurmd's.
        scene.root,
        _names_in_pam(scene),
    )
    yield from judge_slurm(facts)


def _names_in_pam(scene: Scene) -> Tuple[Tuple[str, str], ...]:
    try:
        lines = adopt_lines(scene.service, scene.pam_directory)
    except OSError:
        return ()  # said by the look at PAM
    named = ((str(line), last_options(line).get("nodename", "")) for line in lines)
    return tuple((line, name) for line, name in named if name)


def _slurmd() -> RunningSlurmd:
    try:
        return find_slurmd()
    except JobManagerError:
        return _SEVERAL


def _own_name(settings: Config) -> str:
    jobs = dataclasses.replace(settings.jobs, slurm_node_name="")
    try:
        found = slurm_conf(dataclasses.replace(settings, jobs=jobs)).settings()
    except JobManagerError:
        return ""
    return found.node_name if found.node_name_certain else ""


def judge_unwanted(slurmd: RunningSlurmd) -> Iterator[Finding]:
    """Slurm runs here, and is not asked."""
    if slurmd.pid:
        seen = "slurmd runs here, and [jobs] backend is cgroup: Slurm's jobs count for nothing"
        yield warning("slurm", seen, "set [jobs] backend to slurm, unless another job manager gives out this node")


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
    if facts.own_name not in ("", name):
        seen = f"[jobs] slurm_node_name is {name}, and slurmd's is {facts.own_name}: no job of this node is found"
        yield failure("slurm", seen, f'take slurm_node_name out, or set it to "{facts.own_name}"')
    elif found.node_name_certain:
        yield ok("slurm", f"{where}, this is node {name}")
    else:
        seen = f"{where} has no node of this host's name: {name} is a guess"
        yield warning("slurm", seen, "set [jobs] slurm_node_name to the NodeName of this host")
    for line, asked in facts.asked if facts.slurmd.pid > 0 else ():
        if asked != (facts.own_name or name):
            seen = f"{line}: nodename={asked}, and slurmd's is {facts.own_name or name}: no job of this node is found"
            yield failure("slurm", seen, "take nodename= out of that line")
    if facts.stopped:
        seen = f"slurmd (pid {facts.slurmd.pid}) is stopped: jobs that run are served, none can start"
        yield warning("slurm", seen, f"kill -CONT {facts.slurmd.pid}, or systemctl restart slurmd")
    elif facts.slurmd.pid:
        shown = f"pid {facts.slurmd.pid}" if facts.slurmd.pid > 0 else f"several, of which {name} is ours"
        yield ok("slurm", f"slurmd runs ({shown})")
    elif facts.seen:
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
    if _plugin(tracking) == "cgroup":
        yield ok("slurm", "ProctrackType=proctrack/cgroup")
    else:
        seen = f"{where}: ProctrackType={tracking}: a step says yes to a session and leaves it where it is"
        yield failure("slurm", seen, "ProctrackType=proctrack/cgroup, then restart slurmd on all nodes")
    tasks = {_plugin(plugin) for plugin in values.get("taskplugin", "").split(",")}
    if "cgroup" in tasks:
        yield ok("slurm", f"TaskPlugin={values['taskplugin']}")
    else:
        seen = f"{where}: TaskPlugin lacks task/cgroup: sessions are in their job, and limited by nothing"
        yield warning("slurm", seen, "TaskPlugin=task/cgroup,task/affinity, then restart slurmd")
    held = [key for key in ("Cores", "RAMSpace", "SwapSpace", "Devices") if _is_yes(cgroup, f"constrain{key.lower()}")]
    if "cgroup" in tasks and not held:
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


def _plugin(name: str) -> str:
    # Later releases of Slurm take "cgroup" for "task/cgroup".
    return name.strip().lower().rpartition("/")[2]


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
