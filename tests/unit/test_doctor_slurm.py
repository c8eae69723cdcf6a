"""What doctor says of Slurm's steps, of its settings beside the agent's, and of the seal's files; from facts."""

from __future__ import annotations

import dataclasses
import stat
from typing import Dict, List, Mapping, Optional, Sequence, Set

import pytest

from adoptd.doctor import kernel, probing, seal, slurm, steps
from adoptd.doctor.findings import Finding, Grade, worst
from adoptd.doctor.steps import StepDaemon, StepFacts
from adoptd.jobs.slurm_conf import SlurmSettings
from adoptd.jobs.slurm_hosts import RunningSlurmd
from adoptd.jobs.slurm_paths import SlurmPaths

OK, WARNING, FAILURE = Grade.OK, Grade.WARNING, Grade.FAILURE
SPOOL = "/var/spool/slurmd"


def said(found: Sequence[Finding]) -> str:
    assert all(bool(each.remedy) == (each.grade is not OK) for each in found), found
    return " ".join(f"{each.seen} {each.remedy}" for each in found if each.grade is not OK)


# ---- steps

STEP = StepDaemon(70, "7", "extern", "S", f"{SPOOL}/n1_7.4294967292", there=True)


@pytest.mark.parametrize(
    ("change", "heard", "silent", "grade", "words"),
    [
        ({}, {"7"}, {}, OK, ""),
        ({"state": "T"}, set(), {"7": "no answer"}, FAILURE, "is stopped (pid 70)"),
        ({}, set(), {"7": "no answer"}, FAILURE, "does not answer: no answer"),
        ({"there": False}, set(), {}, FAILURE, f"its socket {STEP.socket} was removed"),
        ({"socket": "/old/n1_7.4294967292"}, set(), {}, FAILURE, "listens in /old"),
        ({"socket": f"{SPOOL}/n9_7.4294967292"}, set(), {}, FAILURE, 'slurm_node_name = "n9"'),
        # Another slurmd's, on a host that has several.
        ({"socket": f"{SPOOL}/n9_7.4294967292"}, {"8"}, {}, OK, ""),
        ({"socket": ""}, set(), {}, FAILURE, "listens nowhere"),
        ({"kind": "batch"}, set(), {}, WARNING, "job 7 has no extern step"),
    ],
)
def test_steps(change: Dict[str, object], heard: Set[str], silent: Mapping[str, str], grade: Grade, words: str) -> None:
    """Each that the agent cannot ask, by the reason."""
    daemon = dataclasses.replace(STEP, **change)  # type: ignore[arg-type]
    found = list(steps.judge_steps(StepFacts(SPOOL, "n1", [daemon], heard, silent)))
    assert worst(found) is grade, found
    assert words in said(found)


def test_children_of_a_step() -> None:
    """They have its title, and not its socket."""
    child = dataclasses.replace(STEP, pid=71, socket="")
    for daemons in ([STEP, child], [child, STEP]):
        (found,) = steps.judge_steps(StepFacts("/elsewhere", "n1", daemons, set(), {}))
        assert f"listens in {SPOOL}" in found.seen


def test_many_steps_are_few_lines() -> None:
    """Of a spool directory that was emptied."""
    daemons = [dataclasses.replace(STEP, job=str(job), there=False) for job in range(50)]
    assert len(list(steps.judge_steps(StepFacts(SPOOL, "n1", daemons, set(), {})))) <= 5


# ---- settings

VALUES = {
    "slurmctldhost": "login",
    "prologflags": "contain",
    "proctracktype": "proctrack/cgroup",
    "taskplugin": "task/cgroup,task/affinity",
}
SETTINGS = SlurmSettings(
    "/etc/slurm/slurm.conf", "n1", True, SPOOL, frozenset({0}), "auth/munge", "", "c", SlurmPaths("n1", "", "/slurm")
)


def judged(values: Mapping[str, str], **change: object) -> List[Finding]:
    facts = slurm.SlurmFacts(
        SETTINGS,
        {**VALUES, **values},
        {"constraincores": "yes"},
        RunningSlurmd(pid=9),
        (stat.S_IFDIR | 0o755, 0),
        (stat.S_IFREG | 0o644, 0),
    )
    return list(slurm.judge_slurm(dataclasses.replace(facts, **change)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "grade"),
    [
        ({}, OK),
        ({"prologflags": "x11", "jobcontainertype": "job_container/tmpfs"}, OK),
        ({"prologflags": "Alloc,X11"}, OK),
        ({"prologflags": "alloc", "jobcontainertype": "job_container/tmpfs"}, FAILURE),
        ({"proctracktype": "cgroup", "taskplugin": "affinity,cgroup"}, OK),
        ({"taskplugin": "task/none"}, WARNING),
        ({"proctracktype": "proctrack/pgid"}, FAILURE),
    ],
)
def test_values(values: Mapping[str, str], grade: Grade) -> None:
    """What implies another thing, and what later releases write shorter, is right."""
    found = judged(values)
    assert worst(found) is grade, found
    assert len([each for each in found if each.grade is not OK]) <= 1, "one cause, one finding"


