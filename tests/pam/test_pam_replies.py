"""Hostile and broken agents: whatever they do, the login ends in time and as action_generic_failure says."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import List, Tuple

import pytest

from pam.pam_double import (
    DENIAL,
    ENVIRONMENT_MAX,
    IGNORED,
    REPLY,
    Agent,
    Reply,
    Script,
    dribble,
    say,
    say_and_close,
    wait_for_close,
)
from pam.pam_login import Login

GOOD = Reply().pack()

BAD_RECORDS: List[Tuple[Reply, str]] = [
    (Reply(magic=0x41445054), "reply magic is 0x41445054"),
    (Reply(magic=0), "reply magic is 0x00000000"),
    (Reply(version=0), "reply version is 0, expected 1"),
    (Reply(version=2), "reply version is 2, expected 1"),
    (Reply(size=REPLY.size - 1), "reply size is 719, expected 720"),
    (Reply(size=0xFFFF), "reply size is 65535, expected 720"),
    (Reply(verdict=0), "reply verdict is 0"),
    (Reply(verdict=4), "reply verdict is 4"),
    (Reply(adopted=2), "reply adopted is 2"),
    (Reply(reserved=1), "reply reserved is 1"),
    (Reply(descriptors=9), "reply announces 9 descriptors"),
    (Reply(descriptors=1), "reply announces 1 descriptors, 0 came"),
    (Reply(environment_bytes=ENVIRONMENT_MAX + 1), "reply announces 65537 bytes of environment"),
    (Reply(environment_bytes=0xFFFFFFFF), "reply announces 4294967295 bytes of environment"),
    (Reply(job=b"1" * 64), "reply job is not NUL-padded text"),
    (Reply(summary=b"s" * 128), "reply summary is not NUL-padded text"),
    (Reply(message=b"m" * 512), "reply message is not NUL-padded text"),
    (Reply(job=b"17\0x"), "reply job is not NUL-padded text"),
    (Reply(message=b"m" * 100 + b"\0" * 411 + b"x"), "reply message is not NUL-padded text"),
    (Reply(verdict=2), "reply says adopted, but verdict is 2"),
    (Reply(verdict=3), "reply says adopted, but verdict is 3"),
    (Reply(job=b""), "reply says adopted, but names no job"),
    (replace(DENIAL, environment=b"A=1\0"), "reply has an environment or descriptors without an adoption"),
    (replace(IGNORED, environment=b"A=1\0"), "reply has an environment or descriptors without an adoption"),
    (Reply(environment=b"A=1"), "reply environment does not end with NUL"),
    (Reply(environment=b"A=1\0B"), "reply environment does not end with NUL"),
    (Reply(environment=b"\0"), "reply environment has no NAME=value at byte 0"),
    (Reply(environment=b"A=1\0\0"), "reply environment has no NAME=value at byte 4"),
    (Reply(environment=b"A\0"), "reply environment has no NAME=value at byte 0"),
    (Reply(environment=b"=x\0"), "reply environment has no NAME=value at byte 0"),
    (Reply(environment=b"1A=x\0"), "reply environment has no NAME=value at byte 0"),
    (Reply(environment=b"A-B=x\0"), "reply environment has no NAME=value at byte 0"),
    (Reply(environment=b"BASH_FUNC_ls%%=() { :; }\0"), "reply environment has no NAME=value at byte 0"),
    (Reply(environment=b"\xc4\x8d=x\0"), "reply environment has no NAME=value at byte 0"),
    *(
        (Reply(environment=b"OK=1\0" + name + b"=x\0"), f"reply environment sets {name.decode()}")
        for name in (
            *(b"LD_PRELOAD", b"LD_LIBRARY_PATH", b"LD_", b"PATH", b"IFS", b"ENV", b"BASH_ENV", b"SHELLOPTS", b"PS4"),
            *(b"GCONV_PATH", b"GLIBC_TUNABLES", b"PYTHONPATH", b"PERL5LIB", b"HOME", b"USER", b"LOGNAME", b"SHELL"),
            *(b"SLURM_CONF", b"SLURM_CONF_SERVER", b"SLURM_JWT", b"OPENSSL_CONF", b"PAM_USER", b"KRB5CCNAME"),
        )
    ),
    (Reply(environment=b"LD_" + b"X" * 40 + b"=x\0"), "reply environment sets LD_" + "X" * 29 + '"'),
]


@pytest.mark.parametrize(("reply", "fault"), BAD_RECORDS, ids=[fault for _, fault in BAD_RECORDS])
def test_a_reply_that_breaks_a_rule_is_no_reply(login: Login, reply: Reply, fault: str) -> None:
    """Every rule of adopt_wire.h, broken alone: a generic failure that names the rule; nothing of the reply is used."""
    with Agent(login.socket_path, (say(reply.pack()),)):
        outcome = login("action_generic_failure=deny", "timeout_ms=20000")
    assert (outcome.rc, len(outcome.errors), outcome.environment) == ("PAM_PERM_DENIED", 1, [])
    assert "verdict=deny adopted=0 reason=generic_failure" in outcome.log[-1]
    assert fault in outcome.log[-1]
    assert outcome.took_s < 10, "a bad reply must be refused when it is seen, not at the deadline"


@pytest.mark.parametrize(
    "name",
    [b"SLURM_JOB_ID", b"SLURM_CON", b"DISPLAY", b"TMPDIR", b"PATHS", b"MY_PATH", b"ENVIRONMENT", b"LD", b"_", b"a"],
)
def test_names_that_only_look_forbidden_are_set(login: Login, name: bytes) -> None:
    """A forbidden name is a whole name or a stated prefix, not anything that resembles one."""
    with Agent(login.socket_path, (say(Reply(environment=name + b"=x\n=y \0").pack()),)):
        outcome = login()
    assert (outcome.rc, outcome.environment) == ("PAM_SUCCESS", [name.decode() + "=x\n=y "])


BROKEN: List[Tuple[str, Script, str]] = [
    ("closes at once", say_and_close(b""), "reply ends after 0 of 720 bytes"),
    ("one byte", say_and_close(GOOD[:1]), "reply ends after 1 of 720 bytes"),
    ("one byte short", say_and_close(GOOD[:-1]), "reply ends after 719 of 720 bytes"),
    (
        "environment cut",
        say_and_close(Reply(environment=b"A=1\0", environment_bytes=5).pack()),
        "reply ends after 4 of 5 bytes",
    ),
    ("one byte too many", say(GOOD + b"\0"), "reply has bytes behind its end"),
    ("twice", say(GOOD + GOOD), "reply has bytes behind its end"),
    ("a megabyte", say(b"\0" * (1 << 20)), "reply magic is 0x00000000"),
    ("a megabyte behind a good one", say(GOOD + b"x" * (1 << 20)), "reply has bytes behind its end"),
    ("text", say(b"HTTP/1.1 400 Bad Request\r\n" * 40), "reply magic is 0x50545448"),
]


@pytest.mark.parametrize(("script", "fault"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_stream_is_no_reply(login: Login, script: Script, fault: str) -> None:
    """Short, long and foreign streams are refused as soon as they are seen."""
    with Agent(login.socket_path, (script,)):
        outcome = login("action_generic_failure=deny", "timeout_ms=20000")
    assert outcome.rc == "PAM_PERM_DENIED"
    assert fault in outcome.log[-1]
    assert outcome.took_s < 10


def _half_then_silent(connection: socket.socket) -> None:
    connection.sendall(GOOD[:300])
    wait_for_close(connection)


TIMEOUTS: List[Tuple[str, Script, str]] = [
    ("silent", wait_for_close, "receive reply, 0 of 720 bytes: Connection timed out"),
    ("half", _half_then_silent, "receive reply, 300 of 720 bytes: Connection timed out"),
    ("dribble", dribble(GOOD, 0.005), "Connection timed out"),
    (
        "environment never comes",
        say(Reply(environment_bytes=10).pack()),
        "receive reply, 0 of 10 bytes: Connection timed out",
    ),
]


@pytest.mark.parametrize("flags", [(), ("--interrupt", "3")], ids=["quiet", "signals"])
@pytest.mark.parametrize(("script", "fault"), [row[1:] for row in TIMEOUTS], ids=[row[0] for row in TIMEOUTS])
def test_the_deadline_holds(login: Login, script: Script, fault: str, flags: Tuple[str, ...]) -> None:
    """An agent that says nothing, or too slowly, is given up at timeout_ms, signals or not."""
    # On a busy machine the time may be over before what the agent does say has come: then with more of it.
    for timeout_s in (0.2, 1.0, 5.0, 25.0):
        with Agent(login.socket_path, (script,)):
            outcome = login("action_generic_failure=deny", f"timeout_ms={timeout_s * 1000:.0f}", flags=flags)
        assert outcome.rc == "PAM_PERM_DENIED"
        assert "Connection timed out" in outcome.log[-1]
        assert timeout_s * 0.95 <= outcome.took_s
        if fault in outcome.log[-1]:
            break
    assert fault in outcome.log[-1]


def test_a_full_backlog_is_waited_for_until_the_deadline(login: Login) -> None:
    """connect() to an agent that accepts nobody ends at timeout_ms, with signals coming in all the time."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(login.socket_path)
        listener.listen(0)
        first.connect(login.socket_path)
        outcome = login("action_generic_failure=deny", "timeout_ms=200", flags=("--interrupt", "3"))
    assert outcome.rc == "PAM_PERM_DENIED"
    assert f"connect to {login.socket_path}: Connection timed out" in outcome.log[-1]
    assert 0.19 <= outcome.took_s < 20


