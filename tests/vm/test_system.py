"""The machine itself, and the package's service under a real systemd."""

from __future__ import annotations

import json
import re

import pytest

from vm.cluster import Cluster

pytestmark = pytest.mark.timeout(1800)

# systemd-analyze's exposure, 0 to 10, of adoptd.service with systemd 252: what is left is what the agent is for.
EXPOSURE_MAX = 4.2


def test_it_is_what_it_is_said_to_be(cluster: Cluster) -> None:
    """Debian 12's kernel and systemd, cgroup v2 alone, pam_systemd in the session stack."""
    run = cluster.machine.run
    assert run("uname --kernel-release").startswith("6.1.")
    assert run("cat /proc/1/comm") == "systemd\n"
    assert run("stat --file-system --format %T /sys/fs/cgroup") == "cgroup2fs\n"
    assert " cgroup " not in run("cat /proc/self/mountinfo")
    assert "pam_systemd.so" in run("cat /etc/pam.d/common-session")


def test_installing_starts_it_and_no_unit_has_failed(cluster: Cluster) -> None:
    """The service, its sockets; nothing else is hurt."""
    run = cluster.machine.run
    units = "adoptd.service adoptd.socket adoptd-user.socket adoptd-callerid.socket"
    assert run(f"systemctl is-active {units}").split() == ["active"] * 4
    assert run(f"systemctl is-enabled {units}").split() == ["enabled"] * 4
    assert run("systemctl --failed --no-legend") == ""
    assert run("systemctl is-system-running") == "running\n"


def test_the_agent_finds_what_is_there(cluster: Cluster) -> None:
    """Hardened as it is: the probe with its self-test, munge, Slurm's jobs, every witness."""
    status = json.loads(cluster.machine.run("adoptctl status --json"))
    assert status["jobs_backend"] == "slurm"
    assert status["seal"] == "munge"
    assert status["probe"]["attached"] is True
    cluster.wait('adoptctl status --json | grep -q \'"self_test": "ok"\'', "the self-test has been made")
    assert status["witnesses"]["bpf"] == "ok"
    # What could not be loaded is told here, behind a semicolon.
    loaded = cluster.machine.run("journalctl --no-pager --unit adoptd.service --grep probe_loaded").splitlines()
    assert [line for line in loaded if re.search(r'said="loaded, schema [0-9a-f]+"$', line)], loaded
    assert [line for line in loaded if ";" in line] == []


def test_conntrack_can_be_asked_from_the_first_question_on(cluster: Cluster) -> None:
    """It is that question which has the kernel load nf_conntrack_netlink, and here that takes its time."""
    loaded = "grep -q ^nf_conntrack_netlink /proc/modules"
    cluster.machine.run(f"modprobe nf_conntrack && modprobe --remove nf_conntrack_netlink && ! {loaded}")
    cluster.machine.run("systemctl restart adoptd.service")
    witnesses = json.loads(cluster.machine.run("adoptctl status --json"))["witnesses"]
    assert witnesses["conntrack"] == "ok"
    cluster.machine.run(loaded)


def test_how_much_it_is_shut_in(cluster: Cluster) -> None:
    """By systemd's own figure."""
    shown = cluster.machine.run("systemd-analyze security --no-pager adoptd.service")
    match = re.search(r"Overall exposure level for adoptd.service: ([\d.]+)", shown)
    assert match, shown
    assert float(match[1]) <= EXPOSURE_MAX, shown
    print(f"systemd-analyze security adoptd.service: {match[1]}")


def test_a_login_starts_the_agent_again(cluster: Cluster) -> None:
    """The socket is systemd's: with the service stopped, a login waits in it, starts the agent and is answered."""
    cluster.pam_adopt()
    cluster.machine.run("systemctl stop adoptd.service")
    assert cluster.machine.execute("systemctl is-active adoptd.service").out == "inactive\n"
    assert cluster.machine.run("systemctl is-active adoptd.socket") == "active\n"
    refused = cluster.login()
    assert not refused.let_in
    assert "you have no job running on" in refused.err
    assert cluster.machine.run("systemctl is-active adoptd.service") == "active\n"


def test_a_killed_agent_comes_back_by_itself(cluster: Cluster) -> None:
    """And logins meanwhile lose only time."""
    cluster.pam_adopt()
    before = cluster.machine.run("systemctl show --value --property MainPID adoptd.service").strip()
    cluster.machine.run(f"kill -KILL {before}")
    refused = cluster.login()
    assert not refused.let_in
    assert "you have no job running on" in refused.err
    after = cluster.machine.run("systemctl show --value --property MainPID adoptd.service").strip()
    assert after not in ("0", before)
    cluster.machine.run("systemctl reset-failed adoptd.service")


def test_a_hanging_agent_is_killed_and_started_again(cluster: Cluster) -> None:
    """systemd's watchdog; who is not answered in time is decided by action_generic_failure, here: refused."""
    before = cluster.machine.run("systemctl show --value --property MainPID adoptd.service").strip()
    cluster.machine.run(f"kill -STOP {before}")
    another = f"[ $(systemctl show --value --property MainPID adoptd.service) != {before} ]"
    cluster.wait(f"{another} && adoptctl status >/dev/null 2>&1", "another agent answers")
    assert "watchdog" in cluster.machine.run("journalctl --no-pager --unit adoptd.service | tail -n 40").lower()


def test_a_reload_takes_over_the_configuration(cluster: Cluster) -> None:
    """systemctl reload; what is wrong is refused and what is in force stays."""
    run = cluster.machine.run
    cursor = cluster.since()
    run("printf '[agent]\\nlog_level = \"loud\"\\n' >/etc/adoptd/conf.d/wrong.toml; systemctl reload adoptd.service")
    cluster.wait(f"journalctl --unit adoptd.service --after-cursor '{cursor}' | grep -q log_level", "it is named")
    run("rm /etc/adoptd/conf.d/wrong.toml; systemctl reload adoptd.service")
    cluster.wait(f"journalctl --unit adoptd.service --after-cursor '{cursor}' | grep -q reloaded", "it is taken over")
    assert run("systemctl is-active adoptd.service") == "active\n"


def test_an_upgrade_keeps_sessions_and_sockets(cluster: Cluster) -> None:
    """The same package once more: the sockets are not closed, the agent is another, the jobs' sessions stay theirs."""
    run = cluster.machine.run
    cluster.pam_adopt()
    since = "systemctl show --value --property ActiveEnterTimestampMonotonic adoptd.socket"
    socket_before, pid_before = run(since), run("systemctl show --value --property MainPID adoptd.service")
    with cluster.jobs(1) as (job,):
        run("cd /tmp && (runuser -u alice -- ssh alice@vm 'exec sleep 1000' >/dev/null 2>&1 &)")
        cluster.wait("adoptctl sessions --json | grep -q alice", "a session")
        run("dpkg --install /root/adoptd.deb 2>&1")
        cluster.wait("adoptctl status >/dev/null 2>&1", "the new agent answers")
        assert run("systemctl show --value --property MainPID adoptd.service") != pid_before
        assert run(since) == socket_before
        assert f'"{job}"' in run("adoptctl sessions --json")


def test_nothing_has_failed_after_all_that(cluster: Cluster) -> None:
    """No unit is left failed, and the agent has reported no fault of its own."""
    assert cluster.machine.run("systemctl --failed --no-legend") == ""
    assert "Traceback" not in cluster.machine.run("journalctl --no-pager --unit adoptd.service")
