"""Endpoints and connections: one spelling per endpoint, and no value that is not one."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adoptd.deadline import Deadline
from adoptd.model import Connection, Endpoint

ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "10.0.0.1",
        "10.0.0.1:",
        "10.0.0.1:0",
        "10.0.0.1:65536",
        "10.0.0.1:-1",
        "10.0.0.1:+22",
        "10.0.0.1:2 2",
        "10.0.0.1:\u0662\u0662",
        "10.0.0.1:22\n",
        " 10.0.0.1:22",
        "10.0.0.256:22",
        "010.0.0.1:22",
        "host:22",
        "fd00::1:22",
        "[fd00::1]",
        "[fd00::1]22",
        "[10.0.0.1]:22",
        "[fd00::1:22",
        "[]:22",
        "[::ffff:10.0.0.1:22",
        "10.0.0.1:" + "2" * 5000,
    ],
)
def test_what_is_no_endpoint_is_refused_with_the_text(text: str) -> None:
    """Only IPV4:PORT and [IPV6]:PORT; the message shows what was given."""
    with pytest.raises(ValueError, match="is not IPV4:PORT or") as refusal:
        Endpoint.parse(text)
    assert repr(text)[:40] in str(refusal.value)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    """A socket never has such a port."""
    with pytest.raises(ValueError, match=r"not in 1\.\.65535"):
        Endpoint(ipaddress.ip_address("10.0.0.1"), port)


def test_ends_of_different_versions_are_no_connection() -> None:
    """TCP has one IP version per connection."""
    with pytest.raises(ValueError, match="different IP versions"):
        Connection(Endpoint.parse("10.0.0.1:1"), Endpoint.parse("[fd00::1]:2"))


def test_a_mapped_address_is_the_ipv4_one() -> None:
    """A dual-stack sshd and the client's socket name the same connection."""
    dual = Connection(Endpoint.parse("[::ffff:10.0.0.1]:40000"), Endpoint.parse("[::ffff:10.0.0.2]:22"))
    plain = Connection(Endpoint.parse("10.0.0.1:40000"), Endpoint.parse("10.0.0.2:22"))
    assert dual == plain
    assert hash(dual) == hash(plain)
    assert dual.version == 4
    assert str(dual) == "10.0.0.1:40000 > 10.0.0.2:22"


@given(ADDRESSES, st.integers(1, 65535))
def test_text_and_back(address: ipaddress.IPv4Address, port: int) -> None:
    """str() of an endpoint is read back as the same endpoint."""
    endpoint = Endpoint(address, port)
    assert Endpoint.parse(str(endpoint)) == endpoint


def test_a_deadline_is_never_negative_and_never_extended() -> None:
    """remaining_s() can be handed to any timeout; earlier() only shortens."""
    past = Deadline.after_ms(-1000)
    assert past.expired
    assert past.remaining_s() == 0.0
    assert past.earlier(60_000) == past
    later = Deadline.after_ms(60_000)
    assert later.earlier(1).at_s < later.at_s
    assert not later.expired
