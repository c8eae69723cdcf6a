"""Whose turn it is: adoptions into one job go one after the other, and none follows one left unanswered.

Some releases of slurmstepd have crashed of two at a time. Owns the queues; it must never wait beyond a
deadline, nor keep anything of a job nobody waits for. Used by the slurm backend only.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import Dict, Iterator, Tuple

from adoptd.deadline import Deadline
from adoptd.model import AdoptionFailed, Job

# How long a step that left an adoption unanswered is spared the next: it may still be at it. Those who wait
# for their turn would wait in vain too, and each holds a worker while it does.
SPARED_S = 2.0


class Turns:
    """One adoption at a time per job."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: Dict[Tuple[int, ...], Tuple[threading.Lock, int]] = {}
        self._spared_until_s: Dict[Tuple[int, ...], float] = {}

    @contextmanager
    def of(self, job: Job, deadline: Deadline) -> Iterator[None]:
        """Wait for one's turn. Raises AdoptionFailed if it does not come in time, or the step is being spared."""
        with self._lock:
            turn, waiting = self._queues.get(job.identity, (threading.Lock(), 0))
            self._queues[job.identity] = (turn, waiting + 1)
        try:
            if not turn.acquire(timeout=deadline.remaining_s()):
                raise AdoptionFailed(f"job {job.id}: no turn in time, another adoption into it is under way")
            try:
                with self._lock:
                    spared = self._spared_until_s.get(job.identity, 0.0) > time.monotonic()
                if spared:
                    raise AdoptionFailed(f"job {job.id}: its step has left an adoption unanswered a moment ago")
                yield
            finally:
                turn.release()
        finally:
            with self._lock:
                turn, waiting = self._queues.pop(job.identity)
                if waiting > 1:
                    self._queues[job.identity] = (turn, waiting - 1)

    def spare(self, job: Job) -> None:
        """Give the job's step no adoption for a while: it left one unanswered."""
        now = time.monotonic()
        with self._lock:
            kept = {identity: until for identity, until in self._spared_until_s.items() if until > now}
            self._spared_until_s = {**kept, job.identity: now + SPARED_S}
