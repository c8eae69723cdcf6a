"""What doctor finds of the agent's sockets, of processes, and of what the running agent may and sees."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import time
from pathlib import Path
from typing import Dict, FrozenSet, Optional, Set, Tuple

import pytest
from nobody import NOBODY, public_path

from adoptd.config import Config
from adoptd.doctor import agent, certificates, rights, seal, sockets
from adoptd.doctor.files import judge_above
from adoptd.doctor.findings import Grade, Scene, worst
from adoptd.doctor.likeness import ask_child
from adoptd.doctor.processes import agent_pid, capabilities_of, holders_of, names_of, running
from adoptd.doctor.rights import Seen
from adoptd.doctor.sockets import Place
from adoptd.doctor.unix_sockets import bound_as, listening

__all__ = ["public_path"]

OK, WARNING, FAILURE = Grade.OK, Grade.WARNING, Grade.FAILURE
ALL = frozenset(range(41))


# ---- sockets


def test_who_listens(tmp_path: Path) -> None:
    """By the kernel, and without a connection: one that is bound alone has nobody, one that listens has us."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        before = listening()
        server.listen()
        after = listening()
        inode = os.fstat(server.fileno()).st_ino
    assert before is not None
    assert after is not None
    place = bound_as(path)
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


@pytest.mark.parametrize(
    ("error", "holder", "words"),
    [
        ("no agent is running: nobody serves /u", None, "no agent is running"),
        ("no agent is running: nobody serves /u", 7, "an agent runs (pid 7) and cannot be asked: nobody serves /u"),
        ("/u: Permission denied", 7, "an agent runs (pid 7) and cannot be asked: /u: Permission denied"),
    ],
)
def test_an_agent_that_cannot_be_asked(error: str, holder: Optional[int], words: str) -> None:
    """It is not said in one breath to run and not to."""
    (found,) = agent.judge_silence(error, holder)
    assert (found.grade, found.seen == words or (holder is None and words in found.seen)) == (FAILURE, True)
    assert ("user_socket changed" in found.remedy) == (holder is not None)


@pytest.mark.parametrize(
    ("unit", "values", "grade", "words"),
    [
        ("adoptd.service", {}, OK, "is active, enabled"),
        ("adoptd.service", {"LoadState": "bad-setting"}, FAILURE, "systemd-analyze verify adoptd.service"),
        ("adoptd.service", {"LoadState": "error", "ActiveState": "inactive"}, FAILURE, "cannot be read by systemd"),
        ("adoptd.socket", {"LoadState": "bad-setting"}, FAILURE, "systemctl cat adoptd.socket"),
        ("adoptd.service", {"UnitFileState": "enabled-runtime"}, WARNING, "gone after a reboot"),
        ("adoptd.socket", {"UnitFileState": "enabled-runtime"}, WARNING, "gone after a reboot"),
        ("adoptd.socket", {}, OK, ""),
    ],
)
def test_units(unit: str, values: Dict[str, str], grade: Grade, words: str) -> None:
    """Those that systemd cannot make sense of, or starts until the next boot alone."""
    sound = {"LoadState": "loaded", "ActiveState": "active", "UnitFileState": "enabled", "NRestarts": "0"}
    found = list(agent.judge_units([agent.Unit(unit, {**sound, **values})], True))
    assert worst(found) is grade
    assert words in " ".join(f"{each.seen} {each.remedy}" for each in found)


def test_a_lock_that_is_not_the_agents() -> None:
    """It is no other program's socket then."""
    (found,) = sockets.judge_lock("/p", 7)
    assert (found.grade, "second agent" in found.seen) == (WARNING, True)


def test_who_is_the_agent_by_its_own_word(tmp_path: Path) -> None:
    """Nobody, where nobody serves the socket."""
    assert sockets.answering(str(tmp_path / "none")) is None


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


