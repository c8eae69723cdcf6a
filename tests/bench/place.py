"""Where the measuring is done: a node in namespaces of its own, its jobs, its load, its agents.

Owns every process, cgroup and mount of a run. Mounts are in a mount namespace of the run, processes die
with it, and cgroups are named after it and removed at its end or, after a kill, by the next run. Must never
touch what it did not make. Used by the rows.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from adoptd.probe import mounts
from lab import kernel
from lab.cgroups import Group, find_hierarchies
from lab.waiting import until
from slurm.cluster import ALICE, SlurmCluster, remove_dead_runs
from slurm.holder import ADDRESS as NODE

ROOT = Path(__file__).resolve().parents[2]
# A tmpfs over a directory that every host has, in the run's own mount namespace: nothing is left of it.
WORK = Path("/mnt")
PIN_DIR = WORK / "bpf" / "adoptd"
# The node that sessions come from. The third is where one came from that has gone silent since.
SOURCE, SILENT = "10.67.0.2", "10.67.0.3"
UID = ALICE.uid

_CFLAGS = ("-O2", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror")
_PROGRAMS: Dict[str, Tuple[str, ...]] = {
    "load": (),
    "account": ("-lpam",),
    "asker": ("-l:libmunge.so.2", "-l:libcrypto.so.3"),
}
# Of 20,000 descriptors a process may have, a connection to itself takes two.
_CONNECTIONS_PER_PROCESS = 9000
# Of 10 KB each, both ends together.
CONNECTIONS_MAX = 1_000_000
_READY_S = 60.0

Process = subprocess.Popen  # the type needs a parameter that Python 3.8's did not have


@dataclass
class Agent:
    """A running agent. ``ready_s`` is from its start to its word that it serves."""

    name: str
    backend: str
    directory: Path
    process: subprocess.Popen[bytes]
    ready_s: float = 0.0

    @property
    def pam_socket(self) -> Path:
        """Where pam_adopt.so asks it."""
        return self.directory / "pam.sock"

    @property
    def log(self) -> Path:
        """What it writes to standard error."""
        return self.directory / "log"


class Place:
    """Use as a context manager. ``slurm`` is the cluster, or None; ``no_slurm`` says why then."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self.slurm: Optional[SlurmCluster] = None
        self.no_slurm = ""
        self._holder_pid = 0
        self._base = f"adoptd-bench-{os.getpid()}-{kernel.start_time_ticks(os.getpid())}"
        self.jobs = Group(find_hierarchies(), f"/{self._base}")

    def __enter__(self) -> Place:
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _build(self) -> None:
        _remove_dead_groups()
        remove_dead_runs()
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
        kernel.mount("bench", str(WORK), "tmpfs", data="mode=0755")
        self._stack.callback(kernel.unmount, str(WORK))
        (WORK / "bpf").mkdir()
        mounts.mount_bpffs(WORK / "bpf")
        self._stack.callback(kernel.unmount, str(WORK / "bpf"))
        self._stack.callback(self.jobs.remove)
        self.jobs.make()
        for name, libraries in _PROGRAMS.items():
            compile_program(name, libraries)
        self._start_node()
        for address in (SOURCE, SILENT):
            self.run(["ip", "addr", "add", f"{address}/24", "dev", "eth0"])
        # What a question leaves behind for a minute is not what a /proc scan is to be measured with.
        self.run(["sh", "-c", "echo 0 >/proc/sys/net/ipv4/tcp_max_tw_buckets"])
        self.run(["sh", "-c", "echo 65535 >/proc/sys/net/core/somaxconn"])
        # Before any connection that is asked about: of one older than the probe it knows less.
        self.probe("load")

    def probe(self, action: str) -> None:
        """Load or unload the probe that all agents of the run share."""
        config = WORK / "probe.toml"
        config.write_text(f'[probe]\npin_dir = "{PIN_DIR}"\n')
        self.run(["/usr/bin/python3", "-B", "-m", "adoptd", "probe", action, "--config", str(config)])

    def _start_node(self) -> None:
        missing = [name for name in ("slurmctld", "slurmd", "munged") if not _installed(name)]
        if missing:
            self.no_slurm = f"not installed: {', '.join(missing)}"
        else:
            cluster = SlurmCluster()
            try:
                self.slurm = self._stack.enter_context(cluster)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                self.no_slurm = f"Slurm does not come up here: {str(error).splitlines()[0]}"
        if self.slurm is not None and self.slurm._holder is not None:
            self._holder_pid = self.slurm._holder.pid
        else:
            self._holder_pid = self._start_plain_node()

    def _start_plain_node(self) -> int:
        """Namespaces like those of the Slurm node."""
        etc = WORK / "node" / "etc"
        etc.mkdir(parents=True)
        person = f"{ALICE.name}:x:{ALICE.uid}:"
        for name, more in (("passwd", f"{person}{ALICE.uid}::/:/bin/sh\n"), ("group", f"{person}\n"), ("hosts", "")):
            (etc / name).write_text((Path("/etc") / name).read_text() + more)
        process = self.start(
            [sys.executable, "-B", "-m", "slurm.holder", "bench", str(WORK / "node")], inside=False, python=True
        )
        self.first_line(process)
        return process.pid

    def command(self, argv: Sequence[str], inside: bool = True, uid: Optional[int] = None) -> List[str]:
        """``argv`` in the node's namespaces: its network, and with ``inside`` its mounts and host name too."""
        identity = [] if uid is None else ["-S", str(uid), "-G", str(uid)]
        rest = ["-m", "-u"] if inside else []
        return ["nsenter", "-t", str(self._holder_pid), "-n", *rest, *identity, "--", *argv]

    def environment(self) -> Dict[str, str]:
        """For what runs in the node."""
        found = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "PYTHONPATH": f"{ROOT}/agent:{ROOT}/tests"}
        return found if self.slurm is None else {**found, "SLURM_CONF": str(self.slurm.conf_file)}

    def run(self, argv: Sequence[str], inside: bool = False, timeout_s: float = 120.0) -> str:
        """Run to the end and return the output. Raises RuntimeError with its last words."""
        done = subprocess.run(
            self.command(argv, inside), env=self.environment(), capture_output=True, timeout=timeout_s, cwd="/"
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(argv[:3])}: {done.stderr.decode(errors='replace').strip()[-400:]}")
        return done.stdout.decode()

    def start(
        self,
        argv: Sequence[str],
        inside: bool = False,
        uid: Optional[int] = None,
        procs_files: Sequence[str] = (),
        python: bool = False,
        err: Optional[int] = None,
    ) -> subprocess.Popen[bytes]:
        """Start in the node (``python``: outside it), in the cgroups of ``procs_files``. It dies with the run."""

        def prepare() -> None:
            for name in procs_files:
                Path(name).write_text("0")
            kernel.die_with_parent(signal.SIGKILL)

        process = subprocess.Popen(
            list(argv) if python else self.command(argv, inside, uid),
            env=self.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=err,
            preexec_fn=prepare,
            cwd="/",
        )
        self._stack.callback(end, process)
        return process

    @staticmethod
    def first_line(process: subprocess.Popen[bytes]) -> str:
        """What a program says when it is ready. Raises RuntimeError if it ends or stays silent."""
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], _READY_S)[0]:
            raise RuntimeError(f"{process.args!r} says nothing")
        line = process.stdout.readline().decode()
        if not line:
            raise RuntimeError(f"{process.args!r} ended with status {process.wait()}")
        return line.strip()

    @contextlib.contextmanager
    def connections(self, count: int) -> Iterator[None]:
        """``count`` connections more on the node, over many processes, each from an address of its own."""
        with contextlib.ExitStack() as stack:
            started = []
            for index, first in enumerate(range(0, count, _CONNECTIONS_PER_PROCESS)):
                share = min(_CONNECTIONS_PER_PROCESS, count - first)
                argv = [str(WORK / "load"), "connections", str(share), f"127.1.{index // 250}.{index % 250 + 1}"]
                started.append(self.start(argv))
                stack.callback(end, started[-1])
            for process in started:
                self.first_line(process)
            yield

    @contextlib.contextmanager
    def processes(self, count: int, files: int = 10) -> Iterator[None]:
        """``count`` processes more, each with ``files`` open files."""
        process = self.start([str(WORK / "load"), "processes", str(count), str(files)])
        try:
            self.first_line(process)
            yield
        finally:
            end(process)

    def make_job(self, job: str) -> Group:
        """A job of the plain cgroup manager."""
        return self.jobs.child(f"uid_{UID}").child(f"job_{job}").make()

    def remove_jobs(self) -> None:
        """End all jobs of the plain cgroup manager."""
        self.jobs.child(f"uid_{UID}").remove()

    def client(self, procs_files: Sequence[str], source: str, port: int) -> Tuple[subprocess.Popen[bytes], int]:
        """A process of the user, in a job, connected from ``source`` to the node's ``port``. Returns its port."""
        argv = [str(WORK / "load"), "client", source, NODE, str(port)]
        process = self.start(argv, uid=UID, procs_files=procs_files)
        return process, int(self.first_line(process))

    def agent(self, name: str, listen: str, seal: str, backend: str = "cgroup", port: int = 6830) -> Agent:
        """A real agent, serving. Raises RuntimeError with the end of its log if it does not come to that."""
        directory = WORK / f"agent-{name}-{secrets.token_hex(2)}"
        directory.mkdir()
        (directory / "adoptd.toml").write_text(
            f'[agent]\npam_socket = "{directory}/pam.sock"\nuser_socket = "{directory}/user.sock"\n'
            f'node_name = "bench"\n[callerid]\nlisten = ["{listen}"]\nport = {port}\n{seal}\n'
            f'[probe]\npin_dir = "{PIN_DIR}"\n[metrics]\nenabled = false\n{self._jobs_section(backend)}'
        )
        argv = ["/usr/bin/python3", "-m", "adoptd", "run", "--config", str(directory / "adoptd.toml")]
        began = time.monotonic()
        with (directory / "log").open("wb") as log:
            process = self.start(argv, err=log.fileno())
        agent = Agent(name, backend, directory, process)

        def serving() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"agent {name}: {agent.log.read_text(errors='replace')[-400:]}")
            return " ready version=" in agent.log.read_text(errors="replace")

        until(serving, f"agent {name} to be ready")
        agent.ready_s = time.monotonic() - began
        return agent

    def _jobs_section(self, backend: str) -> str:
        if backend == "cgroup":
            return f'[jobs]\nbackend = "cgroup"\npath = "/{self._base}/uid_{{uid}}/job_{{job}}"\n'
        assert self.slurm is not None
        return (
            f'[jobs]\nbackend = "slurm"\nslurm_conf = "{self.slurm.conf_file}"\n'
            f'slurm_node_name = "{self.slurm.host}"\nslurm_spool_dir = "{self.slurm.spool}"\n'
        )

    def slurm_job_files(self, job_id: int) -> List[str]:
        """Where a process writes itself into the script's step of a Slurm job, in every hierarchy that has it."""
        assert self.slurm is not None
        found = []
        for mount in sorted(Path("/sys/fs/cgroup").iterdir()):
            step = mount / f"slurm_{self.slurm.host}" / f"uid_{UID}" / f"job_{job_id}" / "step_batch"
            if step.is_dir():
                task = step / "task_0"
                found.append(str((task if task.is_dir() else step) / "cgroup.procs"))
        return found


def compile_program(name: str, libraries: Sequence[str]) -> Path:
    """Build one of the C programs here. Raises RuntimeError with the compiler's words."""
    program = WORK / name
    source = Path(__file__).with_name(f"{name}.c")
    done = subprocess.run(["cc", *_CFLAGS, "-o", str(program), str(source), *libraries], capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name}.c: {done.stderr.decode(errors='replace').strip()[-400:]}")
    return program


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill one process that we started, if it is not gone yet."""
    if process.poll() is None:
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _installed(name: str) -> bool:
    return any(os.access(f"{directory}/{name}", os.X_OK) for directory in ("/usr/sbin", "/usr/bin", "/sbin", "/bin"))


def _remove_dead_groups() -> None:
    for hierarchy in find_hierarchies():
        for directory in hierarchy.mount.glob("adoptd-bench-*"):
            match = re.fullmatch(r"adoptd-bench-(\d+)-(\d+)", directory.name)
            if match and kernel.start_time_ticks(int(match[1])) != int(match[2]):
                Group(find_hierarchies(), f"/{directory.name}").remove()
