"""Each of doctor's judgements in both states, from facts; and the fence that keeps one check from harming the rest."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
import threading
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Tuple

import pytest
from judging import FAILURE, OK, SCENE, WARNING, judged

from adoptd import __version__, config, doctor
from adoptd.cli import adoptd_parser
from adoptd.config import Config
from adoptd.connections.conntrack import NOTHING_TRANSLATED
from adoptd.doctor import adopting, agent, files, jobs, kernel, probing, seal, slurm, sockets, sshd
from adoptd.doctor.findings import (
    Check,
    Finding,
    Grade,
    Scene,
    TookTooLong,
    failure,
    ok,
    run_checks,
    warning,
    within,
    worst,
)
from adoptd.doctor.listeners import Listener, Started, started_by
from adoptd.doctor.processes import Running
from adoptd.doctor.shown import as_json, as_lines
from adoptd.hierarchy import Hierarchy, HierarchyKind
from adoptd.jobs.slurm_conf import SlurmSettings
from adoptd.jobs.slurm_hosts import RunningSlurmd
from adoptd.jobs.slurm_paths import SlurmPaths
from adoptd.model import AdoptionFailed, Job
from adoptd.probe.mounts import Mount

# ---- the fence


def test_a_check_that_fails_is_a_finding_that_names_it() -> None:
    """What it found before is told, and the others run."""

    def breaks(scene: Scene) -> Iterator[Finding]:
        yield ok("broken", "so far so good")
        raise ZeroDivisionError("no way")

    found = run_checks((Check("broken", breaks), Check("well", lambda _: [ok("well", "fine")])), SCENE)
    assert [(each.check, each.grade) for each in found] == [("broken", OK), ("broken", FAILURE), ("well", OK)]
    assert "ZeroDivisionError: no way" in found[1].seen


def test_a_check_that_hangs_is_left_behind() -> None:
    """What it found before is told; the others are not waited for longer because of it."""
    for_ever = threading.Event()

    def hangs(scene: Scene) -> Iterator[Finding]:
        yield warning("stuck", "half", "of it")
        for_ever.wait()

    try:
        checks = [Check("stuck", hangs) for _ in range(20)]
        hurried = dataclasses.replace(SCENE, timeout_s=0.5)
        found = run_checks((*checks, Check("well", lambda _: [ok("well", "fine")])), hurried)
        assert [each.grade for each in found] == [WARNING, FAILURE] * 20 + [OK]
        assert "not known after 0.5 s" in found[1].seen
        with pytest.raises(TookTooLong):
            within(0.01, for_ever.wait)
    finally:
        for_ever.set()


def test_the_rounds_together_are_bounded() -> None:
    """Two, under 10 s with everything hung."""
    given = adoptd_parser().parse_args(["doctor"])
    assert 2 * given.timeout < 10
    assert 2 * SCENE.timeout_s < 10


def test_the_whole_of_it_on_a_host_without_anything(tmp_path: Path) -> None:
    """No configuration, no stack: findings, and no exception of a check among them."""
    found = doctor.examine(tmp_path / "adoptd.toml", tmp_path)
    assert ("configuration", FAILURE) in [(each.check, each.grade) for each in found]
    (tmp_path / "adoptd.toml").write_text(
        f'[agent]\nuser_socket = "{tmp_path}/u"\npam_socket = "{tmp_path}/p"\n[jobs]\nbackend = "cgroup"\n'
        f'[seal]\nscheme = "key"\nkey_file = "{tmp_path}/key"\n[callerid]\nport = 1\n[metrics]\nport = 2\n'
    )
    (tmp_path / "sshd").write_text("account required pam_adopt.so\n")
    found = doctor.examine(tmp_path / "adoptd.toml", tmp_path)
    assert not [each for each in found if "the check itself failed" in each.seen]
    assert {"agent", "pam_socket", "user_socket", "seal", "port"} <= {
        each.check for each in found if each.grade is FAILURE
    }


def test_who_is_not_root_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that a thing is broken: it was not tried."""
    file = tmp_path / "adoptd.toml"
    file.write_text(f"[agent]\nuser_socket = '{tmp_path}/none'\n")
    (tmp_path / "sshd").write_text("account required pam_adopt.so\n")
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    found = doctor.examine(file, tmp_path, peers=["localhost"])
    told = {each.check: each.grade for each in found if "only root can" in each.seen}
    assert told == dict.fromkeys(("sshd", "jobs", "seal", "key", "answer", "probe", "peer"), WARNING)
    assert "the check itself failed" not in " ".join(each.seen for each in found)