@pytest.mark.parametrize(
    ("apart", "setting", "seen"),
    [
        (("--mount",), "mount -t tmpfs none /mnt", True),
        (("--mount",), "mount -t tmpfs none /etc", False),
        (("--mount", "--net"), ":", False),
        (("--mount", "--pid", "--fork", "--kill-child"), ":", False),
    ],
)
def test_processes_with_a_view_of_their_own(tmp_path: Path, apart: Tuple[str, ...], setting: str, seen: bool) -> None:
    """One of a unit with PrivateTmp= and the like is of this host; one of a container is not."""
    program = tmp_path / "doctor-apart"
    shutil.copy("/bin/sh", program)
    command = ["/usr/bin/unshare", *apart, "/bin/sh", "-c", f'{setting}; exec "$0" -c "echo; read line"', str(program)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"\n"
            found = [each for each in running("doctor-apart") if each.program == str(program)]
        finally:
            child.kill()
    assert bool(found) == seen


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


def test_a_users_program_of_a_daemon_s_name_is_not_looked_into(public_path: Path) -> None:
    """Its command line may be in memory that nobody can read to its end."""
    program = public_path / "doctor-others"
    shutil.copy("/bin/sh", program)
    command = [str(program), "-c", "echo; read line"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=NOBODY) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            found = [list(running("doctor-others", owners)) for owners in ((0,), (0, NOBODY))]
        finally:
            child.kill()
    assert [[each.pid for each in some] for some in found] == [[], [child.pid]]


@pytest.mark.parametrize(("namespace", "found"), [("user:[1]", True), ("user:[2]", False)])
def test_the_agent_is_of_our_user_namespace(tmp_path: Path, namespace: str, found: bool) -> None:
    """In their own, users have links say what they like, and a pid that an agent left may be theirs by now."""
    lock, proc = tmp_path / "pam.sock.lock", tmp_path / "proc"
    lock.write_text("123")
    for pid, user in (("self", "user:[1]"), ("123", namespace)):
        (proc / pid / "ns").mkdir(parents=True)
        (proc / pid / "ns/user").symlink_to(user)
    (proc / "123/status").write_text("Name:\tpython3\nUid:\t0\t0\t0\t0\n")
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


# ---- munged's key


@pytest.mark.parametrize(
    ("size", "owner", "owners", "words"),
    [
        (1024, 102, {102}, None),
        (1024, 0, {0}, None),
        (1024, 0, {0, 102}, None),
        (1024, 0, {102}, "is owned by uid 0, and munged runs as 102"),
        (0, 102, {102}, "is 0 bytes long"),
        (31, 102, {102}, "is 31 bytes long"),
    ],
)
def test_a_key_that_munged_does_not_start_with(
    tmp_path: Path, size: int, owner: int, owners: Set[int], words: Optional[str]
) -> None:
    """Said before a restart is, that would end it."""
    key = tmp_path / "munge.key"
    key.write_bytes(b"k" * size)
    os.chown(key, owner, -1)
    unfit = seal.unfit_for_munged(os.stat(key), owners)
    assert (unfit is None) == (words is None)
    found = list(seal.judge_munged(str(key), 50.0, 10.0, unfit))
    assert [(each.grade, (words or "was changed after") in each.seen) for each in found] == [(WARNING, True)]
    assert ("restart munge" in found[0].remedy) == (words is None)
    assert seal.unfit_for_munged(None, owners) is None


# ---- directories above


def test_who_can_put_things_in_the_place_of_what_a_link_leads_to(tmp_path: Path) -> None:
    """Not only who can write to the file, and to the directory that the link is in."""
    home, etc = tmp_path / "home", tmp_path / "etc"
    for directory in (home, etc):
        directory.mkdir()
        directory.chmod(0o755)
    (home / "file").touch()
    (etc / "file").symlink_to(home / "file")
    assert list(judge_above("pam", etc / "file", (etc,))) == []
    os.chown(home, 60001, -1)
    (found,) = judge_above("pam", etc / "file", (etc,))
    assert (found.grade, found.seen) == (
        FAILURE,
        f"{home} is owned by uid 60001: others can put theirs in place of {etc}/file",
    )
    assert list(judge_above("pam", home / "file", (home,))) == []


# ---- the exporter's certificate

_DAY_S = 86_400.0


@pytest.mark.parametrize(
    ("error", "span_days", "grade", "words"),
    [
        (None, (-9.0, 90.0), OK, "can be used"),
        (None, None, OK, "can be used"),
        (None, (-9.0, 3.0), WARNING, "ends in 3 days"),
        (None, (-9.0, -3.0), WARNING, "ended 3 days ago"),
        (None, (0.5, 90.0), WARNING, "counts from 2001-09-09 13:46 UTC on"),
        ("key values mismatch", (-9.0, 90.0), FAILURE, "key values mismatch"),
    ],
)
def test_certificates(error: Optional[str], span_days: Optional[Tuple[float, float]], grade: Grade, words: str) -> None:
    """Whether the next start can use it, and scrapers take it; and what Prometheus' own is checked by."""
    found = None
    if span_days is not None:
        begins_s, ends_s = (1e9 + days * _DAY_S for days in span_days)
        found = certificates.Certificates(((begins_s, ends_s),))
    (said,) = certificates.judge_certificate("/c.pem", error, found, 1e9)
    assert (said.grade, words in said.seen) == (grade, True)
    of_ca = list(certificates.judge_client_ca("/ca.pem", error, found, 1e9))
    assert [each.grade for each in of_ca] == ([] if grade is OK else [grade])


@pytest.mark.parametrize(
    ("spans_days", "words"),
    [
        # The old one has ended, the new one is there; or is not begun, and the old one counts yet.
        (((-900.0, -3.0), (-9.0, 900.0)), ""),
        (((-900.0, 30.0), (0.5, 900.0)), ""),
        (((-900.0, -3.0), (-900.0, -9.0)), "ended 3 days ago: the exporter does not believe"),
        (((-900.0, -3.0), (0.5, 900.0)), "ended 3 days ago: the exporter does not believe"),
        (((-900.0, 3.0), (-900.0, -9.0)), "ends in 3 days"),
    ],
)
def test_authorities_in_a_rotation(spans_days: Tuple[Tuple[float, float], ...], words: str) -> None:
    """One that counts is enough of those; of a chain each has to."""
    spans = tuple((1e9 + begins * _DAY_S, 1e9 + ends * _DAY_S) for begins, ends in spans_days)
    found = list(certificates.judge_client_ca("/ca.pem", None, certificates.Certificates(spans), 1e9))
    assert bool(found) == bool(words), found
    assert all(words in each.seen for each in found)
    (chain,) = certificates.judge_certificate("/c.pem", None, certificates.Certificates(spans), 1e9)
    assert chain.grade is WARNING


def test_a_certificate_without_names() -> None:
    """Prometheus looks for none elsewhere."""
    for named, grade in ((True, OK), (False, WARNING)):
        found = certificates.Certificates(((0.0, 1e9 + 90 * _DAY_S),), named)
        (said,) = certificates.judge_certificate("/c.pem", None, found, 1e9)
        assert (said.grade, "subjectAltName" in said.seen) == (grade, not named)


def test_a_certificate_as_it_is_read(tmp_path: Path) -> None:
    """One that is good, a key that is another's, one with a passphrase, which nobody is asked for."""
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=x"]
    authority, host = "basicConstraints=critical,CA:TRUE", "basicConstraints=critical,CA:FALSE"
    for name, more in (
        ("a", ["-nodes", "-addext", host, "-addext", "subjectAltName=DNS:x", "-days", "30"]),
        ("b", ["-nodes", "-addext", authority, "-days", "9000"]),
        ("c", ["-passout", "pass:word", "-days", "30"]),
    ):
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem"]
        subprocess.run([*new, *more, *files], cwd=tmp_path, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    certificate = str(tmp_path / "a.pem")
    assert certificates.load_error(certificate, str(tmp_path / "a.key")) is None
    assert "mismatch" in str(certificates.load_error(certificate, str(tmp_path / "b.key"))).lower()
    assert certificates.load_error(str(tmp_path / "c.pem"), str(tmp_path / "c.key")) is not None
    assert certificates.ca_error(certificate) is None
    assert certificates.ca_error(str(tmp_path / "a.key")) is not None
    assert certificates.ca_error(f"{tmp_path}/none") is not None
    for name, days, named in (("a", 30, True), ("b", 9000, False)):
        found = certificates.read_certificates(str(tmp_path / f"{name}.pem"))
        assert found is not None
        ((begins_s, ends_s),) = found.spans
        assert abs(begins_s - time.time()) < _DAY_S / 2
        assert (round((ends_s - time.time()) / _DAY_S), found.named) == (days, named)
    chain = tmp_path / "chain.pem"
    chain.write_text("".join((tmp_path / name).read_text() for name in ("b.pem", "a.pem")), encoding="ascii")
    found = certificates.read_certificates(str(chain))
    assert found is not None
    assert round((found.all_count()[1] - time.time()) / _DAY_S) == 30, "the first of several to end"
    assert round((found.last(time.time())[1] - time.time()) / _DAY_S) == 9000
    begun = "-----BEGIN CERTIFICATE-----\n"
    chain.write_text(begun + (tmp_path / "a.pem").read_text(), encoding="ascii")
    assert certificates.read_certificates(str(chain)) is not None, "one that begins and does not end hides none"
    # Each was looked for an end of, to the end of the file: a quarter of an hour for these.
    chain.write_text(begun * (certificates._FILE_MAX_BYTES // len(begun)), encoding="ascii")
    assert certificates.read_certificates(str(chain)) is None
    cut = tmp_path / "cut.pem"
    for text in ("", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n", "\xff"):
        cut.write_text(text, encoding="utf-8")
        assert certificates.read_certificates(str(cut)) is None
    assert certificates.read_certificates(str(tmp_path / "a.key")) is None
    assert certificates.read_certificates(str(tmp_path)) is None
