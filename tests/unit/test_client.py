"""The users' end of the users' socket: it believes root only, waits so long and no longer, and says what is wrong."""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest
from nobody import NOBODY, as_nobody, environment, nobody_command, public_path
from scripted import Reply, scripted_agent

from adoptd import client
from adoptd.client import AgentError, ask_agent
from adoptd.wire.control import Command

__all__ = ["public_path"]

STATUS = Command("status", {})


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a second instead of seven seconds."""
    monkeypatch.setattr(client, "TIMEOUT_MS", 100.0)


def test_nobody_serves(tmp_path: Path) -> None:
    """No socket, or one that a killed agent left behind."""
    path = tmp_path / "s"
    with pytest.raises(AgentError, match=f"no agent is running: nobody serves {path}"):
        ask_agent(str(path), STATUS)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with pytest.raises(AgentError, match="no agent is running"):
        ask_agent(str(path), STATUS)


@pytest.mark.parametrize(("name", "words"), [("file", "Connection refused|no agent"), ("x" * 200, "too long")])
def test_a_path_that_is_no_socket(tmp_path: Path, name: str, words: str) -> None:
    """The path is in the message, and no traceback."""
    path = tmp_path / name
    if name == "file":
        path.touch()
    with pytest.raises(AgentError, match=words):
        ask_agent(str(path), STATUS)


def test_a_socket_that_is_not_root_s_is_no_agent(public_path: Path) -> None:
    """Another user who serves the path is believed nothing, and sent nothing."""
    public_path.chmod(0o777)
    path = public_path / "s"
    code = "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(1); print('up', flush=True)\n"
    code += "c = s.accept()[0]; c.settimeout(60); print(len(c.recv(100)))"
    liar = subprocess.Popen(nobody_command(code, str(path)), env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert liar.stdout is not None
        assert liar.stdout.readline() == "up\n"
        with pytest.raises(AgentError, match=f"{path} is served by uid {NOBODY}, expected root: this is not the agent"):
            ask_agent(str(path), STATUS)
        assert liar.communicate(timeout=60)[0] == "0\n"
    finally:
        liar.kill()
        liar.wait()


def test_an_ordinary_user_is_not_root_and_asks_all_the_same(public_path: Path) -> None:
    """What counts is who serves, not who asks."""
    path = public_path / "s"
    with scripted_agent(path, lambda command: {"said": command.name}):
        path.chmod(0o666)
        assert as_nobody("print(client.ask_agent(sys.argv[1], Command('status', {})))", str(path)) == (
            "{'said': 'status'}\n"
        )


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (None, "closed the connection without a reply"),
        (b"\0\0", "closed the connection without a reply"),
        (b"\0\0\0\x08{}", "closed the connection without a reply"),
        (b"\xff\xff\xff\xff", "frame of 4294967295 bytes"),
        (b"\0\0\0\0", "frame of 0 bytes"),
        (b"\0\0\0\2{}", "not of this version"),
        (b"\0\0\0\2\xff\xff", "not JSON"),
        (struct.pack("!I", 100_000) + b"[" * 100_000, "not JSON"),
        ("there is no such job", "^there is no such job$"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_reply_that_is_none_is_an_agent_error(tmp_path: Path, reply: Reply, words: str) -> None:
    """One family of errors, with words for a person."""
    with scripted_agent(tmp_path / "s", lambda command: reply), pytest.raises(AgentError, match=words):
        ask_agent(str(tmp_path / "s"), STATUS)


@pytest.mark.parametrize("drip", [False, True])
def test_an_agent_that_hangs(tmp_path: Path, impatient: None, drip: bool) -> None:
    """Silent, or a byte now and then: the time for the whole is bounded."""
    stop = threading.Event()

    def script(command: Command) -> Reply:
        stop.wait(60.0)
        return None

    def dripping() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "s"))
            listener.listen(1)
            ready.set()
            with listener.accept()[0] as client_end:
                client_end.sendall(b"\0\0\4\0")
                while not stop.wait(0.02):
                    try:
                        client_end.sendall(b"x")
                    except OSError:
                        return

    started = time.monotonic()
    if drip:
        ready = threading.Event()
        thread = threading.Thread(target=dripping)
        thread.start()
        ready.wait(60.0)
        try:
            with pytest.raises(AgentError, match="timed out"):
                ask_agent(str(tmp_path / "s"), STATUS)
        finally:
            stop.set()
            thread.join(60.0)
    else:
        with scripted_agent(tmp_path / "s", script):
            try:
                with pytest.raises(AgentError, match="timed out"):
                    ask_agent(str(tmp_path / "s"), STATUS)
            finally:
                stop.set()
    assert time.monotonic() - started < 30.0


def test_a_command_too_long_to_send(tmp_path: Path) -> None:
    """Refused before it is sent, in words."""
    long = Command("explain", {"options": "x" * 10_000})
    with scripted_agent(tmp_path / "s", lambda command: {}) as commands, pytest.raises(AgentError, match="frame of"):
        ask_agent(str(tmp_path / "s"), long)
    assert commands == []


def test_one_command_one_reply(tmp_path: Path) -> None:
    """What is sent arrives, and what comes back is the result; large ones too."""
    large = {"jobs": [{"job": str(n), "uid": n} for n in range(10_000)]}
    with scripted_agent(tmp_path / "s", lambda command: large) as commands:
        assert ask_agent(str(tmp_path / "s"), Command("jobs", {"a": "b"})) == large
    assert commands == [Command("jobs", {"a": "b"})]
