"""Connections that the node translates: who made them is found behind conntrack, in the namespace they were made in.

Real namespaces, veth pairs, nftables and sockets. What another node sees is the node's own address; what is asked
about is that, and the answer is whoever connected in the container.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import socket
from pathlib import Path
from typing import Callable, Optional, Tuple

import pytest

from adoptd.callerid import Inquiry, Settled
from adoptd.connections import Witnesses, conntrack
from adoptd.connections.bpf import BpfWitness
from adoptd.connections.conntrack import ConntrackWitness
from adoptd.connections.diag import DiagWitness
from adoptd.connections.proc import ProcWitness
from adoptd.deadline import Deadline
from adoptd.model import Ambiguous, Connection, Endpoint, Owner, Witness, WitnessUnavailable
from adoptd.probe.pins import OpenProbe
from adoptd.probe.record import Answer
from adoptd.wire.callerid import Outcome, Reason
from adoptd.workers import Workers
from kernel.actors import (
    ALICE,
    BOB,
    CLONE_NEWNET,
    CLONE_NEWUSER,
    LIBC,
    Line,
    actor,
    become,
    bound,
    connection_of,
    fork,
    join,
)
from kernel.cgroup_tree import V2, Cgroups
from kernel.nat import SERVERS, Node, run
from lab.waiting import until

BUDGET_MS = 20_000.0
PR_SET_DUMPABLE = 4
VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])


class NoLabels:
    """A host without the probe."""

    def look_in(self, connection: Connection, netns: int) -> Optional[Answer]:
        raise WitnessUnavailable("no probe")


@pytest.fixture
def node(stack: contextlib.ExitStack) -> Node:
    return Node(stack)


def budget() -> Deadline:
    return Deadline.after_ms(BUDGET_MS)


def plain(line: Line, server: socket.socket, uid: int = ALICE) -> None:
    """Connect, tell, and stay."""
    become(uid)
    client = bound(any_address(server))
    port = client.getsockname()[1]
    client.connect(server.getsockname())
    line.say(client, port)
    line.wait()


def any_address(server: socket.socket) -> str:
    return "::" if server.family == socket.AF_INET6 else "0.0.0.0"


def ask(node: Node, opened: OpenProbe, asked: Connection, labels: bool = True) -> Optional[Owner]:
    """What the conntrack witness of an agent on the node says."""
    with node.network.entered():
        bpf, diag = BpfWitness(opened), DiagWitness()
        try:
            return ConntrackWitness(bpf if labels else NoLabels(), (bpf, diag)).owner_of(asked, budget())
        finally:
            diag.close()


def direct(node: Node, opened: OpenProbe, asked: Connection) -> Tuple[Optional[Owner], ...]:
    """What the others say, each for itself."""
    with node.network.entered():
        diag = DiagWitness()
        try:
            return tuple(each.owner_of(asked, budget()) for each in (BpfWitness(opened), diag, ProcWitness()))
        finally:
            diag.close()


@VERSIONS
def test_a_connection_made_in_a_container(node: Node, opened: OpenProbe, version: int) -> None:
    """Found by its label and by sock_diag, in the container's namespace; no other witness knows it."""
    _, facts = node.connect(version, plain)
    asked = node.seen_by_the_server(version)
    assert str(asked.source.address) == SERVERS[version].format(1), "the node has not translated it"
    assert direct(node, opened, asked) == (None, None, None)
    owner = ask(node, opened, asked)
    assert owner is not None
    assert (owner.witness, owner.uid, owner.pid) == (Witness.CONNTRACK, ALICE, facts["pid"])
    assert owner.connected_at_ns is not None
    own = ask(node, opened, asked, labels=False)
    assert own == Owner(Witness.CONNTRACK, ALICE, cgroup_id=owner.cgroup_id)
    assert own is not None
    assert own.cgroup_id is not None


@VERSIONS
def test_a_port_that_the_node_changes(node: Node, opened: OpenProbe, version: int) -> None:
    """Masquerading may choose another source port, which is what the server sees."""
    node.rules("flush chain inet adoptd_test out")
    node.rules('add rule inet adoptd_test out meta l4proto tcp oifname "server" masquerade to :40000-40010')
    _, facts = node.connect(version, plain)
    asked = node.seen_by_the_server(version)
    assert asked.source.port in range(40000, 40011)
    assert asked.source.port != facts["source"][1]
    owner = ask(node, opened, asked)
    assert owner is not None
    assert (owner.uid, owner.pid) == (ALICE, facts["pid"])


