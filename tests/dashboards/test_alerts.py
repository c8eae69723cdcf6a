"""Every alert fires on what it is for, and is quiet on what merely looks like it. Evaluated by promtool."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Collection, Dict, List, Mapping

import pytest
import yaml

from dashboards.board_file import DASHBOARDS

# An hour and a half of samples, one a minute, and the end of it.
_END = "90m"

_AT = 'job="adoptd", instance="n1"'


@dataclass(frozen=True)
class Case:
    """Series in promtool's notation (start+stepxtimes) on which an alert is firing at the end, and on which not."""

    alert: str
    firing: Mapping[str, str]
    quiet: Mapping[str, str]


def _up(down: int, answering: int, cluster: str = "one") -> Dict[str, str]:
    """A cluster of which so many agents stop answering ten minutes before the end, and so many do not."""
    values = {number: "1x80 0x10" if number < down else "1x90" for number in range(down + answering)}
    return {f'up{{job="adoptd", cluster="{cluster}", instance="n{number}"}}': each for number, each in values.items()}


def _written(values: str, file: str = "adoptd.prom") -> Dict[str, str]:
    """When node_exporter saw its file written."""
    return {f'node_textfile_mtime_seconds{{job="node", instance="n1", file="/var/lib/metrics/{file}"}}': values}


def _adoptions(
    outcome: str, reason: str, values: str, mode: str = "enforce", phase: str = "account", cluster: str = "one"
) -> Dict[str, str]:
    at = f'{_AT}, cluster="{cluster}"'
    labels = f'{at}, phase="{phase}", mode="{mode}", outcome="{outcome}", reason="{reason}", witness="none"'
    return {f"adoptd_adoptions_total{{{labels}}}": values}


def _asked(reason: str, values: str, outcome: str = "unknown") -> Dict[str, str]:
    return {f'adoptd_callerid_asked_total{{{_AT}, outcome="{outcome}", reason="{reason}", witness="none"}}': values}


def _answered(reason: str, values: str) -> Dict[str, str]:
    return {f'adoptd_callerid_answered_total{{{_AT}, outcome="unknown", reason="{reason}", witness="none"}}': values}


def _refused(socket: str, reason: str, values: str) -> Dict[str, str]:
    return {f'adoptd_messages_refused_total{{{_AT}, socket="{socket}", reason="{reason}"}}': values}


def _buckets(below: str, above: str, phase: str = "account") -> Dict[str, str]:
    """Logins of which ``below`` took at most 0.1 s and ``above`` up to 1 s (counts, cumulative as buckets are)."""
    name = "adoptd_adoption_duration_seconds_bucket"
    at = f'{_AT}, phase="{phase}"'
    return {
        f'{name}{{{at}, le="0.1"}}': below,
        f'{name}{{{at}, le="0.5"}}': below,
        f'{name}{{{at}, le="1.0"}}': above,
        f'{name}{{{at}, le="+Inf"}}': above,
    }


_OUTSIDE = 'phase="account", mode="enforce", outcome="allowed", reason="adopt_failure", witness="none"'
_MALFORMED = 'socket="pam", reason="malformed"'
_SILENT = 'stage="adopt", fault="step_silent"'
_TIMEOUT = 'outcome="unknown", reason="timeout", witness="none"'
_OWNER = 'outcome="job", reason="owner", witness="none"'
_NODES = 60


