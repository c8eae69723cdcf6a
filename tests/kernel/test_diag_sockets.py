"""The sock_diag witness against the running kernel, with real connections on loopback."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Iterator, Optional

import pytest

from adoptd.connections.diag import DiagWitness
from adoptd.deadline import Deadline
from adoptd.model import Connection, Endpoint, Owner, Witness
from kernel.sockets import Client, ClientSpec, cgroup2_mount, remove_cgroup
from lab.waiting import until

UID = 54321
OTHER_UID = 54322


@pytest.fixture
def diag() -> Iterator[DiagWitness]:
    witness = DiagWitness()
    yield witness
    witness.close()


@pytest.fixture
def cgroup() -> Iterator[Path]:
    path = cgroup2_mount() / f"adoptd-test-diag-{os.getpid()}"
    path.mkdir()
    yield path
    remove_cgroup(path)


def connection(client: Client, address: str = "127.0.0.1") -> Connection:
    host = f"[{address}]" if ":" in address else address
    return Connection(
        Endpoint.parse(f"{host}:{client.source_port}"), Endpoint.parse(f"{host}:{client.destination_port}")
    )


def ask(diag: DiagWitness, asked: Connection) -> Optional[Owner]:
    return diag.owner_of(asked, Deadline.after_ms(20_000))


def test_the_self_test_finds_its_own_connection(diag: DiagWitness) -> None:
    """This kernel has sock_diag: the tests below would otherwise prove nothing."""
    assert diag.self_test() is None


def test_a_listener_on_the_source_port_is_nobody(diag: DiagWitness) -> None:
    """The kernel answers an unmatched question with a listener on that port, which owns no connection."""
    with Client(ClientSpec()) as client:
        server = Endpoint.parse(f"127.0.0.1:{client.destination_port}")
        stranger = Endpoint.parse("127.0.0.9:9")
        assert ask(diag, Connection(server, stranger)) is None


@pytest.mark.parametrize("end", ["source", "destination"])
@pytest.mark.parametrize("change", ["address", "port"])
def test_another_tuple_is_nobody(diag: DiagWitness, end: str, change: str) -> None:
    """One address or port that differs is another connection."""
    with Client(ClientSpec(real_uid=UID)) as client:
        real = connection(client)
        ends = {"source": real.source, "destination": real.destination}
        was = ends[end]
        ends[end] = Endpoint.parse(f"127.0.0.9:{was.port}" if change == "address" else f"127.0.0.1:{was.port ^ 1}")
        assert ask(diag, Connection(**ends)) is None
        assert ask(diag, real) is not None


def test_time_wait_is_nobody_and_not_root(diag: DiagWitness) -> None:
    """A connection in TIME_WAIT has uid 0 and inode 0 in the kernel's words: it must not become root's."""
    with Client(ClientSpec(real_uid=UID)) as client:
        asked = connection(client)
        client.tell("finish")
        local = f":{client.source_port:04X} 0100007F:{client.destination_port:04X} 06 "
        until(lambda: local in Path("/proc/net/tcp").read_text(), "the client is in TIME_WAIT")
        assert ask(diag, asked) is None


def test_an_orphan_is_nobody_and_not_root(diag: DiagWitness) -> None:
    """A socket closed by its last holder while the other end is open (FIN_WAIT2) has no uid any more."""
    with Client(ClientSpec(real_uid=UID)) as client:
        asked = connection(client)
        client.tell("close-client orderly")
        assert ask(diag, asked) is None


def test_another_network_namespace_is_not_seen(diag: DiagWitness) -> None:
    """Anybody can make the same 4-tuple in a namespace of their own; only ours is asked."""
    with Client(ClientSpec(real_uid=UID)) as ours:
        asked = connection(ours)
        same = ClientSpec(
            source_port=ours.source_port, destination_port=ours.destination_port, own_network=True, real_uid=OTHER_UID
        )
        with Client(same):
            owner = ask(diag, asked)
            assert owner is not None
            assert owner.uid == UID
            ours.close()
            assert ask(diag, asked) is None


def test_a_socket_bound_to_a_device_is_found_on_it(diag: DiagWitness) -> None:
    """The reply says which: that is how two of them are told apart."""
    with Client(ClientSpec(device="lo", real_uid=UID)) as client:
        found = diag.find(connection(client), Deadline.after_ms(20_000))
        assert found is not None
        assert (found.uid, found.inode, found.device) == (UID, client.inode, socket.if_nametoindex("lo"))


@pytest.mark.parametrize(
    ("spec", "address"),
    [
        (ClientSpec(real_uid=UID), "127.0.0.1"),
        (ClientSpec(address="::1", real_uid=UID), "::1"),
        (ClientSpec(mapped=True, real_uid=UID), "127.0.0.1"),
        (ClientSpec(mapped=True, real_uid=UID), "::ffff:127.0.0.1"),
    ],
    ids=["ipv4", "ipv6", "mapped socket", "mapped socket and question"],
)
def test_the_uid_of_the_process_that_made_the_socket(diag: DiagWitness, spec: ClientSpec, address: str) -> None:
    """Whatever family the socket is of, the uid is the setuid child's, and no pid is claimed."""
    with Client(spec) as client:
        asked = connection(client, address)
        found = diag.find(asked, Deadline.after_ms(20_000))
        assert found is not None
        assert found.inode == client.inode
        owner = ask(diag, asked)
        assert owner is not None
        assert (owner.witness, owner.uid, owner.pid) == (Witness.DIAG, UID, None)


def test_the_cgroup_id_is_the_inode_of_the_v2_cgroup(diag: DiagWitness, cgroup: Path) -> None:
    """Two independent sources agree: attribute 21 of the reply, and stat() of the cgroup's directory."""
    with Client(ClientSpec(cgroup=str(cgroup))) as client:
        owner = ask(diag, connection(client))
        assert owner is not None
        assert owner.cgroup_id == cgroup.stat().st_ino


def test_the_owner_stays_when_only_a_forked_child_is_left(diag: DiagWitness) -> None:
    """The uid is the socket's, not its holder's: a child of another uid that inherited it changes nothing."""
    with Client(ClientSpec()) as client:
        client.tell(f"fork {UID}")
        client.tell("close-client")
        owner = ask(diag, connection(client))
        assert owner is not None
        assert owner.uid == os.geteuid()
