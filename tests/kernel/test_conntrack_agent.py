"""The whole agent: on a node that translates its containers' connections, and on one whose jobs are on cgroup v1."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Iterator

import pytest

from adoptd.model import Connection
from kernel.actors import ALICE, Line, actor, become, bound, connection_of, fork, listener
from kernel.cgroup_tree import V2, Cgroups
from kernel.nat import Node
from kernel.real_agent import RealAgent
from kernel.test_conntrack import plain
from kernel.test_v1_notes import a_controller, legacy  # noqa: F401 (a fixture)
from lab.waiting import until

# The bound for an agent at rest.
_RESIDENT_KB_MAX = 40 * 1024


@pytest.fixture
def agent(cgroups: Cgroups, pin_dir: Path) -> Iterator[RealAgent]:
    """One that is not started yet, with the test's own jobs."""
    # Not pytest's tmp_path: a unix socket's path is 107 bytes at most.
    directory = Path(tempfile.mkdtemp(prefix=f"adoptd-test-{os.getpid()}-"))
    try:
        with RealAgent(directory, pin_dir, cgroups.top + "/uid_{uid}/job_{job}", 3600) as made:
            yield made
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def stack(agent: RealAgent) -> Iterator[contextlib.ExitStack]:
    """Ends before the agent and the cgroups go."""
    with contextlib.ExitStack() as opened:
        yield opened


def resident_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError(f"process {pid} has no resident memory")


def test_an_agent_on_a_node_with_containers(
    cgroups: Cgroups,
    agent: RealAgent,
    stack: contextlib.ExitStack,
) -> None:
    """It says that conntrack can be asked, names the container's job by it, and stays small."""
    node = Node(stack)
    job = cgroups.at(V2, cgroups.job(ALICE, "77", [V2]))
    process = agent.start(prefix=("nsenter", f"--net={node.network.path}"))
    witnesses = agent.status()["witnesses"]
    assert isinstance(witnesses, dict)
    assert list(witnesses) == ["bpf", "diag", "conntrack", "proc"]
    assert set(witnesses.values()) == {"ok"}

    def live(line: Line, server: socket.socket) -> None:
        (job / "cgroup.procs").write_text(str(os.getpid()))
        plain(line, server)

    for version in (4, 6):
        node.connect(version, live)
        told = agent.whois(node.seen_by_the_server(version))
        assert (told["outcome"], told["job"], told["witness"]) == ("job", "77", "conntrack"), told
    assert resident_kb(process.pid) < _RESIDENT_KB_MAX


def test_an_agent_on_a_node_with_jobs_on_v1(
    cgroups: Cgroups,
    agent: RealAgent,
    stack: contextlib.ExitStack,
) -> None:
    """The owner has ended: its job was noted as it connected."""
    controller = a_controller(cgroups)
    job = cgroups.at(controller, cgroups.job(ALICE, "78", [controller]))
    server = listener(stack)
    agent.configure(probe=f"watched_ports = [{server.getsockname()[1]}]")
    agent.start()

    def noted() -> float:
        return agent.metric("adoptd_connection_notes")

    def tried() -> bool:
        with socket.create_connection(server.getsockname()), server.accept()[0]:
            return noted() >= 1

    # It is ready for logins before it takes notes.
    until(tried, "a first note")

    def live(line: Line) -> None:
        os.seteuid(ALICE)
        client = bound()
        os.seteuid(0)
        port = client.getsockname()[1]
        stay, let_go = os.pipe()

        def connect() -> None:
            os.close(let_go)
            (job / "cgroup.procs").write_text(str(os.getpid()))
            become(ALICE)
            client.connect(server.getsockname())
            os.read(stay, 1)

        pid = fork(connect)
        accepted, _ = server.accept()
        line.say(client, port, pid=pid)
        line.hear()
        os.close(let_go)
        os.waitpid(pid, 0)
        line.tell({"ended": True})
        line.wait()
        accepted.close()

    def named(asked: Connection) -> bool:
        told = agent.whois(asked)
        return (told["outcome"], told["job"]) == ("job", "78")

    before = noted()
    line = actor(stack, live)
    facts = line.hear()
    asked = connection_of(facts)
    assert named(asked)
    until(lambda: noted() > before, "its note")
    line.tell({"end": True})
    assert line.hear() == {"ended": True}
    assert not Path(f"/proc/{facts['pid']}").exists()
    assert named(asked)
