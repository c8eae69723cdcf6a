"""The agent as a process: reloads while it serves, what it leaves behind, and a start that fails in words."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Awaitable, Callable, Iterator

import pytest
from fakes import until
from nobody import environment

from adoptd import assembly, config, control, exposition, log, service
from adoptd.client import ask_agent
from adoptd.config import Config
from adoptd.metrics import Metrics
from adoptd.seal import Seal, SealError, SealFault
from adoptd.service import Service
from adoptd.slurm_site import configured_seal
from adoptd.sockets import bind_tcp
from adoptd.wire.control import Command, Result


class Site:
    """A configuration that touches nothing of this host but ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run = directory / "run"
        self.key = directory / "adoptd.key"
        self.file = directory / "adoptd.toml"
        self.write()

    def write(self, user: str = "user.sock", node: str = "n1", metrics: str = "enabled = false") -> None:
        self.file.write_text(
            f"[agent]\npam_socket = '{self.run}/pam.sock'\nuser_socket = '{self.run}/{user}'\nnode_name = '{node}'\n"
            f"[callerid]\nenabled = false\n[probe]\nenabled = false\n[metrics]\n{metrics}\n"
            f"[seal]\nkey_file = '{self.key}'\nmunge_socket = '{self.directory}/no-munged'\n"
        )

    def make_key(self) -> None:
        self.key.touch(0o600)
        self.key.write_bytes(os.urandom(64))

    async def status(self, user: str = "user.sock") -> Result:
        return await asyncio.to_thread(ask_agent, str(self.run / user), Command("status", {}))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    logger = logging.getLogger("adoptd")
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    # Its answer is believed only if it is root's; and only root's agent is this test's business.
    monkeypatch.setattr("adoptd.client.Caller.of", lambda sock: type("Root", (), {"uid": 0, "pid": 1}))
    yield Site(tmp_path)
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def serve(site: Site, check: Callable[[Service], Awaitable[None]]) -> None:
    """Run an agent, ``check`` it, and stop it with SIGTERM."""

    async def main() -> None:
        agent = Service(site.file)
        running = asyncio.create_task(agent._main())
        try:
            await until(lambda: running.done() or (site.run / "user.sock").exists())
            if not running.done():
                await site.status()
                await check(agent)
        finally:
            if not running.done():
                os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(running, 60)

    asyncio.run(main())


async def reloaded(site: Site, node: str, user: str = "user.sock") -> None:
    os.kill(os.getpid(), signal.SIGHUP)
    while (await site.status(user))["node"] != node:
        await asyncio.sleep(0.01)


def test_a_socket_that_moved_in_the_file_stays_where_it_is(site: Site) -> None:
    """It is bound, so it needs a restart: served, reported and removed at the old place; the new one is not ours."""
    stranger = site.run / "other.sock"

    async def check(agent: Service) -> None:
        stranger.write_text("somebody else's")
        for node in ("n2", "n3"):
            site.write(user="other.sock", node=node)
            await reloaded(site, node)
            assert agent._config.agent.user_socket == str(site.run / "user.sock")
            assert config.needs_restart(agent._config, config.load(site.file)) == ("agent.user_socket",)

    serve(site, check)
    # The sessions and the logins in progress are for the next agent.
    assert sorted(path.name for path in site.run.iterdir()) == ["logins", "other.sock", "sessions"]


