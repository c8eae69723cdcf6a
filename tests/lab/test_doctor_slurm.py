"""What the doctor says of nodes whose Slurm is broken on purpose; and of one that is well, an adoption included."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from typing import Callable, ContextManager, Dict, Iterator

import pytest

from lab.lab import Lab
from lab.nodes import Cluster
from lab.slurm_files import EXTERN_STEP
from lab.test_doctor import PATIENT, Case, bad, examined, file_with, mode, moved_away, owned, pam, stopped
from lab.test_doctor_parts import every, pipe_for

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


@contextlib.contextmanager
def step_stopped(lab: Lab) -> Iterator[None]:
    """A job whose extern step does nothing."""
    assert lab.cluster.slurm is not None
    with lab.jobs(1) as (job,):
        pid = lab.cluster.slurm.extern_daemon(lab.second, job)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def step_cleaned_up(lab: Lab) -> Iterator[None]:
    """A job whose socket a cleaner of old files took for one."""
    with lab.jobs(1):
        (socket,) = lab.second.path(SPOOL).glob(f"*.{EXTERN_STEP}")
        with moved_away(lab.second, f"{SPOOL}/{socket.name}"):
            yield


@contextlib.contextmanager
def other_spool(lab: Lab) -> Iterator[None]:
    """SlurmdSpoolDir was changed, its directory is there, and slurmd has not been started again."""
    elsewhere = lab.second.path("/var/lib/slurm/elsewhere")
    elsewhere.mkdir()
    try:
        with lab.jobs(1), file_with(lab.second, PATHS, lambda text: text.replace(SPOOL, "/var/lib/slurm/elsewhere")):
            yield
    finally:
        elsewhere.rmdir()


def agent_says(text: str) -> Callable[[Lab], ContextManager[None]]:
    return lambda lab: file_with(lab.second, "/etc/adoptd/conf.d/50-jobs.toml", lambda _: f"[jobs]\n{text}\n")


CASES: Dict[str, Case] = {
    "step stopped": Case(step_stopped, "failure", "steps", ("is stopped", "kill -CONT")),
    "step's socket removed": Case(step_cleaned_up, "failure", "steps", ("was removed", "cleaners of old files")),
    "spool directory changed since": Case(
        other_spool, "failure", "steps", (f"listens in {SPOOL}", "/var/lib/slurm/elsewhere", "restart slurmd")
    ),
    "another node's name": Case(
        agent_says('slurm_node_name = "node77"'), "failure", "slurm", ("slurm_node_name is node77", "slurmd's is node2")
    ),
    "another node's name in PAM": Case(
        pam(every("pam_adopt.so", " nodename=node77")), "failure", "slurm", ("nodename=node77", "slurmd's is node2")
    ),
    "Slurm not asked": Case(agent_says('backend = "cgroup"'), "warning", "slurm", ("slurmd runs here",)),
    "slurmd stopped": Case(lambda lab: stopped(lab.second, "slurmd"), "warning", "slurm", ("is stopped", "kill -CONT")),
    "AuthInfo names another socket": Case(
        conf(lambda text: text.replace("munge.socket.2", "other.socket")),
        "failure",
        "seal",
        ("AuthInfo", "other.socket"),
    ),
    "cgroup.conf hangs": Case(
        lambda lab: pipe_for(lab.second, "/etc/slurm/cgroup.conf"),
        "failure",
        "slurm",
        ("/etc/slurm/cgroup.conf does not answer", "findmnt"),
        ("--timeout", "4"),
    ),
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


def test_flags_that_imply_contain(patient: Lab) -> None:
    """X11 has extern steps made as well, and job containers with them (slurm.conf(5))."""
    with file_with(patient.second, CONF, lambda text: text.replace("PrologFlags=contain,x11", "PrologFlags=x11")):
        assert bad(examined(patient.second, *PATIENT)) == []


@pytest.mark.parametrize("name", CASES)
def test_the_cause_is_named(patient: Lab, name: str) -> None:
    """Of the check, the grade and the words."""
    case = CASES[name]
    with case.how(patient):
        said = examined(patient.second, *(() if "hangs" in name else PATIENT), *case.options)
    assert not any("the check itself failed" in each.seen for each in said)
    found = [each for each in said if (each.grade, each.check) == (case.grade, case.check)]
    assert any(all(word in f"{each.seen} {each.remedy}" for word in case.words) for each in found), bad(said)


def test_slurmd_stopped(patient: Lab) -> None:
    """Jobs that run are served; that none can start is said. Last, as it ends the daemon."""
    patient.second.kill("slurmd")
    found = [each for each in examined(patient.second) if each.check == "slurm" and each.grade == "warning"]
    assert any("slurmd is not running" in each.seen for each in found)
