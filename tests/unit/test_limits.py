"""What a process may use: the least of all its cgroups, in the words of both interfaces, whatever the files say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, Mapping, Optional, Tuple

import pytest
from slurm_scene import Scene

from adoptd.hierarchy import CgroupMounts, Hierarchy, HierarchyKind
from adoptd.jobs.cgroup import CgroupJobs
from adoptd.jobs.template import JobPath
from adoptd.limits import as_list, limits_of
from fake_cgroups import V2 as V2_LABEL

V1, V2 = HierarchyKind.V1, HierarchyKind.V2


class FakeMounts(CgroupMounts):
    """Hierarchies that are directories of a test; this process is where it is told."""

    def __init__(self, hierarchies: Tuple[Hierarchy, ...], where: Optional[Mapping[int, str]]) -> None:
        super().__init__()
        self._given = hierarchies
        self._where = where

    def hierarchies(self) -> Tuple[Hierarchy, ...]:
        return self._given

    def membership(self, pid: int) -> Optional[Mapping[int, str]]:
        return self._where


def made(tmp_path: Path, kind: HierarchyKind, files: Dict[str, str], where: str) -> FakeMounts:
    """One hierarchy with these files; this process at ``where``."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="ascii")
    number = 0 if kind is V2 else 4
    return FakeMounts((Hierarchy(kind, number, (), str(tmp_path), 1),), {number: where})


def test_v2_the_least_on_the_way_up_counts(tmp_path: Path) -> None:
    """max is no limit; the job's own cgroup is what is counted as used, not a step's."""
    files = {
        "memory.max": "max\n",
        "job/memory.max": "1000000\n",
        "job/memory.current": "4096\n",
        "job/step/memory.max": "2000000\n",
        "job/step/memory.current": "1\n",
        "job/cpu.max": "50000 100000\n",
        "job/step/cpu.max": "max 100000\n",
        "job/pids.max": "max\n",
        "job/pids.current": "3\n",
        "job/step/pids.max": "77\n",
    }
    found = limits_of(os.getpid(), made(tmp_path, V2, files, "/job/step"), {0: "/job"})
    assert (found.memory_max, found.memory_used, found.cpus) == (1000000, 4096, 0.5)
    assert (found.pids_max, found.pids_used) == (77, 3)


def test_v1_has_the_same_under_other_names(tmp_path: Path) -> None:
    """The largest number there is, and -1, are no limit."""
    files = {
        "memory.limit_in_bytes": "9223372036854771712\n",
        "job/memory.limit_in_bytes": "568328192\n",
        "job/memory.usage_in_bytes": "8192\n",
        "cpu.cfs_quota_us": "-1\n",
        "cpu.cfs_period_us": "100000\n",
        "job/cpu.cfs_quota_us": "25000\n",
        "job/cpu.cfs_period_us": "100000\n",
    }
    found = limits_of(os.getpid(), made(tmp_path, V1, files, "/job/step_extern/task_1"), {4: "/job"})
    assert (found.memory_max, found.memory_used, found.cpus, found.pids_max) == (568328192, 8192, 0.25, None)


@pytest.mark.parametrize(
    "text", ["", "abc\n", "1 2 3\n", "-\n", "0x10\n", "\xff\n".encode("latin-1").decode("latin-1")]
)
def test_what_is_no_number_is_no_limit(tmp_path: Path, text: str) -> None:
    """Unknown, and neither 0 nor an error."""
    mounts = made(tmp_path, V2, {}, "/job")
    (tmp_path / "job").mkdir()
    for name in ("memory.max", "memory.current", "pids.max", "cpu.max"):
        (tmp_path / "job" / name).write_bytes(text.encode("latin-1"))
    found = limits_of(os.getpid(), mounts, {0: "/job"})
    assert (found.memory_max, found.memory_used, found.pids_max) == (None, None, None)
    assert found.cpus == len(os.sched_getaffinity(0))


def test_outside_its_cgroup_namespace_nothing_is_read(tmp_path: Path) -> None:
    """A path with .. in it leads nowhere."""
    (tmp_path / "above").mkdir()
    (tmp_path / "above" / "memory.max").write_text("1\n")
    mounts = made(tmp_path, V2, {"memory.max": "5\n"}, "/../above")
    assert limits_of(os.getpid(), mounts, {}).memory_max is None


def test_a_process_that_has_ended_has_no_limits() -> None:
    """None, in every field."""
    found = limits_of(4194304, FakeMounts((), None), {})
    assert set(vars(found).values()) == {None}


def test_of_this_very_process() -> None:
    """On the real cgroups of this host: what is found is what the kernel lets us run on."""
    found = limits_of(os.getpid(), CgroupMounts(), {})
    assert found.cpu_list == as_list(tuple(sorted(os.sched_getaffinity(0))))
    assert found.cpus is not None
    assert 0 < found.cpus <= len(os.sched_getaffinity(0))
    assert found.memory_max is None or found.memory_max > 0


@pytest.mark.parametrize(
    ("cpus", "text"), [((), ""), ((3,), "3"), ((0, 1, 2, 3), "0-3"), ((0, 2, 3, 8), "0,2-3,8"), ((0, 1), "0-1")]
)
def test_processors_as_the_kernel_writes_them(cpus: Tuple[int, ...], text: str) -> None:
    """Ranges and single ones."""
    assert as_list(cpus) == text


# ---- which cgroups are the job's, by each backend


def test_the_job_s_own_cgroup_among_plain_ones() -> None:
    """Above whatever the job has made for itself; none where the path is nobody's job."""
    jobs = CgroupJobs(JobPath.parse_template("/jobs/uid_{uid}/job_{job}"))
    where = {
        0: "/jobs/uid_5/job_7/session/x",
        3: "/jobs/uid_5/job_7",
        4: "/jobs/uid_5",
        6: "/",
        7: "/a/jobs/uid_5/job_7",
    }
    assert jobs.job_cgroups(where) == {0: "/jobs/uid_5/job_7", 3: "/jobs/uid_5/job_7"}


@pytest.mark.parametrize("layout", [("freezer", "memory"), (V2_LABEL,)])
def test_the_job_s_own_cgroup_among_slurm_s(tmp_path: Path, layout: Tuple[str, ...]) -> None:
    """That of all its steps, in whichever of them the process is."""
    with Scene(tmp_path, layout) as scene:
        for label in layout:
            scene.host.cgroup(scene.path(label, 17), only=[label])
        hierarchies = scene.host.mounts.hierarchies()
        assert len(hierarchies) == len(layout)
        for each in hierarchies:
            label = V2_LABEL if each.kind is V2 else each.controllers[0]
            for step in ("step_extern", "step_extern/user/task_0", "step_0/task_1", "step_batch"):
                found = scene.jobs.job_cgroups({each.number: scene.path(label, 17, step=step)})
                assert found == {each.number: scene.path(label, 17, step="").rstrip("/")}
            for path in ("/", "/system.slice", scene.path(label, 17, step="").rstrip("/")):
                assert scene.jobs.job_cgroups({each.number: path}) == {}
