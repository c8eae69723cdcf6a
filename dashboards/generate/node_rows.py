"""The rows that explain: questions between nodes, sessions, witnesses and the agent itself."""

from __future__ import annotations

from generate.parts import HALF, QUARTER, Row, counted, graph, states
from generate.queries import DISBELIEVED, NODE, UNHEARD, UNSEALED, most, quantile, rate, total

_RELOADED = f"adoptd_config_last_reload_success{{{NODE}}}"


def callerid() -> Row:
    """Both ends of the questions between nodes."""
    return "Callerid: which job does a connection come from?", [
        counted(
            "Asked of other nodes, by outcome",
            "job: named. no_job: the process is in none. unknown: could not be told, or nobody answered.",
            "adoptd_callerid_asked_total",
            NODE,
            "outcome",
            width=QUARTER,
        ),
        counted(
            "Questions without an answer, by reason",
            "timeout: packets are dropped (a firewall should reject). refused: no agent. closed: it does not believe "
            "our seal, or has none. seal_unavailable: we have none.",
            "adoptd_callerid_asked_total",
            f'{NODE}, reason=~"{UNHEARD}|{UNSEALED}"',
            "reason",
            width=QUARTER,
        ),
        counted(
            "Answers not believed, by reason",
            "Somebody answers in an agent's place, or an address leads to another host. It should never happen.",
            "adoptd_callerid_asked_total",
            f'{NODE}, reason=~"{DISBELIEVED}"',
            "reason",
            width=QUARTER,
        ),
        graph(
            "Time to be told",
            "From question to outcome on the asking node. The budget is [callerid] timeout_ms.",
            "s",
            [(quantile(q, "adoptd_callerid_asked_duration_seconds", NODE), f"p{round(q * 100)}") for q in (0.5, 0.99)],
            width=QUARTER,
            exemplars=True,
        ),
        counted(
            "Answered for other nodes, by witness",
            "Who named the owner. bpf is exact and fast; proc is the last resort.",
            "adoptd_callerid_answered_total",
            f'{NODE}, outcome="job"',
            "witness",
            width=QUARTER,
        ),
        counted(
            "Answered without a job, by reason",
            "disagreement and ambiguous mean that two witnesses or two sockets contradict each other.",
            "adoptd_callerid_answered_total",
            f'{NODE}, outcome!="job"',
            "outcome, reason",
            width=QUARTER,
        ),
        graph(
            "Time to answer",
            "From a sealed question's last byte to its sealed answer, and the slowest of each stage on the way.",
            "s",
            [
                *(
                    (quantile(q, "adoptd_callerid_answered_duration_seconds", NODE), f"p{round(q * 100)}")
                    for q in (0.5, 0.99)
                ),
                (
                    quantile(0.99, "adoptd_stage_duration_seconds", f'{NODE}, journey="answer"', "stage"),
                    "{{stage}} p99",
                ),
            ],
            width=QUARTER,
        ),
        counted(
            "Messages refused, by socket and reason",
            "What came in and was not worth a reply. A flood shows as too_many; an attempt as bad_seal or replayed.",
            "adoptd_messages_refused_total",
            NODE,
            "socket, reason",
            width=QUARTER,
        ),
    ]


def sessions() -> Row:
    """What became of adopted sessions."""
    return "Sessions: do they stay where they were put?", [
        graph(
            "Sessions now",
            "Adopted sessions that are still running.",
            "short",
            [
                (f"sum (adoptd_sessions{{{NODE}}})", "all nodes"),
                (most(f"sum by (instance) (adoptd_sessions{{{NODE}}})"), "{{instance}}"),
            ],
            width=QUARTER,
        ),
        graph(
            "Sessions outside their job now",
            "Not put back. running_job: adoptctl join puts them there. ended_job: nobody takes them, end them. "
            "`adoptctl sessions` on the node names them. Empty is good.",
            "short",
            [
                (
                    most(f"sum by (instance, out_of) (adoptd_sessions_outside{{{NODE}}}) > 0"),
                    "{{instance}} {{out_of}}",
                )
            ],
            width=QUARTER,
        ),
        counted(
            "Escapes, by who moved it and what was done",
            "A session's process left its job's cgroup. systemd: pam_systemd runs after pam_adopt; put it before. "
            "Empty is good.",
            "adoptd_escapes_total",
            NODE,
            "mover, outcome",
            width=QUARTER,
            some=True,
        ),
        counted(
            "Joins, by outcome",
            "Users moving their session into another of their jobs (adoptctl join).",
            "adoptd_joins_total",
            NODE,
            "outcome",
            width=QUARTER,
        ),
    ]


