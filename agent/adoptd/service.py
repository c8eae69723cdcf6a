"""The agent as a process: puts the parts together, starts them, reloads and ends them.

The composition root: the only place that knows every part, and the only one that reads the
configuration into them. Called by ``adoptd run``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import time
from pathlib import Path
from typing import Awaitable, Callable, Dict, List, Optional, Tuple

from adoptd import __version__, config, log
from adoptd.adoption import Adoptions
from adoptd.callerid import Asker, Inquiry, Responder, SealRoom
from adoptd.config import Config
from adoptd.control import Control
from adoptd.deadline import Deadline
from adoptd.handlers import Desk, Handlers
from adoptd.jobs import JobBackend
from adoptd.jobs.cgroup import CgroupJobs
from adoptd.jobs.environment import JobEnvironment
from adoptd.jobs.slurm import SlurmJobs
from adoptd.jobs.template import JobPath
from adoptd.metrics import Door, Metrics
from adoptd.model import AdoptdError, ConfigError, JobManagerError
from adoptd.notify import notify, watchdog_interval_s
from adoptd.seal import Seal, SealError
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
from adoptd.slurm_callerid import SlurmdCallerid
from adoptd.slurm_site import configured_seal, slurm_conf
from adoptd.watch import Watch
from adoptd.workers import OutOfTime, Overloaded, Workers

# A login's whole budget, and some: what is in flight at SIGTERM ends by itself within it.
_FINISH_S = 2.0

# How often to look again for something to seal with where there was nothing: munged may start after us.
_SEAL_RETRY_S = 10.0
# libmunge takes 10 s to find out that munged is stopped (MungeSeal).
_SEAL_MS = 15_000.0

# Twice what a first look at a full node's steps takes.
_FIRST_JOBS_MS = 2_000.0

# How often a port that is taken is tried again.
_PORT_RETRY_S = 2.0

# The doors' bounds together, with as much again for what a request in progress opens.
_DESCRIPTORS = 2 * (PAM_MAX + PEER_MAX + USER_MAX)

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
        # For the agent's own needs, apart: users' commands, which may wait for a name service, must not hold up the
        # self-test and so take the probe away.
        self._own_workers = Workers("own", threads=2, backlog=4)
        self._pending = PendingLogins(time.monotonic)
        self._replays = ReplayCache(_REPLAYS, time.time)
        self._watch: Optional[Watch] = None
        self._seal: Optional[Seal] = None
        self._desk: Optional[Desk] = None
        self._jobs: Optional[JobBackend] = None
        # Ports that are not open, by name, and what opens them; and what was said of each last.
        self._shut_ports: Dict[str, Callable[[], None]] = {}
        self._port_faults: Dict[str, str] = {}

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises AdoptdError or OSError if the start fails."""
        # uvloop is faster where it is installed; nothing depends on it.
        with contextlib.suppress(ImportError):
            import uvloop

            asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        asyncio.run(self._main())
        if any(workers.pending for workers in self._all_workers()):
            # Python waits at its exit for threads that are stuck, 10 s in a munged that hangs: so long the node would
            # be without an agent at a restart. All that was to be finished is, and the sockets are gone.
            log.warning("stopped_without_waiting", error="calls to others are still under way")
            os._exit(0)

    async def _main(self) -> None:
        log.configure(self._config.agent.log_level, log.is_journal())
        _come_before_sessions()
        _allow_descriptors()
        loop = asyncio.get_running_loop()
        stop, reload = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, reload.set)
        watch = self._watch = Watch(self._config.probe, self._metrics, self._own_workers)
        self._seal = _open_seal(self._config)
        self._desk = self._make_desk(self._config, self._seal, watch)
        doors = self._open_doors()
        await watch.start()
        await self._ask_for_jobs()
        notify("READY=1", f"STATUS=serving on {self._config.agent.pam_socket}")
        log.info("ready", version=__version__, node=self._config.agent.shown_name())
        background = [
            asyncio.create_task(_kept_up(what, work))
            for what, work in (
                ("watch", watch.run),
                ("watchdog", _feed_watchdog),
                ("reload", lambda: self._reload_when(reload, watch)),
                ("seal", lambda: self._seek_seal(watch)),
                ("ports", self._seek_ports),
            )
        ]
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
        jobs = self._jobs = _make_backend(settings)
        inquiry = Inquiry(watch.witnesses, jobs, self._job_workers, settings.callerid.hint)
        seals = None if seal is None else SealRoom(seal, self._seal_workers)
        asker, responder = None, None
        if seals is not None and settings.callerid.enabled:
            section = settings.callerid
            fallback = _make_fallback(settings, self._job_workers)
            asker = Asker(seals, section.port, section.timeout_ms, self._metrics, fallback, section.hint)
            responder = Responder(inquiry, seals, self._replays, settings.seal.ttl_s)
        environment = JobEnvironment(settings.session.environment) if settings.session.environment else None
        adoptions = Adoptions(
            settings.agent.shown_name(), jobs, asker, self._pending, self._job_workers, self._metrics, environment
        )
        control = Control(settings, jobs, seals, inquiry, asker, adoptions, self._pending, watch, self._slow_workers)
        return Desk(adoptions, responder, control, settings.callerid.timeout_ms)

    async def _ask_for_jobs(self) -> None:
        """Ask the job manager once before anybody logs in: the administrator sees at once if it cannot be asked,
        and a step of Slurm's that hangs later has been heard before."""
        jobs, deadline = self._jobs, Deadline.after_ms(_FIRST_JOBS_MS)
        if jobs is None:
            return
        try:
            found = await self._own_workers.run(lambda: jobs.all_jobs(deadline), deadline)
        except (JobManagerError, OutOfTime, Overloaded) as error:
            log.error("jobs_unavailable", backend=jobs.name, error=str(error), effect="action_generic_failure")
        else:
            log.info("jobs_found", backend=jobs.name, jobs=len(found))

    def _open_doors(self) -> List[Doorkeeper]:
        settings = self._config
        handlers = Handlers(self._current_desk, self._metrics)
        for path in (settings.agent.pam_socket, settings.agent.user_socket):
            _make_directory(Path(path).parent)
        pam = bind_unix(settings.agent.pam_socket, 0o600)
        user = bind_unix(settings.agent.user_socket, 0o666)
        doors = [
            Doorkeeper(Door.PAM, [pam], handlers.pam, self._metrics, LOCAL_READ_S, PAM_MAX),
            Doorkeeper(Door.USER, [user], handlers.user, self._metrics, LOCAL_READ_S, USER_MAX, USER_MAX_PER_UID),
        ]
        for door in doors:
            door.open()

        def open_peers() -> None:
            peers = bind_tcp(settings.callerid.listen, settings.callerid.port)
            door = Doorkeeper(
                Door.PEER, peers, handlers.peer, self._metrics, PEER_READ_S, PEER_MAX, PEER_MAX_PER_ADDRESS
            )
            doors.append(door)
            door.open()

        if settings.callerid.enabled:
            self._shut_ports["callerid"] = open_peers
        if settings.metrics.enabled:
            self._shut_ports["metrics"] = lambda: self._metrics.serve(settings.metrics.listen, settings.metrics.port)
        self._open_ports()
        return doors

    def _open_ports(self) -> None:
        """Open those of our TCP ports that are shut. One that is taken is said once, and never keeps logins waiting.

        Any user can take a port above 1024 while no agent has it. An agent that would not start then leaves every
        login to action_generic_failure, and so lets the user in who took the port.
        """
        for name, open_port in list(self._shut_ports.items()):
            try:
                open_port()
            except OSError as error:
                if self._port_faults.get(name) != str(error):
                    log.error("port_unavailable", port=name, error=str(error), effect="tried again until it is free")
                self._port_faults[name] = str(error)
            else:
                del self._shut_ports[name]
                if self._port_faults.pop(name, None) is not None:
                    log.info("port_opened", port=name)

    async def _seek_ports(self) -> None:
        while self._shut_ports:
            await asyncio.sleep(_PORT_RETRY_S)
            self._open_ports()

    def _current_desk(self) -> Desk:
        if self._desk is None:
            raise AdoptdError("the agent is not started yet")
        return self._desk

    async def _reload_when(self, asked: asyncio.Event, watch: Watch) -> None:
        while True:
            await asked.wait()
            asked.clear()
            # The time is for Type=notify-reload (sd_notify(3)).
            notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            await self._reload(watch)
            notify("READY=1")

    async def _reload(self, watch: Watch) -> None:
        """Take over a changed configuration, whole or not at all, but for what needs a restart."""
        try:
            read = config.load(self._file)
            fresh = config.reloaded(self._config, read)
            # In a thread: where munged hangs this takes seconds, and the agent is serving.
            seal = await self._own_workers.run(lambda: _open_seal(fresh), Deadline.after_ms(_SEAL_MS))
            self._desk = self._make_desk(fresh, seal, watch)
        except (AdoptdError, OSError) as error:
            self._metrics.config_reload_ok.set(0)
            log.error("reload_failed", error=str(error), effect="the configuration before is still in force")
        else:
            restart = config.needs_restart(fresh, read)
            if restart:
                log.warning("reload_incomplete", needs_restart=", ".join(restart))
            # Requests under way still use the seal before; it is closed when the last of them lets go of it.
            self._seal, self._config = seal, fresh
            log.configure(fresh.agent.log_level, log.is_journal())
            self._metrics.config_reload_ok.set(1)
            log.info("reloaded", file=str(self._file))

    async def _seek_seal(self, watch: Watch) -> None:
        """Look again for a seal while there is none (scheme auto): munged or the key file may come after us."""
        while True:
            await asyncio.sleep(_SEAL_RETRY_S)
            settings = self._config
            if self._seal is not None:
                continue
            try:
                seal = await self._own_workers.run(lambda: configured_seal(settings), Deadline.after_ms(_SEAL_MS))  # noqa: B023
            except (SealError, OutOfTime, Overloaded):
                continue
            if self._seal is None and self._config is settings:
                self._desk, self._seal = self._make_desk(settings, seal, watch), seal
                log.info("seal_found", scheme=seal.scheme)

    def _close(self) -> None:
        for path in (self._config.agent.pam_socket, self._config.agent.user_socket):
            with contextlib.suppress(OSError):
                os.unlink(path)
        if self._watch is not None:
            self._watch.close()
        if self._seal is not None:
            self._seal.close()
        for workers in self._all_workers():
            workers.close()

    def _all_workers(self) -> Tuple[Workers, ...]:
        return self._job_workers, self._seal_workers, self._slow_workers, self._own_workers


