"""The doctor's look at Slurm's settings: those that an adoption depends on, and whether they are those of this node.

Owns what is said of slurmd, its files and who can change them; of the values in these, slurm_values does. Changes
nothing. Called through the table of checks.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Collection, Iterator, Mapping, Optional, Tuple

from adoptd.config import Config
from adoptd.doctor.findings import FileRule, Finding, Scene, failure, fault_of, ok, open_to_others, status_of, warning
from adoptd.doctor.processes import PROC, agent_pid, read
from adoptd.doctor.role import is_login_node
from adoptd.doctor.slurm_values import is_whole, judge_cgroup_conf, judge_values
from adoptd.hierarchy import Hierarchy, read_hierarchies
from adoptd.jobs.slurm_conf import CONF_FILES, SlurmSettings, values_of
from adoptd.jobs.slurm_hosts import RunningSlurmd, find_slurmd
from adoptd.model import JobManagerError
from adoptd.pam_lines import adopt_lines, options_of
from adoptd.slurm_callerid import NoWord, helper_at
from adoptd.slurm_site import slurm_conf

_SPOOL = FileRule("a directory", 0o022, stat.S_ISDIR)
_CONF = FileRule("a regular file", 0o022, stat.S_ISREG)
_STOPPED = "Tt"
_VARIABLE = "SLURM_CONF"
# Where a slurmd has what it fetched from the controller.
_FETCHED = "/run/slurm/conf/slurm.conf"
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
    ``asked``: lines of PAM that name a node, with that name. ``above``: directories that others can write, above a file
    or the spool directory, with what is wrong. ``newer``: files that were changed since slurmd started.
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
    cgroup_conf: Optional[Tuple[int, int]] = None
    hierarchies: Tuple[Hierarchy, ...] = ()
    above: Tuple[Tuple[str, str, str], ...] = ()
    newer: Tuple[str, ...] = ()


def look_at_slurm(scene: Scene) -> Iterator[Finding]:
    """Slurm's settings, where jobs are Slurm's."""
    if not is_slurm(scene.settings):
        yield from judge_unwanted(_slurmd())
        return
    if is_login_node(scene):
        seen = "slurm.conf has no node of this host's name, and no slurmd runs: a login node"
        yield ok("slurm", f"{seen}, whose agent answers for the ssh clients here")
        return
    slurmd = _slurmd()
    named = scene.settings.jobs.slurm_conf or slurmd.conf_file
    agents = None if named or not scene.root else _variable_of(agent_pid(scene.settings.agent.pam_socket))
    told = list(judge_agents_variable(os.environ.get(_VARIABLE, ""), agents))
    if told:
        # All else would be of another file than the agent's.
        yield from told
        return
    try:
        found = slurm_conf(scene.settings).settings()
        values = {} if found.conf_file is None else values_of(found.conf_file)
        beside = None if found.conf_file is None else Path(found.conf_file).with_name("cgroup.conf")
        cgroup = values_of(str(beside)) if beside is not None and beside.is_file() else {}
    except JobManagerError as error:
        yield failure("slurm", f"no job is found here: {error}", remedy_for(str(error)))
        return
    conf = None if found.conf_file is None else status_of(found.conf_file, follow=True)
    files = tuple(str(each) for each in (found.conf_file, beside) if each is not None)
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
        None if beside is None else status_of(str(beside), follow=True),
        _hierarchies(),
        tuple(each for path in (*files, found.spool_dir) for each in _open_above(path, found.trusted_uids)),
        tuple(file for file in files if _is_newer(file, slurmd)),
    )
    yield from judge_slurm(facts)
    # What the administrator names counts whatever slurmd does.
    if found.conf_file is not None and not scene.settings.jobs.slurm_conf and scene.root:
        yield from judge_slurmds_file(found.conf_file, *_file_of(slurmd))


def judge_agents_variable(ours: str, agents: Optional[str]) -> Iterator[Finding]:
    """SLURM_CONF of our environment and of the agent's, "" where it is not set; None: no agent, or of no matter."""
    # It may name the file that is taken without it.
    default = next((each for each in CONF_FILES if os.path.isfile(each)), "")
    if agents is not None and os.path.realpath(agents or default) != os.path.realpath(ours or default):
        seen = (
            f"SLURM_CONF is {ours or 'not set'} here, and {agents or 'not set'} for the agent: nothing is said of Slurm"
        )
        yield warning("slurm", seen, f"env -u SLURM_CONF {f'SLURM_CONF={agents} ' if agents else ''}adoptd doctor")


