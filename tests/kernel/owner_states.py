"""Connections by how far they came, or are gone. Rows of owner_cases."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from pathlib import Path

from adoptd.model import Connection
from kernel.actors import (
    ALICE,
    Line,
    actor,
    become,
    bound,
    connection_of,
    fill_option_memory,
    listener,
    reset,
)
from kernel.owner_scene import Made, connect_to, made_of, ordinary
from lab.waiting import until


def half_closed(line: Line, server: socket.socket) -> None:
    client = bound()
    port = connect_to(client, server)
    client.shutdown(socket.SHUT_WR)
    line.say(client, port)
    line.wait()


def closed_by_the_server(stack: contextlib.ExitStack) -> Made:
    server = listener(stack)

    def live(line: Line) -> None:
        become(ALICE)
        ordinary(line, server)

    made = made_of(actor(stack, live).hear())
    accepted, _ = server.accept()
    accepted.close()
    return made


def left_unsent(line: Line, server: socket.socket) -> None:
    """Closed with more to send than the other end takes: in FIN_WAIT1, and no process holds it."""
    client = bound()
    port = connect_to(client, server)
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            client.send(bytes(1 << 16))
    source, destination = client.getsockname(), client.getpeername()
    assert source[1] == port
    client.close()
    line.tell({"pid": os.getpid(), "source": source, "destination": destination})
    line.wait()


def time_wait(stack: contextlib.ExitStack) -> Made:
    server = listener(stack)

    def live(line: Line) -> None:
        become(ALICE)
        client = bound()
        port = connect_to(client, server)
        line.say(client, port)
        client.close()
        line.wait()

    made = made_of(actor(stack, live).hear())
    accepted, _ = server.accept()
    assert accepted.recv(1) == b""
    accepted.close()
    until(lambda: _state_of(made.connection) == 6, "the client is in TIME_WAIT")
    return made


def _state_of(asked: Connection) -> int:
    """The state in /proc/net/tcp of an IPv4 loopback connection; 0 if it is not there."""
    needle = f" 0100007F:{asked.source.port:04X} 0100007F:{asked.destination.port:04X} "
    for row in Path("/proc/net/tcp").read_text().splitlines():
        if needle in row:
            return int(row.split()[3], 16)
    return 0


def was_reset(line: Line, server: socket.socket) -> None:
    client = bound()
    port = connect_to(client, server)
    source, destination = client.getsockname(), client.getpeername()
    assert source[1] == port
    accepted, _ = server.accept()
    reset(accepted)
    assert select.select([client], [], [], 10)[0]
    line.tell({"pid": os.getpid(), "source": source, "destination": destination})
    line.wait()


def only_a_listener(stack: contextlib.ExitStack) -> Made:
    """Asked about a connection that is not there, from a port that somebody listens on."""
    server, asked = listener(stack), listener(stack)
    ends = {"source": asked.getsockname(), "destination": server.getsockname()}
    return Made(connection_of(ends), os.getpid(), os.getuid())


def never_answered(line: Line, server: socket.socket) -> None:
    client = bound()
    client.setblocking(False)
    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    fillers = [socket.socket(), socket.socket()]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(full.getsockname())
    client.connect_ex(full.getsockname())
    line.tell({"pid": os.getpid(), "source": client.getsockname(), "destination": full.getsockname()})
    line.wait()


def no_room_for_a_label(line: Line, server: socket.socket) -> None:
    os.seteuid(ALICE)
    client = bound()
    os.seteuid(0)
    # Filters of this size are root's to attach on some kernels (net.core.bpf_jit_limit).
    fill_option_memory(client)
    become(ALICE)
    line.say(client, connect_to(client, server))
    line.wait()
