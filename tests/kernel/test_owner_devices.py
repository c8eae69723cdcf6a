"""Sockets bound to network devices: the kernel's rules that the search relies on, and what is found by it.

Each rule is tried as an ordinary user would, so that a kernel which changes one is noticed here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import socket
import threading
from pathlib import Path
from typing import List, Tuple

import pytest

from adoptd import probe
from adoptd.callerid import Asker, AskFault, SealRoom
from adoptd.connections.bpf import BpfWitness
from adoptd.connections.candidates import DEVICES_MAX
from adoptd.connections.diag import DiagWitness
from adoptd.connections.proc import ProcWitness
from adoptd.deadline import Deadline
from adoptd.metrics import Metrics
from adoptd.model import Ambiguous, Connection, Endpoint
from adoptd.probe.pins import OpenProbe
from adoptd.probe.record import Outcome
from adoptd.probe.sources import find_sources
from adoptd.seal.key import KeySeal
from adoptd.workers import Workers
from kernel.actors import (
    ALICE,
    BOB,
    Line,
    actor,
    become,
    bound,
    connection,
    connection_of,
    fill_option_memory,
    listener,
)
from kernel.networks import Network, link

SO_BINDTODEVICE = socket.SO_BINDTODEVICE


@pytest.fixture
def devices(stack: contextlib.ExitStack) -> Tuple[Network, socket.socket]:
    """A network with links "one" and "two" to one server each, both at 10.96.0.2 on one port; the first's socket."""
    here = Network(stack)
    servers: List[socket.socket] = []
    for number, name in enumerate(("one", "two")):
        there = Network(stack)
        link(here, name, there, "far")
        there.ip("addr", "add", "10.96.0.2/24", "dev", "far")
        here.ip("addr", "add", "10.96.0.1/24", "dev", name)
        port = servers[0].getsockname()[1] if number else 0
        with there.entered():
            servers.append(listener(stack, "10.96.0.2", port))
    return here, servers[0]


def budget() -> Deadline:
    return Deadline.after_ms(20_000)


def attempt(stack: contextlib.ExitStack, server: socket.socket, port: int = 0, device: str = "") -> Tuple[Line, int]:
    """BOB's connect() and what came of it; with a line to a process that then binds as it is told."""

    def live(line: Line) -> None:
        become(BOB)
        client = bound("10.96.0.1", port, device)
        client.settimeout(10)
        line.tell({"errno": client.connect_ex(server.getsockname()), "port": client.getsockname()[1]})
        while True:
            wanted = str(line.hear()["device"])
            try:
                client.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, wanted.encode() + b"\0")
                line.tell({"errno": 0})
            except OSError as error:
                line.tell({"errno": error.errno})

    line = actor(stack, live)
    told = line.hear()
    assert told["errno"] in (0, errno.EADDRNOTAVAIL), os.strerror(told["errno"])
    return line, int(told["port"]) if told["errno"] == 0 else 0


def bind_later(line: Line, device: str) -> int:
    line.tell({"device": device})
    return int(line.hear()["errno"])


def test_a_twin_is_refused_while_one_bound_to_no_device_is_there(
    devices: Tuple[Network, socket.socket], stack: contextlib.ExitStack
) -> None:
    """Whatever device the second is bound to: so one that is bound to none is the newest of all."""
    here, server = devices
    with here.entered():
        _, port = attempt(stack, server)
        for device in ("", "one", "two", "lo"):
            assert attempt(stack, server, port, device)[1] == 0, f"a twin on {device or 'no device'} was let in"


def test_a_twin_is_refused_on_the_same_device(
    devices: Tuple[Network, socket.socket], stack: contextlib.ExitStack
) -> None:
    """So a question about one device finds all there is on it."""
    here, server = devices
    with here.entered():
        _, port = attempt(stack, server, 0, "one")
        assert attempt(stack, server, port, "one")[1] == 0
        assert attempt(stack, server, port, "two")[1] == port


def test_a_user_binds_a_socket_once(devices: Tuple[Network, socket.socket], stack: contextlib.ExitStack) -> None:
    """Also when it is connected; nobody without CAP_NET_RAW takes it to another device or to none."""
    here, server = devices
    with here.entered():
        line, _ = attempt(stack, server)
        assert bind_later(line, "one") == 0
        assert bind_later(line, "two") == errno.EPERM
        assert bind_later(line, "") == errno.EPERM


