"""How the lab finds its cgroups: what a host may have mounted, and what /proc/PID/cgroup then says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Sequence, Tuple

import pytest

from lab.cgroups import Group, find_hierarchies, paths_of_process


def _mountinfo(tmp_path: Path, rows: Sequence[Tuple[str, str, str, str]]) -> Path:
    """A mountinfo of rows (directory, root, type, options); the directories are made."""
    lines = []
    for number, (name, root, kind, options) in enumerate(rows):
        (tmp_path / name).mkdir()
        lines.append(f"{number} 1 0:{number} {root} {tmp_path / name} rw,relatime - {kind} {kind} {options}")
    file = tmp_path / "mountinfo"
    file.write_text("\n".join(lines) + "\n", encoding="ascii")
    return file


def test_nothing_mounted_is_an_error_that_says_so(tmp_path: Path) -> None:
    """A host without cgroups cannot run the lab, and is told why."""
    with pytest.raises(RuntimeError, match="no cgroup hierarchy is mounted"):
        find_hierarchies(_mountinfo(tmp_path, [("run", "/", "tmpfs", "rw")]))


def test_a_mounted_subtree_is_left_alone(tmp_path: Path) -> None:
    """Its groups have other names there than in /proc/PID/cgroup."""
    rows = [("memory", "/docker/1", "cgroup", "rw,memory"), ("unified", "/", "cgroup2", "rw")]
    assert [h.name for h in find_hierarchies(_mountinfo(tmp_path, rows))] == ["v2"]


def test_hybrid_uses_v2_and_the_three_v1_controllers(tmp_path: Path) -> None:
    """v2 first. Controllers that need settings before a process can enter are left out, and second mounts of one."""
    rows = [
        ("memory", "/", "cgroup", "rw,memory"),
        ("cpuset", "/", "cgroup", "rw,cpuset"),
        ("systemd", "/", "cgroup", "rw,xattr,name=systemd"),
        ("pids", "/", "cgroup", "rw,pids"),
        ("again", "/", "cgroup", "rw,pids"),
        ("unified", "/", "cgroup2", "rw,nsdelegate"),
    ]
    found = find_hierarchies(_mountinfo(tmp_path, rows))
    assert [(h.name, h.mount.name) for h in found] == [("v2", "unified"), ("memory", "memory"), ("pids", "pids")]


def test_paths_of_a_process() -> None:
    """v1 rows by the controllers we use, v2 by its own row; the rest is not ours."""
    text = "9:name=systemd:/\n8:pids:/a/b\n4:memory,cpu:/m\n3:cpuset:/\n0::/with:colon\n"
    assert paths_of_process(text) == {"pids": "/a/b", "memory": "/m", "v2": "/with:colon"}


def test_removing_a_group_ends_what_is_in_it() -> None:
    """Processes in it and below are killed, in whichever hierarchy they are, and the directories are gone."""
    group = Group(find_hierarchies(), f"/adoptd-test-{os.getpid()}").make()
    below = group.child("below").make()
    with subprocess.Popen(["sleep", "600"]) as first, subprocess.Popen(["sleep", "600"]) as second:
        group.enter(first.pid)
        Path(below.procs_files()[-1]).write_text(str(second.pid), encoding="ascii")
        assert {first.pid, second.pid} <= group.pids()
        group.remove()
        assert (first.wait(10), second.wait(10)) == (-9, -9)
    assert not any(directory.exists() for directory in group.directories())
    group.remove()
