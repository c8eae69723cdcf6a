"""The rows that are read first: the fleet, and what is decided about logins."""

from __future__ import annotations

from generate.parts import BLUE, GREEN, HALF, RED, THIRD, YELLOW, Row, graph, heat, number, rows
from generate.queries import FLEET, GATE, NODE, OUTSIDE, quantile, ratio, total

# A login's whole budget by default is 1 s; half of it is late enough to look.
_SLOW_S, _TOO_SLOW_S = 0.25, 0.5


def fleet() -> Row:
    """Over all nodes of the clusters chosen."""
    return "Fleet: is anything wrong?", [
        number(
            "Agents up",
            "Nodes whose agent answers Prometheus. Fewer than yesterday: look at the table of nodes below.",
            "short",
            f"count(adoptd_build_info{{{FLEET}}})",
            [(None, RED), (1, GREEN)],
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
            "Without the probe",
            "Nodes that answer without the BPF probe: by sock_diag and /proc, slower and for less.",
            "short",
            f"count(adoptd_probe_attached{{{FLEET}}} == 0)",
            [(None, GREEN), (1, YELLOW)],
        ),
        number(
            "Login, 99th percentile",
            "How long the account phase held up 99 of 100 logins, all nodes.",
            "s",
            quantile(0.99, "adoptd_adoption_duration_seconds", f'{FLEET}, phase="account"'),
            [(None, GREEN), (_SLOW_S, YELLOW), (_TOO_SLOW_S, RED)],
        ),
        rows(
            "Nodes with most logins outside a job, last hour",
            "Where to look first. Empty is good.",
            "short",
            f"topk(10, sum by (cluster, instance, reason) "
            f"(increase(adoptd_adoptions_total{{{FLEET}, {GATE}, {OUTSIDE}}}[1h])) > 0)",
            width=THIRD,
        ),
        rows(
            "Agents by release, probe and job manager",
            "More than one release for long: an update stopped half-way.",
            "short",
            f"count by (version, kernel, bcc, schema, job_manager, cgroups) (adoptd_build_info{{{FLEET}}} "
            "* on (cluster, job, instance) group_left (bcc, schema, job_manager, cgroups) adoptd_host_info)",
            width=THIRD,
        ),
        graph(
            "Source nodes that do not answer",
            "Did not answer when last asked, within the last hour. `adoptctl status` on the node names them.",
            "short",
            [(f"sum by (instance) (adoptd_callerid_unheard_peers{{{FLEET}}}) > 0", "{{instance}}")],
            width=THIRD,
        ),
    ]


def logins() -> Row:
    """The account phases of the nodes chosen."""
    return "Logins: what is decided, and how long it takes", [
        graph(
            "Logins by outcome",
            "adopted: in a job, read back. denied: told why. allowed, ignored: let in without a job, as configured.",
            "reqps",
            [(total("adoptd_adoptions_total", f"{NODE}, {GATE}", "outcome"), "{{outcome}}")],
            width=THIRD,
            stacked=True,
            exemplars=True,
        ),
        graph(
            "Adoptions by how the job was found",
            "only_job: there was one. callerid: the source node named it. newest: it could not.",
            "reqps",
            [
                (
                    total("adoptd_adoptions_total", f'{NODE}, {GATE}, outcome="adopted"', "reason, witness"),
                    "{{reason}} {{witness}}",
                )
            ],
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Denials and logins outside a job, by reason",
            "no_jobs is users' business; generic_failure, adopt_failure and unknown are yours.",
            "reqps",
            [
                (
                    total("adoptd_adoptions_total", f'{NODE}, {GATE}, outcome!="adopted"', "outcome, reason"),
                    "{{outcome}} {{reason}}",
                )
            ],
            width=THIRD,
            stacked=True,
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
        graph(
            "Faults of the job manager",
            "What was wrong with it, by the stage that met it. worked_around: no login suffered.",
            "reqps",
            [(total("adoptd_job_faults_total", NODE, "stage, fault"), "{{stage}} {{fault}}")],
            width=HALF,
            stacked=True,
        ),
        graph(
            "Observe mode: agreement with what was done without us",
            "Only where a PAM line says mode=observe. Each disagreement is to be understood before enforcing.",
            "reqps",
            [(total("adoptd_observed_total", NODE, "agreement, found, would"), "{{agreement}}: {{would}}, {{found}}")],
            width=HALF,
            stacked=True,
        ),
    ]
