"""Proof that the probe works here and now: a connection of our own, looked up, its owner compared.

Owns the loopback connections it makes for that, over IPv4 and, where the loopback has it, IPv6. Bounded
in time; leaves no socket behind. Called by the service at start and from time to time, and by doctor.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from typing import Optional

from adoptd.deadline import Deadline
from adoptd.model import Connection, Endpoint, ProbeError
from adoptd.probe.pins import OpenProbe

_BUDGET_MS = 1000.0
# The loopback has no IPv6 address, or the kernel no IPv6.
_NO_IPV6 = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def self_test(probe: OpenProbe, deadline: Optional[Deadline] = None) -> None:
    """Connect on the loopback of the caller's network namespace and ask the probe who did.

    Blocks for well under a millisecond as a rule, for a second (or until ``deadline``) at most. Raises
    ProbeError naming what was seen and what was expected.
    """
    deadline = deadline or Deadline.after_ms(_BUDGET_MS)
    _test(probe, socket.AF_INET, "127.0.0.1", deadline)
    try:
        has_ipv6 = _can_bind_ipv6()
    except OSError as error:
        raise ProbeError(f"self-test: cannot use IPv6 on the loopback: {error.strerror}") from None
    if has_ipv6:
        _test(probe, socket.AF_INET6, "::1", deadline)


def _test(probe: OpenProbe, family: socket.AddressFamily, address: str, deadline: Deadline) -> None:
    with contextlib.ExitStack() as opened:
        try:
            listener = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.bind((address, 0))
            listener.listen(1)
            client = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
            # 0 would mean "do not block" to settimeout.
            client.settimeout(max(deadline.remaining_s(), 0.001))
            client.connect(listener.getsockname())
        except OSError as error:
            raise ProbeError(f"self-test: cannot connect to {address} on the loopback: {error}") from None
        here = ipaddress.ip_address(address)
        connection = Connection(
            Endpoint(here, int(client.getsockname()[1])), Endpoint(here, int(listener.getsockname()[1]))
        )
        answer = probe.ask(connection)
    record = answer.record
    expected = f"pid {os.getpid()} uid {os.getuid()}"
    if record is None:
        seen = answer.outcome.name.lower()
        raise ProbeError(f"self-test: {connection} is {seen}, expected {expected}: is the probe attached?")
    if (record.pid, record.uid, record.seeded) != (os.getpid(), os.getuid(), False):
        how = "seeded " if record.seeded else ""
        raise ProbeError(
            f"self-test: {connection} is of {how}pid {record.pid} uid {record.uid}, expected {expected}"
            " (the agent must run in the initial pid and user namespaces)"
        )


def _can_bind_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as attempt:
            attempt.bind(("::1", 0))
    except OSError as error:
        if error.errno in _NO_IPV6:
            return False
        raise
    return True