def probe() -> Row:
    """The sources of knowledge about connections."""
    return "Witnesses: can connections be attributed?", [
        states(
            "Witnesses that could not be asked",
            "Sources of knowledge about connections, where one was missing in the time shown. conntrack is left out: "
            "most nodes translate no addresses. Empty is good.",
            [
                (
                    _missed("adoptd_witness_up", f'{NODE}, witness!="conntrack"', "instance, witness"),
                    "{{instance}} {{witness}}",
                ),
                (_missed("adoptd_session_watch_attached", NODE, "instance"), "{{instance}} moves told"),
            ],
            width=QUARTER,
        ),
        graph(
            "Events inside BPF",
            "storage_refused: a user's sockets carry no label; the next witness finds them.",
            "cps",
            [(f"{total('adoptd_probe_events_total', NODE, 'kind')} > 0", "{{kind}}")],
            width=QUARTER,
        ),
        graph(
            "Since the last self-test",
            "The agent connects to itself and looks itself up. Older than a few minutes: the agent is stuck.",
            "s",
            [(most(f"time() - adoptd_probe_self_test_timestamp_seconds{{{NODE}}}"), "{{instance}}")],
            width=QUARTER,
        ),
        graph(
            "Connections noted",
            "Whose job was noted as they were made, for when their owner has ended. 0 where jobs are on cgroup v2.",
            "short",
            [(most(f"sum by (instance) (adoptd_connection_notes{{{NODE}}})"), "{{instance}}")],
            width=QUARTER,
        ),
    ]


def agent() -> Row:
    """The process itself."""
    return "The agent itself", [
        graph(
            "Requests in progress and waiting",
            "Waiting for long: the job manager or munged is slow. By socket, by queue.",
            "short",
            [
                (f"sum by (socket) (adoptd_requests_in_flight{{{NODE}}})", "in progress, {{socket}}"),
                (f"sum by (queue) (adoptd_queue_waiting{{{NODE}}})", "waiting, {{queue}}"),
            ],
            width=QUARTER,
        ),
        graph(
            "Login budget used, 99th percentile",
            "1 is the PAM line's timeout_ms: such logins get action_generic_failure.",
            "percentunit",
            [(quantile(0.99, "adoptd_adoption_budget_used_ratio", NODE, "phase"), "{{phase}}")],
            width=QUARTER,
        ),
        graph(
            "Resident memory",
            "Of the agents that have most. About 30 MB; growing for days is a leak.",
            "bytes",
            [(most(f"adoptd_process_resident_memory_bytes{{{NODE}}}"), "{{instance}}")],
            width=QUARTER,
        ),
        graph(
            "Processor time",
            "Of one core, of the agents that use most. Idle it is below 0.1 %.",
            "percentunit",
            [(most(rate("adoptd_process_cpu_seconds_total", NODE)), "{{instance}}")],
            width=QUARTER,
        ),
        graph(
            "Nodes with an old configuration",
            "A reload failed there, and the configuration before is still in force. AdoptdReloadFailed names them.",
            "short",
            [(f"count({_RELOADED}) - sum({_RELOADED})", "nodes")],
            width=HALF,
        ),
        graph(
            "Starts in the last hour",
            "The agent's process is new. More than one or two: it is being restarted by the watchdog or it crashes.",
            "short",
            [(most(f"changes(adoptd_process_start_time_seconds{{{NODE}}}[1h])"), "{{instance}}")],
            width=HALF,
        ),
    ]


def _missed(metric: str, where: str, by: str) -> str:
    """1 and 0 of those that were 0 at any time shown."""
    named = f"{metric}{{{where}}}"
    return f"min by ({by}) ({named}) and min by ({by}) (min_over_time({named}[$__range])) == 0"
