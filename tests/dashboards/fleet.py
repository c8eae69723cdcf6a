"""A fleet to look at: three nodes with agents, a real Prometheus that scrapes them, and traffic of every kind.

Owns the bringing up, the traffic, and the asking of Prometheus through its HTTP API. The second node's agent has no
probe and puts no session back, so that something is degraded; the third observes. Called by the live test and by the
preview; Prometheus and the impostor also by the fleet in which every alert is provoked.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import yaml

from adoptd.wire.pam import REQUEST_BYTES
from dashboards.board_file import DASHBOARDS
from lab.etc_files import ALICE, BOB
from lab.lab import Lab
from lab.node import Node
from lab.node_runner import SOURCE_IN_NODE
from lab.nodes import Cluster
from lab.waiting import until

SCRAPE_S = 1
PORT = 9090
RULE_FILES = ("rules.yml", "alerts.yml")
UNHEARD = "adoptd_callerid_unheard_peers > 0"
OUTSIDE = "adoptd_sessions_outside > 0"
_PYTHON = "/usr/bin/python3"

# Run inside the node: its network is not this process's. One request for each line, one reply for each.
_FETCH = """
import json, sys, urllib.parse, urllib.request
replies = []
for path, fields in json.load(sys.stdin):
    url = f"http://127.0.0.1:9090{path}?{urllib.parse.urlencode(fields)}"
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            replies.append(json.load(reply))
    except urllib.error.HTTPError as error:
        replies.append(json.load(error))
json.dump(replies, sys.stdout)
"""

_IMPOSTOR = """
import socket
door = socket.create_server(("", 6830))
while True:
    asker, _ = door.accept()
    asker.recv(4096)
    asker.sendall(b"\\0\\0\\0\\5hello")
    asker.close()
"""


def as_committed(name: str) -> str:
    """One of RULE_FILES."""
    return (DASHBOARDS / name).read_text(encoding="utf-8")


class Prometheus:
    """Debian's, in one of the nodes."""

    def __init__(self, node: Node, directory: str) -> None:
        self._node = node
        self._directory = directory

    def start(self, targets: Mapping[str, Sequence[str]], rules: Callable[[str], str] = as_committed) -> None:
        """Start it, and wait until it has scraped every target. Raises TimeoutError.

        ``targets`` are addresses by cluster; ``rules`` gives the text of each file of rules.
        """
        assert shutil.which("prometheus"), "prometheus is missing: install Debian's package"
        node, directory = self._node, self._directory
        node.path(directory).mkdir()
        for name in RULE_FILES:
            node.write(f"{directory}/{name}", rules(name))
        self._configure(targets)
        storage = [f"--storage.tsdb.path={directory}/data", "--storage.tsdb.retention.time=1d"]
        listen = [f"--web.listen-address=127.0.0.1:{PORT}", "--log.level=warn", "--enable-feature=exemplar-storage"]
        node.start_daemon(
            "prometheus", ["/usr/bin/prometheus", f"--config.file={directory}/prometheus.yml", *storage, *listen]
        )
        count = sum(len(each) for each in targets.values())
        until(lambda: self._scraped(count), "Prometheus has scraped every agent", 30)

    def _configure(self, targets: Mapping[str, Sequence[str]]) -> None:
        static = [{"targets": list(each), "labels": {"cluster": cluster}} for cluster, each in targets.items()]
        settings = {
            "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
            "rule_files": list(RULE_FILES),
            "scrape_configs": [{"job_name": "adoptd", "static_configs": static}],
        }
        self._node.write(f"{self._directory}/prometheus.yml", yaml.safe_dump(settings))

    def scrape(self, targets: Mapping[str, Sequence[str]]) -> None:
        """Have it scrape these from now on, as after a change of its configuration."""
        self._configure(targets)
        os.kill(self._node.daemons["prometheus"].pid, signal.SIGHUP)

    def _scraped(self, count: int) -> bool:
        try:
            found = self.query(["count(adoptd_build_info)"])[0]
        except RuntimeError:
            return False
        return bool(found) and int(float(found[0]["value"][1])) == count

    def query(self, expressions: Sequence[str]) -> List[List[Dict[str, Any]]]:
        """The result of each expression now. Raises RuntimeError with Prometheus' own words."""
        return [_result(each) for each in self._get([("/api/v1/query", {"query": one}) for one in expressions])]

    def query_range(self, expressions: Sequence[str], since_s: float, until_s: float) -> List[List[Dict[str, Any]]]:
        """The same over time, a value each scrape."""
        span = {"start": f"{since_s:.3f}", "end": f"{until_s:.3f}", "step": f"{SCRAPE_S}s"}
        asked = [("/api/v1/query_range", {"query": one, **span}) for one in expressions]
        return [_result(each) for each in self._get(asked)]

    def get(self, path: str) -> Any:
        """The data of any other question."""
        return self._get([(path, {})])[0]["data"]

    def _get(self, asked: Sequence[Tuple[str, Mapping[str, str]]]) -> List[Dict[str, Any]]:
        replies: List[Dict[str, Any]] = json.loads(
            self._node.run([_PYTHON, "-c", _FETCH], text=json.dumps(asked), timeout_s=120)
        )
        return replies


@dataclass(frozen=True)
class Fleet:
    """What is up. ``since_s`` is Unix time."""

    lab: Lab
    prometheus: Prometheus
    since_s: float