def _everywhere(metric: str, labels: str, in_half_an_hour: int) -> Dict[str, str]:
    """So many times in the last half an hour on all nodes of a cluster together, each minute on another node."""
    nodes: Dict[str, str] = {}
    for number in range(_NODES):
        at = {60 + each * 30 // in_half_an_hour for each in range(in_half_an_hour) if each % _NODES == number}
        nodes[f'{metric}{{job="adoptd", cluster="one", instance="n{number}", {labels}}}'] = _counted(at)
    return nodes


def _by_turns(metric: str, labels: str, every: int = 3, times: int = 1) -> Dict[str, str]:
    """Nodes of that cluster where it happens thrice in twelve minutes; with the third they are over their own bound.

    That lasts until the first is a quarter of an hour ago, three minutes; by then it is the next one's turn, unless
    ``every`` is more.
    """
    return {
        f'{metric}{{job="adoptd", cluster="one", instance="turn{first}", {labels}}}': _counted(
            {first, first + 6, first + 12}, times
        )
        for first in range(40, 90, every)
    }


def _steadily(metric: str, labels: str, a_minute: int) -> Dict[str, str]:
    """One more node of that cluster."""
    return {f'{metric}{{job="adoptd", cluster="one", instance="steady", {labels}}}': f"0+{a_minute}x90"}


def _counted(at: Collection[int], times: int = 1) -> str:
    """A counter that goes up in those minutes, by ``times``."""
    return " ".join(str(times * sum(each <= minute for each in at)) for minute in range(91))


def _slow_nodes(nodes: int, slow: int) -> Dict[str, str]:
    """A login every half an hour at each, of which ``slow`` nodes' take up to 1 s."""
    made: Dict[str, str] = {}
    for number in range(nodes):
        at = f'job="adoptd", cluster="one", instance="n{number}", phase="account"'
        # Another minute for each.
        steps = " ".join(str((minute + number % 30) // 30) for minute in range(91))
        for le in ("0.1", "0.5", "1.0", "+Inf"):
            # Those that are slow are spread over the minutes.
            is_in = le in ("1.0", "+Inf") or number % nodes >= slow
            made[f'adoptd_adoption_duration_seconds_bucket{{{at}, le="{le}"}}'] = steps if is_in else "0x90"
    return made


CASES = (
    # A node that starts again takes up to ten minutes.
    Case("AdoptdDown", {f"up{{{_AT}}}": "1x60 0x30"}, {f"up{{{_AT}}}": "1x80 0x10"}),
    # A site without a port: the file is as it was.
    Case("AdoptdDown", _written("60+60x60 3660x30"), {**_written("60+60x90"), **_written("60x90", "other.prom")}),
    # All agents are in a job of another name; in ours; or write files.
    Case("AdoptdNotScraped", {'up{job="agents", instance="n1"}': "1x90"}, {f"up{{{_AT}}}": "0x90"}),
    Case("AdoptdNotScraped", {f"up{{{_AT}}}": "1x60 stale _x29"}, _written("60+60x90")),
    # Four of thirty; and two of two, or three of thirty, which are rather those nodes' business.
    Case("AdoptdManyDown", _up(4, 26), {**_up(2, 0), **_up(3, 27, "other")}),
    Case(
        "AdoptdLoginsOutsideJobs",
        _adoptions("ignored", "generic_failure", "0+1x90"),
        # Observed only; a user without a job who was let in because the site wants it so; the other phase.
        {
            **_adoptions("ignored", "generic_failure", "0+1x90", mode="observe"),
            **_adoptions("ignored", "no_jobs", "0+1x90"),
            **_adoptions("allowed", "adopt_failure", "0+1x90", phase="session"),
        },
    ),
    Case(
        # One an hour at each of sixty nodes: at none of them often.
        "AdoptdLoginsOutsideJobs",
        _everywhere("adoptd_adoptions_total", _OUTSIDE, 60),
        _everywhere("adoptd_adoptions_total", _OUTSIDE, 12),
    ),
    Case(
        # So, and at each moment one of many more is over its own bound, never for long; or that one alone.
        "AdoptdLoginsOutsideJobs",
        {
            **_everywhere("adoptd_adoptions_total", _OUTSIDE, 60),
            **_by_turns("adoptd_adoptions_total", _OUTSIDE),
        },
        _by_turns("adoptd_adoptions_total", _OUTSIDE, every=9),
    ),
    Case(
        # The one node that is named does not make it many; nor do the others.
        "AdoptdLoginsOutsideJobs",
        {
            **_everywhere("adoptd_adoptions_total", _OUTSIDE, 12),
            **_steadily("adoptd_adoptions_total", _OUTSIDE, 1),
        },
        _everywhere("adoptd_adoptions_total", _OUTSIDE, 12),
    ),
    Case(
        # The first after a restart of all: those series were there at 0.
        "AdoptdLoginsOutsideJobs",
        {f"adoptd_adoptions_total{{{_AT}, {_OUTSIDE}}}": "0x77 5x12"},
        {f"adoptd_adoptions_total{{{_AT}, {_OUTSIDE}}}": "_x77 5x12"},
    ),
    Case(
        "AdoptdLoginsUnanswered",
        _everywhere("adoptd_messages_refused_total", _MALFORMED, 60),
        _everywhere("adoptd_messages_refused_total", _MALFORMED, 12),
    ),
    Case(
        "AdoptdLoginsUnanswered",
        {
            **_everywhere("adoptd_messages_refused_total", _MALFORMED, 60),
            **_by_turns("adoptd_messages_refused_total", _MALFORMED),
        },
        _by_turns("adoptd_messages_refused_total", _MALFORMED, every=9),
    ),
    Case(
        "AdoptdLoginsUnanswered",
        _refused("pam", "malformed", "0+1x90"),
        # Somebody on another socket; a process that is not root's; one that hung up.
        {
            **_refused("peer", "malformed", "0+1x90"),
            **_refused("pam", "not_root", "0+1x90"),
            **_refused("pam", "process_gone", "0+1x90"),
        },
    ),
    Case(
        "AdoptdMostLoginsDenied",
        {**_adoptions("denied", "no_jobs", "0+10x90"), **_adoptions("adopted", "only_job", "0+0x90")},
        # A script that tries all nodes once, at a quiet time; users with jobs beside it.
        {
            **_adoptions("denied", "no_jobs", "0x70 500x20"),
            **_adoptions("denied", "no_jobs", "0+10x90", cluster="other"),
            **_adoptions("adopted", "only_job", "0+10x90", cluster="other"),
        },
    ),
    Case(
        "AdoptdJobManagerFaults",
        {f'adoptd_job_faults_total{{{_AT}, stage="adopt", fault="step_silent"}}': "0+1x90"},
        # No login failed of it; or jobs that ended in between, and sources of another cluster.
        {
            f'adoptd_job_faults_total{{{_AT}, stage="worked_around", fault="stale_socket"}}': "0+1x90",
            f'adoptd_job_faults_total{{{_AT}, stage="adopt", fault="job_ended"}}': "0+1x90",
            f'adoptd_job_faults_total{{{_AT}, stage="adopt", fault="process_gone"}}': "0+1x90",
            f'adoptd_job_faults_total{{{_AT}, stage="ask_source", fault="other_cluster"}}': "0+1x90",
        },
    ),
    Case(
        "AdoptdJobManagerFaults",
        _everywhere("adoptd_job_faults_total", _SILENT, 60),
        _everywhere("adoptd_job_faults_total", _SILENT, 12),
    ),
    Case(
        "AdoptdJobManagerFaults",
        {**_everywhere("adoptd_job_faults_total", _SILENT, 60), **_by_turns("adoptd_job_faults_total", _SILENT)},
        _by_turns("adoptd_job_faults_total", _SILENT, every=9),
    ),
    # At each node there is a login every half an hour, and it takes long; or one in four does.
    Case("AdoptdLoginsSlow", _slow_nodes(60, 60), _slow_nodes(60, 15)),
    Case("AdoptdLoginsSlow", _buckets("0+50x90", "0+60x90"), _buckets("0+60x90", "0+60x90")),
    Case(
        "AdoptdSourcesDoNotAnswer",
        {**_asked("timeout", "0+2x90"), **_asked("owner", "0+4x90", "job")},
        # One in ten; an answer that says "unknown" is an answer.
        {**_asked("timeout", "0+1x90"), **_asked("owner", "0+9x90", "job"), **_asked("not_found", "0+9x90")},
    ),
    Case(
        "AdoptdSourcesDoNotAnswer",
        # Twice in half an hour from each of sixty nodes; and one of a few nodes that all ask once.
        _everywhere("adoptd_callerid_asked_total", _TIMEOUT, 120),
        _everywhere("adoptd_callerid_asked_total", _TIMEOUT, 60),
    ),
    Case(
        "AdoptdSourcesDoNotAnswer",
        # A third has no answer, and at each moment a node that asks more has none at all; or nearly only that one.
        {
            **_everywhere("adoptd_callerid_asked_total", _TIMEOUT, 60),
            **_everywhere("adoptd_callerid_asked_total", _OWNER, 120),
            **_by_turns("adoptd_callerid_asked_total", _TIMEOUT, times=4),
        },
        {
            **_everywhere("adoptd_callerid_asked_total", _OWNER, 300),
            **_by_turns("adoptd_callerid_asked_total", _TIMEOUT, every=9, times=4),
        },
    ),
    Case(
        "AdoptdSourcesDoNotAnswer",
        # One node has most of all that is not answered, and is named; or of what is answered.
        {
            **_everywhere("adoptd_callerid_asked_total", _OWNER, 300),
            **_steadily("adoptd_callerid_asked_total", _TIMEOUT, 9),
        },
        {
            **_everywhere("adoptd_callerid_asked_total", _TIMEOUT, 60),
            **_steadily("adoptd_callerid_asked_total", _OWNER, 20),
        },
    ),
    Case("AdoptdAnswersNotBelieved", _asked("bad_seal", "0+1x90"), _asked("timeout", "0+1x90")),
    Case(
        "AdoptdQuestionsRefused",
        _refused("peer", "bad_seal", "0+1x90"),
        # The last is a scan of the port, which happens to say what looks like a question.
        {
            **_refused("user", "malformed", "0+1x90"),
            **_refused("peer", "slow", "0+1x90"),
            **_refused("peer", "bad_seal", "0x80 2x10"),
        },
    ),
    Case("AdoptdTooManyRequests", _refused("peer", "too_many", "0+5x90"), _refused("peer", "too_many", "0x60 1x30")),
    Case(
        "AdoptdSealUnavailable",
        # Whichever end of a question it is.
        _asked("seal_unavailable", "0+1x90"),
        {**_asked("closed", "0+1x90"), **_refused("pam", "unavailable", "0+1x90")},
    ),
    Case("AdoptdSealUnavailable", _refused("peer", "unavailable", "0+1x90"), _refused("peer", "bad_seal", "0+1x90")),
    Case(
        "AdoptdWitnessesDisagree",
        _answered("disagreement", "0x80 1x10"),
        _answered("not_found", "0+1x90"),
    ),
    Case(
        "AdoptdProbeNotAttached",
        {f"adoptd_probe_attached{{{_AT}}}": "1x60 0x30"},
        {f"adoptd_probe_attached{{{_AT}}}": "1x80 0x10"},
    ),
    Case(
        "AdoptdProbeNotAttached",
        # Loaded nowhere since the agent's start: there was no self-test.
        {f"adoptd_probe_attached{{{_AT}}}": "0x90"},
        # That is AdoptdSelfTestFails'.
        {f"adoptd_probe_attached{{{_AT}}}": "0x90", f"adoptd_probe_self_test_success{{{_AT}}}": "0x90"},
    ),
    Case(
        "AdoptdSelfTestFails",
        {f"adoptd_probe_self_test_success{{{_AT}}}": "1x60 0x30"},
        {
            f"adoptd_probe_self_test_success{{{_AT}}}": "1x90",
            f"adoptd_probe_self_test_timestamp_seconds{{{_AT}}}": "0+60x90",
        },
    ),
    Case(
        "AdoptdSelfTestFails",
        # There has been none for half an hour.
        {
            f"adoptd_probe_self_test_success{{{_AT}}}": "1x90",
            f"adoptd_probe_self_test_timestamp_seconds{{{_AT}}}": "0+60x60 3600x30",
        },
        # The node's clock is an hour behind.
        {
            f"adoptd_probe_self_test_success{{{_AT}}}": "1x90",
            f"adoptd_probe_self_test_timestamp_seconds{{{_AT}}}": "-3600+60x90",
        },
    ),
    Case(
        "AdoptdSelfTestFails",
        {f"adoptd_probe_self_test_timestamp_seconds{{{_AT}}}": "0x90"},
        # The node went down before its agent made its second test.
        {f"adoptd_probe_self_test_timestamp_seconds{{{_AT}}}": "_x77 4620x1 stale _x11"},
    ),
    Case(
        "AdoptdSessionsEscape",
        {f'adoptd_escapes_total{{{_AT}, mover="root", outcome="failed"}}': "0x80 1x10"},
        {f'adoptd_escapes_total{{{_AT}, mover="root", outcome="failed"}}': "7x90"},
    ),
    Case(
        "AdoptdSessionsEscape",
        # One after the other, as where pam_systemd comes last; and a few that a user started in a scope.
        {f'adoptd_escapes_total{{{_AT}, mover="systemd", outcome="readopted"}}': "0+1x90"},
        {f'adoptd_escapes_total{{{_AT}, mover="systemd", outcome="readopted"}}': "0x80 3x10"},
    ),
    Case(
        "AdoptdSessionsOutside",
        # Long after what moved it; and one whose turn to be put back was to come, or whose job was just ending.
        {f'adoptd_sessions_outside{{{_AT}, out_of="running_job"}}': "0x10 1x80"},
        {
            f'adoptd_sessions_outside{{{_AT}, out_of="running_job"}}': "0x60 1x10 0x20",
            f'adoptd_sessions_outside{{{_AT}, out_of="ended_job"}}': "0x80 2x10",
        },
    ),
    Case(
        "AdoptdSessionsOutside",
        {f'adoptd_sessions_outside{{{_AT}, out_of="ended_job"}}': "0x60 2x30"},
        {"adoptd_sessions{" + _AT + "}": "5x90"},
    ),
    Case(
        "AdoptdReloadFailed",
        {f"adoptd_config_last_reload_success{{{_AT}}}": "1x60 0x30"},
        {f"adoptd_config_last_reload_success{{{_AT}}}": "0x60 1x30"},
    ),
    Case(
        "AdoptdRestarts",
        {f"adoptd_process_start_time_seconds{{{_AT}}}": "0x50 100x8 200x8 300x8 400x16"},
        # Somebody else's process, which restarts as well.
        {'process_start_time_seconds{job="other", instance="n1"}': "0x50 100x8 200x8 300x8 400x16"},
    ),
    Case(
        "AdoptdMemoryGrows",
        {f"adoptd_process_resident_memory_bytes{{{_AT}}}": "200000000x90"},
        {f"adoptd_process_resident_memory_bytes{{{_AT}}}": "30000000x90"},
    ),
    Case(
        "AdoptdObservedDisagreement",
        {f'adoptd_observed_total{{{_AT}, agreement="disagree", found="other_job", would="adopt"}}': "0x80 1x10"},
        {f'adoptd_observed_total{{{_AT}, agreement="agree", found="that_job", would="adopt"}}': "0+1x90"},
    ),
)


def test_every_alert_has_a_case() -> None:
    document = yaml.safe_load((DASHBOARDS / "alerts.yml").read_text(encoding="utf-8"))
    names = [rule["alert"] for group in document["groups"] for rule in group["rules"]]
    assert {case.alert for case in CASES} == set(names)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_the_alert_fires_and_is_quiet(case: Case, tmp_path: Path) -> None:
    firing = {"expr": f'ALERTS{{alertname="{case.alert}", alertstate="firing"}}', "eval_time": _END}
    tests: List[Dict[str, object]] = []
    for series, count in ((case.firing, 1), (case.quiet, 0)):
        counted = {**firing, "expr": f"count({firing['expr']}) or vector(0)"}
        tests.append(
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [{**counted, "exp_samples": [{"labels": "{}", "value": count}]}],
            }
        )
    file = tmp_path / "tests.yml"
    rules = [str(DASHBOARDS / name) for name in ("rules.yml", "alerts.yml")]
    file.write_text(yaml.safe_dump({"rule_files": rules, "evaluation_interval": "1m", "tests": tests}))
    promtool = shutil.which("promtool")
    assert promtool, "promtool is missing: it comes with Debian's package prometheus"
    done = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
