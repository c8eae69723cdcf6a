"""Whose turn it is: adoptions into one job go one after the other, and none overtakes one left unanswered.

Some releases of slurmstepd have crashed of two at a time. Owns the queues, and the connections on which a step
still owes an answer; it must never wait beyond a deadline, nor keep anything of a job nobody waits for but
those few connections. Used by the slurm backend only.
"""

from __future__ import annotations

import math
import select
import socket
import threading
from collections import OrderedDict
from contextlib import contextmanager
from typing import Dict, Iterator, Tuple

from adoptd.deadline import Deadline
from adoptd.model import AdoptionFailed, Job, JobFault

# Steps that hang in the middle of an adoption, at once, on one node. Beyond it the oldest is given up.
_OWED_MAX = 64

_Identity = Tuple[int, ...]


class Turns:
    """One adoption at a time per job."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: Dict[_Identity, Tuple[threading.Lock, int]] = {}
        self._owed: OrderedDict[_Identity, socket.socket] = OrderedDict()

    @contextmanager
    def of(self, job: Job, deadline: Deadline) -> Iterator[None]:
        """Wait for one's turn. Raises AdoptionFailed if it does not come in time. Who has it calls settle() first."""
        with self._lock:
            turn, waiting = self._queues.get(job.identity, (threading.Lock(), 0))
            self._queues[job.identity] = (turn, waiting + 1)
        try:
            if not turn.acquire(timeout=deadline.remaining_s()):
                text = f"job {job.id}: no turn in time, another adoption into it is under way"
                raise AdoptionFailed(text, JobFault.NO_TURN)
            try:
                yield
            finally:
                turn.release()
        finally:
            with self._lock:
                turn, waiting = self._queues.pop(job.identity)
                if waiting > 1:
                    self._queues[job.identity] = (turn, waiting - 1)

    def owes(self, job: Job, connection: socket.socket) -> None:
        """The job's step was asked on ``connection`` and has not answered yet; the connection is ours now."""
        with self._lock:
            earlier = self._owed.pop(job.identity, None)
            self._owed[job.identity] = connection
            given_up = [earlier] if earlier is not None else []
            while len(self._owed) > _OWED_MAX:
                given_up.append(self._owed.popitem(last=False)[1])
        for each in given_up:
            each.close()

    def __del__(self) -> None:
        # A reload makes a new backend; nobody closes the one before.
        for connection in self._owed.values():
            connection.close()

    def settle(self, job: Job, deadline: Deadline) -> None:
        """Until the step has answered what it owes, or hung up. Raises AdoptionFailed if it does not in time.

        It may still be at work on an adoption that nobody waits for any more.
        """
        with self._lock:
            connection = self._owed.get(job.identity)
        if connection is None:
            return
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        if not poll.poll(math.ceil(deadline.remaining_s() * 1000)):
            text = f"job {job.id}: its step has not answered the adoption before this one"
            raise AdoptionFailed(text, JobFault.STEP_SILENT)
        with self._lock:
            # Only who has the job's turn gets here, but the oldest may have been given up meanwhile.
            if self._owed.get(job.identity) is connection:
                del self._owed[job.identity]
        connection.close()
