"""Builds pam_adopt.so and its driver, plain and with ASan+UBSan; every test of the module runs with both."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Iterator

import pytest

from pam.pam_login import Build, Login, Stage

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def built() -> Iterator[Path]:
    """The build directory: one for each run of the tests, so that two runs do not meet."""
    assert os.geteuid() == 0, "the tests of the PAM module make namespaces: run them as root"
    with tempfile.TemporaryDirectory(prefix=f"adopt-build-{os.getpid()}-") as directory:
        command = ["make", "-j2", "-C", str(REPOSITORY / "pam_hook"), f"BUILD={directory}", "all", "asan", "drivers"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        yield Path(directory)


@pytest.fixture(params=["plain", "asan"])
def build(request: pytest.FixtureRequest, built: Path) -> Build:
    """Each build in turn."""
    place = built / "asan" if request.param == "asan" else built
    return Build(place / "pam_adopt.so", place / "driver")


@pytest.fixture(scope="session")
def forged_kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """forged_kernel.c, built: loaded into a driver, it says what FORGED tells it to."""
    made = tmp_path_factory.mktemp("forged") / "forged_kernel.so"
    source = Path(__file__).with_name("forged_kernel.c")
    subprocess.run(["cc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", made, source, "-ldl"], check=True)
    return made


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    """What the logins are played on."""
    made = Stage()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def login(build: Build, stage: Stage) -> Iterator[Login]:
    """A place to log in. Not pytest's tmp_path: a unix socket's path is 107 bytes at most."""
    directory = Path(tempfile.mkdtemp(prefix=f"adopt-{os.getpid()}-"))
    try:
        yield Login(build, directory, stage)
    finally:
        shutil.rmtree(directory)