def judge_slurmds_file(file: str, slurmds: str, why: str) -> Iterator[Finding]:
    """``file`` is the agent's; ``slurmds`` is slurmd's, "" if nothing says that it is another, and ``why`` it is."""
    if slurmds and os.path.realpath(slurmds) != os.path.realpath(file):
        seen = f"slurmd goes by {slurmds} ({why}), and the agent by {file}"
        yield failure("slurm", seen, f'[jobs] slurm_conf = "{slurmds}"; or take away {file}')


def _file_of(slurmd: RunningSlurmd) -> Tuple[str, str]:
    """The slurm.conf that slurmd was told to go by other than with -f, and how; in its own order of precedence."""
    words = read(PROC / str(slurmd.pid) / "cmdline").split("\0") if slurmd.pid > 0 else []
    if any(word.startswith("--conf-server") for word in words):
        return _FETCHED, "the controller's: --conf-server"
    told = None if slurmd.conf_file else _variable_of(slurmd.pid)
    return told or "", f"{_VARIABLE} of its environment"


def _variable_of(pid: Optional[int]) -> Optional[str]:
    """SLURM_CONF of a process of root's; None if there is no such."""
    if not pid or pid < 0:
        return None
    found = [word for word in read(PROC / str(pid) / "environ").split("\0") if word.startswith(f"{_VARIABLE}=")]
    return found[0].partition("=")[2] if found else ""


def _names_in_pam(scene: Scene) -> Tuple[Tuple[str, str], ...]:
    try:
        lines = adopt_lines(scene.service, scene.pam_directory)
    except OSError:
        return ()  # said by the look at PAM
    named = ((str(line), options_of(line).get("nodename", "")) for line in lines)
    return tuple((line, name) for line, name in named if name)


def _slurmd() -> RunningSlurmd:
    try:
        return find_slurmd()
    except JobManagerError:
        return _SEVERAL


def _hierarchies() -> Tuple[Hierarchy, ...]:
    try:
        return tuple(read_hierarchies())
    except JobManagerError:
        return ()  # said by the look at cgroups


def _open_above(path: str, owners: Collection[int]) -> Iterator[Tuple[str, str, str]]:
    """Directories above ``path`` in which others can put something in its place: which, what is wrong, ``path``."""
    for directory in Path(path).resolve().parents:
        fault = open_to_others(directory, owners)
        if fault is not None:
            yield str(directory), fault, path


def _is_newer(file: str, slurmd: RunningSlurmd) -> bool:
    if slurmd.pid <= 0:
        return False
    try:
        since_s = time.time() - os.stat(file).st_mtime
    except OSError:
        return False
    return since_s < time.clock_gettime(time.CLOCK_BOOTTIME) - slurmd.started_ns / 1e9


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
    ("Permission denied", "let root read it: where a file server takes root for nobody, chmod a+rX {file} and above"),
    ("Stale file handle", "mount again what it is on: findmnt -T {file}; systemctl restart adoptd"),
    ("include each other", "take out the include that leads back to {file}"),
    ("is not an absolute path", "SlurmdSpoolDir has to begin with /"),
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
    elif not is_whole(facts.values):
        # Node name and spool directory are those of no file then.
        yield from judge_values(where, facts.values)
        return
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
    beside = str(Path(where).with_name("cgroup.conf"))
    for file, status in ((where, facts.conf), (beside, facts.cgroup_conf)):
        fault = None if status is None else fault_of(status, _CONF, found.trusted_uids)
        if fault is not None:
            yield failure("slurm", f"{file} {fault}: others can change it", f"chown root {file} && chmod 0644 {file}")
    for directory, fault, path in {each[0]: each for each in reversed(facts.above)}.values():
        seen = f"{directory} {fault}: others can put something of theirs in place of {path}, or of what is in it"
        yield failure("slurm", seen, f"chown root {directory} && chmod go-w {directory}")
    if facts.newer:
        seen = f"{', '.join(facts.newer)} changed since slurmd started: plug-ins named there count from its next start"
        yield ok("slurm", seen)
    if found.conf_file is not None:
        yield from judge_values(where, facts.values)
        yield from judge_cgroup_conf(facts.values, facts.cgroup, facts.hierarchies)


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
