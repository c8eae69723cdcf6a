"""What the doctor says of nodes whose Slurm is broken on purpose; and of one that is well, an adoption included."""

from __future__ import annotations

import os
import shutil
from typing import Callable, ContextManager, Dict, Iterator

import pytest

from lab.lab import Lab
from lab.nodes import Cluster
from lab.test_doctor import PATIENT, Case, bad, examined, file_with, mode, moved_away, owned, stopped

pytestmark = pytest.mark.timeout(150)

DAEMONS = ("slurmctld", "slurmd", "munged")
CONF = "/etc/slurm/slurm.conf"
PATHS = "/etc/slurm/paths.conf"
SPOOL = "/var/lib/slurm/slurmd"
# The trial's process.
TRIAL = "sleep 20"


@pytest.fixture(scope="module")
def patient() -> Iterator[Lab]:
    """Two compute nodes and a login node."""
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing:
        text = f"doctor on Slurm cannot be tried here: not installed: {', '.join(missing)}"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    with Cluster(slurm=True) as cluster:
        yield Lab(cluster)


def conf(change: Callable[[str], str], file: str = CONF) -> Callable[[Lab], ContextManager[None]]:
    return lambda lab: file_with(lab.second, file, change)


CASES: Dict[str, Case] = {
    "no contain": Case(
        conf(lambda text: text.replace("PrologFlags=contain,x11", "PrologFlags=alloc")),
        "failure",
        "slurm",
        ("contain",),
    ),
    "another tracking": Case(
        conf(lambda text: text.replace("proctrack/cgroup", "proctrack/linuxproc")), "failure", "slurm", ("linuxproc",)
    ),
    "no task/cgroup": Case(
        conf(lambda text: text.replace("task/cgroup,", "")), "warning", "slurm", ("lacks task/cgroup",)
    ),
    "open to all": Case(lambda lab: mode(lab.second, CONF, 0o666), "failure", "slurm", ("everybody", "chmod go-w")),
    "cut short": Case(conf(lambda text: "ClusterName=adoptd\n"), "failure", "slurm", ("not whole",)),
    "an include of nothing": Case(
        conf(lambda text: text + "include gone.conf\n"), "failure", "slurm", ("gone.conf", "No such file")
    ),
    "SlurmUser nobody": Case(
        conf(lambda text: text.replace("SlurmUser=slurm", "SlurmUser=nosuch")),
        "failure",
        "slurm",
        ("'nosuch'", "getent"),
    ),
    "another spool directory": Case(
        conf(lambda text: text.replace(SPOOL, "/var/lib/slurm/elsewhere"), PATHS),
        "failure",
        "slurm",
        ("/var/lib/slurm/elsewhere is missing", "slurm_spool_dir"),
    ),
    "spool directory a user's": Case(
        lambda lab: owned(lab.second, SPOOL, 60001), "failure", "slurm", ("owned by uid 60001", "chown")
    ),
    "no cgroup.conf": Case(
        lambda lab: moved_away(lab.second, "/etc/slurm/cgroup.conf"), "warning", "slurm", ("constrains nothing",)
    ),
    "no slurm.conf": Case(lambda lab: moved_away(lab.second, CONF), "failure", "slurm", ("no slurm.conf",)),
    "munged hangs": Case(lambda lab: stopped(lab.second, "munged"), "failure", "seal", ("munged hangs",)),
}


def test_a_node_that_is_well(patient: Lab) -> None:
    """A process of ours is taken into a real extern step, read back there, and nothing of it is left in the job."""
    with patient.jobs(1) as (job,):
        said = examined(patient.second, *PATIENT, "--deep", "--peer", "node1", "--peer", "login")
        listed = patient.second.run(["scontrol", "listpids", job])
    assert bad(said) == []
    words = " ".join(each.seen for each in said)
    assert f"adopted into job {job}, read back there, and ended" in words
    assert "this is node" in words
    pids = [words[0] for words in map(str.split, listed.splitlines()) if words and words[0].isdigit()]
    assert pids, listed
    assert TRIAL not in {
        patient.second.run(["sh", "-c", f"tr '\\0' ' ' < /proc/{pid}/cmdline || :"]).strip() for pid in pids
    }


@pytest.mark.parametrize("name", CASES)
def test_the_cause_is_named(patient: Lab, name: str) -> None:
    """Of the check, the grade and the words."""
    case = CASES[name]
    with case.how(patient):
        said = examined(patient.second, *(() if "hangs" in name else PATIENT), *case.options)
    found = [each for each in said if (each.grade, each.check) == (case.grade, case.check)]
    assert any(all(word in f"{each.seen} {each.remedy}" for word in case.words) for each in found), bad(said)


def test_slurmd_stopped(patient: Lab) -> None:
    """Jobs that run are served; that none can start is said. Last, as it ends the daemon."""
    patient.second.kill("slurmd")
    found = [each for each in examined(patient.second) if each.check == "slurm" and each.grade == "warning"]
    assert any("slurmd is not running" in each.seen for each in found)
