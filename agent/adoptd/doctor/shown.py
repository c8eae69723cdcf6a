"""What the doctor shows: what is wrong first, with what to do; what is right in few lines.

Owns the layout, and nothing of what is said. Texts of findings are scrubbed before they reach a terminal: they have
names of files and words of services in them. Called by the command line.
"""

from __future__ import annotations

import textwrap
from typing import Dict, List, Sequence, Tuple

from adoptd.doctor.findings import Finding, Grade, worst
from adoptd.log import scrub
from adoptd.wire.control import Result

_COLUMN = 23


def as_lines(findings: Sequence[Finding], width: int) -> List[str]:
    """For people: failures, warnings, then all that is right, by what it is about."""
    lines: List[str] = []
    shown = _once(findings)
    for grade in (Grade.FAILURE, Grade.WARNING):
        for finding in (each for each in shown if each.grade is grade):
            lines += _block(grade.name.lower(), finding.check, finding.seen, width)
            if finding.remedy:
                lines += _wrapped(f"{'':{_COLUMN}} -> ", f"{'':{_COLUMN + 4}}", finding.remedy, width)
    right: Dict[str, List[str]] = {}
    for finding in shown:
        if finding.grade is Grade.OK:
            right.setdefault(finding.check, []).append(finding.seen)
    for check, seen in right.items():
        lines += _block("ok", check, "; ".join(seen), width)
    count = {grade: sum(finding.grade is grade for finding in shown) for grade in Grade}
    bad = (_counted(count[grade], grade.name.lower()) for grade in (Grade.FAILURE, Grade.WARNING))
    lines.append(", ".join((*bad, f"{count[Grade.OK]} ok")))
    return lines


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _once(findings: Sequence[Finding]) -> List[Finding]:
    """One cause is one finding: of the first check that met it, and without what only follows from it."""
    failed = {each.check for each in findings if each.grade is Grade.FAILURE and not each.cause}
    checks: Dict[Tuple[Grade, str, str], List[str]] = {}
    follow: Dict[str, List[str]] = {}
    for each in findings:
        if each.cause in failed:
            names = follow.setdefault(each.cause, [])
        else:
            names = checks.setdefault((each.grade, each.seen, each.remedy), [])
        if each.check not in names:
            names.append(each.check)
    shown: List[Finding] = []
    for (grade, seen, remedy), names in checks.items():
        also = names[1:] + (follow.pop(names[0], []) if grade is Grade.FAILURE else [])
        shown.append(Finding(names[0], grade, seen + (f" (also for: {', '.join(also)})" if also else ""), remedy))
    return shown


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
