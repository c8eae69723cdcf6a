"""What a fault is asserted with: the outcome for every value of the option that governs it, a metric, a log line.

Owns the reading of a node's log and metrics from one moment on. Logins are real ones, with the real ssh. Called
by the tests of faults on a whole cluster.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, Mapping, Optional, Tuple

from lab.lab import NOBODY_IN, Lab
from lab.node import Node
from lab.slurm_daemons import SPOOL_DIR, SlurmDaemons
from lab.waiting import until

NO_JOB = "no job on node2"
_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? ([0-9.e+]+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Governed:
    """An option, the situation it decides, and by value where a login lands and as what it is counted."""

    option: str
    reason: str
    values: Mapping[str, Tuple[str, str]]


GENERIC = Governed(
    "action_generic_failure",
    "generic_failure",
    {"ignore": (NO_JOB, "ignored"), "allow": (NO_JOB, "allowed"), "deny": (NOBODY_IN, "denied")},
)
ADOPT_FAILURE = Governed(
    "action_adopt_failure", "adopt_failure", {"allow": (NO_JOB, "allowed"), "deny": (NOBODY_IN, "denied")}
)
NO_JOBS = Governed("action_no_jobs", "no_jobs", {"ignore": (NO_JOB, "ignored"), "deny": (NOBODY_IN, "denied")})


def unknown(newest: str, reason: str = "unknown") -> Governed:
    """action_unknown where ``newest`` is the newest job; ``reason`` is the situation."""
    return Governed(
        "action_unknown",
        reason,
        {
            "allow": (NO_JOB, "allowed"),
            "deny": (NOBODY_IN, "denied"),
            "newest": (f"job {newest} on node2", "adopted"),
        },
    )


class Watch:
    """What a node's agent logs and counts from now on."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._tail = node.agent_log()
        self._syslog = node.syslog()
        self._before = self._samples()

    def counted(self, name: str, **labels: str) -> float:
        """By how much the samples of a metric that have these labels have grown."""
        return self._sum(self._samples(), name, labels) - self._sum(self._before, name, labels)

    def logged(self, pattern: str) -> bool:
        """Whether a line has been logged that has this in it."""
        return any(re.search(pattern, line) for line in self._tail.lines())

    def counts(self, name: str, exactly: Optional[int] = None, at_least: int = 1, **labels: str) -> None:
        """Wait until it has counted, ``exactly`` so often or ``at_least``: it does when it has replied."""
        self._soon(lambda: self.counted(name, **labels) >= (exactly or at_least), f"{name} with {labels}")
        assert exactly in (None, self.counted(name, **labels)), self.text()

    def logs(self, pattern: str) -> None:
        """Wait until a line has been logged that has this in it."""
        self._soon(lambda: self.logged(pattern), f"a line with {pattern!r}")

    def _soon(self, question: Callable[[], bool], what: str) -> None:
        try:
            until(question, what)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.text()}") from None

    def text(self) -> str:
        """All that was logged, by the agent and then by everybody else."""
        return "\n".join([*self._tail.lines(), *self._syslog.lines()])

    def _samples(self) -> Dict[Tuple[str, Tuple[Tuple[str, str], ...]], float]:
        found: Dict[Tuple[str, Tuple[Tuple[str, str], ...]], float] = {}
        for line in self._node.metrics():
            match = _SAMPLE.fullmatch(line)
            if match is not None:
                found[match[1], tuple(_LABEL.findall(match[2] or ""))] = float(match[3])
        return found

    @staticmethod
    def _sum(
        samples: Mapping[Tuple[str, Tuple[Tuple[str, str], ...]], float], name: str, labels: Mapping[str, str]
    ) -> float:
        return sum(
            value for (each, pairs), value in samples.items() if each == name and set(labels.items()) <= set(pairs)
        )


def check(
    lab: Lab,
    governed: Governed,
    *,
    log: str,
    fault: Optional[Tuple[str, str]] = None,
    asked: Optional[str] = None,
    options: str = "",
    login: Optional[Callable[[], str]] = None,
) -> None:
    """For every value of the option: where the login lands, what is counted, what is logged.

    ``fault``: stage and fault of adoptd_job_faults_total. ``asked``: the reason in adoptd_callerid_asked_total.
    """
    for value, (landed, outcome) in governed.values.items():
        lab.pam(f"{options} {governed.option}={value}")
        watch = Watch(lab.second)
        found = lab.login().landed if login is None else login()
        assert found == landed, f"{found}, expected {landed}, with {governed.option}={value}\n{watch.text()}"
        reason = "newest" if outcome == "adopted" else governed.reason
        watch.counts("adoptd_adoptions_total", 1, phase="account", outcome=outcome, reason=reason)
        if fault is not None:
            watch.counts("adoptd_job_faults_total", stage=fault[0], fault=fault[1])
        if asked is not None:
            watch.counts("adoptd_callerid_asked_total", reason=asked)
        watch.logs(log)


def slurm_of(lab: Lab) -> SlurmDaemons:
    """The lab's Slurm."""
    assert lab.cluster.slurm is not None
    return lab.cluster.slurm


def restart_agent(node: Node) -> None:
    """An agent that has heard nobody yet."""
    node.stop("agent")
    node.start_agent()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process hangs, until leaving."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def step_socket(lab: Lab, job: str, node: Optional[Node] = None) -> str:
    """The path of a job's extern step's socket, inside the node."""
    where = node or lab.second
    return f"{SPOOL_DIR}/{slurm_of(lab).name_of(where)}_{job}.4294967292"
