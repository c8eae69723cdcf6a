"""What the doctor says of nodes that are broken on purpose: it names the cause, in time, and is well again after.

Each case is one thing that goes wrong on a node that was well, broken as an administrator, a user or the weather would;
the finding must be of the check named, and must have the words that lead to the cause.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Callable, ContextManager, Dict, Iterator, List, NamedTuple, Tuple

import pytest

from lab.etc_files import ALICE, User
from lab.lab import Lab
from lab.node import PYTHON, Node
from lab.node_runner import SOURCE_IN_NODE

pytestmark = pytest.mark.timeout(120)

# Under 10 s as promised, and what an interpreter takes to start on a machine that is drowning. Nothing may hang longer.
LIMIT_S = 60.0
TOML = "/etc/adoptd/adoptd.toml"
CUT_SHORT = "/run/cut_short/pam_adopt.so"


class Said(NamedTuple):
    grade: str
    check: str
    seen: str
    remedy: str


# For what does not hang: a machine that is drowning makes everything slow.
PATIENT = ("--timeout", "20")


def examined(node: Node, *words: str) -> List[Said]:
    """All that doctor says on the node. Its exit status must be that of the worst."""
    command = [PYTHON, "-B", "-m", "adoptd", "doctor", "--json", "--config", TOML, *words]
    with node.popen(command, env={"PYTHONPATH": f"{SOURCE_IN_NODE}/agent"}) as process:
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert err == b""
    told: Dict[str, object] = json.loads(out)
    findings = told["findings"]
    assert isinstance(findings, list)
    said = [Said(each["grade"], each["check"], each["seen"], each["remedy"]) for each in findings]
    assert process.returncode == max(("ok", "warning", "failure").index(each.grade) for each in said)
    assert all(each.remedy for each in said if each.grade != "ok"), "each has something to do"
    return said


def bad(said: List[Said]) -> List[Said]:
    # Nothing sets the clock of a container, as it were right; and between jobs there is no directory of theirs.
    return [each for each in said if each.grade != "ok" and each.check != "clock" and "no job" not in each.seen]


# ---- how a node is broken: each is undone on leaving


@contextlib.contextmanager
def stopped(node: Node, daemon: str) -> Iterator[None]:
    pid = node.daemons[daemon].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def ended(node: Node, daemon: str) -> Iterator[None]:
    """Killed, so that it leaves what it leaves."""
    node.kill(daemon)
    try:
        yield
    finally:
        node.start_agent() if daemon == "agent" else node.start_sshd()


@contextlib.contextmanager
def file_with(node: Node, name: str, change: Callable[[str], str]) -> Iterator[None]:
    path = node.path(name)
    before = path.read_text(encoding="utf-8") if path.exists() else None
    mode = path.stat().st_mode & 0o7777 if before is not None else 0o644
    node.write(name, change(before or ""), mode=mode)
    try:
        yield
    finally:
        if before is None:
            path.unlink()
        else:
            node.write(name, before, mode=mode)


@contextlib.contextmanager
def mode(node: Node, name: str, bits: int) -> Iterator[None]:
    path = node.path(name)
    before = path.stat().st_mode & 0o7777
    path.chmod(bits)
    try:
        yield
    finally:
        path.chmod(before)


@contextlib.contextmanager
def moved_away(node: Node, name: str) -> Iterator[None]:
    path = node.path(name)
    path.rename(path.with_name(f"{path.name}.away"))
    try:
        yield
    finally:
        path.with_name(f"{path.name}.away").rename(path)


@contextlib.contextmanager
def owned(node: Node, name: str, uid: int) -> Iterator[None]:
    path = node.path(name)
    before = path.stat().st_uid
    os.chown(path, uid, -1)
    try:
        yield
    finally:
        os.chown(path, before, -1)


@contextlib.contextmanager
def port_of_alices(node: Node, port: int) -> Iterator[None]:
    """No agent, and in its place a program of a user's that takes connections and says nothing."""
    node.kill("agent")
    code = f"import socket,time; s=socket.create_server(('0.0.0.0',{port})); print(flush=True); time.sleep(600)"
    with node.popen([PYTHON, "-c", code], user=ALICE) as squatter:
        assert squatter.stdout is not None
        squatter.stdout.readline()
        try:
            yield
        finally:
            squatter.kill()
    node.start_agent()


@contextlib.contextmanager
def link_down(node: Node, device: str) -> Iterator[None]:
    node.run(["ip", "link", "set", device, "down"])
    try:
        yield
    finally:
        node.run(["ip", "link", "set", device, "up"])


