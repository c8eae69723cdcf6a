"""What the doctor says of doors that are shut or stand open by the slips of those who keep them: PAM's lines and files,
sshd's, the agent's sockets and ports. Each is well before, and well again after; what only looks odd is not told.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path
from typing import Callable, ContextManager, Dict, Iterator

import pytest

from lab.etc_files import ALICE
from lab.lab import Lab
from lab.node import PYTHON, Node
from lab.node_runner import SOURCE_IN_NODE
from lab.test_doctor import (
    LIMIT_S,
    PATIENT,
    TOML,
    Case,
    bad,
    before_account,
    examined,
    file_with,
    mode,
    moved_away,
    pam,
    sshd,
)
from lab.test_doctor_parts import AS_EVER, CONF, SSHD_CONFIG, agent_under, both, every, sshd_as

pytestmark = pytest.mark.timeout(150)


# ---- how a node is broken: each is undone on leaving


@contextlib.contextmanager
def agent_with(node: Node, settings: str) -> Iterator[None]:
    """The agent started with these besides."""
    with file_with(node, CONF, lambda _: settings):
        node.stop("agent")
        try:
            node.start_agent()
            yield
        finally:
            node.stop("agent")
    node.start_agent()


@contextlib.contextmanager
def port_of_roots(node: Node, port: int) -> Iterator[None]:
    """Another program of root's has it when the agent is started."""
    node.stop("agent")
    code = f"import socket,time; s=socket.create_server(('0.0.0.0',{port})); print(flush=True); time.sleep(600)"
    with node.popen([PYTHON, "-c", code]) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            node.start_agent()
            yield
        finally:
            other.kill()
            node.stop("agent")
    node.start_agent()


@contextlib.contextmanager
def mounted_over(node: Node, path: str) -> Iterator[None]:
    node.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "none", path])
    try:
        yield
    finally:
        node.run(["umount", path])


@contextlib.contextmanager
def emptied(node: Node, name: str) -> Iterator[None]:
    """As by a full disk while it was written: all else of it is as it was."""
    path = node.path(name)
    before, status = path.read_bytes(), path.stat()
    path.write_bytes(b"")
    try:
        yield
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@contextlib.contextmanager
def kept_in_a_home(node: Node, name: str) -> Iterator[None]:
    """Root's file with root's mode, in a directory of a user's: a link leads there."""
    home = f"/home/alice/{Path(name).name}"
    text = node.path(name).read_text(encoding="utf-8")
    with file_with(node, home, lambda _: text), moved_away(node, name):
        node.path(name).symlink_to(home)
        try:
            yield
        finally:
            node.path(name).unlink()


def module(node: Node) -> str:
    """Ours, as the node's stack names it."""
    return next(
        word for word in node.path("/etc/pam.d/sshd").read_text(encoding="utf-8").split() if word.endswith("adopt.so")
    )


def sshd_in_a_view_of_its_own(mount: str, *words: str) -> Callable[[Lab], ContextManager[None]]:
    """As its unit's PrivateTmp= and the like make it: a mount namespace that is a copy of ours, and a mount more."""
    own = ("/usr/bin/unshare", "--mount", "--propagation", "slave", "sh", "-c", f'{mount} && exec "$@"', "sh")
    return lambda lab: sshd_as(lab.second, *own, *AS_EVER, *words)


def speaking_tls(files: Callable[[Path], None], settings: str = "") -> Callable[[Lab], ContextManager[None]]:
    """The exporter with a certificate and its key that ``files`` makes as /etc/adoptd/m.pem and m.key."""

    @contextlib.contextmanager
    def broken(lab: Lab) -> Iterator[None]:
        etc = lab.second.path("/etc/adoptd")
        files(etc)
        text = f"[metrics]\ntls_certificate = '/etc/adoptd/m.pem'\ntls_key = '/etc/adoptd/m.key'\n{settings}"
        try:
            with agent_with(lab.second, text):
                yield
        finally:
            for name in ("m.pem", "m.key", "m.csr", "ca.pem"):
                (etc / name).unlink(missing_ok=True)

    return broken


