"""sd_notify: one datagram where systemd asks for it, nothing and no error anywhere else."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path

import pytest
from logs import LogLines, log_lines

from adoptd import notify as notify_module
from adoptd.notify import notify, watchdog_interval_s

__all__ = ["log_lines"]


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch, log_lines: LogLines) -> None:
    """No variable, or an empty one."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "")
    notify("READY=1")
    assert log_lines() == []


@pytest.mark.parametrize("path", ["/nonexistent/notify", "/" + "x" * 200, "relative", "@" + "x" * 200])
def test_a_manager_that_cannot_be_reached_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, log_lines: LogLines, path: str
) -> None:
    """Said once in the log; the agent goes on."""
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    notify("READY=1")
    (line,) = log_lines()
    assert line.startswith(f"<4>notify_failed socket={path} error=")


@pytest.mark.parametrize("abstract", [False, True])
def test_one_datagram_with_all_assignments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, abstract: bool) -> None:
    """On a path or in the abstract namespace, newline between assignments."""
    name = f"@adoptd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        manager.settimeout(60.0)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify("READY=1", "STATUS=serving")
        assert manager.recv(1024) == b"READY=1\nSTATUS=serving"


@pytest.mark.parametrize(
    ("usec", "pid", "interval_s"),
    [
        (None, None, 0.0),
        ("", None, 0.0),
        ("x", None, 0.0),
        ("30000000", "x", 0.0),
        ("30000000", "1", 0.0),
        ("30000000", None, 15.0),
        ("30000000", "self", 15.0),
    ],
)
def test_the_watchdog_s_interval(
    monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str | None, interval_s: float
) -> None:
    """Half of what systemd allows, and only if it means this process; nonsense is no watchdog."""
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", str(os.getpid()) if pid == "self" else pid)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert watchdog_interval_s() == interval_s


def test_a_manager_that_does_not_read_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log_lines: LogLines
) -> None:
    """Its queue is full: the event loop goes on, and with it every login."""
    name = str(tmp_path / "notify")
    monkeypatch.setattr(notify_module, "_SEND_S", 0.01, raising=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filling:
            filling.setblocking(False)
            filling.connect(name)
            with contextlib.suppress(BlockingIOError):
                while True:
                    filling.send(b"x")
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        told = threading.Thread(target=notify, args=("WATCHDOG=1",), daemon=True)
        told.start()
        told.join(10.0)
        assert not told.is_alive()
    (line,) = log_lines()
    assert line.startswith(f"<4>notify_failed socket={name} error=")
