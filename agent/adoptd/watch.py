"""Which witnesses this host has, and whether the probe still tells the truth.

Owns opening the probe (loading it where it is not), the self-test at start and then each interval, and
what ``status`` and the metrics say of it. A probe that fails its self-test is no witness until it passes
again. Called by the service and by ``adoptctl status``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Mapping, Optional, Set

from adoptd import log, probe
from adoptd.config import ProbeConfig
from adoptd.connections import Witnesses
from adoptd.connections.bpf import BpfWitness
from adoptd.connections.conntrack import ConntrackWitness
from adoptd.connections.diag import DiagWitness
from adoptd.connections.proc import ProcWitness
from adoptd.deadline import Deadline
from adoptd.metrics import Metrics
from adoptd.model import Connection, Owner, ProbeError, Witness, WitnessUnavailable
from adoptd.probe.pins import OpenProbe, open_probe, open_schema
from adoptd.probe.record import Answer
from adoptd.probe.sources import find_sources, schema_of
from adoptd.workers import OutOfTime, Overloaded, Workers

# The loader's own limit of 60 s is what counts; this one only keeps a stuck loader from holding the watch for ever.
LOAD_MS = 90_000.0
SELF_TEST_MS = 5_000.0

# Reasons for being without the probe that are said before it works again; more are variations of one.
_REASONS_SAID = 8


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
        return self._present().owner_of(connection, deadline)

    def look_in(self, connection: Connection, netns: int) -> Optional[Answer]:
        return self._present().look_in(connection, netns)

    def _present(self) -> BpfWitness:
        # Read once: threads ask while the event loop may do without it.
        inner = self._inner
        if inner is None:
            raise WitnessUnavailable(self._reason)
        return inner


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
        self._pins_fault: Optional[str] = None
        # Why the probe could not be used, as it was said in the log since it last could.
        self._said: Set[str] = set()
        self._conntrack = ConntrackWitness(self._bpf, (self._bpf, self._diag))
        self.witnesses = Witnesses([self._bpf, self._diag, self._conntrack, ProcWitness()])
        self._status = WatchStatus(
            {Witness.BPF: "not tried yet", Witness.DIAG: None, Witness.CONNTRACK: None, Witness.PROC: None}
        )
        metrics.watch_probe(self.probe_counters)
        self._show_others(self._test_others())

    @property
    def status(self) -> WatchStatus:
        """What is known now."""
        return self._status

    @property
    def schema(self) -> Optional[str]:
        """Of the probe in use; None without one."""
        return None if self._probe is None else self._probe.schema

    def probe_counters(self) -> Mapping[str, int]:
        """Events counted inside BPF since the probe was loaded, by kind; empty without a probe. From any thread."""
        opened = self._probe
        try:
            return {} if opened is None else opened.counters()
        except ProbeError:
            return {}

    async def open(self) -> None:
        """Use the probe that an agent before this one left, in milliseconds. What is wrong with it is start()'s."""
        if not self._config.enabled:
            self._lose("switched off in the configuration")
            return
        with contextlib.suppress(ProbeError, OutOfTime, Overloaded):
            await self._take(await self._workers.run(self._open_pinned, Deadline.after_ms(SELF_TEST_MS)))

    async def start(self) -> None:
        """Load the probe unless it is there. Without it the agent goes on: says so, and never raises."""
        if self._config.enabled and not self._status.probe_attached:
            await self._attach()

    async def run(self) -> None:
        """Test the witnesses each interval, for ever, and load the probe again if it or its pins have gone."""
        while True:
            await asyncio.sleep(self._config.self_test_interval_s)
            # In a thread: the kernel may load a module for it, which nothing here can bound.
            with contextlib.suppress(OutOfTime, Overloaded):
                self._show_others(await self._workers.run(self._test_others, Deadline.after_ms(SELF_TEST_MS)))
            if self._config.enabled:
                await self._check()

    def close(self) -> None:
        """Let go of the probe's pins, which stay, and of the witnesses."""
        if self._probe is not None:
            self._probe.close()
            self._probe = None
        self.witnesses.close()
        self._diag.close()

    def _test_others(self) -> Mapping[Witness, Optional[str]]:
        return {Witness.DIAG: self._diag.self_test(), Witness.CONNTRACK: self._conntrack.self_test()}

    def _show_others(self, tested: Mapping[Witness, Optional[str]]) -> None:
        self._status = replace(self._status, witnesses={**self._status.witnesses, **tested})
        self._publish()

    async def _check(self) -> None:
        """What run() does each interval."""
        opened = self._probe
        if opened is None or not await self._self_test(opened):
            await self._attach()
            return
        try:
            again = await self._workers.run(lambda: self._pins_again(opened), Deadline.after_ms(LOAD_MS))
        except ProbeError as error:
            self._doubt(str(error))
        except (OutOfTime, Overloaded):
            log.debug("probe_pins_unseen", error="no time to look at them")
        else:
            self._doubt(None)
            if again is not None:
                await self._take(again)

    def _pins_again(self, opened: OpenProbe) -> Optional[OpenProbe]:
        """A probe in place of ``opened``, which works but whose pins have gone; None if they are as they should be.

        Its labels live with the pins: without them the next agent would have to begin anew. Raises ProbeError.
        """
        try:
            open_schema(self._pin_dir, opened.schema).close()
            return None
        except ProbeError:
            # In an upgrade the sources are the next agent's already: it loads them itself, and until then we go on.
            if schema_of(find_sources(self._source_dir)) != opened.schema:
                raise
        return self._open_or_load()

    async def _attach(self) -> None:
        try:
            opened = await self._workers.run(self._open_or_load, Deadline.after_ms(LOAD_MS))
        except (ProbeError, OutOfTime, Overloaded) as error:
            self._lose(str(error))
            return
        await self._take(opened)

    async def _take(self, opened: OpenProbe) -> None:
        if self._probe is not None:
            self._probe.close()
        self._probe, self._pins_fault = opened, None
        if await self._self_test(opened):
            log.info("probe_attached", schema=opened.schema)

    def _open_pinned(self) -> OpenProbe:
        return _tested(open_probe(self._pin_dir, self._source_dir))

    def _open_or_load(self) -> OpenProbe:
        try:
            return self._open_pinned()
        except ProbeError:
            # Not there, of another release, or attached to nothing any more: the loader puts all of that right.
            said = probe.load(self._pin_dir, self._source_dir)
            # With what this kernel did not let it do, in the loader's words.
            log.info("probe_loaded", said=said)
            return open_probe(self._pin_dir, self._source_dir)

    async def _self_test(self, opened: OpenProbe) -> bool:
        try:
            await self._workers.run(lambda: probe.self_test(opened), Deadline.after_ms(SELF_TEST_MS))
        except (ProbeError, OutOfTime, Overloaded) as error:
            self._metrics.show_self_test(False)
            self._lose(f"self-test failed: {error}", self_test=str(error))
            return False
        self._metrics.show_self_test(True)
        self._said.clear()
        self._bpf.use(BpfWitness(opened))
        self._status = replace(
            self._status,
            witnesses={**self._status.witnesses, Witness.BPF: None},
            probe_attached=True,
            probe_reason="attached" if self._pins_fault is None else self._status.probe_reason,
            self_test="ok",
            self_test_at=time.monotonic(),
        )
        self._publish()
        return True

    def _doubt(self, fault: Optional[str]) -> None:
        """The open probe works. ``fault``: why an agent that is started now would not find it, None if it would."""
        if fault is not None and fault != self._pins_fault:
            log.error("probe_pins_unsound", error=fault, effect="a restart of the agent would have to load it anew")
        self._pins_fault = fault
        reason = "attached" if fault is None else f"attached, but its pins are not sound: {fault}"
        self._status = replace(self._status, probe_reason=reason)

    def _lose(self, reason: str, self_test: Optional[str] = None) -> None:
        # A failed self-test and a load that fails after it take turns each interval; each is said once.
        if reason not in self._said and len(self._said) < _REASONS_SAID:
            self._said.add(reason)
            log.error("probe_unavailable", error=reason, effect="connections are looked up by the other witnesses")
        self._bpf.do_without(reason)
        self._status = replace(
            self._status,
            witnesses={**self._status.witnesses, Witness.BPF: reason},
            probe_attached=False,
            probe_reason=reason,
            # What cannot be loaded leaves standing how the last self-test went.
            self_test=self._status.self_test if self_test is None else self_test,
            self_test_at=self._status.self_test_at if self_test is None else time.monotonic(),
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