def test_a_reload_that_waits_for_munged_keeps_nobody_waiting(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """libmunge needs ten seconds to find out that munged hangs; meanwhile the agent serves."""
    waiting, go_on = threading.Event(), threading.Event()

    def slow(settings: Config) -> Seal:
        waiting.set()
        go_on.wait(60)
        return configured_seal(settings)

    site.make_key()

    async def check(agent: Service) -> None:
        monkeypatch.setattr(assembly, "configured_seal", slow)
        site.write(node="n2")
        os.kill(os.getpid(), signal.SIGHUP)
        await until(waiting.is_set)
        assert (await site.status())["node"] == "n1"
        go_on.set()
        await reloaded(site, "n2")

    serve(site, check)


def test_a_seal_that_comes_after_the_agent_is_found(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """munged may start later, a key file be delivered later: without a restart or a reload."""
    monkeypatch.setattr(service, "_SEAL_RETRY_S", 0.02)

    async def check(agent: Service) -> None:
        assert (await site.status())["seal"] is None
        site.make_key()
        await until(lambda: agent._seal is not None)
        assert (await site.status())["seal"] == "key"

    serve(site, check)


def test_a_seal_that_never_comes_does_not_end_the_agent(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves logins by then, and goes on to; what there is to seal with is looked for again."""
    waiting, go_on, gave_up = threading.Event(), threading.Event(), threading.Event()

    def hangs(settings: Config) -> Seal:
        waiting.set()
        go_on.wait(60)
        return configured_seal(settings)

    asked_for_jobs = Service._ask_for_jobs

    async def last_of_the_start(agent: Service) -> None:
        gave_up.set()
        await asked_for_jobs(agent)

    monkeypatch.setattr(service, "_SEAL_PATIENCE_S", 0.01)
    monkeypatch.setattr(service, "_SEAL_MS", 100.0)
    monkeypatch.setattr(service, "_SEAL_RETRY_S", 0.02)
    monkeypatch.setattr(assembly, "configured_seal", hangs)
    monkeypatch.setattr(Service, "_ask_for_jobs", last_of_the_start)
    site.make_key()

    async def check(agent: Service) -> None:
        try:
            await until(gave_up.is_set)
            assert waiting.is_set()
        finally:
            go_on.set()
        await until(lambda: agent._seal is not None)
        assert (await site.status())["seal"] == "key"

    serve(site, check)
    assert gave_up.is_set()


def test_a_reload_does_not_start_the_clock_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """uptime_s is the agent's, not its configuration's."""
    monkeypatch.setattr(control, "_STARTED_S", time.monotonic() - 100)

    async def check(agent: Service) -> None:
        site.write(node="n2")
        await reloaded(site, "n2")
        uptime_s = (await site.status())["uptime_s"]
        assert isinstance(uptime_s, float)
        assert uptime_s >= 100

    serve(site, check)


def test_everybody_reaches_the_users_socket_under_any_umask(site: Site) -> None:
    """A start by hand through sudo may bring umask 077, which would shut the directory."""

    async def check(agent: Service) -> None:
        assert stat.S_IMODE(site.run.stat().st_mode) == 0o755
        assert stat.S_IMODE((site.run / "pam.sock").stat().st_mode) == 0o600

    umask = os.umask(0o077)
    try:
        serve(site, check)
    finally:
        os.umask(umask)


def test_a_port_that_is_taken_is_named() -> None:
    """errno's words alone send the administrator looking."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1 port {port}: Address already in use"):
            bind_tcp(["127.0.0.1"], port)
        with pytest.raises(OSError, match=f"/metrics on 127.0.0.1 port {port}: Address already in use"):
            exposition.serve(Metrics().registry, "127.0.0.1", port)


def test_only_the_journal_is_taken_for_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a service starts inherits the variable; it names the stream it is about."""
    status = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    assert not log.is_journal()
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    assert log.is_journal()


STUCK_AT_THE_END = """
import sys, time
from pathlib import Path
from adoptd.deadline import Deadline
from adoptd.service import Service

async def main(self):
    try:
        await self._seal_workers.run(lambda: time.sleep(300), Deadline.after_ms(50))
    except Exception as error:
        print(error, file=sys.stderr)

Service._main = main
Service(Path(sys.argv[1])).run()
"""


def test_the_end_does_not_wait_for_a_munged_that_hangs(site: Site) -> None:
    """A restart would leave the node without an agent for as long as libmunge tries."""
    ended = subprocess.run(
        [sys.executable, "-c", STUCK_AT_THE_END, str(site.file)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert "no result within the deadline" in ended.stderr


def test_a_reload_keeps_a_seal_that_has_not_changed(site: Site) -> None:
    """What was sealed before it is opened after it, and once; another key is another seal."""
    site.make_key()

    async def check(agent: Service) -> None:
        before = agent._seal
        assert before is not None
        sealed = [before.seal(b"asked before the reload") for _ in range(2)]
        assert before.open(sealed[0]).payload == b"asked before the reload"
        site.write(node="n2")
        await reloaded(site, "n2")
        assert agent._seal is before
        assert before.open(sealed[1]).payload == b"asked before the reload"
        with pytest.raises(SealError) as refusal:
            before.open(sealed[0])
        assert refusal.value.fault is SealFault.REPLAYED
        site.make_key()
        site.write(node="n3")
        await reloaded(site, "n3")
        assert agent._seal is not before

    serve(site, check)
