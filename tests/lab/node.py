"""One node: starting processes in its namespaces and cgroup, its files, its daemons, its logs.

Every process it starts is in the run's cgroups before anything else and is told to die with its
parent, so that nothing can outlive the run. Called by nodes (the cluster) and by the scenarios.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Protocol, Sequence, Tuple

from lab import kernel
from lab.cgroups import Group
from lab.etc_files import MAPPED_PORT, ROOT, SSHD_PORT, User, pam_sshd
from lab.node_runner import SOURCE_IN_NODE
from lab.waiting import DEADLINE_S, PATIENCE, until

PYTHON = "/usr/bin/python3"
SSHD = "/usr/sbin/sshd"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
STOP_TIMEOUT_S = 5.0
# Where the host can, each kind of service has its own share of the CPU, as systemd's services have: otherwise the sshd
# of every connection would get as much as the one slurmd that all of them wait for.
CPU_SHARES = {"agent": 8192, "munged": 8192, "slurmctld": 1024, "slurmd": 8192, "sshd": 1024}
# Twenty logins at once keep two cores busy with key exchanges alone; the agent's answer is due in 300 ms all the same.
# Between sessions nice(2) counts for nothing: each is a group of its own with an equal share (sched(7), autogroup).
NICE_OF_SERVICES = -10
METRICS_URL = "http://127.0.0.1:9830/metrics"

_PAM_LINE = re.compile(r"\[(?P<pid>\d+)\]: pam_adopt\([^:]*:\w+\): (?P<text>.*)")
_KEY_VALUE = re.compile(r'(\w+)=("[^"]*"|\S*)')


@dataclass(frozen=True)
class PamRecord:
    """One line that pam_adopt.so logged: the process that wrote it, and its key=value pairs."""

    pid: int
    fields: Mapping[str, str]

    @property
    def ms(self) -> Optional[float]:
        """Duration of the phase in milliseconds, as the module measured it."""
        text = self.fields.get("ms")
        return None if text is None else float(text)


class LogTail:
    """What was added to a file since this was made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = path.stat().st_size if path.exists() else 0

    def lines(self) -> List[str]:
        """The lines that were added, complete ones only."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace").split("\n")[:-1]


class Place(Protocol):
    """Cgroups that a process can be started in: a job's, or a node's daemons'."""

    def procs_files(self) -> Tuple[str, ...]:
        """The files a process writes its pid to so as to enter, in order."""


@dataclass(frozen=True)
class Both:
    """Two places at once; where both have a hierarchy, the second is where the process ends up."""

    first: Place
    second: Place

    def procs_files(self) -> Tuple[str, ...]:
        return (*self.first.procs_files(), *self.second.procs_files())


def environment_of(user: User) -> Dict[str, str]:
    """What a process of this user's starts with."""
    return {"HOME": user.home, "USER": user.name, "LOGNAME": user.name, "PATH": PATH, "LANG": "C.UTF-8"}


def _go_first() -> None:
    # A container may lack CAP_SYS_NICE, a kernel the file; the scenarios work without, only closer to their limits.
    with contextlib.suppress(OSError):
        os.nice(NICE_OF_SERVICES)
        Path("/proc/self/autogroup").write_text(str(NICE_OF_SERVICES), encoding="ascii")


