"""What the probe says of real sockets: refusals and unknowns first, then who connected."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import socket
import struct
import time
from pathlib import Path
from typing import Callable, Iterator, Tuple

import pytest

from adoptd import probe
from adoptd.model import Connection, Endpoint
from adoptd.probe.pins import OpenProbe
from adoptd.probe.record import Outcome, SocketRecord
from adoptd.process import started_ns
from kernel.actors import disconnect, fill_option_memory

NOBODY = 65534


def connection_of(client: socket.socket) -> Connection:
    """The connection ``client`` made, mapped addresses folded as everywhere."""
    return Connection(_endpoint(client.getsockname()), _endpoint(client.getpeername()))


def _endpoint(name: Tuple[str, int]) -> Endpoint:
    return Endpoint.parse(f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield server


def in_child(action: Callable[[], None]) -> int:
    """Run ``action`` in a forked child, wait for its end, and return the pid it had."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    return pid


def _record(opened: OpenProbe, client: socket.socket) -> SocketRecord:
    answer = opened.ask(connection_of(client))
    assert answer.outcome is Outcome.LABELLED, answer
    assert answer.record is not None
    return answer.record


def test_an_unknown_connection_is_not_found(opened: OpenProbe, listener: socket.socket) -> None:
    """Addresses nobody uses, IPv4 and IPv6: no socket, no state, no record. The closed one of before, too."""
    with socket.create_connection(listener.getsockname()) as client:
        known = connection_of(client)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    unknown = [
        Connection(Endpoint.parse("192.0.2.1:4000"), Endpoint.parse("192.0.2.2:22")),
        Connection(Endpoint.parse("[2001:db8::1]:4000"), Endpoint.parse("[2001:db8::2]:22")),
        known,
    ]
    for connection in unknown:
        answer = opened.ask(connection)
        assert (answer.outcome, answer.state, answer.record) == (Outcome.NOT_FOUND, None, None)