def test_every_device_leads_to_the_newest_bound_to_none(
    opened: OpenProbe, devices: Tuple[Network, socket.socket], stack: contextlib.ExitStack
) -> None:
    """Asked for any device the kernel returns it, and the probe says how many it hides."""
    here, server = devices
    with here.entered():
        _, port = attempt(stack, server, 0, "one")
        client = stack.enter_context(bound("10.96.0.1", port))
        client.connect(server.getsockname())
        asked = connection(client)
        answers = [opened.ask(asked, index) for index, _ in socket.if_nameindex()]
    assert {answer.outcome for answer in answers} == {Outcome.LABELLED}
    assert {answer.record and answer.record.pid for answer in answers} == {os.getpid()}
    assert {(answer.device, answer.twins) for answer in answers} == {(None, 1)}


def test_one_bound_after_it_connected_is_found_out(
    opened: OpenProbe, devices: Tuple[Network, socket.socket], stack: contextlib.ExitStack
) -> None:
    """BOB connects as everybody does, binds, and leaves the 4-tuple to whoever gets it next: unknown, not BOB."""
    here, server = devices
    with here.entered():
        line, port = attempt(stack, server)
        assert bind_later(line, "two") == 0
        client = stack.enter_context(bound("10.96.0.1", port))
        client.connect(server.getsockname())
        with pytest.raises(Ambiguous, match="2 sockets"):
            BpfWitness(opened).owner_of(connection(client), budget())


def test_a_twin_without_a_label_is_found_out_too(
    opened: OpenProbe, devices: Tuple[Network, socket.socket], stack: contextlib.ExitStack
) -> None:
    """The user has left no room for one: the doubt is about sockets, not about labels."""
    here, server = devices
    with here.entered():
        _, port = attempt(stack, server, 0, "two")
        client = stack.enter_context(bound("10.96.0.1", port))
        fill_option_memory(client)
        client.connect(server.getsockname())
        answer = opened.ask(connection(client))
        assert (answer.outcome, answer.twins) == (Outcome.UNLABELLED, 1)
        with pytest.raises(Ambiguous, match="2 sockets"):
            BpfWitness(opened).owner_of(connection(client), budget())


def test_one_link_local_connection_on_each_of_two_links(opened: OpenProbe, stack: contextlib.ExitStack) -> None:
    """The same addresses and ports on both: which of the two is asked about cannot be told."""
    here = Network(stack)
    made: List[Connection] = []
    ports = [0, 0]
    for number, uid in enumerate((ALICE, BOB)):
        there = Network(stack)
        name = f"link{number}"
        link(here, name, there, "far")
        here.ip("addr", "add", "fe80::a/64", "dev", name, "nodad")
        there.ip("addr", "add", "fe80::b/64", "dev", "far", "nodad")
        with there.entered():
            server = stack.enter_context(socket.socket(socket.AF_INET6))
            server.bind(("fe80::b", ports[1], 0, socket.if_nametoindex("far")))
            server.listen(1)

        def live(line: Line) -> None:
            become(uid)  # noqa: B023 (forked before the next round)
            scope = socket.if_nametoindex(name)  # noqa: B023
            client = socket.socket(socket.AF_INET6)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind(("fe80::a", ports[0], 0, scope))  # noqa: B023
            client.connect(("fe80::b", server.getsockname()[1], 0, scope))  # noqa: B023
            line.say(client, client.getsockname()[1])
            line.wait()

        with here.entered():
            made.append(connection_of(actor(stack, live).hear()))
        ports = [made[0].source.port, made[0].destination.port]
    assert made[0] == made[1]
    with here.entered():
        diag = DiagWitness()
        stack.callback(diag.close)
        for witness in (BpfWitness(opened), diag, ProcWitness()):
            with pytest.raises(Ambiguous, match="2 sockets"):
                witness.owner_of(made[0], budget())


