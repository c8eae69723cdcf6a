"""What Prometheus is told of the agent itself: what waits in it, and what it runs on and with.

Owns the reading of these facts, at each scrape, from the parts that have them; and the keeping of the metrics file.
Must never block a scrape on anything but memory and /proc. Called by the service.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
from typing import Callable, Iterable, Mapping, Optional

from adoptd import log
from adoptd.config import MetricsConfig
from adoptd.deadline import Deadline
from adoptd.exposition import TEXTFILE_INTERVAL_S, Tls, write_textfile
from adoptd.hierarchy import HierarchyKind, read_hierarchies
from adoptd.jobs import JobBackend
from adoptd.metrics import Door, Metrics, Pool, Refusal
from adoptd.model import JobManagerError, Witness
from adoptd.policy import Situation, Step
from adoptd.sessions.escapes import EscapeOutcome, Mover
from adoptd.watch import Watch
from adoptd.wire.callerid import Outcome, Reason
from adoptd.wire.pam import Mode, Phase
from adoptd.workers import OutOfTime, Overloaded, Workers

# Rendering and writing 100 KiB takes milliseconds; a file system that hangs must not pile up writers.
_WRITE_MS = 10_000.0


# What logins come to, as a rule and where an alert asks: outcome, reason and witness. After agents were restarted
# everywhere the first login at each node is of one of these, and would else not be seen in any rate.
_COMMON = (
    ("adopted", Step.ADOPT_ONLY, None),
    ("adopted", Step.ADOPT_NAMED, Witness.BPF),
    ("adopted", Step.ADOPT_NEWEST, None),
    ("denied", Situation.NO_JOBS, None),
    ("ignored", Situation.GENERIC_FAILURE, None),
    ("allowed", Situation.GENERIC_FAILURE, None),
    ("allowed", Situation.ADOPT_FAILURE, None),
    ("allowed", Situation.UNKNOWN, None),
    ("allowed", Situation.NAMED_FAILED, None),
)
# Of what pam_adopt.so was owed an answer to.
_OWED = (Refusal.MALFORMED, Refusal.INTERNAL, Refusal.UNAVAILABLE)


def begin_at_zero(metrics: Metrics) -> None:
    """Make the series that an alert waits for a first event of: Prometheus sees no increase in one that begins at 1.

    Those of observe mode are made where they are counted.
    """
    for outcome, reason, witness in _COMMON:
        metrics.begin_adoption(Phase.ACCOUNT.name.lower(), Mode.ENFORCE.name.lower(), outcome, reason.value, witness)
    for refusal in _OWED:
        metrics.refused.labels(Door.PAM.value, refusal.value)
    for mover, escape in itertools.product(Mover, EscapeOutcome):
        metrics.count_escape(mover.value, escape.value, 0)
    for doubt in (Reason.DISAGREEMENT, Reason.AMBIGUOUS):
        metrics.answered.labels(Outcome.UNKNOWN.value, doubt.value, "none")


def tls_of(settings: MetricsConfig) -> Optional[Tls]:
    """What [metrics] says of TLS; None: plain HTTP."""
    if not settings.tls_certificate:
        return None
    return Tls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca or None)


def watch_pools(metrics: Metrics, pools: Iterable[Workers]) -> None:
    """Export how many calls each pool has under way or waiting. Raises ValueError for one that Pool lacks."""
    for workers in pools:
        metrics.watch_queue(Pool(workers.name), _pending(workers))


def watch_host(metrics: Metrics, watch: Watch, jobs: Callable[[], Optional[JobBackend]]) -> None:
    """Export what the agent runs with. ``jobs``: the backend in force, None before there is one."""

    def facts() -> Mapping[str, str]:
        backend = jobs()
        return {
            "bcc": _bcc_version(),
            "schema": watch.schema or "none",
            "job_manager": "none" if backend is None else backend.name,
            "cgroups": _cgroups(),
        }

    metrics.watch_host(facts)


async def keep_textfile(metrics: Metrics, path: str, workers: Workers) -> None:
    """Write the metrics to ``path`` again and again. What keeps it from being written is said once."""
    said = ""
    while True:
        try:
            await workers.run(lambda: write_textfile(metrics.registry, path), Deadline.after_ms(_WRITE_MS))
            said = ""
        except (OSError, OutOfTime, Overloaded) as error:
            if str(error) != said:
                log.error("textfile_not_written", path=path, error=str(error), effect="tried again")
            said = str(error)
        await asyncio.sleep(TEXTFILE_INTERVAL_S)


def _pending(workers: Workers) -> Callable[[], int]:
    return lambda: workers.pending


def _bcc_version() -> str:
    # The distribution's; importing it would cost the agent 70 MB.
    try:
        return importlib.metadata.version("bcc")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _cgroups() -> str:
    try:
        kinds = {hierarchy.kind for hierarchy in read_hierarchies() if hierarchy.controllers != ("name=systemd",)}
    except (JobManagerError, OSError):
        return "unknown"
    if kinds == {HierarchyKind.V1, HierarchyKind.V2}:
        return "hybrid"
    return next(iter(kinds)).value if kinds else "none"
