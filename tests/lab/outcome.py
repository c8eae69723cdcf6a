"""What a scenario hands back, and the small book-keeping that leads to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Sequence

from lab.node import PamRecord


@dataclass(frozen=True)
class Outcome:
    """One scenario's result. ``witness`` is "-" where no witness was asked, ``pam_ms`` the slowest account phase."""

    expected: str
    got: str
    ok: bool
    witness: str
    pam_ms: Optional[float]
    explanation: str


@dataclass
class Findings:
    """Collects what a scenario looked at: pairs of expected and got, each with a label if there are several."""

    expected: Dict[str, str] = field(default_factory=dict)
    got: Dict[str, str] = field(default_factory=dict)
    witnesses: List[str] = field(default_factory=list)
    slowest_ms: Optional[float] = None
    logged: List[str] = field(default_factory=list)

    def check(self, label: str, expected: str, got: str) -> None:
        """One thing to see. ``label`` may be empty when there is just one."""
        self.expected[label] = expected
        self.got[label] = got

    def check_true(self, label: str, claim: str, truth: bool, otherwise: str) -> None:
        """One claim; ``otherwise`` is what is shown if it does not hold."""
        self.check(label, claim, claim if truth else otherwise)

    def record(self, records: Sequence[PamRecord]) -> Sequence[PamRecord]:
        """Take the witness and the duration out of what pam_adopt.so logged."""
        for record in records:
            self.logged.append(
                " ".join(f"{name}={record.fields.get(name, '-')}" for name in ("verdict", "reason", "job"))
            )
            word = record.fields.get("witness", "-")
            if word not in ("-", "none", *self.witnesses):
                self.witnesses.append(word)
            if record.ms is not None:
                self.slowest_ms = max(record.ms, self.slowest_ms or 0.0)
        return records

    def outcome(self, explanation: str) -> Outcome:
        """Close the book. Where something is not as expected, what the PAM module logged goes with the explanation."""
        ok = bool(self.expected) and self.expected == self.got
        if not ok:
            explanation = f"{explanation}; logged: {tally(self.logged) or 'nothing'}"
        return Outcome(
            expected=_together(self.expected),
            got=_together(self.got),
            ok=ok,
            witness="+".join(self.witnesses) or "-",
            pam_ms=self.slowest_ms,
            explanation=explanation,
        )


def _together(pairs: Dict[str, str]) -> str:
    return "; ".join(f"{label}: {text}" if label else text for label, text in pairs.items())


def tally(places: Sequence[str]) -> str:
    """Many landings in few words: "10 x job 7 on node2"."""
    return ", ".join(f"{count} x {place}" for place, count in sorted(Counter(places).items()))


def describe_ms(value: Optional[float]) -> str:
    """A duration for people: "1.9 ms", or "-" where nothing was measured."""
    return "-" if value is None else f"{value:.1f} ms"
