"""Whose connection it is that reaches sshd, by the ways OpenSSH has of making one: real ssh, real sshd, on loopback.

The client is an ordinary user in a cgroup of its own, sshd is in another. What each case means for that user is
in docs/owners.md.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Mapping, Optional, Tuple

import pytest

from adoptd.connections.bpf import BpfWitness
from adoptd.connections.diag import DiagWitness
from adoptd.deadline import Deadline
from adoptd.model import Connection, Endpoint, Owner
from adoptd.probe.pins import OpenProbe
from kernel.actors import become
from kernel.sockets import cgroup2_mount, remove_cgroup
from lab.waiting import until
from ports import free_port

# ssh refuses users without an account; this one every distribution has.
NOBODY = 65534
# The second stands for a host behind the first.
HOST, BEHIND = "127.0.0.1", "127.0.0.2"
# What a session runs: it says over which connection it came, and stays.
_TELL = "echo $SSH_CONNECTION; cat"
# Its directory in /run is the distribution's unit's to make, so it gets a /run of its own.
_SSHD = 'mount -t tmpfs none /run && mkdir -m 755 /run/sshd && exec /usr/sbin/sshd -D -f "$0" -E "$1"'
_FORWARD = "exec 3<>/dev/tcp/%h/%p; cat <&3 & cat >&3; kill $!"
_PASS = (
    "import socket, sys; made = socket.create_connection((sys.argv[1], int(sys.argv[2])));"
    "socket.send_fds(socket.socket(fileno=1), [b'x'], [made.fileno()])"
)


@dataclass
class Ssh:
    """A server, two cgroups for clients, and what is asked about their connections."""

    directory: Path
    port: int
    cgroups: Mapping[str, Path]
    witnesses: Tuple[BpfWitness, DiagWitness]
    started: List[subprocess.Popen[str]]

    def start(self, cgroup: str, *arguments: str) -> subprocess.Popen[str]:
        """An ssh client of NOBODY's in that cgroup."""
        procs = self.cgroups[cgroup] / "cgroup.procs"

        def be_the_user() -> None:
            procs.write_text(str(os.getpid()))
            become(NOBODY)

        process = subprocess.Popen(
            ["ssh", "-F", str(self.directory / "ssh_config"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            start_new_session=True,
            preexec_fn=be_the_user,
        )
        self.started.append(process)
        return process

    def session(self, cgroup: str, *arguments: str, host: str = HOST) -> Tuple[subprocess.Popen[str], Connection]:
        """A session of such a client, and the connection that sshd says it came over."""
        process = self.start(cgroup, *arguments, f"root@{host}", _TELL)
        assert process.stdout is not None
        words = process.stdout.readline().split()
        assert len(words) == 4, f"ssh {shlex.join(arguments)} brought no session"
        return process, Connection(Endpoint.parse(f"{words[0]}:{words[1]}"), Endpoint.parse(f"{words[2]}:{words[3]}"))

    def owner(self, asked: Connection) -> Owner:
        """Whom the witnesses name: both the same user and cgroup, and bpf the process."""
        bpf, diag = (each.owner_of(asked, Deadline.after_ms(5000)) for each in self.witnesses)
        assert bpf is not None
        assert diag is not None
        assert (bpf.uid, bpf.cgroup_id) == (diag.uid, diag.cgroup_id)
        return bpf

    def place(self, owner: Owner) -> Optional[str]:
        """The name of the cgroup that the owner connected from."""
        names = {path.stat().st_ino: name for name, path in self.cgroups.items()}
        return names.get(owner.cgroup_id or 0)


@pytest.fixture
def ssh(opened: OpenProbe) -> Iterator[Ssh]:
    with contextlib.ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix=f"adoptd-test-ssh-{os.getpid()}-"))
        stack.callback(shutil.rmtree, directory)
        directory.chmod(0o755)
        names = ("server", "first", "second")
        cgroups = {name: cgroup2_mount() / f"adoptd-test-ssh-{os.getpid()}-{name}" for name in names}
        for path in cgroups.values():
            path.mkdir()
            stack.callback(remove_cgroup, path)
        diag = DiagWitness()
        stack.callback(diag.close)
        port = free_port()
        started: List[subprocess.Popen[str]] = []
        stack.callback(_end, started, cgroups)
        started.append(_serve(directory, port, cgroups["server"]))
        yield Ssh(directory, port, cgroups, (BpfWitness(opened), diag), started)


def _serve(directory: Path, port: int, cgroup: Path) -> subprocess.Popen[str]:
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)], check=True)
    shutil.chown(directory / "user", NOBODY)
    mine = directory / "client"
    mine.mkdir()
    shutil.chown(mine, NOBODY)
    (directory / "ssh_config").write_text(
        f"Port {port}\nIdentityFile {directory}/user\nIdentitiesOnly yes\nBatchMode yes\nLogLevel ERROR\n"
        "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nGlobalKnownHostsFile /dev/null\nConnectTimeout 20\n"
    )
    (directory / "sshd_config").write_text(
        f"Port {port}\nListenAddress {HOST}\nListenAddress {BEHIND}\nHostKey {directory}/host\nPidFile none\n"
        f"AuthorizedKeysFile {directory}/user.pub\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nMaxStartups 100\n"
        "PermitUserEnvironment no\nPrintMotd no\n"
    )

    def enter() -> None:
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    log = directory / "sshd.log"
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", _SSHD, str(directory / "sshd_config"), str(log)],
        text=True,
        start_new_session=True,
        preexec_fn=enter,
    )

    def listens() -> bool:
        assert process.poll() is None, log.read_text()
        with socket.socket() as tried:
            return tried.connect_ex((HOST, port)) == 0

    until(listens, "sshd listens")
    return process


