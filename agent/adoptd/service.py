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
from typing import Awaitable, Callable, List, Optional, Tuple

from adoptd import __version__, config, log
from adoptd.activation import take_passed
from adoptd.adoption import Adoptions
from adoptd.assembly import (
    kept_logins,
    kept_sessions,
    make_backend,
    make_fallback,
    open_seal,
    open_session_watch,
    open_told_connects,
    replays_for,
    texts,
)
from adoptd.callerid import OPENED_AT_ONCE, Asker, Inquiry, Responder, SealRoom
from adoptd.config import Config
from adoptd.control import Control, Parts, Rates
from adoptd.daemon import allow_descriptors, come_before_sessions, kept_up, unless
from adoptd.deadline import Deadline
from adoptd.doors import Doors, make_directory
from adoptd.events import Events
from adoptd.handlers import Desk, Handlers
from adoptd.instance import Instance
from adoptd.jobs import JobBackend
from adoptd.jobs.environment import JobEnvironment
from adoptd.metrics import Metrics, Pool
from adoptd.model import AdoptdError, JobManagerError
from adoptd.monitoring import begin_at_zero, keep_textfile, watch_host, watch_pools
from adoptd.notes import Notes, NoteTaker
from adoptd.notify import feed_watchdog, notify
from adoptd.observed import Observations
from adoptd.seal import Seal, SealError
from adoptd.seal.replay import ReplayCache
from adoptd.server import PAM_MAX, PEER_MAX, USER_MAX
from adoptd.sessions import PendingLogins, Sessions
from adoptd.sessions.escapes import OnEscape
from adoptd.sessions.guard import Guard
from adoptd.sessions.registry import CAPACITY as SESSIONS_MAX
from adoptd.slurm_site import configured_seal
from adoptd.watch import Watch
from adoptd.workers import OutOfTime, Overloaded, Workers

# A login's whole budget, and some: what is in flight at SIGTERM ends by itself within it.
_FINISH_S = 2.0

# How often to look again for something to seal with where there was nothing: munged may start after us.
_SEAL_RETRY_S = 10.0
# libmunge takes 10 s to find out that munged is stopped (MungeSeal).
_SEAL_MS = 15_000.0
# How long whoever is at the doors waits for it at the start. A munged that is well answers in milliseconds.
_SEAL_PATIENCE_S = 0.5

# Twice what a first look at a full node's steps takes.
_FIRST_JOBS_MS = 2_000.0

# The doors' bounds together, with as much again for what a request in progress opens, and a pidfd for each session.
_DESCRIPTORS = 2 * (PAM_MAX + PEER_MAX + USER_MAX) + SESSIONS_MAX