def certificate(begins: str, ends: str, *, names: bool = True) -> Callable[[Path], None]:
    """A host's, as an authority makes them: none of its own, and from when until when it counts (YYMMDD)."""

    def make(directory: Path) -> None:
        def openssl(*words: str) -> None:
            subprocess.run(["openssl", *words], cwd=directory, check=True, capture_output=True, timeout=60)

        openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=node2", "-keyout", "m.key", "-out", "m.csr")
        (directory / "m.key").chmod(0o600)
        work = directory / "ca"
        work.mkdir()
        try:
            (work / "index.txt").touch()
            (work / "extensions").write_text(
                "[e]\nbasicConstraints=CA:FALSE\n" + ("subjectAltName=DNS:node2\n" if names else "")
            )
            (work / "conf").write_text(
                f"[ca]\ndefault_ca=d\n[d]\ndatabase={work}/index.txt\nnew_certs_dir={work}\ndefault_md=sha256\n"
                "rand_serial=yes\npolicy=p\n[p]\ncommonName=supplied\n"
            )
            openssl(
                *("ca", "-batch", "-config", f"{work}/conf", "-selfsign", "-keyfile", "m.key", "-in", "m.csr"),
                *("-extfile", f"{work}/extensions", "-extensions", "e", "-notext", "-out", "m.pem"),
                *("-startdate", f"{begins}000000Z", "-enddate", f"{ends}000000Z"),
            )
        finally:
            for file in work.iterdir():
                file.unlink()
            work.rmdir()

    return make


def without(*kinds: str) -> Callable[[str], str]:
    """The lines of others of these kinds taken out."""
    return lambda text: "".join(
        line for line in text.splitlines(keepends=True) if "adopt" in line or line.split()[0] not in kinds
    )


