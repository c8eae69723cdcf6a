"""What comes while there is no agent is served by the next; what was answered before is not answered again."""

from __future__ import annotations

import secrets
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator

import pytest
from real_agent import PATIENCE_S, JobProcess, RealAgent, job
from real_agent import settled_agent as agent

from adoptd.model import Connection, Endpoint
from adoptd.seal import Seal, open_seal
from adoptd.wire import frame
from adoptd.wire.callerid import Outcome, Question, decode_answer, encode_question
from lab.waiting import PATIENCE, until
from munged import Munged, running_munged

__all__ = ["agent", "job"]

pytestmark = pytest.mark.timeout(180 * PATIENCE)

# A question outlives the start of the agent that refuses it.
TTL_S = min(int(PATIENCE_S), 300)


@pytest.fixture
def munged() -> Iterator[Munged]:
    """A MUNGE daemon, which outlives the agents."""
    with running_munged() as running:
        yield running


def _seal(made: RealAgent, scheme: str, munged: Munged) -> Seal:
    """Set the agent up for ``scheme``, and another agent's means to ask it."""
    made.configure(seal=f"scheme = '{scheme}'\nmunge_socket = '{munged.socket}'\nttl_s = {TTL_S}")
    return open_seal(scheme, made.directory / "key", munged.socket, TTL_S)


def _question(seal: Seal, connection: Connection) -> bytes:
    here = Endpoint.parse("127.0.0.1:1").address
    asked = Question(nonce=secrets.token_hex(16), responder=here, connection=connection, login_uid=0)
    return frame.encode_frame(seal.seal(encode_question(asked), 0), frame.CALLERID_MAX_BYTES)


def _send(made: RealAgent, sealed: bytes) -> socket.socket:
    asking = socket.create_connection(("127.0.0.1", made.port), PATIENCE_S)
    asking.sendall(sealed)
    return asking


def _received(asking: socket.socket) -> bytes:
    """The sealed answer, nothing if there is none."""
    with asking:
        data = b""
        while chunk := asking.recv(65536):
            data += chunk
    return data[frame.PREFIX_BYTES :]


def _outcome(seal: Seal, answer: bytes) -> Outcome:
    return decode_answer(seal.open(answer).payload).outcome


@pytest.mark.parametrize("scheme", ["key", "munge"])
def test_a_question_that_was_answered_is_not_answered_by_the_next_agent(
    agent: RealAgent, job: JobProcess, munged: Munged, scheme: str
) -> None:
    """Killed, so that it could note nothing down: a recorded question is refused all the same, a new one is not."""
    seal = _seal(agent, scheme, munged)
    agent.activate()
    sealed = _question(seal, job.connect())
    assert _outcome(seal, _received(_send(agent, sealed))) is Outcome.JOB
    assert _received(_send(agent, sealed)) == b""
    agent.restart(signal.SIGUSR1)
    assert _received(_send(agent, sealed)) == b""
    assert agent.metric('adoptd_messages_refused_total{reason="replayed",socket="peer"}') == 1
    assert _outcome(seal, _received(_send(agent, _question(seal, job.connect())))) is Outcome.JOB


@pytest.mark.parametrize("how", [signal.SIGUSR1, signal.SIGHUP], ids=["killed", "restarted"])
def test_what_comes_while_there_is_no_agent_is_served_by_the_next(
    agent: RealAgent, job: JobProcess, munged: Munged, how: signal.Signals
) -> None:
    """A user's command, and a question sealed under MUNGE, whose daemon knows that it has not seen it before."""
    seal = _seal(agent, "munge", munged)
    agent.activate()
    connection = job.connect()
    with ThreadPoolExecutor(1) as pool:
        with agent.away(how):
            asking = _send(agent, _question(seal, connection))
            commanding = pool.submit(agent.status)
            until(lambda: _waiting_at(agent.user), "a command that waits for an agent")
        assert commanding.result()["node"] == "n1"
    assert _outcome(seal, _received(asking)) is Outcome.JOB


def _waiting_at(path: Path) -> bool:
    """Whether somebody has connected to a socket: it has a row, and so has its end of each connection."""
    return Path("/proc/net/unix").read_text().split().count(str(path)) > 1


def test_a_question_under_a_key_from_before_the_start_is_refused(
    agent: RealAgent, job: JobProcess, munged: Munged
) -> None:
    """Under a key nobody but the agent remembers, and the one before it may have answered it: it must be asked anew."""
    seal = _seal(agent, "key", munged)
    agent.activate()
    with agent.away(signal.SIGUSR1):
        asking = _send(agent, _question(seal, job.connect()))
    assert _received(asking) == b""
    assert agent.metric('adoptd_messages_refused_total{reason="replayed",socket="peer"}') == 1


def test_who_gave_up_while_there_was_no_agent_costs_nothing(agent: RealAgent, job: JobProcess, munged: Munged) -> None:
    """Questions whose askers have gone are not opened, let alone answered; those who wait are."""
    seal = _seal(agent, "munge", munged)
    agent.activate()
    gone = [_question(seal, job.connect()) for _ in range(50)]
    with agent.away(signal.SIGUSR1):
        for sealed in gone:
            _send(agent, sealed).close()
        asking = _send(agent, _question(seal, job.connect()))
    assert _outcome(seal, _received(asking)) is Outcome.JOB
    assert agent.lines(" callerid_answered ") == 1
    # Not opened: each is still good for one answer.
    assert _outcome(seal, _received(_send(agent, gone[0]))) is Outcome.JOB


def test_commands_over_restarts_in_order_are_all_answered(agent: RealAgent) -> None:
    """One after the other, without a pause, over five of them. (Only pam_adopt.so asks a killed agent's successor.)"""
    agent.activate()
    assert agent.activator is not None
    for _ in range(5):
        before = agent.ready_count()

        def restarted(before: int = before) -> bool:
            assert agent.status()["node"] == "n1"
            return agent.ready_count() > before

        agent.activator.send_signal(signal.SIGHUP)
        until(restarted, "the next agent to be ready")


def test_a_socket_outlives_its_agents(agent: RealAgent) -> None:
    """The same inodes after any number of agents, however they ended."""
    agent.activate()
    before = [path.stat().st_ino for path in (agent.pam, agent.user)]
    for how in (signal.SIGHUP, signal.SIGUSR1):
        agent.restart(how)
    assert [path.stat().st_ino for path in (agent.pam, agent.user)] == before
