"""What the doctor says of nodes whose Slurm is broken on purpose; and of one that is well, an adoption included."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Callable, ContextManager, Dict, Iterator

import pytest

from lab.etc_files import ALICE
from lab.lab import Lab
from lab.node import PYTHON
from lab.slurm_files import EXTERN_STEP
from lab.test_doctor import PATIENT, Case, bad, examined, file_with, mode, moved_away, owned, pam, stopped
from lab.test_doctor_parts import every, pipe_for
from lab.waiting import until

pytestmark = pytest.mark.timeout(150)

CONF = "/etc/slurm/slurm.conf"
PATHS = "/etc/slurm/paths.conf"
CGROUP = "/etc/slurm/cgroup.conf"
SPOOL = "/var/lib/slurm/slurmd"
# The trial's process.
TRIAL = "sleep 20"


@pytest.fixture(scope="module")
def patient(slurm_lab: Lab) -> Lab:
    """Two compute nodes and a login node."""
    return slurm_lab


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
def step_killed(lab: Lab) -> Iterator[None]:
    """A job whose extern step the kernel ended for want of memory: its socket is left, with nobody behind it."""
    assert lab.cluster.slurm is not None
    with lab.jobs(1) as (job,):
        (sock,) = lab.second.path(SPOOL).glob(f"*.{EXTERN_STEP}")
        pid = lab.cluster.slurm.extern_daemon(lab.second, job)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{pid}").exists(), "its end")
        try:
            yield
        finally:
            sock.unlink()


@contextlib.contextmanager
def socket_of_alices(lab: Lab) -> Iterator[None]:
    """In root's directory, as after a chown that went too far."""
    assert lab.cluster.slurm is not None
    name = f"{SPOOL}/{lab.cluster.slurm.name_of(lab.second)}_9999.{EXTERN_STEP}"
    code = f"import os,socket,time; s=socket.socket(socket.AF_UNIX); s.bind({name!r}); s.listen(); "
    code += f"os.chown({name!r}, {ALICE.uid}, -1); print(flush=True); time.sleep(600)"
    with lab.second.popen([PYTHON, "-c", code]) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()
            lab.second.path(name).unlink()


