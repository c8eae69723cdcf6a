"""What both sides of a question share: who may seal it, sealing within a deadline, and being refused.

Called by the two sides, by the doors (which refuse messages of their own) and by the service.
"""

from __future__ import annotations

from typing import Callable, TypeVar

from adoptd.deadline import Deadline
from adoptd.metrics import Refusal
from adoptd.model import AdoptdError
from adoptd.seal import Opened, Seal
from adoptd.workers import Workers

# Agents run as root; only root may ask for another user, and only root's answer is believed. On a
# cluster root is root everywhere, as it is for Slurm's own callerid (src/slurmd/slurmd/req.c, 22.05).
AGENT_UID = 0

_T = TypeVar("_T")


class Refused(AdoptdError):
    """A message gets no answer. ``reason`` is for the metric, the text for the log."""

    def __init__(self, reason: Refusal, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class SealRoom:
    """The seal in force, and the threads in which this node asks others with it.

    Threads for every scheme: some wait for another process to seal, and all ask over the network.
    """

    def __init__(self, seal: Seal, workers: Workers) -> None:
        self._seal = seal
        self._workers = workers

    @property
    def scheme(self) -> str:
        """The scheme in force."""
        return self._seal.scheme

    def seal(self, payload: bytes, reader_uid: int) -> bytes:
        """``payload`` sealed for ``reader_uid``. Blocks as long as the scheme does. Raises SealError."""
        return self._seal.seal(payload, reader_uid)

    def open(self, sealed: bytes) -> Opened:
        """The opened seal. Blocks as long as the scheme does. Raises SealError."""
        return self._seal.open(sealed)

    async def run(self, call: Callable[[], _T], deadline: Deadline) -> _T:
        """``call()``, which seals and opens, in a thread. Raises what it raises, OutOfTime, Overloaded."""
        return await self._workers.run(call, deadline)