CASES: Dict[str, Case] = {
    # PAM
    "no account line but ours": Case(pam(without("account")), "failure", "pam", ("no account line but ours", "root")),
    "no session line but ours": Case(pam(without("session")), "failure", "pam", ("no session line but ours", "root")),
    "a module that is gone": Case(
        pam(before_account("account required pam_sss_lost.so")),
        "failure",
        "module",
        ("pam_sss_lost.so", "nobody gets in"),
    ),
    "a module for other lines": Case(
        pam(before_account("account required pam_limits.so")), "failure", "module", ("pam_sm_acct_mgmt", "another kind")
    ),
    "a blank that is none": Case(
        pam(every("pam_adopt.so", "\u00a0action_unknown=deny")), "failure", "module", ("is not there", "cat -A")
    ),
    "no directory of services": Case(
        # Where the distribution has a directory of its own libpam goes by that.
        lambda lab: moved_away(lab.second, "/etc/pam.d"),
        "failure",
        "pam",
        ("/etc/pam.d", "put the distribution's"),
    ),
    "a line in the file from before": Case(
        lambda lab: file_with(lab.second, "/etc/pam.conf", lambda _: "sshd account required pam_adopt.so\n"),
        "warning",
        "pam",
        ("does not read it",),
    ),
    "a stack in a user's home": Case(
        lambda lab: kept_in_a_home(lab.second, "/etc/pam.d/sshd"),
        "failure",
        "pam",
        ("/home/alice is owned by uid 60001", "/etc/pam.d/sshd"),
    ),
    # sshd
    "sshd's file open": Case(
        lambda lab: mode(lab.second, SSHD_CONFIG, 0o666), "failure", "sshd", (SSHD_CONFIG, "mode 0666")
    ),
    "no time for a login": Case(
        sshd(lambda text: text + "LoginGraceTime 1\n"), "warning", "sshd", ("LoginGraceTime is 1 s", "timeout_ms")
    ),
    "sshd that lets nobody in": Case(
        sshd(lambda text: text + "DenyUsers *\n"), "failure", "sshd", ("DenyUsers *", "nobody gets in")
    ),
    "everybody turned away": Case(
        lambda lab: file_with(lab.second, "/etc/hosts.deny", lambda _: "ALL: ALL\n"),
        "failure",
        "sshd",
        ("/etc/hosts.deny", "turns everybody away"),
    ),
    "an sshd of its own view without PAM": Case(
        sshd_in_a_view_of_its_own("mount -t tmpfs none /tmp", "-o", "UsePAM=no"), "failure", "sshd", ("UsePAM is no",)
    ),
    "an sshd that does not see the agent": Case(
        sshd_in_a_view_of_its_own("mount -t tmpfs none /run/adoptd"),
        "failure",
        "sshd",
        ("does not see /run/adoptd/pam.sock", "systemctl cat ssh"),
    ),
    # The sockets
    "the lock removed": Case(
        lambda lab: moved_away(lab.second, "/run/adoptd/pam.sock.lock"),
        "warning",
        "pam_socket",
        ("lock", "second agent"),
    ),
    "a mount over the sockets": Case(
        lambda lab: mounted_over(lab.second, "/run/adoptd"),
        "failure",
        "pam_socket",
        ("is missing", "umount /run/adoptd"),
    ),
    "another socket in the files": Case(
        lambda lab: file_with(lab.second, CONF, lambda _: "[agent]\npam_socket = '/run/adoptd/other.sock'\n"),
        "failure",
        "pam",
        ("asks at /run/adoptd/pam.sock", "is /run/adoptd/other.sock"),
    ),
    "another users' socket in the files": Case(
        lambda lab: file_with(lab.second, CONF, lambda _: "[agent]\nuser_socket = '/run/adoptd/other.sock'\n"),
        "failure",
        "agent",
        ("an agent runs", "user_socket changed"),
    ),
    "munged's key emptied": Case(
        lambda lab: emptied(lab.second, "/etc/munge/munge.key"), "warning", "key", ("is 0 bytes long", "does not start")
    ),
    "a key that the agent does not see": Case(
        lambda lab: both(
            file_with(lab.second, "/root/adoptd.key", lambda _: f"{'k' * 64}\n"),
            mode(lab.second, "/root/adoptd.key", 0o600),
            agent_with(lab.second, "[seal]\nkey_file = '/root/adoptd.key'\n"),
            agent_under(lab.second, "/usr/bin/unshare", "-m", "sh", "-c", 'mount -t tmpfs none /root; exec "$@"', "sh"),
        ),
        "failure",
        "rights",
        ("does not see /root/adoptd.key", "ProtectHome="),
    ),
    # The network
    "a port of another of root's": Case(
        lambda lab: port_of_roots(lab.second, 9830), "warning", "port", ("python3", "and not by the agent")
    ),
    "our port of another of root's": Case(
        lambda lab: port_of_roots(lab.second, 6830), "failure", "port", ("python3", "and not by the agent")
    ),
    "one port for two": Case(
        lambda lab: agent_with(lab.second, "[metrics]\nport = 6830\n"), "failure", "port", ("are both 6830",)
    ),
    "metrics at another host's address": Case(
        lambda lab: agent_with(lab.second, "[metrics]\nlisten = '10.9.9.9'\n"),
        "failure",
        "port",
        ("no address of this",),
    ),
    "a certificate that ended": Case(
        speaking_tls(certificate("200101", "210101")), "warning", "metrics", ("m.pem ended", "renew it")
    ),
    "a certificate of tomorrow": Case(
        speaking_tls(certificate("400101", "410101")), "warning", "metrics", ("counts from 2040-01-01", "clock")
    ),
    "a certificate without names": Case(
        speaking_tls(certificate("200101", "400101", names=False)), "warning", "metrics", ("no subjectAltName",)
    ),
    "an authority that is missing": Case(
        speaking_tls(certificate("200101", "400101"), "tls_client_ca = '/etc/adoptd/ca.pem'\n"),
        "failure",
        "metrics",
        ("/etc/adoptd/ca.pem is missing",),
    ),
}
# What the agent answers for is not what the case is about: it hears nothing there, or does not listen.
ELSEWHERE = {
    "a mount over the sockets": ("agent", "user_socket"),
    "another socket in the files": ("agent", "pam_socket"),
    "another users' socket in the files": ("user_socket",),
    "a port of another of root's": ("metrics",),
    "our port of another of root's": ("answer",),
    "one port for two": ("metrics",),
    "metrics at another host's address": ("metrics",),
    "a blank that is none": ("pam",),
    "an authority that is missing": ("port",),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cause_is_named(patient: Lab, name: str) -> None:
    """Of the check, the grade and the words; and nothing else is told of but what follows from it."""
    case = CASES[name]
    with case.how(patient):
        said = examined(patient.second, *PATIENT)
    found = [each for each in said if (each.grade, each.check) == (case.grade, case.check)]
    assert any(all(word in f"{each.seen} {each.remedy}" for word in case.words) for each in found), bad(said)
    assert [each for each in bad(said) if each.check not in (case.check, *ELSEWHERE.get(name, ()))] == []
    assert not any("it decides who gets in" in each.seen for each in said), "the agent is nobody else"


SOUND: Dict[str, Callable[[Lab], ContextManager[None]]] = {
    "nothing": lambda lab: contextlib.nullcontext(),
    "a socket by way of a link": pam(every("pam_adopt.so", " socket=/var/run/adoptd/pam.sock")),
    "a service in capitals": pam(every("pam_adopt.so", " service=SSHD")),
    "modules that need not be there": pam(
        lambda text: text + "-session optional pam_lost.so\naccount sufficient pam_lost.so\n"
    ),
    "whom sshd lets in": sshd(lambda text: text + "AllowUsers alice bob root\n"),
    "a copy beside a service": lambda lab: file_with(
        lab.second, "/etc/pam.d/sshd.before", lambda _: "account required pam_adopt.so\n"
    ),
    "a line for su in a file of both": lambda lab: both(
        file_with(
            lab.second, "/etc/pam.d/common-adopt", lambda _: f"account optional {module(lab.second)} service=su\n"
        ),
        file_with(lab.second, "/etc/pam.d/su", lambda text: f"{text}\n@include common-adopt\n"),
        pam(lambda text: f"@include common-adopt\n{text}")(lab),
    ),
    "an sshd of its own view": sshd_in_a_view_of_its_own("mount -t tmpfs none /tmp"),
    "a certificate": speaking_tls(certificate("200101", "400101")),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_only_looks_odd(patient: Lab, name: str) -> None:
    """No fault is told of, where logins are what they are to be."""
    with SOUND[name](patient):
        assert bad(examined(patient.second, *PATIENT)) == []


def test_who_is_not_root_is_not_told_of_faults(patient: Lab) -> None:
    """Where only root can look."""
    node = patient.second
    with mode(node, "/etc/pam.d", 0o700), mode(node, "/run/adoptd", 0o700):
        command = [PYTHON, "-B", "-m", "adoptd", "doctor", "--json"]
        with node.popen(command, user=ALICE, env={"PYTHONPATH": f"{SOURCE_IN_NODE}/agent"}) as process:
            out, err = process.communicate(timeout=LIMIT_S)
    told = [(each["grade"], each["check"], each["seen"]) for each in json.loads(out)["findings"]]
    assert (err, process.returncode, [each for each in told if each[0] == "failure"]) == (b"", 1, [])
    assert ("warning", "pam", "/etc/pam.d/sshd: only root can read it") in told
    assert ("warning", "pam_socket", "/run/adoptd: only root can look into it") in told
    assert any(each[:2] == ("warning", "agent") and "only root can ask it" in each[2] for each in told)


def test_it_is_well_again(patient: Lab) -> None:
    """After all of that: what was found had its cause in what was broken."""
    assert bad(examined(patient.second, *PATIENT)) == []
    assert not patient.second.path(CONF).exists()
    assert patient.second.path(TOML).exists()