@contextlib.contextmanager
def rows_of_alices(lab: Lab) -> Iterator[None]:
    """The step's socket was removed, and a user's own socket has a name that reads as the step's row elsewhere."""
    assert lab.cluster.slurm is not None
    with lab.jobs(1) as (job,):
        pid = lab.cluster.slurm.extern_daemon(lab.second, job)
        (sock,) = lab.second.path(SPOOL).glob(f"*.{EXTERN_STEP}")
        rows = Path(f"/proc/{pid}/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()
        # Num RefCount Protocol Flags Type St Inode Path (proc_net(5)); one that listens has the flag 10000.
        fields = [row.split() for row in rows if row.endswith(f"{SPOOL}/{sock.name}")]
        (inode,) = (each[6] for each in fields if each[3] == "00010000")
        row = f"\\n0000000000000000: 00000002 00000000 00010000 0001 01 {inode} /forged"
        code = f"import socket,time; s=socket.socket(socket.AF_UNIX); s.bind('\\0x{row}'); print(flush=True)"
        with lab.second.popen([PYTHON, "-c", f"{code}; time.sleep(600)"], user=ALICE) as forger:
            assert forger.stdout is not None
            forger.stdout.readline()
            try:
                with moved_away(lab.second, f"{SPOOL}/{sock.name}"):
                    yield
            finally:
                forger.kill()


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
    "step killed": Case(step_killed, "warning", "steps", ("nobody listens on", "dmesg", "scontrol requeue")),
    "step's socket a user's": Case(socket_of_alices, "failure", "steps", (f"is of uid {ALICE.uid}", "not believed")),
    "rows in /proc/net/unix forged": Case(rows_of_alices, "failure", "steps", ("was removed", f"{SPOOL}/node2")),
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
    "contain misspelt": Case(
        conf(lambda text: text.replace("contain,x11", "contian,x11")), "failure", "slurm", ("has contian",)
    ),
    "a key misspelt": Case(
        conf(lambda text: text.replace("ProctrackType", "ProctracType")),
        "failure",
        "slurm",
        ("ProctrackType is meant",),
    ),
    "slurmd not root's": Case(
        conf(lambda text: text + "SlurmdUser=alice\n"), "failure", "slurm", ("SlurmdUser=alice", "take SlurmdUser out")
    ),
    "a plug-in for other cgroups": Case(
        conf(lambda text: text.replace("cgroup/v1", "cgroup/v2"), CGROUP),
        "failure",
        "slurm",
        ("CgroupPlugin=cgroup/v2",),
    ),
    "cgroups elsewhere": Case(
        conf(lambda text: text + "CgroupMountpoint=/cgroup\n", CGROUP),
        "failure",
        "slurm",
        ("CgroupMountpoint=/cgroup",),
    ),
    "cgroup.conf a user's": Case(
        lambda lab: owned(lab.second, CGROUP, ALICE.uid),
        "failure",
        "slurm",
        (f"{CGROUP} is owned by uid", "chown root"),
    ),
    "a directory for all": Case(
        lambda lab: mode(lab.second, "/etc/slurm", 0o777),
        "failure",
        "slurm",
        ("/etc/slurm has mode 0777", "chmod go-w"),
    ),
    "a directory for all above the spool": Case(
        lambda lab: mode(lab.second, "/var/lib/slurm", 0o777), "failure", "slurm", ("/var/lib/slurm has mode 0777",)
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


def test_a_slurmd_that_was_started_otherwise(patient: Lab) -> None:
    """slurm.conf is right again, and the steps of this slurmd are not: seen by where they put their own process."""
    slurm, node = patient.cluster.slurm, patient.second
    assert slurm is not None

    def other(text: str) -> str:
        return (
            text.replace("proctrack/cgroup", "proctrack/linuxproc")
            .replace("task/cgroup,", "")
            .replace("jobacct_gather/cgroup", "jobacct_gather/none")
            .replace("contain,x11", "contain")
        )

    def restart() -> None:
        slurm.wait_idle()
        node.kill("slurmd")
        slurm.start_slurmd(node)
        slurm.wait_up()

    with file_with(node, CONF, other):
        restart()
        job = slurm.submit(ALICE, [node])
        slurm.wait(lambda: any(node.path(SPOOL).glob(f"*_{job}.{EXTERN_STEP}")), "its step")
    try:
        said = examined(node, *PATIENT)
    finally:
        slurm.cancel(job)
        slurm.wait_gone(job, [node])
        restart()
    assert any(each.check == "steps" and "is in no cgroup of the job" in each.seen for each in said), bad(said)
    with patient.jobs(1):
        assert bad(examined(node, *PATIENT)) == []


def test_a_slurmd_that_goes_by_another_file(patient: Lab) -> None:
    """Its unit has SLURM_CONF in its environment, and the agent's has not."""
    slurm, node = patient.cluster.slurm, patient.second
    assert slurm is not None
    for name in ("slurm.conf", "cgroup.conf", "job_container.conf"):
        node.write(f"/run/elsewhere/{name}", node.path(f"/etc/slurm/{name}").read_text(encoding="utf-8"))
    slurm.wait_idle()
    node.kill("slurmd")
    command = ["slurmd", "-D", "-N", slurm.name_of(node)]
    node.start_daemon("slurmd", command, env={"SLURM_CONF": "/run/elsewhere/slurm.conf"})
    try:
        slurm.wait_up()
        said = examined(node, *PATIENT)
    finally:
        node.kill("slurmd")
        slurm.start_slurmd(node)
        slurm.wait_up()
    (found,) = [each for each in said if "SLURM_CONF" in each.seen]
    assert (found.grade, found.check) == ("failure", "slurm")
    assert 'slurm_conf = "/run/elsewhere/slurm.conf"' in found.remedy
    assert bad(examined(node, *PATIENT)) == []


def test_slurmd_stopped(patient: Lab) -> None:
    """Jobs that run are served; that none can start is said. Last, as it ends the daemon."""
    patient.second.kill("slurmd")
    found = [each for each in examined(patient.second) if each.check == "slurm" and each.grade == "warning"]
    assert any("slurmd is not running" in each.seen for each in found)
