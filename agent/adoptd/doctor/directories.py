"""The doctor's look at the directories of jobs that are plain cgroups: whether they are believed, and take a process.

Owns the table of states that the kernel shows of a cgroup and that stop a session in it, judged from facts. Changes
nothing. Called by the look at jobs.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, List, Mapping, Optional, Sequence, Tuple

from adoptd.config import JobsConfig
from adoptd.doctor.findings import FileRule, Finding, Grade, failure, fault_of, status_of
from adoptd.doctor.processes import read
from adoptd.hierarchy import read_hierarchies
from adoptd.jobs.template import JobPath, parse_leaf
from adoptd.model import Job

_DIRECTORIES_MAX = 256
_PARENT = FileRule("a directory", 0o022, stat.S_ISDIR)
# Controllers that a cgroup with processes may have for those below it (cgroup-v2.rst, Threads).
_THREADED = frozenset(("cpu", "cpuset", "perf_event", "pids"))
_FILES = (
    *("cgroup.type", "cgroup.subtree_control", "cgroup.events", "freezer.state"),
    *("cpuset.cpus", "cpuset.mems", "pids.max", "pids.current"),
)


@dataclass(frozen=True)
class DirectoryFacts:
    """Where a session of a job would be put, in one hierarchy.

    ``files``: what the kernel's say, by name, those that are there; None where there is no such directory.
    """

    path: str
    files: Optional[Mapping[str, str]]
    is_v1: bool = False

    def says(self, name: str) -> str:
        """What a file says; "" where it is not there."""
        return (self.files or {}).get(name, "")


@dataclass(frozen=True)
class _State:
    """What is wrong with a directory that is ``so``."""

    so: Callable[[DirectoryFacts], bool]
    grade: Grade
    seen: str
    remedy: str


def _has_lower_controllers(facts: DirectoryFacts) -> bool:
    return bool(set(facts.says("cgroup.subtree_control").split()) - _THREADED)


def _is_cpuset_empty(facts: DirectoryFacts) -> bool:
    names = ("cpuset.cpus", "cpuset.mems")
    return facts.is_v1 and any(name in (facts.files or {}) and not facts.says(name) for name in names)


def _is_full(facts: DirectoryFacts) -> bool:
    current, most = facts.says("pids.current"), facts.says("pids.max")
    return current.isdigit() and most.isdigit() and int(current) >= int(most)


_STATES: Tuple[_State, ...] = (
    _State(
        lambda facts: facts.files is None,
        Grade.FAILURE,
        "is not there, though its job is: nobody is adopted into it",
        "set [jobs] leaf to one that the job manager makes in every job, or take it out",
    ),
    _State(
        lambda facts: facts.says("cgroup.type") in ("domain invalid", "threaded"),
        Grade.FAILURE,
        "may not hold processes (cgroup.type): nobody is adopted into it",
        "have the job manager make it a domain, or set [jobs] leaf to a cgroup below it that may",
    ),
    _State(
        _has_lower_controllers,
        Grade.FAILURE,
        "has controllers for the cgroups below it (cgroup.subtree_control), so holds no process itself",
        "set [jobs] leaf to the cgroup below it that the job's processes are in",
    ),
    _State(
        _is_cpuset_empty,
        Grade.FAILURE,
        "has no CPUs or no memory nodes (cpuset.cpus, cpuset.mems), so takes no process",
        "have the job manager fill both, or set cgroup.clone_children above it",
    ),
    _State(
        lambda facts: "frozen 1" in facts.says("cgroup.events").splitlines(),
        Grade.WARNING,
        "is frozen: logins to it are refused until it runs again",
        "resume the job, or write 0 to cgroup.freeze there or above",
    ),
    _State(
        lambda facts: facts.says("freezer.state") in ("FROZEN", "FREEZING"),
        Grade.WARNING,
        "is frozen: logins to it are refused until it runs again",
        "resume the job, or write THAWED to freezer.state there or above",
    ),
    _State(
        _is_full,
        Grade.WARNING,
        "has as many processes as it may (pids.max): a login that is put there cannot start its shell",
        "raise pids.max of the jobs, or end some of its processes",
    ),
)


def judge_directories(found: Sequence[DirectoryFacts]) -> Iterator[Finding]:
    """One finding for each state that is met, with the first that is so."""
    for state in _STATES:
        met = [facts.path for facts in found if state.so(facts)]
        if met:
            yield Finding("jobs", state.grade, f"{met[0]}{_more(met)} {state.seen}", state.remedy)


def judge_refused(refused: Sequence[Tuple[str, str]], nobodys: Sequence[str], jobs: int) -> Iterator[Finding]:
    """Directories that are named as jobs' are: ``refused`` with what is wrong with them, ``nobodys`` where nothing says
    whose they are; they are something else where there are ``jobs`` besides."""
    if refused:
        path, fault = refused[0]
        seen = f"{path}{_more(refused)} is no job to the agent: {fault}"
        yield failure("jobs", seen, "have the job manager make them as root, a job's own its user's or root's")
    elif nobodys and not jobs:
        seen = f"{nobodys[0]}{_more(nobodys)} is nobody's job: it is root's, and [jobs] path has no {{uid}}"
        yield failure(
            "jobs", seen, "set a [jobs] path with {uid}, or have the job manager chown each job's to its user"
        )


def _more(found: Sequence[object]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def look_at_directories(section: JobsConfig, jobs: Sequence[Job]) -> Iterator[Finding]:
    """Of those that are believed, whether they take a process; of those that are not, why not."""
    template, leaf = JobPath.parse_template(section.path), parse_leaf(section.leaf)
    hierarchies = read_hierarchies()
    found: List[DirectoryFacts] = []
    for job in jobs[:_DIRECTORIES_MAX]:
        path = template.render(job.uid if template.has_uid else None, job.id)
        for each in hierarchies:
            top = Path(each.mount_point + path)
            facts = _facts(top.joinpath(*leaf), bool(each.controllers))
            # In this order: a job that ends meanwhile takes all of its directories with it.
            if top.is_dir():
                found.append(facts)
    yield from judge_directories(found)
    believed = {(job.uid if template.has_uid else None, job.id) for job in jobs}
    others = [each for each in _named(template) if each[1:] not in believed]
    faults = [
        (mount + template.render(uid, job_id), _fault(template, mount, uid, job_id)) for mount, uid, job_id in others
    ]
    refused = [(path, fault) for path, fault in faults if fault]
    yield from judge_refused(refused, [path for path, fault in faults if fault == ""], len(jobs))


def _facts(path: Path, is_v1: bool) -> DirectoryFacts:
    if not path.is_dir():
        return DirectoryFacts(str(path), None, is_v1)
    there = [name for name in _FILES if (path / name).exists()]
    return DirectoryFacts(str(path), {name: read(path / name).strip() for name in there}, is_v1)


def _fault(template: JobPath, mount: str, uid: Optional[int], job_id: str) -> Optional[str]:
    """What the agent has against a directory with a job's name: "" that nothing says whose it is; None nothing."""
    path = Path(mount)
    for name in ("", *template.parents(uid)):
        path = path / name
        fault = fault_of(status_of(str(path)), _PARENT)
        if fault is not None:
            return f"{path} {fault}, so its user could have made it" if "missing" not in fault else None
    status = status_of(str(path / template.job_name(job_id)))
    if status is None:
        return None
    if uid is None:
        return "" if status[1] == 0 else None
    return f"it is owned by uid {status[1]}" if status[1] not in (0, uid) else None


