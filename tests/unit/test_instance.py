"""One agent at a time: the second is refused with the first one's pid, whatever order they start and end in."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import List

import pytest
from nobody import environment

from adoptd.instance import Instance
from adoptd.model import AdoptdError


def test_the_second_is_told_who_the_first_is(tmp_path: Path) -> None:
    """And the first keeps its lock, until it lets go and takes the name along."""
    pam = tmp_path / "pam.sock"
    first = Instance(pam)
    for _ in range(2):
        with pytest.raises(AdoptdError, match=f"running already: pid {os.getpid()} holds {pam}.lock"):
            Instance(pam)
    first.release()
    assert list(tmp_path.iterdir()) == []
    Instance(pam).release()


def test_the_lock_ends_with_a_killed_agent(tmp_path: Path) -> None:
    """The file is left, its lock is not; and a child that outlives the agent does not hold it."""
    pam = tmp_path / "pam.sock"
    code = (
        "import os, signal, subprocess, sys\nfrom pathlib import Path\nfrom adoptd.instance import Instance\n"
        "Instance(Path(sys.argv[1]))\nnull = subprocess.DEVNULL\n"
        "print(subprocess.Popen(['sleep', '60'], stdout=null, stderr=null, close_fds=False).pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(pam)], env=environment(), capture_output=True, text=True)
    child = int(ended.stdout)
    try:
        assert Path(f"{pam}.lock").exists()
        Instance(pam).release()
    finally:
        os.kill(child, 9)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("link", "cannot be opened: Too many levels of symbolic links"),
        ("fifo", "is no regular file"),
        ("mode", r"has owner \d+ and mode 0644, expected owner \d+ and mode 0600"),
        ("owner", "has owner 65534"),
        ("nowhere", "cannot be opened: No such file"),
    ],
)
def test_a_file_that_others_could_hold_is_no_lock(tmp_path: Path, kind: str, words: str) -> None:
    """Whoever can open it can lock it, and so keep the agent from starting."""
    pam = tmp_path / "pam.sock"
    lock = Path(f"{pam}.lock")
    if kind == "link":
        lock.symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(lock, 0o600)
    elif kind == "mode":
        lock.touch()
        lock.chmod(0o644)
    elif kind == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        lock.touch(0o600)
        os.chown(lock, 65534, 0)
    else:
        pam = tmp_path / "nowhere" / "pam.sock"
    with pytest.raises(AdoptdError, match=words):
        Instance(pam)
    assert not (tmp_path / "elsewhere").exists()


def test_of_many_at_once_one_wins_each_time(tmp_path: Path) -> None:
    """Claims and releases that race, the name coming and going: never two holders, never none that could."""
    pam, holders, most, wins = tmp_path / "pam.sock", [0], [0], [0]
    lock, faults = threading.Lock(), []

    def contend() -> None:
        for _ in range(200):
            try:
                held = Instance(pam)
            except AdoptdError as error:
                if "running already" not in str(error):
                    faults.append(str(error))
                continue
            with lock:
                holders[0] += 1
                most[0] = max(most[0], holders[0])
                wins[0] += 1
            with lock:
                holders[0] -= 1
            held.release()

    threads: List[threading.Thread] = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert most == [1]
    assert wins[0] > 0
    Instance(pam).release()
