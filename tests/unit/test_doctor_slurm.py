"""What doctor says of Slurm's steps, of its settings beside the agent's, and of the seal's files; from facts."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence, Set

import pytest

from adoptd.doctor import kernel, probing, seal, slurm, slurm_values, steps, unix_sockets
from adoptd.doctor.findings import Finding, Grade, worst
from adoptd.doctor.steps import StepDaemon, StepFacts
from adoptd.doctor.unix_sockets import listens_at
from adoptd.hierarchy import Hierarchy, HierarchyKind
from adoptd.jobs.slurm_conf import SlurmSettings
from adoptd.jobs.slurm_hosts import RunningSlurmd
from adoptd.jobs.slurm_paths import SlurmPaths
from adoptd.seal import SealError, open_seal
from adoptd.seal.key_file import key_file_error

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
        ({"socket": None, "there": False}, set(), {}, FAILURE, f"is not found in {SPOOL} as one of node n1"),
        ({"socket": None, "there": False}, {"7"}, {}, OK, ""),
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


def test_a_step_whose_own_process_is_elsewhere() -> None:
    """It says yes to sessions, too, and leaves them where they are."""
    facts = StepFacts(SPOOL, "n1", [STEP], {"7"}, {}, outside={"7": 71})
    found = list(steps.judge_steps(facts))
    assert worst(found) is FAILURE
    assert "(pid 71) is in no cgroup of the job" in said(found)
    assert list(steps.judge_steps(dataclasses.replace(facts, outside={}))) == []


def test_sockets_that_no_step_has() -> None:
    """A daemon that was killed leaves its; one that is a user's is not believed."""
    left = list(
        steps.judge_steps(StepFacts(SPOOL, "n1", [], set(), {}, left=[f"n1_{job}.4294967292" for job in range(9)]))
    )
    assert (worst(left), len(left), "and 5 more" in said(left)) == (WARNING, 1, True)
    foreign = list(steps.judge_steps(StepFacts(SPOOL, "n1", [], set(), {}, foreign={"n1_8.4294967292": "is of uid 9"})))
    assert (worst(foreign), f"{SPOOL}/n1_8.4294967292 is of uid 9" in said(foreign)) == (FAILURE, True)
    assert f"chown -h root:root {SPOOL}/n1_8.4294967292" in foreign[0].remedy, "nothing that a link leads to"
    other = list(steps.judge_steps(StepFacts(SPOOL, "n1", [], set(), {}, foreign={"n1_8.4294967292": "is no socket"})))
    assert (worst(other), "SlurmUser's" in said(other), "chown" in other[0].remedy) == (FAILURE, False, False)
    assert "by removing it" in other[0].remedy


def test_which_sockets_those_are(tmp_path: Path) -> None:
    """By asking: one with a listener is neither; another node's, another step's and what is heard are not looked at."""
    settings = dataclasses.replace(SETTINGS, spool_dir=str(tmp_path), trusted_uids=frozenset({os.geteuid()}))
    names = ["n1_1.4294967292", "n1_2.4294967292", "n1_3.4294967292", "n1_4.0", "n2_5.4294967292", "n1_x.4294967292"]
    with contextlib.ExitStack() as stack:
        for name in names:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(tmp_path / name))
            if name == "n1_1.4294967292":
                listener.listen()
        (tmp_path / "n1_6.4294967292").write_text("")
        left, foreign = steps._unheard(settings, {"3"})
        assert (left, foreign) == (["n1_2.4294967292"], {"n1_6.4294967292": "is no socket"})
        _, foreign = steps._unheard(dataclasses.replace(settings, trusted_uids=frozenset({4242})), set())
        assert foreign["n1_1.4294967292"] == f"is of uid {os.geteuid()}"
    assert steps._unheard(dataclasses.replace(settings, spool_dir="/nowhere"), set()) == ([], {})


def test_where_a_process_listens(tmp_path: Path) -> None:
    """By the kernel's word on its own descriptors; rows that another's name writes into /proc/net/unix are not read."""
    assert listens_at(os.getpid()) == ""
    with socket.socket(socket.AF_UNIX) as bound, socket.socket(socket.AF_UNIX) as forger:
        bound.bind(str(tmp_path / "bound"))
        inode = os.fstat(bound.fileno()).st_ino
        row = f"0000000000000000: 00000002 00000000 00010000 0001 01 {inode} /forged".encode()
        forger.bind(b"\0x" + str(inode).encode() + b"\n" + row)
        forger.listen()
        assert "/forged" in Path("/proc/self/net/unix").read_text(errors="replace"), "it can be written there"
        assert listens_at(os.getpid()) == ""
        bound.listen()
        assert listens_at(os.getpid()) == str(tmp_path / "bound")


