"""An agent that is started again while it has a question: the login notices nothing, or fails within its budget."""

from __future__ import annotations

import socket
import threading
from typing import List, Tuple

import pytest

from pam.pam_double import Agent, Reply, Request, say, say_and_close
from pam.pam_login import Login, Outcome

GOOD = Reply().pack()
ENDS = say_and_close(b"")


def test_the_next_agent_is_asked_once_more(login: Login) -> None:
    """The same question, with what is left of the budget."""
    with Agent(login.socket_path, (ENDS, say(GOOD))) as agent:
        outcome = login("action_generic_failure=deny", "timeout_ms=20000")
    assert outcome.rc == "PAM_SUCCESS"
    first, second = agent.requests
    assert second.timeout_ms < first.timeout_ms
    assert (second.uid, second.phase, second.user) == (first.uid, first.phase, first.user)


def test_a_question_that_was_never_read_is_put_again(login: Login) -> None:
    """The agent ended before it took the question: a reset instead of an end."""
    with Agent(login.socket_path, (ENDS, say(GOOD)), read_request=False):
        outcome = login("action_generic_failure=deny", "timeout_ms=20000")
    assert outcome.rc == "PAM_SUCCESS"


def test_an_agent_that_always_hangs_up_is_asked_twice_and_no_more(login: Login) -> None:
    """It refuses us: that is its word."""
    with Agent(login.socket_path, (ENDS,)) as agent:
        outcome = login("action_generic_failure=deny", "timeout_ms=20000")
    assert (outcome.rc, len(agent.requests)) == ("PAM_PERM_DENIED", 2)
    assert "reply ends after 0 of 720 bytes" in outcome.log[-1]


@pytest.mark.parametrize("count", [1, 719])
def test_a_reply_that_was_begun_is_not_asked_for_again(login: Login, count: int) -> None:
    """Half a reply is a fault of the agent's, whatever became of it."""
    with Agent(login.socket_path, (say_and_close(GOOD[:count]), say(GOOD))) as agent:
        outcome = login("action_generic_failure=deny", "timeout_ms=20000")
    assert (outcome.rc, len(agent.requests)) == ("PAM_PERM_DENIED", 1)


def _restarted(login: Login, timeout_ms: int, comes_back: bool) -> Tuple[Outcome, int]:
    """A login whose agent ends with the question; then nobody, then perhaps another one. How often was it asked?"""
    asked: List[Request] = []
    taken, over = threading.Event(), threading.Event()

    def serve() -> None:
        def end(_: socket.socket) -> None:
            # Before the module sees the end of its connection, so that it finds nobody.
            first._listener.shutdown(socket.SHUT_RDWR)
            taken.set()

        with Agent(login.socket_path, (end,)) as first:
            taken.wait(60)
        asked.extend(first.requests)
        # Long enough for the module to find nobody there.
        if comes_back and not over.wait(0.2):
            with Agent(login.socket_path, (say(GOOD),)) as second:
                over.wait(60)
            asked.extend(second.requests)

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        outcome = login("action_generic_failure=deny", f"timeout_ms={timeout_ms}")
    finally:
        over.set()
        serving.join()
    return outcome, len(asked)


def test_there_may_be_no_socket_in_between(login: Login) -> None:
    """Where the agent binds its own: connect() fails for as long as it is away, within the budget."""
    outcome, asked = _restarted(login, 20_000, comes_back=True)
    assert (outcome.rc, asked) == ("PAM_SUCCESS", 2)


def test_an_agent_that_does_not_come_back_costs_the_budget_and_no_more(login: Login) -> None:
    """Then the line's own action_generic_failure decides."""
    outcome, asked = _restarted(login, 1500, comes_back=False)
    assert outcome.rc == "PAM_PERM_DENIED"
    assert asked == 1
    assert outcome.took_s < 20
