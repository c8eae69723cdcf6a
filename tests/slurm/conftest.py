"""One cluster for the whole module's tests: bringing it up takes less than a job takes to start."""

from __future__ import annotations

import os
import shutil
from typing import Iterator

import pytest

from lab.lab import Lab
from lab.nodes import Cluster
from slurm.cluster import SlurmCluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    """A controller and a compute node. A test that did not run proves nothing: where it counts, that is a failure."""
    missing = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name) is None]
    reason = f"not installed: {', '.join(missing)}" if missing else "not root" if os.geteuid() != 0 else ""
    if reason:
        text = f"the tests against the real Slurm cannot run here: {reason}"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    with SlurmCluster() as made:
        yield made


@pytest.fixture(scope="session")
def faults_lab() -> Iterator[Lab]:
    """A login node and two compute nodes with sshd and the agent, for what a fault does to a login."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sshd") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        text = f"the tests of faults cannot run here: {'not root' if not missing else 'not installed: ' + str(missing)}"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    with Cluster(slurm=True) as made:
        yield Lab(made)
