"""Which witnesses this host has, and whether the probe still tells the truth.

Owns opening the probe (loading it where it is not), the self-test at start and then each interval, and
what ``status`` and the metrics say of it. A probe that fails its self-test is no witness until it passes
again. Called by the service and by ``adoptctl status``.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Mapping, Optional

from adoptd import log, probe
from adoptd.config import ProbeConfig
from adoptd.connections import Witnesses
from adoptd.connections.bpf import BpfWitness
from adoptd.connections.diag import DiagWitness
from adoptd.connections.proc import ProcWitness
from adoptd.deadline import Deadline
from adoptd.metrics import Metrics
from adoptd.model import Connection, Owner, ProbeError, Witness, WitnessUnavailable
from adoptd.probe.pins import OpenProbe, open_probe
from adoptd.workers import OutOfTime, Overloaded, Workers

# The loader's own limit of 60 s is what counts; this one only keeps a stuck loader from holding the watch for ever.
LOAD_MS = 90_000.0
SELF_TEST_MS = 5_000.0


@dataclass(frozen=True)
class WatchStatus:
    """``witnesses``: None where the witness can be asked, else why not. ``self_test_at`` is monotonic seconds."""

    witnesses: Mapping[Witness, Optional[str]]
    probe_attached: bool = False
    probe_reason: str = "not tried yet"
    self_test: Optional[str] = None
    self_test_at: Optional[float] = None


class _ProbeWitness:
    """The bpf witness while the probe works, and a reason while it does not."""

    name = Witness.BPF
    may_block = False

    def __init__(self) -> None:
        self._inner: Optional[BpfWitness] = None
        self._reason = "not tried yet"

    def use(self, witness: BpfWitness) -> None:
        self._inner = witness

    def do_without(self, reason: str) -> None:
        self._inner, self._reason = None, reason

    def owner_of(self, connection: Connection, deadline: Deadline) -> Optional[Owner]:
        if self._inner is None:
            raise WitnessUnavailable(self._reason)
        return self._inner.owner_of(connection, deadline)


class Watch:
    """The witnesses of this host, and the state of the probe."""

    def __init__(self, config: ProbeConfig, metrics: Metrics, workers: Workers) -> None:
        self._config = config
        self._metrics = metrics
        self._workers = workers
        self._pin_dir = Path(config.pin_dir)
        self._source_dir = Path(config.source_dir) if config.source_dir else None
        self._bpf = _ProbeWitness()
        self._diag = DiagWitness()
        self._probe: Optional[OpenProbe] = None
        self.witnesses = Witnesses([self._bpf, self._diag, ProcWitness()])
        self._status = WatchStatus({Witness.BPF: "not tried yet", Witness.PROC: None})
        metrics.watch_probe(self.probe_counters)
        self._test_diag()

    @property
    def status(self) -> WatchStatus:
        """What is known now."""
        return self._status

    def probe_counters(self) -> Mapping[str, int]:
        """Events counted inside BPF since the probe was loaded, by kind; empty without a probe."""
        try:
            return {} if self._probe is None else self._probe.counters()
        except ProbeError:
            return {}

    async def start(self) -> None:
        """Open the probe and test it once. Without it the agent goes on: says so, and never raises."""
        if not self._config.enabled:
            self._lose("switched off in the configuration")
            return
        await self._attach()

    async def run(self) -> None:
        """Test the witnesses each interval, for ever, and load the probe again if it has gone."""
        while True:
            await asyncio.sleep(self._config.self_test_interval_s)
            self._test_diag()
            if self._config.enabled and (self._probe is None or not await self._self_test(self._probe)):
                await self._attach()

    def close(self) -> None:
        """Let go of the probe's pins, which stay, and of the witnesses."""
        if self._probe is not None:
            self._probe.close()
            self._probe = None
        self.witnesses.close()
        self._diag.close()

    def _test_diag(self) -> None:
        self._status = replace(self._status, witnesses={**self._status.witnesses, Witness.DIAG: self._diag.self_test()})
        self._publish()

    async def _attach(self) -> None:
        try:
            opened = await self._workers.run(self._open_or_load, Deadline.after_ms(LOAD_MS))
        except (ProbeError, OutOfTime, Overloaded) as error:
            self._lose(str(error))
            return
        if self._probe is not None:
            self._probe.close()
        self._probe = opened
        if await self._self_test(opened):
            log.info("probe_attached", schema=opened.schema)

    def _open_or_load(self) -> OpenProbe:
        try:
            return _tested(open_probe(self._pin_dir, self._source_dir))
        except ProbeError:
            # Not there, of another release, or attached to nothing any more: the loader puts all of that right.
            probe.load(self._pin_dir, self._source_dir)
            return open_probe(self._pin_dir, self._source_dir)

    async def _self_test(self, opened: OpenProbe) -> bool:
        try:
            await self._workers.run(lambda: probe.self_test(opened), Deadline.after_ms(SELF_TEST_MS))
        except (ProbeError, OutOfTime, Overloaded) as error:
            self._metrics.show_self_test(False)
            self._lose(f"self-test failed: {error}", self_test=str(error))
            return False
        self._metrics.show_self_test(True)
        self._bpf.use(BpfWitness(opened))
        self._status = replace(
            self._status,
            witnesses={**self._status.witnesses, Witness.BPF: None},
            probe_attached=True,
            probe_reason="attached",
            self_test="ok",
            self_test_at=time.monotonic(),
        )
        self._publish()
        return True

    def _lose(self, reason: str, self_test: Optional[str] = None) -> None:
        if reason != self._status.probe_reason:
            log.error("probe_unavailable", reason=reason, effect="connections are looked up by the other witnesses")
        self._bpf.do_without(reason)
        self._status = replace(
            self._status,
            witnesses={**self._status.witnesses, Witness.BPF: reason},
            probe_attached=False,
            probe_reason=reason,
            self_test=self_test,
            self_test_at=None if self_test is None else time.monotonic(),
        )
        self._publish()

    def _publish(self) -> None:
        status = self._status
        self._metrics.show_witnesses({name: reason is None for name, reason in status.witnesses.items()})
        self._metrics.probe_attached.set(int(status.probe_attached))


def _tested(found: OpenProbe) -> OpenProbe:
    """``found``, which passed a self-test. Raises ProbeError; then it is closed."""
    try:
        probe.self_test(found)
    except BaseException:
        # This is tried again each interval, for as long as the agent runs.
        found.close()
        raise
    return found