@pytest.mark.parametrize(("address", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_a_listener_is_not_the_connection(opened: OpenProbe, address: str, family: socket.AddressFamily) -> None:
    """The kernel falls back to a listening socket on the source port: refused and counted."""
    with socket.socket(family) as server:
        server.bind((address, 0))
        server.listen(1)
        before = opened.counters()["query_listener"]
        here = _endpoint(server.getsockname())
        answer = opened.ask(Connection(here, Endpoint(here.address, 9)))
        assert (answer.outcome, answer.record) == (Outcome.LISTENER, None)
        assert opened.counters()["query_listener"] == before + 1


def test_a_wildcard_listener_is_not_the_connection(opened: OpenProbe) -> None:
    """The same for a dual-stack listener on all addresses, asked about by IPv4."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        source = Endpoint.parse(f"127.0.0.1:{port}")
        assert opened.ask(Connection(source, Endpoint.parse("127.0.0.1:9"))).outcome is Outcome.LISTENER


def test_the_accepting_end_has_no_label(opened: OpenProbe, listener: socket.socket) -> None:
    """Asked the wrong way round, the socket found is the one that accepted: unlabelled, not somebody's."""
    with socket.create_connection(listener.getsockname()) as client:
        server, _ = listener.accept()
        with server:
            answer = opened.ask(connection_of(server))
            assert (answer.outcome, answer.state, answer.record) == (Outcome.UNLABELLED, 1, None)
            assert client.fileno() >= 0


def test_another_network_namespace_is_not_searched(opened: OpenProbe, listener: socket.socket) -> None:
    """The same addresses and ports in a namespace anyone can make do not stand for ours."""
    libc = ctypes.CDLL(None, use_errno=True)
    with socket.create_connection(listener.getsockname()) as client:
        connection = connection_of(client)
        ours = os.open("/proc/self/ns/net", os.O_RDONLY)
        try:
            # The calling thread's own; the others, if any, stay where they are.
            assert libc.unshare(0x40000000) == 0
            elsewhere = opened.ask(connection).outcome
        finally:
            assert libc.setns(ours, 0x40000000) == 0
            os.close(ours)
        assert elsewhere is Outcome.NOT_FOUND
        assert _record(opened, client).pid == os.getpid()


def test_a_socket_without_memory_for_a_label_is_unattributed(opened: OpenProbe, listener: socket.socket) -> None:
    """Its owner can fill a socket's option memory: then nobody is named, it is counted, and connect() still works."""
    before = opened.counters()["storage_refused"]
    with socket.socket() as client:
        fill_option_memory(client)
        client.connect(listener.getsockname())
        answer = opened.ask(connection_of(client))
        assert (answer.outcome, answer.state, answer.record) == (Outcome.UNLABELLED, 1, None)
    assert opened.counters()["storage_refused"] > before


def test_a_filled_socket_does_not_keep_its_old_label(opened: OpenProbe, listener: socket.socket) -> None:
    """Connected, filled up and connected by another process: that one or nobody, never the first."""
    with socket.socket() as client:
        client.connect(listener.getsockname())
        assert _record(opened, client).pid == os.getpid()
        disconnect(client)
        fill_option_memory(client)
        in_child(lambda: client.connect(listener.getsockname()))
        record = opened.ask(connection_of(client)).record
        assert record is None or record.pid != os.getpid()


@pytest.mark.parametrize(
    ("family", "address", "bound_to"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET6, "::1", "::1"),
        (socket.AF_INET6, "::ffff:127.0.0.1", "127.0.0.1"),
    ],
    ids=["ipv4", "ipv6", "mapped"],
)
def test_the_connector_is_named(opened: OpenProbe, family: socket.AddressFamily, address: str, bound_to: str) -> None:
    """Pid, uid, comm, time and cgroup of the process that called connect(), over each family."""
    before_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    serving = socket.AF_INET6 if ":" in bound_to else socket.AF_INET
    with socket.create_server((bound_to, 0), family=serving) as server, socket.socket(family) as client:
        client.connect((address, server.getsockname()[1]))
        record = _record(opened, client)
    assert (record.pid, record.uid, record.seeded, record.shared) == (os.getpid(), os.getuid(), False, False)
    assert record.comm == Path("/proc/self/comm").read_text().rstrip("\n")
    assert record.connected_at_ns is not None
    assert before_ns <= record.connected_at_ns <= time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    started = started_ns(os.getpid())
    assert started is not None
    assert started < record.connected_at_ns


def test_the_uid_is_the_childs(opened: OpenProbe, listener: socket.socket) -> None:
    """A child that became another user before it connected is that user, whoever made the socket."""
    with socket.socket() as client:

        def connect() -> None:
            os.setgroups([])
            os.setresuid(NOBODY, NOBODY, NOBODY)
            client.connect(listener.getsockname())

        pid = in_child(connect)
        record = _record(opened, client)
        assert (record.pid, record.uid) == (pid, NOBODY)


def test_the_cgroup_is_the_connectors(opened: OpenProbe, listener: socket.socket, cgroup: Path) -> None:
    """The cgroup id is the inode number of the connecting process's group, also after it has left."""
    with socket.socket() as client:

        def connect() -> None:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))
            client.connect(listener.getsockname())
            (cgroup.parent / "cgroup.procs").write_text(str(os.getpid()))

        in_child(connect)
        assert _record(opened, client).cgroup_id == cgroup.stat().st_ino


def test_a_reconnect_is_the_reconnecters(opened: OpenProbe, listener: socket.socket) -> None:
    """Disconnected by AF_UNSPEC and connected by another process: the label is the new one, whole."""
    with socket.socket() as client:
        client.connect(listener.getsockname())
        first = _record(opened, client)
        disconnect(client)
        pid = in_child(lambda: client.connect(listener.getsockname()))
        second = _record(opened, client)
    assert (first.pid, second.pid) == (os.getpid(), pid)
    assert second.labelled_at_ns > first.labelled_at_ns


