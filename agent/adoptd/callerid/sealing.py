"""What both sides of a question share: who may seal it, sealing within a deadline, and being refused.

Called by the two sides, by the doors (which refuse messages of their own) and by the service.
"""

from __future__ import annotations

from adoptd.deadline import Deadline
from adoptd.metrics import Refusal
from adoptd.model import (
    AdoptdError,
)
from adoptd.seal import Opened, Seal
from adoptd.workers import Workers

# Agents run as root; only root may ask for another user, and only root's answer is believed. On a
# cluster root is root everywhere, as it is for Slurm's own callerid (src/slurmd/slurmd/req.c, 22.05).
AGENT_UID = 0


class Refused(AdoptdError):
    """A message gets no answer. ``reason`` is for the metric, the text for the log."""

    def __init__(self, reason: Refusal, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class SealRoom:
    """Sealing and opening within a deadline: in a thread where the scheme may block, inline where not."""

    def __init__(self, seal: Seal, workers: Workers) -> None:
        self._seal = seal
        self._workers = workers

    @property
    def scheme(self) -> str:
        """The scheme in force."""
        return self._seal.scheme

    async def seal(self, payload: bytes, reader_uid: int, deadline: Deadline) -> bytes:
        """``payload`` sealed for ``reader_uid``. Raises SealError, OutOfTime, Overloaded."""
        if not self._seal.may_block:
            return self._seal.seal(payload, reader_uid)
        return await self._workers.run(lambda: self._seal.seal(payload, reader_uid), deadline)

    async def open(self, sealed: bytes, deadline: Deadline) -> Opened:
        """The opened seal. Raises SealError, OutOfTime, Overloaded."""
        if not self._seal.may_block:
            return self._seal.open(sealed)
        return await self._workers.run(lambda: self._seal.open(sealed), deadline)
