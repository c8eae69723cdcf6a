"""Reading of dashboards/adoptd.json as a site gets it: its panels and their expressions."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

DASHBOARDS = Path(__file__).resolve().parents[2] / "dashboards"

# Grafana's, as it would fill them in for everything and a scrape each second.
_VARIABLES = {"$cluster": ".*", "$node": ".*", "$__rate_interval": "10s", "$__range": "10m"}


@dataclass(frozen=True)
class Panel:
    """One panel; ``targets`` are its expressions with their legends, as written.

    ``steps`` are thresholds and their colours; ``columns`` a table's, in order, with what some of them are called.
    """

    title: str
    kind: str
    description: str
    unit: str
    place: Tuple[int, int, int, int]
    targets: Tuple[Tuple[str, str], ...]
    sources: Tuple[str, ...]
    steps: Tuple[Tuple[Optional[float], str], ...]
    columns: Tuple[str, ...]
    renamed: Mapping[str, str]


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
    """Names of the metrics that an expression reads: the agent's, and Prometheus' own of it.

    What recording rules make has colons in its name.
    """
    bare = re.sub(r'"[^"]*"', '""', expression)
    return sorted(set(re.findall(r"(?<![:\w])(?:adoptd_[a-z0-9_]+|up|ALERTS)\b(?!:)", bare)))


def _panel(given: Dict[str, Any]) -> Panel:
    place = given["gridPos"]
    targets = given.get("targets", [])
    defaults = given.get("fieldConfig", {}).get("defaults", {})
    table: Dict[str, Any] = next((each["options"] for each in given.get("transformations", [])), {})
    order: Mapping[str, int] = table.get("indexByName", {})
    return Panel(
        title=given.get("title", ""),
        kind=given["type"],
        description=given.get("description", ""),
        unit=defaults.get("unit", ""),
        place=(place["x"], place["y"], place["w"], place["h"]),
        targets=tuple((target["expr"], target.get("legendFormat", "")) for target in targets),
        sources=tuple(each["datasource"]["uid"] for each in [given, *targets]),
        steps=tuple((each.get("value"), each["color"]) for each in defaults.get("thresholds", {}).get("steps", [])),
        columns=tuple(name for name in sorted(order, key=order.__getitem__) if name not in table["excludeByName"]),
        renamed=table.get("renameByName", {}),
    )
