"""A user who lets nobody read a process's memory, and what that may cost the agent, which reads environments."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from pathlib import Path
from typing import Iterator

import pytest

from adoptd import environment
from adoptd.environment import READERS_OF_ONE, environment_of
from adoptd.process import open_process
from lab.waiting import until

ALICE = 61001
PROGRAM = Path(__file__).with_name("hung_memory.py")
# How long the memory stays locked here is up to its user; nobody waits for it that long.
FAR_TOO_LONG_S = 30.0


@contextlib.contextmanager
def hung(directory: Path) -> Iterator[int]:
    """The pid of a process of alice's whose memory cannot be read."""
    if not Path("/dev/fuse").exists():
        text = "no FUSE in this kernel, so nobody can hold memory like this here"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    directory.mkdir()
    os.chown(directory, ALICE, ALICE)
    # As text on the command line: the tests' tree may be root's alone.
    argv = ["/usr/bin/python3", "-c", PROGRAM.read_text(), str(directory)]
    drop = ["setpriv", f"--reuid={ALICE}", f"--regid={ALICE}", "--clear-groups"]
    with subprocess.Popen(
        [*drop, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PATH": "/usr/bin", "A": "1"}, text=True
    ) as made:
        assert made.stdin is not None
        assert made.stdout is not None
        try:
            line = made.stdout.readline()
            assert line.startswith("READY"), "the memory is not held"
            yield int(line.split()[1])
        finally:
            made.stdin.close()
            made.kill()


@pytest.fixture
def reachable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory that alice can get to."""
    made = Path("/tmp") / f"adoptd-attack-{os.getpid()}"
    made.mkdir(mode=0o711)
    made.chmod(0o711)
    yield made
    for below in made.iterdir():
        below.rmdir()
    made.rmdir()


def test_memory_that_cannot_be_read_holds_nobody_up(reachable: Path) -> None:
    """More questions than the agent has threads: each is over, and other users' environments are read meanwhile."""
    with hung(reachable / "mnt") as pid, open_process(pid) as process:
        found = []
        asking = threading.Thread(
            target=lambda: found.extend(environment_of(process, ALICE) for _ in range(20)), daemon=True
        )
        asking.start()
        asking.join(FAR_TOO_LONG_S)
        assert not asking.is_alive(), "the agent waits for as long as a user likes"
        assert found == [None] * 20
        assert environment._Reader.under_way == {ALICE: READERS_OF_ONE}
        with open_process(os.getpid()) as ours:
            assert environment_of(ours, os.geteuid()), "another user's is not read"
    until(lambda: not environment._Reader.under_way, "the end of the readers, now that the memory is free")


def test_a_reader_that_hangs_keeps_no_descriptor_of_the_agent_s(reachable: Path) -> None:
    """It outlives SIGKILL: the ports and the instance's lock must be free for the next agent."""
    with hung(reachable / "mnt") as pid, open_process(pid) as process:
        assert environment_of(process, ALICE) is None
        (reader,) = [each for each in threading.enumerate() if isinstance(each, environment._Reader)]
        open_files = sorted(os.listdir(f"/proc/self/task/{reader.native_id}/fd"), key=int)
        shown = [os.readlink(f"/proc/self/task/{reader.native_id}/fd/{name}") for name in open_files if int(name) > 2]
        assert all(text.endswith(f"/{pid}/environ") for text in shown), shown
