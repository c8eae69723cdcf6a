"""A fleet in which every alert can be provoked: agents with a part to play each, logins that go on, and a Prometheus.

Owns the bringing up, who plays what, and the logins. The faults are faults.py's, what is expected the test's. Time in
Prometheus runs TIMES as fast as at a site (faster.py), so what lasts ten minutes there is to last ten seconds here; the
agents' self-test, every minute by default, is each second for the same reason.

A login is the account phase here (real libpam, the real module, a connection that a user's process in a job holds
open), one after the other, since sshd's key exchange would cost as much of the two cores as all the rest; sessions that
are moved or observed, and those of the healthy node, are sshd's.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from dashboards.faster import faster
from dashboards.fleet import Prometheus, as_committed
from lab.etc_files import ALICE, User
from lab.lab import Lab, Login
from lab.node import PYTHON, Node
from lab.nodes import SOURCE_DIR, Cluster
from lab.storm import CONFDIR
from lab.waiting import PATIENCE

# An hour at a site is a minute here.
TIMES = 60
CLUSTER, LOST_CLUSTER = "lab", "lost"
# Of an alert that names nobody.
EVERYBODY = "everybody"
# What each node is in this play; the first also has the Prometheus.
ROLES = (
    "source",
    "healthy",
    "killed",
    "gone",
    "dropping",
    "asking",
    "waiting",
    "disbelieving",
    "rekeyed",
    "unsealed",
    "broken",
    "mismatched",
    "flooded",
    "unprobed",
    "untested",
    "hung",
    "escaping",
    "leaking",
    "lost",
)
# It scrapes and evaluates once a second.
POLL_S = 0.5
_SERVICE = "provoked"
# A login that waited its 2 s for a source is to have time for its adoption all the same, on a machine without any.
_LOGIN_MS = 10_000
_DROP_IN = "/etc/adoptd/conf.d/90-provoked.toml"

# Holds a connection from its own job, and its port is what the node logged in to asks about. With a name, it becomes
# that user between socket() and connect(), as a service does that opens sockets for others.
_HOLDER = """
import os, pwd, socket, sys
address, port, become = sys.argv[1:]
held = socket.socket()
if become:
    user = pwd.getpwnam(become)
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
held.connect((address, int(port)))
sys.stdin.read()
"""


class Scene:
    """The fleet, up, scraped and healthy."""

    def __init__(self, lab: Lab, prometheus: Prometheus, jobs: Tuple[str, ...]) -> None:
        self.lab = lab
        self.prometheus = prometheus
        self.jobs = jobs
        self.since_s = time.time()
        # What goes on until the end: logins, and what they need.
        self.lasting = contextlib.ExitStack()
        self._program = str(lab.cluster.directory / "account")
        source = SOURCE_DIR / "tests" / "bench" / "account.c"
        subprocess.run(["gcc", "-O2", "-std=gnu11", "-D_GNU_SOURCE", "-o", self._program, source, "-lpam"], check=True)

    def node(self, role: str) -> Node:
        """The node that plays ``role``."""
        return self.lab.cluster.nodes[ROLES.index(role)]

    def instance(self, role: str) -> str:
        """What Prometheus calls its agent."""
        return f"{self.node(role).ipv4}:9830"

    def about(self, labels: Dict[str, str]) -> str:
        """Who an alert with these labels is about: a role, a cluster, or EVERYBODY."""
        for role in ROLES:
            if labels.get("instance") == self.instance(role):
                return role
        return labels.get("cluster", EVERYBODY)

    @property
    def targets(self) -> Dict[str, List[str]]:
        """What Prometheus is to scrape, by cluster."""
        here = [self.instance(role) for role in ROLES if role != "lost"]
        return {CLUSTER: here, LOST_CLUSTER: [self.instance("lost")]}

    def agent_pid(self, role: str) -> int:
        """Of the agent that runs there now."""
        return self.node(role).daemons["agent"].pid

    def begin_logins(
        self,
        to: str,
        source: str = "source",
        *,
        options: str = "",
        every_s: float = 0.5,
        socket_of: User = ALICE,
        number: int = 0,
    ) -> contextlib.ExitStack:
        """alice logs in at ``to`` again and again, over a connection from her job at ``source``, until the end.

        ``socket_of`` made the socket that she connected. ``number`` tells several such from each other. Returns what
        ends them before.
        """
        there, here = self.node(to), self.node(source)
        service = self.set_stack(to, source, options=options, every_s=every_s, number=number)
        # More rounds than there is time for.
        argv = [self._program, CONFDIR, service, ALICE.name, there.ipv4, "1000000"]
        quiet = subprocess.DEVNULL
        begun = self.lasting.enter_context(contextlib.ExitStack())
        driver = there.popen(argv, stdin=subprocess.PIPE, stderr=quiet)
        begun.callback(end, driver)
        assert driver.stdout is not None
        port = driver.stdout.readline().strip().decode()
        holder = here.popen(
            [PYTHON, "-c", _HOLDER, there.ipv4, port, "" if socket_of is ALICE else ALICE.name],
            user=socket_of,
            group=self.lab.kind.place(here, ALICE, self.jobs[0]),
            stdin=subprocess.PIPE,
            stdout=quiet,
            stderr=quiet,
        )
        begun.callback(end, holder)
        assert driver.stdin is not None
        driver.stdin.write(b"go\n")
        driver.stdin.flush()
        # Its lines are nobody's, and a full pipe would stop it.
        threading.Thread(target=driver.stdout.read, daemon=True).start()
        return begun

    def set_stack(
        self,
        to: str,
        source: str = "source",
        *,
        options: str = "",
        every_s: float = 0.5,
        module: Optional[str] = None,
        number: int = 0,
    ) -> str:
        """The PAM stack of those logins, from the next one on. Returns its service's name."""
        service = f"{_SERVICE}-{source}-{number}"
        words = f"service={service} timeout_ms={_LOGIN_MS} {options}"
        line = f"account required {module or self.lab.cluster.pam_module} {words}"
        # The pause is the stack's own, after the line that counts.
        text = f"{line}\naccount optional pam_exec.so quiet /bin/sleep {every_s}\n"
        self.node(to).write(f"{CONFDIR}/{service}", text)
        return service

    def login(self, to: str, user: User = ALICE) -> Login:
        """One login through sshd, from the first node."""
        return self.lab.login(to=self.node(to).name, user=user, job=self.jobs[0] if user is ALICE else None)

    def firing(self) -> List[Dict[str, Any]]:
        """The alerts that fire now, as Prometheus gives them."""
        found: List[Dict[str, Any]] = self.prometheus.get("/api/v1/alerts")["alerts"]
        return [each for each in found if each["state"] == "firing"]

    def value(self, expression: str) -> Optional[float]:
        """Of the one series that an expression has now; None if it has none."""
        found = self.prometheus.query([expression])[0]
        return float(found[0]["value"][1]) if found else None

    def configure(self, role: str, text: str) -> None:
        """The node's further configuration, read at the agent's next start or SIGHUP."""
        node = self.node(role)
        node.write(_DROP_IN, f'[metrics]\nlisten = "{node.ipv4}"\n[probe]\nself_test_interval_s = 1\n{text}')


