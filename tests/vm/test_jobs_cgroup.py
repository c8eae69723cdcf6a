"""Logins on a node whose jobs are plain cgroups, here scopes of systemd's, under the package's own service.

The hardened unit moves processes itself then, where with Slurm the steps do it.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from typing import Iterator, Tuple

import pytest

from vm.cluster import Cluster

pytestmark = pytest.mark.timeout(1800)

DROP_IN = "/etc/adoptd/conf.d/jobs.toml"
CONFIG = '[jobs]\nbackend = "cgroup"\npath = "/batch.slice/batch-{uid}.slice/job-{job}.scope"\n'
OLDER, NEWER = "vm.41", "vm.42"


def _backend(cluster: Cluster) -> str:
    return str(json.loads(cluster.machine.run("adoptctl status --json"))["jobs_backend"])


def _state(cluster: Cluster) -> Tuple[str, ...]:
    """What the test must leave as it was."""
    shells = (
        "cat /etc/adoptd/adoptd.toml /etc/adoptd/conf.d/*; ls /etc/adoptd/conf.d",
        "ls -d /sys/fs/cgroup/batch.slice 2>&1",
        "systemctl --failed --no-legend",
        "pgrep --list-name --uid alice sleep",
    )
    return tuple(cluster.machine.execute(shell).out for shell in shells)


@pytest.fixture
def plain(cluster: Cluster) -> Iterator[Cluster]:
    """The node with the configuration of a job manager that is not Slurm; afterwards as it was."""
    cluster.pam_adopt("action_unknown=deny")
    before = _state(cluster)
    assert _backend(cluster) == "slurm"
    cluster.machine.put(CONFIG.encode(), DROP_IN)
    try:
        cluster.machine.run("systemctl restart adoptd.service")
        assert _backend(cluster) == "cgroup"
        yield cluster
    finally:
        # systemd keeps a slice that nothing is in any more.
        cluster.machine.run(f"rm {DROP_IN}; systemctl stop batch.slice; systemctl restart adoptd.service")
    assert _backend(cluster) == "slurm"
    assert _state(cluster) == before


@contextlib.contextmanager
def _scope(cluster: Cluster, job: str) -> Iterator[str]:
    """A job of alice's, as a job manager has systemd make one; the path of its cgroup. Ended on leaving."""
    uid = cluster.machine.run("id -u alice").strip()
    unit = f"job-{job}.scope"
    path = f"/batch.slice/batch-{uid}.slice/{unit}"
    start = f"systemd-run --quiet --scope --uid=alice --slice=batch-{uid}.slice --unit={unit} sleep 100000"
    cluster.machine.run(f"cd /tmp && ({start} </dev/null >/dev/null 2>&1 &)")
    try:
        cluster.wait(f"grep -q . /sys/fs/cgroup{path}/cgroup.procs 2>/dev/null", f"job {job} has started")
        yield path
    finally:
        cluster.machine.run(f"! systemctl is-active --quiet {unit} || systemctl stop {unit}")


def _from(origin: str) -> str:
    return f"echo $$ >/sys/fs/cgroup{origin}/cgroup.procs && " if origin else ""


def _login(cluster: Cluster, command: str, origin: str = "") -> str:
    """What alice's session said, or why there was none; she comes from that cgroup, or from no job."""
    done = cluster.machine.execute(f"cd /tmp && {_from(origin)}exec runuser -u alice -- ssh alice@vm '{command}'")
    return done.out + done.err


def test_logins_into_plain_cgroups(plain: Cluster) -> None:
    """Without a job nobody; into the job it came from, whichever; out of it never; and over with the job."""
    assert "you have no job running on vm" in _login(plain, "true")
    with _scope(plain, OLDER) as older, _scope(plain, NEWER) as newer:
        cursor = plain.since()
        for job, path in ((OLDER, older), (NEWER, newer)):
            said = _login(plain, "cat /proc/self/cgroup; adoptctl whereami --json", origin=path)
            assert f"0::{path}\n" in said
            assert f'"{job}"' in said
        assert plain.logged(cursor).count("reason=callerid witness=bpf") == 2
        # Of two, from neither: by action_unknown.
        assert "0::" not in _login(plain, "cat /proc/self/cgroup")
        command = f"{_from(older)}exec runuser -u alice -- ssh alice@vm 'exec sleep 4242'"
        plain.machine.run(f"cd /tmp && (bash -c {shlex.quote(command)} </dev/null >/dev/null 2>&1 &)")
        plain.wait("pgrep -u alice -f '^sleep 4242' >/dev/null", "the session's process")
        (pid,) = plain.machine.run("pgrep -u alice -f '^sleep 4242'").split()
        # Moved out by root, it is brought back: the guard writes to cgroups as the login did.
        plain.machine.run(f"echo {pid} >/sys/fs/cgroup/init.scope/cgroup.procs")
        plain.wait(f"grep -qx 0::{older} /proc/{pid}/cgroup", "the process is back in its job")
        plain.machine.run(f"systemctl stop job-{OLDER}.scope")
        plain.wait(f"[ ! -e /proc/{pid} ]", "the session's process is gone")