def _named(template: JobPath) -> Iterator[Tuple[str, Optional[int], str]]:
    """The directories that have a job's name, believed or not: mount point, uid and job id."""
    for mount, uid, names in _levels(template):
        for job_id in (template.job_of_name(name) for name in names):
            if job_id is not None:
                yield mount, uid, job_id


def _levels(template: JobPath) -> Iterator[Tuple[str, Optional[int], List[str]]]:
    """Each directory that jobs are in: mount point, whose jobs, and the names in it."""
    for mount in (each.mount_point for each in read_hierarchies()):
        uids: Sequence[Optional[int]] = [None]
        if template.has_uid:
            uids = [uid for uid in map(template.uid_of_name, _names(Path(mount, *template.fixed))) if uid is not None]
        for uid in uids:
            yield mount, uid, _names(Path(mount, *template.parents(uid)))


def names_beside(path: str) -> Tuple[List[str], List[str]]:
    """What is where jobs are to be: names that are as ``path`` says, and others."""
    template = JobPath.parse_template(path)
    levels = [names for _, _, names in _levels(template)]
    likely = [name for names in levels for name in names if template.job_of_name(name) is not None]
    others = [name for names in levels for name in names if template.job_of_name(name) is None]
    if template.has_uid:
        tops = [_names(Path(each.mount_point, *template.fixed)) for each in read_hierarchies()]
        others += [name for names in tops for name in names if template.uid_of_name(name) is None]
    return likely, others


def _names(directory: Path) -> List[str]:
    """The cgroups below, as many as are looked at."""
    try:
        with os.scandir(directory) as entries:
            found = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return sorted(found)[:_DIRECTORIES_MAX]