@contextlib.contextmanager
def pins_gone(node: Node) -> Iterator[None]:
    """As by a `umount /sys/fs/bpf` of a tidy administrator's: the node's own, in its own mount namespace."""
    node.run(["mount", "-t", "tmpfs", "none", "/sys/fs/bpf"])
    try:
        yield
    finally:
        node.run(["umount", "/sys/fs/bpf"])


@contextlib.contextmanager
def hidden(node: Node, path: str) -> Iterator[None]:
    """As if its package were gone, in this node's mount namespace alone."""
    inside = node.path(path)
    how = ["-t", "tmpfs", "none"] if inside.is_dir() else ["--bind", "/dev/null"]
    node.run(["mount", *how, path])
    try:
        yield
    finally:
        node.run(["umount", path])


@contextlib.contextmanager
def of_version(node: Node, version: str) -> Iterator[None]:
    """The node's agent is of another release, all else being the same."""
    init = f"{SOURCE_IN_NODE}/agent/adoptd/__init__.py"
    text = node.path(init).read_text(encoding="utf-8")
    node.write("/run/another", re.sub(r'__version__ = ".*"', f'__version__ = "{version}"', text))
    node.run(["mount", "--bind", "/run/another", init])
    node.stop("agent")
    node.start_agent()
    try:
        yield
    finally:
        node.run(["umount", init])
        node.stop("agent")
        node.start_agent()


@contextlib.contextmanager
def directory_for(node: Node, name: str) -> Iterator[None]:
    with moved_away(node, name):
        node.path(name).mkdir()
        try:
            yield
        finally:
            node.path(name).rmdir()


@contextlib.contextmanager
def file_for_directory(node: Node, name: str) -> Iterator[None]:
    path = node.path(name)
    if path.is_dir():
        path.rmdir()
    path.touch()
    try:
        yield
    finally:
        path.unlink()


@contextlib.contextmanager
def empty_key(node: Node) -> Iterator[None]:
    with (
        file_with(node, "/etc/adoptd/adoptd.key", lambda _: ""),
        file_with(node, "/etc/adoptd/conf.d/key.toml", lambda _: "[seal]\nscheme = 'key'\n"),
    ):
        yield


@contextlib.contextmanager
def other_munge_key(node: Node) -> Iterator[None]:
    """The key of another cluster, and a munged that has read it."""
    path = node.path("/etc/munge/munge.key")
    owner = path.stat().st_uid
    before = path.read_bytes()
    account = next(
        line.split(":") for line in Path("/etc/passwd").read_text(encoding="utf-8").splitlines() if line[:6] == "munge:"
    )
    munge = User("munge", int(account[2]), int(account[3]), "/", "")

    def restart(key: bytes) -> None:
        node.stop("munged")
        path.unlink()
        path.write_bytes(key)
        path.chmod(0o400)
        os.chown(path, owner, -1)
        node.start_munged(munge)
        node.wait_munged()

    restart(b"another cluster's key, as long as it has to be" * 3)
    try:
        yield
    finally:
        restart(before)


def pam(change: Callable[[str], str]) -> Callable[[Lab], ContextManager[None]]:
    return lambda lab: file_with(lab.second, "/etc/pam.d/sshd", change)


def sshd(change: Callable[[str], str]) -> Callable[[Lab], ContextManager[None]]:
    return lambda lab: file_with(lab.second, "/etc/ssh/sshd_config", change)


def before_account(line: str) -> Callable[[str], str]:
    return lambda stack: stack.replace("account required pam_unix.so", f"{line}\naccount required pam_unix.so", 1)


@contextlib.contextmanager
def silent_resolver(node: Node) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            file_with(node, "/etc/nsswitch.conf", lambda text: text.replace("hosts: files", "hosts: files dns"))
        )
        path = node.path("/etc/resolv.conf")
        before = path.read_bytes() if path.exists() else None
        stack.enter_context(_replaced(path, b"nameserver 10.66.0.77\noptions timeout:30\n", before))
        # Nobody has the address; a permanent neighbour keeps the kernel from finding that out.
        node.run(["ip", "neigh", "add", "10.66.0.77", "lladdr", "02:00:00:00:00:77", "dev", "eth0", "nud", "permanent"])
        stack.callback(node.run, ["ip", "neigh", "del", "10.66.0.77", "dev", "eth0"])
        yield


