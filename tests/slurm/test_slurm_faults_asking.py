"""The question to the source node, and meanwhile: munged, clocks, clusters, jobs that end or come again."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import Callable, Iterator, List, Tuple

import pytest

from lab.etc_files import ALICE, User
from lab.lab import Lab, Login
from lab.node import Node
from lab.nodes import _account
from lab.slurm_daemons import MUNGE_SOCKET
from lab.waiting import until
from slurm.faults import NO_JOBS, Watch, check, slurm_of, stopped, unknown

pytestmark = pytest.mark.timeout(240)

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
KEY = "/etc/munge/munge.key"
SKEW_S = 600


def _munge_user() -> User:
    return _account("munge")


def _restart_munged(node: Node) -> None:
    node.stop("munged")
    node.start_munged(_munge_user())
    node.wait_munged()


def check_asking(lab: Lab, jobs: Tuple[str, ...], asked: str, log: str) -> None:
    """From inside the older of two jobs: it is not named, so action_unknown."""
    check(lab, unknown(jobs[1]), asked=asked, log=log, login=lambda: lab.login(job=jobs[0]).landed)


def check_well(lab: Lab, jobs: Tuple[str, ...]) -> None:
    """Mended, without a restart of any agent."""
    lab.pam("action_unknown=deny")
    for job in jobs:
        until(lambda: lab.login(job=job).landed == f"job {job} on node2", f"a login into job {job}")  # noqa: B023


def test_munged_stopped_here(faults_lab: Lab) -> None:
    """No question can be sealed. munged takes its socket away with it."""
    lab = faults_lab
    with lab.jobs(2) as jobs:
        lab.second.stop("munged")
        try:
            check_asking(lab, jobs, "seal_unavailable", "ask_source: unknown: seal_unavailable .munge_encode: ")
        finally:
            lab.second.start_munged(_munge_user())
            lab.second.wait_munged()
        check_well(lab, jobs)


def test_munged_killed_here(faults_lab: Lab) -> None:
    """Its socket stays behind: libmunge tries for seconds, the login does not wait for it."""
    lab = faults_lab
    with lab.jobs(2) as jobs:
        lab.second.kill("munged")
        try:
            assert lab.second.path(MUNGE_SOCKET).exists()
            check_asking(lab, jobs, "seal_unavailable", "ask_source: unknown: seal_unavailable ")
        finally:
            lab.second.path(MUNGE_SOCKET).unlink(missing_ok=True)
            lab.second.start_munged(_munge_user())
            lab.second.wait_munged()
        check_well(lab, jobs)


@pytest.mark.parametrize("where", ["here", "at_the_source"])
def test_munged_hangs(faults_lab: Lab, where: str) -> None:
    """It takes connections and answers nobody: the question ends with callerid's own time."""
    lab = faults_lab
    node = lab.second if where == "here" else lab.first
    asked = "seal_unavailable" if where == "here" else "(timeout|closed)"
    with lab.jobs(2) as jobs:
        with stopped(node.daemons["munged"].pid):
            if where == "here":
                check_asking(lab, jobs, asked, "ask_source: unknown: seal_unavailable ")
            else:
                there = Watch(lab.first)
                check(
                    lab,
                    unknown(jobs[1]),
                    log=f"ask_source: unknown: {asked} .10.66.0.1 port 6830",
                    login=lambda: lab.login(job=jobs[0]).landed,
                )
                until(
                    lambda: there.counted("adoptd_messages_refused_total", socket="peer", reason="unavailable") >= 1,
                    "the source to have counted",
                )
        check_well(lab, jobs)


def test_munged_stopped_at_the_source(faults_lab: Lab) -> None:
    """The source cannot open the question, says so in its own log, and hangs up."""
    lab = faults_lab
    with lab.jobs(2) as jobs:
        there = Watch(lab.first)
        lab.first.stop("munged")
        try:
            check_asking(
                lab, jobs, "closed", "ask_source: unknown: closed .10.66.0.1 port 6830: closed without an answer"
            )
            there.counts("adoptd_messages_refused_total", socket="peer", reason="unavailable")
            there.logs("reason=unavailable .*munge_decode")
        finally:
            lab.first.start_munged(_munge_user())
            lab.first.wait_munged()
        check_well(lab, jobs)


def test_another_munge_key_at_the_source(faults_lab: Lab) -> None:
    """What cannot be opened is answered with nothing."""
    lab = faults_lab
    with lab.jobs(2) as jobs:
        there, key = Watch(lab.first), lab.first.path(KEY).read_text()
        munge = _munge_user()
        lab.first.write(KEY, secrets.token_hex(64), mode=0o400, owner=munge.uid)
        _restart_munged(lab.first)
        try:
            check_asking(
                lab, jobs, "closed", "ask_source: unknown: closed .10.66.0.1 port 6830: closed without an answer"
            )
            there.counts("adoptd_messages_refused_total", socket="peer", reason="bad_seal")
            there.logs("reason=bad_seal .*(Invalid credential|error 14)")
        finally:
            lab.first.write(KEY, key, mode=0o400, owner=munge.uid)
            _restart_munged(lab.first)
        check_well(lab, jobs)


