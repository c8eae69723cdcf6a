"""Every option of the module: wrong ones close the login with the reason in the log, right ones reach the agent."""

from __future__ import annotations

from typing import Tuple

import pytest

from pam.pam_double import DENIAL, Agent, Reply, say
from pam.pam_login import Login

WRONG = [
    # (the words of the line, what the log must say)
    ("action_no_jobs=allow", 'action_no_jobs, value "allow": expected deny or ignore'),
    ("action_no_jobs=newest", 'action_no_jobs, value "newest": expected deny or ignore'),
    ("action_no_jobs=", 'action_no_jobs, value "": expected deny or ignore'),
    ("action_unknown=ignore", 'action_unknown, value "ignore": expected newest, allow or deny'),
    ("action_unknown=new", 'action_unknown, value "new": expected newest, allow or deny'),
    ("action_unknown=newestx", 'action_unknown, value "newestx": expected newest, allow or deny'),
    ("action_unknown=sometimes", 'action_unknown, value "sometimes": expected newest, allow or deny'),
    ("action_adopt_failure=ignore", 'action_adopt_failure, value "ignore": expected allow or deny'),
    ("action_generic_failure=newest", 'action_generic_failure, value "newest": expected ignore, allow or deny'),
    ("ignore_root=2", 'ignore_root, value "2": expected 0 or 1'),
    ("ignore_root=yes", 'ignore_root, value "yes": expected 0 or 1'),
    ("ignore_root=01", 'ignore_root, value "01": expected 0 or 1'),
    ("single_job_skip_rpc=true", 'single_job_skip_rpc, value "true": expected 0 or 1'),
    ("disable_x11=-1", 'disable_x11, value "-1": expected 0 or 1'),
    ("join_container=1", 'join_container, value "1": expected true or false'),
    ("log_level=loud", 'log_level, value "loud": expected quiet, fatal, error, info, verbose, debug, '),
    ("log_level=08", 'log_level, value "08": expected quiet, fatal, '),
    ("log_level=-1", 'log_level, value "-1": expected quiet, fatal, '),
    ("mode=observed", 'mode, value "observed": expected enforce or observe'),
    ("timeout_ms=49", 'timeout_ms, value "49": expected a number of milliseconds from 50 to 30000'),
    ("timeout_ms=30001", 'timeout_ms, value "30001": expected a number'),
    ("timeout_ms=4294968296", 'timeout_ms, value "4294968296": expected a number'),
    ("timeout_ms=1000ms", 'timeout_ms, value "1000ms": expected a number'),
    ("timeout_ms=-1000", 'timeout_ms, value "-1000": expected a number'),
    ("timeout_ms=", 'timeout_ms, value "": expected a number'),
    ("service=", 'service, value "": expected the name of a PAM service, or *'),
    ("nodename=", 'nodename, value "": expected a node name'),
    ("nodename=" + "n" * 64, "expected a node name of 1 to 63"),
    ("nodename=../x", 'nodename, value "../x": expected a node name'),
    ("socket=run/pam.sock", 'socket, value "run/pam.sock": expected an absolute path of at most 107 bytes'),
    ("socket=/" + "s" * 107, "expected an absolute path of at most 107 bytes"),
    ("socket=", 'socket, value "": expected an absolute path'),
    ("action_no_job=deny", 'action_no_job, value "deny": expected an option of pam_adopt: action_no_jobs= '),
    ("debug", 'debug, value "": expected an option of pam_adopt: '),
    ("action_unknown", 'action_unknown, value "": expected an option of pam_adopt: '),
]


@pytest.mark.parametrize(("option", "reason"), WRONG, ids=[option[:40] for option, _ in WRONG])
def test_a_wrong_option_closes_the_login(login: Login, option: str, reason: str) -> None:
    """PAM_SERVICE_ERR, the option with its value in the log at error priority, the agent not asked."""
    with Agent(login.socket_path, (say(Reply().pack()),)) as agent:
        outcome = login(option)
    assert (outcome.rc, agent.requests, len(outcome.errors)) == ("PAM_SERVICE_ERR", [], 1)
    assert outcome.log[0].startswith("wrong option ")
    assert reason in outcome.log[0]
    assert outcome.priorities[0] == 10 * 8 + 3
    assert " verdict=service_err reason=wrong_option ms=" in outcome.log[-1]


@pytest.mark.parametrize("options", [("action_unknown=x",), ("ignore_root=0", "action_unknown=x"), ("ignore_root=x",)])
@pytest.mark.parametrize("user", ["root", "toor"])
def test_a_wrong_option_does_not_lock_out_root(login: Login, options: Tuple[str, ...], user: str) -> None:
    """PAM_IGNORE for uid 0 on a line that cannot be carried out, even where it says ignore_root=0; the log says why."""
    outcome = login(*options, user=user)
    assert outcome.rc == "PAM_IGNORE"
    assert outcome.log[0].startswith("wrong option ")


@pytest.mark.parametrize("option", ["action_unknown=x", "mode=x"])
def test_a_wrong_option_of_a_line_for_another_service_is_only_said(login: Login, option: str) -> None:
    """PAM_IGNORE and a line in the log: whose line it is was decided first."""
    outcome = login(option, service="login")
    assert outcome.rc == "PAM_IGNORE"
    assert outcome.log[0].startswith("wrong option ")


