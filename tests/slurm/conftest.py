"""One cluster for the whole module's tests: bringing it up takes less than a job takes to start."""

from __future__ import annotations

import os
import shutil
from typing import Iterator

import pytest

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
