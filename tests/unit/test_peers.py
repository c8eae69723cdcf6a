"""Who answered with which release, and who did not: bounded, forgotten, and replaced by what came last."""

from __future__ import annotations

import ipaddress
import threading

from adoptd.callerid import Peer, Peers
from adoptd.callerid.peers import ADDRESSES_MAX, FORGET_S

A, B = ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("fd00::2")


def test_the_latest_is_first_and_what_came_last_counts() -> None:
    """An answer takes the silence off, and silence the release."""
    now = 100.0
    peers = Peers(lambda: now)
    peers.silent(A, "timeout")
    now = 110.0
    peers.answered(B, "1.2")
    assert peers.now() == (Peer(B, "1.2", "", 0.0), Peer(A, "", "timeout", 10.0))
    assert peers.count_silent() == 1
    peers.answered(A, "1.3")
    assert peers.now() == (Peer(A, "1.3", "", 0.0), Peer(B, "1.2", "", 0.0))
    assert peers.count_silent() == 0
    peers.silent(B, "refused")
    assert peers.now() == (Peer(B, "", "refused", 0.0), Peer(A, "1.3", "", 0.0))


def test_what_was_long_ago_says_nothing_about_now() -> None:
    """Nor is it counted, though nobody was asked since."""
    now = 0.0
    peers = Peers(lambda: now)
    peers.silent(A, "timeout")
    now = FORGET_S
    assert (len(peers.now()), peers.count_silent()) == (1, 1)
    now = FORGET_S + 1
    assert peers.count_silent() == 0
    assert peers.now() == ()


def test_a_whole_network_that_is_silent_takes_bounded_memory() -> None:
    """The oldest go."""
    peers = Peers(lambda: 0.0)
    for number in range(3 * ADDRESSES_MAX):
        peers.silent(ipaddress.ip_address(number), "unreachable")
    assert len(peers.now()) == ADDRESSES_MAX
    assert peers.now()[0].address == ipaddress.ip_address(3 * ADDRESSES_MAX - 1)


def test_it_is_counted_while_it_changes() -> None:
    """The scrapes' thread counts what the event loop writes."""
    peers = Peers(lambda: 0.0)
    begun, done = threading.Event(), threading.Event()

    def write() -> None:
        for number in range(50_000):
            peers.silent(ipaddress.ip_address(number % (2 * ADDRESSES_MAX)), "timeout")
            begun.set()
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    begun.wait(60)
    counts = [peers.count_silent()]
    while not done.is_set():
        counts.append(peers.count_silent())
    writer.join()
    assert all(1 <= count <= ADDRESSES_MAX for count in counts)
    assert peers.count_silent() == ADDRESSES_MAX
