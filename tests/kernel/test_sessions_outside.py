"""What is outside of its job now, and is not put back: counted as long as it is so, on this kernel's own cgroups."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import List, Optional

import pytest

from adoptd.sessions import guard
from adoptd.sessions.escapes import OnEscape, OutsideOf
from kernel.guarded import ALICE, Guarded, guarded
from lab.waiting import until_in_loop

HOME = f"uid_{ALICE}/job_17"


def outside(place: Guarded) -> List[Optional[float]]:
    """Of a job that runs, and of one that has ended."""
    read = place.metrics.registry.get_sample_value
    return [read("adoptd_sessions_outside", {"out_of": each.value}) for each in OutsideOf]


def count_sweeps(place: Guarded) -> List[None]:
    """Grows with each."""
    sweeps: List[None] = []
    suspect_all = place.guard._suspect_all

    def counted(now_s: float) -> None:
        sweeps.append(None)
        suspect_all(now_s)

    place.guard._suspect_all = counted  # type: ignore[method-assign]
    return sweeps


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SWEEP_S", "POLL_S", "ATTACH_S"):
        monkeypatch.setattr(guard, name, 0.2)


@pytest.mark.parametrize("probed", [True, False], ids=["told", "looked"])
def test_until_it_is_put_back(probed: bool, shared_pin_dir: Path) -> None:
    """Only reported: by whoever puts it into the job, not by time."""

    async def story() -> None:
        async with guarded(shared_pin_dir if probed else None) as place:
            place.on_escape = OnEscape.REPORT
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            place.tree.put(session.pid, ".")
            await until_in_loop(lambda: outside(place) == [1, 0], "it is seen outside")
            (strays,) = place.sessions.strays.values()
            assert list(strays.found) == [session.pid]
            place.tree.put(session.pid, HOME)
            await until_in_loop(lambda: outside(place) == [0, 0], "it is seen inside")
            assert place.counted("root", "reported") + place.counted("unknown", "reported") == 1

    asyncio.run(story())


def test_a_daemon_is_outside_after_its_session_and_after_the_agent(shared_pin_dir: Path, tmp_path: Path) -> None:
    """Its parents have ended, its login too: the kernel's list has it, and the next agent finds it."""

    async def story() -> None:
        async with guarded(shared_pin_dir, tmp_path) as place:
            place.on_escape = OnEscape.REPORT
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            daemon = session.start_daemon()
            place.tree.put(daemon, ".")
            await until_in_loop(lambda: outside(place) == [1, 0], "it is seen outside")
            session.end()
            await until_in_loop(lambda: len(place.sessions) == 0, "its session ends")
            # Through a few looks at all there is.
            sweeps = count_sweeps(place)
            await until_in_loop(lambda: len(sweeps) > 2, "it is looked at again")
            assert outside(place) == [1, 0]
            await place.stop()
            await place.start()
            await until_in_loop(lambda: bool(place.sessions.strays), "the next agent sees it")
            assert outside(place) == [1, 0]
            os.kill(daemon, signal.SIGKILL)
            await until_in_loop(lambda: outside(place) == [0, 0], "its end is seen")

    asyncio.run(story())


def test_whoever_puts_the_session_into_its_job_has_the_daemons_put_back(shared_pin_dir: Path) -> None:
    """``adoptctl join`` does not find one that has cut itself off: the guard has a list, and was told to try again."""

    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            place.on_escape = OnEscape.REPORT
            job = place.tree.job(ALICE, "17")
            session = place.session(ALICE, job)
            daemon = session.start_daemon()
            place.tree.put(daemon, ".")
            await until_in_loop(lambda: outside(place) == [1, 0], "it is seen outside")
            place.on_escape = OnEscape.READOPT
            entry = place.sessions.find(str(session.pid))
            assert entry is not None
            place.sessions.moved(entry, job)
            await until_in_loop(lambda: place.tree.is_in(daemon, HOME), "the daemon is back")
            await until_in_loop(lambda: outside(place) == [0, 0], "nothing is outside")

    asyncio.run(story())


def test_the_end_of_the_job_is_told_apart(shared_pin_dir: Path) -> None:
    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            place.on_escape = OnEscape.REPORT
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            place.tree.put(session.pid, ".")
            await until_in_loop(lambda: outside(place) == [1, 0], "it is seen outside")
            for label in place.tree.labels:
                place.tree.at(HOME, label).rmdir()
            await until_in_loop(lambda: outside(place) == [0, 1], "its job has ended")
            place.tree.job(ALICE, "18")
            place.tree.put(session.pid, f"uid_{ALICE}/job_18")
            await until_in_loop(lambda: outside(place) == [0, 0], "it is in another job of its user's")

    asyncio.run(story())
