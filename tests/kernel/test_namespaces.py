"""Other network namespaces: found by their ids, entered by threads that end there; and owners in pid namespaces."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import threading

import pytest

from adoptd.callerid import Inquiry
from adoptd.connections import Witnesses, namespaces
from adoptd.connections.bpf import BpfWitness
from adoptd.connections.diag import find_here
from adoptd.connections.namespaces import held, inside
from adoptd.connections.proc import ProcWitness
from adoptd.connections.routes import Route, namespace_id, namespaces_behind, route_to
from adoptd.deadline import Deadline
from adoptd.model import Witness, WitnessUnavailable
from adoptd.probe.pins import OpenProbe
from adoptd.wire.callerid import Outcome
from adoptd.workers import Workers
from kernel.actors import (
    ALICE,
    CLONE_NEWNET,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    LIBC,
    Line,
    actor,
    become,
    bound,
    connection_of,
    fork,
    listener,
)
from kernel.cgroup_tree import V2, Cgroups
from kernel.nat import CONTAINERS, SERVERS, Node
from kernel.networks import Network
from lab.waiting import until

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])


def soon() -> Deadline:
    return Deadline.after_ms(20_000)


def own_namespace() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


def device(network: Network, name: str) -> int:
    with network.entered():
        return socket.if_nametoindex(name)


@VERSIONS
def test_the_way_to_an_address(stack: contextlib.ExitStack, version: int) -> None:
    """Local, by a device to a namespace, by a bridge to several, and nowhere."""
    node = Node(stack)
    ends = {
        "own": SERVERS[version].format(1),
        "container": CONTAINERS[version].format(2),
        "nowhere": {4: "203.0.113.1", 6: "2001:db8::1"}[version],
    }
    with node.network.entered():
        routes = {name: route_to(ipaddress.ip_address(text), soon()) for name, text in ends.items()}
        assert routes["own"] is not None
        assert routes["own"].local
        assert routes["container"] == Route(False, device(node.network, "c0"))
        assert routes["nowhere"] is None
        (behind,) = namespaces_behind(device(node.network, "c0"), soon())
        with held(frozenset({behind}), None, soon()) as found:
            assert os.fstat(found[behind]).st_ino == os.stat(node.containers[0].path).st_ino
        assert namespaces_behind(socket.if_nametoindex("lo"), soon()) == frozenset()


def test_a_bridge_leads_to_the_namespaces_of_its_ports(stack: contextlib.ExitStack) -> None:
    """And to no others, such as the server's, which has a device of its own."""
    node = Node(stack, containers=3, bridged=True)
    with node.network.entered():
        behind = namespaces_behind(device(node.network, "bridge"), soon())
        with held(behind, None, soon()) as found:
            inodes = {os.fstat(each).st_ino for each in found.values()}
    assert inodes == {os.stat(each.path).st_ino for each in node.containers}


def test_a_thread_that_has_entered_is_used_for_nothing_else(stack: contextlib.ExitStack) -> None:
    """Whatever comes of it, the caller stays where it is and the thread is gone."""
    other = Network(stack)
    before = own_namespace()
    fd = os.open(other.path, os.O_RDONLY)
    stack.callback(os.close, fd)
    assert inside(fd, own_namespace, soon()) == os.stat(other.path).st_ino

    def fail() -> None:
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        inside(fd, fail, soon())
    slow = threading.Event()
    with pytest.raises(WitnessUnavailable, match="no answer in time"):
        inside(fd, lambda: slow.wait(60), Deadline.after_ms(20))
    slow.set()
    until(lambda: not any(each.name == "adoptd-namespace" for each in threading.enumerate()), "the thread's end")
    assert own_namespace() == before


def test_what_is_no_namespace_cannot_be_entered() -> None:
    """Nor what is a namespace of another kind."""
    for path in ("/dev/null", "/proc/self/ns/uts"):
        fd = os.open(path, os.O_RDONLY)
        try:
            with pytest.raises(WitnessUnavailable, match="cannot be entered: Invalid argument"):
                inside(fd, own_namespace, soon())
        finally:
            os.close(fd)


