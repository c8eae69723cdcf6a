"""The rows that are read first: the fleet, and what is decided about logins."""

from __future__ import annotations

from generate.parts import BLUE, GREEN, RED, THIRD, YELLOW, Row, counted, graph, heat, number, rows
from generate.queries import FLEET, GATE, NODE, OUTSIDE, most, quantile, ratio, total

# A login's whole budget by default is 1 s; half of it is late enough to look.
_SLOW_S, _TOO_SLOW_S = 0.25, 0.5

TARGETS = f'up{{{FLEET}, job="adoptd"}}'


def fleet() -> Row:
    """Over all nodes of the clusters chosen."""
    return "Fleet: is anything wrong?", [
        number(
            "Agents up",
            "Nodes whose agent answers Prometheus.",
            "short",
            f"count(adoptd_build_info{{{FLEET}}})",
            [(None, RED), (1, GREEN)],
        ),
        number(
            "Agents that do not answer",
            "Nodes that Prometheus asks in vain: the node is down, or its agent. AdoptdDown below names them.",
            "short",
            f"count({TARGETS}) - sum({TARGETS})",
            [(None, GREEN), (1, YELLOW), (3, RED)],
        ),
        number(
            "Logins per second",
            "Account phases decided, all nodes, whatever came of them.",
            "reqps",
            total("adoptd_adoptions_total", f"{FLEET}, {GATE}"),
            [(None, BLUE)],
        ),
        number(
            "Let in outside a job",
            "Share of logins let in without a job because the job manager could not be asked, the adoption failed or "
            "the job could not be told. Above zero, users run outside their limits.",
            "percentunit",
            ratio(
                total("adoptd_adoptions_total", f"{FLEET}, {GATE}, {OUTSIDE}"),
                total("adoptd_adoptions_total", f"{FLEET}, {GATE}"),
            ),
            [(None, GREEN), (0.001, YELLOW), (0.01, RED)],
        ),
        number(
            "Denied",
            "Share of logins denied. Some is normal (users without a job); a jump means that jobs are not found.",
            "percentunit",
            ratio(
                total("adoptd_adoptions_total", f'{FLEET}, {GATE}, outcome="denied"'),
                total("adoptd_adoptions_total", f"{FLEET}, {GATE}"),
            ),
            [(None, GREEN), (0.5, YELLOW), (0.9, RED)],
        ),
        number(
            "Login, 99th percentile",
            "How long the account phase held up 99 of 100 logins, all nodes.",
            "s",
            quantile(0.99, "adoptd_adoption_duration_seconds", f'{FLEET}, phase="account"'),
            [(None, GREEN), (_SLOW_S, YELLOW), (_TOO_SLOW_S, RED)],
        ),
        rows(
            "Firing now",
            "Every alert of adoptd's that fires, critical ones first: docs/runbook.md has a section for each. Empty is "
            "good.",
            "count by (severity, alertname, cluster, instance) "
            f'(ALERTS{{{FLEET}, alertname=~"Adoptd.+", alertstate="firing"}})',
            ("severity", "alertname", "cluster", "instance"),
        ),
        rows(
            "Nodes with most logins outside a job, last hour",
            "Where to look first. Empty is good.",
            f"topk(10, sum by (cluster, instance, reason) "
            f"(increase(adoptd_adoptions_total{{{FLEET}, {GATE}, {OUTSIDE}}}[1h])) > 0)",
            ("cluster", "instance", "reason"),
            "logins",
        ),
        rows(
            "Agents by release, probe and job manager",
            "More than one release for long: an update stopped half-way. Schema none: the probe is not loaded.",
            f"count by (version, kernel, bcc, schema, job_manager, cgroups) (adoptd_build_info{{{FLEET}}} "
            "* on (cluster, job, instance) group_left (bcc, schema, job_manager, cgroups) adoptd_host_info)",
            ("version", "job_manager", "kernel", "cgroups", "bcc", "schema"),
            "nodes",
        ),
        graph(
            "Source nodes that do not answer",
            "How many did not when this node last asked, within the last hour. `adoptctl status` there names them.",
            "short",
            [(most(f"sum by (instance) (adoptd_callerid_unheard_peers{{{FLEET}}}) > 0"), "{{instance}}")],
        ),
    ]


def logins() -> Row:
    """The account phases of the nodes chosen."""
    return "Logins: what is decided, and how long it takes", [
        counted(
            "Logins by outcome",
            "adopted: in a job, read back. denied: told why. allowed, ignored: let in without a job, as configured.",
            "adoptd_adoptions_total",
            f"{NODE}, {GATE}",
            "outcome",
            width=THIRD,
            exemplars=True,
        ),
        counted(
            "Adoptions by how the job was found",
            "only_job: there was one. callerid: the source node named it. newest: it could not.",
            "adoptd_adoptions_total",
            f'{NODE}, {GATE}, outcome="adopted"',
            "reason, witness",
            width=THIRD,
        ),
        counted(
            "Denials and logins outside a job, by reason",
            "no_jobs is users' business; generic_failure, adopt_failure and unknown are yours.",
            "adoptd_adoptions_total",
            f'{NODE}, {GATE}, outcome!="adopted"',
            "outcome, reason",
            width=THIRD,
        ),
        graph(
            "Login duration by phase",
            "What the agent adds to a login: half of them, and 99 of 100.",
            "s",
            [
                (quantile(q, "adoptd_adoption_duration_seconds", NODE, "phase"), f"{{{{phase}}}} p{round(q * 100)}")
                for q in (0.5, 0.99)
            ],
            width=THIRD,
            exemplars=True,
        ),
        heat(
            "Account phases by duration",
            "How many took how long. A second band far above the first: source nodes that do not answer.",
            "s",
            f'sum by (le) (increase(adoptd_adoption_duration_seconds_bucket{{{NODE}, phase="account"}}'
            f"[$__rate_interval]))",
            width=THIRD,
        ),
        graph(
            "Where the time goes: stages, 99th percentile",
            "jobs_here asks the job manager, ask_source the other node, adopt moves the process and reads back.",
            "s",
            [(quantile(0.99, "adoptd_stage_duration_seconds", f'{NODE}, journey="adoption"', "stage"), "{{stage}}")],
            width=THIRD,
        ),
        counted(
            "Faults of the job manager",
            "By the stage that met it; worked_around: no login suffered. docs/faults.md has each of Slurm's.",
            "adoptd_job_faults_total",
            NODE,
            "stage, fault",
            width=THIRD,
        ),
        counted(
            "Logins that got no answer, by reason",
            "pam_adopt.so asked and was refused: action_generic_failure. They are in no other figure of this row.",
            "adoptd_messages_refused_total",
            f'{NODE}, socket="pam"',
            "reason",
            width=THIRD,
        ),
        counted(
            "Observe mode: what we would have done",
            "Only where a PAM line says mode=observe. Each disagreement is to be understood before enforcing.",
            "adoptd_observed_total",
            NODE,
            "agreement, found, would",
            width=THIRD,
            legend="{{agreement}}: found in {{found}}, would {{would}}",
            some=True,
        ),
    ]
