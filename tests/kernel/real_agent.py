"""A real agent on this host, touching nothing but a directory, a bpffs and ports of the test's own.

Started as ``adoptd run`` or by the activator of the tests, asked over its users' socket, ended with the test. Owns no
expectation. Used by the tests of what survives an agent.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Type
from unittest import mock

import pytest

from adoptd import client
from adoptd.client import AgentError, ask_agent
from adoptd.model import Connection, Endpoint
from adoptd.wire.control import Command, Result
from lab import kernel
from lab.waiting import DEADLINE_S, PATIENCE, until
from ports import free_port

ROOT = Path(__file__).resolve().parents[2]
# The loader compiles for half a second; other tests may run beside this one.
PATIENCE_S = DEADLINE_S * PATIENCE
# The default, and what it is where everything takes longer.
CALLERID_TIMEOUT_MS = min(300 * PATIENCE, 10_000)


class RealAgent:
    """Use as a context manager: whatever runs at its end is ended. ``directory`` has a short path."""

    def __init__(self, directory: Path, pin_dir: Path, job_template: str, interval_s: int) -> None:
        self.directory = directory
        self.run = directory / "run"
        self.pam, self.user = self.run / "pam.sock", self.run / "user.sock"
        self.log = directory / "log"
        self.port, self.metrics_port = free_port(), free_port()
        self.config = directory / "adoptd.toml"
        self._sections = {
            "agent": f"pam_socket = '{self.pam}'\nuser_socket = '{self.user}'\nnode_name = 'n1'",
            "callerid": f"listen = ['127.0.0.1']\nport = {self.port}\ntimeout_ms = {CALLERID_TIMEOUT_MS}",
            "seal": f"scheme = 'key'\nkey_file = '{directory}/key'",
            "jobs": f"backend = 'cgroup'\npath = '{job_template}'",
            "probe": f"pin_dir = '{pin_dir}'\nself_test_interval_s = {interval_s}",
            "metrics": f"port = {self.metrics_port}",
        }
        self.configure()
        key = directory / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(64))
        self.processes: List[subprocess.Popen[bytes]] = []
        self.activator: Optional[subprocess.Popen[bytes]] = None
        # adoptctl's own is for an agent that starts in a second.
        self._patient = mock.patch.object(client, "TIMEOUT_MS", PATIENCE_S * 1000.0)

    def __enter__(self) -> RealAgent:
        self._patient.start()
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], where: Optional[TracebackType]
    ) -> None:
        self._patient.stop()
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        if kind is not None and self.log.exists():
            sys.stderr.write(self.log.read_text(errors="replace"))

    def configure(self, **sections: str) -> None:
        """Write the configuration. ``sections`` are lines for tables, in place of those with the same keys."""
        text = ""
        for name, lines in self._sections.items():
            added = sections.get(name, "").splitlines()
            keys = {line.partition(" =")[0] for line in added}
            kept = [line for line in lines.splitlines() if line.partition(" =")[0] not in keys]
            text += "\n".join((f"[{name}]", *kept, *added, ""))
        self.config.write_text(text)

    @property
    def command(self) -> Sequence[str]:
        """``adoptd run``, as this test's interpreter has it."""
        return [sys.executable, "-B", "-m", "adoptd", "run", "--config", str(self.config)]

    def spawn(self, env: Optional[Mapping[str, str]] = None, prefix: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start one, not waited for; its log goes to the common one."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*prefix, *self.command],
                env={**os.environ, "PYTHONPATH": f"{ROOT}/agent", **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd="/",
                preexec_fn=lambda: kernel.die_with_parent(signal.SIGKILL),
            )
        self.processes.append(process)
        return process

    def start(self, env: Optional[Mapping[str, str]] = None, prefix: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start one and wait until it is ready."""
        before = self.ready_count()
        process = self.spawn(env, prefix)
        until(lambda: self.ready_count() > before or process.poll() is not None, "an agent that is ready")
        assert process.poll() is None, self.log.read_text(errors="replace")[-800:]
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> int:
        """SIGTERM, and the exit status."""
        process.terminate()
        return process.wait(PATIENCE_S)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL, as a crash."""
        process.kill()
        process.wait()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The agent that was started last does nothing meanwhile: what is done in several steps is one to it."""
        with _stopped(self.processes[-1].pid):
            yield

    @contextlib.contextmanager
    def away(self, how: signal.Signals) -> Iterator[None]:
        """No agent meanwhile, after it was ended as by restart(); then the activator starts the next: wait for that."""
        assert self.activator is not None
        before = self.ready_count()
        parent = self.activator.pid
        (pid,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        with _stopped(parent):
            os.kill(int(pid), signal.SIGKILL if how is signal.SIGUSR1 else signal.SIGTERM)
            # Nobody has waited for it yet.
            until(lambda: _state(Path(f"/proc/{pid}")) == "Z", "the agent's end")
            yield
        until(lambda: self.ready_count() > before, "the next agent to be ready")

    def activate(self) -> None:
        """Have the activator hold the sockets and start the agent; wait until it is ready."""
        self.run.mkdir(exist_ok=True)
        spec = [
            ("pam", str(self.pam), 0, 0o600),
            ("user", str(self.user), 0, 0o666),
            ("callerid", "127.0.0.1", self.port, 0),
        ]
        before = self.ready_count()
        with self.log.open("ab") as log:
            self.activator = subprocess.Popen(
                [sys.executable, "-B", "-m", "activator", json.dumps(spec), "--", *self.command],
                env={**os.environ, "PYTHONPATH": f"{ROOT}/agent:{ROOT}/tests"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd="/",
                preexec_fn=lambda: kernel.die_with_parent(signal.SIGKILL),
            )
        self.processes.append(self.activator)
        until(lambda: self.ready_count() > before, "an agent that is ready")

    def restart(self, how: signal.Signals) -> None:
        """Have the activator end the agent (SIGHUP: in order, SIGUSR1: kill it) and start the next; wait for that."""
        assert self.activator is not None
        before = self.ready_count()
        self.activator.send_signal(how)
        until(lambda: self.ready_count() > before, "the next agent to be ready")

    def ready_count(self) -> int:
        """How many agents have been ready so far."""
        return self.lines(" ready version=")

    def lines(self, part: str) -> int:
        """How many lines of the log have this in them."""
        return self.log.read_text(errors="replace").count(part) if self.log.exists() else 0

    # What it says

    def status(self) -> Result:
        """``adoptctl status``."""
        return ask_agent(str(self.user), Command("status", {}))

    @property
    def probe(self) -> Dict[str, object]:
        """The probe's part of the status."""
        found = self.status()["probe"]
        assert isinstance(found, dict)
        return found

    def whois(self, connection: Connection) -> Result:
        """``adoptctl whois``."""
        arguments = {"source": str(connection.source), "destination": str(connection.destination)}
        return ask_agent(str(self.user), Command("whois", arguments))

    def answers(self) -> bool:
        """Whether an agent answers."""
        try:
            return self.status()["node"] == "n1"
        except AgentError:
            return False

    def metric(self, name: str) -> float:
        """The value of one series, by its whole name with labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as page:
            for line in page.read().decode().splitlines():
                if line.rpartition(" ")[0] == name:
                    return float(line.rpartition(" ")[2])
        raise AssertionError(f"no series {name}")


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[None]:
    """Neither the process nor any thread of it does anything meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        tasks = Path(f"/proc/{pid}/task")
        until(lambda: all(_state(task) == "T" for task in tasks.iterdir()), f"process {pid} stopped")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _state(process: Path) -> str:
    """Of a process or one of its threads, the letter of proc_pid_stat(5)."""
    return (process / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]


# Enters a cgroup, then makes a connection for every line it reads, and keeps them all.
_CONNECTS = """
import os, socket, sys
open(sys.argv[1], "w").write("0")
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen(4096)
held = []
print("ready", flush=True)
for line in sys.stdin:
    client = socket.create_connection(listener.getsockname())
    held += [client, listener.accept()[0]]
    print(client.getsockname()[1], client.getpeername()[1], flush=True)
"""


class JobProcess:
    """Root's job 7, as a job manager makes one, and a process in it that connects when it is told to."""

    ID = "7"

    def __init__(self, cgroup: Path) -> None:
        self.template = f"/{cgroup.name}/uid_{{uid}}/job_{{job}}"
        self._group = cgroup / "uid_0" / f"job_{self.ID}"
        self._group.mkdir(parents=True)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CONNECTS, str(self._group / "cgroup.procs")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        assert self._line() == "ready"

    def connect(self) -> Connection:
        """One more connection, which stays."""
        assert self._process.stdin is not None
        self._process.stdin.write("connect\n")
        self._process.stdin.flush()
        source, destination = self._line().split()
        return Connection(Endpoint.parse(f"127.0.0.1:{source}"), Endpoint.parse(f"127.0.0.1:{destination}"))

    def close(self) -> None:
        """End the process, and remove the job."""
        with self._process:
            self._process.kill()
        for directory in (self._group, self._group.parent):
            until(lambda gone=directory: _removed(gone), f"the end of {directory}")

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def _removed(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        directory.rmdir()
    return not directory.exists()


@pytest.fixture
def job(cgroup: Path) -> Iterator[JobProcess]:
    """A job with a process in it."""
    made = JobProcess(cgroup)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def made_agent(pin_dir: Path, job: JobProcess, interval_s: int) -> Iterator[RealAgent]:
    """An agent that is not started yet, in a directory of its own, with the jobs of ``job``."""
    # Not pytest's tmp_path: a unix socket's path is 107 bytes at most.
    directory = Path(tempfile.mkdtemp(prefix=f"adoptd-test-{os.getpid()}-"))
    try:
        with RealAgent(directory, pin_dir, job.template, interval_s) as made:
            yield made
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def agent(pin_dir: Path, job: JobProcess) -> Iterator[RealAgent]:
    """An agent with a pin directory of its own, which looks at nothing again by itself for a long time."""
    with made_agent(pin_dir, job, interval_s=3600) as made:
        yield made


@pytest.fixture
def settled_agent(shared_pin_dir: Path, job: JobProcess) -> Iterator[RealAgent]:
    """One that finds its probe loaded: for tests that are not about loading it, which takes longest."""
    with made_agent(shared_pin_dir, job, interval_s=3600) as made:
        yield made


@pytest.fixture
def watchful(pin_dir: Path, job: JobProcess) -> Iterator[RealAgent]:
    """One that looks at its probe every second."""
    with made_agent(pin_dir, job, interval_s=1) as made:
        yield made
