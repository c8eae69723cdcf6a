"""Every metric the agent exports, with its labels' closed value sets.

Owns the names. Label values come from enums of this project, never from a message: no user, job or
pid is a label, so the number of series is bounded by this file. prometheus-client does the counting; how the
metrics leave the agent is exposition's. Called by the journeys, the servers and the service.
"""

from __future__ import annotations

import enum
import platform
from typing import Callable, Iterator, Mapping, Optional, Sequence, Tuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adoptd import __version__
from adoptd.model import JobFault, Witness
from adoptd.wire.callerid import Outcome

# bcc: of the distribution's package, as installed. schema: of the probe in force. job_manager: the backend, and the
# release of its protocol where it has been heard. cgroups: v1, v2 or hybrid.
HOST_FACTS = ("bcc", "schema", "job_manager", "cgroups")


class Pool(enum.Enum):
    """The agent's pools of threads: their names, in errors too."""

    JOBS = "jobs"
    ASKS = "asks"
    ANSWERS = "answers"
    SLOW = "slow"
    OWN = "own"
    GUARD = "guard"
    NOTES = "notes"


class Door(enum.Enum):
    """The agent's three sockets."""

    PAM = "pam"
    PEER = "peer"
    USER = "user"


class Refusal(enum.Enum):
    """Why a message from outside was refused."""

    NOT_ROOT = "not_root"
    MALFORMED = "malformed"
    SLOW = "slow"
    TRUNCATED = "truncated"
    TOO_MANY = "too_many"
    BAD_SEAL = "bad_seal"
    EXPIRED = "expired"
    REWOUND = "rewound"
    REPLAYED = "replayed"
    FOREIGN = "foreign"
    UNAVAILABLE = "unavailable"
    TOO_LARGE = "too_large"
    WRONG_HOST = "wrong_host"
    OTHER_VERSION = "other_version"
    PROCESS_GONE = "process_gone"
    INTERNAL = "internal"