def test_where_the_kernel_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without unix_diag it has the word for "no such socket" for all; that is not "nowhere"."""

    def refuses(*_: object) -> bytes:
        raise FileNotFoundError

    monkeypatch.setattr(unix_sockets, "ask_one", refuses)
    assert listens_at(os.getpid()) is None


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


def judged(values: Mapping[str, str], /, **change: object) -> List[Finding]:
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
        ({"prologflags": "RunInJob"}, OK),
        ({"prologflags": "alloc", "jobcontainertype": "job_container/tmpfs"}, FAILURE),
        ({"proctracktype": "cgroup", "taskplugin": "affinity,cgroup"}, OK),
        ({"taskplugin": "task/none"}, WARNING),
        ({"proctracktype": "proctrack/pgid"}, FAILURE),
        # slurmd does not start again with a slip of the pen.
        ({"prologflags": "contian,x11"}, FAILURE),
        ({"prologflags": "Contian"}, FAILURE),
        ({"prologflags": "contain,nohold,serial,a_flag_of_2030"}, OK),
        ({"taskplugin": "tsk/cgroup"}, WARNING),
        ({"slurmduser": "alice"}, FAILURE),
        ({"slurmduser": "root"}, OK),
        ({"taskpluginparam": "autobind", "slurmctldport": "6817", "authalttypes": "auth/jwt"}, OK),
    ],
)
def test_values(values: Mapping[str, str], grade: Grade) -> None:
    """What implies another thing, and what later releases write shorter, is right."""
    found = judged(values)
    assert worst(found) is grade, found
    assert len([each for each in found if each.grade is not OK]) <= 1, "one cause, one finding"


@pytest.mark.parametrize("key", ["proctractype", "prologflag", "task_plugin", "slurmctlhost"])
def test_a_key_that_is_almost_one(key: str) -> None:
    """It is said once, and the rest is judged by what was meant."""
    meant = next(each for each in VALUES if each[:4] == key[:4])
    values = {name: value for name, value in VALUES.items() if name != meant}
    (found,) = (each for each in slurm_values.judge_values("f", {**values, key: VALUES[meant]}) if each.grade is not OK)
    assert f"{key} is no key of Slurm's" in found.seen


V1, V2 = (
    Hierarchy(HierarchyKind.V1, 3, ("memory",), "/sys/fs/cgroup/memory", 2),
    Hierarchy(HierarchyKind.V2, 0, (), "/sys/fs/cgroup", 1),
)


@pytest.mark.parametrize(
    ("cgroup", "hierarchies", "grade"),
    [
        ({}, (V2,), OK),
        ({"cgroupplugin": "autodetect"}, (V1,), OK),
        ({"cgroupplugin": "cgroup/v1"}, (V1,), OK),
        ({"cgroupplugin": "cgroup/v1"}, (V1, V2), OK),
        ({"cgroupplugin": "cgroup/v2"}, (V2,), OK),
        ({"cgroupplugin": "cgroup/v2"}, (V1, V2), FAILURE),
        ({"cgroupplugin": "cgroup/v1"}, (V2,), FAILURE),
        ({"cgroupplugin": "disabled"}, (V2,), FAILURE),
        ({"cgroupplugin": "cgroup/v1"}, (), OK),
        ({"cgroupmountpoint": "/sys/fs/cgroup/"}, (V1,), OK),
        ({"cgroupmountpoint": "/cgroup"}, (V1,), FAILURE),
        ({"cgroupmountpoint": "/sys/fs/cg"}, (V2,), FAILURE),
        ({"cgroupmountpoint": "/cgroup", "cgroupautomount": "yes"}, (V1,), OK),
    ],
)
def test_cgroup_conf(cgroup: Mapping[str, str], hierarchies: Sequence[Hierarchy], grade: Grade) -> None:
    """What slurmd does not start with here."""
    found = list(slurm_values.judge_cgroup_conf(VALUES, {"constraincores": "yes", **cgroup}, hierarchies))
    assert worst(found) is grade, found


def test_who_can_change_slurms_files() -> None:
    """cgroup.conf as slurm.conf, and the directories above both; each is said once."""
    regular = stat.S_IFREG | 0o644
    assert worst(judged({}, cgroup_conf=(regular, 0))) is OK
    assert "/etc/slurm/cgroup.conf is owned by uid 9" in said(judged({}, cgroup_conf=(regular, 9)))
    above = tuple(("/etc/slurm", "has mode 0777", f"/etc/slurm/{name}") for name in ("slurm.conf", "cgroup.conf"))
    found = judged({}, above=above)
    assert [each.grade for each in found].count(FAILURE) == 1
    assert "/etc/slurm has mode 0777" in said(found)


def test_directories_above(tmp_path: Path) -> None:
    """Only root's and SlurmUser's, and sticky ones; as the agent has it of the spool directory."""
    path = tmp_path / "a/b/slurm.conf"
    path.parent.mkdir(parents=True)
    assert list(slurm._open_above(str(path), {0})) == []
    (tmp_path / "a").chmod(0o777)
    assert list(slurm._open_above(str(path), {0})) == [(str(tmp_path / "a"), "has mode 0777", str(path))]
    (tmp_path / "a").chmod(0o1777)
    assert list(slurm._open_above(str(path), {0})) == []
    os.chown(tmp_path / "a", 64030, -1)
    assert [each[1] for each in slurm._open_above(str(path), {0})] == ["is owned by uid 64030"]
    assert list(slurm._open_above(str(path), {0, 64030})) == []


def test_files_that_are_newer_than_slurmd() -> None:
    """It may have read them again; its plug-ins are those of its start."""
    found = judged({}, newer=("/etc/slurm/slurm.conf",))
    assert worst(found) is OK
    assert any("slurm.conf changed since slurmd started" in each.seen for each in found)


def test_the_name_that_slurmd_has() -> None:
    """The agent's own key may say another, and all jobs are another node's then."""
    assert worst(judged({}, own_name="n1")) is OK
    assert "slurmd's is n2" in said(judged({}, own_name="n2"))
    assert worst(judged({}, own_name="n2")) is FAILURE


def test_a_file_that_is_not_whole() -> None:
    """Nothing follows from it: one finding, whatever its defaults come to."""
    found = judged({}, values={"clustername": "c"}, spool=None)
    assert [each.grade for each in found if each.grade is not OK] == [FAILURE]
    assert "not whole" in said(found)
    assert "is missing" in said(judged({}, spool=None))


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


@pytest.mark.parametrize(
    ("ours", "agents", "words"),
    [
        ("", "", ""),
        ("", None, ""),
        ("/opt/slurm.conf", "/opt/slurm.conf", ""),
        ("/opt/slurm.conf", "", "SLURM_CONF is /opt/slurm.conf here, and not set for the agent"),
        ("", "/opt/slurm.conf", "SLURM_CONF=/opt/slurm.conf adoptd doctor"),
    ],
)
def test_the_variable_of_a_shell(ours: str, agents: Optional[str], words: str) -> None:
    """It is not the agent's."""
    found = list(slurm.judge_agents_variable(ours, agents))
    assert worst(found) is (WARNING if words else OK)
    assert words in said(found)