def _make_fallback(settings: Config, workers: Workers) -> Optional[SlurmdCallerid]:
    if settings.callerid.fallback != "slurm":
        return None
    conf = slurm_conf(settings)
    return SlurmdCallerid(settings.callerid.slurm_scontrol, lambda: conf.settings().conf_file, workers)


def _make_backend(settings: Config) -> JobBackend:
    section = settings.jobs
    conf = slurm_conf(settings)
    if section.backend == "slurm" or (section.backend == "auto" and conf.is_there()):
        return SlurmJobs(conf)
    return CgroupJobs(JobPath.parse_template(section.path), section.leaf)


def _open_seal(settings: Config) -> Optional[Seal]:
    """The seal, or None if there is none to be had and none was named: the node then asks nobody."""
    try:
        return configured_seal(settings)
    except SealError as error:
        if settings.seal.scheme != "auto":
            raise ConfigError(f"[seal] scheme {settings.seal.scheme!r}: {error}") from None
        log.error("seal_unavailable", error=str(error), effect="other nodes are not asked and not answered")
        return None


def _make_directory(directory: Path) -> None:
    """Make the directory of a socket, open to all: the umask of whoever starts the agent is about other things."""
    umask = os.umask(0o022)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    finally:
        os.umask(umask)


async def _kept_up(what: str, work: Callable[[], Awaitable[None]]) -> None:
    """``work``, which ends with the agent only: a defect in it is seen at once, not when the agent stops."""
    try:
        await work()
    except Exception as error:
        log.error("background_task_failed", task=what, error=f"{type(error).__name__}: {error}")


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


def _allow_descriptors() -> None:
    """Let every door be full at once. 1024 descriptors, the usual soft limit, are fewer than any user can make the
    peers' door hold; sshd would then wait at the PAM socket in vain."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard if hard != resource.RLIM_INFINITY and hard < _DESCRIPTORS else _DESCRIPTORS
    resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
    if enough < _DESCRIPTORS:
        log.warning("few_descriptors", limit=enough, expected=_DESCRIPTORS, effect="a flood may keep logins waiting")


async def _feed_watchdog() -> None:
    interval_s = watchdog_interval_s()
    while interval_s > 0:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)
