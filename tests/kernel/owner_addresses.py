"""Connections by how their ends are spelt and chosen. Rows of owner_cases."""

from __future__ import annotations

import contextlib
import socket

from kernel.actors import (
    ALICE,
    Line,
    actor,
    become,
    bound,
    listener,
)
from kernel.networks import Network, link
from kernel.owner_scene import Made, Make, made_of


def between(client_address: str, server_address: str, wanted: str = "") -> Make:
    """From one address to another; ``wanted`` is how the server's is spelt by the client."""

    def make(stack: contextlib.ExitStack) -> Made:
        server = listener(stack) if server_address == "127.0.0.1" else _dual(stack, server_address)

        def live(line: Line) -> None:
            become(ALICE)
            client = bound(client_address)
            port = client.getsockname()[1]
            client.connect((wanted or client_address, server.getsockname()[1]))
            line.say(client, port)
            line.wait()

        return made_of(actor(stack, live).hear())

    return make


def _dual(stack: contextlib.ExitStack, address: str) -> socket.socket:
    return stack.enter_context(
        socket.create_server((address, 0), family=socket.AF_INET6, dualstack_ipv6=address == "::", backlog=64)
    )


def link_local(stack: contextlib.ExitStack) -> Made:
    here, there = Network(stack), Network(stack)
    link(here, "left", there, "right")
    here.ip("addr", "add", "fe80::a/64", "dev", "left", "nodad")
    there.ip("addr", "add", "fe80::b/64", "dev", "right", "nodad")
    with there.entered():
        server = stack.enter_context(socket.socket(socket.AF_INET6))
        server.bind(("fe80::b", 0, 0, socket.if_nametoindex("right")))
        server.listen(1)

    def live(line: Line) -> None:
        become(ALICE)
        client = socket.socket(socket.AF_INET6)
        scope = socket.if_nametoindex("left")
        client.bind(("fe80::a", 0, 0, scope))
        port = client.getsockname()[1]
        client.connect(("fe80::b", server.getsockname()[1], 0, scope))
        line.say(client, port)
        line.wait()

    with here.entered():
        return made_of(actor(stack, live).hear(), network=here)


def port_of_the_kernel(line: Line, server: socket.socket) -> None:
    client = socket.create_connection(server.getsockname())
    line.say(client, client.getsockname()[1])
    line.wait()
