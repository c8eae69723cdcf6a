"""A bpffs of the test's own, a probe on it, and cgroups: made here, and gone afterwards.

No fixture acts unless asked for. Names carry the process id, so the tests run twice at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Iterator

import pytest

from adoptd import probe
from adoptd.model import ProbeError
from adoptd.probe import mounts
from adoptd.probe.pins import OpenProbe
from adoptd.probe.sources import find_sources
from kernel.cgroup_tree import Cgroups

_MNT_DETACH = 2


def _cannot(reason: str) -> None:
    """A test that did not run proves nothing: where it counts, that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"the kernel tests cannot run here: {reason}")
    pytest.skip(f"the kernel tests cannot run here: {reason}")


def _make_bpffs() -> Path:
    if os.geteuid() != 0:
        _cannot("not root")
    directory = Path(tempfile.mkdtemp(prefix=f"adoptd-test-{os.getpid()}-"))
    try:
        mounts.mount_bpffs(directory)
    except ProbeError as error:
        directory.rmdir()
        _cannot(f"BPF not permitted: {error}")
    return directory


def _remove_bpffs(directory: Path) -> None:
    ctypes.CDLL(None).umount2(os.fsencode(directory), _MNT_DETACH)
    directory.rmdir()


@pytest.fixture
def bpffs() -> Iterator[Path]:
    """An empty bpffs, mounted with mode 0700."""
    directory = _make_bpffs()
    try:
        yield directory
    finally:
        _remove_bpffs(directory)


@pytest.fixture
def pin_dir(bpffs: Path) -> Iterator[Path]:
    """Where a probe may be pinned; whatever is pinned there is detached before the bpffs goes."""
    directory = bpffs / "adoptd"
    try:
        yield directory
    finally:
        if directory.is_dir() and not directory.is_symlink():
            os.chown(directory, 0, 0)
            directory.chmod(0o700)
            probe.unload(directory)


@pytest.fixture(scope="module")
def shared_pin_dir() -> Iterator[Path]:
    """A loaded probe that a module's tests share. They must not change it."""
    bpffs = _make_bpffs()
    try:
        probe.load(bpffs / "adoptd")
        try:
            yield bpffs / "adoptd"
        finally:
            probe.unload(bpffs / "adoptd")
    finally:
        _remove_bpffs(bpffs)


@pytest.fixture
def opened(shared_pin_dir: Path) -> Iterator[OpenProbe]:
    """The shared probe, opened."""
    with probe.open_probe(shared_pin_dir) as found:
        yield found


@pytest.fixture
def other_sources(tmp_path: Path) -> Path:
    """The probe's sources with one comment more: the same probe of another schema."""
    copy = tmp_path / "bpf"
    shutil.copytree(find_sources(), copy)
    with (copy / "probe.c").open("a") as program:
        program.write("/* another release */\n")
    return copy


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A fresh group in the version 2 hierarchy, mounted for the test where the host has none mounted."""
    if os.geteuid() != 0:
        _cannot("not root")
    mounted = next((Path(m.point) for m in mounts.mounts() if m.fstype == "cgroup2" and m.root == "/"), None)
    private = None
    if mounted is None:
        private = mounted = Path(tempfile.mkdtemp(prefix=f"adoptd-test-{os.getpid()}-"))
        subprocess.run(["mount", "-t", "cgroup2", "none", str(private)], check=True)
    group = Path(tempfile.mkdtemp(prefix=f"adoptd-test-{os.getpid()}-", dir=mounted))
    try:
        yield group
    finally:
        group.rmdir()
        if private is not None:
            subprocess.run(["umount", str(private)], check=True)
            private.rmdir()


@pytest.fixture
def cgroups() -> Iterator[Cgroups]:
    """A tree of cgroups, gone afterwards; what the test opened and did not close fails it."""
    tree = Cgroups()
    before = len(os.listdir("/proc/self/fd"))
    try:
        yield tree
        assert len(os.listdir("/proc/self/fd")) - before - 2 * len(tree.children) <= 1
    finally:
        tree.close()
    assert not [label for label in tree.hierarchies if tree.at(label, tree.top).exists()]


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """What a test makes, undone in the opposite order at its end."""
    with contextlib.ExitStack() as opened:
        yield opened
