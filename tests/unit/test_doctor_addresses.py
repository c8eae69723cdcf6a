"""What doctor says of the addresses that the agent is to listen at, and of a peer's that are this node's own."""

from __future__ import annotations

import ipaddress
from typing import List

import pytest
from judging import FAILURE, SCENE, WARNING

from adoptd.doctor import callerid, ports
from adoptd.doctor.findings import Grade, worst


@pytest.mark.parametrize(
    ("listen", "foreign", "grade"),
    [
        (["0.0.0.0", "::"], [], Grade.OK),
        (["10.0.0.1"], [], Grade.OK),
        (["127.0.0.1", "10.0.0.1"], [], Grade.OK),
        (["127.0.0.1", "::1"], [], Grade.WARNING),
        (["10.0.0.9"], ["10.0.0.9"], Grade.FAILURE),
    ],
)
def test_addresses(listen: List[str], foreign: List[str], grade: Grade) -> None:
    """Others' cannot be listened at, and at the loopback's nobody else asks."""
    assert worst(list(ports.judge_addresses(listen, foreign))) is grade


def test_whose_an_address_is() -> None:
    """By binding to it; 192.0.2.0/24 is nobody's (RFC 5737)."""
    assert ports.is_ours("127.0.0.1")
    assert ports.is_ours("0.0.0.0")
    assert not ports.is_ours("192.0.2.77")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1", "0.0.0.0"])
def test_a_peer_that_is_this_node(address: str) -> None:
    """What it answers is not shown of any other node."""
    assert callerid._leads_here(ipaddress.ip_address(address), 6830)
    (found,) = callerid.look_at_peer(address)(SCENE)
    assert (found.grade, "at this node itself" in found.seen) == (WARNING, True)


def test_peers_that_are_others() -> None:
    """Nor is what cannot be reached, or is no host's, taken for ours."""
    for address in ("192.0.2.77", "224.0.0.1", "255.255.255.255", "fe80::1"):
        assert not callerid._leads_here(ipaddress.ip_address(address), 6830)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("root@localhost", "the name or the address of one host"),
        ("localhost:6830", "of one host"),
        ("a,b", "of one host"),
    ],
)
def test_a_peer_that_is_no_host(name: str, words: str) -> None:
    """A word as of ssh's command line is no name to look up."""
    (found,) = callerid.look_at_peer(name)(SCENE)
    assert (found.grade, words in found.remedy) == (FAILURE, True)
    (found,) = callerid.look_at_peer("nosuch.invalid")(SCENE)
    assert "getent hosts nosuch.invalid" in found.remedy