@pytest.mark.parametrize(("skew_s", "reason"), [(SKEW_S, "expired"), (-SKEW_S, "rewound")])
def test_clocks_ten_minutes_apart(faults_lab: Lab, skew_s: int, reason: str) -> None:
    """munged and the agent of the source live in another time: its log names it, and nothing is believed."""
    lab = faults_lab
    assert FAKETIME.exists(), "package libfaketime is not installed: ./dev setup installs it"
    node = lab.first
    env = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": f"{skew_s:+d}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    with lab.jobs(2) as jobs:
        with _in_another_time(node, env):
            there = Watch(node)
            check_asking(
                lab, jobs, "closed", "ask_source: unknown: closed .10.66.0.1 port 6830: closed without an answer"
            )
            there.counts("adoptd_messages_refused_total", socket="peer", reason=reason)
            there.logs(f"reason={reason} .*(Expired|Rewound) credential")
        check_well(lab, jobs)


@contextlib.contextmanager
def _in_another_time(node: Node, env: dict[str, str]) -> Iterator[None]:
    start = node.start_daemon

    def start_elsewhen(name: str, argv: List[str], **how: object) -> object:
        return start(name, argv, **{**how, "env": {**(how.get("env") or {}), **env}})  # type: ignore[dict-item,arg-type]

    def restart() -> None:
        node.stop("agent")
        _restart_munged(node)
        node.start_agent()

    node.start_daemon = start_elsewhen  # type: ignore[method-assign,assignment]
    try:
        restart()
        yield
    finally:
        node.start_daemon = start  # type: ignore[method-assign]
        restart()


def test_a_job_of_the_same_id_on_another_cluster(faults_lab: Lab) -> None:
    """node1 belongs to a cluster of another name, whose jobs count for themselves: its job 7 is not the job 7 here."""
    lab = faults_lab
    file = "/etc/slurm/slurm.conf"
    text = lab.first.path(file).read_text()
    with lab.jobs(2) as jobs:
        lab.pam("action_unknown=deny")
        assert lab.login(job=jobs[0]).landed == f"job {jobs[0]} on node2"
        lab.first.write(file, text.replace("ClusterName=adoptd", "ClusterName=other"))
        try:
            check(
                lab,
                unknown(jobs[1]),
                fault=("ask_source", "other_cluster"),
                log=f"faults=other_cluster .*ask_source: job {jobs[0]} of cluster other, which is not",
                login=lambda: lab.login(job=jobs[0]).landed,
            )
        finally:
            lab.first.write(file, text)
        check_well(lab, jobs)


def _is_asked(node: Node) -> bool:
    """Whether a question waits, unread, at the port of the node's agent."""
    net = Path(f"/proc/{node.runner_pid}/net")
    rows = [
        row.split() for name in ("tcp", "tcp6") for row in (net / name).read_text(encoding="ascii").splitlines()[1:]
    ]
    # proc(5): local address is the second column, state the fourth (01 ESTABLISHED), tx_queue:rx_queue the fifth.
    return any(row[1].endswith(":1AAE") and row[3] == "01" and int(row[4].partition(":")[2], 16) for row in rows)


def login_while_asking(lab: Lab, meanwhile: Callable[[], None]) -> Login:
    """A login of alice's from no job, held at its question to node1 while something happens."""
    with stopped(lab.first.daemons["agent"].pid):
        session = lab.start_login()
        until(lambda: _is_asked(lab.first), "the question to be asked")
        meanwhile()
    return session.end()


ASKS = "single_job_skip_rpc=0 action_unknown=newest action_no_jobs=deny timeout_ms=30000"


@contextlib.contextmanager
def patient(lab: Lab) -> Iterator[None]:
    """callerid has time for a job's whole end."""
    with lab.agent_settings(lab.second, "[callerid]\ntimeout_ms = 10000\n"):
        yield


def test_a_job_ends_between_the_decision_and_the_adoption(faults_lab: Lab) -> None:
    """Decided for, then cancelled and gone: one job less, and no failure by which anybody could be let in."""
    lab, slurm = faults_lab, slurm_of(faults_lab)
    with patient(lab):
        jobs: List[str] = []

        def login() -> str:
            (job,) = lab.kind.start(1, ALICE, [lab.second])
            jobs.append(job)
            return login_while_asking(lab, lambda: lab.kind.end([job], ALICE, [lab.second])).landed

        check(
            lab,
            NO_JOBS,
            fault=("adopt", "job_ended"),
            log="faults=job_ended[ ,].* of uid [0-9]+: job [0-9]+ has ended; jobs_here: none; decide: no_jobs: ",
            options=ASKS,
            login=login,
        )
    slurm.cancel(*jobs)


def test_the_same_id_comes_again_between_the_decision_and_the_adoption(faults_lab: Lab) -> None:
    """Requeued: what was decided for the first run is not carried out on the second, and begins too late to count."""
    lab, slurm = faults_lab, slurm_of(faults_lab)
    with patient(lab):
        job = slurm.submit(ALICE, [lab.second], "--requeue")
        try:
            slurm.wait_started(job, ALICE, [lab.second])

            def requeue() -> None:
                slurm.run(["scontrol", "requeue", job])
                slurm.wait_gone(job, [lab.second])
                slurm.wait(lambda: slurm.state_of(job) == "PENDING", "the requeue")
                # slurmd remembers by the second which jobs of an id were killed.
                slurm.run(["scontrol", "update", f"JobId={job}", "StartTime=now+3"])
                slurm.wait_started(job, ALICE, [lab.second])

            check(
                lab,
                NO_JOBS,
                fault=("adopt", "job_ended"),
                log=f"faults=job_ended[ ,].*adopt: job {job} failed: job {job} of uid {ALICE.uid}: job {job} has ended",
                options=ASKS,
                login=lambda: login_while_asking(lab, requeue).landed,
            )
            lab.pam("action_no_jobs=deny")
            assert lab.login().landed == f"job {job} on node2"
        finally:
            lab.kind.end([job], ALICE, [lab.second])
