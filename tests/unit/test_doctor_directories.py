"""What doctor says of job directories: each state that the kernel shows of one, from facts and of a tree of files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import pytest
from judging import FAILURE, OK, WARNING, judged

from adoptd.config import JobsConfig
from adoptd.doctor import directories, jobs
from adoptd.doctor.directories import DirectoryFacts, judge_directories, judge_refused, names_beside
from adoptd.doctor.findings import Finding, Grade
from adoptd.hierarchy import Hierarchy, HierarchyKind
from adoptd.model import Job

PATH = "/jobs/uid_{uid}/job_{job}"
WELL = {
    "cgroup.type": "domain",
    "cgroup.subtree_control": "",
    "cgroup.events": "populated 1\nfrozen 0",
    "pids.max": "max",
    "pids.current": "7",
}


@pytest.mark.parametrize(
    ("change", "is_v1", "grade", "words"),
    [
        ({}, False, OK, ""),
        ({"cgroup.type": "domain threaded"}, False, OK, ""),
        ({"cgroup.type": "domain invalid"}, False, FAILURE, "may not hold processes"),
        ({"cgroup.type": "threaded"}, False, FAILURE, "may not hold processes"),
        ({"cgroup.subtree_control": "cpuset cpu pids"}, False, OK, ""),
        ({"cgroup.subtree_control": "cpu memory"}, False, FAILURE, "holds no process itself"),
        ({"cgroup.events": "populated 1\nfrozen 1"}, False, WARNING, "is frozen: logins to it are refused"),
        ({"freezer.state": "THAWED"}, True, OK, ""),
        ({"freezer.state": "FREEZING"}, True, WARNING, "is frozen"),
        ({"cpuset.cpus": "0-1", "cpuset.mems": ""}, True, FAILURE, "no memory nodes"),
        ({"cpuset.cpus": "0-1", "cpuset.mems": "0"}, True, OK, ""),
        # In v2 it has its parent's then.
        ({"cpuset.cpus": "", "cpuset.mems": ""}, False, OK, ""),
        ({"pids.max": "7"}, False, WARNING, "cannot start its shell"),
        ({"pids.max": "8"}, False, OK, ""),
    ],
)
def test_states(change: Dict[str, str], is_v1: bool, grade: Grade, words: str) -> None:
    """One file at a time."""
    found = list(judge_directories([DirectoryFacts("/c/job_7", {**WELL, **change}, is_v1)]))
    assert judged(found)[0] is grade, found
    assert words in judged(found)[1]


def test_many_of_one_state_are_one_finding() -> None:
    """With the first of them; and a leaf that is not there."""
    found = list(judge_directories([DirectoryFacts(f"/c/job_{job}/leaf", None) for job in range(9)]))
    (one,) = found
    assert "/c/job_0/leaf (and 8 more) is not there" in one.seen
    assert one.grade is FAILURE


@pytest.mark.parametrize(
    ("refused", "nobodys", "count", "grade"),
    [
        ([], [], 0, OK),
        ([("/c/7", "/c is owned by uid 9")], [], 3, FAILURE),
        ([], ["/c/system"], 0, FAILURE),
        # Something of the manager's own beside jobs that are believed.
        ([], ["/c/system"], 1, OK),
    ],
)
def test_refused(refused: Sequence[Tuple[str, str]], nobodys: Sequence[str], count: int, grade: Grade) -> None:
    """They are nobody's, and their users are turned away."""
    assert judged(list(judge_refused(refused, nobodys, count)))[0] is grade


@pytest.mark.parametrize(
    ("path", "parents", "likely", "others", "grade"),
    [
        (PATH, ["/c/jobs"], [], [], OK),
        (PATH, ["/c/jobs"], [], ["uid_alice"], WARNING),
        (PATH, ["/c/jobs"], ["job_7"], ["uid_alice"], OK),
        # systemd's directories have much in them that is no job.
        ("/system.slice/job-{job}.scope", ["/c/system.slice"], [], ["ssh.service"], OK),
        ("/job_{job}", ["/c"], [], ["system.slice"], OK),
        (PATH, [], [], [], WARNING),
    ],
)
def test_names(path: str, parents: Sequence[str], likely: Sequence[str], others: Sequence[str], grade: Grade) -> None:
    """A path that nothing is like is a path that is wrong."""
    assert judged(list(jobs.judge_no_directories(path, parents, likely, others)))[0] is grade


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hierarchy that is a directory, with one job."""
    tmp_path.chmod(0o755)
    found = [Hierarchy(HierarchyKind.V2, 0, (), str(tmp_path), tmp_path.stat().st_dev)]
    monkeypatch.setattr(directories, "read_hierarchies", lambda: found)
    made = tmp_path / "jobs/uid_60001/job_7"
    made.mkdir(parents=True)
    for name, text in WELL.items():
        (made / name).write_text(text + "\n")
    return tmp_path


def looked_at(leaf: str = "", job: Optional[Job] = None) -> List[Finding]:
    section = JobsConfig(path=PATH, leaf=leaf)
    return list(directories.look_at_directories(section, [Job("7", 60001, 1, (1,)) if job is None else job]))


def test_a_tree_that_is_well(tree: Path) -> None:
    """And one that is frozen, and one whose leaf is missing."""
    assert looked_at() == []
    (tree / "jobs/uid_60001/job_7/cgroup.events").write_text("populated 0\nfrozen 1\n")
    assert judged(looked_at())[0] is WARNING
    assert "job_7/session is not there" in judged(looked_at("session"))[1]
    (tree / "jobs/uid_60001/job_7/session").mkdir()
    assert looked_at("session") == []


def test_a_tree_whose_jobs_are_not_believed(tree: Path) -> None:
    """The fault is named, of whichever directory has it; and of a job that has ended nothing is said."""
    assert looked_at(job=Job("9", 60001, 1, (1,))) == []
    parent, own = tree / "jobs/uid_60001", tree / "jobs/uid_60001/job_7"
    for path, uid, words in ((parent, 60001, "uid_60001 is owned by uid 60001"), (own, 60002, "owned by uid 60002")):
        os.chown(path, uid, -1)
        found = looked_at(job=Job("9", 60001, 1, (1,)))
        os.chown(path, 0, -1)
        assert (judged(found)[0], words in judged(found)[1]) == (FAILURE, True), found
    os.chown(own, 60001, -1)
    assert looked_at() == []


def test_names_of_a_tree(tree: Path) -> None:
    """As the path says, and others."""
    assert names_beside(PATH) == (["job_7"], [])
    (tree / "jobs/uid_alice").mkdir()
    assert names_beside(PATH) == (["job_7"], ["uid_alice"])
    assert names_beside("/jobs/{uid}/job_{job}") == ([], ["uid_60001", "uid_alice"])
    assert names_beside("/nowhere/{job}") == ([], [])