@contextlib.contextmanager
def _replaced(path: Path, content: bytes, before: object) -> Iterator[None]:
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    try:
        yield
    finally:
        path.unlink()
        if isinstance(before, bytes):
            path.write_bytes(before)


class Case(NamedTuple):
    """``words`` must all be in what is seen or done, of one finding of this check and grade."""

    how: Callable[[Lab], ContextManager[None]]
    grade: str
    check: str
    words: Tuple[str, ...]
    options: Tuple[str, ...] = ()


CASES: Dict[str, Case] = {
    # The agent
    "agent stopped": Case(lambda lab: ended(lab.second, "agent"), "failure", "agent", ("no agent is running",)),
    "agent hangs": Case(lambda lab: stopped(lab.second, "agent"), "failure", "agent", ("does not answer",)),
    "users' socket removed": Case(
        lambda lab: moved_away(lab.second, "/run/adoptd/user.sock"), "failure", "agent", ("an agent runs", "removed")
    ),
    "PAM socket removed": Case(
        lambda lab: moved_away(lab.second, "/run/adoptd/pam.sock"), "failure", "pam_socket", ("is missing",)
    ),
    "PAM socket open to all": Case(
        lambda lab: mode(lab.second, "/run/adoptd/pam.sock", 0o666), "failure", "pam_socket", ("mode 0666", "0600")
    ),
    "PAM socket a user's": Case(
        lambda lab: owned(lab.second, "/run/adoptd/pam.sock", ALICE.uid), "failure", "pam_socket", ("uid 60001",)
    ),
    "run directory closed": Case(
        lambda lab: mode(lab.second, "/run/adoptd", 0o700), "warning", "run_directory", ("users cannot reach",)
    ),
    "run directory open": Case(
        lambda lab: mode(lab.second, "/run/adoptd", 0o777), "failure", "run_directory", ("mode 0777",)
    ),
    "configuration changed since": Case(
        lambda lab: file_with(lab.second, "/etc/adoptd/conf.d/50-new.toml", lambda _: "[seal]\nttl_s = 20\n"),
        "warning",
        "agent",
        ("seal.ttl_s", "systemctl reload"),
    ),
    "port changed since": Case(
        lambda lab: file_with(lab.second, "/etc/adoptd/conf.d/50-new.toml", lambda _: "[callerid]\nport = 6831\n"),
        "warning",
        "agent",
        ("callerid.port", "systemctl restart"),
    ),
    "configuration not TOML": Case(
        lambda lab: file_with(lab.second, TOML, lambda text: text + "\n[jobs\n"),
        "failure",
        "configuration",
        ("not TOML",),
    ),
    "configuration gone": Case(
        lambda lab: moved_away(lab.second, TOML), "failure", "configuration", ("cannot be read",)
    ),
    "configuration open": Case(
        lambda lab: mode(lab.second, TOML, 0o666), "failure", "configuration", ("mode 0666", "chmod")
    ),
    "drop-in of another name": Case(
        lambda lab: file_with(lab.second, "/etc/adoptd/conf.d/site.conf", lambda _: "[seal]\nttl_s = 20\n"),
        "warning",
        "configuration",
        ("site.conf", "*.toml"),
    ),
    # PAM
    "no lines": Case(
        pam(lambda stack: "\n".join(line for line in stack.split("\n") if "adopt" not in line) + "\n"),
        "warning",
        "pam",
        ("no account line",),
    ),
    "stack gone": Case(lambda lab: moved_away(lab.second, "/etc/pam.d/sshd"), "failure", "pam", ("is missing",)),
    "include of nothing": Case(
        pam(lambda stack: stack + "@include common-nothing\n"), "failure", "pam", ("common-nothing", "No such file")
    ),
    "a control with a slip": Case(
        pam(before_account("account requird pam_nologin.so")), "failure", "pam", ("'requird'", "no control")
    ),
    "pam_permit sufficient above": Case(
        pam(before_account("account sufficient pam_permit.so")), "failure", "pam", ("never asked", "pam_permit.so")
    ),
    "a jump over us": Case(
        pam(lambda stack: stack.replace("account required pam_unix.so", "account [success=1 default=bad] pam_unix.so")),
        "failure",
        "pam",
        ("never asked", "pam_unix.so"),
    ),
    "module not there": Case(
        pam(lambda stack: stack.replace("pam_adopt.so", "lost/pam_adopt.so")),
        "failure",
        "module",
        ("which is not there",),
    ),
    "module cut short": Case(
        pam(lambda stack: re.sub(r"\S+/pam_adopt\.so", CUT_SHORT, stack)),
        "failure",
        "module",
        (CUT_SHORT, "cannot be loaded"),
    ),
    "nologin left behind": Case(
        lambda lab: file_with(lab.second, "/etc/nologin", lambda _: "back at 8\n"), "warning", "pam", ("/etc/nologin",)
    ),
    "another service's line": Case(
        lambda lab: file_with(lab.second, "/etc/pam.d/cockpit", lambda _: "account required pam_adopt.so\n"),
        "warning",
        "pam",
        ("cockpit", "service=cockpit"),
    ),
    # sshd
    "UsePAM no": Case(
        sshd(lambda text: text.replace("UsePAM yes", "UsePAM no")), "failure", "sshd", ("UsePAM is no", "never asks")
    ),
    "sshd_config with a slip": Case(
        sshd(lambda text: text + "PermitRotLogin no\n"), "warning", "sshd", ("bad configuration",)
    ),
    # The seal
    "munged hangs": Case(lambda lab: stopped(lab.second, "munged"), "failure", "seal", ("munged hangs",)),
    "munge's socket gone": Case(
        lambda lab: moved_away(lab.second, "/run/munge/munge.socket.2"), "failure", "seal", ("restart munge",)
    ),
    "munge key readable": Case(
        lambda lab: mode(lab.second, "/etc/munge/munge.key", 0o444), "failure", "key", ("munge.key", "mode 0444")
    ),
    "own key readable": Case(
        lambda lab: mode(lab.second, "/etc/adoptd/adoptd.key", 0o644), "failure", "key", ("adoptd.key", "mode 0644")
    ),
    "another key": Case(
        lambda lab: other_munge_key(lab.second),
        "failure",
        "peer",
        ("closed without an answer", "key"),
        ("--peer", "node1"),
    ),
    # The network
    "a user has our port": Case(
        lambda lab: port_of_alices(lab.second, 6830), "failure", "port", ("uid 60001", "6830", "adoptd-callerid.socket")
    ),
    "a user has the exporter's port": Case(
        lambda lab: port_of_alices(lab.second, 9830), "failure", "port", ("uid 60001", "9830")
    ),
    "loopback down": Case(
        lambda lab: link_down(lab.second, "lo"), "failure", "port", ("loopback", "ip link set lo up")
    ),
    "peer has no agent": Case(
        lambda lab: ended(lab.first, "agent"), "failure", "peer", ("connection refused",), ("--peer", "node1")
    ),
    "peer hangs": Case(
        lambda lab: stopped(lab.first, "agent"), "failure", "peer", ("takes connections", "hangs"), ("--peer", "node1")
    ),
    "peer's munged hangs": Case(
        lambda lab: stopped(lab.first, "munged"),
        "failure",
        "peer",
        ("takes connections", "munged"),
        ("--peer", "node1"),
    ),
    "peer drops packets": Case(
        lambda lab: lab.packets_dropped(lab.first), "failure", "peer", ("packets vanish", "drops"), ("--peer", "node1")
    ),
    "peer unplugged": Case(
        lambda lab: link_down(lab.second, "eth0"), "failure", "peer", ("node1",), ("--peer", "node1")
    ),
    "peer unknown": Case(
        lambda lab: contextlib.nullcontext(), "failure", "peer", ("node77", "no host"), ("--peer", "node77")
    ),
    "peer of another version": Case(
        lambda lab: of_version(lab.first, "9.9.9"), "warning", "peer", ("version 9.9.9",), ("--peer", "node1")
    ),
    "peer is ourselves": Case(
        lambda lab: file_with(lab.second, "/etc/hosts", lambda text: "127.0.1.1 node1\n"),
        "warning",
        "peer",
        ("127.0.1.1", "this node itself"),
        ("--peer", "node1"),
    ),
    # A name service that never answers: packets to it vanish with the link that they would go by.
    "name service hangs": Case(
        lambda lab: silent_resolver(lab.second), "failure", "peer", ("name service",), ("--peer", "far.example")
    ),
    # The kernel
    "BCC removed": Case(
        lambda lab: hidden(lab.second, "/usr/lib/python3/dist-packages/bcc"), "warning", "bcc", ("not installed", "apt")
    ),
    "libmunge removed": Case(
        lambda lab: hidden(lab.second, os.path.realpath("/usr/lib/x86_64-linux-gnu/libmunge.so.2")),
        "failure",
        "seal",
        ("libmunge.so.2 cannot be loaded", "apt install"),
    ),
    "stack a directory": Case(
        lambda lab: directory_for(lab.second, "/etc/pam.d/sshd"), "failure", "pam", ("Is a directory",)
    ),
    "conf.d a file": Case(
        lambda lab: file_for_directory(lab.second, "/etc/adoptd/conf.d"),
        "failure",
        "configuration",
        ("Not a directory",),
    ),
    "line ends of DOS": Case(
        pam(lambda stack: stack.replace("\n", "\r\n")), "failure", "pam", ("line ends of DOS", "sed -i")
    ),
    "TLS without its files": Case(
        lambda lab: file_with(
            lab.second,
            "/etc/adoptd/conf.d/tls.toml",
            lambda _: "[metrics]\ntls_certificate = '/none.crt'\ntls_key = '/none.key'\n",
        ),
        "failure",
        "metrics",
        ("/none.crt is missing",),
    ),
    "an empty key": Case(
        lambda lab: empty_key(lab.second), "failure", "seal", ("adoptd.key is 0 bytes long", "install -m 0600")
    ),
    "bpffs gone": Case(lambda lab: pins_gone(lab.second), "warning", "kernel", ("not on bpffs",)),
}


