"""What doctor concludes of ports, of peers, and of the metrics, in each of their states, from facts."""

from __future__ import annotations

import dataclasses
import ipaddress
from typing import List, Mapping, Optional, Tuple

import pytest
from judging import FAILURE, OK, SCENE, WARNING, judged

from adoptd import __version__
from adoptd.callerid import AskFault
from adoptd.doctor import callerid, exporter, ports
from adoptd.doctor.findings import Grade
from adoptd.wire.callerid import Reason

HERE = ipaddress.ip_address("0.0.0.0")
ASKED = [("callerid", "0.0.0.0", 6830)]


@pytest.mark.parametrize(
    ("wanted", "listeners", "grade", "words"),
    [
        (ASKED, [ports.Listener(HERE, 6830, ("adoptd (pid 7)",), 0)], OK, ""),
        (ASKED, [], FAILURE, "nobody listens on 0.0.0.0 port 6830"),
        (ASKED, [ports.Listener(HERE, 6830, ("nc (pid 8)",), 1000)], FAILURE, "held by nc (pid 8) of uid 1000"),
        (ASKED, [ports.Listener(ipaddress.ip_address("::"), 6830, (), 0)], FAILURE, "nobody listens"),
        ([("metrics", "127.0.0.1", 9830)], [], WARNING, "nobody listens"),
        ([("metrics", "127.0.0.1", 9830)], [ports.Listener(HERE, 9830, (), 1000)], FAILURE, "uid 1000"),
        ([("callerid", "::", 6830)], [], FAILURE, "no IPv6"),
    ],
)
def test_ports(wanted: List[Tuple[str, str, int]], listeners: List[ports.Listener], grade: Grade, words: str) -> None:
    """Ours or somebody's."""
    found = list(ports.judge_ports(wanted, listeners, True, ipv6=False))
    assert judged(found)[0] is grade, found
    assert words in judged(found)[1] or not words


def test_a_port_that_another_program_of_roots_has() -> None:
    """Not the agent's, nor the service manager's for it."""
    for pids, agent, grade in (
        ((7,), 7, OK),
        ((1,), 7, OK),
        ((1, 7), 7, OK),
        ((), 7, OK),
        ((8,), None, OK),
        ((8,), 7, FAILURE),
    ):
        listener = ports.Listener(HERE, 6830, ("x (pid 8)",), 0, pids)
        found = list(ports.judge_ports(ASKED, [listener], True, ipv6=True, agent=agent))
        assert judged(found)[0] is grade, (pids, agent)
    (found_,) = ports.judge_ports([("metrics", "0.0.0.0", 6830)], [listener], True, ipv6=True, agent=7)
    assert (found_.grade, "held by x (pid 8), and not by the agent" in found_.seen) == (WARNING, True)


@pytest.mark.parametrize(
    ("listen", "metrics", "metrics_port", "clash"),
    [
        (("0.0.0.0", "::"), "127.0.0.1", 6830, True),
        (("0.0.0.0", "::"), "127.0.0.1", 9830, False),
        (("10.0.0.1",), "0.0.0.0", 6830, True),
        (("10.0.0.1",), "127.0.0.1", 6830, False),
        (("::",), "127.0.0.1", 6830, False),
    ],
)
def test_two_of_ours_at_one_place(listen: Tuple[str, ...], metrics: str, metrics_port: int, clash: bool) -> None:
    """Only one of them gets it."""
    found = list(ports.judge_overlap(listen, 6830, metrics, metrics_port))
    assert [each.grade for each in found] == ([FAILURE] if clash else [])


def test_callerid_switched_off_is_said() -> None:
    """It is not what most sites want."""
    assert judged(list(ports.judge_ports([], [], False)))[0] is WARNING
    assert [list(ports.judge_loopback(up)) for up in (True, None)] == [[], []]
    assert judged(list(ports.judge_loopback(False)))[0] is FAILURE


ANSWERED = callerid.Heard(Reason.NOT_FOUND.value, "", 2.5, release=__version__)


