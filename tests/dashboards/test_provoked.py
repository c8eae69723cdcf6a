"""Each alert, by its fault: made on a real agent, it fires in a real Prometheus, alone; mended, it is quiet again.

All faults are made at once, each on a node of its own (faults.py says how, and what of two of them is simulated), and
one Prometheus scrapes the fleet. Its rules are the committed files with every duration a sixtieth as long, and nothing
else of them changed (faster.py, tested first). Meanwhile a healthy node goes through what is no fault: logins, a user
without a job, a restart that takes less than Prometheus is to wait for, and a scan of its ports. The logins that met a
fault go on after it is mended.
"""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Set, Tuple

import pytest
import yaml

from dashboards.faster import faster, shorter
from dashboards.faults import BLIND, EXPECTED, FAULTS, nobody_scraped, scan
from dashboards.fleet import RULE_FILES, as_committed
from dashboards.provoked import CLUSTER, POLL_S, TIMES, Scene, patiently, scene
from lab.etc_files import BOB
from lab.lab import NOBODY_IN
from lab.waiting import PATIENCE

pytestmark = pytest.mark.timeout(600 * PATIENCE)

# From the last fault made to the last alert: 30 s (AdoptdMemoryGrows) on a machine that has time.
FIRING_S = 120
# The longest window is a minute here.
QUIET_S = 150

# Who else may be alerted on, and why it does not mislead. Anything that is neither here nor in FAULTS is a failure.
ALSO = {
    ("AdoptdLoginsSlow", "asking"): "a machine without time takes longer than the 0.3 s that a source is waited for",
}

# What is told with an exact number, for a while at least: a node that is restarted is one more that does not answer.
NUMBERS = (
    ("AdoptdManyDown", CLUSTER, r"3 agents of lab do not answer$"),
    ("AdoptdRestarts", "unprobed", r"[4-6] starts in an hour\.$"),
    ("AdoptdMemoryGrows", "leaking", r"The agent on \S+ uses 2\d\d\.?\d*MiB "),
    ("AdoptdSessionsOutside", "escaping", r"1 now \(running_job\): "),
)

Named = Tuple[str, str]


@dataclass
class Seen:
    """What Prometheus said: the first sight of each alert that fired, by name and whom it is about.

    ``said``: all that the texts of each ever were, since the number in them may be another a moment later.
    """

    fired: Dict[Named, Dict[str, Any]] = field(default_factory=dict)
    now: Set[Named] = field(default_factory=set)
    said: Dict[Named, Set[str]] = field(default_factory=dict)

    def look(self, up: Scene) -> None:
        found = {(each["labels"]["alertname"], up.about(each["labels"])): each for each in up.firing()}
        self.now = set(found)
        self.fired = {**found, **self.fired}
        for named, alert in found.items():
            self.said.setdefault(named, set()).update(alert["annotations"].values())

    def has_said(self, name: str, about: str, pattern: str) -> bool:
        """Whether one of an alert's texts was ever so, from its beginning."""
        return any(re.match(pattern, text) for text in self.said.get((name, about), ()))


@dataclass
class Provoked:
    """The faults, made, and what came of them; ``mend`` ends them all."""

    up: Scene
    seen: Seen
    mend: contextlib.ExitStack


@pytest.fixture(scope="module")
def provoked() -> Iterator[Provoked]:
    """Every fault made and everyday life on the healthy node, until every alert has fired or the time is over."""
    with scene() as up, contextlib.ExitStack() as mend:
        seen = Seen()
        for fault in FAULTS:
            mend.enter_context(fault.make(up))
            seen.look(up)
        everyday_life(up)
        _watch(up, seen, lambda: set(EXPECTED) <= set(seen.fired) and all(map(seen.has_said, *zip(*NUMBERS))), FIRING_S)
        yield Provoked(up, seen, mend)


