"""Who pays for the labels on everybody's sockets: nobody's cgroup, whoever loaded the probe. Needs root and BPF."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Iterator, Tuple

import pytest

from adoptd import probe
from adoptd.hierarchy import HierarchyKind, read_hierarchies
from adoptd.probe.sources import find_sources

PACKAGE_ROOT = str(Path(probe.__file__).resolve().parents[2])
CONNECTIONS = 3000
# A label and what the kernel keeps beside it take some 300 bytes; charges are counted in batches of pages.
PAID_AT_LEAST = CONNECTIONS * 128
NOTICED = PAID_AT_LEAST // 4
# Both ends of each, and the test's own.
DESCRIPTORS = 2 * CONNECTIONS + 500


@pytest.fixture
def descriptors() -> Iterator[None]:
    """As many as the test opens: a login's shell has 1024."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(DESCRIPTORS, before[0])
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, before[1])))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def memory_cgroup() -> Iterator[Tuple[Path, Path]]:
    """A memory cgroup for this test, and the file that says how much the kernel has charged to it."""
    hierarchies = read_hierarchies()
    legacy = [each for each in hierarchies if "memory" in each.controllers]
    unified = [each for each in hierarchies if each.kind is HierarchyKind.V2]
    home = Path((legacy or unified)[0].mount_point)
    directory = home / f"adoptd-accounting-{os.getpid()}"
    directory.mkdir()
    try:
        yield directory, directory / ("memory.kmem.usage_in_bytes" if legacy else "memory.current")
    finally:
        directory.rmdir()


def load_from(directory: Path, pin_dir: Path) -> None:
    """Load the probe by a loader that was started in the cgroup."""
    command = [sys.executable, "-m", "adoptd.probe.loader", "load", "--pin-dir", str(pin_dir)]
    environment = {**os.environ, "PYTHONPATH": PACKAGE_ROOT}
    if not probe._interpreter().endswith(os.path.basename(sys.executable)):
        command[0] = probe._interpreter()
    done = subprocess.run(
        [*command, "--source-dir", str(find_sources())],
        env=environment,
        preexec_fn=lambda: (directory / "cgroup.procs").write_text(str(os.getpid())),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"charged" not in done.stdout


@pytest.mark.usefixtures("descriptors")
def test_labels_are_not_charged_to_where_the_loader_was_started(
    pin_dir: Path, memory_cgroup: Tuple[Path, Path]
) -> None:
    """A service with a memory limit would otherwise have the labels of a busy node refused."""
    directory, usage = memory_cgroup
    if not usage.exists():
        pytest.fail(f"{usage} is not there: the memory controller does not count what the kernel allocates here")
    load_from(directory, pin_dir)
    with probe.open_probe(pin_dir) as opened, contextlib.ExitStack() as stack:
        before, labelled = int(usage.read_text()), opened.counters()["labelled"]
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        for _ in range(CONNECTIONS):
            client = stack.enter_context(socket.socket())
            client.connect(listener.getsockname())
            stack.enter_context(listener.accept()[0])
        assert opened.counters()["labelled"] - labelled >= CONNECTIONS
        assert int(usage.read_text()) - before < NOTICED
