"""One budget per request, on the monotonic clock, passed down to everything that waits."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Deadline:
    """A point on CLOCK_MONOTONIC, in seconds. Immutable, so nobody downstream can extend it."""

    at_s: float

    @classmethod
    def after_ms(cls, budget_ms: float) -> Deadline:
        """The deadline ``budget_ms`` milliseconds from now."""
        return cls(time.monotonic() + budget_ms / 1000.0)

    def remaining_s(self) -> float:
        """Seconds left, never negative: safe to hand to any timeout parameter."""
        return max(0.0, self.at_s - time.monotonic())

    @property
    def expired(self) -> bool:
        """Whether the budget is used up."""
        return time.monotonic() >= self.at_s

    def earlier(self, budget_ms: float) -> Deadline:
        """This deadline or ``budget_ms`` from now, whichever comes first."""
        return Deadline(min(self.at_s, time.monotonic() + budget_ms / 1000.0))
