"""Cgroup paths of Slurm's jobs: look-alikes first, then every layout that slurmstepd has made."""

from __future__ import annotations

from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adoptd.hierarchy import HierarchyKind
from adoptd.jobs.slurm_paths import NamedJob, SlurmPaths, format_sluid, parse_job_id, parse_sluid

V1, V2 = HierarchyKind.V1, HierarchyKind.V2
PATHS = SlurmPaths("n1")
SLUID = "sEKNKTV3WPV500"
NUMBER = parse_sluid(SLUID)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (V1, "/"),
        (V1, ""),
        (V1, "/slurm"),
        (V1, "/slurm/uid_1001/job_5"),
        (V1, "/slurm/uid_1001/job_5/"),
        (V1, "/slurm/uid_1001/job_5/step_"),
        (V1, "/slurm/uid_1001/job_5/step_x"),
        (V1, "/slurm/uid_1001/job_5/step_extern2"),
        (V1, "/slurm/uid_1001/job_5/xstep_0"),
        (V1, "/slurm/uid_1001/job_5/step_0+"),
        (V1, "/slurm/uid_1001/job_0/step_0"),
        (V1, "/slurm/uid_1001/job_05/step_0"),
        (V1, "/slurm/uid_1001/job_-5/step_0"),
        (V1, "/slurm/uid_1001/job_+5/step_0"),
        (V1, "/slurm/uid_1001/job_5 /step_0"),
        (V1, "/slurm/uid_1001/job_5\n/step_0"),
        (V1, "/slurm/uid_1001/job_\u0665/step_0"),
        (V1, "/slurm/uid_1001/job_4294967295/step_0"),
        (V1, "/slurm/uid_1001/job_99999999999/step_0"),
        (V1, "/slurm/uid_/job_5/step_0"),
        (V1, "/slurm/uid_01/job_5/step_0"),
        (V1, "/slurm/uid_4294967295/job_5/step_0"),
        (V1, "/slurm/job_5/step_0"),
        (V1, f"/slurm/uid_1001/{SLUID}/step_0"),
        (V1, "/slurm_n2/uid_1001/job_5/step_0"),
        (V1, "/slurm_n1x/uid_1001/job_5/step_0"),
        (V1, "/slurmx/uid_1001/job_5/step_0"),
        (V1, "/user.slice/slurm/uid_1001/job_5/step_0"),
        (V1, "slurm/uid_1001/job_5/step_0"),
        (V1, "/slurm//uid_1001/job_5/step_0"),
        (V1, "/slurm/uid_1001/job_5/step_0/../../job_6/step_0"),
        (V1, "/../slurm/uid_1001/job_5/step_0"),
        (V1, "/system.slice/slurmstepd.scope/job_5/step_0"),
        (V2, "/slurm/uid_1001/job_5/step_0"),
        (V2, "/system.slice/slurmstepd.scope"),
        (V2, "/system.slice/slurmstepd.scope/system"),
        (V2, "/system.slice/slurmstepd.scope/job_5"),
        (V2, "/system.slice/slurmstepd.scope/uid_1001/job_5/step_0"),
        (V2, "/system.slice/n2_slurmstepd.scope/job_5/step_0/user/task_0"),
        (V2, "/system.slice/slurmstepd.scope.d/job_5/step_0"),
        (V2, "/slurmstepd.scope/job_5/step_0"),
        (V2, "/user.slice/user-1001.slice/user@1001.service/system.slice/slurmstepd.scope/job_5/step_0/user/task_0"),
        (V2, "/user.slice/slurmstepd.scope/job_5/step_0"),
        (V2, f"/system.slice/slurmstepd.scope/job_{SLUID}/step_0"),
        (V2, f"/system.slice/slurmstepd.scope/{SLUID.lower()}/step_0"),
        (V2, f"/system.slice/slurmstepd.scope/{SLUID}0/step_0"),
        (V2, f"/system.slice/slurmstepd.scope/{SLUID[:-1]}/step_0"),
        (V2, "/system.slice/slurmstepd.scope/sGKNKTV3WPV500/step_0"),
        (V2, "/system.slice/slurmstepd.scope/sEKNKTV3WPV50O/step_0"),
    ],
)
def test_a_path_that_merely_looks_like_a_jobs_is_nobodys(kind: HierarchyKind, path: str) -> None:
    """Anchored at the root, whole components, canonical numbers, this node's name."""
    assert PATHS.parse(kind, path) is None


