"""Which connection the module names, with real sockets in a network namespace: only the one inbound, or none."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Tuple

import pytest

from pam.pam_double import DENIAL, Agent, Request, say
from pam.pam_login import Login, Outcome

LOOPBACK_4 = ipaddress.ip_address("127.0.0.1").packed + bytes(12)
LOOPBACK_6 = ipaddress.ip_address("::1").packed


def ask(login: Login, *sockets: str, phase: str = "account") -> Tuple[Request, Outcome]:
    """What the module sends, from a process that holds these sockets."""
    with Agent(login.socket_path, (say(DENIAL.pack()),)) as agent:
        outcome = login(sockets=sockets, steps=(phase,))
    assert outcome.rc == "PAM_PERM_DENIED"
    (request,) = agent.requests
    return request, outcome


@pytest.mark.parametrize(
    ("sockets", "reason"),
    [
        (("inbound4", "inbound4"), "2 inbound connections, cannot tell which is the login's"),
        (("inbound4", "inbound6"), "2 inbound connections, cannot tell which is the login's"),
        (("outbound4",), "no listener on the local port of any of 1 connections"),
        (("outbound4", "outbound4"), "no listener on the local port of any of 2 connections"),
        # A user listens on the port of the daemon's LDAP connection, on another address.
        (("spoiled",), "no listener on the local port of any of 1 connections"),
        # What `sshd -d` does to its listener.
        (("unserved",), "no listener on the local port of any of 1 connections"),
        (("closing",), "no TCP connection among the descriptors"),
        (("self_listener", "udp"), "no TCP connection among the descriptors"),
        ((), "no TCP connection among the descriptors"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_a_connection_that_is_not_certain_is_not_named(login: Login, sockets: Tuple[str, ...], reason: str) -> None:
    """Family 0 with every address and port 0, and the reason in the log: never just the first one."""
    request, outcome = ask(login, *sockets)
    assert (request.family, request.remote_port, request.local_port) == (0, 0, 0)
    assert request.remote_address == request.local_address == bytes(16)
    assert outcome.log[0] == f"phase=account connection not known: {reason}"


@pytest.mark.parametrize(
    ("sockets", "family", "address", "place"),
    [
        (("inbound4",), 4, LOOPBACK_4, 0),
        (("inbound6",), 6, LOOPBACK_6, 0),
        (("mapped",), 4, LOOPBACK_4, 0),
        (("device",), 4, LOOPBACK_4, 0),
        (("duplicate",), 4, LOOPBACK_4, 0),
        (("high",), 4, LOOPBACK_4, 0),
        (("outbound4", "inbound4"), 4, LOOPBACK_4, 1),
        (("inbound4", "outbound4", "udp", "self_listener", "closing"), 4, LOOPBACK_4, 0),
        (("spoiled", "unserved", "inbound6"), 6, LOOPBACK_6, 2),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("phase", ["account", "session"])
def test_the_inbound_connection_is_named(
    login: Login, sockets: Tuple[str, ...], family: int, address: bytes, place: int, phase: str
) -> None:
    """Both ends of the one inbound connection, whatever else is open; IPv4-mapped is IPv4; any descriptor number."""
    request, outcome = ask(login, *sockets, phase=phase)
    assert (request.family, request.remote_port, request.local_port) == (family, 40000 + place, 22000 + place)
    assert (request.remote_address, request.local_address) == (address, address)
    assert not [line for line in outcome.log if "not known" in line]


@pytest.mark.parametrize(("forged", "port"), [("", 22000), ("sender", 22000), ("port", 0)])
def test_only_the_kernel_s_answer_to_the_question_is_believed(
    login: Login, forged_kernel: Path, forged: str, port: int
) -> None:
    """Whoever has CAP_NET_ADMIN can write to the module's netlink socket; a kernel may answer with the nearest."""
    environ = {"LD_PRELOAD": str(forged_kernel), "FORGED": forged}
    with Agent(login.socket_path, (say(DENIAL.pack()),)) as agent:
        outcome = login(sockets=("inbound4",), environ=environ)
    assert outcome.rc == "PAM_PERM_DENIED"
    assert [request.local_port for request in agent.requests] == [port]


def test_the_connection_is_in_the_log_at_debug(login: Login) -> None:
    """IPv6 in brackets, the client first."""
    with Agent(login.socket_path, (say(DENIAL.pack()),)):
        outcome = login("log_level=debug", sockets=("inbound6",))
    assert outcome.log[0] == "phase=account connection [::1]:40000 > [::1]:22000"
