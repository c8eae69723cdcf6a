"""Running scenarios and telling about it, in words for people. No decisions, no clean-up."""

from __future__ import annotations

import time
from typing import Dict, List, Sequence, TextIO

from lab.lab import Lab
from lab.outcome import Outcome, describe_ms
from lab.scenarios import claim_of, run_scenario

TABLE_TEXT_MAX = 60


def run_all(lab: Lab, names: Sequence[str], out: TextIO) -> Dict[str, Outcome]:
    """Run the scenarios one after the other, telling about each as it ends."""
    outcomes: Dict[str, Outcome] = {}
    for number, name in enumerate(names, 1):
        started = time.monotonic()
        outcome = outcomes[name] = run_scenario(lab, name)
        seconds = time.monotonic() - started
        out.write(f"[{number:2}/{len(names)}] {name}: {claim_of(name)}\n")
        out.write(f"        landed:   {outcome.got} - {'ok' if outcome.ok else 'NOT AS EXPECTED'}\n")
        if not outcome.ok:
            out.write(f"        expected: {outcome.expected}\n")
        out.write(f"        witness:  {outcome.witness}; PAM took {describe_ms(outcome.pam_ms)}")
        out.write(f" (scenario {seconds:.1f} s); {outcome.explanation}\n")
        out.flush()
    return outcomes


def print_table(outcomes: Dict[str, Outcome], out: TextIO) -> None:
    """All of it once more, a line each."""
    width = max(len(name) for name in outcomes)
    out.write(f"\n{'scenario':{width}}        {'witness':8} {'PAM':>9}  landed\n")
    for name, outcome in outcomes.items():
        got = outcome.got if len(outcome.got) <= TABLE_TEXT_MAX else f"{outcome.got[: TABLE_TEXT_MAX - 3]}..."
        mark = "ok" if outcome.ok else "FAIL"
        out.write(f"{name:{width}}  {mark:4}  {outcome.witness:8} {describe_ms(outcome.pam_ms):>9}  {got}\n")


def sample_metrics(lab: Lab) -> List[str]:
    """What an administrator would look at first: no zeros, and of a histogram only its sum and count."""
    lines = [line for line in lab.second.metrics() if line.startswith("adoptd_")]
    return [line for line in lines if not ("_bucket" in line or "_created" in line or line.endswith(" 0.0"))]


def verdict(outcomes: Dict[str, Outcome]) -> str:
    """The last line's words."""
    good = sum(outcome.ok for outcome in outcomes.values())
    return f"all {good} as expected" if good == len(outcomes) else f"{good} of {len(outcomes)} as expected"