@pytest.fixture(scope="module")
def mended(provoked: Provoked) -> Provoked:
    """Every fault mended, and nothing firing any more or the time over."""
    provoked.mend.close()
    _watch(provoked.up, provoked.seen, lambda: not provoked.seen.now, QUIET_S)
    return provoked


def _watch(up: Scene, seen: Seen, enough: Callable[[], bool], within_s: float) -> None:
    """Look until it is enough. What is missing then is for the tests to say, one by one."""
    deadline = time.monotonic() + within_s * PATIENCE
    seen.look(up)
    while not enough() and time.monotonic() < deadline:
        time.sleep(POLL_S)
        seen.look(up)


def everyday_life(up: Scene) -> None:
    """What happens on a node in which nothing is wrong, and nobody is to be called for."""
    assert up.login("healthy").landed == f"job {up.jobs[0]} on {up.node('healthy').name}"
    assert up.login("healthy", BOB).landed == NOBODY_IN
    scan(up, "healthy")
    # As long as a small node takes to start again: five of Prometheus' minutes.
    node, is_up = up.node("healthy"), f'up{{instance="{up.instance("healthy")}"}}'
    node.stop("agent")
    patiently(lambda: up.value(f"sum_over_time({is_up}[5s])") == 0, "down for 5 s", 30)
    node.start_agent()
    patiently(lambda: up.value(is_up) == 1, "it is scraped again", 30)


def _rules(text: str) -> List[Dict[str, Any]]:
    rules: List[Dict[str, Any]] = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    return rules


def _names() -> List[str]:
    return [rule["alert"] for rule in _rules(as_committed("alerts.yml"))]


# The rewriting


def _slower(duration: str) -> int:
    """Milliseconds of a shortened duration, at a site."""
    assert duration.endswith("ms")
    return int(duration[:-2]) * TIMES


def _site_ms(duration: str) -> int:
    return int(shorter(duration, 1)[:-2])


@pytest.mark.parametrize("name", RULE_FILES)
def test_only_durations_are_rewritten(name: str) -> None:
    """Everything but them is letter for letter the same, each is a sixtieth, and none is left out."""
    given, made = _rules(as_committed(name)), _rules(faster(as_committed(name), TIMES))
    assert len(given) == len(made)
    for rule, quick in zip(given, made):
        assert set(rule) == set(quick)
        for key in set(rule) - {"expr", "for"}:
            assert rule[key] == quick[key]
        ranges = re.compile(r"\[[^\]]*\]")
        assert ranges.sub("[]", rule["expr"]) == ranges.sub("[]", quick["expr"])
        pairs = list(zip(ranges.findall(rule["expr"]), ranges.findall(quick["expr"])))
        durations = [(one[1:-1], other[1:-1]) for one, other in pairs]
        durations += [(rule["for"], quick["for"])] if "for" in rule else []
        assert [_site_ms(one) for one, _ in durations] == [_slower(other) for _, other in durations]
        # A number with a unit that is in no bracket would be a duration that was not seen.
        bare = re.sub(r'"[^"]*"', "", ranges.sub("", quick["expr"]))
        assert re.findall(r"(?<![\w:])\d+(?:ms|s|m|h|d|w|y)\b", bare) == []


@pytest.mark.parametrize(
    "rule",
    [
        {"alert": "A", "expr": "up offset 5m == 0"},
        {"alert": "A", "expr": "max_over_time(rate(x[5m])[1h:1m]) > 0"},
        {"alert": "A", "expr": "up @ end() == 0"},
        {"alert": "A", "expr": "up == 0", "keep_firing_for": "5m"},
        {"alert": "A", "expr": "up == 0", "for": "1h30m"},
        {"alert": "A", "expr": "rate(x[7ms]) > 0"},
        {"alert": "A", "expr": 'rate(x{a="[5m]"}[5m]) > 0'},
    ],
    ids=["offset", "subquery", "at", "keep firing", "two units", "uneven", "in quotes"],
)
def test_a_duration_that_is_said_otherwise_is_refused(rule: Dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"A|duration|number|divided"):
        faster(yaml.safe_dump({"groups": [{"name": "g", "rules": [rule]}]}), TIMES)


