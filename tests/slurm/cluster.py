"""A Slurm cluster of one node that is its own controller: real daemons, real munged, nothing of the host's.

Owns /run/adoptd-slurm-<id>, the cgroups of that name and Slurm's own below ``slurm_<id>``, and takes them all
away again, also those of a run that was killed. Everything is named by the run, so any number can be up at
once. Used by the live tests.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from adoptd.jobs.slurm_conf import HostView, SlurmConf, SlurmOverrides
from lab import kernel
from lab.cgroups import Group, find_hierarchies
from lab.slurm_cgroups import remove_slurm_cgroups
from lab.slurm_files import (
    CGROUP_CONF,
    EXTERN_STEP,
    ComputeNode,
    DaemonFiles,
    batch_job,
    memory_mb,
    paths_conf,
    slurm_conf,
)
from lab.started import Started
from lab.waiting import until
from slurm.holder import ADDRESS

TESTS = Path(__file__).resolve().parents[1]
RUN_PARENT = Path("/run")
PREFIX = "adoptd-slurm-"


@dataclass(frozen=True)
class User:
    """Somebody who submits jobs."""

    name: str
    uid: int


ALICE = User("alice", 60001)
BOB = User("bob", 60002)


class SlurmCluster(Started):
    """Use as a context manager: up with entering, gone with leaving."""

    def __init__(self) -> None:
        # The node's name is part of Slurm's v1 cgroup paths here, so it must be the run's own.
        self.host = f"n{os.getpid()}x{secrets.token_hex(2)}"
        self.run_dir = RUN_PARENT / f"{PREFIX}{self.host}"
        self.conf_file = self.run_dir / "etc" / "slurm.conf"
        self.spool = self.run_dir / "spool" / self.host
        self._group = _group(self.host)
        self._daemons: Dict[str, subprocess.Popen[bytes]] = {}
        self._holder: Optional[subprocess.Popen[bytes]] = None

    def conf(self) -> SlurmConf:
        """What an agent on this node would go by: found from slurm.conf and the host's name alone."""
        return SlurmConf(SlurmOverrides(conf_file=str(self.conf_file)), {}, HostView(host_name=f"{self.host}.test"))

    def run(self, argv: Sequence[str], user: Optional[User] = None, check: bool = True) -> str:
        """Run a client command on the node and return its output. Raises RuntimeError if it fails."""
        with self._popen(argv, user, subprocess.PIPE) as process:
            out, err = process.communicate(timeout=60)
        if check and process.returncode != 0:
            raise RuntimeError(f"{' '.join(argv)}: {err.decode(errors='replace').strip()}")
        return out.decode()

    def holder_pid(self) -> int:
        """The process whose namespaces the cluster is in."""
        assert self._holder is not None
        return self._holder.pid

    def submit(self, user: User, *options: str) -> int:
        """Submit a job that sleeps and return its id; it may not have started yet."""
        return int(self.run(batch_job(*options), user))

    def submit_started(self, user: User, *options: str) -> int:
        """As submit(), and wait until the job's extern step is there and its script runs."""
        job_id = self.submit(user, *options)
        self.wait(lambda: self.has_steps(job_id), f"job {job_id} to start")
        return job_id

    def has_steps(self, job_id: int) -> bool:
        """Whether the extern step of a job has its socket, and its batch step its processes."""
        extern = self.spool / f"{self.host}_{job_id}.{EXTERN_STEP}"
        return extern.exists() and bool(self.batch_pids(job_id))

    def batch_pids(self, job_id: int) -> List[int]:
        """The processes of a job's script."""
        for uid_dir in Path(f"/sys/fs/cgroup/freezer/slurm_{self.host}").glob("uid_*"):
            procs = uid_dir / f"job_{job_id}" / "step_batch" / "cgroup.procs"
            with contextlib.suppress(OSError):
                return [int(word) for word in procs.read_text().split()]
        return []

    def cancel(self, *job_ids: int) -> None:
        """scancel."""
        self.run(["scancel", *map(str, job_ids)])

    def wait_gone(self, job_id: int) -> None:
        """Until no step of the job has a socket."""
        self.wait(lambda: not list(self.spool.glob(f"{self.host}_{job_id}.*")), f"job {job_id} to end")

    def stop(self, name: str) -> None:
        """Kill one daemon by its pid; slurmd's steps live on, as they do on a real node."""
        process = self._daemons.pop(name)
        process.kill()
        process.wait()

    def start_slurmd(self) -> None:
        """slurmd, and wait until the controller has it."""
        self._daemon("slurmd", ["slurmd", "-D", "-f", str(self.conf_file)])
        self.wait(lambda: self._node_state() in ("idle", "mixed", "allocated"), "the node to be up")

    def wait(self, question: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        """Until it is so. Raises RuntimeError with the daemons' last words if it does not come to be."""
        try:
            until(question, what, timeout_s)
        except TimeoutError as error:
            texts = [f"{error}; node is {self._node_state()!r}"]
            for file in sorted(self.run_dir.glob("slurm*d.*")):
                texts += [f"{file.name}:", *file.read_text(errors="replace").splitlines()[-8:]]
            raise RuntimeError("\n".join(texts)) from None

    def close(self) -> None:
        """End and remove everything. May be called twice."""
        for name in list(self._daemons):
            self.stop(name)
        if self._holder is not None:
            self._holder.kill()
            self._holder.wait()
            if self._holder.stdout is not None:
                self._holder.stdout.close()
            self._holder = None
        remove_run(self.host)

    def _start(self) -> None:
        remove_dead_runs()
        etc = self.run_dir / "etc"
        etc.mkdir(parents=True)
        (self.run_dir / "owner").write_text(f"{os.getpid()} {kernel.start_time_ticks(os.getpid())}")
        (self.run_dir / "spool").mkdir()
        (self.run_dir / "state").mkdir()
        slurm = _account("slurm")
        os.chown(self.run_dir / "state", *slurm)
        # slurmctld is not root, so its log and pid file must be there and its own.
        for name in ("slurmctld.log", "slurmctld.pid"):
            (self.run_dir / name).touch()
            os.chown(self.run_dir / name, *slurm)
        munge = self._make_munge_directories()
        run = str(self.run_dir)
        conf = slurm_conf(
            (self.host, ADDRESS),
            [ComputeNode(self.host, self.host, ADDRESS)],
            paths_file=f"{run}/etc/paths.conf",
            munge_socket=str(munge / "socket"),
            cpus=os.cpu_count() or 1,
            memory_mb=memory_mb(),
        )
        self.conf_file.write_text(conf)
        (etc / "paths.conf").write_text(paths_conf(DaemonFiles(f"{run}/spool/%n", f"{run}/state", run, run)))
        (etc / "cgroup.conf").write_text(CGROUP_CONF)
        people = "".join(f"{u.name}:x:{u.uid}:{u.uid}::/:/bin/sh\n" for u in (ALICE, BOB))
        (etc / "passwd").write_text(Path("/etc/passwd").read_text() + people)
        (etc / "group").write_text(Path("/etc/group").read_text() + f"alice:x:{ALICE.uid}:\nbob:x:{BOB.uid}:\n")
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{ADDRESS} {self.host}\n")
        self._group.make()
        holder = [sys.executable, "-B", "-m", "slurm.holder", self.host, str(self.run_dir)]
        self._holder = subprocess.Popen(
            holder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(TESTS)}
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            raise RuntimeError("the cluster's namespaces could not be made (see above)")
        self._start_munged(munge)
        self._daemon("slurmctld", ["slurmctld", "-D", "-f", str(self.conf_file)], User("slurm", slurm[0]))
        self.start_slurmd()

    def _make_munge_directories(self) -> Path:
        """Where munged's socket will be; its key is in a directory that is root's alone."""
        (self.run_dir / "private").mkdir(mode=0o700)
        (self.run_dir / "private" / "key").write_bytes(secrets.token_bytes(64))
        (self.run_dir / "private" / "key").chmod(0o600)
        public = self.run_dir / "munge"
        public.mkdir()
        return public

    def _start_munged(self, public: Path) -> None:
        private = self.run_dir / "private"
        files = {"key-file": private / "key", "seed-file": private / "seed", "log-file": private / "log"}
        files.update({"socket": public / "socket", "pid-file": public / "pid"})
        self._daemon("munged", ["munged", "--foreground", *(f"--{name}={file}" for name, file in files.items())])

        def connects() -> bool:
            with socket.socket(socket.AF_UNIX) as probe:
                return probe.connect_ex(str(public / "socket")) == 0

        until(connects, "munged's socket")

    def _daemon(self, name: str, argv: Sequence[str], user: Optional[User] = None) -> None:
        with (self.run_dir / f"{name}.out").open("ab") as out:
            self._daemons[name] = self._popen(argv, user, out.fileno())

    def _popen(self, argv: Sequence[str], user: Optional[User], out: int) -> subprocess.Popen[bytes]:
        assert self._holder is not None
        procs_files = self._group.procs_files()

        def enter() -> None:
            for name in procs_files:
                Path(name).write_text("0")
            kernel.die_with_parent(signal.SIGKILL)

        identity = () if user is None else ("-S", str(user.uid), "-G", str(user.uid))
        command = ["nsenter", "-t", str(self._holder.pid), "-m", "-n", "-u", *identity, "--", *argv]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SLURM_CONF": str(self.conf_file), "LANG": "C.UTF-8"}
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, preexec_fn=enter, cwd="/"
        )

    def _node_state(self) -> str:
        return self.run(["sinfo", "-h", "-o", "%T"], check=False).strip().lower()


def remove_run(host: str) -> None:
    """Kill what is in a run's cgroups, remove them and its directory. Missing is fine, and so is twice."""
    _group(host).remove()
    remove_slurm_cgroups(host)
    shutil.rmtree(RUN_PARENT / f"{PREFIX}{host}", ignore_errors=True)


def remove_dead_runs() -> None:
    """Clear up after runs that were killed before they could."""
    for directory in RUN_PARENT.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):
            pid, start = (int(word) for word in (directory / "owner").read_text().split())
            if kernel.start_time_ticks(pid) != start:
                remove_run(directory.name[len(PREFIX) :])


def _group(host: str) -> Group:
    return Group(find_hierarchies(), f"/{PREFIX}{host}")


def _account(name: str) -> Tuple[int, int]:
    for line in Path("/etc/passwd").read_text().splitlines():
        fields = line.split(":")
        if fields[0] == name:
            return int(fields[2]), int(fields[3])
    raise RuntimeError(f"there is no user {name}: are the packages slurmctld and slurmd installed?")