# ---- what is shown


def test_what_is_wrong_comes_first() -> None:
    """Failures, warnings, then what is right, one paragraph per subject; no control characters."""
    found = [ok("a", "one"), warning("b", "odd", "mend it"), failure("c", "bad\x1b[2J", "now"), ok("a", "two")]
    lines = as_lines(found, 100)
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == ["failure", "warning", "ok", "1"]
    assert "\x1b" not in "".join(lines)
    assert any("one; two" in line for line in lines)
    assert lines[1].strip() == "-> now"
    assert all(len(line) <= 100 for line in as_lines([failure("c", "word " * 99, "do " * 99)], 100))
    assert json.loads(json.dumps(as_json(found)))["worst"] == "failure"
    assert worst([]) is OK


# ---- the kernel

KERNEL = kernel.KernelFacts("6.1.0-30-amd64", "bpf", "none", True, "0.26.0", None, None, "pid:[4026531836]")


@pytest.mark.parametrize(
    ("change", "grade", "words"),
    [
        ({}, OK, ""),
        ({"release": "5.10.0"}, OK, ""),
        ({"release": "4.18.0-553.el8"}, WARNING, "older than 5.10"),
        ({"bpffs": "sysfs"}, WARNING, "not on bpffs"),
        ({"bpffs": ""}, WARNING, "nothing that is mounted"),
        ({"lockdown": "confidentiality"}, WARNING, "locked down"),
        ({"lockdown": "integrity"}, OK, ""),
        ({"btf": False}, WARNING, "vmlinux is missing"),
        ({"bcc": None}, WARNING, "not installed"),
        ({"bcc": "0.18.0"}, WARNING, "older than 0.25"),
        ({"bcc": "0.31.0"}, OK, ""),
        ({"libbcc": "libbcc.so.0: cannot open shared object file"}, WARNING, "cannot be loaded"),
        ({"headers": "no probe.c in /x"}, FAILURE, "no probe.c"),
        ({"diag": "no tcp_diag"}, WARNING, "no tcp_diag"),
        ({"pid_namespace": "pid:[1]"}, FAILURE, "pid namespace"),
    ],
)
def test_kernel(change: Dict[str, object], grade: Grade, words: str) -> None:
    """One fact at a time."""
    facts = dataclasses.replace(KERNEL, **change)  # type: ignore[arg-type]
    found = list(kernel.judge_kernel(facts, "/sys/fs/bpf/adoptd", True))
    assert judged(found)[0] is grade, found
    assert words in judged(found)[1] or not words


def test_without_a_probe_bpf_is_no_matter() -> None:
    """Where the configuration wants none."""
    facts = dataclasses.replace(KERNEL, bpffs="", bcc=None, btf=False)
    assert judged(list(kernel.judge_kernel(facts, "/x", False)))[0] is OK


PROBE = probing.ProbeFacts("abc", None, None, True, None, {"labelled": 7, "storage_refused": 0})


@pytest.mark.parametrize(
    ("change", "grade", "words"),
    [
        ({}, OK, ""),
        ({"trial": ""}, OK, ""),
        ({"trial": "EPERM"}, WARNING, "could not be loaded again: EPERM"),
        ({"problem": "not loaded"}, WARNING, "not loaded"),
        ({"problem": "not loaded", "trial": ""}, WARNING, "this kernel takes it"),
        ({"problem": "not loaded", "trial": "EPERM"}, WARNING, "fails: EPERM"),
        ({"self_test": "of pid 3"}, WARNING, "self-test fails: of pid 3"),
        ({"self_test": "is unlabelled", "optmem": 64, "trial": "is unlabelled"}, WARNING, "net.core.optmem_max is 64"),
        ({"self_test": "is unlabelled", "optmem": 131072}, WARNING, "is unlabelled"),
        ({"optmem": 64}, OK, ""),
        ({"watch": "no tracepoint"}, WARNING, "no tracepoint"),
        ({"counters": {"storage_refused": 3, "labelled": 7}}, WARNING, "of 10 connections 3"),
        ({"counters": {"storage_refused": 3, "labelled": 700}}, OK, ""),
        ({"counters": {"storage_refused": 3, "labelled": 7}, "optmem": 20480}, WARNING, "of 10 connections 3"),
        # It was raised since.
        ({"counters": {"storage_refused": 3, "labelled": 7}, "optmem": 131072}, OK, ""),
        ({"leftovers": ("/sys/fs/bpf/adoptd-doctor-1",)}, WARNING, "earlier doctor"),
        ({"pins_fault": "has mode 0755"}, FAILURE, "0755"),
        ({"pins_fault": "is missing"}, OK, ""),
    ],
)
def test_probe(change: Dict[str, object], grade: Grade, words: str) -> None:
    """Sound or not, and whether it can be had."""
    found = list(probing.judge_probe(dataclasses.replace(PROBE, **change), "/pins"))  # type: ignore[arg-type]
    assert judged(found)[0] is grade, found
    assert words in judged(found)[1] or not words