class Service:
    """One running agent."""

    def __init__(self, file: Path) -> None:
        """Read the configuration and make the parts. Raises ConfigError; nothing is open then."""
        self._file = file
        self._config = config.load(file)
        self._metrics = Metrics()
        # Most of an adoption is the kernel's wait for a grace period in the write to cgroup.procs (6 to 18 ms seen
        # on 6.18, cgroup_threadgroup_rwsem), so more threads than cores are worth having.
        self._job_workers = Workers(Pool.JOBS.value, threads=16, backlog=PAM_MAX + PEER_MAX)
        # Each holds a question to another node, sealing and waiting included: as many as there are logins at once.
        self._seal_workers = Workers(Pool.ASKS.value, threads=16, backlog=PAM_MAX)
        # As many as are let open seals at once.
        self._answer_workers = Workers(Pool.ANSWERS.value, threads=OPENED_AT_ONCE, backlog=PEER_MAX)
        self._slow_workers = Workers(Pool.SLOW.value, threads=2, backlog=USER_MAX)
        # For the agent's own needs, apart: users' commands, which may wait for a name service, must not hold up the
        # self-test and so take the probe away.
        self._own_workers = Workers(Pool.OWN.value, threads=2, backlog=4)
        # One call at a time, as the guard expects.
        self._guard_workers = Workers(Pool.GUARD.value, threads=1, backlog=1)
        self._note_workers = Workers(Pool.NOTES.value, threads=1, backlog=1)
        self._notes = Notes()
        self._pending = PendingLogins(time.monotonic)
        self._sessions = Sessions(time.time)
        self._events = Events()
        self._joins = Rates(time.monotonic)
        self._observations = Observations(self._metrics)
        self._replays = ReplayCache(replays_for(self._config), time.time)
        self._watch: Optional[Watch] = None
        self._seal: Optional[Seal] = None
        self._desk: Optional[Desk] = None
        self._jobs: Optional[JobBackend] = None
        self._instance: Optional[Instance] = None
        self._doors: Optional[Doors] = None

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises AdoptdError or OSError if the start fails."""
        # uvloop is faster where it is installed; nothing depends on it.
        with contextlib.suppress(ImportError):
            import uvloop

            asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        asyncio.run(self._main())
        asked = 0 if self._watch is None else self._watch.witnesses.pending
        if asked or any(workers.pending for workers in self._all_workers()):
            # Python waits at its exit for threads that are stuck, 10 s in a munged that hangs: so long the node would
            # be without an agent at a restart. All that was to be finished is, and the sockets are gone.
            log.warning("stopped_without_waiting", error="calls to others are still under way")
            os._exit(0)

    async def _main(self) -> None:
        log.configure(self._config.agent.log_level, log.is_journal())
        come_before_sessions()
        allow_descriptors(_DESCRIPTORS)
        loop = asyncio.get_running_loop()
        stop, reload = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, reload.set)
        background: List[asyncio.Task[None]] = []
        try:
            await unless(stop, self._start())
            watch, doors = self._watch, self._doors
            if not stop.is_set() and watch is not None and doors is not None:
                notify("READY=1", f"STATUS=serving on {self._config.agent.pam_socket}")
                log.info("ready", version=__version__, node=self._config.agent.shown_name())
                background = [
                    asyncio.create_task(kept_up(what, work))
                    for what, work in (
                        ("watch", watch.run),
                        ("watchdog", feed_watchdog),
                        ("reload", lambda: self._reload_when(reload, watch)),
                        ("seal", lambda: self._seek_seal(watch)),
                        ("ports", doors.seek_ports),
                        ("guard", self._make_guard().run),
                        ("notes", self._make_note_taker().run),
                        *self._textfile(),
                    )
                ]
                await stop.wait()
        finally:
            notify("STOPPING=1")
            log.info("stopping")
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            if self._doors is not None:
                # Who watches is told, and gone before the doors are waited for.
                self._events.close()
                await self._doors.close(_FINISH_S)
            self._close()

    async def _start(self) -> None:
        """Everything up to serving, and what logins need not wait for after it. May be cancelled at any await."""
        # Before anything that starts a child, or takes anything that an agent before us may have.
        passed = take_passed(os.environ)
        pam_socket = Path(self._config.agent.pam_socket)
        make_directory(pam_socket.parent)
        self._instance = Instance(pam_socket)
        self._sessions = kept_sessions(pam_socket.parent / "sessions")
        self._pending = kept_logins(pam_socket.parent / "logins")
        watch = self._watch = Watch(self._config.probe, self._metrics, self._own_workers)
        begin_at_zero(self._metrics)
        watch_pools(self._metrics, self._all_workers())
        watch_host(self._metrics, watch, lambda: self._jobs)
        doors = Doors(self._config, Handlers(self._current_desk, self._metrics, self._events), self._metrics, passed)
        self._doors = doors
        doors.bind()
        # In a thread: with a munged that hangs it takes seconds, and a SIGTERM is to be heard meanwhile.
        sealing = asyncio.ensure_future(
            self._own_workers.run(lambda: open_seal(self._config), Deadline.after_ms(_SEAL_MS))
        )
        try:
            # Who came while there was no agent waits in the doors' backlog: for what takes milliseconds, a munged that
            # answers and a probe that is there, but not for one that hangs or has to be compiled.
            await asyncio.wait((sealing,), timeout=_SEAL_PATIENCE_S)
            if not sealing.done():
                log.warning("seal_slow", effect="other nodes are not asked and not answered until it is there")
            self._seal = sealing.result() if sealing.done() else None
            self._desk = self._make_desk(self._config, self._seal, watch)
            await watch.open()
            doors.open()
            await watch.start()
            seal = await self._seal_at_last(sealing)
            if seal is not self._seal:
                self._desk, self._seal = self._make_desk(self._config, seal, watch), seal
        finally:
            sealing.cancel()
        await self._ask_for_jobs()

    async def _seal_at_last(self, sealing: Awaitable[Optional[Seal]]) -> Optional[Seal]:
        """None if it does not come: logins are served by now, and it is looked for again as long as the agent runs."""
        try:
            return await sealing
        except OutOfTime as error:
            log.error("seal_unavailable", error=str(error), effect="other nodes are not asked and not answered")
            return None

    def _make_desk(self, settings: Config, seal: Optional[Seal], watch: Watch) -> Desk:
        jobs = make_backend(settings, self._metrics)
        inquiry = Inquiry(watch.witnesses, jobs, self._job_workers, settings.callerid.hint, self._notes)
        seals = None if seal is None else SealRoom(seal, self._seal_workers)
        asker, responder = None, None
        if seals is not None and settings.callerid.enabled:
            section = settings.callerid
            fallback = make_fallback(settings, self._job_workers)
            asker = Asker(seals, section.port, section.timeout_ms, self._metrics, fallback, section.hint)
            self._metrics.unheard_peers.set_function(asker.peers.count_silent)
            self._replays.make_room(replays_for(settings))
            took = self._metrics.observe_answer_stage
            responder = Responder(inquiry, seals, self._replays, settings.seal.ttl_s, self._answer_workers, took)
        environment = JobEnvironment(settings.session.environment) if settings.session.environment else None
        adoptions = Adoptions(
            settings.agent.shown_name(),
            jobs,
            asker,
            self._pending,
            self._job_workers,
            self._metrics,
            environment=environment,
            sessions=self._sessions,
            texts=texts(settings, jobs),
            observations=self._observations,
        )
        parts = Parts(
            config=settings,
            jobs=jobs,
            seals=seals,
            inquiry=inquiry,
            asker=asker,
            adoptions=adoptions,
            pending=self._pending,
            watch=watch,
            workers=self._slow_workers,
            sessions=self._sessions,
            events=self._events,
            metrics=self._metrics,
            rates=self._joins,
        )
        # Last: what cannot be made whole changes nothing.
        self._jobs = jobs
        return Desk(adoptions, responder, Control(parts), settings.callerid.timeout_ms)

    def _textfile(self) -> List[Tuple[str, Callable[[], Awaitable[None]]]]:
        path = self._config.metrics.textfile
        return [("textfile", lambda: keep_textfile(self._metrics, path, self._own_workers))] if path else []

    def _make_guard(self) -> Guard:
        return Guard(
            self._sessions,
            lambda: self._jobs,
            lambda: OnEscape(self._config.session.on_escape),
            lambda: open_session_watch(self._config),
            self._guard_workers,
            self._metrics,
            self._events,
            lambda session: session.connection is not None and self._pending.awaits(session.uid, session.connection),
        )

    def _make_note_taker(self) -> NoteTaker:
        self._metrics.watch_notes(lambda: len(self._notes))
        return NoteTaker(
            self._notes,
            lambda: self._jobs,
            lambda: open_told_connects(self._config),
            self._config.probe.watched_ports,
            self._note_workers,
        )

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
            seal = await self._own_workers.run(lambda: open_seal(fresh), Deadline.after_ms(_SEAL_MS))
            if seal is not None and self._seal is not None and seal.identity == self._seal.identity:
                # The one in force remembers what it has opened, so it need not refuse what was sealed before now.
                seal.close()
                seal = self._seal
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
            else:
                # A reload came first.
                seal.close()

    def _close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._seal is not None:
            self._seal.close()
        self._sessions.close()
        self._pending.close()
        for workers in self._all_workers():
            workers.close()
        if self._instance is not None:
            self._instance.release()

    def _all_workers(self) -> Tuple[Workers, ...]:
        return (
            self._job_workers,
            self._seal_workers,
            self._answer_workers,
            self._slow_workers,
            self._own_workers,
            self._guard_workers,
            self._note_workers,
        )
