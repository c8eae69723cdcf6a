"""What the doctor shows: what is wrong first, with what to do; what is right in few lines.

Owns the layout, and nothing of what is said. Texts of findings are scrubbed before they reach a terminal: they have
names of files and words of services in them. Called by the command line.
"""

from __future__ import annotations

import textwrap
from typing import Dict, List, Sequence

from adoptd.doctor.findings import Finding, Grade, worst
from adoptd.log import scrub
from adoptd.wire.control import Result

_COLUMN = 23


def as_lines(findings: Sequence[Finding], width: int) -> List[str]:
    """For people: failures, warnings, then all that is right, by what it is about."""
    lines: List[str] = []
    for grade in (Grade.FAILURE, Grade.WARNING):
        for finding in (each for each in findings if each.grade is grade):
            lines += _block(grade.name.lower(), finding.check, finding.seen, width)
            if finding.remedy:
                lines += _wrapped(f"{'':{_COLUMN}} -> ", f"{'':{_COLUMN + 4}}", finding.remedy, width)
    right: Dict[str, List[str]] = {}
    for finding in findings:
        if finding.grade is Grade.OK:
            right.setdefault(finding.check, []).append(finding.seen)
    for check, seen in right.items():
        lines += _block("ok", check, "; ".join(seen), width)
    count = {grade: sum(finding.grade is grade for finding in findings) for grade in Grade}
    lines.append(f"{count[Grade.FAILURE]} failures, {count[Grade.WARNING]} warnings, {count[Grade.OK]} ok")
    return lines


def as_json(findings: Sequence[Finding]) -> Result:
    """For programs: every finding, in the order of the checks."""
    return {
        "findings": [
            {"check": each.check, "grade": each.grade.name.lower(), "seen": each.seen, "remedy": each.remedy}
            for each in findings
        ],
        "worst": worst(findings).name.lower(),
    }


def _block(word: str, check: str, text: str, width: int) -> List[str]:
    return _wrapped(f"{word:8} {check:14} ", f"{'':{_COLUMN + 1}}", text, width)


def _wrapped(first: str, rest: str, text: str, width: int) -> List[str]:
    return textwrap.wrap(
        scrub(text),
        width=max(width, 60),
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
