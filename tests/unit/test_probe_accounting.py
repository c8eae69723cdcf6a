"""Who pays for the labels: the loader goes to the root of the memory controller's hierarchy, or says why not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Sequence

import pytest

from adoptd.probe.accounting import leave_memory_cgroup
from fake_cgroups import V2, FakeHost


@pytest.mark.parametrize(
    ("layout", "home"),
    [
        ([V2], V2),
        ([V2, "cpu,cpuacct", "memory"], "memory"),
        (["memory", "freezer"], "memory"),
        ([V2, "freezer", "name=systemd"], V2),
    ],
)
def test_the_root_that_is_gone_to(tmp_path: Path, layout: Sequence[str], home: str) -> None:
    """v1's, where the controller is there; the others are left alone."""
    host = FakeHost(tmp_path, layout)
    for root in host.roots.values():
        (root / "cgroup.procs").touch()
    assert leave_memory_cgroup(str(host.proc)) is None
    written = {label: (root / "cgroup.procs").read_text() for label, root in host.roots.items()}
    assert written == {label: str(os.getpid()) if label == home else "" for label in layout}


def test_why_it_stays_is_said(tmp_path: Path) -> None:
    """Nothing is mounted; or what is mounted cannot be written, as in many a container."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert leave_memory_cgroup(str(tmp_path / "nowhere")) is not None
    assert leave_memory_cgroup(str(FakeHost(tmp_path / "a", ["freezer"]).proc)) == (
        "no cgroup hierarchy with the memory controller is mounted"
    )
    host = FakeHost(tmp_path / "b", [V2])
    (host.roots[V2] / "cgroup.procs").mkdir()
    said = leave_memory_cgroup(str(host.proc))
    assert said == f"{host.roots[V2]}/cgroup.procs: Is a directory"
