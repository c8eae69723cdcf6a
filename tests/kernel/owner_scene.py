"""What the cases of owners have in common: a row of the table, and processes that make a connection and say so.

Owns no expectation. Used by the families of cases (owner_addresses and the like) and by their table, owner_cases.
"""

from __future__ import annotations

import contextlib
import enum
import socket
from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional

from adoptd.model import Connection
from kernel.actors import (
    ALICE,
    Line,
    actor,
    become,
    bound,
    connection_of,
    listener,
)
from kernel.networks import Network


class Says(enum.Enum):
    """What a witness says. OWNER: the user that connected, and the process if it names one. OTHER: another user."""

    OWNER = "owner"
    NOBODY = "nobody"
    DOUBT = "doubt"
    OTHER = "other"


@dataclass(frozen=True)
class Made:
    """A connection and who called connect(). ``network``: where its socket is, None: in the test's namespace."""

    connection: Connection
    pid: int
    uid: int = ALICE
    network: Optional[Network] = None


Make = Callable[[contextlib.ExitStack], Made]


@dataclass(frozen=True)
class Case:
    """``answer`` and ``witness``: what comes of all witnesses together. ``older``: the probe is loaded afterwards."""

    name: str
    make: Make
    answer: str = "owner"
    witness: str = "bpf"
    bpf: Says = Says.OWNER
    diag: Says = Says.OWNER
    proc: Says = Says.OWNER
    older: bool = False


def made_of(facts: Dict[str, Any], uid: int = ALICE, network: Optional[Network] = None) -> Made:
    return Made(connection_of(facts), facts["pid"], uid, network)


def plain(life: Callable[[Line, socket.socket], None], protocol: int = 0) -> Make:
    """``life`` by a process of ALICE's, given a server on the IPv4 loopback."""

    def make(stack: contextlib.ExitStack) -> Made:
        server = listener(stack, protocol=protocol)

        def live(line: Line) -> None:
            become(ALICE)
            life(line, server)

        return made_of(actor(stack, live).hear())

    return make


def as_root(life: Callable[[Line, socket.socket], None]) -> Make:
    """The same, but ``life`` becomes whom it likes."""

    def make(stack: contextlib.ExitStack) -> Made:
        server = listener(stack)
        return made_of(actor(stack, lambda line: life(line, server)).hear())

    return make


def connect_to(client: socket.socket, server: socket.socket) -> int:
    port = int(client.getsockname()[1])
    client.connect(server.getsockname())
    return port


def ordinary(line: Line, server: socket.socket) -> None:
    client = bound()
    line.say(client, connect_to(client, server))
    line.wait()


def is_established(client: socket.socket) -> bool:
    return client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\1"
