"""Alerts: each names what a person should do about, how soon, and where the runbook says how.

Owns thresholds and waiting times. ``critical`` wakes somebody: users are locked out, or run outside their jobs.
``warning`` is for the working day: one node that is down or restarted is daily life in a cluster. An alert without a
section in docs/runbook.md fails a test, and so does one whose fault nobody has made (tests/dashboards/faults.py).

A label that says which fault it is stays in the alert (``by``): whoever is called need not look it up first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List

from generate.queries import DISBELIEVED, GATE, OUTSIDE, PATH, UNHEARD, UNSEALED

# Relative: the project has no address of its own yet. Sites that copy the runbook set external labels or a link.
RUNBOOK = "docs/runbook.md"
# Below Grafana's own address; of the node or the cluster that it is about.
BOARD = (
    f"{PATH}?from=now-3h{{{{ with $labels.cluster }}}}&var-cluster={{{{ . }}}}{{{{ end }}}}"
    "{{ with $labels.instance }}&var-node={{ . }}{{ end }}"
)

CRITICAL, WARNING = "critical", "warning"

# Which labels say of one node, or of a whole cluster, that it is that one.
CLUSTER = "cluster, job"
NODE = f"{CLUSTER}, instance"


@dataclass(frozen=True)
class Alert:
    """One alerting rule. ``hold`` is how long the expression must be true first (Prometheus' ``for``)."""

    name: str
    severity: str
    hold: str
    expression: str
    summary: str
    description: str


def _counted(metric: str, where: str = "", window: str = "15m", by: str = "", per: str = NODE) -> str:
    """How often, by node (or ``per`` cluster), and by the labels named (separated by commas)."""
    labels = f"{per}, {by}" if by else per
    return f"sum by ({labels}) (increase({metric}{{{where}}}[{window}]))"


def _often(metric: str, where: str, by: str, on_a_node: int, on_many: int) -> str:
    """More often than ``on_a_node`` on one node or than ``on_many`` on all the others of its cluster together.

    What goes wrong everywhere may do so once an hour on each of a thousand nodes, where few log in. By chance one of
    them is nearly always over its own bound for a minute or two: left out of the sum, it does not end the sum's wait.
    """
    node = _counted(metric, where, by=by)
    return f"({node} > {on_a_node}) or (sum by ({CLUSTER}, {by}) ({node} <= {on_a_node}) > {on_many})"


def _among(label: str, values: str) -> str:
    return f'{label}=~"{values}"'


LOGINS, ASKED, REFUSED = "adoptd_adoptions_total", "adoptd_callerid_asked_total", "adoptd_messages_refused_total"
STAYED, PUT_BACK = 'outcome!="readopted"', 'outcome="readopted"'
# Questions that no agent of the site would send.
FOREIGN = "bad_seal|expired|rewound|replayed|foreign|wrong_host|other_version"
# Requests of pam_adopt.so that it was owed an answer to; process_gone is a login that hung up.
OWED = "malformed|internal|unavailable"
# Faults that are no fault of the job manager's: a job or a login that ended in between, a source in another cluster.
NO_FAULT = "job_ended|process_gone|other_cluster"
# As docs/admin.md has [metrics] textfile.
TEXTFILE = ".*/adoptd.*prom"
# What increase() works out is no whole number.
TIMES = '{{ printf "%.0f" $value }}'
# Where a site names its clusters.
OF_CLUSTER = "{{ with $labels.cluster }} of {{ . }}{{ end }}"
# Of what is counted by node or by cluster.
ON = f"on {{{{ with $labels.instance }}}}{{{{ . }}}}{{{{ else }}}}many nodes{OF_CLUSTER}{{{{ end }}}}"


def _logins(where: str) -> str:
    """How many in 15 minutes, by cluster."""
    return _counted(LOGINS, where, per=CLUSTER)


def _unheard_of(on_a_node: int, on_many: int) -> str:
    """Questions that no node answered, where they are a fifth of more than so many; otherwise as ``_often``."""
    unheard, asked = _counted(ASKED, _among("reason", UNHEARD)), _counted(ASKED)
    node = f"{unheard} > 0.2 * ({asked} > {on_a_node})"
    rest = [f"sum by ({CLUSTER}) ({each} unless ({node}))" for each in (unheard, asked)]
    return f"({node}) or ({rest[0]} > 0.2 * ({rest[1]} > {on_many}))"


def _agents(where: str = "") -> str:
    """How many are to be scraped, by cluster."""
    return f'count by (cluster, job) (up{{job="adoptd"}}{where})'


ALERTS = (
    Alert(
        "AdoptdDown",
        WARNING,
        # A large node takes as long to start.
        "15m",
        # Of a site that opens no port, by the file that the agent writes every 15 s.
        f'up{{job="adoptd"}} == 0 or changes(node_textfile_mtime_seconds{{file=~"{TEXTFILE}"}}[5m]) == 0',
        "The agent on {{ $labels.instance }} does not answer",
        "Is the node up? Then logins there follow action_generic_failure: by default pam_adopt.so steps aside for the "
        "next PAM module.",
    ),
    Alert(
        "AdoptdNotScraped",
        WARNING,
        "15m",
        # Without it a scrape job of another name, or one that lost its targets, is taken for a cluster that is well.
        f'absent(up{{job="adoptd"}}) unless on () node_textfile_mtime_seconds{{file=~"{TEXTFILE}"}}',
        "Prometheus scrapes no agent, so nothing of adoptd's is alerted on",
        "There is no target in a scrape job called {{ $labels.job }}, and node_exporter reads no agent's file.",
    ),
    Alert(
        "AdoptdManyDown",
        CRITICAL,
        "5m",
        f"({_agents(' == 0')} > 2) > 0.1 * {_agents()}",
        f"{{{{ $value }}}} agents{OF_CLUSTER} do not answer",
        "More than a tenth of all: an update or a configuration that went to all of them? Logins there follow "
        "action_generic_failure.",
    ),
    Alert(
        "AdoptdLoginsOutsideJobs",
        CRITICAL,
        "10m",
        _often(LOGINS, f"{GATE}, {OUTSIDE}", "reason", 2, 10),
        f"Sessions {ON} run outside any job",
        f"{TIMES} logins in 15 minutes were let in without being put into a job: {{{{ $labels.reason }}}}.",
    ),
    Alert(
        "AdoptdLoginsUnanswered",
        CRITICAL,
        "10m",
        _often(REFUSED, f'socket="pam", {_among("reason", OWED)}', "reason", 2, 10),
        f"The agent {ON} gives pam_adopt.so no answer",
        f"{TIMES} requests in 15 minutes were refused: {{{{ $labels.reason }}}}. Such logins follow "
        "action_generic_failure: by default they are let in, outside any job.",
    ),
    Alert(
        "AdoptdMostLoginsDenied",
        CRITICAL,
        # Longer than what is looked at: one user who tries every node once is not the end of the world.
        "20m",
        _logins(f'{GATE}, outcome="denied"') + f" > 0.9 * ({_logins(GATE)} > 20)",
        f"Nearly all logins{OF_CLUSTER} are denied",
        f"{TIMES} denials in 15 minutes, more than 90 % of all logins: are jobs still found?",
    ),
    Alert(
        "AdoptdJobManagerFaults",
        WARNING,
        "10m",
        _often("adoptd_job_faults_total", f'stage!="worked_around", fault!~"{NO_FAULT}"', "stage, fault", 2, 10),
        f"The job manager fails logins {ON}",
        f"{TIMES} times in 15 minutes: fault {{{{ $labels.fault }}}} in the stage {{{{ $labels.stage }}}}.",
    ),
    Alert(
        "AdoptdLoginsSlow",
        WARNING,
        "15m",
        # Or, where few log in at each node, every second login of all.
        'instance_phase:adoptd_adoption_duration_seconds:p99_rate5m{phase="account"} > 0.5 or '
        'cluster_phase:adoptd_adoption_duration_seconds:p50_rate5m{phase="account"} > 0.5',
        f"Logins {ON} are held up",
        "The slowest {{ with $labels.instance }}1 %{{ else }}half{{ end }} take {{ $value | humanizeDuration }} or "
        "more; the budget is 1 s by default.",
    ),
    Alert(
        "AdoptdSourcesDoNotAnswer",
        WARNING,
        "15m",
        _unheard_of(10, 50),
        f"More than a fifth of the questions to other nodes, asked {ON}, is not answered",
        f"{TIMES} questions in 15 minutes had no answer; by default a user with several jobs then lands in the newest.",
    ),
    Alert(
        "AdoptdAnswersNotBelieved",
        WARNING,
        "5m",
        _counted(ASKED, _among("reason", DISBELIEVED), by="reason") + " > 3",
        "{{ $labels.instance }} does not believe what other nodes answer",
        f"{TIMES} answers in 15 minutes were none of an agent's: {{{{ $labels.reason }}}}. Does somebody answer in an "
        "agent's place?",
    ),
    Alert(
        "AdoptdQuestionsRefused",
        WARNING,
        "5m",
        _counted(REFUSED, f'socket="peer", {_among("reason", FOREIGN)}', by="reason") + " > 5",
        "{{ $labels.instance }} refuses questions from other hosts",
        f"{TIMES} questions in 15 minutes: {{{{ $labels.reason }}}}. A node with another key, clock or version, this "
        "one or the one that asks, or an attempt.",
    ),
    Alert(
        "AdoptdTooManyRequests",
        WARNING,
        "5m",
        _counted(REFUSED, 'reason="too_many"', by="socket") + " > 20",
        "{{ $labels.instance }} turns requests away",
        f"{TIMES} requests in 15 minutes were over the bound of the {{{{ $labels.socket }}}} socket: a flood, or a "
        "login storm.",
    ),
    Alert(
        "AdoptdSealUnavailable",
        WARNING,
        "10m",
        _counted(ASKED, f'reason="{UNSEALED}"')
        + " > 2 or "
        + _counted(REFUSED, 'socket="peer", reason="unavailable"')
        + " > 2",
        "{{ $labels.instance }} cannot seal: it does not ask other nodes, or does not answer them",
        f"{TIMES} times in 15 minutes: munged does not work there, or is overloaded. By default a user with several "
        "jobs then lands in the newest.",
    ),
    Alert(
        "AdoptdWitnessesDisagree",
        WARNING,
        "0m",
        _counted("adoptd_callerid_answered_total", _among("reason", "disagreement|ambiguous"), "1h", "reason") + " > 0",
        "Connections from {{ $labels.instance }} have no certain owner",
        f"{TIMES} in an hour: {{{{ $labels.reason }}}}. A program that changes users, or a user posing as another.",
    ),
    Alert(
        "AdoptdProbeNotAttached",
        WARNING,
        "15m",
        # A self-test that failed has an alert of its own.
        "adoptd_probe_attached == 0 unless on (cluster, job, instance) adoptd_probe_self_test_success == 0",
        "{{ $labels.instance }} works without its BPF probe",
        "Connections are found by sock_diag and /proc: slower, and not for owners that have exited.",
    ),
    Alert(
        "AdoptdSelfTestFails",
        WARNING,
        "10m",
        # Of those that are there now: an agent that ended before its second test had none that changed either.
        "adoptd_probe_self_test_success == 0 or (changes(adoptd_probe_self_test_timestamp_seconds[15m]) == 0 "
        "and adoptd_probe_self_test_timestamp_seconds)",
        "The probe's self-test on {{ $labels.instance }} fails, or is not made any more",
        "The probe does not find the agent's own connection, and is not asked about others; or the agent is stuck.",
    ),
    Alert(
        "AdoptdSessionsEscape",
        WARNING,
        "0m",
        # One that was put back is nobody's work: users start things in scopes of their own, and the watch undoes it.
        f"({_counted('adoptd_escapes_total', STAYED, by='mover, outcome')} > 0) or "
        f"({_counted('adoptd_escapes_total', PUT_BACK, by='mover, outcome')} > 5)",
        "Sessions leave their jobs on {{ $labels.instance }}",
        f"{TIMES} times in 15 minutes a session's process was moved out of its job's cgroup by "
        "{{ $labels.mover }}: {{ $labels.outcome }}.",
    ),
    Alert(
        "AdoptdSessionsOutside",
        WARNING,
        # The watch tries six times, at worst once a minute; and a job that ends has its processes killed.
        "15m",
        "adoptd_sessions_outside > 0",
        "Sessions on {{ $labels.instance }} are out of their jobs and stay there",
        "{{ $value }} now ({{ $labels.out_of }}): not limited by the job, not accounted, and not ended with it. "
        "`adoptctl sessions` there names them.",
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
        "changes(adoptd_process_start_time_seconds[1h]) > 3",
        "The agent on {{ $labels.instance }} keeps restarting",
        "{{ $value }} starts in an hour.",
    ),
    Alert(
        "AdoptdMemoryGrows",
        WARNING,
        "30m",
        "adoptd_process_resident_memory_bytes > 150e6",
        "The agent on {{ $labels.instance }} uses {{ $value | humanize1024 }}B of memory",
        "About 30 MB is usual. Restart it (nothing is lost) and report it.",
    ),
    Alert(
        "AdoptdObservedDisagreement",
        WARNING,
        "0m",
        _counted("adoptd_observed_total", 'agreement="disagree"', "1h", "found, would") + " > 0",
        "Observe mode on {{ $labels.instance }} would have done otherwise",
        f"{TIMES} of the last hour's logins: the agent would say {{{{ $labels.would }}}}, and they were found in "
        "{{ $labels.found }}. Understand them before enforcing.",
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
                        "dashboard": BOARD,
                    },
                }
                for alert in ALERTS
            ],
        }
    ]
