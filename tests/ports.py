"""A port for a daemon of a test's own. Used where the port has to be known before the daemon has it."""

from __future__ import annotations

import contextlib
import random
import socket

# bind() to port 0 chooses among those that connect() chooses from, from 32768 on: other tests make connections by the
# thousand.
_PORTS = range(10_000, 30_000)


def free_port() -> int:
    """A TCP port of the loopback that nobody has now, and that no client is given before it is used."""
    for port in random.sample(_PORTS, 1000):
        with contextlib.suppress(OSError), socket.socket() as tried:
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError("of a thousand ports of the loopback none is free")
