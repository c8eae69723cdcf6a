"""The metrics: names, types, help texts and labels are an interface, kept in golden/metrics.txt.

After a change that is meant: ADOPTD_UPDATE_GOLDEN=1 pytest tests/unit/test_metrics.py, and read the diff.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Dict, List, Set, Tuple

import pytest
from generate.labels import CLOSED, FACTS
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from adoptd.callerid import AnswerStage, AskFault
from adoptd.metrics import Door, Metrics, Pool, Refusal
from adoptd.model import JobFault, Witness
from adoptd.monitoring import begin_at_zero
from adoptd.probe.record import COUNTERS
from adoptd.wire.callerid import Outcome, Reason

GOLDEN = Path(__file__).with_name("golden") / "metrics.txt"

PROBE_KINDS = {COUNTERS[0]: 3, COUNTERS[1]: 0}


def filled() -> Metrics:
    """Metrics in which every family has at least one series."""
    metrics = Metrics()
    metrics.count_adoption("account", "enforce", "adopted", "callerid", Witness.BPF, "q1")
    metrics.count_adoption("account", "enforce", "denied", "no_jobs", None, "q2")
    metrics.observe_login("account", 0.002, 1.0, [("jobs_here", 0.001), ("decide", 0.0)], "q1")
    metrics.observe_answer_stage(AnswerStage.FIND_OWNER, 0.00002)
    metrics.count_asked(Outcome.JOB, Reason.OWNER.value, Witness.BPF, 0.002)
    metrics.count_asked(Outcome.UNKNOWN, AskFault.TIMEOUT.value, None, 2.0)
    metrics.count_answered(Outcome.NO_JOB, Reason.OWNER.value, None, 0.001)
    metrics.refuse(Door.PEER, Refusal.BAD_SEAL)
    metrics.count_observed("agree", "that_job", "adopt")
    metrics.count_job_fault("adopt", JobFault.JOB_ENDED)
    metrics.count_escape("systemd", "readopted")
    metrics.show_outside({"running_job": 1})
    metrics.joins.labels("joined").inc()
    metrics.watch_queue(Pool.JOBS, lambda: 3)
    metrics.watch_host(lambda: {"bcc": "0.26.0", "schema": "ab12", "job_manager": "slurm", "cgroups": "hybrid"})
    metrics.show_witnesses({Witness.BPF: True, Witness.DIAG: False})
    metrics.watch_probe(lambda: PROBE_KINDS)
    metrics.show_self_test(True)
    return metrics


def interface(metrics: Metrics) -> str:
    """One block per family: name, type, help and label names, without the families of the process collector."""
    blocks: List[str] = []
    for family in metrics.registry.collect():
        if family.name.startswith("adoptd_process_"):
            continue
        names = sorted({name for found in family.samples for name in found.labels} - {"le"})
        samples = sorted({found.name for found in family.samples if not found.name.endswith("_created")})
        blocks.append(
            f"{family.name} {family.type} [{', '.join(names)}]\n  {family.documentation}\n  {' '.join(samples)}\n"
        )
    return "\n".join(sorted(blocks))


def test_the_interface_is_the_golden_one() -> None:
    """A renamed metric, another label or another help text is a visible diff."""
    now = interface(filled())
    if os.environ.get("ADOPTD_UPDATE_GOLDEN"):
        GOLDEN.write_text(now)
    assert now == GOLDEN.read_text()


def test_promtool_has_nothing_to_say() -> None:
    """Prometheus's own linter on the whole exposition; its absence fails here, and is no skip."""
    promtool = shutil.which("promtool")
    assert promtool, "promtool is missing: install the package prometheus"
    exposition = generate_latest(filled().registry)
    checked = subprocess.run([promtool, "check", "metrics"], input=exposition, capture_output=True, timeout=30)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def test_every_label_has_a_closed_set() -> None:
    """No family has a label that is not listed above: no user, job, pid, address or connection."""
    found: Set[Tuple[str, str]] = set()
    for family in filled().registry.collect():
        for sample in family.samples:
            for label, value in sample.labels.items():
                if label == "le" or family.name.startswith("adoptd_process_"):
                    continue
                if family.name in FACTS:
                    continue
                found.add((family.name, label))
                assert value in CLOSED[family.name][label]
    assert found == {(name, label) for name, labels in CLOSED.items() for label in labels}


def test_label_values_are_plain_words() -> None:
    """Values are written in queries and alert rules: lower case, digits and underscores."""
    for labels in CLOSED.values():
        for value in itertools.chain.from_iterable(labels.values()):
            assert value.replace("_", "").isalnum()
            assert value == value.lower()


