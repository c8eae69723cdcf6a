"""What the doctor says of the values in slurm.conf and cgroup.conf: those that an adoption depends on.

Owns what is said of them, as pure functions, and reads nothing. A word that is almost one of Slurm's is taken for a
slip of the pen: slurmd does not start with it. Called by the look at Slurm.
"""

from __future__ import annotations

import difflib
from typing import Dict, Iterable, Iterator, Mapping, Optional, Sequence

from adoptd.doctor.findings import Finding, failure, ok, warning
from adoptd.doctor.kernel import layout_of
from adoptd.hierarchy import Hierarchy

# As slurm.conf(5) writes them, where they matter here. No key of any release is as like one of them as a slip is.
_KEYS = ("SlurmctldHost", "PrologFlags", "ProctrackType", "TaskPlugin", "SlurmdSpoolDir", "ClusterName", "AuthType")
_CONTROLLERS = frozenset(("slurmctldhost", "controlmachine"))
_FLAGS = frozenset(
    ("alloc", "contain", "deferbatch", "forcerequeueonfail", "nohold", "runinjob", "serial", "x11")  # 18.08 to 25.11
)
# How like a word is that is taken for a slip (difflib's ratio): of keys the most that two right ones have is 0.85.
_LIKE_KEY, _LIKE_FLAG = 0.88, 0.8
_CONSTRAINTS = ("Cores", "RAMSpace", "SwapSpace", "Devices")
# Of cgroup.conf's CgroupPlugin: the layouts of this host's cgroups that it starts with.
_PLUGIN_LAYOUTS: Mapping[str, Sequence[str]] = {"v1": ("v1", "hybrid"), "v2": ("v2",), "disabled": ()}


def judge_values(where: str, values: Mapping[str, str]) -> Iterator[Finding]:
    """slurm.conf, by lower-case key; ``where`` it is."""
    slips = _slips(values)
    for key, slip in slips.items():
        seen = f"{where}: {slip} is no key of Slurm's, so slurmd does not start again; {key} is meant?"
        yield failure("slurm", seen, f"write {key} in its place, on all nodes")
    # The rest goes by what was meant: one cause, one finding.
    values = {**values, **{key.lower(): values[slip] for key, slip in slips.items()}}
    if not values.keys() & _CONTROLLERS:
        yield failure("slurm", f"{where} names no SlurmctldHost: it is not whole", "copy it from the controller again")
        return
    yield from _judge_flags(where, values.get("prologflags", ""))
    tracking = values.get("proctracktype", "proctrack/cgroup").lower()
    if _is_cgroup(tracking, "proctrack"):
        yield ok("slurm", "ProctrackType=proctrack/cgroup")
    else:
        seen = f"{where}: ProctrackType={tracking}: a step says yes to a session and leaves it where it is"
        yield failure("slurm", seen, "ProctrackType=proctrack/cgroup, then restart slurmd on all nodes")
    if has_task_cgroup(values):
        yield ok("slurm", f"TaskPlugin={values['taskplugin']}")
    else:
        seen = f"{where}: TaskPlugin lacks task/cgroup: sessions are in their job, and limited by nothing"
        yield warning("slurm", seen, "TaskPlugin=task/cgroup,task/affinity, then restart slurmd")
    user = values.get("slurmduser", "root")
    if user not in ("root", "0"):
        seen = f"{where}: SlurmdUser={user}: a slurmd that is not root adopts nobody, and {user} can make jobs up"
        yield failure("slurm", seen, "take SlurmdUser out, then restart slurmd on all nodes")
    container = values.get("jobcontainertype", "")
    if container and container.lower() != "job_container/none":
        yield ok("slurm", f"JobContainerType={container}: sessions enter the job's namespaces")


def is_whole(values: Mapping[str, str]) -> bool:
    """Whether slurm.conf names a controller, or is meant to: what is half written has few lines of its beginning."""
    return bool(values.keys() & _CONTROLLERS) or "SlurmctldHost" in _slips(values)