@contextlib.contextmanager
def fleet() -> Iterator[Fleet]:
    """Three nodes and a Prometheus, until leaving."""
    with Cluster(3) as cluster, contextlib.ExitStack() as settings:
        lab = Lab(cluster)
        probes = {1: '[probe]\nenabled = false\n[session]\non_escape = "report"\n'}
        for number, node in enumerate(cluster.nodes):
            text = f'[metrics]\nlisten = "{node.ipv4}"\n{probes.get(number, "")}'
            settings.enter_context(lab.agent_settings(node, text))
        prometheus = Prometheus(cluster.nodes[0], "/run/prometheus")
        settings.callback(cluster.nodes[0].kill, "prometheus")
        prometheus.start({"lab": [f"{node.ipv4}:9830" for node in cluster.nodes]})
        yield Fleet(lab, prometheus, time.time())


def make_traffic(up: Fleet, rounds: int = 3) -> None:
    """Adoptions, denials, failures, questions answered and not, escapes, joins and refusals: each path once a round."""
    for _ in range(rounds):
        _logins(up.lab)
        _faults(up)
        _sessions(up)
        _hostile(up.lab)


def _logins(lab: Lab) -> None:
    lab.pam("action_unknown=newest")
    lab.login()
    with lab.jobs(1, on=[lab.second]):
        lab.login()
    with lab.jobs(2) as jobs:
        for job in jobs:
            lab.login(job=job)
        lab.login()
        lab.login(source=lab.second, to=lab.first.name, job=jobs[0])
    third = lab.cluster.nodes[2]
    lab.pam("mode=observe", node=third)
    with lab.jobs(1, on=[third]):
        lab.login(to=third.name)


def _faults(up: Fleet) -> None:
    lab = up.lab
    lab.pam("action_unknown=newest action_adopt_failure=allow")
    with lab.broken_job(lab.second):
        lab.login()
    lab.pam("action_unknown=allow")
    # Only the first node's agent is ever down here: another's counters would begin again.
    with lab.jobs(2), lab.agent_down(lab.first):
        lab.login()
        with impostor(lab.first):
            lab.login()
        # The next answer sets the gauge back: on a fast machine that may be before any scrape.
        until(lambda: up.prometheus.query([UNHEARD])[0], "Prometheus has seen a source that is not heard", 30)


@contextlib.contextmanager
def impostor(node: Node) -> Iterator[None]:
    """A user who answers in the agent's place, and has no key: a well-formed frame, sealed with nothing."""
    node.start_daemon("impostor", [_PYTHON, "-c", _IMPOSTOR], user=ALICE)
    try:
        until(lambda: ":6830" in node.run(["ss", "-Hltn"]), "the impostor listens", 10)
        yield
    finally:
        node.kill("impostor")


def _sessions(up: Fleet) -> None:
    """A session that is moved out of its job by root, and one whose user joins another job."""
    lab = up.lab
    lab.pam("action_unknown=newest")
    code = "import sys; from adoptd.cli import adoptctl_main; sys.exit(adoptctl_main())"
    join = f"PYTHONPATH={SOURCE_IN_NODE}/agent {_PYTHON} -B -c '{code}' join"
    with lab.jobs(2, on=[lab.second]) as jobs:
        lab.login(command=f"{join} {jobs[0]}; {join} 999")
        pid_file = lab.cluster.directory / "home" / f"{ALICE.name}" / "escaping"
        pid_file.unlink(missing_ok=True)
        # Ends as soon as it may.
        command = f"echo $$ > {ALICE.home}/escaping; while [ -e {ALICE.home}/escaping ]; do sleep 0.1; done"
        session = lab.start_login(command=command)
        try:
            pid = until(lambda: _number(pid_file), "the session's pid", 15)
            for file in lab.second.system_group.procs_files():
                Path(file).write_text(str(pid), encoding="ascii")
            # It is left there, and its end sets the gauge back.
            until(lambda: up.prometheus.query([OUTSIDE])[0], "Prometheus has seen a session outside", 30)
        finally:
            pid_file.unlink(missing_ok=True)
            session.end()


def _number(file: Path) -> Optional[int]:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _hostile(lab: Lab) -> None:
    """What comes from users and hosts that mean no good."""
    # It stays until it is refused: who has gone by then is dropped and not counted.
    garbage = (
        "import socket, sys; asked = socket.create_connection((sys.argv[1], 6830), 10);"
        "asked.sendall(b'\\0\\0\\0\\5hello'); asked.recv(1)"
    )
    lab.first.run([_PYTHON, "-c", garbage, lab.second.ipv4])
    # As a pam_adopt.so of another release would be: the record says of which it is.
    record = (
        "import socket; asked = socket.socket(socket.AF_UNIX); asked.connect('/run/adoptd/pam.sock');"
        f"asked.sendall(bytes({REQUEST_BYTES})); asked.recv(1)"
    )
    lab.second.run([_PYTHON, "-c", record])
    lab.login(user=BOB)


def _result(reply: Dict[str, Any]) -> List[Dict[str, Any]]:
    if reply["status"] != "success":
        raise RuntimeError(f"Prometheus: {reply.get('error')}")
    found: List[Dict[str, Any]] = reply["data"]["result"]
    return found
