"""The commands: who may see what, and what is refused before anything is done."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import pwd
import socket
from typing import Dict, Iterator, List, Tuple

import pytest
from control_scene import ControlScene
from fakes import ALICE, BOB, FakeAsker, FakeBackend, connection, job

from adoptd.callerid import Told
from adoptd.control import Asking, CommandRefused
from adoptd.jobs import CgroupFinding, CgroupVerdict
from adoptd.model import Connection, JobManagerError, Owner, Witness
from adoptd.wire.callerid import Outcome
from adoptd.wire.control import Command, Result

NAMED = Told(Outcome.JOB, "owner", "17", Witness.BPF)
NOBODY_NAME = pwd.getpwuid(65534).pw_name
ENDS = connection()
SPELLED = {"source": "127.0.0.1:40000", "destination": "127.0.0.2:22"}


class Node(ControlScene):
    def __init__(self, callerid: bool = True) -> None:
        self.backend = FakeBackend(job("18"), job("17"), job("7", BOB), job("9", 65534))
        self.backend.of_cgroup[1] = CgroupVerdict(CgroupFinding.JOB, "test", job("17"))
        self.asker = FakeAsker(NAMED) if callerid else None
        owner = Owner(Witness.BPF, ALICE, pid=os.getpid(), cgroup_id=1, comm="ssh")
        super().__init__(self.backend, {ENDS: owner}, self.asker)

    def do(self, name: str, uid: int = 0, /, **arguments: str) -> Result:
        return asyncio.run(self.control.execute(Command(name, arguments), Asking(uid)))


@pytest.fixture
def node() -> Iterator[Node]:
    with contextlib.closing(Node()) as made:
        yield made


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        (
            "reboot",
            {},
            "unknown command 'reboot', this agent knows configuration, explain, jobs, join, sessions, status, watch, ",
        ),
        ("__init__", {}, "unknown command"),
        ("status", {"x": "1"}, "status takes nothing and may take nothing, got x"),
        ("whois", {}, "whois takes destination, source and may take at, got nothing"),
        ("whois", {"source": "127.0.0.1:1"}, "whois takes destination, source"),
        ("whois", {**SPELLED, "uid": "0"}, "whois takes destination, source"),
        ("whois", {**SPELLED, "source": "localhost:1"}, "'localhost:1' is not IPV4:PORT"),
        ("whois", {**SPELLED, "destination": "[::1]:22"}, "different IP versions"),
        ("explain", {"user": "no-such-user-here"}, "there is no user 'no-such-user-here'"),
        ("explain", {"user": "root", "from": "nowhere"}, "'nowhere' is not IPV4:PORT"),
        ("explain", {"user": "root", "from": "127.0.0.1:1", "to": "[::1]:22"}, "different IP versions"),
        ("explain", {"user": "root", "options": "action_unknown=guess"}, "action_unknown is 'guess', expected newest"),
        ("explain", {"user": "root", "options": "action_no_jobs=allow"}, "action_no_jobs is 'allow', expected deny"),
        ("explain", {"user": "root", "options": "single_job_skip_rpc=yes"}, "single_job_skip_rpc is 'yes', expected 0"),
    ],
)
def test_what_is_not_understood_is_refused_in_words(
    node: Node, name: str, arguments: Dict[str, str], words: str
) -> None:
    """Unknown commands, arguments too few or too many, and values that are none."""
    with pytest.raises(CommandRefused) as refusal:
        node.do(name, **arguments)
    assert words in str(refusal.value)


@pytest.mark.parametrize("host", ["x" * 64, "a..b", "::1", "fd00::1"])
def test_a_node_that_has_no_address(node: Node, host: str) -> None:
    """Names that the resolver refuses, in whichever way, are refused in words."""
    with pytest.raises(CommandRefused, match="has no IPv4 address"):
        node.do("whois", at=host, **SPELLED)
    assert node.asker is not None
    assert node.asker.asked == []


def test_a_name_is_looked_up_for_root_alone(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that nobody answers for held both threads of everybody's commands, for one user who asked repeatedly."""

    def looked_up(*_: object, **__: object) -> None:
        raise AssertionError("a name of an ordinary user's choice is looked up")

    monkeypatch.setattr("socket.getaddrinfo", looked_up)
    with pytest.raises(CommandRefused, match="is no IP address; only root may give a name here"):
        node.do("whois", BOB, at="silent.example", **SPELLED)
    with pytest.raises(CommandRefused, match="has no IPv4 address"):
        node.do("whois", BOB, at="fd00::1", **SPELLED)
    assert node.asker is not None
    assert node.asker.asked == []


def test_callerid_switched_off() -> None:
    """--at needs the question between nodes."""
    with contextlib.closing(Node(callerid=False)) as node:
        with pytest.raises(CommandRefused, match="callerid is switched off"):
            node.do("whois", at="127.0.0.1", **SPELLED)
        assert node.do("status")["seal"] is None


