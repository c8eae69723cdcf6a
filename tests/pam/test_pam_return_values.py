"""One block per value that pam_adopt.so returns, refusals first; and what it never does on the way."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Tuple

import pytest

from pam.pam_double import DENIAL, IGNORED, REQUEST, Agent, Reply, say
from pam.pam_login import Login


def test_no_job_is_denied_and_the_user_is_told(login: Login) -> None:
    """PAM_PERM_DENIED when the agent says so, with the agent's sentence as an error."""
    with Agent(login.socket_path, (say(DENIAL.pack()),)):
        outcome = login()
    assert outcome.rc == "PAM_PERM_DENIED"
    assert outcome.errors == ["You have no job on this node."]
    assert re.fullmatch(
        r"phase=account user=alice uid=1001 verdict=deny adopted=0 reason=no_jobs ms=\d+\.\d\d", outcome.log[-1]
    )


def test_a_denial_without_a_message_still_says_something(login: Login) -> None:
    """Nobody is left before a connection that just closes."""
    with Agent(login.socket_path, (say(Reply(verdict=2, adopted=0, job=b"").pack()),)):
        outcome = login()
    assert (outcome.rc, outcome.errors) == ("PAM_PERM_DENIED", ["Access denied."])


def test_session_phase_is_denied_too(login: Login) -> None:
    """The session phase returns what the agent says, as the account phase does."""
    with Agent(login.socket_path, (say(DENIAL.pack()),)) as agent:
        outcome = login(steps=("session",))
    assert outcome.rc == "PAM_PERM_DENIED"
    assert agent.requests[0].phase == 2
    assert outcome.log[-1].startswith("phase=session user=alice uid=1001 verdict=deny ")


@pytest.mark.parametrize("user", ["nosuchuser", "none"])
@pytest.mark.parametrize("step", ["account", "session"])
def test_unknown_user_is_a_session_error(login: Login, step: str, user: str) -> None:
    """PAM_SESSION_ERR for a name the system does not know, or has no uid for; the agent is not asked."""
    with Agent(login.socket_path, (say(Reply().pack()),)) as agent:
        outcome = login(user=user, steps=(step,))
    assert (outcome.rc, agent.requests) == ("PAM_SESSION_ERR", [])
    assert re.fullmatch(
        rf"phase={step} user={user} verdict=session_err reason=unknown_user ms=\d+\.\d\d", outcome.log[-1]
    )


def test_no_user_at_all_is_a_session_error_and_nobody_is_prompted(login: Login) -> None:
    """PAM_SESSION_ERR when the application set no user: the module never asks for a name."""
    outcome = login(flags=("--no-user",))
    assert (outcome.rc, outcome.prompts) == ("PAM_SESSION_ERR", [])


def test_a_name_longer_than_the_record_is_a_session_error(login: Login) -> None:
    """A name that would have to be cut is nobody's."""
    assert login(user="a" * 256).rc == "PAM_SESSION_ERR"


@pytest.mark.parametrize("step", ["authenticate", "setcred"])
def test_a_line_in_the_auth_stack_is_refused(login: Login, step: str) -> None:
    """PAM_SERVICE_ERR: the module authenticates nobody, and a site must learn that its line is misplaced."""
    with Agent(login.socket_path, (say(Reply().pack()),)) as agent:
        outcome = login(steps=(step,))
    assert (outcome.rc, agent.requests) == ("PAM_SERVICE_ERR", [])
    assert "reason=misplaced" in outcome.log[-1]
    assert len(outcome.errors) == 1


@pytest.mark.parametrize("step", ["authenticate", "setcred"])
def test_root_is_not_locked_out_by_a_line_in_the_auth_stack(login: Login, step: str) -> None:
    """PAM_IGNORE for root there, who has to repair the line; never PAM_SUCCESS."""
    assert login(user="root", steps=(step,)).rc == "PAM_IGNORE"