def test_a_node_that_is_well(patient: Lab) -> None:
    """Nothing is wrong; a job is adopted into for real, its probe loads a second time, and nothing of that is left."""
    with patient.jobs(1) as (job,):
        said = examined(patient.second, *PATIENT, "--deep", "--peer", "node1", "--peer", "node1-6")
        inside = patient.second.group.child("jobs")
        assert not any(file.read_text() for place in inside.directories() for file in place.rglob("cgroup.procs"))
    assert bad(said) == []
    words = " ".join(each.seen for each in said)
    assert f"adopted into job {job}, read back there, and ended" in words
    assert "another loads here, too" in words
    assert "node1 (10.66.0.1) port 6830 answered" in words
    assert "node1-6 (fd00:66::1) port 6830 answered" in words
    assert "adoptd-doctor" not in patient.second.run(["ls", "/sys/fs/bpf"])


@pytest.mark.parametrize("name", CASES)
def test_the_cause_is_named(patient: Lab, name: str) -> None:
    """Of the check, the grade and the words; and the node is well again once it is put right."""
    case = CASES[name]
    # Not in the table of cases: it is there all the time, and only that one names it.
    patient.second.write(CUT_SHORT, "\x7fELF", mode=0o644)
    with case.how(patient):
        started_s = time.monotonic()
        said = examined(patient.second, *(() if "hangs" in name else PATIENT), *case.options)
        took_s = time.monotonic() - started_s
    found = [each for each in said if (each.grade, each.check) == (case.grade, case.check)]
    assert any(all(word in f"{each.seen} {each.remedy}" for word in case.words) for each in found), bad(said)
    print(f"{name}: {took_s:.1f} s: {[each[:3] for each in bad(said)]}")