def test_the_nodes_that_were_asked_are_shown_to_root_by_version(node: Node) -> None:
    """And those that did not answer; which hosts these are is no user's business."""
    assert node.asker is not None
    for number in range(7):
        node.asker.peers.answered(ipaddress.ip_address(f"10.0.0.{number}"), "1.0")
    node.asker.peers.answered(ipaddress.ip_address("fd00::9"), "0.9")
    node.asker.peers.silent(ipaddress.ip_address("10.0.0.8"), "timeout")
    status = node.do("status")
    assert status["releases"] == {
        "0.9": {"nodes": 1, "latest": "fd00::9"},
        "1.0": {"nodes": 7, "latest": "10.0.0.6, 10.0.0.5, 10.0.0.4, 10.0.0.3, 10.0.0.2"},
    }
    assert status["unheard"] == {"10.0.0.8": "timeout, 0 s ago"}
    assert not {"releases", "unheard"} & node.do("status", BOB).keys()


def test_no_list_of_nodes_is_longer_than_a_screen(node: Node) -> None:
    """However many there are."""
    assert node.asker is not None
    for number in range(100):
        address = ipaddress.ip_address(0x0A000000 + number)
        node.asker.peers.answered(address, f"1.{number}")
        node.asker.peers.silent(ipaddress.ip_address(0x0B000000 + number), "timeout")
    status = node.do("status")
    assert [len(status[name]) for name in ("releases", "unheard")] == [10, 20]  # type: ignore[arg-type]


def test_others_jobs_are_not_shown(node: Node) -> None:
    """Root sees all, others their own."""
    assert node.do("jobs", BOB) == {"jobs": [{"job": "7", "uid": BOB}]}
    assert node.do("jobs", 4242) == {"jobs": []}
    assert node.do("jobs", 0)["jobs"] == [
        {"job": "18", "uid": ALICE},
        {"job": "17", "uid": ALICE},
        {"job": "7", "uid": BOB},
        {"job": "9", "uid": 65534},
    ]


def test_the_job_manager_is_down(node: Node) -> None:
    """An error, and not an empty list."""
    node.backend.down = "no mount"
    with pytest.raises(JobManagerError, match="no mount"):
        node.do("jobs")


def test_another_user_s_connection_is_not_told(node: Node) -> None:
    """Neither its job nor its process, uid or witness."""
    told = node.do("whois", BOB, **SPELLED)
    assert (told["outcome"], told["reason"]) == ("unknown", "not_found")
    assert [told[key] for key in ("job", "witness", "uid", "pid", "comm", "detail")] == [None] * 5 + [""]


@pytest.mark.parametrize("reason", ["other_user", "job_not_told", "slurmd_names_other"])
def test_explaining_tells_no_more_of_others_connections_than_whois(node: Node, reason: str) -> None:
    """The question of an explanation is asked in its user's name, over a connection of anybody's."""
    node.backend.jobs.append(job("17", 65534, identity=(4,)))
    assert node.asker is not None

    def stages(uid: int, why: str) -> List[Tuple[object, object]]:
        assert node.asker is not None
        node.asker.told = Told(Outcome.UNKNOWN, why)
        found = node.do(
            "explain", uid, user=NOBODY_NAME, options="single_job_skip_rpc=0", **{"from": "127.0.0.9:40000"}
        )
        assert isinstance(found["stages"], list)
        return [(stage["stage"], stage["found"]) for stage in found["stages"]]

    nobody_s = "slurmd_names_none" if reason.startswith("slurmd") else "not_found"
    assert stages(65534, reason) == stages(65534, nobody_s)
    assert ("ask_source", f"unknown: {reason}") in stages(0, reason), "root is told"


def test_who_is_not_root_is_told_one_thing_of_all_that_is_not_theirs() -> None:
    """That another user has a connection, that nobody has it, that or that its job is not known; root is told which."""
    theirs, nobody_s, not_told = (connection(port) for port in (40000, 40001, 40002))
    owners = {theirs: Owner(Witness.BPF, ALICE, cgroup_id=1), not_told: Owner(Witness.BPF, ALICE)}
    backend = FakeBackend(job("17"))
    backend.of_cgroup[1] = CgroupVerdict(CgroupFinding.JOB, "test", job("17"))
    with contextlib.closing(ControlScene(backend, owners)) as scene:

        def whois(ends: Connection, uid: int) -> Result:
            command = Command("whois", {"source": str(ends.source), "destination": str(ends.destination)})
            return asyncio.run(scene.control.execute(command, Asking(uid)))

        told = [{**whois(ends, BOB), "connection": ""} for ends in (theirs, nobody_s, not_told)]
        assert told[0] == told[1] == told[2]
        reasons = [whois(ends, 0)["reason"] for ends in (theirs, nobody_s, not_told)]
        assert reasons == ["owner", "not_found", "job_not_told"]