def test_filesystem_at() -> None:
    """The longest mount point counts, of one point the latest, and no other directory with the same beginning."""
    mounted = [
        Mount((0, 1), "/", "/", "ext4"),
        Mount((0, 2), "/", "/sys", "sysfs"),
        Mount((0, 3), "/", "/sys/fs/bpf", "bpf"),
    ]
    assert probing.filesystem_at("/sys/fs/bpf/adoptd", mounted) == "bpf"
    assert probing.filesystem_at("/sys/fs/bpfoo", mounted) == "sysfs"
    assert probing.filesystem_at("/sys/fs/bpf", [*mounted, Mount((0, 4), "/", "/sys/fs/bpf", "tmpfs")]) == "tmpfs"
    assert probing.filesystem_at("/x", []) == ""


V2 = Hierarchy(HierarchyKind.V2, 0, (), "/sys/fs/cgroup/unified", 1)
V1 = Hierarchy(HierarchyKind.V1, 3, ("memory",), "/sys/fs/cgroup/memory", 2)


@pytest.mark.parametrize(
    ("found", "namespace", "controllers", "grade", "words"),
    [
        ([V2, V1], "cgroup:[4026531835]", "pids", OK, "hybrid: v2 at /sys/fs/cgroup/unified, v1 (memory)"),
        ([V1], "", "", OK, "v1: v1 (memory)"),
        ([V2], "", "cpuset cpu memory", OK, "v2: v2 at"),
        ([V2], "", "", OK, "v2: v2 at"),
        ([V2], "", "cpuset cpu", WARNING, "no controller memory"),
        ([V2], "cgroup:[7]", "", FAILURE, "not the first cgroup namespace"),
        ([], "", "", FAILURE, "no cgroup hierarchy"),
    ],
)
def test_cgroups(found: List[Hierarchy], namespace: str, controllers: str, grade: Grade, words: str) -> None:
    """The layout by name."""
    said = list(kernel.judge_cgroups(found, namespace, frozenset(controllers.split())))
    assert judged(said)[0] is grade
    assert any(words in each.seen for each in said)


# ---- Slurm and jobs

SLURM = {
    "slurmctldhost": "login",
    "prologflags": "contain",
    "proctracktype": "proctrack/cgroup",
    "taskplugin": "task/cgroup,task/affinity",
}
SETTINGS = SlurmSettings(
    "/etc/slurm/slurm.conf", "n1", True, "/spool", frozenset((0, 64030)), "auth/munge", "", "c", SlurmPaths("n1")
)
DIRECTORY = (stat.S_IFDIR | 0o755, 0)
FACTS = slurm.SlurmFacts(
    SETTINGS, SLURM, {"constraincores": "yes"}, RunningSlurmd(pid=7), DIRECTORY, (stat.S_IFREG | 0o644, 64030)
)