@pytest.mark.parametrize("user", ["root", "toor"])
@pytest.mark.parametrize("step", ["account", "session"])
def test_root_is_ignored_before_anything_is_opened(login: Login, user: str, step: str) -> None:
    """PAM_IGNORE for uid 0, whatever its name, and the agent never hears of it."""
    with Agent(login.socket_path, (say(DENIAL.pack()),)) as agent:
        outcome = login(user=user, steps=(step,), sockets=("inbound4",))
    assert (outcome.rc, agent.requests, outcome.errors) == ("PAM_IGNORE", [], [])
    assert re.fullmatch(rf"phase={step} user={user} uid=0 verdict=ignore reason=root ms=\d+\.\d\d", outcome.log[-1])


def test_root_is_asked_about_where_the_site_wants_it(login: Login) -> None:
    """ignore_root=0: root is a user like any other."""
    with Agent(login.socket_path, (say(DENIAL.pack()),)) as agent:
        outcome = login("ignore_root=0", user="root")
    assert outcome.rc == "PAM_PERM_DENIED"
    assert agent.requests[0].uid == 0


@pytest.mark.parametrize("step", ["account", "session", "authenticate"])
def test_another_service_is_ignored(login: Login, step: str) -> None:
    """PAM_IGNORE for a service that the line is not for, even with an unknown user."""
    with Agent(login.socket_path, (say(DENIAL.pack()),)) as agent:
        outcome = login(user="nosuchuser", service="login", steps=(step,))
    assert (outcome.rc, agent.requests, outcome.log) == ("PAM_IGNORE", [], [])


@pytest.mark.parametrize(
    ("option", "service"), [("service=login", "login"), ("service=*", "su"), ("service=SSHD", "sshd")]
)
def test_service_option(login: Login, option: str, service: str) -> None:
    """service= names the service that is asked about; * is any; the case does not matter, as libpam has lowered it."""
    with Agent(login.socket_path, (say(DENIAL.pack()),)) as agent:
        outcome = login(option, service=service)
    assert outcome.rc == "PAM_PERM_DENIED"
    assert agent.requests[0].service.rstrip(b"\0") == service.encode()


def test_the_agent_may_say_ignore(login: Login) -> None:
    """PAM_IGNORE when the agent says so; nothing is set in the session."""
    with Agent(login.socket_path, (say(IGNORED.pack()),)):
        outcome = login()
    assert (outcome.rc, outcome.environment, outcome.errors) == ("PAM_IGNORE", [], [])


@pytest.mark.parametrize(
    ("option", "rc", "messages"),
    [
        ("action_generic_failure=deny", "PAM_PERM_DENIED", 1),
        ("action_generic_failure=ignore", "PAM_IGNORE", 0),
        ("action_generic_failure=allow", "PAM_SUCCESS", 0),
        ("log_level=info", "PAM_IGNORE", 0),
    ],
)
@pytest.mark.parametrize("step", ["account", "session"])
def test_no_agent_is_a_generic_failure(login: Login, option: str, rc: str, messages: int, step: str) -> None:
    """Nobody at the socket: action_generic_failure decides, and ignore is its default."""
    outcome = login(option, steps=(step,))
    assert (outcome.rc, len(outcome.errors)) == (rc, messages)
    fault = f"connect to {login.socket_path}: No such file or directory"
    assert f'reason=generic_failure fault="{fault}"' in outcome.log[-1]


@pytest.mark.parametrize("step", ["account", "session"])
def test_adopted_is_success(login: Login, step: str) -> None:
    """PAM_SUCCESS with the environment of the reply, and one line in the log."""
    with Agent(login.socket_path, (say(Reply(environment=b"SLURM_JOB_ID=17\0A_b1=\0").pack()),)):
        outcome = login(steps=(step,))
    assert (outcome.rc, outcome.errors, outcome.infos) == ("PAM_SUCCESS", [], [])
    assert outcome.environment == ["SLURM_JOB_ID=17", "A_b1="]
    assert re.fullmatch(
        rf"phase={step} user=alice uid=1001 verdict=success adopted=1 job=17 reason=callerid witness=bpf ms=\d+\.\d\d",
        outcome.log[-1],
    )
    # LOG_AUTHPRIV is facility 10, LOG_INFO priority 6.
    assert outcome.priorities[-1] == 10 * 8 + 6