def test_the_versions_of_the_nodes_that_were_asked(patient: Lab) -> None:
    """Told by the agent, from the answers to its logins' questions."""
    with patient.jobs(2) as (older, _), of_version(patient.first, "9.9.9"):
        assert patient.login(job=older).landed == f"job {older} on node2"
        said = [each for each in examined(patient.second, *PATIENT) if each.check == "peers"]
        assert [(each.grade, "9.9.9 on 1 (10.66.0.1)" in each.seen) for each in said] == [("warning", True)], said
    with patient.jobs(2) as (older, _):
        assert patient.login(job=older).landed == f"job {older} on node2"
        said = [each for each in examined(patient.second, *PATIENT) if each.check == "peers"]
        assert [(each.grade, "within the hour (1)" in each.seen) for each in said] == [("ok", True)], said


def test_everything_hangs_at_once(patient: Lab) -> None:
    """The agent, munged, the name service and a peer: each is named, and it ends all the same."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(silent_resolver(patient.second))
        for daemon in ("agent", "munged"):
            stack.enter_context(stopped(patient.second, daemon))
        stack.enter_context(stopped(patient.first, "agent"))
        said = examined(patient.second, "--deep", "--peer", "far.example", "--peer", "node1")
    failed = {each.check for each in said if each.grade == "failure"}
    assert {"agent", "seal", "answer", "peer"} <= failed
    assert not any("the check itself failed" in each.seen for each in said)


def test_it_is_well_again(patient: Lab) -> None:
    """After all of that: what was found had its cause in what was broken."""
    assert bad(examined(patient.second, *PATIENT, "--peer", "node1")) == []