def _end(started: List[subprocess.Popen[str]], cgroups: Mapping[str, Path]) -> None:
    # All that was started is in these cgroups, whatever it has forked or become since.
    def ended() -> bool:
        pids = [int(pid) for path in cgroups.values() for pid in (path / "cgroup.procs").read_text().split()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    until(ended, "ssh and sshd have ended")
    for process in started:
        process.communicate()


def _comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_ssh_itself(ssh: Ssh) -> None:
    """The client connects: its process, its user, its cgroup."""
    process, asked = ssh.session("first")
    owner = ssh.owner(asked)
    assert (owner.pid, owner.uid, owner.comm, ssh.place(owner)) == (process.pid, NOBODY, "ssh", "first")


def test_a_control_master_owns_what_goes_through_it(ssh: Ssh) -> None:
    """A session asked for from another cgroup comes over the master's connection: the master's cgroup counts."""
    control = f"{ssh.directory}/client/control"
    master, asked = ssh.session("first", "-M", "-S", control)
    _, shared = ssh.session("second", "-S", control)
    assert shared == asked
    owner = ssh.owner(shared)
    assert (owner.pid, owner.uid, ssh.place(owner)) == (master.pid, NOBODY, "first")


def test_a_control_master_in_the_background(ssh: Ssh) -> None:
    """ControlPersist forks after it has connected: the process that connected has ended, its cgroup still counts."""
    control = f"{ssh.directory}/client/control"
    first = ssh.start("first", "-f", "-N", "-M", "-S", control, f"root@{HOST}")
    assert first.wait(60) == 0
    _, asked = ssh.session("second", "-S", control)
    owner = ssh.owner(asked)
    assert (owner.pid, owner.uid, ssh.place(owner)) == (first.pid, NOBODY, "first")
    assert not Path(f"/proc/{first.pid}").exists()


def test_a_proxy_command_is_the_owner(ssh: Ssh) -> None:
    """What ssh starts to connect for it is another process, in the same cgroup."""
    process, asked = ssh.session("first", "-o", f"ProxyCommand=bash -c {shlex.quote(_FORWARD)}")
    owner = ssh.owner(asked)
    assert owner.pid != process.pid
    assert (owner.uid, owner.comm, ssh.place(owner)) == (NOBODY, "bash", "first")


def test_a_proxy_command_that_passes_the_connection_on(ssh: Ssh) -> None:
    """ProxyUseFdpass: who connected has ended, and ssh holds the connection; cgroup and user are the same."""
    # Everybody's Python: the tests' own may be where only root can go.
    command = f"/usr/bin/python3 -c {shlex.quote(_PASS)} %h %p"
    process, asked = ssh.session("first", "-o", "ProxyUseFdpass=yes", "-o", f"ProxyCommand={command}")
    owner = ssh.owner(asked)
    assert owner.pid is not None
    assert owner.pid != process.pid
    assert (owner.uid, ssh.place(owner)) == (NOBODY, "first")


@pytest.mark.parametrize(
    "way",
    [["-J", f"root@{HOST}"], ["-o", "ProxyCommand=ssh -F {config} -W %h:%p root@" + HOST]],
    ids=["ProxyJump", "ssh -W"],
)
def test_behind_a_jump_host_its_sshd_is_the_owner(ssh: Ssh, way: List[str]) -> None:
    """The second host sees a connection of the jump host's sshd: the account there, in the cgroup of that session."""
    arguments = [word.replace("{config}", str(ssh.directory / "ssh_config")) for word in way]
    _, asked = ssh.session("first", *arguments, host=BEHIND)
    assert str(asked.destination.address) == BEHIND
    owner = ssh.owner(asked)
    assert owner.pid is not None
    assert (owner.uid, _comm(owner.pid), ssh.place(owner)) == (0, "sshd", "server")


def test_the_way_to_a_jump_host_is_the_users_own(ssh: Ssh) -> None:
    """The first of the two connections is that of the ssh -W which ssh has started."""
    process, asked = ssh.session("first", "-J", f"root@{HOST}", host=BEHIND)
    jump = _connection_to(ssh.port, exclude=asked)
    owner = ssh.owner(jump)
    assert owner.pid != process.pid
    assert (owner.uid, owner.comm, ssh.place(owner)) == (NOBODY, "ssh", "first")


def _connection_to(port: int, exclude: Connection) -> Connection:
    """The one other established connection to HOST at ``port``."""
    shown = subprocess.run(
        ["ss", "-Htn", "state", "established", "dst", f"{HOST}:{port}"], check=True, capture_output=True, text=True
    ).stdout
    ends = [line.split()[2:4] for line in shown.splitlines()]
    found = [Connection(Endpoint.parse(source), Endpoint.parse(destination)) for source, destination in ends]
    (only,) = (each for each in found if each != exclude)
    return only
