"""What doctor finds of the agent's sockets, of processes, and of what the running agent may and sees."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import time
from pathlib import Path
from typing import FrozenSet, Optional, Tuple

import pytest

from adoptd.config import Config
from adoptd.doctor import certificates, rights, sockets
from adoptd.doctor.findings import Grade, Scene, worst
from adoptd.doctor.likeness import ask_child
from adoptd.doctor.processes import agent_pid, capabilities_of, holders_of, names_of, running
from adoptd.doctor.rights import Seen
from adoptd.doctor.sockets import Place

OK, WARNING, FAILURE = Grade.OK, Grade.WARNING, Grade.FAILURE
ALL = frozenset(range(41))


# ---- sockets


def test_who_listens(tmp_path: Path) -> None:
    """By the kernel, and without a connection: one that is bound alone has nobody, one that listens has us."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        before = sockets.listening()
        server.listen()
        after = sockets.listening()
        inode = os.fstat(server.fileno()).st_ino
    assert before is not None
    assert after is not None
    place = sockets.identity(path)
    assert place not in before
    assert after[place] == inode


def test_who_holds_a_socket() -> None:
    """Every process that has it open, us among them."""
    with socket.socket(socket.AF_UNIX) as ours:
        inode = os.fstat(ours.fileno()).st_ino
        assert holders_of((inode,)) == {inode: (os.getpid(),)}
    assert holders_of((inode,)) == {}
    assert holders_of(()) == {}
    assert names_of((os.getpid(), 0)).endswith("? (pid 0)")


@pytest.mark.parametrize(
    ("listened", "holders", "ours", "grade", "words"),
    [
        (True, (7,), 7, OK, ""),
        (True, (1, 7), 7, OK, ""),
        (True, (1,), None, OK, ""),
        (True, (), 7, OK, ""),
        (True, (9,), 7, FAILURE, "and not the agent"),
        (True, (9,), None, FAILURE, "and not the agent"),
        (False, (), 7, FAILURE, "nobody listens"),
    ],
)
def test_listeners(listened: bool, holders: Tuple[int, ...], ours: Optional[int], grade: Grade, words: str) -> None:
    """The agent, or the service manager for it."""
    found = list(sockets.judge_listener("pam_socket", "/p", listened, holders, ours))
    assert worst(found) is grade
    assert words in " ".join(each.seen for each in found)


@pytest.mark.parametrize(
    ("status", "grade"),
    [
        ((stat.S_IFDIR | 0o700, 0), OK),
        ((stat.S_IFDIR | 0o755, 0), WARNING),
        ((stat.S_IFDIR | 0o700, 9), WARNING),
        ((stat.S_IFREG | 0o600, 0), WARNING),
        (None, WARNING),
    ],
)
def test_what_is_kept(status: Optional[Tuple[int, int]], grade: Grade) -> None:
    """The next agent takes it only as it was left."""
    assert worst(list(sockets.judge_kept("/run/adoptd/sessions", status))) is grade


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (Place(5, 5, read_only=False), None),
        (None, None),
        (Place(0, 5, read_only=False), "is full"),
        (Place(5, 0, read_only=False), "no inode"),
        (Place(5, 5, read_only=True), "is read-only"),
    ],
)
def test_room(place: Optional[Place], words: Optional[str]) -> None:
    """Sockets and sessions take some."""
    found = list(sockets.judge_place("/run/adoptd", place))
    assert [each.grade for each in found] == ([] if words is None else [FAILURE])
    assert words is None or words in found[0].seen


# ---- processes


