"""One cluster for all tests that only look at it."""

from __future__ import annotations

from typing import Iterator

import pytest

from lab.lab import Lab
from lab.nodes import SOURCE_DIR, Cluster


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
