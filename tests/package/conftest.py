"""The packages, built once for all tests from what git has here; and a fresh system with the Debian package in it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Iterator

import pytest

from bookworm import fresh_system
from package.installed import Installed

ROOT = Path(__file__).resolve().parents[2]


def _build(into: Path, kind: str) -> Path:
    done = subprocess.run(
        [ROOT / "packaging/build-packages", into, kind], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return Path(done.stdout.split()[0])


@pytest.fixture(scope="session")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package."""
    return _build(tmp_path_factory.mktemp("deb"), "deb")


@pytest.fixture(scope="session")
def rpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rpm; its source package is beside it."""
    return _build(tmp_path_factory.mktemp("rpm"), "rpm")


@pytest.fixture(scope="session")
def installed(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """A minimal Debian 12 in which the package was installed by apt, with what it depends on, and then sshd."""
    with fresh_system(tmp_path_factory.mktemp("debian")) as system:
        yield Installed.make(system, deb)
