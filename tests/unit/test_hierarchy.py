"""Cgroup facts from text: mounts that show less than the whole are refused before whole ones are believed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adoptd import hierarchy
from adoptd.hierarchy import (
    CgroupMounts,
    Hierarchy,
    HierarchyKind,
    open_root,
    parse_membership,
    parse_mounts,
    path_of_id,
    read_hierarchies,
)
from adoptd.model import JobManagerError
from fake_cgroups import V2, FakeHost

OWN = "12:name=systemd:/\n4:memory:/a:b\n2:cpu,cpuacct:/\n0::/x\n"
V2_MOUNT = "41 31 0:38 / /sys/fs/cgroup/unified rw shared:9 master:1 - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "garbage",
        "41 31 0:38 / /sys/fs/cgroup rw cgroup2 cgroup2 rw",
        "41 31 0:38 /docker/1 /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
        "41 31 0:38 /.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
        "41 31 0:38 / /sys/fs/cgroup rw - tmpfs cgroup2 rw",
        "41 31 0:38 / /sys/fs/cgroup/hugetlb rw - cgroup cgroup rw,hugetlb",
        "41 31 0:38 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu",
    ],
)
def test_other_lines_are_no_hierarchy(line: str) -> None:
    """Parts of a hierarchy, other file systems, and controllers the kernel does not list for us."""
    assert parse_mounts(line + "\n", OWN) == []


def test_v2_is_known_from_its_mount_alone() -> None:
    """Number 0, and only the first " - " separates."""
    mounts = parse_mounts(V2_MOUNT, OWN)
    assert mounts == [Hierarchy(HierarchyKind.V2, 0, (), "/sys/fs/cgroup/unified", os.makedev(0, 38))]
    assert mounts[0].label == "v2"


def test_v1_takes_number_and_controllers_from_the_kernels_list() -> None:
    """Mount options that are no controllers do not matter; named hierarchies count."""
    mountinfo = (
        "33 31 0:30 / /c rw - cgroup cgroup rw,cpu,cpuacct\n"
        "35 31 0:32 / /m rw - cgroup cgroup rw,noprefix,memory,clone_children\n"
        "40 31 0:37 / /s rw - cgroup cgroup rw,xattr,release_agent=/lib/x,name=systemd\n"
    )
    assert [(each.number, each.label) for each in parse_mounts(mountinfo, OWN)] == [
        (2, "cpu,cpuacct"),
        (4, "memory"),
        (12, "name=systemd"),
    ]


def test_escapes_in_mount_points_are_decoded() -> None:
    """Space, tab, newline and backslash come as octal; other bytes as they are."""
    line = "41 31 0:38 / /a\\040b\\011c\\012d\\134e\\134040é rw - cgroup2 cgroup2 rw\n"
    assert parse_mounts(line, OWN)[0].mount_point == "/a b\tc\nd\\e\\040é"


def test_membership_keeps_colons_and_drops_removed_cgroups() -> None:
    """A removed cgroup is no cgroup, so its name cannot be taken for one made since."""
    text = "7:pids:/jobs/job_5 (deleted)\n4:memory:/a:b::c\n1:name=x:y:/z\n0::/\nnonsense\nx:y:/z\n"
    assert parse_membership(text) == {4: "/a:b::c", 1: "y:/z", 0: "/"}


def test_no_proc_is_an_error_not_an_empty_host(tmp_path: Path) -> None:
    """The path is in the message."""
    with pytest.raises(JobManagerError, match="mountinfo"):
        read_hierarchies(str(tmp_path))
    with pytest.raises(JobManagerError, match="mountinfo"):
        CgroupMounts(str(tmp_path)).hierarchies()


def test_a_failed_read_is_not_remembered(tmp_path: Path) -> None:
    """The next question reads again."""
    host = FakeHost(tmp_path, [V2])
    hidden = host.proc / "self" / "hidden"
    (host.proc / "self" / "cgroup").rename(hidden)
    with pytest.raises(JobManagerError):
        host.mounts.hierarchies()
    hidden.rename(host.proc / "self" / "cgroup")
    assert len(host.mounts.hierarchies()) == 1
    host.mounts.close()


def test_mounts_that_are_closed_or_dropped_leave_no_descriptor(tmp_path: Path) -> None:
    """A reload drops the old backend without closing it; a closed one may be asked again."""
    host = FakeHost(tmp_path, [V2])
    before = len(os.listdir("/proc/self/fd"))
    mounts = CgroupMounts(str(host.proc))
    for _ in range(3):
        assert len(mounts.hierarchies()) == 1
        mounts.close()
        mounts.close()
        assert len(os.listdir("/proc/self/fd")) == before
    assert len(mounts.hierarchies()) == 1
    del mounts
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_covered_or_missing_mount_is_passed_over(tmp_path: Path) -> None:
    """What is at the mount point must be of the mount's device; the next mount of the hierarchy serves."""
    host = FakeHost(tmp_path, [V2, "memory"])
    info = host.proc / "self" / "mountinfo"
    good = info.read_text()
    covered = f"39 31 0:0 / {tmp_path} rw - cgroup2 cgroup2 rw\n39 31 0:0 / {tmp_path}/none rw - cgroup2 cgroup2 rw\n"
    info.write_text(covered + good)
    assert [each.mount_point for each in read_hierarchies(str(host.proc))] == [
        str(host.roots[V2]),
        str(host.roots["memory"]),
    ]
    info.write_text(covered)
    assert read_hierarchies(str(host.proc)) == ()


def test_a_mount_that_went_away_is_an_error(tmp_path: Path) -> None:
    """The bare directory below it must not pass for a hierarchy without jobs."""
    gone = Hierarchy(HierarchyKind.V2, 0, (), str(tmp_path), tmp_path.stat().st_dev + 1)
    with pytest.raises(JobManagerError, match="no longer mounted"):
        open_root(gone)
    with pytest.raises(JobManagerError, match="no longer mounted"):
        path_of_id(gone, 1)
    with pytest.raises(JobManagerError, match="nowhere"):
        open_root(Hierarchy(HierarchyKind.V2, 0, (), str(tmp_path / "nowhere"), 1))


@pytest.mark.parametrize("cgroup_id", [-1, 0, 1 << 64])
def test_an_impossible_id_is_no_cgroup(tmp_path: Path, cgroup_id: int) -> None:
    """It is not handed to the kernel, where it would be cut to 64 bits."""
    host = FakeHost(tmp_path, [V2])
    assert path_of_id(host.mounts.hierarchies()[0], cgroup_id) is None
    host.mounts.close()


def test_a_process_that_is_gone_has_no_membership(tmp_path: Path) -> None:
    """None, as opposed to a process in no cgroup."""
    host = FakeHost(tmp_path, [V2, "memory"])
    assert host.mounts.membership(7) is None
    host.process(7, {"memory": "/x"})
    assert host.mounts.membership(7) == {0: "/", 2: "/x"}


def test_a_kernel_that_opens_another_cgroup_than_was_asked_for_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The id of what was opened is its inode; a handle of another generation may stand for another."""
    host = FakeHost(tmp_path, [V2])
    host.cgroup("/job")
    (unified,) = host.mounts.hierarchies()
    host.mounts.close()
    job = host.roots[V2] / "job"
    monkeypatch.setattr(hierarchy, "_open_by_id", lambda *_: os.open(job, os.O_PATH | os.O_DIRECTORY))
    before = len(os.listdir("/proc/self/fd"))
    assert path_of_id(unified, job.stat().st_ino + 1) is None
    assert path_of_id(unified, job.stat().st_ino) == "/job"
    assert len(os.listdir("/proc/self/fd")) == before