@pytest.mark.parametrize(
    ("kind", "path", "job_id", "sluid", "uid"),
    [
        # v1, 18.08 to 26.11: one tree per controller, a task's own cgroup only where jobacct_gather made one.
        (V1, "/slurm/uid_1001/job_5/step_extern", 5, None, 1001),
        (V1, "/slurm/uid_1001/job_5/step_batch", 5, None, 1001),
        (V1, "/slurm/uid_1001/job_5/step_batch/task_0", 5, None, 1001),
        (V1, "/slurm/uid_1001/job_5/step_interactive", 5, None, 1001),
        (V1, "/slurm/uid_0/job_5/step_0", 5, None, 0),
        (V1, "/slurm/uid_1001/job_5/step_4294967291", 5, None, 1001),
        (V1, "/slurm_n1/uid_1001/job_5/step_extern/task_0", 5, None, 1001),
        # Heterogeneous: each component of the job has an id of its own, a step's component follows a plus.
        (V1, "/slurm_n1/uid_1001/job_6/step_0+1/task_3", 6, None, 1001),
        # A process of the job may have made cgroups of its own below.
        (V1, "/slurm/uid_1001/job_5/step_0/anything/at all", 5, None, 1001),
        # v2, from 22.05.
        (V2, "/system.slice/slurmstepd.scope/job_5/step_extern/user/task_0", 5, None, None),
        (V2, "/system.slice/slurmstepd.scope/job_5/step_extern/user/task_special", 5, None, None),
        (V2, "/system.slice/slurmstepd.scope/job_5/step_extern/slurm", 5, None, None),
        (V2, "/system.slice/n1_slurmstepd.scope/job_5/step_batch/user/task_0", 5, None, None),
        (V2, "/system.slice/n1_slurmstepd.scope/job_4294967279/step_0+2/user/task_0", 4294967279, None, None),
        # v2, from 26.05.
        (V2, f"/system.slice/slurmstepd.scope/{SLUID}/step_extern/user/task_0", None, NUMBER, None),
        (V2, f"/system.slice/n1_slurmstepd.scope/{SLUID}/step_0/user/task_0", None, NUMBER, None),
    ],
)
def test_layouts(
    kind: HierarchyKind, path: str, job_id: Optional[int], sluid: Optional[int], uid: Optional[int]
) -> None:
    """Every layout of every release, with and without Slurm's build option for several slurmds on a host."""
    assert PATHS.parse(kind, path) == NamedJob(job_id, sluid, uid)


@pytest.mark.parametrize(
    ("setting", "path"),
    [
        ("batch.slice", "/batch.slice/slurmstepd.scope/job_5/step_0/user/task_0"),
        ("hpc-batch.slice", "/hpc-batch.slice/slurmstepd.scope/job_5/step_0/user/task_0"),
        ("hpc-batch.slice", "/hpc.slice/hpc-batch.slice/slurmstepd.scope/job_5/step_0/user/task_0"),
        ("/a.slice/b.slice/", "/a.slice/b.slice/n1_slurmstepd.scope/job_5/step_0/user/task_0"),
    ],
)
def test_the_slice_can_be_set(setting: str, path: str) -> None:
    """CgroupSlice; systemd puts one with dashes below its parents. The default is then no place of Slurm's."""
    paths = SlurmPaths("n1", slice=setting)
    assert paths.parse(V2, path) == NamedJob(5, None, None)
    assert paths.parse(V2, "/system.slice/slurmstepd.scope/job_5/step_0") is None


def test_the_v1_directory_can_be_set() -> None:
    """CgroupPrepend."""
    paths = SlurmPaths("n1", prepend="/hpc")
    assert paths.parse(V1, "/hpc_n1/uid_1/job_5/step_0") == NamedJob(5, None, 1)
    assert paths.parse(V1, "/slurm_n1/uid_1/job_5/step_0") is None


def test_a_node_name_is_no_pattern() -> None:
    """Whatever is in it stands for itself."""
    assert SlurmPaths("n.").parse(V1, "/slurm_n1/uid_1/job_5/step_0") is None


def test_where_an_extern_step_can_be() -> None:
    """Under either name of the directory above; in v2 also under the job's SLUID."""
    assert PATHS.extern_steps(V1, 1001, 5, NUMBER) == (
        "/slurm/uid_1001/job_5/step_extern",
        "/slurm_n1/uid_1001/job_5/step_extern",
    )
    assert PATHS.extern_steps(V2, 1001, 5, NUMBER) == (
        "/system.slice/slurmstepd.scope/job_5/step_extern",
        f"/system.slice/slurmstepd.scope/{SLUID}/step_extern",
        "/system.slice/n1_slurmstepd.scope/job_5/step_extern",
        f"/system.slice/n1_slurmstepd.scope/{SLUID}/step_extern",
    )


@given(st.integers(0, (1 << 64) - 1))
def test_sluids_are_read_as_they_are_written(value: int) -> None:
    """Fourteen characters, whatever the number."""
    text = format_sluid(value)
    assert len(text) == 14
    assert parse_sluid(text) == value


@given(st.text(max_size=40))
def test_any_text_is_a_path_or_none(text: str) -> None:
    """Hostile input ends in None, never in an error."""
    for kind in (V1, V2):
        for top in PATHS.tops(kind):
            PATHS.parse(kind, f"{top}/{text}")
    parse_job_id(text)
    parse_sluid(text)