def test_a_variable_that_names_the_file_that_is_taken_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As /etc/profile.d has it on many sites: both go by one file."""
    default, link, other = tmp_path / "slurm.conf", tmp_path / "link", tmp_path / "other"
    default.write_text("")
    other.write_text("")
    link.symlink_to(default)
    monkeypatch.setattr(slurm, "CONF_FILES", (str(tmp_path / "none"), str(default)))
    for ours, agents in ((str(default), ""), ("", str(default)), (str(link), "")):
        assert list(slurm.judge_agents_variable(ours, agents)) == []
    assert worst(list(slurm.judge_agents_variable(str(other), ""))) is WARNING


@pytest.mark.parametrize(
    ("slurmds", "grade"), [("", OK), ("/etc/slurm/../slurm/slurm.conf", OK), ("/opt/slurm.conf", FAILURE)]
)
def test_the_file_of_slurmd(slurmds: str, grade: Grade) -> None:
    """It may be another than the agent's."""
    assert worst(list(slurm.judge_slurmds_file("/etc/slurm/slurm.conf", slurmds, "why"))) is grade


@pytest.mark.parametrize(
    ("words", "told", "variable", "expected"),
    [
        ([], None, {}, ""),
        ([], None, {"SLURM_CONF": "/opt/slurm.conf"}, "/opt/slurm.conf"),
        # -f counts before the variable, and what is fetched before both.
        (["-f", "/etc/other.conf"], "/etc/other.conf", {"SLURM_CONF": "/opt/slurm.conf"}, ""),
        (["--conf-server", "login"], None, {"SLURM_CONF": "/opt/slurm.conf"}, "/run/slurm/conf/slurm.conf"),
        (["--conf-server=login"], "/etc/other.conf", {}, "/run/slurm/conf/slurm.conf"),
    ],
)
def test_which_file_slurmd_was_told(
    words: Sequence[str], told: Optional[str], variable: Dict[str, str], expected: str
) -> None:
    """By its command line and its environment; nothing where none runs."""
    command = [sys.executable, "-c", "print(flush=True); input()", *words]
    with subprocess.Popen(command, 0, None, -1, -1, env=variable) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert slurm._file_of(RunningSlurmd(None, told, process.pid))[0] == expected
        process.kill()
    assert slurm._file_of(RunningSlurmd()) == ("", "SLURM_CONF of its environment")


