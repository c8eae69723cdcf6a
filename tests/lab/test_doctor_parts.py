"""What the doctor says of the parts around the agent that are broken on purpose: sshd, PAM's files, the sockets, what
the agent may, and what hangs. Each is well before, and well again after.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from pathlib import Path
from typing import Callable, ContextManager, Dict, Iterator, Sequence

import pytest

from lab.etc_files import ALICE
from lab.lab import Lab
from lab.node import PYTHON, SSHD, Node
from lab.test_doctor import PATIENT, Case, bad, examined, file_with, hidden, mode, moved_away, owned, pam, sshd, stopped
from lab.waiting import until

pytestmark = pytest.mark.timeout(150)

SSHD_CONFIG = "/etc/ssh/sshd_config"
AS_EVER = (SSHD, "-D", "-f", SSHD_CONFIG)
CONF = "/etc/adoptd/conf.d/50-new.toml"
# A module of the test's own to break, beside the clone's.
MODULE = "/run/broken/pam_adopt.so"


# ---- how a node is broken: each is undone on leaving


@contextlib.contextmanager
def pipe_for(node: Node, name: str) -> Iterator[None]:
    """In a file's place a pipe that nobody writes to: it hangs as a file on a dead server does."""
    path = node.path(name)
    with moved_away(node, name) if path.exists() else contextlib.nullcontext():
        os.mkfifo(path)
        try:
            yield
        finally:
            path.unlink()