def test_allowed_without_adoption_is_success(login: Login) -> None:
    """PAM_SUCCESS and adopted=0 for action_unknown=allow."""
    with Agent(login.socket_path, (say(Reply(adopted=0, job=b"", summary=b"reason=unknown").pack()),)):
        outcome = login()
    assert outcome.rc == "PAM_SUCCESS"
    assert " verdict=success adopted=0 reason=unknown ms=" in outcome.log[-1]


def test_a_message_with_success_is_information(login: Login) -> None:
    """The sentence of a login that is let in comes as PAM_TEXT_INFO."""
    with Agent(login.socket_path, (say(Reply(message=b"You are in job 17.").pack()),)):
        outcome = login(steps=("session",))
    assert (outcome.rc, outcome.infos, outcome.errors) == ("PAM_SUCCESS", ["You are in job 17."], [])


@pytest.mark.parametrize("reply", [DENIAL, Reply(message=b"You are in job 17.")])
def test_silent_is_honoured(login: Login, reply: Reply) -> None:
    """Under PAM_SILENT nothing reaches the user, and the verdict is the same."""
    with Agent(login.socket_path, (say(reply.pack()),)):
        outcome = login(flags=("--silent",))
    assert outcome.rc == ("PAM_PERM_DENIED" if reply.verdict == 2 else "PAM_SUCCESS")
    assert (outcome.errors, outcome.infos) == ([], [])


def test_the_whole_login(login: Login) -> None:
    """Account, session, close: each asks for itself but the last, which cannot fail."""
    with Agent(login.socket_path, (say(Reply().pack()),)) as agent:
        outcome = login(steps=("account", "session", "close"))
    assert outcome.rcs == ["PAM_SUCCESS"] * 3
    assert [request.phase for request in agent.requests] == [1, 2]


def test_control_characters_reach_neither_the_user_nor_the_log(login: Login) -> None:
    """Escape sequences and 8-bit controls become question marks; a newline stays in a message and not in the log."""
    reply = Reply(
        verdict=2, adopted=0, job=b"\x1b[2J", summary=b"reason=\nx\x9b", message=b"no\nway\x1b[31m\x07\xc2\x9b"
    )
    with Agent(login.socket_path, (say(reply.pack()),)):
        outcome = login()
    assert outcome.errors == ["no\nway?[31m???"]
    assert " job=?[2J reason=?x? ms=" in outcome.log[-1]


def test_a_user_name_cannot_write_its_own_log_line(login: Login) -> None:
    """A login name with a space, an equals sign and a quote stays one value of one key."""
    name = 'ev=il" uid=0\x1b'
    with Agent(login.socket_path, (say(DENIAL.pack()),)) as agent:
        outcome = login(user=name)
    assert agent.requests[0].user.rstrip(b"\0") == name.encode()
    assert outcome.log[-1].startswith("phase=account user=ev?il??uid?0? uid=1002 verdict=deny ")


@pytest.mark.parametrize(
    ("reply", "would"),
    [(DENIAL, "deny adopted=0 "), (IGNORED, "ignore adopted=0 "), (Reply(adopted=0), "success adopted=0 job=17 ")],
)
@pytest.mark.parametrize("step", ["account", "session"])
def test_observe_always_ignores(login: Login, reply: Reply, would: str, step: str) -> None:
    """mode=observe: PAM_IGNORE whatever the agent says; what would have been is in the log, and nothing is touched."""
    with Agent(login.socket_path, (say(reply.pack()),)) as agent:
        outcome = login("mode=observe", steps=(step,))
    assert (outcome.rc, outcome.errors, outcome.infos, outcome.environment) == ("PAM_IGNORE", [], [], [])
    assert agent.requests[0].mode == 2
    assert f" verdict=ignore mode=observe would={would}reason=" in outcome.log[-1]