def test_the_variable_of_a_process() -> None:
    """As it was started; of none nothing is known."""
    for variable, expected in (({"SLURM_CONF": "/opt/slurm.conf"}, "/opt/slurm.conf"), ({"OTHER": "1"}, "")):
        with subprocess.Popen(["/bin/sh", "-c", "echo; read x"], 0, None, -1, -1, env=variable) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert slurm._variable_of(process.pid) == expected
            process.kill()
    assert slurm._variable_of(None) is None
    assert slurm._variable_of(-1) is None


def test_slurm_that_is_not_asked() -> None:
    """Two job managers on a node are rare; one that was forgotten is not."""
    assert list(slurm.judge_unwanted(RunningSlurmd())) == []
    assert worst(list(slurm.judge_unwanted(RunningSlurmd(pid=9)))) is WARNING


# ---- the seal


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("libmunge.so.2 cannot be loaded", "apt install"),
        ("no scheme to seal with is set up here (munge: libmunge.so.2 cannot be loaded)", "no node has a key yet"),
        ('munge_encode: Failed to access "/run/munge/other": No such file', "AuthInfo"),
        ('munge_encode: Failed to access "/run/munge/munge.socket.2": No such file', "systemctl restart munge"),
        ("key file /k is a symbolic link; expected", "the file itself"),
        ("neither slurm.jwks nor slurm.key is in /etc/slurm", "put Slurm's key"),
    ],
)
def test_remedies_of_the_seal(error: str, words: str) -> None:
    """By what was wrong, and not by the scheme alone."""
    assert words in seal.remedy_for("munge", error)


def test_a_key_is_never_destroyed_by_a_remedy(tmp_path: Path) -> None:
    """A good one of a wrong mode is kept, whatever the scheme; one is made only where there is none."""
    key = tmp_path / "the key"
    key.write_bytes(b"k" * 64)
    key.chmod(0o644)
    for scheme in ("auto", "key"):
        with pytest.raises(SealError) as raised:
            open_seal(scheme, key, str(tmp_path / "no-munged"), 10)
        remedy = seal.remedy_for(scheme, str(raised.value))
        assert f"chown root {key}; chmod 0600 {key}; if it is damaged, copy another node's" in remedy
        assert "rm " not in remedy
    made = seal.remedy_for("auto", "no scheme to seal with is set up here (key: none)")
    command = made[made.index("(umask") :].replace("/etc/adoptd/adoptd.key", "k")
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, check=False).returncode == 0
    first = (tmp_path / "k").read_bytes()
    assert (len(first), stat.S_IMODE((tmp_path / "k").stat().st_mode)) == (64, 0o600)
    again = subprocess.run(["sh", "-c", command], cwd=tmp_path, check=False, capture_output=True)
    assert (again.returncode != 0, (tmp_path / "k").read_bytes()) == (True, first)


@pytest.mark.parametrize(
    ("scheme", "path", "found", "words"),
    [
        ("key", "/etc/adoptd/adoptd.key", "not to be opened (No such file or directory)", "put the site's key there"),
        ("key", "/etc/adoptd/adoptd.key", "a symbolic link", "put the file itself"),
        ("key", "/etc/k", "0 bytes long", "install -m 0600 -o root adoptd.key /etc/k"),
        ("auto", "/etc/k", "0 bytes long", "install -m 0600 -o root adoptd.key /etc/k"),
        # Of its owner Slurm's own daemons have a say.
        ("auto", "/etc/slurm/slurm.key", "of mode 0644", "give slurm.key the mode and owner that Slurm asks for"),
        ("slurm", "/opt/k", "of mode 0644", "give slurm.key the mode and owner that Slurm asks for"),
    ],
)
def test_other_faults_of_a_key(scheme: str, path: str, found: str, words: str) -> None:
    """As the seal says them."""
    assert words in seal.remedy_for(scheme, str(key_file_error(Path(path), found)))


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
