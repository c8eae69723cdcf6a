"""The standing lab as a command: up and down may be said again, and commands run in it as they would on a node."""

from __future__ import annotations

import os
import subprocess
from typing import Iterator

import pytest

from lab.leftovers import of_run
from lab.node import PYTHON
from lab.nodes import SOURCE_DIR

pytestmark = pytest.mark.timeout(120)

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{SOURCE_DIR}/agent:{SOURCE_DIR}/tests"}
# A name of this run's own: a developer may have a lab up.
NAME = f"t{os.getpid()}"


def _lab(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, "-B", "-m", "lab.standing", "--name", NAME, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, cwd="/", capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture(scope="module")
def up() -> Iterator[None]:
    """The lab, brought up by its own command."""
    try:
        done = _lab("up")
        assert done.returncode == 0, done.stderr
        yield
    finally:
        down = _lab("down")
    assert down.returncode == 0, down.stderr
    assert of_run(NAME) == []


def test_what_is_wrong_is_said() -> None:
    """Before it is up: nothing can be run in it, and taking it down again is fine."""
    assert _lab("run", "login", "true").returncode == 3
    assert _lab("status").returncode == 3
    assert _lab("down").returncode == 0
    assert _lab("up", "--nodes", "1").returncode == 2
    assert _lab("run", "login", "-u", "mallory", "true").returncode == 2


@pytest.mark.usefixtures("up")
def test_up_again_is_fine_but_not_otherwise() -> None:
    """The same lab stays; another number of nodes would need another one."""
    assert _lab("up").returncode == 0
    assert _lab("up", "--nodes", "3").returncode == 1


@pytest.mark.usefixtures("up")
def test_commands_run_on_nodes() -> None:
    """As root or as a user, with their own output and exit status, words kept apart."""
    assert _lab("run", "node2", "hostname; exit 7").stdout == "node2\n"
    assert _lab("run", "node2", "hostname; exit 7").returncode == 7
    assert _lab("run", "login", "-u", "alice", "sh", "-c", 'id -un; echo "$1"', "-", "two words").stdout == (
        "alice\ntwo words\n"
    )
    assert _lab("run", "node9", "true").returncode == 2
    assert _lab("run", "node1", "no-such-command", "x").returncode == 127


@pytest.mark.usefixtures("up")
def test_slurm_works_in_it() -> None:
    """A user's job runs on both nodes, and ssh from within it lands in it."""
    assert sorted(_lab("run", "login", "-u", "bob", "srun -N2 hostname").stdout.split()) == ["node1", "node2"]
    script = "srun -N2 -n1 ssh -o BatchMode=yes node2 'cat /proc/self/cgroup; echo job $SLURM_JOB_ID'"
    shown = _lab("run", "login", "-u", "alice", "salloc", "-N2", "sh", "-c", script)
    job = shown.stdout.rpartition("job ")[2].strip()
    assert f"/job_{job}/step_extern" in shown.stdout, shown.stdout + shown.stderr
    status = _lab("status")
    assert status.returncode == 0
    assert "idle" in status.stdout
