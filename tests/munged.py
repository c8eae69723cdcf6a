"""A munged for tests: a real one, with a key, socket and log of its own in a temporary directory.

Owns the daemon's life: it is ended by its own pid and its directory removed, whatever the test did to
it. Must never touch the host's munged. Used by every test that seals under MUNGE.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Optional

# munged comes up in 20 ms; the rest is for a machine that is busy with other tests.
_START_S = 60.0
_STOP_S = 30.0


@dataclass(frozen=True)
class Munged:
    """A running munged. ``socket`` is what goes into MungeSeal and munge_socket=."""

    socket: str
    key: bytes
    log: Path
    process: subprocess.Popen[bytes]

    def pause(self) -> None:
        """Stop it as a hung daemon would be: its socket accepts, nobody answers."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once, so that its socket stays behind with nobody listening."""
        self.process.kill()
        self.process.wait(_STOP_S)


@contextlib.contextmanager
def running_munged(key: Optional[bytes] = None, threads: int = 2) -> Iterator[Munged]:
    """A munged with ``key`` (64 random bytes if None); two with one key open each other's credentials.

    munged trusts no directory that others could write, and wants its socket's to be open to all, so each
    has its own. Nothing else is needed to run as root: in the foreground, --force is not.
    """
    key = os.urandom(64) if key is None else key
    base = Path(tempfile.mkdtemp(prefix=f"adoptd-munged-{os.getpid()}-"))
    try:
        base.chmod(0o755)
        private, public = base / "private", base / "run"
        private.mkdir(mode=0o700)
        public.mkdir()
        public.chmod(0o755)
        (private / "key").touch(mode=0o600)
        (private / "key").write_bytes(key)
        log = private / "log"
        with _started(private, public, log, threads) as process:
            munged = Munged(str(public / "socket"), key, log, process)
            _await_ready(munged)
            yield munged
    finally:
        shutil.rmtree(base)


@contextlib.contextmanager
def _started(private: Path, public: Path, log: Path, threads: int) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                "munged",
                "--foreground",
                f"--num-threads={threads}",
                f"--key-file={private / 'key'}",
                f"--seed-file={private / 'seed'}",
                f"--log-file={log}",
                f"--socket={public / 'socket'}",
                f"--pid-file={public / 'pid'}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.send_signal(signal.SIGCONT)  # a paused one would not hear the first signal
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(_STOP_S)


def _await_ready(munged: Munged) -> None:
    give_up_at = time.monotonic() + _START_S
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(munged.socket) == 0:
                return
        if munged.process.poll() is not None or time.monotonic() >= give_up_at:
            raise RuntimeError(f"munged did not come up: {munged.log.read_text(errors='replace')}")
        time.sleep(0.005)
