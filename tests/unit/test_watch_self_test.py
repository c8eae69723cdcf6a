"""The probe's self-test over time: what a failing one costs, and what the metrics say of it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Iterator, List, Optional

import pytest
from fakes import sample, until
from logs import LogLines, log_lines

from adoptd import watch as watch_module
from adoptd.config import ProbeConfig
from adoptd.deadline import Deadline
from adoptd.metrics import Metrics
from adoptd.model import Connection, Endpoint, ProbeError, Witness, WitnessUnavailable
from adoptd.watch import Watch
from adoptd.workers import Workers

__all__ = ["log_lines"]


class FakeProbe:
    """Stands in for OpenProbe: notes whether it was closed."""

    schema = "0" * 32

    def __init__(self) -> None:
        self.open = True

    def close(self) -> None:
        self.open = False

    def counters(self) -> dict[str, int]:
        return {}


class Host:
    """A host whose probe opens, and whose self-test fails while ``fault`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fault: Optional[str] = None
        self.opened: List[FakeProbe] = []
        monkeypatch.setattr(watch_module, "open_probe", self.open_probe)
        monkeypatch.setattr(watch_module.probe, "load", lambda pin_dir, source_dir: "already loaded")
        monkeypatch.setattr(watch_module.probe, "self_test", self.self_test)
        self.metrics = Metrics()
        self.workers = Workers("w", 1, 2)
        self.watch = Watch(ProbeConfig(self_test_interval_s=1), self.metrics, self.workers)

    def open_probe(self, pin_dir: Path, source_dir: Optional[Path]) -> FakeProbe:
        self.opened.append(FakeProbe())
        return self.opened[-1]

    def self_test(self, opened: FakeProbe) -> None:
        assert opened.open
        if self.fault is not None:
            raise ProbeError(self.fault)

    @property
    def tested_at(self) -> float:
        return sample(self.metrics, "adoptd_probe_self_test_timestamp_seconds")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    made = Host(monkeypatch)
    yield made
    made.watch.close()
    made.workers.close()
    assert not any(opened.open for opened in made.opened)


def test_a_probe_that_keeps_failing_its_self_test_costs_no_descriptors(host: Host) -> None:
    """It is opened again at every interval for as long as the agent runs: all but the last are closed."""
    host.fault = "nothing is attached"
    for _ in range(3):
        asyncio.run(host.watch._attach())
    assert sum(opened.open for opened in host.opened) == 1
    assert host.watch.status.self_test == "nothing is attached"


def test_only_a_self_test_moves_the_time_of_the_self_test(host: Host) -> None:
    """An alert on a self-test that is no longer made must not be put off by the other witnesses' tests."""
    asyncio.run(host.watch.start())
    host.metrics.self_test_time.set(1.0)
    host.watch._show_others(host.watch._test_others())
    assert host.tested_at == 1.0
    host.fault = "gone"
    asyncio.run(host.watch._attach())
    assert host.tested_at > 1.0
    assert sample(host.metrics, "adoptd_probe_self_test_success") == 0.0


def test_what_keeps_the_probe_away_is_said_once_each(
    host: Host, monkeypatch: pytest.MonkeyPatch, log_lines: LogLines
) -> None:
    """The self-test fails and the load after it, at every interval: two lines, until it has worked again."""
    asyncio.run(host.watch.start())

    def load(pin_dir: Path, source_dir: Optional[Path]) -> str:
        raise ProbeError("no bpffs")

    with monkeypatch.context() as broken:
        broken.setattr(watch_module.probe, "load", load)
        for _ in range(2):
            host.fault = "nothing is attached"
            for _ in range(3):
                asyncio.run(host.watch._check())
            assert host.watch.status.probe_reason == "no bpffs"
            assert host.watch.status.self_test == "nothing is attached"
            host.fault = None
            asyncio.run(host.watch._check())
            assert host.watch.status.probe_attached
    said = [line for line in log_lines() if "probe_unavailable" in line]
    assert [("self-test failed" in line, "no bpffs" in line) for line in said] == [(True, False), (False, True)] * 2


def test_the_other_witnesses_are_tested_beside_the_event_loop(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may load a module for conntrack's first answer: logins do not wait for that."""
    threads: List[int] = []

    def self_test() -> Optional[str]:
        threads.append(threading.get_ident())
        return "the module is missing"

    async def story() -> None:
        monkeypatch.setattr(host.watch._conntrack, "self_test", self_test)
        watching = asyncio.create_task(host.watch.run())
        await until(lambda: host.watch.status.witnesses[Witness.CONNTRACK] == "the module is missing")
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(story())
    assert threads
    assert threading.get_ident() not in threads


def test_a_probe_that_is_lost_while_it_is_asked_is_no_defect() -> None:
    """The event loop may do without it between any two steps of a thread that asks."""
    answers: Iterator[Optional[FakeBpf]] = iter(())

    class Lost(watch_module._ProbeWitness):
        @property
        def _inner(self) -> object:  # type: ignore[override]
            return next(answers)

        @_inner.setter
        def _inner(self, witness: object) -> None:
            pass

    ends = Connection(Endpoint.parse("10.0.0.1:1"), Endpoint.parse("10.0.0.2:22"))
    for ask in (lambda lost: lost.owner_of(ends, Deadline.after_ms(1000.0)), lambda lost: lost.look_in(ends, 1)):
        asked = FakeBpf()
        answers = iter([asked, None])
        ask(Lost())
        assert asked.asked == 1
        with pytest.raises(WitnessUnavailable, match="not tried yet"):
            ask(Lost())


class FakeBpf:
    """Stands in for BpfWitness: counts its questions."""

    def __init__(self) -> None:
        self.asked = 0

    def owner_of(self, connection: Connection, deadline: Deadline) -> None:
        self.asked += 1

    def look_in(self, connection: Connection, netns: int) -> None:
        self.asked += 1