@pytest.mark.parametrize(
    ("reason", "shown"), [("other_user", "not_found"), ("disagreement", "not_found"), ("timeout", "timeout")]
)
def test_another_node_s_reason_is_root_s_to_know(node: Node, reason: str, shown: str) -> None:
    """Why it did not answer is no secret of anybody's."""
    assert node.asker is not None
    node.asker.told = Told(Outcome.UNKNOWN, reason)
    assert node.do("whois", BOB, at="127.0.0.1", **SPELLED)["reason"] == shown
    assert node.do("whois", 0, at="127.0.0.1", **SPELLED)["reason"] == reason


def test_the_configuration_is_root_s_to_see(node: Node) -> None:
    """It says which keys there are, and where."""
    with pytest.raises(CommandRefused, match="only root may see the configuration"):
        node.do("configuration", ALICE)
    assert node.do("configuration", 0)["pid"] == os.getpid()


def test_one_s_own_connection_is_told(node: Node) -> None:
    """To its owner and to root alike."""
    for uid in (ALICE, 0):
        told = node.do("whois", uid, **SPELLED)
        assert (told["outcome"], told["job"], told["witness"], told["uid"]) == ("job", "17", "bpf", ALICE)
        assert (told["pid"], told["comm"], told["at"]) == (os.getpid(), "ssh", "this node")


def test_another_node_is_asked_in_the_caller_s_name(node: Node) -> None:
    """An ordinary user's question is about themselves, root's about anybody."""
    told = node.do("whois", BOB, at="127.0.0.1", **SPELLED)
    node.do("whois", 0, at="127.0.0.1", **SPELLED)
    assert node.asker is not None
    assert [(login, str(at)) for _, login, at in node.asker.asked] == [(BOB, "127.0.0.1"), (None, "127.0.0.1")]
    assert (told["at"], told["job"], told["witness"]) == ("127.0.0.1", "17", "bpf")


def test_explaining_another_user_is_root_s(node: Node) -> None:
    """An ordinary user may explain their own logins only."""
    for uid in (ALICE, BOB):
        with pytest.raises(CommandRefused, match="only root may ask about another user"):
            node.do("explain", uid, user=NOBODY_NAME)
    assert node.do("explain", 65534, user=NOBODY_NAME)["job"] == "9"
    assert node.do("explain", 0, user=NOBODY_NAME)["job"] == "9"


def test_explaining_changes_nothing(node: Node) -> None:
    """Nothing is moved, nothing remembered."""
    told = node.do("explain", user=NOBODY_NAME, **{"from": "127.0.0.1:40000"})
    assert (told["verdict"], told["outcome"], told["reason"], told["message"]) == ("success", "adopted", "only_job", "")
    assert (node.backend.tried, len(node.pending)) == ([], 0)
    stages = told["stages"]
    assert isinstance(stages, list)
    assert [stage["stage"] for stage in stages] == ["jobs_here", "adopt"]


def test_explaining_root_asks_nobody(node: Node) -> None:
    """As the module does: root is let pass before anything is asked."""
    node.backend.down = "no mount"
    assert node.do("explain", user="root")["reason"] == "root"


def test_explaining_takes_the_pam_line_s_options(node: Node) -> None:
    """Those that decide are used, in any case of letters; the others are passed over."""
    node.backend.jobs.append(job("10", 65534, identity=(3,)))
    options = "action_unknown=DENY socket=/x service=sshd timeout_ms=500"
    told = node.do("explain", user=NOBODY_NAME, options=options)
    assert (told["verdict"], told["reason"], told["job"]) == ("deny", "unknown", None)
    assert "you have several jobs" in str(told["message"])
    assert node.do("explain", user=NOBODY_NAME)["reason"] == "newest"


def test_explaining_asks_about_the_connection(node: Node) -> None:
    """--from alone means sshd's port on the address that faces the client."""
    node.backend.jobs.append(job("17", 65534, identity=(4,)))
    node.do("explain", user=NOBODY_NAME, **{"from": "127.0.0.9:40000"})
    node.do("explain", user=NOBODY_NAME, **{"from": "127.0.0.9:40000", "to": "127.0.0.2:2222"})
    assert node.asker is not None
    assert [str(c) for c, _, _ in node.asker.asked] == [
        "127.0.0.9:40000 > 127.0.0.1:22",
        "127.0.0.9:40000 > 127.0.0.2:2222",
    ]
    assert {login for _, login, _ in node.asker.asked} == {65534}


def test_status_says_how_the_agent_is(node: Node) -> None:
    """To everybody: nothing in it is anybody's."""
    told = node.do("status", 4242)
    assert (told["jobs_backend"], told["seal"], told["logins_between_phases"]) == ("fake", "fake", 0)
    assert told["node"] == socket.gethostname().partition(".")[0]
    witnesses = told["witnesses"]
    assert isinstance(witnesses, dict)
    assert witnesses["bpf"] == "not tried yet"
    assert set(witnesses) <= {witness.value for witness in Witness}
