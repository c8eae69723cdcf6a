"""Slurm on the nodes of a cluster: its files, its daemons, its client commands. Debian's own binaries, unmodified.

The controller is on the login node, a slurmd on every compute node. A node's NodeName carries the run, because
Slurm names its cgroups by it and these are the host's; its host name stays short. Called by nodes, and by
whoever starts jobs.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Set

from lab.etc_files import ROOT, User
from lab.node import Node
from lab.slurm_cgroups import StepGroup
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
from lab.waiting import until

# Debian's, so that they are what an agent finds without being told.
CONF_DIR = "/etc/slurm"
STATE_DIR = "/var/lib/slurm"
SPOOL_DIR = f"{STATE_DIR}/slurmd"
MUNGE_SOCKET = "/run/munge/munge.socket.2"
# A slurmd that was killed while the controller was busy with it is asked again after a minute.
NODES_UP_TIMEOUT_S = 100.0
JOB_TIMEOUT_S = 100.0
# What a job sees as its own /tmp is a directory here, on the node.
CONTAINER_DIR = "/run/job-containers"
CONTAINER_CONF = f"AutoBasePath=true\nBasePath={CONTAINER_DIR}\n"

_GRANTED = re.compile(rb"Granted job allocation (\d+)")


class SlurmDaemons:
    """Slurm of one run. ``login`` is the controller's node too."""

    def __init__(self, login: Node, nodes: Sequence[Node], run_id: str) -> None:
        self.login = login
        self.nodes = tuple(nodes)
        self.run_id = run_id

    # Files and daemons

    def name_of(self, node: Node) -> str:
        """The node's NodeName."""
        return f"{node.name}-{self.run_id}"

    def configure(self, account: User) -> None:
        """Write what the daemons read into every node. ``account`` is SlurmUser."""
        computes = [ComputeNode(self.name_of(node), node.name, node.ipv4) for node in self.nodes]
        conf = slurm_conf(
            (self.login.name, self.login.ipv4),
            computes,
            paths_file=f"{CONF_DIR}/paths.conf",
            munge_socket=MUNGE_SOCKET,
            cpus=os.cpu_count() or 1,
            memory_mb=memory_mb(),
            prolog_flags="contain,x11",
            # slurmd and its steps go first; what they start does not.
            extra=("JobContainerType=job_container/tmpfs", "PropagatePrioProcess=1"),
        )
        paths = DaemonFiles(SPOOL_DIR, f"{STATE_DIR}/slurmctld", "/run/slurm", "/var/log")
        for node in (self.login, *self.nodes):
            node.write(f"{CONF_DIR}/slurm.conf", conf)
            node.write(f"{CONF_DIR}/paths.conf", paths_conf(paths))
            node.write(f"{CONF_DIR}/cgroup.conf", CGROUP_CONF)
            node.write(f"{CONF_DIR}/job_container.conf", CONTAINER_CONF)
            for directory in (SPOOL_DIR, "/run/slurm", CONTAINER_DIR):
                node.path(directory).mkdir(exist_ok=True)
        # slurmctld is not root, so its log and pid file must be there and its own.
        state = self.login.path(f"{STATE_DIR}/slurmctld")
        state.mkdir(exist_ok=True)
        files = [self.login.path(name) for name in ("/var/log/slurmctld.log", "/run/slurm/slurmctld.pid")]
        for file in files:
            file.touch()
        for path in (state, *files):
            os.chown(path, account.uid, account.gid)
        self._account = account

    def start(self) -> None:
        """All of the daemons; munged must be up."""
        self.login.start_daemon("slurmctld", ["slurmctld", "-D"], user=self._account)
        for node in self.nodes:
            self.start_slurmd(node)

    def start_slurmd(self, node: Node) -> None:
        """One node's slurmd. It is given its NodeName, as a host with several of them gives each its own."""
        node.start_daemon("slurmd", ["slurmd", "-D", "-N", self.name_of(node)], prompt=True)

    def wait_up(self) -> None:
        """Until the controller would start jobs on every node. Raises RuntimeError with the daemons' last words."""
        self.wait(lambda: self._up() >= {self.name_of(node) for node in self.nodes}, "all nodes up", NODES_UP_TIMEOUT_S)

    def _up(self) -> Set[str]:
        rows = self.run(["sinfo", "-h", "-N", "-o", "%N %T"], check=False).splitlines()
        return {row.split()[0] for row in rows if row.split()[1] in ("idle", "mixed", "allocated")}

    # Commands

    def run(self, argv: Sequence[str], *, user: User = ROOT, node: Optional[Node] = None, check: bool = True) -> str:
        """A client command on the login node unless named, and its output. Raises RuntimeError if it fails."""
        with (node or self.login).popen(argv, user=user) as process:
            try:
                out, err = process.communicate(timeout=JOB_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        if check and process.returncode != 0:
            raise RuntimeError(f"{' '.join(argv)}: {err.decode(errors='replace').strip()}")
        return out.decode(errors="replace")

    def submit(self, user: User, nodes: Sequence[Node], *options: str, script: str = "exec sleep 1000") -> str:
        """Submit a batch job for exactly these nodes; its id. It may not have started yet."""
        where = (f"--nodes={len(nodes)}", f"--nodelist={','.join(self.name_of(node) for node in nodes)}")
        argv = [*batch_job(*where, *options, script=script)]
        return self.run(argv, user=user).strip()

    def allocate(self, user: User, nodes: Sequence[Node], *options: str) -> str:
        """An allocation on exactly these nodes, its id; its steps may not be there yet. Raises RuntimeError."""
        names = ",".join(self.name_of(node) for node in nodes)
        argv = ["salloc", "--no-shell", f"--nodes={len(nodes)}", f"--nodelist={names}", *options]
        with self.login.popen(argv, user=user) as process:
            assert process.stderr is not None
            said: List[bytes] = []
            for line in process.stderr:
                said.append(line)
                granted = _GRANTED.search(line)
                if granted:
                    # It would look every three seconds whether the nodes are ready; the allocation does not need it.
                    process.kill()
                    return granted[1].decode()
        raise RuntimeError(f"salloc: {b''.join(said).decode(errors='replace').strip()}")

    def wait_started(self, job: str, user: User, nodes: Sequence[Node]) -> None:
        """Until every node has the job's extern step, ready to take processes."""
        self.wait(lambda: all(self._has_started(job, user, node) for node in nodes), f"job {job} to start")

    def _has_started(self, job: str, user: User, node: Node) -> bool:
        place = self.extern(node, user, job)
        return self._socket(node, job).exists() and all(directory.is_dir() for directory in place.directories())

    def _socket(self, node: Node, job: str) -> Path:
        return node.path(f"{SPOOL_DIR}/{self.name_of(node)}_{job}.{EXTERN_STEP}")

    def cancel(self, *jobs: str) -> None:
        """scancel; the jobs may be ending already."""
        if jobs:
            self.run(["scancel", *jobs])

    def wait_gone(self, job: str, nodes: Sequence[Node]) -> None:
        """Until no node has a step of the job, and the controller has finished with it."""

        def gone() -> bool:
            return not any(list(node.path(SPOOL_DIR).glob(f"*_{job}.*")) for node in nodes)

        self.wait(gone, f"job {job} to end")

    def wait_idle(self) -> None:
        """Until the controller has finished with every job. A slurmd that is killed before leaves its node completing
        until it is asked again, a minute later."""
        self.wait(lambda: not self.run(["squeue", "-h", "-o", "%i"], check=False).strip(), "no job any more")

    def state_of(self, job: str) -> str:
        """The job's state in the controller's words, "" if it is forgotten."""
        return self.run(["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"], check=False).strip()

    # Where things are

    def extern(self, node: Node, user: User, job: str) -> StepGroup:
        """The cgroups of a job's extern step on a node."""
        return StepGroup(self.name_of(node), user.uid, job)

    def extern_daemon(self, node: Node, job: str) -> int:
        """The slurmstepd of a job's extern step. Raises RuntimeError if there is none."""
        for pid in node.group.pids():
            with contextlib.suppress(OSError):
                if f"slurmstepd: [{job}.extern]" in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
                    return pid
        raise RuntimeError(f"{node.name}: job {job} has no slurmstepd for its extern step")

    def wait(self, question: Callable[[], bool], what: str, timeout_s: float = JOB_TIMEOUT_S) -> None:
        """Until it is so. Raises RuntimeError with the daemons' last words if it does not come to be."""
        try:
            until(question, what, timeout_s)
        except TimeoutError as error:
            raise RuntimeError("\n".join([str(error), *self._last_words()])) from None

    def _last_words(self) -> List[str]:
        words = [f"nodes: {self.run(['sinfo', '-h', '-N', '-o', '%N %T %E'], check=False)!r}"]
        words.append(f"jobs: {self.run(['squeue', '-h', '-o', '%i %T %r %N'], check=False)!r}")
        for node, name in ((self.login, "slurmctld"), *((node, "slurmd") for node in self.nodes)):
            file = node.path(f"/var/log/{name}.log")
            if file.exists():
                words.append(f"{node.name}'s {name}:")
                words += file.read_text(errors="replace").splitlines()[-8:]
        return words