@pytest.mark.parametrize(
    ("change", "grade", "words"),
    [
        ({}, OK, ""),
        ({"values": {**SLURM, "prologflags": "Alloc,X11"}}, OK, ""),
        ({"values": {}}, FAILURE, "not whole"),
        ({"values": {**SLURM, "prologflags": "alloc"}}, FAILURE, "lacks contain"),
        ({"values": {key: value for key, value in SLURM.items() if key != "prologflags"}}, FAILURE, "lacks contain"),
        ({"values": {**SLURM, "proctracktype": "proctrack/linuxproc"}}, FAILURE, "leaves it where it is"),
        ({"values": {**SLURM, "taskplugin": "task/affinity"}}, WARNING, "lacks task/cgroup"),
        ({"cgroup": {}}, WARNING, "constrains nothing"),
        ({"settings": dataclasses.replace(SETTINGS, node_name_certain=False)}, WARNING, "a guess"),
        ({"settings": dataclasses.replace(SETTINGS, conf_file=None)}, WARNING, "no slurm.conf"),
        ({"slurmd": RunningSlurmd()}, WARNING, "slurmd is not running"),
        ({"spool": None}, FAILURE, "/spool is missing"),
        ({"spool": (stat.S_IFDIR | 0o755, 64030)}, OK, ""),
        ({"spool": (stat.S_IFDIR | 0o755, 1000)}, FAILURE, "owned by uid 1000"),
        ({"spool": (stat.S_IFDIR | 0o777, 0)}, FAILURE, "mode 0777"),
        ({"conf": (stat.S_IFREG | 0o664, 0)}, FAILURE, "others can change it"),
    ],
)
def test_slurm(change: Dict[str, object], grade: Grade, words: str) -> None:
    """One setting at a time."""
    found = list(slurm.judge_slurm(dataclasses.replace(FACTS, **change)))  # type: ignore[arg-type]
    assert judged(found)[0] is grade, found
    assert words in judged(found)[1] or not words


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("/etc/slurm/slurm.conf: everybody can write it", "chmod go-w /etc/slurm/slurm.conf"),
        ("slurmuser 'x' is no user of this host", "getent passwd"),
        ("/a/gone.conf: No such file or directory", "put /a/gone.conf there"),
        ("/n/slurm.conf: Permission denied", "let root read it"),
        ("/n/slurm.conf: Stale file handle", "findmnt -T /n/slurm.conf"),
        ("/a/b.conf: more than 64 files include each other", "take out the include"),
        ("/a/b.conf: SlurmdSpoolDir 'x' is not an absolute path", "has to begin with /"),
        ("anything else", "put it right"),
    ],
)
def test_what_to_do_about_slurms_files(error: str, remedy: str) -> None:
    """One thing to do for each."""
    assert remedy in slurm.remedy_for(error)


def test_the_fallback(tmp_path: Path) -> None:
    """Only what root alone could have put there is run as root; and only where it is asked for."""

    def said(**callerid: str) -> List[Finding]:
        settings = Config(callerid=dataclasses.replace(Config().callerid, **callerid))  # type: ignore[arg-type]
        return list(slurm.look_at_fallback(dataclasses.replace(SCENE, settings=settings)))

    assert said() == []
    assert judged(said(fallback="slurm", slurm_scontrol="/bin/true"))[0] is OK
    assert judged(said(fallback="slurm", slurm_scontrol=f"{tmp_path}/none"))[0] is WARNING


def test_jobs_that_cannot_be_listed() -> None:
    """Told for itself only where nothing else says why."""
    for backend, why in (("slurm", "slurm"), ("cgroup", "cgroups")):
        unlisted = jobs.judge_unlisted(backend, "no such directory")
        assert any("no such directory" in line for line in as_lines([unlisted], 200))
        lines = as_lines([unlisted, failure(why, "it is missing", "make it")], 200)
        assert "(also for: jobs)" in lines[0]
        assert not any("no such directory" in line for line in lines)


def test_job_directories() -> None:
    """A directory that is not there is no job for anybody, ever; one that is empty is none now."""
    assert judged(list(jobs.judge_no_directories("/jobs/job_{job}", [])))[0] is WARNING
    assert judged(list(jobs.judge_no_directories("/jobs/job_{job}", ["/sys/fs/cgroup/jobs"])))[0] is OK
    assert judged(list(jobs.judge_delegated(["/jobs/7"], "/etc/pam.d/sshd:3")))[0] is WARNING
    assert judged(list(jobs.judge_delegated([], "/etc/pam.d/sshd:3")))[0] is OK
    assert judged(list(jobs.judge_delegated(["/jobs/7"], None)))[0] is OK


class _Backend:
    """A job manager that takes processes, or says so only, or does not."""

    def __init__(self, refuses: bool, keeps: bool) -> None:
        self._refuses = refuses
        self._keeps = keeps
        self.pid: Optional[int] = None

    def adopt(self, process: object, job: Job, deadline: object) -> None:
        self.pid = process.pid  # type: ignore[attr-defined]
        if self._refuses:
            raise AdoptionFailed("step 7.extern: no")

    def contains(self, job: Job, pid: int) -> bool:
        assert pid == self.pid
        return self._keeps


