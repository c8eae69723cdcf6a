"""The /proc witness against the running kernel: real processes that hold, inherit and pass on real sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Iterator, Optional

import pytest

from adoptd.connections.diag import DiagWitness
from adoptd.connections.proc import ProcWitness
from adoptd.deadline import Deadline
from adoptd.model import Ambiguous, Connection, Endpoint, Owner, Witness, WitnessUnavailable
from kernel.sockets import Client, ClientSpec, cgroup2_mount, remove_cgroup
from lab.waiting import until

UID = 54321
OTHER_UID = 54322
BUDGET_MS = 60_000

# Asks about a connection as a user who may not look into processes like the ones of this test.
UNPRIVILEGED = """
import os, sys
from adoptd.connections.proc import ProcWitness
from adoptd.deadline import Deadline
from adoptd.model import Connection, Endpoint, WitnessUnavailable
uid, source, destination = map(int, sys.argv[1:])
os.setresuid(uid, uid, uid)
ends = [Endpoint.parse("127.0.0.1:%d" % port) for port in (source, destination)]
try:
    print(ProcWitness().owner_of(Connection(*ends), Deadline.after_ms(10_000)))
except WitnessUnavailable as error:
    print("unavailable:", error)
"""


@pytest.fixture
def cgroup() -> Iterator[Path]:
    path = cgroup2_mount() / f"adoptd-test-proc-{os.getpid()}"
    path.mkdir()
    yield path
    remove_cgroup(path)


@pytest.fixture
def proc() -> ProcWitness:
    return ProcWitness()


def connection(client: Client, host: str = "127.0.0.1") -> Connection:
    return Connection(
        Endpoint.parse(f"{host}:{client.source_port}"), Endpoint.parse(f"{host}:{client.destination_port}")
    )


def owner_of(proc: ProcWitness, asked: Connection) -> Optional[Owner]:
    return proc.owner_of(asked, Deadline.after_ms(BUDGET_MS))


def test_no_time_is_no_answer(proc: ProcWitness) -> None:
    """Out of time the witness says how far it came, and names nobody."""
    with Client(ClientSpec(real_uid=UID)) as client, pytest.raises(WitnessUnavailable, match="out of time after"):
        proc.owner_of(connection(client), Deadline.after_ms(0))


def test_without_the_right_to_look_at_the_owners_processes_there_is_no_answer() -> None:
    """An agent that may not look into a process of the socket's uid has not seen every possible owner."""
    with Client(ClientSpec(real_uid=UID)) as client:
        said = subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED, str(UID), str(client.source_port), str(client.destination_port)],
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        assert said.startswith("unavailable: cannot look into /proc/")


def test_holders_of_two_users_are_nobody(proc: ProcWitness) -> None:
    """A descriptor shared with a process of another uid leaves no certain owner."""
    with Client(ClientSpec(socket_uid=UID)) as client:
        client.tell(f"fork {UID}")
        with pytest.raises(Ambiguous, match=f"process {client.pid} of uid 0"):
            owner_of(proc, connection(client))


def test_a_socket_held_only_by_another_user_is_nobodys(proc: ProcWitness) -> None:
    """Whoever is left holding somebody else's socket does not become its owner."""
    with Client(ClientSpec(socket_uid=UID)) as client:
        client.tell(f"fork {OTHER_UID}")
        client.tell("close-client")
        with pytest.raises(Ambiguous, match=f"is uid {UID}'s"):
            owner_of(proc, connection(client))


def test_a_process_acting_for_two_users_is_nobody(proc: ProcWitness) -> None:
    """As a set-user-ID program does: real and effective uid differ, and neither is believed."""
    spec = ClientSpec(real_uid=OTHER_UID, effective_uid=UID)
    with Client(spec) as client, pytest.raises(Ambiguous, match="acts for 2 users"):
        owner_of(proc, connection(client))


def test_holders_in_two_cgroups_are_nobody(proc: ProcWitness, cgroup: Path) -> None:
    """The job could be either one's."""
    with Client(ClientSpec(socket_uid=UID)) as client:
        client.tell(f"fork {UID}")
        client.tell(f"fork {UID} {cgroup}")
        client.tell("close-client")
        with pytest.raises(Ambiguous, match="different cgroups"):
            owner_of(proc, connection(client))