def test_a_slow_agent_is_waited_for(login: Login) -> None:
    """A good reply that comes a byte at a time, with signals in between, within the budget, counts."""
    with Agent(login.socket_path, (dribble(Reply(environment=b"A=1\0").pack(), 0.0005),)):
        outcome = login("timeout_ms=20000", flags=("--interrupt", "3"))
    assert (outcome.rc, outcome.environment) == ("PAM_SUCCESS", ["A=1"])


def test_an_agent_that_is_not_root_is_not_believed(login: Login) -> None:
    """The kernel says who serves the socket; an ordinary user there is a generic failure, and sees no request."""
    with Agent(login.socket_path, (say(GOOD),), listen_uid=65534) as agent:
        outcome = login("action_generic_failure=deny")
    assert (outcome.rc, agent.requests) == ("PAM_PERM_DENIED", [])
    assert f'fault="{login.socket_path} is served by uid 65534, expected root"' in outcome.log[-1]


@pytest.mark.parametrize("kind", ["nothing", "a file", "a dead socket", "a datagram socket"])
def test_what_is_no_agent_is_a_generic_failure(login: Login, kind: str) -> None:
    """Nothing, a file, a socket that nobody serves, a socket of another type: refused at once, the path in the log."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM if "datagram" in kind else socket.SOCK_STREAM) as other:
        if "socket" in kind:
            other.bind(login.socket_path)
        elif kind == "a file":
            (login.directory / "pam.sock").write_text("")
        outcome = login("action_generic_failure=deny", "timeout_ms=20000")
    assert outcome.rc == "PAM_PERM_DENIED"
    assert f'fault="connect to {login.socket_path}: ' in outcome.log[-1]
    assert outcome.took_s < 10


def test_an_agent_that_answers_unasked_and_hangs_up(login: Login) -> None:
    """A reset while the request is being sent raises no SIGPIPE in sshd."""
    with Agent(login.socket_path, (say_and_close(b""),), read_request=False):
        outcome = login("action_generic_failure=deny", "timeout_ms=20000")
    assert outcome.rc == "PAM_PERM_DENIED"


@pytest.mark.parametrize(
    ("option", "rc"),
    [("action_generic_failure=deny", "PAM_PERM_DENIED"), ("action_generic_failure=allow", "PAM_SUCCESS")],
)
def test_a_bad_reply_is_ruled_by_the_option_alone(login: Login, option: str, rc: str) -> None:
    """A reply that says deny, but wrongly, neither denies nor allows: the administrator's option does."""
    with Agent(login.socket_path, (say(replace(DENIAL, version=9).pack()),)):
        outcome = login(option)
    assert outcome.rc == rc


def test_the_largest_environment(login: Login) -> None:
    """65536 bytes of environment are taken in whole."""
    pairs = b"".join(b"V%05d=%s\0" % (i, b"x" * 56) for i in range(ENVIRONMENT_MAX // 64))
    assert len(pairs) == ENVIRONMENT_MAX
    with Agent(login.socket_path, (say(Reply(environment=pairs).pack()),)):
        outcome = login("timeout_ms=20000")
    assert (outcome.rc, len(outcome.environment)) == ("PAM_SUCCESS", 1024)


def test_the_longest_texts(login: Login) -> None:
    """Texts of every byte but one are shown in whole."""
    reply = Reply(verdict=2, adopted=0, job=b"1" * 63, summary=b"s" * 127, message=b"m" * 511)
    with Agent(login.socket_path, (say(reply.pack()),)):
        outcome = login()
    assert (outcome.rc, outcome.errors) == ("PAM_PERM_DENIED", ["m" * 511])
    assert "job=" + "1" * 63 + " " + "s" * 127 + " ms=" in outcome.log[-1]
