"""One cluster for all tests that only look at it; one for each file that breaks it, or that is about Slurm."""

from __future__ import annotations

import os
import shutil
from typing import Iterator

import pytest

from lab.lab import Lab
from lab.nodes import SOURCE_DIR, Cluster

_SLURM = ("slurmctld", "slurmd", "munged")


@pytest.fixture(scope="session", autouse=True)
def _built_module() -> None:
    assert (SOURCE_DIR / "pam_hook/build/pam_adopt.so").exists(), "build it first: make -C pam_hook"


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Two nodes as the demo has them."""
    with Cluster() as cluster:
        yield Lab(cluster)


@pytest.fixture(scope="session")
def other_lab() -> Iterator[Lab]:
    """Three nodes that see cgroup v2 only, and whose agents seal with a key file."""
    with Cluster(3, seal="key", hide_v1=True) as cluster:
        yield Lab(cluster)


@pytest.fixture(scope="module")
def patient() -> Iterator[Lab]:
    """A cluster of its own: others' must not be broken."""
    with Cluster() as cluster:
        yield Lab(cluster)


@pytest.fixture(scope="module")
def slurm_lab() -> Iterator[Lab]:
    """Two compute nodes and a login node. Tests that did not run prove nothing: where it counts, that is a failure."""
    missing = [name for name in _SLURM if shutil.which(name) is None]
    if missing:
        text = f"the tests on Slurm cannot run here: not installed: {', '.join(missing)}"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    with Cluster(slurm=True) as cluster:
        yield Lab(cluster)
