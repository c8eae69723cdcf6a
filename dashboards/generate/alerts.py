"""Alerts: each names what a person should do about, how soon, and where the runbook says how.

Owns thresholds and waiting times. ``critical`` wakes somebody: users are locked out, or run outside their jobs.
``warning`` is for the working day. An alert without a section in docs/runbook.md fails a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List

from generate.queries import DISBELIEVED, GATE, OUTSIDE, UNHEARD

# Relative: the project has no address of its own yet. Sites that copy the runbook set external labels or a link.
RUNBOOK = "docs/runbook.md"

CRITICAL, WARNING = "critical", "warning"


@dataclass(frozen=True)
class Alert:
    """One alerting rule. ``hold`` is how long the expression must be true first (Prometheus' ``for``)."""

    name: str
    severity: str
    hold: str
    expression: str
    summary: str
    description: str


def _counted(metric: str, where: str = "", window: str = "15m") -> str:
    """How often, by node."""
    return f"sum by (cluster, job, instance) (increase({metric}{{{where}}}[{window}]))"


def _among(label: str, values: str) -> str:
    return f'{label}=~"{values}"'


LOGINS, ASKED, REFUSED = "adoptd_adoptions_total", "adoptd_callerid_asked_total", "adoptd_messages_refused_total"
# Questions that no agent of the site would send.
UNSEALED = "bad_seal|expired|rewound|replayed|foreign|wrong_host"


def _logins(where: str) -> str:
    """How many in 15 minutes, by cluster."""
    return f"sum by (cluster, job) (increase({LOGINS}{{{where}}}[15m]))"


ALERTS = (
    Alert(
        "AdoptdDown",
        CRITICAL,
        "5m",
        'up{job="adoptd"} == 0',
        "The agent on {{ $labels.instance }} does not answer",
        "Logins there follow action_generic_failure: by default pam_adopt.so steps aside for the next PAM module.",
    ),
    Alert(
        "AdoptdLoginsOutsideJobs",
        CRITICAL,
        "10m",
        _counted(LOGINS, f"{GATE}, {OUTSIDE}") + " > 2",
        "Sessions on {{ $labels.instance }} run outside any job",
        "{{ $value | humanize }} logins in 15 minutes were let in without being put into a job.",
    ),
    Alert(
        "AdoptdMostLoginsDenied",
        CRITICAL,
        "10m",
        _logins(f'{GATE}, outcome="denied"') + f" > 0.9 * ({_logins(GATE)} > 20)",
        "Nearly all logins are denied",
        "{{ $value | humanize }} denials in 15 minutes, more than 90 % of all logins: are jobs still found?",
    ),
    Alert(
        "AdoptdJobManagerFaults",
        WARNING,
        "10m",
        _counted("adoptd_job_faults_total", 'stage!="worked_around"') + " > 2",
        "The job manager fails logins on {{ $labels.instance }}",
        "{{ $value | humanize }} times in 15 minutes the job manager could not be asked, or did not adopt.",
    ),
    Alert(
        "AdoptdLoginsSlow",
        WARNING,
        "15m",
        'instance_phase:adoptd_adoption_duration_seconds:p99_rate5m{phase="account"} > 0.5',
        "Logins on {{ $labels.instance }} are held up",
        "The slowest 1 % take {{ $value | humanizeDuration }} or more; the budget is 1 s by default.",
    ),
    Alert(
        "AdoptdSourcesDoNotAnswer",
        WARNING,
        "15m",
        f"{_counted(ASKED, _among('reason', UNHEARD))} > 0.2 * ({_counted(ASKED)} > 10)",
        "More than a fifth of the nodes that {{ $labels.instance }} asks do not answer",
        "{{ $value | humanize }} questions in 15 minutes had no answer; such logins land in the newest job.",
    ),
    Alert(
        "AdoptdAnswersNotBelieved",
        WARNING,
        "5m",
        _counted(ASKED, _among("reason", DISBELIEVED)) + " > 3",
        "{{ $labels.instance }} does not believe what other nodes answer",
        "{{ $value | humanize }} answers in 15 minutes were sealed wrongly: keys or clocks differ, or somebody "
        "answers in an agent's place.",
    ),
    Alert(
        "AdoptdQuestionsRefused",
        WARNING,
        "5m",
        _counted(REFUSED, 'socket="peer", ' + _among("reason", UNSEALED)) + " > 5",
        "{{ $labels.instance }} refuses questions from other hosts",
        "{{ $value | humanize }} questions in 15 minutes were not sealed as the site's are.",
    ),
    Alert(
        "AdoptdTooManyRequests",
        WARNING,
        "5m",
        _counted(REFUSED, 'reason="too_many"') + " > 20",
        "{{ $labels.instance }} turns requests away",
        "{{ $value | humanize }} requests in 15 minutes were over a bound: a flood, or a login storm.",
    ),
    Alert(
        "AdoptdWitnessesDisagree",
        WARNING,
        "0m",
        _counted("adoptd_callerid_answered_total", _among("reason", "disagreement|ambiguous"), "1h") + " > 0",
        "Two witnesses contradict each other on {{ $labels.instance }}",
        "{{ $value | humanize }} connections in an hour had no certain owner: a fault, or a user posing as another.",
    ),
    Alert(
        "AdoptdProbeNotAttached",
        WARNING,
        "15m",
        "adoptd_probe_attached == 0",
        "{{ $labels.instance }} works without its BPF probe",
        "Connections are found by sock_diag and /proc: slower, and not for owners that have exited.",
    ),
    Alert(
        "AdoptdSelfTestFails",
        WARNING,
        "10m",
        "adoptd_probe_self_test_success == 0 or time() - adoptd_probe_self_test_timestamp_seconds > 900",
        "The probe on {{ $labels.instance }} does not find the agent's own connection",
        "Attribution there cannot be trusted, or the agent is stuck.",
    ),
    Alert(
        "AdoptdSessionsEscape",
        WARNING,
        "0m",
        _counted("adoptd_escapes_total") + " > 0",
        "Sessions leave their jobs on {{ $labels.instance }}",
        "{{ $value | humanize }} times in 15 minutes a session's process was moved out of its job's cgroup.",
    ),
    Alert(
        "AdoptdReloadFailed",
        WARNING,
        "5m",
        "adoptd_config_last_reload_success == 0",
        "{{ $labels.instance }} runs with an old configuration",
        "The last reload found an error; `adoptd config check` names it.",
    ),
    Alert(
        "AdoptdRestarts",
        WARNING,
        "0m",
        "changes(process_start_time_seconds[1h]) > 3 and on (cluster, job, instance) adoptd_build_info",
        "The agent on {{ $labels.instance }} keeps restarting",
        "{{ $value | humanize }} starts in an hour.",
    ),
    Alert(
        "AdoptdMemoryGrows",
        WARNING,
        "30m",
        "process_resident_memory_bytes > 150e6 and on (cluster, job, instance) adoptd_build_info",
        "The agent on {{ $labels.instance }} uses {{ $value | humanize1024 }}B of memory",
        "About 30 MB is usual. Restart it (nothing is lost) and report it.",
    ),
    Alert(
        "AdoptdObservedDisagreement",
        WARNING,
        "0m",
        _counted("adoptd_observed_total", 'agreement="disagree"', "1h") + " > 0",
        "Observe mode on {{ $labels.instance }} would have done otherwise",
        "{{ $value | humanize }} logins in an hour: understand them before enforcing.",
    ),
)


def alert_groups() -> List[Dict[str, object]]:
    """The groups of alerts.yml."""
    return [
        {
            "name": "adoptd-alerts",
            "rules": [
                {
                    "alert": alert.name,
                    "expr": alert.expression,
                    "for": alert.hold,
                    "labels": {"severity": alert.severity},
                    "annotations": {
                        "summary": alert.summary,
                        "description": alert.description,
                        "runbook": f"{RUNBOOK}#{alert.name.lower()}",
                    },
                }
                for alert in ALERTS
            ],
        }
    ]
