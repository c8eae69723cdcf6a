"""The committed files are what their sources say, and hold what a dashboard and rules must hold."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List, Tuple

import pytest
import yaml
from generate.labels import families, samples_of

from dashboards.board_file import DASHBOARDS, Panel, board, filled_in, metrics_of, panels

ROOT = DASHBOARDS.parent
RUNBOOK = ROOT / "docs" / "runbook.md"
# Of prometheus-client's process collector, and kept by Prometheus itself.
FOREIGN = {
    "adoptd_process_resident_memory_bytes",
    "adoptd_process_cpu_seconds_total",
    "adoptd_process_start_time_seconds",
    "up",
    "ALERTS",
}
# Grafana's names for units (packages/grafana-data/src/valueFormats/categories.ts).
UNITS = {"short", "s", "bytes", "percentunit", "reqps", "cps"}


def rules() -> List[Tuple[str, str]]:
    """Name and expression of every rule, recording rules first."""
    found = []
    for file in ("rules.yml", "alerts.yml"):
        for group in yaml.safe_load((DASHBOARDS / file).read_text(encoding="utf-8"))["groups"]:
            found += [(rule.get("record") or rule["alert"], rule["expr"]) for rule in group["rules"]]
    return found


def exported() -> List[str]:
    """Names of all samples that the agent can export."""
    return [sample for name, family in families().items() for sample in samples_of(name, family)] + sorted(FOREIGN)


def every_panel() -> List[object]:
    return [pytest.param(panel, id=panel.title) for panel in panels()]


def test_files_are_what_their_sources_write() -> None:
    done = subprocess.run(
        [sys.executable, "-B", "-m", "generate", "--check"],
        cwd=DASHBOARDS,
        env={**os.environ, "PYTHONPATH": f"{DASHBOARDS}:{ROOT / 'agent'}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("panel", every_panel())
def test_every_panel_says_what_it_shows(panel: Panel) -> None:
    assert panel.title
    assert len(panel.description) > 20, "a description says what to make of the panel"
    assert panel.unit in UNITS
    assert panel.targets
    assert set(panel.sources) == {"${datasource}"}


@pytest.mark.parametrize("panel", every_panel())
def test_every_expression_reads_only_what_is_exported(panel: Panel) -> None:
    known = exported()
    for expression, _ in panel.targets:
        assert [name for name in metrics_of(expression) if name not in known] == []
        assert metrics_of(expression), expression


@pytest.mark.parametrize("panel", every_panel())
def test_every_expression_heeds_the_variables(panel: Panel) -> None:
    """A rate over a fixed window is wrong at another zoom; a panel without the cluster mixes clusters."""
    for expression, _ in panel.targets:
        assert '"$cluster"' in expression
        for window in re.findall(r"\[(.*?)\]", expression):
            told = (panel.title + panel.description).lower()
            said = {"$__rate_interval": "", "$__range": "in the time shown", "1h": "last hour"}
            assert said[window] in told, expression
        assert "irate(" not in expression


@pytest.mark.parametrize("panel", every_panel())
def test_every_legend_names_labels_that_the_expression_keeps(panel: Panel) -> None:
    for expression, legend in panel.targets:
        for label in re.findall(r"\{\{(.*?)\}\}", legend):
            assert re.search(rf"by \([^)]*\b{label}\b", expression) or "by (" not in expression, (legend, expression)


def test_no_two_panels_overlap_and_all_fit_the_grid() -> None:
    placed = [(each["title"], each["gridPos"]) for each in board()["panels"]]
    for (one, a), (other, b) in itertools.combinations(placed, 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, f"{one} overlaps {other}"
    assert all(place["x"] + place["w"] <= 24 for _, place in placed)
    assert len({each["id"] for each in board()["panels"]}) == len(placed)


def test_variables_are_used_and_used_ones_exist() -> None:
    document = board()
    defined = {each["name"] for each in document["templating"]["list"]}
    assert defined == {"datasource", "cluster", "node"}
    text = str(document["panels"]) + str([each.get("query") for each in document["templating"]["list"]])
    used = set(re.findall(r"\$\{?([a-z]+)\b", text)) - {"__rate_interval"}
    assert used - {""} == defined
    assert document["uid"] == "adoptd"


def test_a_row_about_a_node_leads_to_that_node() -> None:
    """By the variable that there is; what leads nowhere is not there."""
    tables = [each for each in board()["panels"] if each["type"] == "table"]
    for table in tables:
        links = [link["url"] for link in table["fieldConfig"]["defaults"].get("links", [])]
        assert bool(links) == ("by (" in str(table["targets"]) and "instance" in str(table["transformations"]))
        assert all(link.startswith(f"/d/{board()['uid']}?var-node=${{__data.fields.instance}}") for link in links)


def test_every_adoptd_metric_is_somewhere_in_the_dashboard() -> None:
    """What nobody can see need not be counted."""
    shown = {name for panel in panels() for expression, _ in panel.targets for name in metrics_of(expression)}
    shown |= {name for _, expression in rules() for name in metrics_of(expression)}
    assert [name for name, family in families().items() if not shown & set(samples_of(name, family))] == []


@pytest.mark.parametrize(("name", "expression"), rules())
def test_every_rule_reads_only_what_is_exported_or_recorded(name: str, expression: str) -> None:
    known = {*exported()} | {metric for rule, _ in rules() for metric in metrics_of(rule)}
    assert [metric for metric in metrics_of(expression) if metric not in known] == []


def test_every_alert_has_a_runbook_section_and_every_section_an_alert() -> None:
    document = yaml.safe_load((DASHBOARDS / "alerts.yml").read_text(encoding="utf-8"))
    alerts = [rule for group in document["groups"] for rule in group["rules"]]
    sections = re.findall(r"^## (Adoptd\w+)$", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(sections) == sorted(rule["alert"] for rule in alerts)
    for rule in alerts:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description", "runbook", "dashboard"}
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"


def test_promtool_takes_the_rules() -> None:
    promtool = shutil.which("promtool")
    assert promtool, "promtool is missing: it comes with Debian's package prometheus"
    files = [str(DASHBOARDS / name) for name in ("rules.yml", "alerts.yml")]
    done = subprocess.run([promtool, "check", "rules", *files], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    """As recording rules: promtool has no other way of reading an expression."""
    expressions = [filled_in(expression) for panel in panels() for expression, _ in panel.targets]
    made = [{"record": f"panel:number:{index}", "expr": each} for index, each in enumerate(expressions)]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": made}]}), encoding="utf-8")
    promtool = shutil.which("promtool")
    assert promtool
    done = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