def test_a_second_socket_with_the_tuple_is_not_mistaken_for_it(proc: ProcWitness) -> None:
    """Any user can make a second socket with the addresses of one that is bound to a device.

    Its connect() is never answered, so it stays in SYN_SENT: not a connection, and not mistaken for one.
    """
    with Client(ClientSpec(device="lo", real_uid=UID)) as client:
        asked = connection(client)
        with socket.socket() as twin:
            twin.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            twin.setblocking(False)
            twin.bind(("127.0.0.1", client.source_port))
            twin.connect_ex(("127.0.0.1", client.destination_port))
            rows = Path("/proc/net/tcp").read_text()
            assert rows.count(f"0100007F:{client.source_port:04X} 0100007F:{client.destination_port:04X} ") == 2
            owner = owner_of(proc, asked)
        assert owner is not None
        assert (owner.uid, owner.pid) == (UID, client.pid)


def test_another_network_namespace_is_not_seen(proc: ProcWitness) -> None:
    """The same addresses in a namespace that somebody made are another connection."""
    with Client(ClientSpec(real_uid=OTHER_UID, own_network=True)) as client:
        assert owner_of(proc, connection(client)) is None


def test_time_wait_is_nobody(proc: ProcWitness) -> None:
    """No process holds it any more."""
    with Client(ClientSpec(real_uid=UID)) as client:
        client.tell("finish")
        local = f":{client.source_port:04X} 0100007F:{client.destination_port:04X} 06 "
        until(lambda: local in Path("/proc/net/tcp").read_text(), "the client is in TIME_WAIT")
        assert owner_of(proc, connection(client)) is None


def test_a_file_named_like_the_socket_does_not_hold_it(proc: ProcWitness, tmp_path: Path) -> None:
    """Neither a file of that name nor a unix socket's path opened with O_PATH makes a process a holder."""
    tmp_path.chmod(0o755)
    with Client(ClientSpec(real_uid=UID)) as client, Client(ClientSpec()) as liar:
        (tmp_path / "a").mkdir()
        plain = tmp_path / "a" / f"socket:[{client.inode}]"
        plain.touch()
        liar.tell(f"open {plain}")
        with socket.socket(socket.AF_UNIX) as listening:
            bound = tmp_path / f"socket:[{client.inode}]"
            listening.bind(str(bound))
            liar.tell(f"open {bound}")
            owner = owner_of(proc, connection(client))
        assert owner is not None
        assert owner.pid == client.pid


@pytest.mark.parametrize(
    ("spec", "host"),
    [
        (ClientSpec(real_uid=UID), "127.0.0.1"),
        (ClientSpec(address="::1", real_uid=UID), "[::1]"),
        (ClientSpec(mapped=True, real_uid=UID), "127.0.0.1"),
        (ClientSpec(device="lo", real_uid=UID), "127.0.0.1"),
    ],
    ids=["ipv4", "ipv6", "mapped", "bound to a device"],
)
@pytest.mark.parametrize("source_of_inode", ["table", "diag"])
def test_the_holder_is_found(spec: ClientSpec, host: str, source_of_inode: str) -> None:
    """Uid, pid and command of the process that holds the socket, wherever its inode is learnt."""
    diag = DiagWitness()
    try:
        proc = ProcWitness(sockets=diag if source_of_inode == "diag" else None)
        with Client(spec) as client:
            owner = owner_of(proc, connection(client, host))
            comm = Path(f"/proc/{client.pid}/comm").read_text().strip()
            assert owner == Owner(Witness.PROC, UID, pid=client.pid, comm=comm)
    finally:
        diag.close()


def test_a_process_that_is_not_dumpable_keeps_its_uid(proc: ProcWitness) -> None:
    """The files in a setuid child's /proc/PID belong to root; its uid is read from status all the same."""
    with Client(ClientSpec(real_uid=UID)) as client:
        assert Path(f"/proc/{client.pid}/fd").stat().st_uid == 0
        owner = owner_of(proc, connection(client))
        assert owner is not None
        assert owner.uid == UID


def test_the_oldest_of_several_holders_speaks_for_all(proc: ProcWitness) -> None:
    """Forked holders in the same cgroups: the parent while it holds the socket, the child once it does not."""
    with Client(ClientSpec(real_uid=UID)) as client:
        child = client.tell("fork")["pid"]
        owner = owner_of(proc, connection(client))
        assert owner is not None
        assert owner.pid == client.pid
        client.tell("close-client")
        owner = owner_of(proc, connection(client))
        assert owner is not None
        assert (owner.uid, owner.pid) == (UID, child)
