"""Telling systemd how the agent is: sd_notify(3), which is one datagram. Nothing happens outside systemd."""

from __future__ import annotations

import asyncio
import os
import socket

from adoptd import log

# A manager that is well takes a datagram at once. One whose queue is full is waited for no longer than this: the event
# loop waits with us.
_SEND_S = 1.0


def notify(*assignments: str) -> None:
    """Send ``READY=1`` and the like to the service manager, if there is one. Never raises."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    # A leading @ is the abstract namespace (sd_notify(3)).
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(_SEND_S)
            sock.connect(address)
            sock.sendall("\n".join(assignments).encode())
    except OSError as error:
        log.warning("notify_failed", socket=path, error=error.strerror or str(error))


def watchdog_interval_s() -> float:
    """How often to say WATCHDOG=1: half of what systemd allows; 0 if it does not watch this process."""
    try:
        if int(os.environ.get("WATCHDOG_PID", os.getpid())) != os.getpid():
            return 0.0
        return int(os.environ.get("WATCHDOG_USEC", "0")) / 2_000_000
    except ValueError:
        return 0.0


async def feed_watchdog() -> None:
    """Say WATCHDOG=1 as often as systemd wants to hear it, for as long as the event loop turns."""
    interval_s = watchdog_interval_s()
    while interval_s > 0:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)