def test_every_wrong_option_is_named(login: Login) -> None:
    """Two mistakes are two lines: nobody has to log in once for each."""
    outcome = login("mode=x", "timeout_ms=1", "log_level=quiet")
    assert [line.split(",")[0] for line in outcome.log] == ["wrong option mode", "wrong option timeout_ms"]


def test_a_mode_that_cannot_be_read_is_not_observe(login: Login) -> None:
    """mode=observe and then a word that is none: the login is closed, not open to all."""
    assert login("mode=observe", "mode=obsreve").rc == "PAM_SERVICE_ERR"


ACTIONS = {"ignore": 1, "allow": 2, "deny": 3, "newest": 4}
RIGHT = [
    *(("action_no_jobs", value, ACTIONS[value]) for value in ("deny", "ignore")),
    *(("action_unknown", value, ACTIONS[value]) for value in ("newest", "allow", "deny")),
    *(("action_adopt_failure", value, ACTIONS[value]) for value in ("allow", "deny")),
    *(("action_generic_failure", value, ACTIONS[value]) for value in ("ignore", "allow", "deny")),
    *(("single_job_skip_rpc", value, int(value)) for value in ("1", "0")),
    *(("disable_x11", value, int(value)) for value in ("0", "1")),
    ("join_container", "true", 1),
    ("join_container", "false", 0),
    ("mode", "enforce", 1),
    ("mode", "observe", 2),
    ("action_unknown", "DENY", 3),
    ("action_no_jobs", "Ignore", 1),
    ("join_container", "FALSE", 0),
]


@pytest.mark.parametrize("spelling", ["ACTION_UNKNOWN=DENY", "Action_Unknown=deny", "action_UNKNOWN=Deny"])
def test_names_are_taken_in_any_case(login: Login, spelling: str) -> None:
    """As pam_slurm_adopt takes them."""
    with Agent(login.socket_path, (say(DENIAL.pack()),)) as agent:
        outcome = login(spelling)
    assert agent.requests[0].action_unknown == ACTIONS["deny"]
    assert not [line for line in outcome.log if "wrong" in line]


@pytest.mark.parametrize(("name", "value", "number"), RIGHT)
def test_a_right_option_reaches_the_agent(login: Login, name: str, value: str, number: int) -> None:
    """Every value of every option that the agent decides by, in any case, as the number of the wire format."""
    with Agent(login.socket_path, (say(DENIAL.pack()),)) as agent:
        outcome = login(f"{name}={value}")
    assert getattr(agent.requests[0], name) == number
    assert not [line for line in outcome.log if "wrong" in line]


def test_the_last_of_two_counts(login: Login) -> None:
    """As in pam_slurm_adopt: a word given twice means its last value."""
    with Agent(login.socket_path, (say(DENIAL.pack()),)) as agent:
        login("action_unknown=deny", "action_unknown=allow")
    assert agent.requests[0].action_unknown == ACTIONS["allow"]


def test_nodename_reaches_the_agent(login: Login) -> None:
    """nodename= up to the 63 bytes that the record holds."""
    with Agent(login.socket_path, (say(DENIAL.pack()),)) as agent:
        login("nodename=node-1.a_B" + "x" * 52)
    assert agent.requests[0].nodename == b"node-1.a_B" + b"x" * 52 + b"\0" * 2


@pytest.mark.parametrize("timeout_ms", [50, 30000])
def test_timeout_reaches_the_agent_as_what_is_left(login: Login, timeout_ms: int) -> None:
    """timeout_ms= within its bounds; the request tells what is left of it."""
    with Agent(login.socket_path, (say(DENIAL.pack()),)) as agent:
        login(f"timeout_ms={timeout_ms}")
    # On a busy machine 50 ms may be over before the module gets to ask.
    if timeout_ms == 30000:
        assert 20000 < agent.requests[0].timeout_ms <= 30000
    for request in agent.requests:
        assert 0 < request.timeout_ms <= timeout_ms


def test_default_socket(login: Login) -> None:
    """Without socket= the module asks at /run/adoptd/pam.sock."""
    outcome = login("action_generic_failure=deny", "timeout_ms=50", default_socket=True)
    assert "/run/adoptd/pam.sock" in outcome.log[-1] or outcome.rc != "PAM_PERM_DENIED"


LEVELS = ["quiet", "fatal", "error", "info", "verbose", "debug", "debug2", "debug3", "debug4", "debug5"]


@pytest.mark.parametrize("level", [*LEVELS, *map(str, range(10)), "INFO", "0x3", "0X5", "02", "10", "4294967295"])
def test_log_level(login: Login, level: str) -> None:
    """Slurm's names and numbers: outcomes from info on, failures from error on, the connection from debug on."""
    base = 16 if level[:2] in ("0x", "0X") else 8 if level.startswith("0") else 10
    number = LEVELS.index(level.lower()) if level.lower() in LEVELS else int(level, base)
    with Agent(login.socket_path, (say(DENIAL.pack()), say(b"x" * 720))):
        outcome = login(f"log_level={level}", steps=("account", "session"), sockets=("inbound4",))
    assert bool([line for line in outcome.log if " verdict=deny " in line]) == (number >= 3)
    assert bool([line for line in outcome.log if "reason=generic_failure" in line]) == (number >= 2)
    connection = "phase=account connection 127.0.0.1:40000 > 127.0.0.1:22000"
    assert (connection in outcome.log) == (number >= 5)