def test_what_a_critical_alert_counts_begins_at_zero() -> None:
    """Of a series that begins at 1 Prometheus sees no increase: the first login at each node after a bad roll-out."""
    metrics = Metrics()
    begin_at_zero(metrics)
    read = metrics.registry.get_sample_value
    at = {"phase": "account", "mode": "enforce", "witness": "none"}
    outside = itertools.product(("allowed",), ("generic_failure", "adopt_failure", "unknown", "named_failed"))
    for outcome, reason in (*outside, ("ignored", "generic_failure"), ("denied", "no_jobs"), ("adopted", "only_job")):
        assert read("adoptd_adoptions_total", {**at, "outcome": outcome, "reason": reason}) == 0
    for reason in ("malformed", "internal", "unavailable"):
        assert read("adoptd_messages_refused_total", {"socket": "pam", "reason": reason}) == 0
    for mover, escape in itertools.product(("root", "self", "unknown"), ("failed", "reported", "readopted")):
        assert read("adoptd_escapes_total", {"mover": mover, "outcome": escape}) == 0
    # And each of them is one that can be.
    for family in metrics.registry.collect():
        for sample in family.samples:
            for label, value in sample.labels.items():
                if family.name in CLOSED:
                    assert value in CLOSED[family.name][label]


def test_unknown_is_absent_and_not_zero() -> None:
    """A fresh agent has no series for a self-test that was never made and for witnesses never asked."""
    text = generate_latest(Metrics().registry).decode()
    assert "adoptd_witness_up{" not in text
    assert "\nadoptd_config_last_reload_success 1.0" in text
    for door in Door:
        assert f'adoptd_requests_in_flight{{socket="{door.value}"}} 0.0' in text


@pytest.mark.parametrize("name", ["adoptd_probe_self_test_success", "adoptd_probe_self_test_timestamp_seconds"])
def test_a_self_test_that_was_never_made_has_no_result(name: str) -> None:
    """0 would say that it failed, and at the beginning of 1970."""
    metrics = Metrics()
    assert metrics.registry.get_sample_value(name) is None
    for ok in (False, True):
        metrics.show_self_test(ok)
        assert metrics.registry.get_sample_value("adoptd_probe_self_test_success") == int(ok)
        assert time.time() - (metrics.registry.get_sample_value("adoptd_probe_self_test_timestamp_seconds") or 0) < 60


def test_a_slow_answer_is_beyond_the_last_bucket() -> None:
    """Two seconds, the time of the peer's own timeout, show as +Inf only."""
    registry = filled().registry
    name = "adoptd_callerid_asked_duration_seconds_bucket"
    assert registry.get_sample_value(name, {"le": "1.0"}) == 1
    assert registry.get_sample_value(name, {"le": "+Inf"}) == 2


def test_the_kernel_s_counters_are_read_at_each_scrape() -> None:
    """They outlast the agent, so no copy of them is kept; none without a probe."""
    metrics = Metrics()
    counters: Dict[str, int] = {}
    metrics.watch_probe(lambda: counters)
    assert metrics.registry.get_sample_value("adoptd_probe_events_total", {"kind": "x"}) is None
    counters["x"] = 5
    assert metrics.registry.get_sample_value("adoptd_probe_events_total", {"kind": "x"}) == 5
    counters["x"] = 6
    assert metrics.registry.get_sample_value("adoptd_probe_events_total", {"kind": "x"}) == 6


def test_two_agents_in_one_process_share_nothing() -> None:
    """A registry of its own for each: no module state."""
    one, other = Metrics(), Metrics()
    one.refuse(Door.PAM, Refusal.SLOW)
    labels = {"socket": "pam", "reason": "slow"}
    assert other.registry.get_sample_value("adoptd_messages_refused_total", labels) is None


def test_logins_carry_their_request_id_where_openmetrics_is_asked_for() -> None:
    """An exemplar leads from a slow login in the dashboard to its line in the log; plain text has no exemplars."""
    registry = filled().registry
    lines = generate_openmetrics(registry).decode().splitlines()
    counted = [line for line in lines if line.startswith("adoptd_adoptions_total{") and 'reason="no_jobs"' in line]
    assert [line for line in counted if '# {request_id="q2"} 1.0' in line] == counted
    assert any(
        line.startswith("adoptd_adoption_duration_seconds_bucket") and 'request_id="q1"' in line for line in lines
    )
    assert b"request_id" not in generate_latest(registry)


def test_facts_that_are_not_known_yet_are_called_so() -> None:
    metrics = Metrics()
    metrics.watch_host(lambda: {"bcc": "0.26.0"})
    labels = {"bcc": "0.26.0", "schema": "unknown", "job_manager": "unknown", "cgroups": "unknown"}
    assert metrics.registry.get_sample_value("adoptd_host_info", labels) == 1
