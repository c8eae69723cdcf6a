"""Agents of one node that meet: one serves, the others refuse in words, and nothing of the one is disturbed."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest
from real_agent import PATIENCE_S, JobProcess, RealAgent, agent, job

from adoptd.deadline import Deadline
from adoptd.probe import store
from lab.waiting import PATIENCE, until
from munged import running_munged

__all__ = ["agent", "job"]

pytestmark = pytest.mark.timeout(180 * PATIENCE)


def _inodes(made: RealAgent) -> tuple[int, int]:
    return made.pam.stat().st_ino, made.user.stat().st_ino


def _left(made: RealAgent) -> list[str]:
    """What an agent that ended in order has left, but for the sessions that the next one is to know of."""
    return [entry.name for entry in made.run.iterdir() if entry.name not in ("sessions", "logins")]


def test_the_second_refuses_and_the_first_does_not_notice(agent: RealAgent, job: JobProcess, pin_dir: Path) -> None:
    """Exit status 1 and who the first is; sockets, probe and answers are as before; afterwards a third may start."""
    first = agent.start()
    pins, inodes = sorted(pin_dir.rglob("*")), _inodes(agent)
    second = agent.spawn()
    assert second.wait(PATIENCE_S) == 1
    words = f"run: an agent is running already: pid {first.pid} holds {agent.pam}.lock\n"
    assert agent.log.read_text().endswith(words)
    assert (sorted(pin_dir.rglob("*")), _inodes(agent)) == (pins, inodes)
    found = agent.whois(job.connect())
    assert (found["pid"], found["job"], found["witness"]) == (job.pid, job.ID, "bpf")
    assert agent.stop(first) == 0
    assert _left(agent) == []
    third = agent.start()
    assert agent.answers()
    assert agent.stop(third) == 0


def test_of_five_at_once_one_serves(agent: RealAgent, pin_dir: Path) -> None:
    """Whichever is first; one probe is loaded, once."""
    started = [agent.spawn() for _ in range(5)]
    until(lambda: sum(each.poll() is not None for each in started) == 4, "four agents that refuse")
    assert [each.poll() for each in started if each.poll() is not None] == [1] * 4
    assert agent.lines("an agent is running already: pid ") == 4
    until(lambda: agent.ready_count() == 1, "one that is ready")
    assert agent.lines(" probe_attached ") == 1
    assert len(list(pin_dir.iterdir())) == 1
    assert agent.probe["attached"] is True


def test_an_agent_by_hand_beside_an_activated_one_refuses(agent: RealAgent) -> None:
    """The service manager's sockets stay where they are, and the agent it started goes on serving them."""
    agent.activate()
    inodes = _inodes(agent)
    second = agent.spawn()
    assert second.wait(PATIENCE_S) == 1
    assert "an agent is running already" in agent.log.read_text().splitlines()[-1]
    assert _inodes(agent) == inodes
    assert agent.answers()


def test_sockets_of_a_manager_without_an_agent_are_not_taken_away(agent: RealAgent) -> None:
    """By hand while adoptd.socket is active and its agent is not: whoever listens is asked for, not pushed aside."""
    agent.run.mkdir()
    with socket.socket(socket.AF_UNIX) as managers:
        managers.bind(str(agent.pam))
        managers.listen()
        inode = agent.pam.stat().st_ino
        assert agent.spawn().wait(PATIENCE_S) == 1
        assert f"{agent.pam} is served by another process" in agent.log.read_text()
        assert agent.pam.stat().st_ino == inode
    assert not Path(f"{agent.pam}.lock").exists()


def test_an_agent_that_ends_leaves_the_sockets_of_the_next(agent: RealAgent) -> None:
    """What is there under its name by then is not its own."""
    first = agent.start()
    agent.user.unlink()
    agent.user.write_text("the next one's")
    assert agent.stop(first) == 0
    assert agent.user.read_text() == "the next one's"
    assert not agent.pam.exists()


def test_a_request_to_stop_is_heard_while_it_starts(agent: RealAgent, pin_dir: Path) -> None:
    """The probe is being waited for: no pins, sockets or lock are left, and the exit status is 0."""
    pin_dir.mkdir(0o700)
    with store.locked(pin_dir, Deadline.after_ms(1000)):
        starting = agent.spawn()
        until(agent.answers, "an agent that serves")
        assert agent.ready_count() == 0
        assert agent.stop(starting) == 0
        assert agent.ready_count() == 0
    assert _left(agent) == []


def test_a_munged_that_hangs_keeps_nobody_waiting_at_the_start(agent: RealAgent) -> None:
    """libmunge takes ten seconds to find out. The agent serves before, without a seal, and has one as soon as it can.

    With scheme auto, which looks whether munged answers.
    """
    with running_munged() as munged:
        agent.configure(seal=f"scheme = 'auto'\nmunge_socket = '{munged.socket}'")
        munged.pause()
        agent.spawn()
        until(agent.answers, "an agent that serves")
        # Not when munged had been given up: the agent would be ready by then, and say so.
        assert agent.ready_count() == 0
        assert agent.status()["seal"] is None
        munged.resume()
        until(lambda: agent.ready_count() == 1, "an agent that is ready")
        assert agent.status()["seal"] == "munge"
        assert agent.lines(" seal_slow ") == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_at_any_moment_of_the_start_is_obeyed(agent: RealAgent, how: signal.Signals) -> None:
    """From the first line of its log on; before that it has nothing open. Never a traceback, never anything left."""
    for pause_ms in (0, 20, 50, 100, 200, 400):
        starting = agent.spawn()
        until(Path(f"{agent.pam}.lock").exists, "its lock")
        time.sleep(pause_ms / 1000)
        starting.send_signal(how)
        assert starting.wait(PATIENCE_S) == 0
        assert _left(agent) == []
    assert agent.lines("Traceback") == 0
