"""A real agent with no more rights than its unit gives it: all that is needed is there, and each of them is needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import List, Sequence

import pytest
from real_agent import ROOT, JobProcess, RealAgent, agent, job
from sockets import Client, ClientSpec

from kernel.cgroup_tree import V2, Cgroups
from lab.waiting import PATIENCE

__all__ = ["agent", "job"]

pytestmark = pytest.mark.timeout(180 * PATIENCE)

UNIT = Path(__file__).resolve().parents[2] / "packaging" / "systemd" / "adoptd.service"


def _of_unit() -> List[str]:
    lines = re.findall(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    return [word[len("CAP_") :].lower() for word in " ".join(lines).split()]


def _bounded(kept: Sequence[str]) -> List[str]:
    """A prefix that leaves root these capabilities alone, as CapabilityBoundingSet= does."""
    return ["setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all" + "".join(f",+{c}" for c in kept)]


def test_what_the_unit_grants_is_enough(agent: RealAgent, job: JobProcess) -> None:
    """The probe is loaded, older sockets are labelled, jobs found, sessions watched by the kernel's own word."""
    older = job.connect()
    agent.start(prefix=_bounded(_of_unit()))
    assert agent.probe["attached"] is True
    assert agent.status()["seal"] == "key"
    for connection in (older, job.connect()):
        found = agent.whois(connection)
        assert (found["job"], found["witness"], found["pid"]) == (job.ID, "bpf", job.pid)
    lines = agent.log.read_text().splitlines()
    # That the key was read is seen above; that it took long says nothing of rights.
    complaints = [line for line in lines if " warning " in line or " error " in line]
    assert [line for line in complaints if " seal_slow " not in line] == []
    # What could not be loaded is told here, behind a semicolon.
    (loaded,) = [line for line in lines if " probe_loaded " in line]
    assert re.search(r'said="loaded, schema [0-9a-f]+"$', loaded), loaded


# CAP_SYS_ADMIN stands for some of the others, so it is left out here; tests of namespaces and mounts are what need it.
@pytest.mark.parametrize("capability", ["bpf", "net_admin", "perfmon"])
def test_without_one_of_these_there_is_no_probe(agent: RealAgent, job: JobProcess, capability: str) -> None:
    """Said, and the other witnesses answer."""
    agent.start(prefix=_bounded([each for each in _of_unit() if each not in (capability, "sys_admin")]))
    assert agent.probe["attached"] is False
    assert f"and has no CAP_{capability.upper()}" in str(agent.probe["reason"])
    assert agent.whois(job.connect())["witness"] == "diag"


def test_without_reading_by_handle_no_job_is_told(agent: RealAgent, job: JobProcess) -> None:
    """A cgroup's number is opened by handle."""
    agent.start(prefix=_bounded([each for each in _of_unit() if each != "dac_read_search"]))
    assert agent.whois(job.connect())["reason"] == "job_manager"


_ASK_PROC = """
import sys
from adoptd.connections.proc import ProcWitness
from adoptd.deadline import Deadline
from adoptd.model import Connection, Endpoint, WitnessUnavailable
try:
    found = ProcWitness().owner_of(Connection(*map(Endpoint.parse, sys.argv[1:])), Deadline.after_ms(20000))
    print(None if found is None else found.pid)
except WitnessUnavailable as error:
    print("unavailable:", error)
"""


@pytest.mark.parametrize("kept", [True, False], ids=["with", "without"])
def test_looking_at_others_processes_needs_sys_ptrace(kept: bool) -> None:
    """The last witness finds whose socket it is among the processes of all users, or says that it cannot look."""
    granted = [each for each in _of_unit() if kept or each != "sys_ptrace"]
    with Client(ClientSpec(real_uid=65534)) as client:
        ends = [f"127.0.0.1:{port}" for port in (client.source_port, client.destination_port)]
        done = subprocess.run(
            [*_bounded(granted), sys.executable, "-c", _ASK_PROC, *ends],
            env={**os.environ, "PYTHONPATH": f"{ROOT}/agent"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    if kept:
        assert done.stdout.strip() == str(client.pid)
    else:
        assert done.stdout.startswith("unavailable: cannot look into /proc/")


def _with_a_cpuset(cgroups: Cgroups) -> Path:
    """A cgroup of the test's own in which processes have a set of processors."""
    if "cpuset" in cgroups.hierarchies:
        cgroups.make(cgroups.top, ["cpuset"])
        made = cgroups.at("cpuset", cgroups.top)
        for name in ("cpuset.cpus", "cpuset.mems"):
            (made / name).write_text((made.parent / name).read_text())
        return made
    cgroups.need(V2)
    if "cpuset" not in (cgroups.at(V2, "/cgroup.subtree_control")).read_text().split():
        pytest.skip("this host gives cgroups no cpuset, neither in version 1 nor in version 2")
    cgroups.make(cgroups.top, [V2])
    return cgroups.at(V2, cgroups.top)


@pytest.mark.parametrize("kept", [True, False], ids=["with", "without"])
def test_moving_a_process_of_more_rights_needs_sys_nice(cgroups: Cgroups, kept: bool) -> None:
    """sshd has all of root's capabilities. The kernel asks a cpuset's newcomer's mover for CAP_SYS_NICE then."""
    place = _with_a_cpuset(cgroups)
    login = cgroups.child()
    granted = [each for each in _of_unit() if kept or each != "sys_nice"]
    done = subprocess.run(
        [*_bounded(granted), "sh", "-c", f"echo {login.pid} >{place}/cgroup.procs"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    moved = str(login.pid) in (place / "cgroup.procs").read_text().split()
    assert (done.returncode == 0, moved) == (kept, kept), done.stderr


def test_without_sys_admin_all_of_this_works(agent: RealAgent, job: JobProcess) -> None:
    """On kernels from 5.8 on and where bpffs is mounted: a drop-in may take it away."""
    agent.start(prefix=_bounded([each for each in _of_unit() if each != "sys_admin"]))
    assert agent.probe["attached"] is True
    assert agent.whois(job.connect())["witness"] == "bpf"
