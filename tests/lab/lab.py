"""What scenarios are told in: jobs, logins, and where a session landed.

Owns the words of the scenarios and their clean-up; knows nothing of what is expected. Where a session
landed is read inside the session, from its own /proc/self/cgroup, and never from what the agent says.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from dataclasses import dataclass
from typing import ContextManager, Iterator, List, Mapping, Optional, Sequence, Tuple

from lab.etc_files import ALICE, PAM_TIMEOUT_MS, User
from lab.job_kinds import CgroupJobs, JobKind
from lab.node import LogTail, Node, PamRecord
from lab.nodes import Cluster
from lab.slurm_jobs import SlurmJobs
from lab.waiting import DEADLINE_S, PATIENCE

# What a session is asked to say about itself.
REPORT = "hostname; cat /proc/self/cgroup"
LOGIN_TIMEOUT_S = DEADLINE_S * PATIENCE
NOBODY_IN = "denied"


@dataclass(frozen=True)
class Login:
    """One ssh login that has ended: how, and what the client printed."""

    landed: str  # "job 7 on node2", "no job on node2", "denied", or what went wrong
    errors: str  # what the user saw besides
    seconds: float


class Session:
    """An ssh client that was started and may still run."""

    def __init__(self, lab: Lab, process: subprocess.Popen[bytes]) -> None:
        self._lab = lab
        self._started = time.monotonic()
        self.process = process

    def end(self) -> Login:
        """Wait for the client to end. One that does not is killed and reported as such."""
        timed_out = False
        with self.process:
            try:
                out, err = self.process.communicate(timeout=LOGIN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                timed_out = True
                self.process.kill()
                out, err = self.process.communicate()
        errors = err.decode(errors="replace").strip()
        seconds = time.monotonic() - self._started
        if timed_out:
            return Login(f"no end within {LOGIN_TIMEOUT_S:.0f} s", errors, seconds)
        landed = self._lab.landed(out.decode(errors="replace"))
        # 255 is the client's own failure (ssh(1), EXIT STATUS), here a login that was refused.
        if self.process.returncode == 255 and landed is None:
            # An sshd that is gone, or a broken key, is no denial: the server must have closed after authentication.
            refused = "closed by" in errors.lower() or "permission denied" in errors.lower()
            return Login(NOBODY_IN if refused else f"no login: {errors}", errors, seconds)
        return Login(landed or f"no report (exit {self.process.returncode}): {errors}", errors, seconds)


class Lab:
    """A cluster that is up, and the jobs on it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.kind: JobKind
        if cluster.slurm is not None:
            self.kind = SlurmJobs(cluster.slurm)
        else:
            self.kind = CgroupJobs([hierarchy.name for hierarchy in cluster.group.hierarchies])

    @property
    def first(self) -> Node:
        """Where logins come from, unless a scenario says otherwise."""
        return self.cluster.nodes[0]

    @property
    def second(self) -> Node:
        """Where they go."""
        return self.cluster.nodes[1]

    # Jobs

    @contextlib.contextmanager
    def jobs(self, count: int, *, user: User = ALICE, on: Optional[Sequence[Node]] = None) -> Iterator[Tuple[str, ...]]:
        """New jobs of a user, oldest first, on both nodes unless named; ended and removed on leaving."""
        nodes = tuple(on) if on is not None else (self.first, self.second)
        ids = self.kind.start(count, user, nodes)
        try:
            yield ids
        finally:
            self.kind.end(ids, user, nodes)

    def broken_job(self, node: Node) -> ContextManager[str]:
        """A job of alice's that no process can be put into."""
        return self.kind.broken(node, self.login)

    # Logins

    def start_login(
        self,
        *,
        source: Optional[Node] = None,
        to: str = "",
        user: User = ALICE,
        process_user: Optional[User] = None,
        job: Optional[str] = None,
        job_of: Optional[User] = None,
        options: Sequence[str] = ("-o", "BatchMode=yes"),
        command: str = REPORT,
        env: Optional[Mapping[str, str]] = None,
    ) -> Session:
        """Start ``ssh user@to`` on ``source`` (the first node), as ``process_user``, inside a job or in none.

        ``to`` is a host name of the nodes, the second node by default. ``job_of`` owns the job, ``user`` by default.
        """
        node = source or self.first
        group = self.kind.place(node, job_of or user, job) if job is not None else None
        destination = f"{user.name}@{to or self.second.name}"
        argv = ["ssh", *options, destination, command]
        return Session(self, node.popen(argv, user=process_user or user, group=group, env=env))

    def login(
        self,
        *,
        source: Optional[Node] = None,
        to: str = "",
        user: User = ALICE,
        job: Optional[str] = None,
        job_of: Optional[User] = None,
        options: Sequence[str] = ("-o", "BatchMode=yes"),
        command: str = REPORT,
        env: Optional[Mapping[str, str]] = None,
    ) -> Login:
        """start_login(), and wait for its end."""
        return self.start_login(
            source=source, to=to, user=user, job=job, job_of=job_of, options=options, command=command, env=env
        ).end()

    def landed(self, report: str) -> Optional[str]:
        """Read a session's report: which job it is in, in every hierarchy. None if there is no report."""
        name, _, cgroups = report.partition("\n")
        node = next((node for node in self.cluster.hosts if node.name == name.strip()), None)
        if node is None or not cgroups.strip():
            return None
        try:
            job = self.kind.job_in(node, cgroups)
        except ValueError as torn:
            return f"{torn} on {node.name}"
        return f"no job on {node.name}" if job is None else f"job {job} on {node.name}"

    # Conditions

    def pam(self, options: str, *, node: Optional[Node] = None, with_access: bool = False) -> None:
        """Set the options of pam_adopt.so on a node, the second by default."""
        # Of an option that is there twice the last counts, so the scenario's own timeout_ms= does.
        words = f"timeout_ms={PAM_TIMEOUT_MS} {options}"
        (node or self.second).set_pam(self.cluster.pam_module, words, with_access=with_access)

    @contextlib.contextmanager
    def agent_down(self, node: Node) -> Iterator[None]:
        """No agent on this node, until leaving."""
        node.stop("agent")
        try:
            yield
        finally:
            if not node.agent_is_up():
                node.start_agent()

    @contextlib.contextmanager
    def agent_settings(self, node: Node, text: str) -> Iterator[None]:
        """The agent of this node with more configuration, until leaving."""
        file = "/etc/adoptd/conf.d/90-scenario.toml"
        node.write(file, text)
        node.stop("agent")
        try:
            node.start_agent()
            yield
        finally:
            node.path(file).unlink()
            node.stop("agent")
            node.start_agent()

    @contextlib.contextmanager
    def packets_dropped(self, node: Node, ports: str = "6830") -> Iterator[None]:
        """Packets to the agent's port on this node vanish (or to ``ports``, one or a range), as behind a firewall.

        By a routing rule, which needs no netfilter. It must come before the table of local addresses,
        so that table's own rule is moved down first.
        """
        # 6 is TCP: its name is known only where there is an /etc/protocols.
        rule = f"pref 10 iif eth0 ipproto 6 dport {ports} blackhole"
        families = ("-4", "-6")
        for family in families:
            node.run(["ip", family, "rule", "add", "pref", "100", "lookup", "local"])
            node.run(["ip", family, "rule", "add", *rule.split()])
            node.run(["ip", family, "rule", "del", "pref", "0"])
        try:
            yield
        finally:
            for family in families:
                node.run(["ip", family, "rule", "add", "pref", "0", "lookup", "local"])
                node.run(["ip", family, "rule", "del", "pref", "10"])
                node.run(["ip", family, "rule", "del", "pref", "100"])

    def pam_records(self, tail: LogTail, *, node: Optional[Node] = None, phase: str = "account") -> List[PamRecord]:
        """What pam_adopt.so logged for one phase since ``tail``, on a node (the second by default)."""
        records = (node or self.second).pam_records(tail)
        return [record for record in records if record.fields.get("phase") == phase]
