"""Logins by the hundred while agents come and go: agents under an activator, account phases, what came of each.

A login of sshd's costs half a second of a core, nearly all of it key exchange, so most are the account phase alone:
real libpam, the real module, in a process that holds a real connection from inside a job. Owns the programs it
starts; knows nothing of what is expected. Used by the tests of what survives an agent.
"""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import List, Optional, Sequence, Tuple, Type

from lab.etc_files import ALICE
from lab.lab import Lab
from lab.node import PYTHON, Node
from lab.node_runner import SOURCE_IN_NODE
from lab.waiting import until

ROOT = Path(__file__).resolve().parents[2]
CALLERID_PORT = 6830
SERVICE = "storm"
CONFDIR = "/run/storm"

# Makes a connection for every "ADDRESS PORT" it reads, says its own port, and keeps them all.
_HOLDER = """
import socket, sys
held = []
print("ready", flush=True)
for line in sys.stdin:
    address, port = line.split()
    held.append(socket.create_connection((address, int(port))))
    print(held[-1].getsockname()[1], flush=True)
"""


class Activated:
    """A node's agent under the activator of the tests: its sockets stay, whatever becomes of it. A context manager."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._log = node.path("/var/log/activator.log")

    def __enter__(self) -> Activated:
        self._node.stop("agent")
        sockets = [
            ("pam", "/run/adoptd/pam.sock", 0, 0o600),
            ("user", "/run/adoptd/user.sock", 0, 0o666),
            ("callerid", "0.0.0.0", CALLERID_PORT, 0),
            ("callerid", "::", CALLERID_PORT, 0),
        ]
        agent = [PYTHON, "-B", "-m", "adoptd", "run", "--config", "/etc/adoptd/adoptd.toml"]
        env = {"PYTHONPATH": f"{SOURCE_IN_NODE}/agent:{SOURCE_IN_NODE}/tests"}
        before = self.ready_count()
        command = [PYTHON, "-B", "-m", "activator", json.dumps(sockets), "--", *agent]
        self._activator = self._node.start_daemon("activator", command, env=env, prompt=True)
        self._wait(before)
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._node.stop("activator")
        self._node.start_agent()

    def ready_count(self) -> int:
        """How many agents have been ready on this node so far."""
        return self._log.read_text("utf-8", errors="replace").count(" ready version=") if self._log.exists() else 0

    def end_agent(self, how: signal.Signals) -> None:
        """SIGHUP: ended in order; SIGUSR1: killed. Returns when the next one is ready."""
        before = self.ready_count()
        self._activator.send_signal(how)
        self._wait(before)

    def _wait(self, before: int) -> None:
        until(lambda: self.ready_count() > before, f"the next agent of {self._node.name}", 60.0)


@dataclass(frozen=True)
class Phase:
    """One account phase: libpam's return value, and how long it took."""

    job: str
    rc: int
    ms: float


class Storm:
    """Account phases on the lab's second node, over connections from processes inside jobs on its first."""

    def __init__(self, lab: Lab, jobs: Sequence[str], options: str) -> None:
        self._lab = lab
        self._jobs = tuple(jobs)
        self._lock = threading.Lock()
        self._holders: List[Tuple[str, subprocess.Popen[bytes], threading.Lock]] = []
        self.phases: List[Phase] = []
        program = lab.cluster.directory / "account"
        source = ROOT / "tests" / "bench" / "account.c"
        subprocess.run(["gcc", "-O2", "-std=gnu11", "-D_GNU_SOURCE", "-o", program, source, "-lpam"], check=True)
        self._program = str(program)
        line = f"account required {lab.cluster.pam_module} service={SERVICE} {options}\n"
        lab.second.write(f"{CONFDIR}/{SERVICE}", line)

    def __enter__(self) -> Storm:
        for job in self._jobs:
            place = self._lab.kind.place(self._lab.first, ALICE, job)
            process = self._lab.first.popen(
                [PYTHON, "-c", _HOLDER], user=ALICE, group=place, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self._holders.append((job, process, threading.Lock()))
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        for _, process, _ in self._holders:
            process.kill()
            process.communicate()

    def account(self, number: int, rounds: int) -> None:
        """``rounds`` logins one after the other over a connection of their own, from the job whose turn it is."""
        self.finish(self.begin(number, rounds))

    def begin(self, number: int, rounds: int) -> Tuple[str, subprocess.Popen[bytes]]:
        """The connection is made; its logins come with finish()."""
        job, holder, turn = self._holders[number % len(self._holders)]
        argv = [self._program, CONFDIR, SERVICE, ALICE.name, self._lab.second.ipv4, str(rounds)]
        driver = self._lab.second.popen(argv, stdin=subprocess.PIPE)
        assert driver.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout is not None
        port = driver.stdout.readline().strip()
        with turn:
            holder.stdin.write(self._lab.second.ipv4.encode() + b" " + port + b"\n")
            holder.stdin.flush()
            holder.stdout.readline()
        return job, driver

    def finish(self, begun: Tuple[str, subprocess.Popen[bytes]]) -> None:
        """The logins over a connection that begin() made. Raises RuntimeError if the driver fails."""
        job, driver = begun
        with driver:
            out, err = driver.communicate(b"go\n", timeout=300)
        if driver.returncode != 0:
            raise RuntimeError(f"account: {err.decode(errors='replace')}")
        with self._lock:
            for line in out.decode().splitlines():
                rc, nanoseconds = line.split()
                self.phases.append(Phase(job, int(rc), int(nanoseconds) / 1e6))