@VERSIONS
def test_an_owner_in_a_container_that_has_ended(node: Node, opened: OpenProbe, version: int) -> None:
    """Its child holds the connection and is in the namespace: the label still names who connected."""

    def live(line: Line, server: socket.socket) -> None:
        become(ALICE)
        client = bound(any_address(server))
        port = client.getsockname()[1]
        pid = join(fork(lambda: client.connect(server.getsockname())))
        line.say(client, port, pid=pid)
        line.wait()

    _, facts = node.connect(version, live)
    owner = ask(node, opened, node.seen_by_the_server(version))
    assert owner is not None
    assert not Path(f"/proc/{facts['pid']}").exists()
    assert (owner.uid, owner.pid) == (ALICE, facts["pid"])


def test_a_connection_that_is_not_translated(node: Node, opened: OpenProbe) -> None:
    """The node's own, which conntrack knows too, and one of a stranger: neither is a matter for this witness."""

    def live(line: Line) -> None:
        plain(line, node.listeners[4])

    node.rules("flush chain inet adoptd_test out")
    node.rules("add rule inet adoptd_test out ct state new counter")
    with node.network.entered():
        line = actor(node.stack, live)
    line.hear()
    asked = node.seen_by_the_server(4)
    assert "ESTABLISHED" in run("nsenter", f"--net={node.network.path}", "conntrack", "-L", "-p", "tcp")
    assert ask(node, opened, asked) is None
    assert ask(node, opened, Connection(asked.source, Endpoint(asked.destination.address, 9))) is None
    # Asked the wrong way round, the kernel finds the same entry.
    assert ask(node, opened, Connection(asked.destination, asked.source)) is None


@VERSIONS
def test_a_service_address_that_the_node_translates(node: Node, opened: OpenProbe, version: int) -> None:
    """A process on the node connects to an address that stands for the server (destination NAT): its own namespace."""
    service = {4: "10.95.9.9", 6: "fd95:9::9"}[version]
    server = node.listeners[version]
    host = SERVERS[version].format(2)
    family = {4: "ip", 6: "ip6"}[version]
    node.rules("add chain inet adoptd_test here { type nat hook output priority -100; }")
    node.rules(f"add rule inet adoptd_test here {family} daddr {service} dnat {family} to {host}")
    node.network.ip(f"-{version}", "route", "add", service, "via", host)

    def live(line: Line) -> None:
        become(ALICE)
        client = bound(any_address(server))
        port = client.getsockname()[1]
        client.connect((service, server.getsockname()[1]))
        line.say(client, port)
        line.wait()

    with node.network.entered():
        facts = actor(node.stack, live).hear()
    assert facts["destination"][0] == service
    asked = node.seen_by_the_server(version)
    assert direct(node, opened, asked) == (None, None, None)
    owner = ask(node, opened, asked)
    assert owner is not None
    assert (owner.witness, owner.uid, owner.pid) == (Witness.CONNTRACK, ALICE, facts["pid"])


@VERSIONS
def test_containers_on_one_bridge(stack: contextlib.ExitStack, opened: OpenProbe, version: int) -> None:
    """Each connection is of the container that made it, whatever the others do."""
    node = Node(stack, containers=3, bridged=True)
    for uid, container in ((ALICE, node.containers[2]), (BOB, node.containers[1])):
        _, facts = node.connect(version, functools.partial(plain, uid=uid), container)
        asked = node.seen_by_the_server(version)
        for labels in (True, False):
            owner = ask(node, opened, asked, labels)
            assert owner is not None
            assert owner.uid == uid
            assert owner.pid == (facts["pid"] if labels else None)


def imitate(asked: Connection, line: Line) -> None:
    """Both ends of a connection with these addresses and ports, in this process's own network namespace."""
    version = asked.version
    for end in (asked.source, asked.destination):
        extra = ["nodad"] if version == 6 else []
        run("ip", "addr", "add", f"{end.address}/{32 if version == 4 else 128}", "dev", "lo", *extra)
    server = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6)
    server.bind((str(asked.destination.address), asked.destination.port))
    server.listen(1)
    client = bound(str(asked.source.address), asked.source.port)
    # An IPv6 address that was just given is not of use at once, and nothing else shows when it is.
    until(lambda: client.connect_ex(server.getsockname()) in (0, errno.EISCONN), "connected")
    line.say(client, asked.source.port)
    line.wait()


def in_own_network(asked: Connection) -> Callable[[Line], None]:
    """BOB, in user and network namespaces that he made himself, as any user can."""

    def live(line: Line) -> None:
        become(BOB)
        assert LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0
        # Its own files in /proc are root's otherwise, since root it was.
        assert LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) == 0
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {BOB} 1")
        Path("/proc/self/gid_map").write_text(f"0 {BOB} 1")
        run("ip", "link", "set", "lo", "up")
        imitate(asked, line)

    return live