def test_a_device_that_is_gone_has_no_sockets(opened: OpenProbe, stack: contextlib.ExitStack) -> None:
    """Between the list of devices and the question one may go: not found there, and no error."""
    server = listener(stack)
    client = stack.enter_context(bound())
    client.connect(server.getsockname())
    assert opened.ask(connection(client), 0x7FFFFFFE).outcome is Outcome.NOT_FOUND


def test_more_devices_than_are_asked_leave_the_rest_to_proc(opened: OpenProbe, stack: contextlib.ExitStack) -> None:
    """On a host with very many the fast witnesses do not look at each; the slow one sees them all."""
    here = Network(stack)
    for number in range(DEVICES_MAX // 2 + 1):
        here.ip("link", "add", f"a{number}", "type", "veth", "peer", "name", f"b{number}")
    with here.entered():
        server = listener(stack)

        def live(line: Line) -> None:
            become(ALICE)
            client = bound(device="lo")
            port = client.getsockname()[1]
            client.connect(server.getsockname())
            line.say(client, port)
            line.wait()

        asked = connection_of(actor(stack, live).hear())
        diag = DiagWitness()
        stack.callback(diag.close)
        assert len(socket.if_nameindex()) > DEVICES_MAX
        assert diag.owner_of(asked, budget()) is None
        owner = ProcWitness().owner_of(asked, budget())
        assert owner is not None
        assert owner.uid == ALICE


def test_where_memory_cannot_be_read_the_rest_works(
    pin_dir: Path, tmp_path: Path, devices: Tuple[Network, socket.socket], stack: contextlib.ExitStack
) -> None:
    """A kernel that refuses the walk for twins (lockdown): said when the probe is loaded, and it is loaded without."""
    copy = tmp_path / "bpf"
    shutil.copytree(find_sources(), copy)
    refused = (copy / "twins.h").read_text().replace("u64 node = 0;", "u64 node = *(volatile u64 *)8;")
    (copy / "twins.h").write_text(refused)
    assert "connections are not looked for twins: the kernel refuses" in probe.load(pin_dir, copy)
    with probe.open_probe(pin_dir, copy) as opened:
        probe.self_test(opened)
        here, server = devices
        with here.entered():
            client = stack.enter_context(bound("10.96.0.1"))
            client.connect(server.getsockname())
            answer = opened.ask(connection(client))
            assert (answer.outcome, answer.twins) == (Outcome.LABELLED, None)
            owner = BpfWitness(opened).owner_of(connection(client), budget())
            assert owner is not None
            assert owner.pid == os.getpid()


def test_a_node_on_a_link_is_asked_on_that_link(stack: contextlib.ExitStack, tmp_path: Path) -> None:
    """A link-local address comes without a scope: ours on the same link gives it, and on two links nothing does."""
    here, there = Network(stack), Network(stack)
    link(here, "left", there, "right")
    here.ip("addr", "add", "fe80::a/64", "dev", "left", "nodad")
    there.ip("addr", "add", "fe80::b/64", "dev", "right", "nodad")
    with there.entered():
        agent = stack.enter_context(socket.socket(socket.AF_INET6))
        agent.bind(("fe80::b", 0, 0, socket.if_nametoindex("right")))
        agent.listen(1)
    key = tmp_path / "key"
    key.write_text(f"{'0123456789abcdef' * 4}\n")
    key.chmod(0o600)
    ends = Connection(Endpoint.parse("[fe80::b]:4000"), Endpoint.parse("[fe80::a]:22"))

    def ask() -> str:
        workers = Workers("test", 2, 8)
        try:
            asker = Asker(SealRoom(KeySeal(key, 10), workers), agent.getsockname()[1], 20_000, Metrics())
            return asyncio.run(asker.ask(ends, ALICE, budget())).reason
        finally:
            workers.close()

    def hang_up() -> None:
        # It is asked once more, as if it had been killed.
        for _ in range(2):
            with agent.accept()[0] as asked:
                assert asked.recv(4096)

    with here.entered():
        answering = threading.Thread(target=hang_up)
        answering.start()
        assert ask() == AskFault.CLOSED.value
        answering.join()
        here.ip("link", "add", "c", "type", "veth", "peer", "name", "d")
        here.ip("addr", "add", "fe80::a/64", "dev", "c", "nodad")
        assert ask() == AskFault.UNREACHABLE.value
