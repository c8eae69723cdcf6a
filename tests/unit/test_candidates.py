"""Which of several sockets with one 4-tuple is the connection, and which link an address is on: no kernel needed."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adoptd.connections.candidates import CONNECTED_STATES, OPEN_STATES, search, the_one
from adoptd.connections.links import is_link_local, scope_of
from adoptd.model import Ambiguous, Connection, Endpoint

ENDS = Connection(Endpoint.parse("192.0.2.1:4000"), Endpoint.parse("192.0.2.2:22"))
ESTABLISHED, SYN_SENT, CLOSE_WAIT = 1, 2, 8


@dataclass(frozen=True)
class Found:
    state: Optional[int]
    device: Optional[int] = None


class Kernel:
    """Sockets in the order of a chain, and what a look-up on a device returns: the first that fits."""

    def __init__(self, *chain: Found) -> None:
        self.chain = chain
        self.asked: List[int] = []

    def ask(self, device: int) -> Optional[Found]:
        self.asked.append(device)
        return next((each for each in self.chain if each.device in (None, device)), None)


def found_on(kernel: Kernel, *devices: int) -> Optional[Found]:
    return search(ENDS, kernel.ask, lambda: devices)


def test_two_devices_two_sockets_are_nobody() -> None:
    """Each answered on its own device: no reason to prefer either."""
    with pytest.raises(Ambiguous, match="2 sockets are"):
        found_on(Kernel(Found(ESTABLISHED, 3), Found(ESTABLISHED, 4)), 1, 3, 4)


def test_nothing_is_nobody() -> None:
    """No socket on any device, or no device."""
    assert found_on(Kernel(), 1, 2, 3) is None
    assert found_on(Kernel()) is None


@pytest.mark.parametrize("state", sorted(set(range(1, 13)) - CONNECTED_STATES))
def test_a_socket_that_is_not_connected_is_no_candidate(state: int) -> None:
    """Nor does it keep the others from being looked for; what it hides stays hidden."""
    kernel = Kernel(Found(state))
    assert found_on(kernel, 1, 2) is None
    assert kernel.asked == [0, 1, 2]


def test_one_bound_to_no_device_ends_the_search() -> None:
    """The ordinary connection costs one question."""
    kernel = Kernel(Found(ESTABLISHED), Found(ESTABLISHED, 3))
    assert found_on(kernel, 1, 3) == Found(ESTABLISHED)
    assert kernel.asked == [0]


def test_one_on_a_device_is_found_there() -> None:
    """Also when it is seen more than once: it is one socket."""
    assert found_on(Kernel(Found(ESTABLISHED, 3)), 1, 3, 3) == Found(ESTABLISHED, 3)


@given(st.dictionaries(st.integers(1, 9), st.sampled_from(sorted(CONNECTED_STATES)), max_size=6))
def test_only_a_single_likely_one_is_believed(sockets: Dict[int, int]) -> None:
    """Of those whose peer has not closed there may be one; if there is none, of the others."""
    chain = [Found(state, device) for device, state in sockets.items()]
    likely = [each for each in chain if each.state in OPEN_STATES] or chain
    if len(likely) > 1:
        with pytest.raises(Ambiguous):
            the_one(ENDS, chain)
        with pytest.raises(Ambiguous):
            found_on(Kernel(*chain), *range(1, 10))
    else:
        assert the_one(ENDS, chain) == (likely[0] if likely else None)
        assert found_on(Kernel(*chain), *range(1, 10)) == (likely[0] if likely else None)


def test_an_ended_twin_is_no_rival() -> None:
    """Whoever leaves ended connections lying about makes nobody else's doubtful."""
    assert found_on(Kernel(Found(CLOSE_WAIT, 3), Found(ESTABLISHED, 4)), 3, 4) == Found(ESTABLISHED, 4)


def _links(directory: Path, *rows: str) -> str:
    (directory / "net").mkdir()
    (directory / "net" / "if_inet6").write_text("".join(f"{row}\n" for row in rows))
    return str(directory)


@pytest.mark.parametrize("devices", [[], ["02", "03"]], ids=["none", "two"])
def test_an_address_on_no_link_or_on_two_has_no_scope(tmp_path: Path, devices: List[str]) -> None:
    """Not the first one: the error says how many there are."""
    rows = [f"fe80000000000000000000000000000a {device} 40 20 80     eth0" for device in devices]
    with pytest.raises(OSError, match=f"fe80::a is an address of {len(devices)} links here, expected 1"):
        scope_of(ipaddress.ip_address("fe80::a"), _links(tmp_path, *rows))


def test_the_scope_is_the_device_that_has_the_address(tmp_path: Path) -> None:
    """By the whole address, and its index is hexadecimal."""
    rows = (
        "fe80000000000000000000000000000a 1f 40 20 80     eth0",
        "fe80000000000000000000000000000b 20 40 20 80     eth1",
    )
    assert scope_of(ipaddress.ip_address("fe80::a"), _links(tmp_path, *rows)) == 31


@pytest.mark.parametrize(
    ("address", "expected"), [("fe80::1", True), ("febf::1", True), ("fd00::1", False), ("169.254.0.1", False)]
)
def test_which_addresses_need_a_scope(address: str, expected: bool) -> None:
    """IPv4's link-local addresses are routed like any other."""
    assert is_link_local(ipaddress.ip_address(address)) is expected
