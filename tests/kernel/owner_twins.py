"""Connections that others share a port, an address or the whole 4-tuple with. Rows of owner_cases."""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import Callable, List, Tuple

from kernel.actors import (
    ALICE,
    BOB,
    Line,
    actor,
    become,
    bound,
    connection_of,
    listener,
    reset,
)
from kernel.networks import Network, link
from kernel.owner_scene import Made, connect_to, made_of, ordinary, plain


def two_servers(stack: contextlib.ExitStack) -> Made:
    """BOB from one port to one server, ALICE from the same port to another."""
    first, second = listener(stack), listener(stack)

    def live_as(uid: int, server: socket.socket, port: int) -> Callable[[Line], None]:
        def live(line: Line) -> None:
            become(uid)
            client = bound(port=port)
            line.say(client, connect_to(client, server))
            line.wait()

        return live

    bobs = actor(stack, live_as(BOB, first, 0)).hear()
    made = made_of(actor(stack, live_as(ALICE, second, bobs["source"][1])).hear())
    assert made.connection.source.port == bobs["source"][1]
    return made


def port_used_again(stack: contextlib.ExitStack) -> Made:
    """BOB's connection is reset, and ALICE has the same addresses and ports at once."""
    server = listener(stack)

    def bob(line: Line) -> None:
        become(BOB)
        client = bound()
        line.say(client, connect_to(client, server))
        line.hear()
        reset(client)
        line.tell({"gone": True})
        line.wait()

    line = actor(stack, bob)
    first = line.hear()
    line.tell({"go": True})
    line.hear()

    def alice(line: Line) -> None:
        become(ALICE)
        client = bound(port=first["source"][1])
        line.say(client, connect_to(client, server))
        line.wait()

    made = made_of(actor(stack, alice).hear())
    assert made.connection == connection_of(first)
    return made


def on_a_device(line: Line, server: socket.socket) -> None:
    client = bound(device="lo")
    line.say(client, connect_to(client, server))
    line.wait()


class _Fork:
    """A network with two links, at the far ends of which two others have one address and a server on one port."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.here = Network(stack)
        self.servers: List[socket.socket] = []
        port = 0
        for number, name in enumerate(("one", "two")):
            there = Network(stack)
            link(self.here, name, there, "far")
            there.ip("addr", "add", "10.99.0.2/24", "dev", "far")
            # The table says where to, the socket's device says which.
            self.here.ip("addr", "add", "10.99.0.1/24", "dev", name, *(["noprefixroute"] if number else []))
            self.here.ip("route", "append", "10.99.0.0/24", "dev", name, "metric", str(100 + number))
            with there.entered():
                self.servers.append(listener(stack, "10.99.0.2", port))
            port = self.servers[0].getsockname()[1]

    def connect(self, stack: contextlib.ExitStack, uid: int, port: int, device: str) -> Tuple[Line, Made]:
        """A connection of that user's, over that device or over whichever the routing table says."""

        def live(line: Line) -> None:
            become(uid)
            client = bound("10.99.0.1", port, device)
            line.say(client, connect_to(client, self.servers[0]))
            line.wait()

        with self.here.entered():
            line = actor(stack, live)
            return line, made_of(line.hear(), uid, self.here)


def twins_on_two_devices(stack: contextlib.ExitStack) -> Made:
    scene = _Fork(stack)
    _, first = scene.connect(stack, BOB, 0, "one")
    _, made = scene.connect(stack, ALICE, first.connection.source.port, "two")
    assert made.connection == first.connection
    return made


def twin_on_a_device(stack: contextlib.ExitStack) -> Made:
    """BOB's over one link, bound to it; ALICE's, as ssh makes it, over the other."""
    scene = _Fork(stack)
    _, first = scene.connect(stack, BOB, 0, "two")
    _, made = scene.connect(stack, ALICE, first.connection.source.port, "")
    assert made.connection == first.connection
    return made


def ended_twin(stack: contextlib.ExitStack) -> Made:
    """The same, but BOB's server has closed: what a user can leave lying about for others."""
    scene = _Fork(stack)
    _, first = scene.connect(stack, BOB, 0, "two")
    accepted, _ = scene.servers[1].accept()
    accepted.close()
    return scene.connect(stack, ALICE, first.connection.source.port, "")[1]


def imitated(stack: contextlib.ExitStack) -> Made:
    """ALICE's is bound to a device; BOB's has its addresses, and nobody ever answers it."""
    scene = _Fork(stack)
    _, made = scene.connect(stack, ALICE, 0, "one")
    scene.here.ip("route", "add", "10.99.0.2/32", "dev", "two")
    scene.here.ip("neigh", "replace", "10.99.0.2", "lladdr", "02:00:00:00:00:09", "dev", "two", "nud", "permanent")

    def bob(line: Line) -> None:
        become(BOB)
        client = bound("10.99.0.1", made.connection.source.port)
        client.setblocking(False)
        assert client.connect_ex(scene.servers[0].getsockname()) == errno.EINPROGRESS
        line.tell({"under way": True})
        line.wait()

    with scene.here.entered():
        actor(stack, bob).hear()
    return made


def same_in_another_network(stack: contextlib.ExitStack) -> Made:
    made = plain(ordinary)(stack)
    elsewhere = Network(stack)
    with elsewhere.entered():
        server = listener(stack, port=made.connection.destination.port)

    def bob(line: Line) -> None:
        become(BOB)
        client = bound(port=made.connection.source.port)
        line.say(client, connect_to(client, server))
        line.wait()

    with elsewhere.entered():
        other = actor(stack, bob).hear()
    assert connection_of(other) == made.connection
    return made
