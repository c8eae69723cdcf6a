"""Waiting for something to become true, with a deadline and never with a fixed sleep."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Callable, Optional, TypeVar

from lab.kernel import start_time_ticks

T = TypeVar("T")

# Slow enough to leave two shared cores alone, fast enough not to be seen in any figure that is printed.
POLL_S = 0.01
# How many times longer than on a machine of today all that the lab itself waits for may take: more in an emulated one.
PATIENCE = int(os.environ.get("ADOPTD_LAB_PATIENCE", "1"))
# What comes comes in a moment; this is for a machine that is busy with everything else.
DEADLINE_S = 60.0


def until(question: Callable[[], Optional[T]], what: str, timeout_s: float = DEADLINE_S) -> T:
    """Ask until the answer is true, and return it. Raises TimeoutError naming ``what``."""
    deadline = time.monotonic() + timeout_s * PATIENCE
    while True:
        answer = question()
        if answer:
            return answer
        _check(deadline, what, timeout_s)
        time.sleep(POLL_S)


async def until_in_loop(question: Callable[[], Optional[T]], what: str, timeout_s: float = DEADLINE_S) -> T:
    """until(), while the event loop goes on."""
    deadline = time.monotonic() + timeout_s * PATIENCE
    while True:
        answer = question()
        if answer:
            return answer
        _check(deadline, what, timeout_s)
        await asyncio.sleep(POLL_S / 5)


def _check(deadline: float, what: str, timeout_s: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"after {timeout_s * PATIENCE:.0f} s: {what}")


def has_ended(pid: int, within_s: float) -> bool:
    """Whether this process is gone within that time: of a job's processes, each is signalled in its turn."""
    try:
        until(lambda: start_time_ticks(pid) is None, f"the end of process {pid}", within_s)
    except TimeoutError:
        return False
    return True