@VERSIONS
@pytest.mark.parametrize("labels", [True, False], ids=["probe", "no probe"])
def test_a_users_own_namespace_changes_nothing(node: Node, opened: OpenProbe, version: int, labels: bool) -> None:
    """BOB builds what the node sees and what the container has, in his own namespaces: the answer stays ALICE's."""
    _, facts = node.connect(version, plain)
    asked = node.seen_by_the_server(version)
    for imitated in (asked, connection_of(facts)):
        assert connection_of(actor(node.stack, in_own_network(imitated)).hear()) == imitated
    owner = ask(node, opened, asked, labels)
    assert owner is not None
    assert owner.uid == ALICE
    assert direct(node, opened, asked) == (None, None, None)


@VERSIONS
def test_a_users_own_namespace_alone_is_nobody(node: Node, opened: OpenProbe, version: int) -> None:
    """The host has no such connection: BOB's imitation of it is not found, by whichever witness."""
    source, destination = SERVERS[version].format(1), SERVERS[version].format(2)
    made = Connection(_end(source, 40022), _end(destination, 22))
    actor(node.stack, in_own_network(made)).hear()
    assert direct(node, opened, made) == (None, None, None)
    for labels in (True, False):
        assert ask(node, opened, made, labels) is None


@VERSIONS
@pytest.mark.parametrize("labels", [True, False], ids=["probe", "no probe"])
def test_the_same_connection_in_two_containers(
    stack: contextlib.ExitStack, opened: OpenProbe, version: int, labels: bool
) -> None:
    """Root of another container on the bridge imitates ALICE's connection: it is nobody's then, and not BOB's."""
    node = Node(stack, containers=2, bridged=True)
    _, facts = node.connect(version, plain)
    asked = node.seen_by_the_server(version)

    def live(line: Line) -> None:
        imitate(connection_of(facts), line)

    with node.containers[1].entered():
        actor(stack, live).hear()
    with pytest.raises(Ambiguous, match="network namespaces"):
        ask(node, opened, asked, labels)


@VERSIONS
def test_two_users_at_one_socket_in_a_container(node: Node, opened: OpenProbe, version: int) -> None:
    """Made by BOB and connected by ALICE: label and sock_diag contradict each other, and it is nobody's."""

    def live(line: Line, server: socket.socket) -> None:
        os.seteuid(BOB)
        client = bound(any_address(server))
        os.seteuid(0)
        become(ALICE)
        port = client.getsockname()[1]
        client.connect(server.getsockname())
        line.say(client, port)
        line.wait()

    node.connect(version, live)
    with pytest.raises(Ambiguous, match=f"bpf says uid {ALICE}, diag says uid {BOB}"):
        ask(node, opened, node.seen_by_the_server(version))


def test_a_connection_that_is_over(node: Node, opened: OpenProbe) -> None:
    """Conntrack remembers it for minutes; the container has no such socket any more."""

    def live(line: Line, server: socket.socket) -> None:
        become(ALICE)
        client = bound(any_address(server))
        client.connect(server.getsockname())
        line.say(client, client.getsockname()[1])
        line.hear()
        client.shutdown(socket.SHUT_RDWR)
        client.close()
        line.tell({"closed": True})
        line.wait()

    line, _ = node.connect(4, live)
    accepted, _ = node.listeners[4].accept()
    asked = Connection(_end(*accepted.getpeername()), _end(*accepted.getsockname()))
    assert ask(node, opened, asked) is not None
    line.tell({"close": True})
    line.hear()
    accepted.close()
    until(lambda: ask(node, opened, asked) is None, "the connection has ended")
    assert "dport=" in run("nsenter", f"--net={node.network.path}", "conntrack", "-L", "-p", "tcp")


def test_a_relay_in_place_of_a_network_is_found_directly(node: Node, opened: OpenProbe) -> None:
    """As slirp4netns and pasta do it: the container has no way out but a process on the node, which connects for it."""
    inside, outside = socket.socketpair()
    server = node.listeners[4]

    def contained(line: Line) -> None:
        outside.close()
        become(ALICE)
        assert LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0
        inside.send(b"connect")
        inside.recv(1)
        line.tell({"connected": True})
        line.wait()

    def relay(line: Line) -> None:
        inside.close()
        become(ALICE)
        assert outside.recv(16) == b"connect"
        client = bound("0.0.0.0")
        port = client.getsockname()[1]
        client.connect(server.getsockname())
        outside.send(b"1")
        line.say(client, port)
        line.wait()

    with node.network.entered():
        relaying = actor(node.stack, relay)
        ssh = actor(node.stack, contained)
    inside.close()
    outside.close()
    facts = relaying.hear()
    assert ssh.hear() == {"connected": True}
    asked = node.seen_by_the_server(4)
    found = direct(node, opened, asked)
    assert [owner and (owner.uid, owner.pid) for owner in found] == [
        (ALICE, facts["pid"]),
        (ALICE, None),
        (ALICE, facts["pid"]),
    ]
    assert ask(node, opened, asked) is None