@pytest.mark.parametrize(
    ("options", "user", "step", "would"),
    [
        (("action_generic_failure=deny",), "alice", "account", "deny"),
        (("action_generic_failure=allow",), "alice", "session", "success"),
        ((), "nosuchuser", "account", "session_err"),
        (("action_unknown=sometimes",), "alice", "account", "service_err"),
        ((), "alice", "authenticate", "service_err"),
    ],
)
def test_observe_ignores_every_failure_too(
    login: Login, options: Tuple[str, ...], user: str, step: str, would: str
) -> None:
    """mode=observe keeps its promise without an agent, for an unknown user, and beside a wrong option."""
    outcome = login("mode=observe", *options, user=user, steps=(step,))
    assert (outcome.rc, outcome.errors) == ("PAM_IGNORE", [])
    assert f" verdict=ignore mode=observe would={would} " in outcome.log[-1]


def test_a_reply_that_adopted_in_observe_mode_is_a_fault(login: Login) -> None:
    """An agent that moved somebody although it was asked only to look is said in the log."""
    with Agent(login.socket_path, (say(Reply().pack()),)):
        outcome = login("mode=observe")
    assert outcome.rc == "PAM_IGNORE"
    assert 'fault="reply says adopted, but was asked only to observe"' in outcome.log[-1]


def test_the_request_is_the_record_of_the_header(login: Login) -> None:
    """Every field of the request, with the defaults of the options, for a login from a known connection."""
    with Agent(login.socket_path, (say(Reply().pack()),)) as agent:
        # On a busy machine the default's one second may be over before the module gets to ask.
        while not agent.requests:
            login(sockets=("inbound4",), patient=False)
    (request,) = agent.requests
    assert (request.magic, request.version, request.size) == (0x54504441, 1, REQUEST.size)
    assert (request.phase, request.mode) == (1, 1)
    assert (request.action_no_jobs, request.action_unknown) == (3, 4)
    assert (request.action_adopt_failure, request.action_generic_failure) == (2, 1)
    assert (request.single_job_skip_rpc, request.join_container, request.disable_x11) == (1, 1, 0)
    assert (request.family, request.remote_port, request.local_port, request.reserved) == (4, 40000, 22000, 0)
    assert (request.uid, request.user, request.nodename) == (1001, b"alice".ljust(256, b"\0"), bytes(64))
    assert request.remote_address == request.local_address == b"\x7f\0\0\x01" + bytes(12)
    assert 0 < request.timeout_ms <= 1000


def test_only_pam_functions_are_exported(built: Path) -> None:
    """Inside sshd a second `report` or `options_parse` would meet ours: nothing but pam_sm_* is visible."""
    for place in (built, built / "asan"):
        listing = subprocess.run(
            ["nm", "-D", "--defined-only", "--format=posix", str(place / "pam_adopt.so")],
            capture_output=True,
            text=True,
            check=True,
        )
        names = {line.split()[0] for line in listing.stdout.splitlines()}
        functions = ("acct_mgmt", "authenticate", "close_session", "open_session", "setcred")
        assert names == {f"pam_sm_{name}" for name in functions}


def test_hardening_is_in_the_build(built: Path) -> None:
    """Read-only relocations, bound at load, and fortified calls: a lost flag is a failed test."""
    readelf = subprocess.run(
        ["readelf", "-W", "-d", "-l", "-s", str(built / "pam_adopt.so")], capture_output=True, text=True, check=True
    )
    for word in ("BIND_NOW", "GNU_RELRO", "__stack_chk_fail", "__vsnprintf_chk"):
        assert word in readelf.stdout
    assert not re.search(r"GNU_STACK.*RWE", readelf.stdout)
