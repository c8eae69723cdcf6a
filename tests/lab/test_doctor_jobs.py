"""What the doctor says where jobs are plain cgroups and something is wrong with those; and of peers that are none.

Each is well before, and well again after.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Callable, ContextManager, Dict, Iterator, Sequence

import pytest

from lab.cgroups import V2
from lab.etc_files import ALICE
from lab.lab import Lab
from lab.test_doctor import PATIENT, Case, bad, examined, file_with, owned

pytestmark = pytest.mark.timeout(150)

CONF = "/etc/adoptd/conf.d/50-jobs.toml"


# ---- how jobs are broken: each is undone on leaving


@contextlib.contextmanager
def job_with(lab: Lab, hierarchy: str, name: str, value: str, again: str) -> Iterator[None]:
    """A job that has ``value`` in a file of one hierarchy."""
    with lab.jobs(1) as (job,):
        names = [each.name for each in lab.cluster.group.hierarchies]
        if hierarchy not in names:
            pytest.skip(f"cgroup hierarchies here: {', '.join(names)}, and {hierarchy} is wanted")
        directory = places(lab, job)[names.index(hierarchy)]
        (directory / name).write_text(value, encoding="ascii")
        try:
            yield
        finally:
            (directory / name).write_text(again, encoding="ascii")


@contextlib.contextmanager
def job_of_nobody(lab: Lab) -> Iterator[None]:
    """The directory above a job is its user's, who could have made the job, then."""
    with lab.jobs(1) as (job,):
        for directory in places(lab, job):
            os.chown(directory.parent, ALICE.uid, -1)
        yield


@contextlib.contextmanager
def job_with_settings(lab: Lab, text: str) -> Iterator[None]:
    with lab.jobs(1), file_with(lab.second, CONF, lambda _: f"[jobs]\n{text}\n"):
        yield


@contextlib.contextmanager
def refusing_job(lab: Lab) -> Iterator[None]:
    with lab.kind.broken(lab.second, lambda: None):
        yield


@contextlib.contextmanager
def too_little_optmem(lab: Lab) -> Iterator[None]:
    """The node's own, where the kernel has it by network namespace (Linux 6.9); a label does not fit into it."""
    name = "net.core.optmem_max"
    if "optmem_max" not in lab.second.run(["ls", "/proc/sys/net/core"]).split():
        pytest.skip("net.core.optmem_max is the host's alone before Linux 6.9")
    before = lab.second.run(["sysctl", "-n", name]).strip()
    lab.second.run(["sysctl", "-w", f"{name}=64"])
    try:
        yield
    finally:
        lab.second.run(["sysctl", "-w", f"{name}={before}"])


def places(lab: Lab, job: str) -> Sequence[Path]:
    """Its directory in each hierarchy, in their order."""
    return lab.cluster.group.child(f"{lab.second.name}/jobs/uid_{ALICE.uid}/job_{job}").directories()


def at(hierarchy: str, name: str, value: str, again: str) -> Callable[[Lab], ContextManager[None]]:
    return lambda lab: job_with(lab, hierarchy, name, value, again)


CASES: Dict[str, Case] = {
    "frozen (v1)": Case(
        at("freezer", "freezer.state", "FROZEN", "THAWED"), "warning", "jobs", ("is frozen", "THAWED to freezer.state")
    ),
    "frozen (v2)": Case(at(V2, "cgroup.freeze", "1", "0"), "warning", "jobs", ("is frozen", "0 to cgroup.freeze")),
    "frozen, tried (v1)": Case(
        at("freezer", "freezer.state", "FROZEN", "THAWED"),
        "failure",
        "jobs",
        ("cannot be ended there", "frozen?"),
        (*PATIENT, "--deep"),
    ),
    "full": Case(at("pids", "pids.max", "0", "max"), "warning", "jobs", ("pids.max", "cannot start its shell")),
    "of a type that takes no process": Case(refusing_job, "failure", "jobs", ("cgroup.type", "leaf")),
    "above it a user's directory": Case(
        job_of_nobody, "failure", "jobs", (f"is owned by uid {ALICE.uid}, so its user could have made it",)
    ),
    "a leaf that is not there": Case(
        lambda lab: job_with_settings(lab, 'leaf = "session"'), "failure", "jobs", ("/session", "is not there")
    ),
    "a path that nothing is like": Case(
        lambda lab: job_with_settings(
            lab, f'path = "{lab.cluster.group.path}/{lab.second.name}/jobs/user_{{uid}}/job_{{job}}"'
        ),
        "warning",
        "jobs",
        ("nothing there has a name as in", f"uid_{ALICE.uid}"),
    ),
    "a path that says nobody": Case(
        lambda lab: job_with_settings(lab, f'path = "{lab.cluster.group.path}/{{job}}"'),
        "failure",
        "jobs",
        ("is nobody's job", "{uid}"),
    ),
    # Peers
    "a peer that is this node": Case(
        lambda lab: contextlib.nullcontext(),
        "warning",
        "peer",
        ("at this node itself", "another node"),
        (*PATIENT, "--peer", "node2"),
    ),
    "a peer with a port": Case(
        lambda lab: contextlib.nullcontext(),
        "failure",
        "peer",
        ("node1:6830 is no host here", "without a user or a port"),
        (*PATIENT, "--peer", "node1:6830"),
    ),
    # The probe
    "no room for labels": Case(
        too_little_optmem, "warning", "probe", ("net.core.optmem_max is 64", "sysctl -w net.core.optmem_max")
    ),
    "pins a user's": Case(
        lambda lab: owned(lab.second, "/sys/fs/bpf/adoptd", ALICE.uid),
        "failure",
        "probe",
        (f"is owned by uid {ALICE.uid}", "chown root:root /sys/fs/bpf/adoptd"),
    ),
}


def test_a_node_that_is_well(patient: Lab) -> None:
    """With a job, and without one."""
    with patient.jobs(1):
        assert bad(examined(patient.second, *PATIENT, "--deep")) == []
    assert bad(examined(patient.second, *PATIENT)) == []


@pytest.mark.parametrize("name", CASES)
def test_the_cause_is_named(patient: Lab, name: str) -> None:
    """Of the check, the grade and the words."""
    case = CASES[name]
    with case.how(patient):
        said = examined(patient.second, *(case.options or PATIENT))
    found = [each for each in said if (each.grade, each.check) == (case.grade, case.check)]
    assert any(all(word in f"{each.seen} {each.remedy}" for word in case.words) for each in found), bad(said)
    assert not any("the check itself failed" in each.seen for each in said)


def test_it_is_well_again(patient: Lab) -> None:
    """After all of that."""
    with patient.jobs(1):
        assert bad(examined(patient.second, *PATIENT)) == []