@VERSIONS
def test_what_is_read_is_what_another_reader_sees(node: Node, opened: OpenProbe, version: int) -> None:
    """conntrack(8) shows the same two tuples that our question and its answer have."""
    _, facts = node.connect(version, plain)
    asked, before = node.seen_by_the_server(version), connection_of(facts)
    names = {4: "ipv4", 6: "ipv6"}
    words = run("nsenter", f"--net={node.network.path}", "conntrack", "-L", "-f", names[version], "-p", "tcp").split()
    shown = [word.partition("=")[2] for word in words if word.startswith(("src=", "dst=", "sport=", "dport="))]
    ends = (before.source, before.destination), (asked.destination, asked.source)
    assert shown == [text for a, b in ends for text in (str(a.address), str(b.address), str(a.port), str(b.port))]
    with node.network.entered():
        assert conntrack._before(asked, budget()) == before


def test_without_the_module_it_says_so(opened: OpenProbe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where nf_conntrack is not loaded nothing is asked, which would load it."""
    monkeypatch.setattr(conntrack, "_COUNT", str(tmp_path / "nf_conntrack_count"))
    witness = ConntrackWitness(BpfWitness(opened), ())
    assert witness.self_test() == conntrack.NOTHING_TRANSLATED
    with pytest.raises(WitnessUnavailable, match="nf_conntrack is not loaded"):
        witness.owner_of(Connection(_end("192.0.2.1", 1), _end("192.0.2.2", 2)), budget())


@pytest.mark.parametrize("late", [1, 2])
def test_only_the_first_question_may_be_late(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, late: int) -> None:
    """The kernel loads nf_conntrack_netlink for it; tests/vm does that for real."""
    count = tmp_path / "nf_conntrack_count"
    count.write_text("0")
    said = [TimeoutError(errno.ETIMEDOUT, "late")] * late + [OSError(errno.ENOENT, "no such connection")]

    def ask_one(*_: object) -> bytes:
        raise said.pop(0)

    monkeypatch.setattr(conntrack, "_COUNT", str(count))
    monkeypatch.setattr(conntrack, "ask_one", ask_one)
    expected = None if late == 1 else "conntrack cannot be asked: late"
    assert ConntrackWitness(NoLabels(), ()).self_test() == expected


def test_without_the_right_to_ask_it_says_so(node: Node) -> None:
    """Conntrack answers root only (CAP_NET_ADMIN)."""

    def live(line: Line) -> None:
        assert ConntrackWitness(NoLabels(), ()).self_test() is None
        become(ALICE)
        line.tell({"said": ConntrackWitness(NoLabels(), ()).self_test()})

    with node.network.entered():
        assert actor(node.stack, live).hear() == {"said": "conntrack cannot be asked: Operation not permitted"}


def _end(address: str, port: int, *_: int) -> Endpoint:
    return Endpoint.parse(f"[{address}]:{port}" if ":" in address else f"{address}:{port}")


def settle(node: Node, opened: OpenProbe, backend: object, asked: Connection, uid: int) -> Settled:
    """The whole inquiry, as an agent on the node makes it."""
    with node.network.entered(), contextlib.ExitStack() as closing:
        bpf, diag = BpfWitness(opened), DiagWitness()
        closing.callback(diag.close)
        hearing = Witnesses([bpf, diag, ConntrackWitness(bpf, (bpf, diag)), ProcWitness()])
        closing.callback(hearing.close)
        workers = Workers("test", 2, 8)
        closing.callback(workers.close)
        inquiry = Inquiry(hearing, backend, workers)  # type: ignore[arg-type]
        return asyncio.run(inquiry.settle(asked, uid, budget()))


@VERSIONS
def test_the_job_of_a_container(cgroups: Cgroups, opened: OpenProbe, node: Node, version: int) -> None:
    """The job whose process connected in the container, by conntrack; for another's login nothing is told."""
    job = cgroups.at(V2, cgroups.job(ALICE, "77", [V2]))

    def live(line: Line, server: socket.socket) -> None:
        (job / "cgroup.procs").write_text(str(os.getpid()))
        plain(line, server)

    node.connect(version, live)
    asked = node.seen_by_the_server(version)
    settled = settle(node, opened, cgroups.jobs(), asked, ALICE)
    assert (settled.outcome, settled.reason) == (Outcome.JOB, Reason.OWNER), settled
    assert settled.job is not None
    assert settled.owner is not None
    assert (settled.job.id, settled.owner.witness) == ("77", Witness.CONNTRACK)
    other = settle(node, opened, cgroups.jobs(), asked, BOB)
    assert (other.outcome, other.reason, other.job) == (Outcome.UNKNOWN, Reason.OTHER_USER, None)