@pytest.mark.parametrize(
    ("refuses", "keeps", "grade", "words"),
    [(False, True, OK, "read back there"), (False, False, FAILURE, "not in it"), (True, False, FAILURE, "no")],
)
def test_an_adoption_for_trial(refuses: bool, keeps: bool, grade: Grade, words: str) -> None:
    """Believed only if read back; the process is gone whatever came of it."""
    backend = _Backend(refuses, keeps)
    (found,) = adopting.try_adoption(backend, (Job("7", 1000, 1, (1,)),))  # type: ignore[arg-type]
    assert (found.grade, words in found.seen) == (grade, True)
    assert backend.pid is not None
    assert not Path(f"/proc/{backend.pid}").exists()
    (nothing,) = adopting.try_adoption(backend, ())  # type: ignore[arg-type]
    assert "not tried" in nothing.seen


def test_a_process_for_trial_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a frozen cgroup of v1: it is not waited for, and said; whether it was taken or not."""
    waited: List[Optional[float]] = []

    class Stuck:
        """A child that takes its time to die."""

        pid = os.getpid()

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def kill(self) -> None:
            pass

        def wait(self, timeout: Optional[float] = None) -> None:
            waited.append(timeout)
            raise subprocess.TimeoutExpired("sleep", timeout or 0.0)

    monkeypatch.setattr("adoptd.doctor.adopting.subprocess.Popen", Stuck)
    for refuses in (False, True):
        (found,) = adopting.try_adoption(_Backend(refuses, True), (Job("7", 1000, 1, (1,)),))  # type: ignore[arg-type]
        assert (found.grade, "cannot be ended there" in found.seen) == (FAILURE, True)
        assert "scontrol resume 7" in found.remedy
    assert None not in waited


# ---- sshd

SSHD = {"usepam": "yes", "port": "22", "kbdinteractiveauthentication": "no", "permitrootlogin": "yes"}


SSHD_RUNS = Listener(Running(7, "sshd", "", "/usr/sbin/sshd", 0.0, "S", 0), Started("/c"))


def facts_of(values: Mapping[str, str], fault: Optional[str] = None) -> sshd.SshdFacts:
    return sshd.SshdFacts(SSHD_RUNS.started, values, fault, listener=SSHD_RUNS)


@pytest.mark.parametrize(
    ("change", "alone", "grade", "words"),
    [
        ({}, True, OK, ""),
        ({"usepam": "no"}, False, FAILURE, "UsePAM is no"),
        ({"kbdinteractiveauthentication": "yes"}, True, WARNING, "KbdInteractiveAuthentication"),
        ({"kbdinteractiveauthentication": "yes"}, False, OK, ""),
        ({"pamservicename": "ssh-jobs"}, False, WARNING, "PAMServiceName is ssh-jobs"),
        ({"permitrootlogin": "no"}, False, OK, ""),
    ],
)
def test_sshd(change: Mapping[str, str], alone: bool, grade: Grade, words: str) -> None:
    """Its settings in force."""
    found = list(sshd.judge_sshd(facts_of({**SSHD, **change}), "sshd", alone))
    assert judged(found)[0] is grade
    assert words in judged(found)[1] or not words


def test_sshd_that_does_not_say_or_run() -> None:
    """A broken configuration, and no listener."""
    assert judged(list(sshd.judge_sshd(facts_of({}, "line 3"), "sshd", False)))[0] is WARNING
    assert "no sshd listens" in judged(list(sshd.judge_sshd(sshd.SshdFacts(Started("/c"), SSHD), "sshd", False)))[1]


@pytest.mark.parametrize(
    ("title", "file"),
    [
        ("sshd: /usr/sbin/sshd -D [listener] 0 of 10-100 startups", "/etc/ssh/sshd_config"),
        ("sshd: /usr/sbin/sshd -D -f /etc/ssh/jobs_config [listener] 0 of 10-100 startups", "/etc/ssh/jobs_config"),
        ("/usr/sbin/sshd -D -f/x ", "/x"),
        ("sshd: alice [priv]", None),
        ("sshd: alice@pts/0", None),
        ("/usr/sbin/sshd -i -f /x ", None),
    ],
)
def test_which_sshd_listens(title: str, file: Optional[str]) -> None:
    """By its title: one that serves a login has the user's name in it."""
    started = started_by(title)
    assert (None if started is None else started.file) == file


