"""The metrics: names, types, help texts and labels are an interface, kept in golden/metrics.txt.

After a change that is meant: ADOPTD_UPDATE_GOLDEN=1 pytest tests/unit/test_metrics.py, and read the diff.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Dict, FrozenSet, List, Set, Tuple

import pytest
from prometheus_client import generate_latest

from adoptd.callerid import AskFault
from adoptd.metrics import Door, Metrics, Refusal
from adoptd.model import Witness
from adoptd.policy import Situation, Step
from adoptd.wire.callerid import Outcome, Reason
from adoptd.wire.pam import Mode, Phase

GOLDEN = Path(__file__).with_name("golden") / "metrics.txt"

PROBE_KINDS = {"storage_failed": 3, "wrong_family": 0}


def filled() -> Metrics:
    """Metrics in which every family has at least one series."""
    metrics = Metrics()
    metrics.adoptions.labels("account", "enforce", "adopted", "callerid").inc()
    metrics.adoption_seconds.labels("account").observe(0.002)
    metrics.count_asked(Outcome.JOB, Reason.OWNER.value, Witness.BPF, 0.002)
    metrics.count_asked(Outcome.UNKNOWN, AskFault.TIMEOUT.value, None, 2.0)
    metrics.count_answered(Outcome.NO_JOB, Reason.OWNER.value, None, 0.001)
    metrics.refuse(Door.PEER, Refusal.BAD_SEAL)
    metrics.show_witnesses({Witness.BPF: True, Witness.DIAG: False})
    metrics.watch_probe(lambda: PROBE_KINDS)
    metrics.show_self_test(True)
    return metrics


def interface(metrics: Metrics) -> str:
    """One block per family: name, type, help and label names, without the families of the process collector."""
    blocks: List[str] = []
    for family in metrics.registry.collect():
        if family.name.startswith("process_"):
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


ADOPTION_REASONS = {member.value for member in Situation} | {member.value for member in Step} | {"account_phase"}
CALLERID_REASONS = {member.value for member in Reason} | {member.value for member in AskFault}
WITNESSES = {member.value for member in Witness}

# Every label of every family, with all values it may ever have; build_info has one series per build.
CLOSED: Dict[Tuple[str, str], Set[str]] = {
    ("adoptd_adoptions", "phase"): {phase.name.lower() for phase in Phase},
    ("adoptd_adoptions", "mode"): {mode.name.lower() for mode in Mode},
    ("adoptd_adoptions", "outcome"): {"adopted", "allowed", "denied", "ignored"},
    ("adoptd_adoptions", "reason"): ADOPTION_REASONS,
    ("adoptd_adoption_duration_seconds", "phase"): {phase.name.lower() for phase in Phase},
    ("adoptd_callerid_asked", "outcome"): {outcome.value for outcome in Outcome},
    ("adoptd_callerid_asked", "reason"): CALLERID_REASONS,
    ("adoptd_callerid_asked", "witness"): WITNESSES | {"none"},
    ("adoptd_callerid_answered", "outcome"): {outcome.value for outcome in Outcome},
    ("adoptd_callerid_answered", "reason"): {reason.value for reason in Reason},
    ("adoptd_callerid_answered", "witness"): WITNESSES | {"none"},
    ("adoptd_messages_refused", "socket"): {door.value for door in Door},
    ("adoptd_messages_refused", "reason"): {reason.value for reason in Refusal},
    ("adoptd_requests_in_flight", "socket"): {door.value for door in Door},
    ("adoptd_witness_up", "witness"): WITNESSES,
    ("adoptd_probe_events", "kind"): set(PROBE_KINDS),
}
OF_THE_BUILD: FrozenSet[str] = frozenset({"version", "python", "kernel"})


def test_every_label_has_a_closed_set() -> None:
    """No family has a label that is not listed above: no user, job, pid, address or connection."""
    found: Set[Tuple[str, str]] = set()
    for family in filled().registry.collect():
        for sample in family.samples:
            for label, value in sample.labels.items():
                if label == "le" or family.name.startswith("process_"):
                    continue
                if family.name == "adoptd_build_info":
                    assert label in OF_THE_BUILD
                    continue
                found.add((family.name, label))
                assert value in CLOSED[family.name, label]
    assert found == set(CLOSED)


def test_label_values_are_plain_words() -> None:
    """Values are written in queries and alert rules: lower case, digits and underscores."""
    for values in CLOSED.values():
        for value in values:
            assert value.replace("_", "").isalnum()
            assert value == value.lower()


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