def _slips(values: Mapping[str, str]) -> Dict[str, str]:
    """What is there in place of keys that are not."""
    likely = {key: _like(key.lower(), values.keys(), _LIKE_KEY) for key in _KEYS if key.lower() not in values}
    return {key: slip for key, slip in likely.items() if slip is not None}


def _judge_flags(where: str, text: str) -> Iterator[Finding]:
    flags = {flag.strip().lower() for flag in text.split(",")} - {""}
    slip = _like("contain", flags - _FLAGS, _LIKE_FLAG)
    if slip is not None:
        seen = f"{where}: PrologFlags has {slip}: slurmd does not start again with it; contain is meant?"
        yield failure("slurm", seen, "PrologFlags=contain on all nodes and the controller, then scontrol reconfigure")
    # X11 and RunInJob imply contain (slurm.conf(5)).
    elif flags & {"contain", "x11", "runinjob"}:
        yield ok("slurm", f"PrologFlags={text}")
    else:
        seen = f"{where}: PrologFlags lacks contain: what begins with it has no extern step, so is no job here"
        yield failure("slurm", seen, "PrologFlags=contain on all nodes and the controller, then scontrol reconfigure")
    if "x11" not in flags:
        yield ok("slurm", "no PrologFlags=x11: no DISPLAY is handed to sessions")


def judge_cgroup_conf(
    values: Mapping[str, str], cgroup: Mapping[str, str], hierarchies: Sequence[Hierarchy]
) -> Iterator[Finding]:
    """cgroup.conf, by lower-case key; empty where there is none. ``hierarchies``: none where they are not known."""
    held = [key for key in _CONSTRAINTS if _is_yes(cgroup, f"constrain{key.lower()}")]
    if has_task_cgroup(values) and not held:
        seen = "cgroup.conf constrains nothing: sessions are in their job, and limited by nothing"
        yield warning("slurm", seen, "ConstrainCores=yes and ConstrainRAMSpace=yes in cgroup.conf")
    elif held:
        yield ok("slurm", f"constrained: {', '.join(held)}")
    if not hierarchies:
        return
    plugin, layout = cgroup.get("cgroupplugin", "autodetect"), layout_of(hierarchies)
    layouts = _PLUGIN_LAYOUTS.get(plugin.lower().rpartition("/")[2])
    if layouts is not None and layout not in layouts:
        seen = f"cgroup.conf: CgroupPlugin={plugin}, and cgroups here are {layout}: slurmd does not start again with it"
        yield failure("slurm", seen, "take CgroupPlugin out, so that slurmd looks; or boot with the other cgroups")
    mount = cgroup.get("cgroupmountpoint", "").rstrip("/")
    automount = _is_yes(cgroup, "cgroupautomount")
    if mount and not automount and not any(f"{each.mount_point}/".startswith(f"{mount}/") for each in hierarchies):
        seen = f"cgroup.conf: CgroupMountpoint={mount}, where no cgroups are: slurmd does not start again with it"
        yield failure("slurm", seen, "take CgroupMountpoint out, unless cgroups are to be mounted there")


def has_task_cgroup(values: Mapping[str, str]) -> bool:
    """Whether TaskPlugin has task/cgroup among others."""
    return any(_is_cgroup(plugin, "task") for plugin in values.get("taskplugin", "").split(","))


def _is_cgroup(name: str, kind: str) -> bool:
    # Later releases of Slurm take "cgroup" for "task/cgroup".
    return name.strip().lower() in ("cgroup", f"{kind}/cgroup")


def _like(meant: str, words: Iterable[str], likeness: float) -> Optional[str]:
    """The one of ``words`` that is ``meant`` but for a letter or two."""
    return next(iter(difflib.get_close_matches(meant, sorted(words), 1, likeness)), None)


def _is_yes(values: Mapping[str, str], key: str) -> bool:
    return values.get(key, "no").lower() in ("yes", "true", "up", "1")
