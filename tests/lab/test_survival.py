"""What survives the agent: logins, connections, the probe. It is killed and started again, by the dozen."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator, List, Mapping, Set, Tuple

import pytest

from lab.cgroups import V2, paths_of_process
from lab.etc_files import ALICE, pam_sshd
from lab.lab import REPORT, Lab, Session
from lab.nodes import Cluster
from lab.storm import Activated, Storm
from lab.waiting import until
from marked_probe import in_kernel, marked_sources, tags_of

pytestmark = pytest.mark.timeout(900)

PAM_SUCCESS = 0
BUDGET_MS = 20_000
# What a phase takes beside waiting for the agent, on two cores that are busy.
SLACK_MS = 5000
OPTIONS = f"action_no_jobs=deny action_unknown=deny action_generic_failure=deny timeout_ms={BUDGET_MS}"
ROUNDS = 10
SETTINGS = "/etc/adoptd/conf.d/50-survival.toml"


@pytest.fixture(scope="module")
def survivors() -> Iterator[Lab]:
    """A cluster of our own, since its agents do not live long; the probe of the second node is like no other."""
    with Cluster() as cluster:
        lab = Lab(cluster)
        marked_sources(lab.second.path("/etc/adoptd/bpf"), os.getpid())
        lab.second.write(SETTINGS, '[probe]\nsource_dir = "/etc/adoptd/bpf"\n')
        lab.second.stop("agent")
        lab.second.start_agent()
        lab.pam(OPTIONS)
        yield lab


def _probe_of(lab: Lab) -> Tuple[Set[str], Mapping[str, int]]:
    pin_dir = lab.second.path("/sys/fs/bpf/adoptd")
    assert len([entry for entry in pin_dir.iterdir() if entry.is_dir()]) == 1
    tags = tags_of(pin_dir)
    return tags, in_kernel(tags)


class _Killer:
    """Ends the agent of a node again and again, each time as soon as it has served for a moment."""

    def __init__(self, activated: Activated, how: signal.Signals) -> None:
        self._activated, self._how = activated, how
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.times = 0
        self.failure: List[BaseException] = []

    def __enter__(self) -> _Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self.failure:
            raise self.failure[0]

    def _run(self) -> None:
        try:
            while not self._over.wait(0.5):
                self._activated.end_agent(self._how)
                self.times += 1
        except BaseException as failure:  # handed to the test's own thread
            self.failure.append(failure)


@pytest.mark.parametrize(
    ("how", "accounts", "logins"), [(signal.SIGUSR1, 460, 40), (signal.SIGHUP, 380, 20)], ids=["killed", "restarted"]
)
def test_the_agent_ends_again_and_again_during_logins(
    survivors: Lab, how: signal.Signals, accounts: int, logins: int
) -> None:
    """500 logins with kill -9, 400 with restarts in order: every one gets in, into its own job, within its budget.

    Nobody is refused for want of an agent, and there is exactly the probe that there was.
    """
    lab = survivors
    tags, before = _probe_of(lab)
    tail = lab.second.syslog()
    with lab.jobs(2) as jobs, Activated(lab.second) as activated, Storm(lab, jobs, OPTIONS) as storm:

        def ssh(number: int) -> Tuple[str, str]:
            job = jobs[number % 2]
            login = lab.login(job=job)
            right = f"job {job} on node2"
            return right, right if login.landed == right else f"{login.landed}: {login.errors}"

        with _Killer(activated, how) as killer, ThreadPoolExecutor(6) as pool:
            landed = [pool.submit(ssh, number) for number in range(logins)]
            phases = [pool.submit(storm.account, number, ROUNDS) for number in range(accounts // ROUNDS)]
            # Mixed: neither kind waits for the end of the other.
            for phase in phases:
                phase.result()
            pairs = [each.result() for each in landed]
        # As many as the logins took time for: the faster the machine, the fewer.
        assert killer.times >= 2
        told = Counter(
            tuple(r.fields.get(name, "-") for name in ("verdict", "reason", "fault"))
            for r in lab.pam_records(tail)
            if r.fields.get("phase") == "account"
        )
        assert [pair for pair in pairs if pair[0] != pair[1]] == [], told
        assert Counter(each.rc for each in storm.phases) == {PAM_SUCCESS: accounts}, told
        assert max(each.ms for each in storm.phases) < BUDGET_MS + SLACK_MS
        records = [r for r in lab.pam_records(tail) if r.fields.get("phase") == "account"]
        assert len(records) == accounts + logins
        # By the job that it came from, two in equal parts, and each known by the probe's label at its source.
        assert Counter(r.fields["job"] for r in records) == dict.fromkeys(jobs, (accounts + logins) // 2)
        assert all((r.ms or 0) < BUDGET_MS + SLACK_MS for r in records)
        assert until(lambda: in_kernel(tags) == before, "the one probe that there was")
        assert _probe_of(lab) == (tags, before)


def test_connections_made_without_an_agent_at_their_source_are_answered(survivors: Lab) -> None:
    """Killed, away while the connections are made, killed again before they are asked about: the labels are there."""
    lab = survivors
    with lab.jobs(2) as jobs, Activated(lab.first) as source, Storm(lab, jobs, OPTIONS) as storm:
        begun = []
        for number in range(12):
            if number % 4 == 0:
                killing = threading.Thread(target=source.end_agent, args=(signal.SIGUSR1,))
                killing.start()
                begun.append(storm.begin(number, 2))
                killing.join()
            else:
                begun.append(storm.begin(number, 2))
        source.end_agent(signal.SIGUSR1)
        tail = lab.second.syslog()
        for each in begun:
            storm.finish(each)
        assert Counter((phase.job, phase.rc) for phase in storm.phases) == {(job, PAM_SUCCESS): 12 for job in jobs}
        records = lab.pam_records(tail)
        assert Counter((r.fields["job"], r.fields["witness"]) for r in records) == {(job, "bpf"): 12 for job in jobs}


# ---- between the phases of one login


GATE = "/run/gates/between"
_WAIT = f"#!/bin/sh\ntouch {GATE}.asked\nwhile [ ! -e {GATE}.open ]; do sleep 0.02; done\n"


@pytest.fixture
def gate(survivors: Lab) -> Iterator[Lab]:
    """The second node's sshd waits between our account phase and our session phase."""
    lab = survivors
    lab.second.write("/etc/gate.sh", _WAIT, mode=0o755)
    options = f"timeout_ms={BUDGET_MS} {OPTIONS}"
    stack = pam_sshd(lab.cluster.pam_module, options).splitlines()
    at = next(number for number, line in enumerate(stack) if line.startswith("session"))
    stack.insert(at, "session required pam_exec.so quiet /etc/gate.sh")
    lab.second.write("/etc/pam.d/sshd", "\n".join(stack) + "\n")
    try:
        yield lab
    finally:
        for name in ("asked", "open"):
            lab.second.path(f"{GATE}.{name}").unlink(missing_ok=True)
        lab.pam(OPTIONS)