@contextlib.contextmanager
def both(*parts: ContextManager[None]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(part)
        yield


@contextlib.contextmanager
def sshd_as(node: Node, *command: str) -> Iterator[None]:
    """Another sshd in place of the node's."""
    node.stop("sshd")
    try:
        node.start_daemon("sshd", command)
        node.wait_sshd()
        yield
    finally:
        node.stop("sshd")
        node.start_daemon("sshd", AS_EVER)
        node.wait_sshd()


@contextlib.contextmanager
def sshd_before_a_change(node: Node) -> Iterator[None]:
    """sshd runs, and goes by what its file said before."""
    with file_with(node, SSHD_CONFIG, lambda text: text.replace("PidFile none", "PidFile /run/sshd.pid")):
        with sshd_as(node, *AS_EVER):
            until(node.path("/run/sshd.pid").exists, "its pid file")
            # Longer ago than a clock of files can tell apart.
            os.utime(node.path("/run/sshd.pid"), (1e9, 1e9))
            yield
        node.path("/run/sshd.pid").unlink(missing_ok=True)


@contextlib.contextmanager
def renamed_sshd(node: Node) -> Iterator[None]:
    """A copy under another name, whose PAM service is that name."""
    copy = node.path("/run/hpc-sshd")
    copy.write_bytes(node.path(SSHD).read_bytes())
    copy.chmod(0o755)
    with sshd_as(node, "/run/hpc-sshd", "-D", "-f", SSHD_CONFIG):
        yield
    copy.unlink()


@contextlib.contextmanager
def socket_of_another(node: Node, *, listening: bool) -> Iterator[None]:
    """At the PAM socket's place one of root's with its mode, on which somebody else listens, or nobody."""
    path = "/run/adoptd/pam.sock"
    code = f"import os,socket,time; os.umask(0o177); s=socket.socket(socket.AF_UNIX); s.bind({path!r}); "
    code += f"{'s.listen(); ' if listening else ''}print(flush=True); time.sleep(600)"
    with moved_away(node, path), node.popen([PYTHON, "-c", code]) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            yield
        finally:
            other.kill()
            node.path(path).unlink()


@contextlib.contextmanager
def full_directory(node: Node) -> Iterator[None]:
    """The agent's own directory on a file system that has no room left; the sockets are there all the same."""
    path = node.path("/run/adoptd")
    names = sorted(each.name for each in path.iterdir())
    node.run(["mount", "--bind", "/run/adoptd", "/mnt"])
    node.run(["mount", "-t", "tmpfs", "-o", "size=4k,mode=0755", "none", "/run/adoptd"])
    try:
        for name in names:
            node.run(["ln", "-s", f"/mnt/{name}", f"/run/adoptd/{name}"])
        node.run(["sh", "-c", "head -c 65536 /dev/zero > /run/adoptd/filler || :"])
        yield
    finally:
        node.run(["umount", "/run/adoptd"])
        node.run(["umount", "/mnt"])


@contextlib.contextmanager
def agent_under(node: Node, *prefix: str) -> Iterator[None]:
    """The agent started by another program, as a drop-in of its unit would have it."""
    whole = Node.start_daemon

    def started(name: str, argv: Sequence[str], **more: object) -> subprocess.Popen[bytes]:
        return whole(node, name, [*prefix, *argv], **more)  # type: ignore[arg-type]

    node.stop("agent")
    node.start_daemon = started  # type: ignore[method-assign]
    try:
        node.start_agent()
    finally:
        del node.start_daemon
    try:
        yield
    finally:
        node.stop("agent")
        node.start_agent()


@contextlib.contextmanager
def packets_on_loopback_dropped(node: Node) -> Iterator[None]:
    """As a firewall does that lets in eth0 alone; by routing rules, which need no netfilter."""
    node.run(["ip", "rule", "add", "pref", "100", "lookup", "local"])
    node.run(["ip", "rule", "add", "pref", "10", "iif", "lo", "to", "127.0.0.0/8", "blackhole"])
    node.run(["ip", "rule", "del", "pref", "0"])
    try:
        yield
    finally:
        node.run(["ip", "rule", "add", "pref", "0", "lookup", "local"])
        node.run(["ip", "rule", "del", "pref", "10"])
        node.run(["ip", "rule", "del", "pref", "100"])


@contextlib.contextmanager
def module_that_is(node: Node, change: Callable[[Path], None]) -> Iterator[None]:
    """The stack loads a copy of the module, broken."""
    path = node.path(MODULE)
    path.parent.mkdir()
    ours = next(
        word for word in node.path("/etc/pam.d/sshd").read_text(encoding="utf-8").split() if word.endswith("adopt.so")
    )
    path.write_bytes(node.path(ours).read_bytes())
    path.chmod(0o644)
    change(path)
    try:
        with file_with(node, "/etc/pam.d/sshd", lambda text: text.replace(ours, MODULE)):
            yield
    finally:
        path.unlink()
        path.parent.rmdir()


def another_module(path: Path) -> None:
    path.write_bytes(Path("/lib/x86_64-linux-gnu/security/pam_permit.so").read_bytes())


def every(line: str, more: str) -> Callable[[str], str]:
    """``more`` behind each line that ends in ``line``."""
    return lambda text: text.replace(f"{line}\n", f"{line}{more}\n")


CASES: Dict[str, Case] = {
    # sshd
    "UsePAM no in an included file": Case(
        lambda lab: both(
            file_with(lab.second, "/etc/ssh/sshd_config.d/10-site.conf", lambda _: "UsePAM no\n"),
            file_with(lab.second, SSHD_CONFIG, lambda text: "Include /etc/ssh/sshd_config.d/10-*.conf\n" + text),
        ),
        "failure",
        "sshd",
        ("10-site.conf:1", "UsePAM is no"),
    ),
    "UsePAM no on the command line": Case(
        lambda lab: sshd_as(lab.second, *AS_EVER, "-o", "UsePAM=no"),
        "failure",
        "sshd",
        ("-o UsePAM=no", "command line"),
    ),
    "sshd's program replaced": Case(
        lambda lab: renamed_sshd(lab.second), "warning", "sshd", ("hpc-sshd", "--service hpc-sshd")
    ),
    "changed since sshd read it": Case(
        lambda lab: sshd_before_a_change(lab.second), "warning", "sshd", (SSHD_CONFIG, "reload ssh")
    ),
    "sshd stopped": Case(lambda lab: stopped(lab.second, "sshd"), "failure", "sshd", ("is stopped", "kill -CONT")),
    "sshd's empty directory gone": Case(
        lambda lab: moved_away(lab.second, "/run/sshd"), "failure", "sshd", ("turned away", "mkdir")
    ),
    "a pipe that sshd is to include": Case(
        lambda lab: both(
            pipe_for(lab.second, "/etc/ssh/pipe.conf"),
            file_with(lab.second, SSHD_CONFIG, lambda text: "Include /etc/ssh/pipe.conf\n" + text),
        ),
        "warning",
        "sshd",
        ("/etc/ssh/pipe.conf", "no regular file"),
        ("--timeout", "4"),
    ),
    "no host key": Case(
        sshd(lambda text: text.replace("demo_host_key", "lost_host_key")), "warning", "sshd", ("ssh-keygen -A",)
    ),
    # PAM
    "service without a file": Case(
        lambda lab: moved_away(lab.second, "/etc/pam.d/sshd"), "failure", "pam", ("is missing", "other")
    ),
    "pam_deny below": Case(
        pam(lambda text: text + "account required pam_deny.so\n"), "failure", "pam", ("pam_deny.so", "everybody")
    ),
    "nobody refused": Case(
        pam(every("pam_adopt.so", " action_no_jobs=ignore")), "warning", "pam", ("users without a job come in",)
    ),
    "options that contradict": Case(
        pam(every("pam_adopt.so", " action_unknown=deny action_unknown=newest")),
        "warning",
        "pam",
        ("more than once", "action_unknown=newest counts"),
    ),
    "blanks around the =": Case(
        pam(every("pam_adopt.so", " action_unknown = deny")), "failure", "pam", ("no blanks around the =",)
    ),
    "a line too long": Case(
        pam(every("pam_adopt.so", " timeout_ms=900" * 80)), "failure", "pam", ("longer than 1023",)
    ),
    "a pipe for a stack": Case(
        lambda lab: pipe_for(lab.second, "/etc/pam.d/sshd"), "failure", "pam", ("/etc/pam.d/sshd",), ("--timeout", "4")
    ),
    "another module of the name": Case(
        lambda lab: module_that_is(lab.second, another_module), "failure", "module", (MODULE, "some other module")
    ),
    "a directory for all above the module": Case(
        lambda lab: module_that_is(lab.second, lambda path: path.parent.chmod(0o777)),
        "failure",
        "module",
        ("/run/broken has mode 0777",),
    ),
    # The sockets and what is beside them
    "a socket that was left": Case(
        lambda lab: socket_of_another(lab.second, listening=False), "failure", "pam_socket", ("nobody listens there",)
    ),
    "a socket of another's": Case(
        lambda lab: socket_of_another(lab.second, listening=True),
        "failure",
        "pam_socket",
        ("python3", "and not the agent"),
    ),
    "sessions a user's": Case(
        lambda lab: owned(lab.second, "/run/adoptd/sessions", 60001),
        "warning",
        "run_directory",
        ("sessions is owned by uid 60001", "after a restart"),
    ),
    "sessions gone": Case(
        lambda lab: moved_away(lab.second, "/run/adoptd/sessions"), "warning", "run_directory", ("sessions is missing",)
    ),
    "no room": Case(lambda lab: full_directory(lab.second), "failure", "run_directory", ("is full", "df")),
    # The configuration
    "a byte order mark": Case(
        lambda lab: file_with(lab.second, CONF, lambda _: "\ufeff[seal]\n"),
        "failure",
        "configuration",
        ("byte order mark", "sed -i"),
    ),
    "a drop-in that hangs": Case(
        lambda lab: both(file_with(lab.second, CONF, lambda _: ""), pipe_for(lab.second, CONF)),
        "failure",
        "configuration",
        (CONF, "does not answer"),
        ("--timeout", "4"),
    ),
    # What the agent may
    "an agent without a capability": Case(
        lambda lab: agent_under(lab.second, "/usr/bin/setpriv", "--bounding-set=-sys_ptrace"),
        "warning",
        "rights",
        ("CAP_SYS_PTRACE", "systemctl cat adoptd"),
    ),
    "an agent that may not write": Case(
        lambda lab: agent_under(
            lab.second, "/usr/bin/unshare", "-m", "sh", "-c", 'mount -o remount,bind,ro /sys/fs/bpf; exec "$@"', "sh"
        ),
        "failure",
        "rights",
        ("cannot write below /sys/fs/bpf", "ReadWritePaths="),
    ),
    "an agent that sees other files": Case(
        lambda lab: agent_under(
            lab.second, "/usr/bin/unshare", "-m", "sh", "-c", 'mount -t bpf bpf /sys/fs/bpf; exec "$@"', "sh"
        ),
        "failure",
        "rights",
        ("does not see /sys/fs/bpf",),
    ),
    # The network and the kernel
    "BCC's library gone": Case(
        lambda lab: hidden(lab.second, os.path.realpath("/usr/lib/x86_64-linux-gnu/libbcc.so.0")),
        "warning",
        "bcc",
        ("libbcc", "--reinstall"),
    ),
    "packets on the loopback vanish": Case(
        lambda lab: packets_on_loopback_dropped(lab.second), "failure", "kernel", ("127.0.0.1", "nft list ruleset")
    ),
}


def test_a_node_that_is_well(patient: Lab) -> None:
    """And its agent has all that it needs."""
    said = examined(patient.second, *PATIENT)
    assert bad(said) == []
    assert any(each.check == "rights" and each.grade == "ok" for each in said)


@pytest.mark.parametrize("name", CASES)
def test_the_cause_is_named(patient: Lab, name: str) -> None:
    """Of the check, the grade and the words."""
    case = CASES[name]
    with case.how(patient):
        said = examined(patient.second, *(case.options or PATIENT))
    found = [each for each in said if (each.grade, each.check) == (case.grade, case.check)]
    assert any(all(word in f"{each.seen} {each.remedy}" for word in case.words) for each in found), bad(said)
    assert not any("the check itself failed" in each.seen for each in said)


def test_a_trial_has_the_rights_of_the_agent(patient: Lab) -> None:
    """A probe that the agent could not keep is not called one that loads."""
    shut = ("/usr/bin/unshare", "-m", "sh", "-c", 'mount -o remount,bind,ro /sys/fs/bpf; exec "$@"', "sh")
    with agent_under(patient.second, *shut):
        said = examined(patient.second, *PATIENT, "--deep")
    assert any(each.check == "probe" and "Read-only file system" in each.seen for each in said), bad(said)
    said = examined(patient.second, *PATIENT, "--deep")
    assert any(each.check == "probe" and "another loads here, too" in each.seen for each in said), bad(said)


def test_who_is_not_root_is_not_told_wrong_things(patient: Lab) -> None:
    """What only root sees is not said to be missing."""
    command = [PYTHON, "-B", "-m", "adoptd", "doctor"]
    with patient.second.popen(
        command, user=ALICE, env={"PYTHONPATH": "/run/adoptd-src/agent", "COLUMNS": "200"}
    ) as process:
        out, err = process.communicate(timeout=60)
    assert (err, process.returncode) == (b"", 1)
    assert not [line for line in out.decode().splitlines() if line.startswith("failure")]
    with (
        mode(patient.second, "/etc/adoptd", 0o700),
        patient.second.popen(
            command, user=ALICE, env={"PYTHONPATH": "/run/adoptd-src/agent", "COLUMNS": "200"}
        ) as process,
    ):
        out, err = process.communicate(timeout=60)
    assert (err, process.returncode) == (b"", 1)
    assert b"only root can read it" in out


def test_it_is_well_again(patient: Lab) -> None:
    """After all of that: what was found had its cause in what was broken."""
    assert bad(examined(patient.second, *PATIENT)) == []
    assert stat.S_ISSOCK(patient.second.path("/run/adoptd/pam.sock").stat().st_mode)
