"""The agent as a process: puts the parts together, starts them, reloads and ends them.

The composition root: the only place that knows every part, and the only one that reads the
configuration into them. Called by ``adoptd run``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import List, Optional

from adoptd import __version__, config, log
from adoptd.adoption import Adoptions
from adoptd.callerid import Asker, Inquiry, Responder, SealRoom
from adoptd.config import Config
from adoptd.control import Control
from adoptd.handlers import Desk, Handlers
from adoptd.jobs import JobBackend
from adoptd.jobs.cgroup import CgroupJobs
from adoptd.jobs.template import JobPath
from adoptd.metrics import Door, Metrics
from adoptd.model import AdoptdError, ConfigError
from adoptd.notify import notify, watchdog_interval_s
from adoptd.seal import Seal, SealError, open_seal
from adoptd.seal.replay import ReplayCache
from adoptd.server import (
    LOCAL_READ_S,
    PAM_MAX,
    PEER_MAX,
    PEER_MAX_PER_ADDRESS,
    PEER_READ_S,
    USER_MAX,
    USER_MAX_PER_UID,
    Doorkeeper,
    bind_tcp,
    bind_unix,
)
from adoptd.sessions import PendingLogins
from adoptd.watch import Watch
from adoptd.workers import Workers

# A login's whole budget, and some: what is in flight at SIGTERM ends by itself within it.
_FINISH_S = 2.0

# Questions answered in 20 s (twice the seal's life) at four times the highest measured rate.
_REPLAYS = 65_536


class Service:
    """One running agent."""

    def __init__(self, file: Path) -> None:
        """Read the configuration and make the parts. Raises ConfigError; nothing is open then."""
        self._file = file
        self._config = config.load(file)
        self._metrics = Metrics()
        # Most of an adoption is the kernel's wait for a grace period in the write to cgroup.procs (6 to 18 ms seen
        # on 6.18, cgroup_threadgroup_rwsem), so more threads than cores are worth having.
        self._job_workers = Workers("jobs", threads=16, backlog=PAM_MAX + PEER_MAX)
        self._seal_workers = Workers("seal", threads=8, backlog=PEER_MAX)
        self._slow_workers = Workers("slow", threads=2, backlog=USER_MAX)
        self._pending = PendingLogins(time.monotonic)
        self._replays = ReplayCache(_REPLAYS, time.time)
        self._watch: Optional[Watch] = None
        self._seal: Optional[Seal] = None
        self._desk: Optional[Desk] = None

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises AdoptdError or OSError if the start fails."""
        # uvloop is faster where it is installed; nothing depends on it.
        with contextlib.suppress(ImportError):
            import uvloop

            asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        asyncio.run(self._main())

    async def _main(self) -> None:
        log.configure(self._config.agent.log_level, "JOURNAL_STREAM" in os.environ)
        _come_before_sessions()
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        self._watch = Watch(self._config.probe, self._metrics, self._slow_workers)
        self._seal = _open_seal(self._config)
        self._desk = self._make_desk(self._config, self._seal, self._watch)
        doors = self._open_doors()
        await self._watch.start()
        notify("READY=1", f"STATUS=serving on {self._config.agent.pam_socket}")
        log.info("ready", version=__version__, node=self._config.agent.shown_name(), backend=self._config.jobs.backend)
        background = [asyncio.create_task(self._watch.run()), asyncio.create_task(_feed_watchdog())]
        try:
            await stop.wait()
        finally:
            notify("STOPPING=1")
            log.info("stopping")
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await asyncio.gather(*(door.close(_FINISH_S) for door in doors))
            self._close()

    def _make_desk(self, settings: Config, seal: Optional[Seal], watch: Watch) -> Desk:
        jobs = _make_backend(settings)
        inquiry = Inquiry(watch.witnesses, jobs, self._job_workers)
        seals = None if seal is None else SealRoom(seal, self._seal_workers)
        asker, responder = None, None
        if seals is not None and settings.callerid.enabled:
            asker = Asker(seals, settings.callerid.port, settings.callerid.timeout_ms, self._metrics)
            responder = Responder(inquiry, seals, self._replays, settings.seal.ttl_s)
        adoptions = Adoptions(settings.agent.shown_name(), jobs, asker, self._pending, self._job_workers, self._metrics)
        control = Control(settings, jobs, seals, inquiry, asker, adoptions, self._pending, watch, self._slow_workers)
        return Desk(adoptions, responder, control, settings.callerid.timeout_ms)

    def _open_doors(self) -> List[Doorkeeper]:
        settings = self._config
        handlers = Handlers(self._current_desk, self._metrics)
        for path in (settings.agent.pam_socket, settings.agent.user_socket):
            Path(path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        pam = bind_unix(settings.agent.pam_socket, 0o600)
        user = bind_unix(settings.agent.user_socket, 0o666)
        doors = [
            Doorkeeper(Door.PAM, [pam], handlers.pam, self._metrics, LOCAL_READ_S, PAM_MAX),
            Doorkeeper(Door.USER, [user], handlers.user, self._metrics, LOCAL_READ_S, USER_MAX, USER_MAX_PER_UID),
        ]
        if settings.callerid.enabled:
            peers = bind_tcp(settings.callerid.listen, settings.callerid.port)
            doors.append(
                Doorkeeper(Door.PEER, peers, handlers.peer, self._metrics, PEER_READ_S, PEER_MAX, PEER_MAX_PER_ADDRESS)
            )
        if settings.metrics.enabled:
            self._metrics.serve(settings.metrics.listen, settings.metrics.port)
        for door in doors:
            door.open()
        return doors

    def _current_desk(self) -> Desk:
        if self._desk is None:
            raise AdoptdError("the agent is not started yet")
        return self._desk

    def _reload(self) -> None:
        """Take over a changed configuration, whole or not at all."""
        notify("RELOADING=1")
        try:
            fresh = config.load(self._file)
            seal = _open_seal(fresh)
            if self._watch is None:
                raise ConfigError("the agent is not started yet")
            self._desk = self._make_desk(fresh, seal, self._watch)
        except (AdoptdError, OSError) as error:
            self._metrics.config_reload_ok.set(0)
            log.error("reload_failed", error=str(error), effect="the configuration before is still in force")
        else:
            restart = config.needs_restart(self._config, fresh)
            if restart:
                log.warning("reload_incomplete", needs_restart=", ".join(restart))
            # Requests under way still use the seal before; it is closed when the last of them lets go of it.
            self._seal, self._config = seal, fresh
            log.configure(fresh.agent.log_level, "JOURNAL_STREAM" in os.environ)
            self._metrics.config_reload_ok.set(1)
            log.info("reloaded", file=str(self._file))
        notify("READY=1")

    def _close(self) -> None:
        for path in (self._config.agent.pam_socket, self._config.agent.user_socket):
            with contextlib.suppress(OSError):
                os.unlink(path)
        if self._watch is not None:
            self._watch.close()
        if self._seal is not None:
            self._seal.close()
        for workers in (self._job_workers, self._seal_workers, self._slow_workers):
            workers.close()


def _make_backend(settings: Config) -> JobBackend:
    return CgroupJobs(JobPath.parse_template(settings.jobs.path), settings.jobs.leaf)


def _open_seal(settings: Config) -> Optional[Seal]:
    """The seal, or None if there is none to be had and none was named: the node then asks nobody."""
    section = settings.seal
    try:
        return open_seal(section.scheme, Path(section.key_file), section.munge_socket or None, section.ttl_s)
    except SealError as error:
        if section.scheme != "auto":
            raise ConfigError(f"[seal] scheme {section.scheme!r}: {error}") from None
        log.error("seal_unavailable", error=str(error), effect="other nodes are not asked and not answered")
        return None


def _come_before_sessions() -> None:
    """Ask the scheduler not to make a login wait for the logins that it is competing with.

    Under autogrouping (sched(7), on by default on Debian) every session has an equal share of the
    processor, so twenty sshds at their key exchange leave the agent a twentieth. nice(2) does not reach
    across sessions; this file does. Only for a session that is the agent's own, as under systemd.
    """
    if os.getsid(0) != os.getpid():
        return
    try:
        Path("/proc/self/autogroup").write_text("-10")
    except OSError as error:
        log.debug("autogroup_unchanged", error=error.strerror)


async def _feed_watchdog() -> None:
    interval_s = watchdog_interval_s()
    while interval_s > 0:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)