def test_users_namespaces_have_no_ids(stack: contextlib.ExitStack) -> None:
    """Those that an ordinary user makes are found by no id, however many there are."""

    def live(line: Line) -> None:
        become(ALICE)
        assert LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0
        line.tell({"pid": os.getpid()})
        line.wait()

    node = Node(stack)
    pids = [actor(stack, live).hear()["pid"] for _ in range(20)]
    with node.network.entered():
        for pid in pids:
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
            try:
                assert namespace_id(fd, soon()) is None
            finally:
                os.close(fd)
        (behind,) = namespaces_behind(device(node.network, "c0"), soon())
        with held(frozenset({behind}), pids[0], soon()) as found:
            assert list(found) == [behind]


def test_too_many_namespaces_end_the_walk(stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, and lets go of all; as it does when its time is up."""
    monkeypatch.setattr(namespaces, "NAMESPACES_MAX", 2)
    for _ in range(3):
        Network(stack)
    before = len(os.listdir("/proc/self/fd"))
    with (
        pytest.raises(WitnessUnavailable, match="more than 2 network namespaces"),
        held(frozenset({2_000_000}), None, soon()),
    ):
        pass
    with (
        pytest.raises(WitnessUnavailable, match="out of time"),
        held(frozenset({2_000_000}), None, Deadline.after_ms(0)),
    ):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_sockets_found_inside_are_those_of_that_namespace(stack: contextlib.ExitStack) -> None:
    """sock_diag in the other namespace, asked by a thread that went there."""
    other = Network(stack)
    with other.entered():
        server = listener(stack)
        client = stack.enter_context(bound())
        client.connect(server.getsockname())
    asked = connection_of({"source": client.getsockname(), "destination": client.getpeername()})
    fd = os.open(other.path, os.O_RDONLY)
    stack.callback(os.close, fd)
    assert find_here(asked) is None
    found = inside(fd, lambda: find_here(asked), soon())
    assert found is not None
    assert found.inode == os.fstat(client.fileno()).st_ino


def test_an_owner_in_another_pid_namespace_is_in_its_job(
    cgroups: Cgroups,
    opened: OpenProbe,
    stack: contextlib.ExitStack,
) -> None:
    """Process 1 of a container: its label has the pid it has on the host, by which it is found, held and looked at."""
    job = cgroups.at(V2, cgroups.job(ALICE, "9", [V2]))
    server = listener(stack)

    def live(line: Line) -> None:
        (job / "cgroup.procs").write_text(str(os.getpid()))
        assert LIBC.unshare(CLONE_NEWPID) == 0
        become(ALICE)
        client = bound()
        port = client.getsockname()[1]
        done, told = os.pipe()

        def connect() -> None:
            assert os.getpid() == 1
            client.connect(server.getsockname())
            os.write(told, b"1")
            signal.pause()

        pid = fork(connect)
        assert os.read(done, 1) == b"1"
        line.say(client, port, pid=pid)
        line.wait()

    facts = actor(stack, live).hear()
    asked, workers = connection_of(facts), Workers("test", 2, 8)
    backend = cgroups.jobs()
    assert os.readlink(f"/proc/{facts['pid']}/ns/pid") != os.readlink("/proc/self/ns/pid")
    for witness in (BpfWitness(opened), ProcWitness()):
        owner = witness.owner_of(asked, soon())
        assert owner is not None
        assert owner.uid == ALICE
        if witness.name is Witness.BPF:
            assert owner.pid == facts["pid"]
        hearing = Witnesses([witness])
        settled = asyncio.run(Inquiry(hearing, backend, workers).settle(asked, ALICE, soon()))
        hearing.close()
        assert settled.job is not None, settled
        assert (settled.outcome, settled.job.id, settled.moved) == (Outcome.JOB, "9", False)
    workers.close()
