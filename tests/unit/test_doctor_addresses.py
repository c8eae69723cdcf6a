"""What doctor says of the addresses that the agent is to listen at."""

from __future__ import annotations

from typing import List

import pytest

from adoptd.doctor import ports
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