def test_confinement() -> None:
    """Said where it enforces, and only there."""
    assert list(sshd.judge_confinement("", None)) == list(sshd.judge_confinement("0", None)) == []
    assert judged(list(sshd.judge_confinement("1", None)))[0] is WARNING
    assert judged(list(sshd.judge_confinement("", "/usr/sbin/sshd")))[0] is WARNING


# ---- the seal


@pytest.mark.parametrize(
    ("status", "needed", "group", "grade"),
    [
        ((stat.S_IFREG | 0o400, 0), True, False, OK),
        ((stat.S_IFREG | 0o600, 112), True, False, OK),
        ((stat.S_IFREG | 0o640, 0), True, False, FAILURE),
        ((stat.S_IFREG | 0o640, 0), True, True, OK),
        ((stat.S_IFREG | 0o644, 0), True, True, FAILURE),
        ((stat.S_IFREG | 0o400, 1000), True, False, FAILURE),
        ((stat.S_IFLNK | 0o777, 0), True, False, FAILURE),
        (None, True, False, FAILURE),
        (None, False, False, OK),
    ],
)
def test_keys(status: Optional[Tuple[int, int]], needed: bool, group: bool, grade: Grade) -> None:
    """Nobody else's to read; missing matters where the configuration names it."""
    assert judged(list(seal.judge_key("/k", status, (0, 112), needed=needed, group=group)))[0] is grade


@pytest.mark.parametrize(("state", "grade"), [(0, OK), (5, WARNING), (None, OK)])
def test_clock(state: Optional[int], grade: Grade) -> None:
    """As adjtimex(2) returns it."""
    assert judged(list(seal.judge_clock(state, 10)))[0] is grade


# ---- files and the agent


@pytest.mark.parametrize(
    ("status", "grade", "words"),
    [
        ((stat.S_IFSOCK | 0o600, 0), OK, ""),
        ((stat.S_IFSOCK | 0o666, 0), FAILURE, "mode 0666, expected root's and mode 0600"),
        ((stat.S_IFSOCK | 0o600, 5), FAILURE, "uid 5"),
        ((stat.S_IFREG | 0o600, 0), FAILURE, "no socket"),
        (None, FAILURE, "is missing"),
    ],
)
def test_sockets(status: Optional[Tuple[int, int]], grade: Grade, words: str) -> None:
    """Exactly what the agent makes."""
    (hidden,) = sockets.judge_socket("pam_socket", "/proc/none", None, 0o600)
    assert "umount /proc if it is not meant to be" in hidden.remedy
    found = list(sockets.judge_socket("pam_socket", "/p", status, 0o600))
    assert judged(found)[0] is grade
    assert words in judged(found)[1]


@pytest.mark.parametrize(
    ("status", "grade"),
    [
        ((stat.S_IFDIR | 0o755, 0), OK),
        ((stat.S_IFDIR | 0o775, 0), FAILURE),
        ((stat.S_IFDIR | 0o755, 9), FAILURE),
        ((stat.S_IFREG | 0o644, 0), FAILURE),
        (None, OK),
    ],
)
def test_directories(status: Optional[Tuple[int, int]], grade: Grade) -> None:
    """Root's to write; one that is missing is said of what is in it."""
    assert judged(list(files.judge_directory("d", "/d", status)))[0] is grade


STATUS: Dict[str, object] = {
    "version": __version__,
    "uptime_s": 7.0,
    "seal": "munge",
    "witnesses": {"bpf": "ok", "diag": "ok"},
    "probe": {"self_test": "ok"},
}


