"""What a user with a shell on the node, and no job there, does to keep the agent from serving: it serves.

Where the agent does not answer, action_generic_failure decides, and by default lets in: so whoever can
stop, fill or starve the agent gets onto the node.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Iterator, List

import pytest
from fakes import until
from nobody import environment

from adoptd import doors, exposition
from adoptd.exposition import SCRAPES_MAX, serve
from adoptd.metrics import Metrics
from adoptd.probe import mounts
from adoptd.server import PAM_MAX, PEER_MAX, USER_MAX
from adoptd.service import Service
from lab.waiting import until as until_now
from ports import free_port

PORTS_TAKEN_FOR_S = 60.0


@pytest.fixture
def quiet_log() -> Iterator[None]:
    logger = logging.getLogger("adoptd")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.fixture
def taken() -> Iterator[List[socket.socket]]:
    """Two ports on which somebody listens."""
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
            each.listen()
        yield [one, other]


def configured(directory: Path, callerid_port: int, metrics_port: int) -> Path:
    (directory / "key").touch(0o600)
    (directory / "key").write_bytes(os.urandom(64))
    file = directory / "adoptd.toml"
    file.write_text(
        f"[agent]\npam_socket = '{directory}/run/pam.sock'\nuser_socket = '{directory}/run/user.sock'\n"
        f"[callerid]\nlisten = ['127.0.0.1']\nport = {callerid_port}\n[probe]\nenabled = false\n"
        f"[metrics]\nport = {metrics_port}\n[seal]\nscheme = 'key'\nkey_file = '{directory}/key'\n"
    )
    return file


def is_served(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_who_takes_our_ports_keeps_nobody_from_logging_in(
    tmp_path: Path, taken: List[socket.socket], monkeypatch: pytest.MonkeyPatch, quiet_log: None
) -> None:
    """Neither port is privileged, so any user can hold them over a restart of the agent.

    The PAM socket is served all the same, and each port as soon as it is free.
    """
    monkeypatch.setattr(doors, "_PORT_RETRY_S", 0.05)
    ports = [each.getsockname()[1] for each in taken]
    agent = Service(configured(tmp_path, *ports))

    async def main() -> None:
        running = asyncio.create_task(agent._main())
        try:
            await until(lambda: running.done() or (agent._doors is not None and agent._doors.taken_ports))
            assert not running.done(), running.exception()
            opened = agent._doors
            assert opened is not None
            assert opened.taken_ports == ("callerid", "metrics")
            _, writer = await asyncio.open_unix_connection(str(tmp_path / "run" / "pam.sock"))
            writer.close()
            for each in taken:
                each.close()
            await until(lambda: not opened.taken_ports)
            assert all(is_served(port) for port in ports)
        finally:
            if not running.done():
                os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(asyncio.gather(running, return_exceptions=True), PORTS_TAKEN_FOR_S)

    asyncio.run(main())


def test_every_door_can_be_full_at_once() -> None:
    """With the usual soft limit of 1024 descriptors the peers' door alone takes all that the PAM door needs."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    code = (
        "import resource\nfrom adoptd.daemon import allow_descriptors\nfrom adoptd.service import _DESCRIPTORS\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))\nallow_descriptors(_DESCRIPTORS)\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    soft, hard_after = (int(word) for word in done.stdout.split())
    doors = PAM_MAX + PEER_MAX + USER_MAX
    assert soft > doors if hard < 0 or hard > doors else soft == hard
    assert hard_after == hard


def test_silent_scrapers_cost_a_bounded_number_of_threads_and_no_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread and a descriptor of root's for every connection that anybody cares to open would be for the taking."""
    # So that it is the bound that ends them.
    monkeypatch.setattr(exposition._ScrapeHandler, "timeout", 300.0)
    port = free_port()
    threads = threading.active_count()
    serve(Metrics().registry, "127.0.0.1", port)
    silent: List[socket.socket] = []
    try:
        for _ in range(5 * SCRAPES_MAX):
            silent.append(socket.create_connection(("127.0.0.1", port), timeout=60))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
            assert b"adoptd_build_info" in reply.read()
        # The server's own thread, and one that ends for each connection that was dropped.
        until_now(lambda: threading.active_count() <= threads + 1 + SCRAPES_MAX, f"a few threads more than {threads}")
        for each in silent[: 4 * SCRAPES_MAX]:
            each.settimeout(60)
            assert each.recv(1) == b""
    finally:
        for each in silent:
            each.close()


@pytest.mark.parametrize("end", ["\f", "\v", "\x1c", "\x85", "\u2028"])
def test_a_mount_point_that_a_user_named_is_one_line(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fusermount mounts for any user; to the kernel only a newline ends a line, and that one it escapes."""
    table = tmp_path / "mountinfo"
    table.write_text(
        f"36 25 0:31 / /home/mallory/x{end}y rw,nosuid - fuse.sshfs mallory rw\n"
        "37 25 0:32 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "utf-8",
    )
    monkeypatch.setattr(mounts, "_MOUNTINFO", table)
    assert [mount.fstype for mount in mounts.mounts()] == ["fuse.sshfs", "cgroup2"]
    assert [mount.point for mount in mounts.mounts()] == [f"/home/mallory/x{end}y", "/sys/fs/cgroup"]
