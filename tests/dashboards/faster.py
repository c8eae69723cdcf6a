"""The committed rules with time running faster: every duration divided by one number, and nothing else touched.

A duration is what stands between square brackets in an expression (``[15m]``), and the value of ``for``. Metrics,
labels, thresholds, operators and texts stay letter by letter; a rule that says a duration in another way (``offset``,
a subquery, ``keep_firing_for``) is refused, so that none is left as it was.
"""

from __future__ import annotations

import re
from typing import Any, Dict

import yaml

_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION = re.compile(r"(\d+)(ms|s|m|h|d)")
_RANGE = re.compile(r"\[([^\]]*)\]")
_QUOTED = re.compile(r'"[^"]*"')
_KEYS = {"alert", "record", "expr", "for", "labels", "annotations"}


def faster(text: str, times: int) -> str:
    """The text of a file of rules, its durations 1/``times`` as long. Raises ValueError naming what is unknown."""
    document = yaml.safe_load(text)
    for group in document["groups"]:
        if set(group) != {"name", "rules"}:
            raise ValueError(f"group {group['name']}: {sorted(group)}, expected name and rules only")
        for rule in group["rules"]:
            _hurry(rule, times)
    return yaml.safe_dump(document, sort_keys=False)


def shorter(duration: str, times: int) -> str:
    """``15m`` with 60: ``15000ms``. Raises ValueError if it is none, or does not come out even."""
    match = _DURATION.fullmatch(duration)
    if match is None:
        raise ValueError(f"{duration!r}: expected one number with ms, s, m, h or d")
    ms, left = divmod(int(match[1]) * _MS[match[2]], times)
    if left:
        raise ValueError(f"{duration!r} cannot be divided by {times} in milliseconds")
    return f"{ms}ms"


def _hurry(rule: Dict[str, Any], times: int) -> None:
    name = rule.get("alert") or rule.get("record")
    if not set(rule) <= _KEYS:
        raise ValueError(f"{name}: {sorted(set(rule) - _KEYS)}, which may be durations")
    bare = _QUOTED.sub('""', rule["expr"])
    if re.search(r"\boffset\b|@", bare):
        raise ValueError(f"{name}: an offset in {rule['expr']}")
    # In the text as it is: no matcher of ours has a bracket in it, which the line before the last would show.
    if _RANGE.findall(bare) != _RANGE.findall(rule["expr"]):
        raise ValueError(f"{name}: a bracket between quotes in {rule['expr']}")
    rule["expr"] = _RANGE.sub(lambda match: f"[{shorter(match[1], times)}]", rule["expr"])
    if "for" in rule:
        rule["for"] = shorter(rule["for"], times)