@pytest.mark.parametrize(
    ("change", "grade", "words"),
    [
        ({}, OK, ""),
        ({"version": "0.0.9"}, WARNING, "version 0.0.9 runs"),
        ({"seal": None}, FAILURE, "nothing to seal with"),
        ({"witnesses": {"bpf": "not tried yet", "diag": "ok"}}, WARNING, "bpf: not tried yet"),
        ({"witnesses": {"bpf": "ok", "conntrack": NOTHING_TRANSLATED}}, OK, ""),
        ({"witnesses": {"bpf": "ok", "conntrack": "not permitted"}}, WARNING, "conntrack: not permitted"),
        ({"probe": {"self_test": "wrong pid"}}, WARNING, "wrong pid"),
        ({"witnesses": None, "probe": 3, "uptime_s": "x"}, OK, ""),
    ],
)
def test_status(change: Dict[str, object], grade: Grade, words: str) -> None:
    """What the agent says of itself, whatever its release says."""
    found = list(agent.judge_status({**STATUS, **change}, "/u", Config()))
    assert judged(found)[0] is grade, found
    assert words in judged(found)[1] or not words


def test_silence() -> None:
    """An agent that is there and cannot be asked is another thing than none."""
    assert "start adoptd" in next(agent.judge_silence("no agent is running", None)).remedy
    assert "an agent runs (pid 7)" in next(agent.judge_silence("no agent is running", 7)).seen


def test_the_configuration_in_force() -> None:
    """Every key is compared; which ones differ is told, and whether a reload takes them."""
    settings = Config()
    assert judged(list(agent.judge_configuration(config.show(settings), settings)))[0] is OK
    for table in dataclasses.fields(settings):
        section = getattr(settings, table.name)
        for item in dataclasses.fields(section):
            value = getattr(section, item.name)
            other = {bool: not value, int: 77, str: "/x", tuple: ("::1",)}[type(value)]
            changed = dataclasses.replace(settings, **{table.name: dataclasses.replace(section, **{item.name: other})})
            (found,) = agent.judge_configuration(config.show(settings), changed)
            assert (found.grade, f"{table.name}.{item.name}" in found.seen) == (WARNING, True)
            assert ("restart" in found.remedy) == item.metadata["rule"].restart
    assert judged(list(agent.judge_configuration("not = = toml", settings)))[0] is WARNING


@pytest.mark.parametrize(
    ("descriptors", "autogroup", "grade"),
    [
        (65536, "/autogroup-25 nice -10\n", OK),
        (1024, "", WARNING),
        (None, "/autogroup-25 nice 0\n", WARNING),
        (None, "", OK),
    ],
)
def test_the_process(descriptors: Optional[int], autogroup: str, grade: Grade) -> None:
    """Its bounds, as the kernel shows them."""
    assert judged(list(agent.judge_process(descriptors, autogroup)))[0] is grade


def unit(name: str, **values: str) -> str:
    whole = {"LoadState": "loaded", "ActiveState": "active", "SubState": "running", "UnitFileState": "enabled"}
    whole.update({"NRestarts": "0", "NeedDaemonReload": "no", "Result": "success", **values})
    return f"Id={name}\n" + "".join(f"{key}={value}\n" for key, value in whole.items())


@pytest.mark.parametrize(
    ("shown", "grade", "words"),
    [
        (unit("adoptd.service"), OK, ""),
        (unit("adoptd.service", ActiveState="failed", Result="exit-code"), FAILURE, "is failed"),
        (unit("adoptd.service", UnitFileState="disabled"), WARNING, "not enabled"),
        (unit("adoptd.service", LoadState="masked"), FAILURE, "masked"),
        (unit("adoptd.service", LoadState="not-found"), WARNING, "not installed"),
        (unit("adoptd.service", NRestarts="3"), WARNING, "3 times"),
        (unit("adoptd.service", NeedDaemonReload="yes"), WARNING, "changed on disk"),
        (unit("adoptd.socket"), OK, ""),
        (unit("adoptd.socket", ActiveState="inactive"), WARNING, "logins do not wait"),
        (unit("adoptd-callerid.socket", ActiveState="inactive"), WARNING, "can take the port"),
        (unit("adoptd-user.socket", UnitFileState="disabled"), WARNING, "not enabled"),
    ],
)
def test_units(shown: str, grade: Grade, words: str) -> None:
    """As systemctl shows them, several in a row."""
    units = agent.units_of(f"{shown}\n{unit('adoptd.service')}")
    assert len(units) == 2
    found = list(agent.judge_units(units, True))
    assert judged(found)[0] is grade, found
    assert words in judged(found)[1] or not words


def test_callerid_off_needs_no_socket() -> None:
    """Its unit may be off then."""
    units = agent.units_of(unit("adoptd-callerid.socket", ActiveState="inactive"))
    assert list(agent.judge_units(units, False)) == []
