"""Every metric the agent exports, with its labels' closed value sets.

Owns the names. Label values come from enums of this project, never from a message: no user, job or
pid is a label, so the number of series is bounded by this file. prometheus-client does the counting and
the HTTP. Called by the journeys, the servers and the service.
"""

from __future__ import annotations

import contextlib
import enum
import platform
import socket
import threading
from http.server import ThreadingHTTPServer
from typing import Callable, Dict, Iterator, Mapping, Optional, Tuple, Union

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, MetricsHandler, ProcessCollector
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from adoptd import __version__
from adoptd.model import Witness
from adoptd.wire.callerid import Outcome

# Prometheus has one connection; some more for a second server and a person. A request is sent with the connection.
SCRAPES_MAX = 16
SCRAPE_READ_S = 2.0

_Request = Union[socket.socket, Tuple[bytes, socket.socket]]


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
    PROCESS_GONE = "process_gone"
    INTERNAL = "internal"


# From an answer without MUNGE to the 1 s that a whole login may take by default; what takes longer shows as +Inf.
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """The agent's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        self.build_info = Gauge(
            "adoptd_build_info",
            "Always 1; the labels say which agent runs on what.",
            ["version", "python", "kernel"],
            registry=self.registry,
        )
        self.build_info.labels(__version__, platform.python_version(), platform.release()).set(1)

        self.adoptions = Counter(
            "adoptd_adoptions_total",
            "Decisions about logins, by PAM phase, mode, outcome and the reason for it.",
            ["phase", "mode", "outcome", "reason"],
            registry=self.registry,
        )
        self.adoption_seconds = Histogram(
            "adoptd_adoption_duration_seconds",
            "Time from a PAM request's last byte to its reply.",
            ["phase"],
            buckets=_SECONDS,
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

    def serve(self, address: str, port: int) -> None:
        """Serve /metrics from a thread of prometheus-client's. Raises OSError if the port cannot be had."""
        try:
            server = _ScrapeServer(address, port, self.registry)
        except OSError as error:
            raise OSError(error.errno, f"/metrics on {address} port {port}: {error.strerror}") from None
        # A daemon: it ends with the process.
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


class _ScrapeHandler(MetricsHandler):
    timeout = SCRAPE_READ_S

    def do_GET(self) -> None:
        # One at a time: threads that render all at once would fight the event loop for the interpreter.
        if isinstance(self.server, _ScrapeServer):
            self.server.heard(self.connection)
            with self.server.rendering:
                super().do_GET()


class _ScrapeServer(ThreadingHTTPServer):
    """prometheus-client's handler behind bounds, which its own server lacks: any user of the node reaches it.

    As at the other doors, over the bound who was silent longest goes.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: str, port: int, registry: CollectorRegistry) -> None:
        if ":" in address:
            self.address_family = socket.AF_INET6
        self.rendering = threading.Lock()
        self._lock = threading.Lock()
        # Who is served, oldest first; True: has sent a request.
        self._served: Dict[object, bool] = {}
        super().__init__((address, port), _ScrapeHandler.factory(registry))

    def heard(self, connection: socket.socket) -> None:
        """The request has come: this connection is no longer one that may be dropped for its silence."""
        with self._lock:
            if connection in self._served:
                self._served[connection] = True

    def process_request(self, request: _Request, client_address: object) -> None:
        with self._lock:
            self._served[request] = False
            if len(self._served) > SCRAPES_MAX:
                silent = next(each for each, heard in self._served.items() if not heard)
                # Its thread reads the end and closes it. Forgotten now: the next one must not choose it again.
                del self._served[silent]
                if isinstance(silent, socket.socket):
                    with contextlib.suppress(OSError):
                        silent.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: _Request) -> None:
        with self._lock:
            self._served.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: who went away in the middle is no event, and standard error is the log's."""


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


def _witness_label(witness: Optional[Witness]) -> str:
    return "none" if witness is None else witness.value