class Node:
    """A node whose namespaces exist: ``runner_pid`` is the process that holds them."""

    def __init__(self, name: str, ipv4: str, ipv6: str, runner_pid: int, group: Group, directory: Path) -> None:
        self.name = name
        self.ipv4 = ipv4
        self.ipv6 = ipv6
        self.runner_pid = runner_pid
        self.group = group
        self.system_group = group.child("system")
        self.directory = directory
        self._root = Path(f"/proc/{runner_pid}/root")
        self.cpu_group: Optional[Group] = None
        self.daemons: Dict[str, subprocess.Popen[bytes]] = {}
        # Entering a mount namespace leads to its root, which is not the node's where the clone itself is in a chroot.
        self._root_fd = os.open(self._root, os.O_PATH | os.O_DIRECTORY)
        kinds = (("uts", kernel.CLONE_NEWUTS), ("net", kernel.CLONE_NEWNET), ("mnt", kernel.CLONE_NEWNS))
        self._namespaces = [(os.open(f"/proc/{runner_pid}/ns/{name}", os.O_RDONLY), kind) for name, kind in kinds]

    # Files

    def path(self, inside: str) -> Path:
        """A path inside the node, as this process reaches it."""
        return self._root / inside.lstrip("/")

    def write(self, inside: str, text: str, mode: int = 0o644, owner: int = 0) -> None:
        """Replace a file in the node at once: sshd may be reading the old one."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        new.write_text(text, encoding="utf-8")
        os.chown(new, owner, owner)
        new.chmod(mode)
        new.replace(path)

    # Processes

    def entering(self, user: User, place: Optional[Place] = None, *, prompt: bool = False) -> Callable[[], None]:
        """What makes the process that calls it one of this node's: its cgroups, namespaces, root and user.

        ``place`` is where in the cgroups (default: where the node's daemons are). To be called between fork and exec.
        """
        procs_files = (place or self.system_group).procs_files()
        namespaces, root_fd = self._namespaces, self._root_fd

        def enter() -> None:
            for name in procs_files:
                file = os.open(name, os.O_WRONLY)
                os.write(file, b"0")
                os.close(file)
            for descriptor, kind in namespaces:
                kernel.setns(descriptor, kind)
            os.fchdir(root_fd)
            os.chroot(".")
            if prompt:
                _go_first()
            os.setgroups([])
            os.setgid(user.gid)
            os.setuid(user.uid)
            os.chdir("/")

        return enter

    def popen(
        self,
        argv: Sequence[str],
        *,
        user: User = ROOT,
        group: Optional[Place] = None,
        env: Optional[Mapping[str, str]] = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
        prompt: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Start a program in the node as ``user``, in the cgroup ``group`` (default: the node's daemons').

        ``prompt`` puts it before others when the CPU is short, as a service that logins wait for would be.
        Raises OSError or subprocess.SubprocessError if it cannot be started.
        """
        become = self.entering(user, group, prompt=prompt)

        def enter() -> None:
            try:
                become()
                kernel.die_with_parent(signal.SIGKILL)
                # Ignored by all that a shell starts in the background, us among them, and by what we start.
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            except OSError as error:
                os.write(2, f"{argv[0]} in a node: {error}\n".encode())
                raise

        environment = {**environment_of(user), **(env or {})}
        return subprocess.Popen(
            list(argv),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=environment,
            preexec_fn=enter,
            start_new_session=True,
        )

    def run(self, argv: Sequence[str], *, text: str = "", timeout_s: float = DEADLINE_S) -> str:
        """Run a program in the node as root and return its output. Raises RuntimeError with its errors if it fails."""
        with self.popen(argv, stdin=subprocess.PIPE) as process:
            try:
                out, err = process.communicate(text.encode(), timeout=timeout_s * PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        if process.returncode != 0:
            raise RuntimeError(f"{self.name}: {' '.join(argv)}: {err.decode(errors='replace').strip()}")
        return out.decode(errors="replace")

    # Daemons

    def start_daemon(
        self,
        name: str,
        argv: Sequence[str],
        *,
        user: User = ROOT,
        env: Optional[Mapping[str, str]] = None,
        prompt: bool = False,
    ) -> subprocess.Popen[bytes]:
        place: Place = self.system_group
        if self.cpu_group is not None and name in CPU_SHARES:
            share = self.cpu_group.child(name).make()
            (share.directories()[0] / "cpu.shares").write_text(str(CPU_SHARES[name]), encoding="ascii")
            place = Both(self.system_group, share)
        with self.path(f"/var/log/{name}.log").open("ab") as log:
            process = self.popen(
                argv, user=user, group=place, env=env, stdout=log.fileno(), stderr=log.fileno(), prompt=prompt
            )
        self.daemons[name] = process
        return process

    def _until(self, name: str, question: str, ready: bool) -> Optional[bool]:
        code = self.daemons[name].poll()
        if code is not None:
            last = "\n".join(
                line
                for log in ("syslog", f"{name}.log")
                for line in self.path(f"/var/log/{log}").read_text("utf-8", errors="replace").splitlines()[-10:]
            )
            raise RuntimeError(f"{self.name}: {name} ended with {code} before {question}:\n{last}")
        return ready or None

    def start_munged(self, user: User) -> None:
        """munged as its own user, on its usual socket: /run is the node's own."""
        files = {"key-file": "/etc/munge/munge.key", "log-file": "/var/log/munge/munged.log"}
        files.update({"pid-file": "/run/munge/munged.pid", "seed-file": "/run/munge/munged.seed"})
        arguments = [f"--{name}={path}" for name, path in files.items()]
        self.start_daemon("munged", ["/usr/sbin/munged", "--foreground", *arguments], user=user, prompt=True)

    def wait_munged(self) -> None:
        """Until munged's socket takes connections."""

        def connects() -> bool:
            with socket.socket(socket.AF_UNIX) as probe:
                return probe.connect_ex(str(self.path("/run/munge/munge.socket.2"))) == 0

        until(lambda: self._until("munged", "its socket was there", connects()), f"{self.name}: munged's socket")

    def start_sshd(self) -> None:
        """sshd on its own sockets, and `sshd -i` behind a dual-stack one."""
        self.start_daemon("sshd", [SSHD, "-D", "-f", "/etc/ssh/sshd_config"])
        inetd = [PYTHON, "-B", "-m", "lab.acceptor", str(MAPPED_PORT), SSHD, "-i", "-f", "/etc/ssh/sshd_config"]
        self.start_daemon("acceptor", inetd, env={"PYTHONPATH": f"{SOURCE_IN_NODE}/tests"})

    def wait_sshd(self) -> None:
        """Until both ports are being listened on."""

        def listening(port: int) -> bool:
            rows = Path(f"/proc/{self.runner_pid}/net/tcp6").read_text(encoding="ascii").splitlines()
            # proc(5), net/tcp: local address is the second column, state the fourth, 0A is LISTEN.
            return any(row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "0A" for row in rows[1:])

        until(lambda: self._until("sshd", "it listened", listening(SSHD_PORT)), f"{self.name}: port {SSHD_PORT}")
        until(lambda: self._until("acceptor", "it listened", listening(MAPPED_PORT)), f"{self.name}: {MAPPED_PORT}")

    def start_agent(self) -> None:
        """The agent, and wait until it says that it is ready (sd_notify)."""
        self.begin_agent()
        self.wait_agent()

    def begin_agent(self) -> None:
        """Start the agent without waiting for it."""
        address = self.directory / "notify"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._notify.bind(str(address))
        env = {"PYTHONPATH": f"{SOURCE_IN_NODE}/agent", "NOTIFY_SOCKET": str(address)}
        command = [PYTHON, "-B", "-m", "adoptd", "run", "--config", "/etc/adoptd/adoptd.toml"]
        self.start_daemon("agent", command, env=env, prompt=True)

    def wait_agent(self) -> None:
        """Until the agent that begin_agent() started is ready. Raises RuntimeError with its last words if it ends."""

        def ready() -> bool:
            try:
                return b"READY=1" in self._notify.recv(4096)
            except BlockingIOError:
                return False

        until(lambda: self._until("agent", "it was ready", ready()), f"{self.name}: READY=1 from the agent")

    def agent_is_up(self) -> bool:
        """Whether an agent was started here and has not ended."""
        return "agent" in self.daemons and self.daemons["agent"].poll() is None

    def stop(self, name: str) -> None:
        """SIGTERM, then SIGKILL, to one daemon; its children are the cgroup's business."""
        process = self.daemons.pop(name, None)
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if name == "agent":
            # Only now: its last word is that it is stopping.
            self._notify.close()
            (self.directory / "notify").unlink()

    def kill(self, name: str) -> None:
        """SIGKILL to one daemon, as a crash would end it."""
        process = self.daemons.pop(name, None)
        if process is not None:
            process.kill()
            process.wait()
            if name == "agent":
                self._notify.close()
                (self.directory / "notify").unlink()

    def close(self) -> None:
        """End the node's daemons. Its namespaces end with its runner, which is the cluster's."""
        # Slurm's steps are ended with the node's cgroups; its daemons take seconds to say goodbye.
        for name in ("slurmctld", "slurmd"):
            self.kill(name)
        for name in ("agent", "acceptor", "sshd", "munged"):
            self.stop(name)
        for descriptor in (self._root_fd, *[descriptor for descriptor, _ in self._namespaces]):
            os.close(descriptor)
        self._namespaces = []

    # What it says

    def set_pam(self, module: str, options: str, *, with_access: bool = False) -> None:
        """Rewrite the stack of the sshd service; the next login uses it."""
        self.write("/etc/pam.d/sshd", pam_sshd(module, options, with_access=with_access))

    def syslog(self) -> LogTail:
        """What is logged from now on."""
        return LogTail(self.path("/var/log/syslog"))

    def agent_log(self) -> LogTail:
        """What the agent logs from now on."""
        return LogTail(self.path("/var/log/agent.log"))

    def flush_syslog(self) -> None:
        """Wait until all that was logged is in the file: datagrams keep their order, so send one and wait for it."""
        tail, mark = self.syslog(), uuid.uuid4().hex
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect(str(self.path("/dev/log")))
            sender.send(f"<86>demo: mark {mark}".encode())
        until(lambda: any(mark in line for line in tail.lines()), f"{self.name}: the mark in the syslog")

    def pam_records(self, tail: LogTail) -> List[PamRecord]:
        """What pam_adopt.so logged since ``tail`` was made, everything up to now."""
        self.flush_syslog()
        matches = [_PAM_LINE.search(line) for line in tail.lines()]
        return [
            PamRecord(int(match["pid"]), {key: value.strip('"') for key, value in _KEY_VALUE.findall(match["text"])})
            for match in matches
            if match
        ]

    def metrics(self) -> List[str]:
        """The agent's metrics page, fetched from inside the node, by line."""
        fetch = f"import urllib.request as u; print(u.urlopen('{METRICS_URL}', timeout=30).read().decode())"
        return self.run([PYTHON, "-c", fetch]).splitlines()
