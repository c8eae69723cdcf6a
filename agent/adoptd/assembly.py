"""The agent's parts as the configuration wants them: which job manager, which seal, what is kept of sessions.

Owns the choices that a key of the configuration stands for, and what is said where something cannot be had. Makes parts
and starts none. Called by the service, at the start and at each reload.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Optional

from adoptd import log
from adoptd.config import Config
from adoptd.jobs import JobBackend
from adoptd.jobs.cgroup import CgroupJobs
from adoptd.jobs.slurm import SlurmJobs
from adoptd.jobs.template import JobPath
from adoptd.messages import Notice, Texts
from adoptd.metrics import Metrics
from adoptd.model import ConfigError, JobFault, ProbeError
from adoptd.probe import MissingProbe, load
from adoptd.probe.connects import OpenConnects, open_connects
from adoptd.probe.watching import OpenWatch, open_watch
from adoptd.seal import Seal, SealError
from adoptd.seal.replay import capacity_for
from adoptd.sessions import PendingLogins, Sessions
from adoptd.sessions.store import SessionStore, StoreError
from adoptd.slurm_callerid import SlurmdCallerid
from adoptd.slurm_site import configured_seal, slurm_conf
from adoptd.workers import Workers


def texts(settings: Config, jobs: JobBackend) -> Texts:
    """What users are told, and when."""
    section = settings.session
    return Texts(settings.agent.shown_name(), jobs.name, section.contact, Notice(section.notice))


def make_fallback(settings: Config, workers: Workers) -> Optional[SlurmdCallerid]:
    """Who is asked where a node has no agent; None: nobody."""
    if settings.callerid.fallback != "slurm":
        return None
    conf = slurm_conf(settings)
    return SlurmdCallerid(settings.callerid.slurm_scontrol, lambda: conf.settings().conf_file, workers)


def make_backend(settings: Config, metrics: Metrics) -> JobBackend:
    """The job manager of this node."""

    def noted(fault: JobFault) -> None:
        metrics.count_job_fault("worked_around", fault)

    section = settings.jobs
    conf = slurm_conf(settings, noted)
    if section.backend == "slurm" or (section.backend == "auto" and conf.is_there()):
        return SlurmJobs(conf, noted=noted)
    return CgroupJobs(JobPath.parse_template(section.path), section.leaf)


def kept_sessions(directory: Path) -> Sessions:
    """The sessions that live, as the agent before us kept them. Without a directory to keep them in it goes on."""
    try:
        sessions = Sessions(time.time, SessionStore(directory))
        found = sessions.restore()
    except StoreError as error:
        log.error("sessions_not_kept", error=str(error), effect="sessions are not known after a restart")
        return Sessions(time.time)
    if found:
        log.info("sessions_found", sessions=found)
    return sessions


def kept_logins(directory: Path) -> PendingLogins:
    """The logins between their phases, as the agent before us kept them."""
    try:
        logins = PendingLogins(time.monotonic, store=SessionStore(directory))
        found = logins.restore()
    except StoreError as error:
        log.error("logins_not_kept", error=str(error), effect="logins in progress are not known after a restart")
        return PendingLogins(time.monotonic)
    if found:
        log.info("logins_found", logins=found)
    return logins


def open_told_connects(settings: Config) -> OpenConnects:
    """What the pinned probe tells of connections; it is not loaded for that. Raises ProbeError."""
    section = settings.probe
    if not section.enabled:
        raise ProbeError("the probe is switched off in the configuration")
    return open_connects(Path(section.pin_dir), Path(section.source_dir) if section.source_dir else None)


def open_session_watch(settings: Config) -> OpenWatch:
    """The pinned watch over sessions' processes. Raises ProbeError."""
    section = settings.probe
    if not section.enabled:
        raise ProbeError("the probe is switched off in the configuration")
    pin_dir, source_dir = Path(section.pin_dir), Path(section.source_dir) if section.source_dir else None
    try:
        return open_watch(pin_dir, source_dir)
    except MissingProbe:
        # Loaded by the other watch, or not taken by this kernel.
        raise
    except ProbeError:
        load(pin_dir, source_dir)
        return open_watch(pin_dir, source_dir)


def replays_for(settings: Config) -> int:
    """How many questions have to be remembered, so that none is answered twice."""
    # A question may be asked for twice the seal's life: clocks may differ by as much as it.
    return capacity_for(2 * settings.seal.ttl_s)


def open_seal(settings: Config) -> Optional[Seal]:
    """The seal, or None if there is none to be had and none was named: the node then asks nobody."""
    try:
        return configured_seal(settings)
    except SealError as error:
        if settings.seal.scheme != "auto":
            raise ConfigError(f"[seal] scheme {settings.seal.scheme!r}: {error}") from None
        log.error("seal_unavailable", error=str(error), effect="other nodes are not asked and not answered")
        return None
