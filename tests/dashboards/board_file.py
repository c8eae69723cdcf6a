"""Reading of dashboards/adoptd.json as a site gets it: its panels and their expressions."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Tuple

DASHBOARDS = Path(__file__).resolve().parents[2] / "dashboards"

# Grafana's, as it would fill them in for everything and a scrape each second.
_VARIABLES = {"$cluster": ".*", "$node": ".*", "$__rate_interval": "10s", "[1h]": "[1h]"}


@dataclass(frozen=True)
class Panel:
    """One panel; ``targets`` are its expressions with their legends, as written."""

    title: str
    kind: str
    description: str
    unit: str
    place: Tuple[int, int, int, int]
    targets: Tuple[Tuple[str, str], ...]
    sources: Tuple[str, ...]


def board() -> Dict[str, Any]:
    """The whole document."""
    document: Dict[str, Any] = json.loads((DASHBOARDS / "adoptd.json").read_text(encoding="utf-8"))
    return document


def panels() -> List[Panel]:
    """All panels but the rows' titles, in order."""
    return [_panel(each) for each in board()["panels"] if each["type"] != "row"]


def filled_in(expression: str) -> str:
    """An expression as Grafana would send it to Prometheus."""
    for name, value in _VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def metrics_of(expression: str) -> List[str]:
    """Names of the agent's metrics that an expression reads; what recording rules make has colons in its name."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    return sorted(set(re.findall(r"(?<![:\w])(?:adoptd|process)_[a-z0-9_]+\b(?!:)", bare)))


def _panel(given: Dict[str, Any]) -> Panel:
    place = given["gridPos"]
    targets = given.get("targets", [])
    return Panel(
        title=given.get("title", ""),
        kind=given["type"],
        description=given.get("description", ""),
        unit=given.get("fieldConfig", {}).get("defaults", {}).get("unit", ""),
        place=(place["x"], place["y"], place["w"], place["h"]),
        targets=tuple((target["expr"], target.get("legendFormat", "")) for target in targets),
        sources=tuple(each["datasource"]["uid"] for each in [given, *targets]),
    )
