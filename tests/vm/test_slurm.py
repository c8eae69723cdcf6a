"""Logins on Slurm's node: cgroup v2, slurmstepd's scope of systemd, pam_systemd in the session stack."""

from __future__ import annotations

import pytest

from package.installed import RECOMMENDED
from vm.cluster import PAM_OPTIONS, Cluster

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(autouse=True)
def _stack(cluster: Cluster) -> None:
    cluster.pam_adopt()


def test_without_a_job_nobody_gets_in(cluster: Cluster) -> None:
    """And is told why; bob's job is no help to alice."""
    with cluster.jobs(1, user="bob"):
        refused = cluster.login()
    assert (refused.let_in, refused.job) == (False, "")
    assert "you have no job running on vm" in refused.err


def test_into_the_only_job(cluster: Cluster) -> None:
    """The session's own processes, with the job's number in the environment."""
    with cluster.jobs(1) as (job,):
        login = cluster.login("echo number=$SLURM_JOB_ID")
    assert login.job == job, login
    assert f"number={job}\n" in login.out


def test_into_the_job_it_came_from(cluster: Cluster) -> None:
    """Of two, whichever is the older; from neither, into the newest. The witness is the probe."""
    with cluster.jobs(2) as (older, newer):
        cursor = cluster.since()
        assert cluster.login(from_job=older).job == older
        assert cluster.login(from_job=newer).job == newer
        assert cluster.login().job == newer
        assert cluster.logged(cursor).count("reason=callerid witness=bpf") == 2


def test_a_sessions_processes_stay_in_the_job(cluster: Cluster) -> None:
    """Verified by Slurm's own accounting of the step, and by systemd: logind's session has none of them."""
    with cluster.jobs(1) as (job,):
        login = cluster.login("sleep 1 & cat /proc/$!/cgroup; loginctl --no-legend; wait")
        assert login.job == job
        assert login.out.count(f"job_{job}/step_extern") == 2


def test_the_end_of_the_job_is_the_end_of_the_session(cluster: Cluster) -> None:
    """scancel, and nothing of the session is left."""
    with cluster.jobs(1):
        cluster.machine.run("cd /tmp && (runuser -u alice -- ssh alice@vm 'exec sleep 4321' >/dev/null 2>&1 &)")
        cluster.wait("pgrep -u alice -f '^sleep 4321' >/dev/null", "the session's process")
    cluster.wait("! pgrep -u alice -f '^sleep 4321' >/dev/null", "the session's process is gone")


def test_pam_systemd_does_not_wait_for_long(cluster: Cluster) -> None:
    """The process is taken out of logind's scope by the session phase, when logind has answered: no time is lost."""
    with cluster.jobs(1):
        cursor = cluster.since()
        cluster.login()
        assert "timed out" not in cluster.logged(cursor, unit="ssh.service")


def test_with_the_lines_before_pam_systemd(cluster: Cluster) -> None:
    """The wrong order: systemd takes the session out of its job again, the agent sees it and puts it back."""
    cluster.pam_adopt(before_systemd=True)
    with cluster.jobs(1) as (job,):
        cursor = cluster.since()
        login = cluster.login("sleep 20; cat /proc/self/cgroup")
        assert login.let_in
        assert f"job_{job}/step_extern" in login.out.splitlines()[-1], login
        assert "timed out" not in cluster.logged(cursor, unit="ssh.service")
        assert "mover=systemd" in cluster.logged(cursor)
    doctor = cluster.machine.execute("adoptd doctor").out
    assert "pam_systemd.so comes after it" in doctor


def test_without_a_session_line(cluster: Cluster) -> None:
    """pam_slurm_adopt's own arrangement: the watch puts back what systemd took, once the login is done."""
    cluster.pam(f"account {RECOMMENDED} pam_adopt.so {PAM_OPTIONS}")
    with cluster.jobs(1) as (job,):
        login = cluster.login("sleep 60; cat /proc/self/cgroup")
        assert login.let_in
        assert f"job_{job}/step_extern" in login.out.splitlines()[-1], login


def test_root_gets_in_whatever_is_broken(cluster: Cluster) -> None:
    """No agent, no sockets, "required", refusing on failure: root passes, users do not."""
    options = f"pam_adopt.so {PAM_OPTIONS} timeout_ms=2000 action_generic_failure=deny"
    cluster.pam(f"account required {options}", f"session required {options}")
    cluster.machine.run("systemctl stop adoptd.service adoptd.socket adoptd-user.socket adoptd-callerid.socket")
    try:
        assert cluster.login(user="root").let_in
        refused = cluster.login()
        assert not refused.let_in
        assert "cannot find out about your jobs" in refused.err
    finally:
        cluster.machine.run("systemctl start adoptd.socket adoptd-user.socket adoptd-callerid.socket adoptd.service")


def test_observing_lets_everybody_in(cluster: Cluster) -> None:
    """And moves nobody: the session is where systemd puts it."""
    cluster.pam_adopt("mode=observe")
    assert cluster.login().let_in
    with cluster.jobs(1) as (job,):
        cursor = cluster.since()
        login = cluster.login()
        assert (login.let_in, login.job) == (True, "")
        assert f"job={job}" in cluster.logged(cursor)
