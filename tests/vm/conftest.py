"""One machine for all tests, with the package installed from what git has here."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Iterator

import pytest

from vm.cluster import ROOT, Cluster
from vm.image import image
from vm.machine import Machine


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The node of the package's and Slurm's own services."""
    dist = tmp_path_factory.mktemp("dist")
    built = subprocess.run(
        [ROOT / "packaging/build-packages", dist, "deb"], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr[-4000:]
    with Machine(image(), tmp_path_factory.mktemp("vm")) as machine:
        yield Cluster(machine, Path(built.stdout.split()[0]))