def test_a_second_connect_on_a_connected_socket_changes_nothing(opened: OpenProbe, listener: socket.socket) -> None:
    """EISCONN leaves the owner: nobody can relabel a connection they were handed."""
    with socket.create_connection(listener.getsockname()) as client:
        first = _record(opened, client)

        def connect_again() -> None:
            assert client.connect_ex(listener.getsockname()) == errno.EISCONN

        in_child(connect_again)
        assert _record(opened, client) == first


def test_every_connection_has_its_own_label(opened: OpenProbe, listener: socket.socket) -> None:
    """23 connections of 23 processes to one listener: each is its own process's."""
    clients = [socket.socket() for _ in range(23)]
    try:
        pids = [in_child(functools.partial(client.connect, listener.getsockname())) for client in clients]
        assert [_record(opened, client).pid for client in clients] == pids
    finally:
        for client in clients:
            client.close()


def test_a_seeded_socket_names_its_holder_and_no_time(pin_dir: Path, listener: socket.socket) -> None:
    """Older than the probe and held by one process: that process, marked, without a connect time."""
    with socket.create_connection(listener.getsockname()) as client:
        probe.load(pin_dir)
        with probe.open_probe(pin_dir) as opened:
            record = _record(opened, client)
            assert opened.counters()["seeded"] >= 1
    assert (record.pid, record.uid, record.seeded, record.shared) == (os.getpid(), os.getuid(), True, False)
    assert record.connected_at_ns is None
    assert record.comm == Path("/proc/self/comm").read_text().rstrip("\n")


def test_a_seeded_socket_knows_its_holders_cgroup(pin_dir: Path, listener: socket.socket, cgroup: Path) -> None:
    """The one fact that names a job on version 2 hosts is right for seeded sockets too."""
    go, ended = os.pipe()
    ready, done = os.pipe()
    client = socket.create_connection(listener.getsockname())
    connection = connection_of(client)
    pid = os.fork()
    if pid == 0:
        os.close(ended)
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))
        os.write(done, b"1")
        os.read(go, 1)
        os._exit(0)
    client.close()
    os.close(go)
    try:
        assert os.read(ready, 1) == b"1"
        probe.load(pin_dir)
        with probe.open_probe(pin_dir) as opened:
            record = opened.ask(connection).record
        assert record is not None
        assert (record.pid, record.cgroup_id, record.shared) == (pid, cgroup.stat().st_ino, False)
    finally:
        for fd in (ended, ready, done):
            os.close(fd)
        os.waitpid(pid, 0)


def test_a_seeded_socket_of_two_holders_is_marked(pin_dir: Path, listener: socket.socket) -> None:
    """Held by two processes when the probe was loaded: marked shared, and counted."""
    go, ended = os.pipe()
    with socket.create_connection(listener.getsockname()) as client:
        pid = os.fork()
        if pid == 0:
            os.close(ended)
            os.read(go, 1)
            os._exit(0)
        os.close(go)
        try:
            probe.load(pin_dir)
            with probe.open_probe(pin_dir) as opened:
                record = _record(opened, client)
                assert (record.seeded, record.shared) == (True, True)
                assert record.pid in (pid, os.getpid())
                assert opened.counters()["seed_shared"] >= 1
        finally:
            os.close(ended)
            os.waitpid(pid, 0)


def test_a_seeded_socket_of_another_user_is_not_labelled(pin_dir: Path, listener: socket.socket) -> None:
    """Made by one user and held by another: nobody is named rather than one of the two."""
    os.seteuid(NOBODY)
    try:
        client = socket.socket()
    finally:
        os.seteuid(0)
    with client:
        client.connect(listener.getsockname())
        probe.load(pin_dir)
        with probe.open_probe(pin_dir) as opened:
            assert opened.ask(connection_of(client)).outcome is Outcome.UNLABELLED
            assert opened.counters()["seed_disagreed"] >= 1
