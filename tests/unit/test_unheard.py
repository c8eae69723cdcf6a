"""Who did not answer: bounded, forgotten, and taken off by an answer."""

from __future__ import annotations

import ipaddress

from adoptd.callerid import Unheard
from adoptd.callerid.unheard import ADDRESSES_MAX, FORGET_S

A, B = ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("fd00::2")


def test_the_latest_is_first_and_an_answer_takes_off() -> None:
    now = 100.0
    unheard = Unheard(lambda: now)
    unheard.note(A, "timeout")
    now = 110.0
    unheard.note(B, "refused")
    assert unheard.now() == ((B, "refused", 0.0), (A, "timeout", 10.0))
    unheard.note(A, "bad_seal")
    assert unheard.now() == ((A, "bad_seal", 0.0), (B, "refused", 0.0))
    unheard.heard(B)
    unheard.heard(B)
    assert unheard.now() == ((A, "bad_seal", 0.0),)
    assert len(unheard) == 1


def test_what_was_long_ago_says_nothing_about_now() -> None:
    now = 0.0
    unheard = Unheard(lambda: now)
    unheard.note(A, "timeout")
    now = FORGET_S
    assert len(unheard.now()) == 1
    now = FORGET_S + 1
    assert unheard.now() == ()


def test_a_whole_network_that_is_silent_takes_bounded_memory() -> None:
    unheard = Unheard(lambda: 0.0)
    for number in range(3 * ADDRESSES_MAX):
        unheard.note(ipaddress.ip_address(number), "unreachable")
    assert len(unheard) == ADDRESSES_MAX
    assert unheard.now()[0][0] == ipaddress.ip_address(3 * ADDRESSES_MAX - 1)