def test_processes_by_name(tmp_path: Path) -> None:
    """Its title, when it began, and whose it is."""
    program = tmp_path / "doctor-tested"
    shutil.copy("/bin/sh", program)
    before_s = time.time()
    command = [str(program), "-c", "echo; read line", "word"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            found = next(each for each in running("doctor-tested") if each.pid == child.pid)
        finally:
            child.kill()
    assert found.title.endswith("word")
    assert found.uid == os.getuid()
    assert found.state in "RSD"
    assert before_s - 1 < found.started_s < time.time() + 1
    assert not [each for each in running("doctor-tested") if each.pid == child.pid]


def test_the_agent_by_its_lock(tmp_path: Path) -> None:
    """Who has the file open whose pid is in it; a file that was left is nobody's."""
    lock = tmp_path / "pam.sock.lock"
    assert agent_pid(str(tmp_path / "pam.sock")) is None
    lock.write_text(f"{os.getpid()}\n")
    assert agent_pid(str(tmp_path / "pam.sock")) is None
    with lock.open():
        assert agent_pid(str(tmp_path / "pam.sock")) == os.getpid()
    lock.write_text("no number")
    assert agent_pid(str(tmp_path / "pam.sock")) is None


def test_a_program_of_root_s_under_another_name_is_not_taken_for_it(tmp_path: Path) -> None:
    """Whoever may start su by a link has a process of uid 0 with a name and arguments of their choice."""
    link = tmp_path / "doctor-forged"
    link.symlink_to("/bin/sleep")
    with subprocess.Popen([str(link), "60"]) as child:
        try:
            until = time.monotonic() + 10
            while Path(f"/proc/{child.pid}/comm").read_text().strip() != "doctor-forged":
                assert time.monotonic() < until
            assert list(running("doctor-forged")) == []
        finally:
            child.kill()


@pytest.mark.parametrize(("namespace", "found"), [("user:[1]", True), ("user:[2]", False)])
def test_the_agent_is_of_our_user_namespace(tmp_path: Path, namespace: str, found: bool) -> None:
    """In their own, users have links say what they like, and a pid that an agent left may be theirs by now."""
    lock, proc = tmp_path / "pam.sock.lock", tmp_path / "proc"
    lock.write_text("123")
    for pid, user in (("self", "user:[1]"), ("123", namespace)):
        (proc / pid / "ns").mkdir(parents=True)
        (proc / pid / "ns/user").symlink_to(user)
    (proc / "123/fd").mkdir()
    (proc / "123/fd/3").symlink_to(lock)
    assert (agent_pid(str(tmp_path / "pam.sock"), proc) == 123) is found


def test_a_trial_takes_nothing_from_where_root_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may be a user's directory, with a package of our name in it."""
    (tmp_path / "adoptd").mkdir()
    (tmp_path / "adoptd/__init__.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    here = Scene(tmp_path / "none.toml", Config(), tmp_path, "sshd")
    said = ask_child(here, "probe", [str(tmp_path / "no bpffs"), str(tmp_path / "no sources")], 60)
    assert said is not None
    assert said["error"]
    assert not (tmp_path / "was run").exists()


# ---- what the agent may


@pytest.mark.parametrize(
    ("missing", "probe", "words"),
    [
        (frozenset(), True, ""),
        (frozenset({12}), True, "CAP_NET_ADMIN"),
        (frozenset({19}), True, "CAP_SYS_PTRACE"),
        # Either is in CAP_SYS_ADMIN.
        (frozenset({39}), True, ""),
        (frozenset({21}), True, ""),
        (frozenset({21, 39}), True, "CAP_BPF"),
        (frozenset({21, 39}), False, ""),
    ],
)
def test_capabilities(missing: FrozenSet[int], probe: bool, words: str) -> None:
    """Each that is missed is named, with what it is for."""
    (found,) = rights.judge_capabilities(ALL - missing, probe)
    assert found.grade is (WARNING if words else OK)
    assert words in found.seen


def test_capabilities_of_a_process() -> None:
    """Those in force; of none there is nothing to say."""
    effective = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    found = capabilities_of(os.getpid())
    assert found is not None
    assert sum(1 << number for number in found) == int(effective.split()[1], 16)
    assert capabilities_of(0) is None


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (Seen("/x", hidden=False), ""),
        (Seen("/x", hidden=True), "does not see /x"),
        (Seen("/x", hidden=False, read_only=True), "cannot write below /x"),
    ],
)
def test_the_view_of_the_agent(seen: Seen, words: str) -> None:
    """A unit can hide what is there, and shut what is open."""
    found = list(rights.judge_view([seen]))
    assert worst(found) is (FAILURE if words else OK)
    assert words in " ".join(each.seen for each in found)


# ---- the exporter's certificate

_DAY_S = 86_400.0


@pytest.mark.parametrize(
    ("error", "ends_days", "grade", "words"),
    [
        (None, 90.0, OK, "can be used"),
        (None, None, OK, "can be used"),
        (None, 3.0, WARNING, "ends in 3 days"),
        (None, -3.0, WARNING, "ended 3 days ago"),
        ("key values mismatch", 90.0, FAILURE, "key values mismatch"),
    ],
)
def test_certificates(error: Optional[str], ends_days: Optional[float], grade: Grade, words: str) -> None:
    """Whether the next start can use it, and scrapers take it."""
    ends_s = None if ends_days is None else 1e9 + ends_days * _DAY_S
    (found,) = certificates.judge_certificate("/c.pem", error, ends_s, 1e9)
    assert (found.grade, words in found.seen) == (grade, True)


def test_a_certificate_as_it_is_read(tmp_path: Path) -> None:
    """One that is good, a key that is another's, one with a passphrase, which nobody is asked for."""
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=x"]
    for name, more in (("a", ["-nodes"]), ("b", ["-nodes"]), ("c", ["-passout", "pass:word"])):
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "30"]
        subprocess.run([*new, *more, *files], cwd=tmp_path, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    certificate = str(tmp_path / "a.pem")
    assert certificates.load_error(certificate, str(tmp_path / "a.key")) is None
    assert "mismatch" in str(certificates.load_error(certificate, str(tmp_path / "b.key"))).lower()
    assert certificates.load_error(str(tmp_path / "c.pem"), str(tmp_path / "c.key")) is not None
    ends_s = certificates.ends_s(certificate)
    assert ends_s is not None
    assert 29 * _DAY_S < ends_s - time.time() < 31 * _DAY_S
    assert certificates.ends_s(str(tmp_path / "a.key")) is None