def _at_the_gate(lab: Lab, job: str) -> Session:
    # Of a login before this one.
    lab.second.path(f"{GATE}.asked").unlink(missing_ok=True)
    session = lab.start_login(job=job, command=REPORT)
    until(lab.second.path(f"{GATE}.asked").exists, "a login between its phases")
    return session


def test_an_agent_killed_between_the_phases_leaves_what_was_settled(gate: Lab) -> None:
    """The next one's session phase follows what the account phase had settled."""
    lab = gate
    tail = lab.second.syslog()
    with lab.jobs(2) as jobs:
        session = _at_the_gate(lab, jobs[0])
        lab.second.kill("agent")
        lab.second.start_agent()
        lab.second.path(f"{GATE}.open").touch()
        assert session.end().landed == f"job {jobs[0]} on node2"
    account, session_phase = lab.second.pam_records(tail)
    assert (account.fields["phase"], account.fields["job"]) == ("account", jobs[0])
    assert [session_phase.fields[name] for name in ("phase", "job", "reason")] == ["session", jobs[0], "account_phase"]


def test_who_was_let_in_without_a_job_is_let_in_over_a_restart(gate: Lab) -> None:
    """Nobody could tell the job, and another module said yes: the next agent's session phase does not undo that."""
    lab = gate
    path = lab.second.path("/etc/pam.d/sshd")
    lines = path.read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("account") and "pam_adopt" in line)
    lines[at] = lines[at].replace("account required", "account [success=ok default=ignore]")
    lines.insert(at + 1, "account required pam_permit.so")
    lab.second.write("/etc/pam.d/sshd", "\n".join(lines) + "\n")
    tail = lab.second.syslog()
    with lab.jobs(2):
        session = lab.start_login(command=REPORT)
        until(lab.second.path(f"{GATE}.asked").exists, "a login between its phases")
        lab.second.kill("agent")
        lab.second.start_agent()
        lab.second.path(f"{GATE}.open").touch()
        outcome = session.end()
    told = [(r.fields["phase"], r.fields["verdict"], r.fields["reason"]) for r in lab.second.pam_records(tail)]
    assert told == [("account", "deny", "unknown"), ("session", "ignore", "unknown")]
    assert outcome.landed == "no job on node2"


def test_a_process_that_was_moved_by_half_is_moved_whole(gate: Lab) -> None:
    """As an agent leaves it that is killed between two hierarchies: the session phase moves it in all of them."""
    lab = gate
    if all(hierarchy.name == V2 for hierarchy in lab.second.group.hierarchies):
        pytest.fail("there is one cgroup hierarchy here, expected several: nothing can be moved by half")
    with lab.jobs(2) as jobs:
        session = _at_the_gate(lab, jobs[0])
        place = lab.kind.place(lab.second, ALICE, jobs[0])
        adopted = until(
            lambda: [pid for pid in _pids_in(place.procs_files()) if _is_sshd(pid)] or None, "sshd is in the job"
        )
        # Out of the job in every hierarchy but one.
        for pid, procs in itertools.product(adopted, lab.second.system_group.procs_files()[1:]):
            Path(procs).write_text(str(pid))
        paths = paths_of_process(Path(f"/proc/{adopted[0]}/cgroup").read_text())
        assert len({f"job_{jobs[0]}" in path for path in paths.values()}) == 2
        lab.second.path(f"{GATE}.open").touch()
        assert session.end().landed == f"job {jobs[0]} on node2"


def _pids_in(procs_files: Tuple[str, ...]) -> List[int]:
    return [int(word) for word in Path(procs_files[0]).read_text().split()]


def _is_sshd(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == "sshd"
    except OSError:
        return False