def test_a_group_with_its_own_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="interval"):
        faster(yaml.safe_dump({"groups": [{"name": "g", "interval": "1m", "rules": []}]}), TIMES)


# The alerts


def test_every_alert_has_a_fault() -> None:
    assert {name for name, _ in (*EXPECTED, BLIND)} == set(_names())


@pytest.mark.parametrize(("name", "about"), EXPECTED)
def test_the_fault_is_alerted_on(provoked: Provoked, name: str, about: str) -> None:
    """Its labels say where, and its texts are whole sentences with the real values in them."""
    assert (name, about) in provoked.seen.fired, sorted(provoked.seen.fired)
    alert = provoked.seen.fired[(name, about)]
    (rule,) = [rule for rule in _rules(as_committed("alerts.yml")) if rule["alert"] == name]
    labels, texts = alert["labels"], alert["annotations"]
    assert labels["severity"] == rule["labels"]["severity"]
    assert labels["job"] == "adoptd"
    assert texts["runbook"] == rule["annotations"]["runbook"]
    where = labels.get("instance") or labels["cluster"]
    assert where in texts["summary"]
    nodes = f"&var-node={labels['instance']}" if "instance" in labels else ""
    assert texts["dashboard"] == f"/d/adoptd?from=now-3h&var-cluster={labels['cluster']}{nodes}"
    for text in (texts["summary"], texts["description"]):
        assert re.search(r"\{\{|\}\}|<no value>|<error|%!|NaN|\[\]|\(\)|  ", text) is None, text
        # Nobody reads 12.857142857142858 at night.
        assert re.search(r"\d\.\d{3,}", text) is None, text
    # What is left in the labels to tell one fault from another is in the words as well.
    for label in set(labels) - {"alertname", "cluster", "instance", "job", "severity", "stage", "phase"}:
        assert labels[label] in texts["description"], label


@pytest.mark.parametrize(("name", "about", "pattern"), NUMBERS)
def test_the_numbers_told_are_those_counted(provoked: Provoked, name: str, about: str, pattern: str) -> None:
    assert provoked.seen.has_said(name, about, pattern), provoked.seen.said.get((name, about))


@pytest.mark.parametrize(("name", "about"), EXPECTED)
def test_mended_it_is_quiet(mended: Provoked, name: str, about: str) -> None:
    assert (name, about) in mended.seen.fired, "it never fired, so its quiet says nothing"
    assert (name, about) not in mended.seen.now


def test_nothing_else_ever_fired(mended: Provoked) -> None:
    """In all that Prometheus evaluated, not only when somebody looked; so the healthy node was never alerted on."""
    up = mended.up
    since = f"{int(time.time() - up.since_s) + 60}s"
    found = up.prometheus.query([f'max_over_time(ALERTS{{alertstate="firing"}}[{since}])'])[0]
    fired = {(each["metric"]["alertname"], up.about(each["metric"])) for each in found}
    assert set(EXPECTED) <= fired
    assert fired - set(EXPECTED) - set(ALSO) == set()
    assert not any(about == "healthy" for _, about in fired)


def test_every_rule_was_evaluated_without_error(mended: Provoked) -> None:
    rules = [rule for group in mended.up.prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
    assert len(rules) == sum(len(_rules(as_committed(name))) for name in RULE_FILES)


def test_a_prometheus_that_scrapes_no_agent_says_so_and_nothing_else(mended: Provoked) -> None:
    """After all others, since it ends them; and back again it is quiet."""
    up, seen = mended.up, Seen()
    with nobody_scraped(up):
        _watch(up, seen, lambda: BLIND in seen.now, FIRING_S)
        assert seen.now == {BLIND}
        assert seen.has_said(*BLIND, r"There is no target in a scrape job called adoptd, ")
    _watch(up, seen, lambda: not seen.now, QUIET_S)
    assert seen.now == set()