def patiently(question: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Ask Prometheus until it is so, not more often than it can know better. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s * PATIENCE
    while not question():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout_s * PATIENCE:.0f} s: {what}")
        time.sleep(POLL_S)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill one, and let go of its pipes."""
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


# As its site has configured it; the faults of the others are made later.
_CONFIGURED = {"asking": "[callerid]\ntimeout_ms = 300\n"}


@contextlib.contextmanager
def scene() -> Iterator[Scene]:
    """The fleet, with two jobs of alice's on every node but one, until leaving."""
    with Cluster(len(ROLES)) as cluster, contextlib.ExitStack() as ending:
        lab = Lab(cluster)
        having = [node for role, node in zip(ROLES, cluster.nodes) if role != "broken"]
        jobs = ending.enter_context(lab.jobs(2, on=having))
        prometheus = Prometheus(cluster.nodes[0], "/run/prometheus")
        made = Scene(lab, prometheus, jobs)
        for role, node in zip(ROLES, cluster.nodes):
            lab.pam("action_unknown=newest", node=node)
            made.configure(role, _CONFIGURED.get(role, ""))
            node.stop("agent")
            node.begin_agent()
        for node in cluster.nodes:
            node.wait_agent()
        ending.callback(made.lasting.close)
        ending.callback(cluster.nodes[0].kill, "prometheus")
        prometheus.start(made.targets, lambda name: faster(as_committed(name), TIMES))
        yield made
