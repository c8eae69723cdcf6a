"""The bpf witness: which of the probe's answers become an owner, on the real kernel."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Iterator, Optional

import pytest

from adoptd import probe
from adoptd.connections.bpf import BpfWitness
from adoptd.deadline import Deadline
from adoptd.model import Connection, Endpoint, Owner, Witness, WitnessUnavailable
from adoptd.probe.pins import OpenProbe


@pytest.fixture
def client() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as made:
        yield made


def _connection(client: socket.socket) -> Connection:
    (source, source_port), (destination, destination_port) = client.getsockname(), client.getpeername()
    return Connection(Endpoint.parse(f"{source}:{source_port}"), Endpoint.parse(f"{destination}:{destination_port}"))


def _owner(opened: OpenProbe, connection: Connection) -> Optional[Owner]:
    return BpfWitness(opened).owner_of(connection, Deadline.after_ms(20_000))


def test_a_closed_probe_is_an_unavailable_witness(shared_pin_dir: Path, client: socket.socket) -> None:
    """The probe's errors are told as this witness being unavailable, not as "unknown"."""
    opened = probe.open_probe(shared_pin_dir)
    opened.close()
    with pytest.raises(WitnessUnavailable, match="bpf: probe: asked after it was closed"):
        _owner(opened, _connection(client))


def test_an_unknown_connection_has_no_owner(opened: OpenProbe) -> None:
    """No socket, no owner."""
    nowhere = Connection(Endpoint.parse("192.0.2.1:4000"), Endpoint.parse("192.0.2.2:22"))
    assert _owner(opened, nowhere) is None


def test_an_unlabelled_socket_has_no_owner(opened: OpenProbe, client: socket.socket) -> None:
    """The accepting end is found and carries no label: None, for the next witness to say."""
    connection = _connection(client)
    assert _owner(opened, Connection(connection.destination, connection.source)) is None


def test_a_socket_still_connecting_has_no_owner(opened: OpenProbe) -> None:
    """Addresses can be imitated by a socket that never gets an answer; a real peer has accepted already."""
    with socket.socket() as server, socket.socket() as waiting, socket.socket() as filler:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        # A queue of one, full: the next SYN is not answered.
        filler.connect(server.getsockname())
        waiting.setblocking(False)
        waiting.connect_ex(server.getsockname())
        source, destination = waiting.getsockname(), server.getsockname()
        connection = Connection(
            Endpoint.parse(f"{source[0]}:{source[1]}"), Endpoint.parse(f"{destination[0]}:{destination[1]}")
        )
        answer = opened.ask(connection)
        assert (answer.state, answer.record is None) == (2, False)
        assert _owner(opened, connection) is None


def test_a_shared_seeded_socket_has_no_owner(pin_dir: Path, client: socket.socket) -> None:
    """Which of two holders connected it cannot be told, so this witness does not say."""
    go, ended = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ended)
        os.read(go, 1)
        os._exit(0)
    os.close(go)
    try:
        probe.load(pin_dir)
        with probe.open_probe(pin_dir) as opened:
            assert _owner(opened, _connection(client)) is None
    finally:
        os.close(ended)
        os.waitpid(pid, 0)


def test_the_owner_is_the_label(opened: OpenProbe, client: socket.socket) -> None:
    """Every field of the label reaches the owner."""
    connection = _connection(client)
    record = opened.ask(connection).record
    assert record is not None
    assert _owner(opened, connection) == Owner(
        witness=Witness.BPF,
        uid=os.getuid(),
        pid=os.getpid(),
        cgroup_id=record.cgroup_id,
        connected_at_ns=record.labelled_at_ns,
        comm=record.comm,
    )
