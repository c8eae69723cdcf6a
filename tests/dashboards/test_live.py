"""Agents with traffic, scraped by a real Prometheus: every panel and every rule has something to show."""

from __future__ import annotations

import re
import time
from typing import Iterator, List, Tuple

import pytest
import yaml

from dashboards.board_file import DASHBOARDS, filled_in, metrics_of, panels
from dashboards.fleet import Fleet, fleet, make_traffic
from lab.waiting import until


@pytest.fixture(scope="module")
def up() -> Iterator[Fleet]:
    """Up, and through two rounds of traffic: a rate needs something to have happened between two scrapes."""
    with fleet() as made:
        make_traffic(made, rounds=2)
        yield made


def _without_data(up: Fleet, named: List[Tuple[str, str]], over_time: bool) -> List[str]:
    expressions = [expression for _, expression in named]
    if over_time:
        results = up.prometheus.query_range(expressions, up.since_s, time.time())
    else:
        results = up.prometheus.query(expressions)
    return [f"{name}: {expression}" for (name, expression), found in zip(named, results) if not found]


def test_every_panel_shows_something(up: Fleet) -> None:
    """Over the time of the traffic; a panel that stays empty then would stay empty on the day it is needed.

    On a busy machine two scrapes may miss what happened once: then it happens again.
    """
    named = [(panel.title, filled_in(expression)) for panel in panels() for expression, _ in panel.targets]
    for _ in range(3):
        empty = _without_data(up, named, over_time=True)
        if not empty:
            return
        make_traffic(up, rounds=1)
    assert empty == []


def test_every_legend_is_filled_in(up: Fleet) -> None:
    """Each label that a legend names is on the series."""
    for panel in panels():
        for expression, legend in panel.targets:
            wanted = {part.split("}}")[0] for part in legend.split("{{")[1:]}
            for found in up.prometheus.query_range([filled_in(expression)], up.since_s, time.time())[0]:
                assert wanted <= set(found["metric"]), f"{panel.title}: {legend}"


def test_every_recording_rule_has_recorded(up: Fleet) -> None:
    document = yaml.safe_load((DASHBOARDS / "rules.yml").read_text(encoding="utf-8"))
    names = [(rule["record"], rule["record"]) for group in document["groups"] for rule in group["rules"]]
    assert _without_data(up, names, over_time=True) == []


def test_every_alert_is_evaluated_and_reads_what_is_there(up: Fleet) -> None:
    """An alert on a metric that nobody exports never fires: each of those it reads has series in this fleet."""
    rules = [rule for group in up.prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    document = yaml.safe_load((DASHBOARDS / "alerts.yml").read_text(encoding="utf-8"))
    alerts = [rule for group in document["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} >= {alert["alert"] for alert in alerts}
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    named = [(alert["alert"], f"count({metric})") for alert in alerts for metric in metrics_of(alert["expr"])]
    assert _without_data(up, named, over_time=True) == []


def test_what_is_wrong_in_the_fleet_is_alerted_on(up: Fleet) -> None:
    """Escapes alert at once, the node without a probe after its quarter of an hour: it is pending until then."""

    def alerted() -> bool:
        found = up.prometheus.get("/api/v1/alerts")["alerts"]
        states = {(each["labels"]["alertname"], each["state"]) for each in found}
        return {("AdoptdSessionsEscape", "firing"), ("AdoptdProbeNotAttached", "pending")} <= states

    until(alerted, "AdoptdSessionsEscape fires and AdoptdProbeNotAttached is pending", 30)
    found = up.prometheus.get("/api/v1/alerts")["alerts"]
    escape = next(each for each in found if each["labels"]["alertname"] == "AdoptdSessionsEscape")
    assert escape["annotations"]["summary"].startswith("Sessions leave their jobs on 10.66.0.")
    assert escape["annotations"]["runbook"] == "docs/runbook.md#adoptdsessionsescape"


def test_no_more_series_than_are_documented(up: Fleet) -> None:
    """An agent in use: the second node's, which meets everything that the traffic has."""
    said = re.search(r"(\d+) to (\d+) in use", (DASHBOARDS.parent / "docs" / "metrics.md").read_text(encoding="utf-8"))
    assert said is not None
    counts = up.prometheus.query(['count by (instance) ({__name__=~"adoptd_.*", instance!=""})'])[0]
    assert len(counts) == 3
    assert int(said[1]) <= max(int(float(each["value"][1])) for each in counts) <= int(said[2]), counts