def test_the_name_that_slurmd_has() -> None:
    """The agent's own key may say another, and all jobs are another node's then."""
    assert worst(judged({}, own_name="n1")) is OK
    assert "slurmd's is n2" in said(judged({}, own_name="n2"))
    assert worst(judged({}, own_name="n2")) is FAILURE


def test_slurmd_as_it_runs() -> None:
    """Running, stopped, away; and for who cannot see it nothing at all."""
    away = RunningSlurmd()
    assert worst(judged({})) is OK
    assert "kill -CONT 9" in said(judged({}, stopped=True))
    assert "is not running" in said(judged({}, slurmd=away))
    assert worst(judged({}, slurmd=away, seen=False)) is OK


def test_the_name_that_a_line_of_pam_has() -> None:
    """nodename= is for hosts that have several slurmds."""
    line = (("/etc/pam.d/sshd:3", "n9"),)
    assert "nodename=n9, and slurmd's is n1" in said(judged({}, asked=line))
    assert worst(judged({}, asked=(("/etc/pam.d/sshd:3", "n1"),))) is OK
    assert worst(judged({}, asked=line, slurmd=RunningSlurmd(pid=-1))) is OK


def test_slurm_that_is_not_asked() -> None:
    """Two job managers on a node are rare; one that was forgotten is not."""
    assert list(slurm.judge_unwanted(RunningSlurmd())) == []
    assert worst(list(slurm.judge_unwanted(RunningSlurmd(pid=9)))) is WARNING


# ---- the seal


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("libmunge.so.2 cannot be loaded", "apt install"),
        ("no scheme to seal with is set up here (munge: libmunge.so.2 cannot be loaded)", "make the key file"),
        ('munge_encode: Failed to access "/run/munge/other": No such file', "AuthInfo"),
        ('munge_encode: Failed to access "/run/munge/munge.socket.2": No such file', "systemctl restart munge"),
        ("key file /k is a symbolic link; expected", "the file itself"),
        ("neither slurm.jwks nor slurm.key is in /etc/slurm", "put Slurm's key"),
    ],
)
def test_remedies_of_the_seal(error: str, words: str) -> None:
    """By what was wrong, and not by the scheme alone."""
    assert words in seal.remedy_for("munge", error)


@pytest.mark.parametrize(
    ("changed_s", "started_s", "grade"),
    [(None, 5.0, OK), (5.0, None, OK), (5.0, 9.0, OK), (5.5, 5.0, OK), (9.0, 5.0, WARNING)],
)
def test_a_key_that_munged_has_not_read(changed_s: Optional[float], started_s: Optional[float], grade: Grade) -> None:
    """It is seen at the next start, by nodes that do not understand each other."""
    assert worst(list(seal.judge_munged("/k", changed_s, started_s))) is grade


def test_a_key_that_is_a_link() -> None:
    """It is not read: a failure where it is needed, and nothing to talk of where it is not."""
    link = (stat.S_IFLNK | 0o777, 0)
    (found,) = seal.judge_key("/k", link, (0,), needed=True)
    assert (found.grade, "whoever can read it" in found.seen) == (FAILURE, False)
    assert list(seal.judge_key("/k", link, (0,), needed=False)) == []


# ---- the kernel and the probe

KERNEL = kernel.KernelFacts("6.1.0", "bpf", "none", True, "0.26.0", None, None, "")
PROBE = probing.ProbeFacts("abc", None, None, True, None, {}, twins=True)


def test_a_loopback_that_lets_nothing_through() -> None:
    """It is the cause of what else does not answer there."""
    shut = dataclasses.replace(KERNEL, loopback="timed out", diag="cannot be tested on loopback: timed out")
    found = list(kernel.judge_kernel(shut, "/sys/fs/bpf/adoptd", True))
    assert [each.grade for each in found if each.grade is not OK] == [FAILURE]
    assert "modprobe" not in said(found)
    assert worst(list(kernel.judge_kernel(KERNEL, "/sys/fs/bpf/adoptd", True))) is OK


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"twins": None}, ""),
        ({"twins": False}, "not looked for"),
        ({"self_test": "self-test: cannot connect to 127.0.0.1 on the loopback: timed out"}, "may be well"),
        ({"problem": "/x: BPF_OBJ_GET: Read-only file system"}, "mount -o remount,rw /pins"),
        ({"trial": "cannot be made: Read-only file system"}, "mount -o remount,rw /pins"),
        ({"problem": "gone", "trial": "EPERM"}, "a kernel or BCC"),
    ],
)
def test_what_to_do_about_the_probe(change: Dict[str, object], words: str) -> None:
    """Not always the same."""
    facts = dataclasses.replace(PROBE, **change)  # type: ignore[arg-type]
    found = list(probing.judge_probe(facts, "/pins/adoptd"))
    assert worst(found) is (WARNING if words else OK), found
    assert words in said(found)
