"""Waiting for something to become true, with a deadline and never with a fixed sleep."""

from __future__ import annotations

import os
import time
from typing import Callable, Optional, TypeVar

from lab.kernel import start_time_ticks

T = TypeVar("T")

# Slow enough to leave two shared cores alone, fast enough not to be seen in any figure that is printed.
POLL_S = 0.01
# How many times longer than on a machine of today all that the lab itself waits for may take: more in an emulated one.
PATIENCE = int(os.environ.get("ADOPTD_LAB_PATIENCE", "1"))


def until(question: Callable[[], Optional[T]], what: str, timeout_s: float = 20.0) -> T:
    """Ask until the answer is neither None nor False, and return it. Raises TimeoutError naming ``what``."""
    timeout_s *= PATIENCE
    deadline = time.monotonic() + timeout_s
    while True:
        answer = question()
        if answer is not None and answer is not False:
            return answer
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout_s:.0f} s: {what}")
        time.sleep(POLL_S)


def has_ended(pid: int, within_s: float) -> bool:
    """Whether this process is gone within that time: of a job's processes, each is signalled in its turn."""
    try:
        until(lambda: start_time_ticks(pid) is None, f"the end of process {pid}", within_s)
    except TimeoutError:
        return False
    return True
