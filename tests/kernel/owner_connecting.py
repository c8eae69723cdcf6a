"""Connections by the call, the protocol or the option that made them. Rows of owner_cases."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import subprocess
from typing import Callable, List

from kernel import uring
from kernel.actors import (
    ALICE,
    BOB,
    Line,
    actor,
    become,
    bound,
    connection_of,
    disconnect,
    fork,
    join,
    reset,
)
from kernel.networks import Network, link
from kernel.owner_scene import Made, connect_to, is_established, made_of
from lab.waiting import until

IPPROTO_MPTCP, TCP_FASTOPEN_CONNECT, MSG_FASTOPEN = 262, 30, 0x20000000


def non_blocking(line: Line, server: socket.socket) -> None:
    client = bound()
    client.setblocking(False)
    port = client.getsockname()[1]
    assert client.connect_ex(server.getsockname()) in (0, errno.EINPROGRESS)
    assert select.select([], [client], [], 10)[1]
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    line.say(client, port)
    line.wait()


def refused_then_retried(line: Line, server: socket.socket) -> None:
    client, nobody = bound(), bound()
    port = client.getsockname()[1]
    assert client.connect_ex(nobody.getsockname()) == errno.ECONNREFUSED
    line.say(client, port, pid=join(fork(lambda: client.connect(server.getsockname()))))
    line.wait()


def reconnected(line: Line, server: socket.socket) -> None:
    client = bound()
    connect_to(client, server)
    disconnect(client)
    port = client.getsockname()[1]
    line.say(client, port, pid=join(fork(lambda: client.connect(server.getsockname()))))
    line.wait()


def sent_with_fast_open(line: Line, server: socket.socket) -> None:
    client = bound()
    port = client.getsockname()[1]
    assert client.sendto(b"x", MSG_FASTOPEN, server.getsockname()) == 1
    line.say(client, port)
    line.wait()


def connected_with_fast_open(line: Line, server: socket.socket) -> None:
    """With a cookie at hand connect() sends nothing; the first write does, here by another process."""
    for _ in range(2):
        client = bound()
        client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        port = connect_to(client, server)
        join(fork(lambda: client.sendall(b"x")))  # noqa: B023 (joined before the next round)
        until(lambda: client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\1", "it is established")  # noqa: B023
        if _ == 0:
            reset(client)
    line.say(client, port)
    line.wait()


def multipath(line: Line, server: socket.socket) -> None:
    client = bound(protocol=IPPROTO_MPTCP)
    line.say(client, connect_to(client, server))
    line.wait()


def added_path(stack: contextlib.ExitStack) -> Made:
    """The second path of a multipath connection: the kernel connects it, from a thread of its own."""
    here, there = Network(stack), Network(stack)
    for number in (1, 2):
        link(here, f"left{number}", there, f"right{number}")
        here.ip("addr", "add", f"10.98.{number}.1/24", "dev", f"left{number}")
        there.ip("addr", "add", f"10.98.{number}.2/24", "dev", f"right{number}")
    there.ip("mptcp", "endpoint", "add", "10.98.2.2", "dev", "right2", "signal")
    here.ip("mptcp", "limits", "set", "subflow", "2", "add_addr_accepted", "2")
    there.ip("mptcp", "limits", "set", "subflow", "2", "add_addr_accepted", "2")
    with there.entered():
        server = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP))
        server.bind(("0.0.0.0", 0))
        server.listen(1)

    def live(line: Line) -> None:
        become(ALICE)
        client = bound("10.98.1.1", protocol=IPPROTO_MPTCP)
        port = client.getsockname()[1]
        client.connect(("10.98.1.2", server.getsockname()[1]))
        line.say(client, port)
        line.wait()

    with here.entered():
        facts = actor(stack, live).hear()
    accepted, _ = server.accept()
    stack.enter_context(accepted)
    accepted.sendall(b"x")
    rows: List[str] = []

    def added() -> bool:
        found = subprocess.run(
            ["nsenter", f"--net={here.path}", "ss", "-Htn", "state", "established", "dst", "10.98.2.2"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        rows[:] = found
        return bool(found)

    until(added, "the kernel has added a path")
    source, destination = (end.rsplit(":", 1) for end in rows[2:4])
    ends = {"source": (source[0], int(source[1])), "destination": (destination[0], int(destination[1]))}
    return Made(connection_of(ends), facts["pid"], ALICE, here)


def by_io_uring(setup_flags: int = 0, request_flags: int = 0) -> Callable[[Line, socket.socket], None]:
    def live(line: Line, server: socket.socket) -> None:
        client = bound()
        port = client.getsockname()[1]
        uring.connect(client, server, setup_flags, request_flags)
        line.say(client, port)
        line.wait()

    return live


def both_connected(stack: contextlib.ExitStack) -> Made:
    """Simultaneous open (RFC 9293, 3.5): two sockets connect to each other, and nobody listens."""
    here, there = Network(stack), Network(stack)
    link(here, "left", there, "right")
    ports = 2001, 2002
    sides = (
        (here, "left", "10.97.0.1", ports[0], "10.97.0.2", ports[1], ALICE),
        (
            there,
            "right",
            "10.97.0.2",
            ports[1],
            "10.97.0.1",
            ports[0],
            BOB,
        ),
    )
    for number, (network, name, address, _, _, _, _) in enumerate(sides):
        network.ip("link", "set", name, "address", f"02:00:00:00:00:0{number}")
        network.ip("addr", "add", f"{address}/24", "dev", name)

    def neighbour(wrong: int) -> None:
        for number, (network, name, _, _, other, _, _) in enumerate(sides):
            hardware = f"02:00:00:00:00:0{1 - number + wrong}"
            network.ip("neigh", "replace", other, "lladdr", hardware, "dev", name, "nud", "permanent")

    # What both send first is lost, so that each has begun when it hears of the other.
    neighbour(wrong=2)
    lines = []
    for network, _, address, port, other, other_port, uid in sides:

        def live(line: Line) -> None:
            become(uid)  # noqa: B023 (forked before the next round)
            client = bound(address, port)  # noqa: B023
            client.setblocking(False)
            client.connect_ex((other, other_port))  # noqa: B023
            line.tell({"under way": True})
            until(lambda: is_established(client), "it is established", 20.0)
            line.say(client, port)  # noqa: B023
            line.wait()

        with network.entered():
            lines.append(actor(stack, live))
    for line in lines:
        line.hear()
    neighbour(wrong=0)
    facts = [line.hear() for line in lines]
    return made_of(facts[0], network=here)


def to_itself(line: Line, server: socket.socket) -> None:
    client = bound()
    port = client.getsockname()[1]
    client.connect(client.getsockname())
    line.say(client, port)
    line.wait()