# From an answer without MUNGE to the 1 s that a whole login may take by default; what takes longer shows as +Inf.
_SHARES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """The agent's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # By a name of our own: in a file for node_exporter, process_* would be taken for its own process.
        ProcessCollector(namespace="adoptd", registry=self.registry)

        self.build_info = Gauge(
            "adoptd_build_info",
            "Always 1; the labels say which agent runs on what.",
            ["version", "python", "kernel"],
            registry=self.registry,
        )
        self.build_info.labels(__version__, platform.python_version(), platform.release()).set(1)

        self.adoptions = Counter(
            "adoptd_adoptions_total",
            "Decisions about logins, by PAM phase, mode, outcome, the reason for it, and who named the job.",
            ["phase", "mode", "outcome", "reason", "witness"],
            registry=self.registry,
        )
        self.adoption_seconds = Histogram(
            "adoptd_adoption_duration_seconds",
            "Time from a PAM request's last byte to its reply.",
            ["phase"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.budget_used = Histogram(
            "adoptd_adoption_budget_used_ratio",
            "Share of the PAM line's timeout_ms that a phase took; above 1 nobody waited for the reply.",
            ["phase"],
            buckets=_SHARES,
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "adoptd_stage_duration_seconds",
            "Time that one stage of an adoption took, or of an answer to another node.",
            ["journey", "stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.observed = Counter(
            "adoptd_observed_total",
            "Logins seen in observe mode, by where another module had put them and what we would have done.",
            ["agreement", "found", "would"],
            registry=self.registry,
        )
        self.job_faults = Counter(
            "adoptd_job_faults_total",
            "What was wrong with the job manager, by the stage of a login that met it; worked_around: no login did.",
            ["stage", "fault"],
            registry=self.registry,
        )
        self.asked = Counter(
            "adoptd_callerid_asked_total",
            "Callerid questions this node asked of others, by what came of them.",
            ["outcome", "reason", "witness"],
            registry=self.registry,
        )
        self.asked_seconds = Histogram(
            "adoptd_callerid_asked_duration_seconds",
            "Time from a callerid question to its outcome, on the asking node.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.unheard_peers = Gauge(
            "adoptd_callerid_unheard_peers",
            "Source nodes that did not answer when last asked, within the last hour; `adoptctl status` names them.",
            registry=self.registry,
        )
        self.answered = Counter(
            "adoptd_callerid_answered_total",
            "Callerid questions this node answered, by what it said.",
            ["outcome", "reason", "witness"],
            registry=self.registry,
        )
        self.answered_seconds = Histogram(
            "adoptd_callerid_answered_duration_seconds",
            "Time from a sealed question's last byte to its sealed answer.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.joins = Counter(
            "adoptd_joins_total",
            "Sessions that their users asked to move into another job of theirs, by what came of it.",
            ["outcome"],
            registry=self.registry,
        )
        self.escapes = Counter(
            "adoptd_escapes_total",
            "Sessions seen outside the job they were put into, by who moved them out and what came of it.",
            ["mover", "outcome"],
            registry=self.registry,
        )
        self.notes = Gauge(
            "adoptd_connection_notes",
            "Connections whose job was noted as they were made, where jobs may be on cgroup v1.",
            registry=self.registry,
        )
        self.sessions = Gauge(
            "adoptd_sessions",
            "Sessions that were adopted and live.",
            registry=self.registry,
        )
        self.sessions_outside = Gauge(
            "adoptd_sessions_outside",
            "Sessions of which a process is out of the job now, and was not put back; `adoptctl sessions` names them.",
            ["out_of"],
            registry=self.registry,
        )
        self.session_watch_attached = Gauge(
            "adoptd_session_watch_attached",
            "1 if the kernel tells when a session's process is moved, 0 if sessions are only looked at now and then.",
            registry=self.registry,
        )
        self.refused = Counter(
            "adoptd_messages_refused_total",
            "Messages from outside that were refused, by socket and reason.",
            ["socket", "reason"],
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "adoptd_requests_in_flight",
            "Requests being served now, by socket.",
            ["socket"],
            registry=self.registry,
        )
        self.queue_waiting = Gauge(
            "adoptd_queue_waiting",
            "What waits now: logins and commands for their turn, calls under way or waiting in each pool of threads.",
            ["queue"],
            registry=self.registry,
        )
        self.witness_up = Gauge(
            "adoptd_witness_up",
            "1 if the witness can be asked on this host, 0 if it cannot.",
            ["witness"],
            registry=self.registry,
        )
        self.probe_attached = Gauge(
            "adoptd_probe_attached",
            "1 if the BPF probe's pins are open, 0 if the agent works without it.",
            registry=self.registry,
        )
        self.self_test_ok = Gauge(
            "adoptd_probe_self_test_success",
            "1 if the last self-test found its own connection, 0 if it did not.",
            registry=None,
        )
        self.self_test_time = Gauge(
            "adoptd_probe_self_test_timestamp_seconds",
            "When the last self-test ended, Unix time.",
            registry=None,
        )
        self._self_tested = False
        self.config_reload_ok = Gauge(
            "adoptd_config_last_reload_success",
            "1 if the configuration was read without error the last time, 0 if the one before is still in force.",
            registry=self.registry,
        )
        self.config_reload_ok.set(1)
        for door in Door:
            self.in_flight.labels(door.value).set(0)

    def refuse(self, door: Door, reason: Refusal) -> None:
        """Count one refused message."""
        self.refused.labels(door.value, reason.value).inc()

    def count_observed(self, agreement: str, found: str, would: str, logins: int = 1) -> None:
        """Count observed logins; 0 makes the series. The words are those of observed's enums."""
        self.observed.labels(agreement, found, would).inc(logins)

    def count_adoption(
        self, phase: str, mode: str, outcome: str, reason: str, witness: Optional[Witness], request_id: str
    ) -> None:
        """Count one decision. The request id goes with it where the scraper asks for OpenMetrics (an exemplar)."""
        labels = self.adoptions.labels(phase, mode, outcome, reason, _witness_label(witness))
        labels.inc(exemplar={"request_id": request_id})

    def begin_adoption(self, phase: str, mode: str, outcome: str, reason: str, witness: Optional[Witness]) -> None:
        """Make the series of a decision that may come."""
        self.adoptions.labels(phase, mode, outcome, reason, _witness_label(witness))

    def observe_login(
        self, phase: str, seconds: float, budget_s: float, stages: Sequence[Tuple[str, float]], request_id: str
    ) -> None:
        """Note how long one phase and each of its stages (name, seconds) took."""
        self.adoption_seconds.labels(phase).observe(seconds, {"request_id": request_id})
        self.budget_used.labels(phase).observe(seconds / budget_s)
        for stage, took_s in stages:
            self.stage_seconds.labels("adoption", stage).observe(took_s)

    def observe_answer_stage(self, stage: enum.Enum, seconds: float) -> None:
        """Note how long one stage of an answer took. From any thread."""
        self.stage_seconds.labels("answer", stage.value).observe(seconds)

    def watch_queue(self, queue: Pool, waiting: Callable[[], int]) -> None:
        """Export ``waiting()``, read at each scrape, as the length of one queue."""
        self.queue_waiting.labels(queue.value).set_function(waiting)

    def watch_host(self, facts: Callable[[], Mapping[str, str]]) -> None:
        """Export ``facts()``: what the agent runs on and with, read at each scrape. Keys as in HOST_FACTS."""
        self.registry.register(_HostFacts(facts))

    def count_job_fault(self, stage: str, fault: JobFault) -> None:
        """Count one fault of the job manager's. ``stage`` is one of a login's, or worked_around. From any thread."""
        self.job_faults.labels(stage, fault.value).inc()

    def count_escape(self, mover: str, outcome: str, escapes: int = 1) -> None:
        """Count escapes; 0 makes the series. The words are those of the sessions' enums."""
        self.escapes.labels(mover, outcome).inc(escapes)

    def watch_sessions(self, count: Callable[[], int]) -> None:
        """Export ``count()``, asked at each scrape, from another thread."""
        self.sessions.set_function(count)

    def show_outside(self, sessions: Mapping[str, int]) -> None:
        """Set how many sessions are outside of what. The words are those of the sessions' enum."""
        for out_of, count in sessions.items():
            self.sessions_outside.labels(out_of).set(count)

    def watch_notes(self, count: Callable[[], int]) -> None:
        """Export ``count()``, asked at each scrape, from another thread."""
        self.notes.set_function(count)

    def count_asked(self, outcome: Outcome, reason: str, witness: Optional[Witness], seconds: float) -> None:
        """Count one question this node asked. ``reason`` is the value of one of callerid's enums."""
        self.asked.labels(outcome.value, reason, _witness_label(witness)).inc()
        self.asked_seconds.observe(seconds)

    def count_answered(self, outcome: Outcome, reason: str, witness: Optional[Witness], seconds: float) -> None:
        """Count one question this node answered."""
        self.answered.labels(outcome.value, reason, _witness_label(witness)).inc()
        self.answered_seconds.observe(seconds)

    def show_witnesses(self, up: Mapping[Witness, bool]) -> None:
        """Set which witnesses can be asked."""
        for witness, is_up in up.items():
            self.witness_up.labels(witness.value).set(int(is_up))

    def show_self_test(self, ok: bool) -> None:
        """Set how the last self-test ended. Before the first there is no series: 0 would say that it failed."""
        self.self_test_ok.set(int(ok))
        self.self_test_time.set_to_current_time()
        if not self._self_tested:
            self._self_tested = True
            self.registry.register(self.self_test_ok)
            self.registry.register(self.self_test_time)

    def watch_probe(self, counters: Callable[[], Mapping[str, int]]) -> None:
        """Export ``counters()``, the events counted inside BPF by kind, read at each scrape."""
        self.registry.register(_ProbeEvents(counters))


class _ProbeEvents(Collector):
    """The counters live in the kernel and outlast the agent, so they are read and never kept here."""

    def __init__(self, counters: Callable[[], Mapping[str, int]]) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "adoptd_probe_events", "Events counted inside BPF since the probe was loaded, by kind.", labels=["kind"]
        )
        for kind, count in self._counters().items():
            family.add_metric([kind], count)
        yield family


class _HostFacts(Collector):
    """Found out while the agent runs (a Slurm that is upgraded under it), so read anew."""

    def __init__(self, facts: Callable[[], Mapping[str, str]]) -> None:
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "adoptd_host_info", "Always 1; the labels say what the agent runs with.", labels=HOST_FACTS
        )
        facts = self._facts()
        family.add_metric([facts.get(name) or "unknown" for name in HOST_FACTS], 1)
        yield family


def _witness_label(witness: Optional[Witness]) -> str:
    return "none" if witness is None else witness.value