@pytest.mark.parametrize(
    ("heard", "connects", "grade", "words"),
    [
        (ANSWERED, None, OK, ""),
        (dataclasses.replace(ANSWERED, took_ms=400.0), None, WARNING, "logins wait 300 ms"),
        (dataclasses.replace(ANSWERED, ahead_s=0.5, precision_s=0.1), None, OK, ""),
        (dataclasses.replace(ANSWERED, ahead_s=-4.5, precision_s=1.1), None, WARNING, "4.5 s behind"),
        (dataclasses.replace(ANSWERED, ahead_s=-3.5, precision_s=1.1), None, OK, ""),
        (dataclasses.replace(ANSWERED, ahead_s=8.0, precision_s=1.1), None, WARNING, "8.0 s ahead"),
        (callerid.Heard(AskFault.TIMEOUT.value, "", 2000.0), "connected", FAILURE, "hangs"),
        (callerid.Heard(AskFault.TIMEOUT.value, "", 2000.0), "no reply after 1.5 s", FAILURE, "packets vanish"),
        *(
            (callerid.Heard(fault.value, "", 1.0), None, FAILURE, words)
            for fault, words in (
                (AskFault.REFUSED, "connection refused"),
                (AskFault.UNREACHABLE, "not reachable"),
                (AskFault.CLOSED, "clocks 10 s apart"),
                (AskFault.MALFORMED, "no agent of this protocol"),
                (AskFault.BAD_SEAL, "sealed otherwise"),
                (AskFault.FOREIGN, "a user's program"),
                (AskFault.WRONG_HOST, "another host's"),
                (AskFault.SEAL_UNAVAILABLE, "sealing fails here"),
                (AskFault.WRONG_NONCE, "wrong_nonce"),
            )
        ),
    ],
)
def test_peer(heard: callerid.Heard, connects: Optional[str], grade: Grade, words: str) -> None:
    """Everything that can come of a question."""
    found = list(callerid.judge_peer("n2 (10.0.0.2)", 6830, heard, connects, SCENE))
    assert judged(found)[0] is grade, found
    assert words in judged(found)[1] or not words
    assert not any("{" in each.seen + each.remedy for each in found)


@pytest.mark.parametrize(
    ("listen", "address"),
    [(("0.0.0.0", "::"), "127.0.0.1"), (("::",), "::1"), (("10.0.0.1",), "10.0.0.1")],
)
def test_own_address(listen: Tuple[str, ...], address: str) -> None:
    """Where the agent can be asked from its own node."""
    assert str(ports.own_address(listen)) == address


@pytest.mark.parametrize(("age_s", "grade"), [(None, WARNING), (3.0, OK), (900.0, WARNING)])
def test_textfile(age_s: Optional[float], grade: Grade) -> None:
    """There and fresh."""
    assert judged(list(exporter.judge_textfile("/t", age_s)))[0] is grade


SEVEN = {"nodes": 7, "latest": "10.0.0.1, 10.0.0.2, 10.0.0.3, 10.0.0.4, 10.0.0.5"}
STATUS = {"releases": {__version__: SEVEN}, "unheard": {}}
OLDER = {"0.0.9": {"nodes": 1, "latest": "10.0.0.9"}}


@pytest.mark.parametrize(
    ("status", "grade", "words"),
    [
        (STATUS, OK, f"version {__version__} on all nodes asked within the hour (7)"),
        ({"releases": {}, "unheard": {}}, OK, "--peer NODE asks one"),
        ({**STATUS, "releases": {__version__: SEVEN, **OLDER}}, WARNING, "0.0.9 on 1 (10.0.0.9)"),
        ({**STATUS, "releases": {"9.9": SEVEN}}, WARNING, "9.9 on 7 (10.0.0.1, 10.0.0.2, "),
        ({**STATUS, "unheard": {"10.0.0.8": "timeout, 3 s ago"}}, WARNING, "at last 10.0.0.8: timeout, 3 s ago"),
        ({**STATUS, "unheard": {"10.0.0.8": "refused, 3 s ago"}}, OK, "(7)"),
    ],
)
def test_peers_asked_by_the_agent(status: Mapping[str, object], grade: Grade, words: str) -> None:
    """One version everywhere, or not; a login node, which refuses, is no fault."""
    found = list(callerid.judge_peers_asked(dict(status)))
    assert judged(found)[0] is grade
    assert any(words in each.seen for each in found), found


def test_an_older_agent_says_nothing_of_peers() -> None:
    """Its version is said elsewhere."""
    assert list(callerid.judge_peers_asked({"version": "0.0.1"})) == []


def test_many_nodes_are_not_all_named() -> None:
    """The line is one of a screen."""
    (found,) = callerid.judge_peers_asked({"releases": {"9.9": SEVEN}, "unheard": {}})
    assert "10.0.0.5, ...)" in found.seen


def test_a_peer_of_another_version_is_named() -> None:
    """It answers, and that is said too."""
    heard = dataclasses.replace(ANSWERED, release="9.9")
    answered, other = callerid.judge_peer("n2 (10.0.0.2)", 6830, heard, None, SCENE)
    assert (answered.grade, other.grade) == (OK, WARNING)
    assert f"version 9.9, here it is {__version__}" in other.seen
