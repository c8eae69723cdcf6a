"""The cluster: nodes joined by a bridge that is in a network namespace of its own.

Owns the run's directory /run/adoptd-demo-<id> and its cgroups, and takes both away again. The host's
network, /etc and mounts stay as they were. Everything is named by the run, so any number of clusters
can be up at once. Called by the demo and by the tests.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import List, Optional, Tuple

from lab import etc_files, kernel
from lab.cgroups import V2, Group
from lab.etc_files import PEOPLE, ROOT, User
from lab.node import PYTHON, Node
from lab.node_runner import SOURCE_IN_NODE, NodeSpec
from lab.runs import cpu_group_of_run, group_of_run, new_run_id, remove_nodes, run_directory, write_state
from lab.slurm_daemons import SlurmDaemons
from lab.started import Started

SOURCE_DIR = Path(__file__).resolve().parents[2]
PAM_MODULE = f"{SOURCE_IN_NODE}/pam_hook/build/pam_adopt.so"
NODES_MAX = 50
# The node of Slurm's controller, whose address is beyond those of the others.
LOGIN = "login"
LOGIN_NUMBER = 200
# As much as that many processes outside: about what its own would have without the group.
CPU_SHARES_OF_RUN = str(8 * 1024)


class Cluster(Started):
    """Use as a context manager; entering brings everything up, leaving takes everything down.

    ``hide_v1`` makes nodes that see cgroup v2 only. With ``slurm`` there is a login node besides, and jobs are Slurm's.
    """

    def __init__(
        self,
        nodes: int = 2,
        *,
        seal: str = "munge",
        hide_v1: bool = False,
        run_id: Optional[str] = None,
        pam_module: str = PAM_MODULE,
        slurm: bool = False,
    ) -> None:
        if slurm and hide_v1:
            raise ValueError("Slurm's jobs are in cgroup v1 here")
        if not 2 <= nodes <= NODES_MAX:
            raise ValueError(f"{nodes} nodes: 2 to {NODES_MAX} can be had")
        self.run_id = run_id or new_run_id()
        self.directory = run_directory(self.run_id)
        self.seal = seal
        self.hide_v1 = hide_v1
        self.pam_module = pam_module
        self.nodes: List[Node] = []  # the compute nodes
        self.login: Optional[Node] = None
        self.slurm: Optional[SlurmDaemons] = None
        self._with_slurm = slurm
        self._count = nodes
        self.group = group_of_run(self.run_id)
        if hide_v1:
            v2 = tuple(hierarchy for hierarchy in self.group.hierarchies if hierarchy.name == V2)
            self.group = Group(v2, self.group.path)
        self._switch: Optional[int] = None
        self._runners: List[subprocess.Popen[bytes]] = []

    def write_state(self, *, kept: bool = False) -> None:
        """Say who answers for this run, for `--down` and for whoever clears up after a crash."""
        write_state(self.run_id, {node.name: node.runner_pid for node in self.hosts}, kept=kept)

    @property
    def hosts(self) -> Tuple[Node, ...]:
        """The compute nodes, and the login node if there is one."""
        return (*self.nodes, *([self.login] if self.login is not None else []))

    def _start(self) -> None:
        self.directory.mkdir(mode=0o755)
        self.write_state()
        self.group.make()
        (self.directory / "home").mkdir()
        self._make_keys()
        self._switch = self._new_network_namespace()
        self._ip(self._switch, ["link add br0 type bridge forward_delay 0", "link set br0 up", "link set lo up"])
        names = {number: f"node{number}" for number in range(1, self._count + 1)}
        if self._with_slurm:
            names[LOGIN_NUMBER] = LOGIN
        runners = [(number, *self._start_runner(name)) for number, name in names.items()]
        for number, runner, spec in runners:
            group = self.group.child(spec.name)
            assert runner.stdout is not None
            if runner.stdout.readline() != b"ready\n":
                raise RuntimeError(f"{spec.name}: its namespaces could not be made (see above)")
            addresses = f"10.66.0.{number}", f"fd00:66::{number}"
            node = Node(spec.name, *addresses, runner.pid, group, Path(spec.node_dir))
            cpu = cpu_group_of_run(self.run_id)
            if self._with_slurm and cpu is not None:
                (cpu.make().directories()[0] / "cpu.shares").write_text(CPU_SHARES_OF_RUN, encoding="ascii")
                node.cpu_group = cpu.child(spec.name)
            if spec.name == LOGIN:
                self.login = node
            else:
                self.nodes.append(node)
        munge, munge_key = _account("munge"), secrets.token_hex(64)
        seal_key = secrets.token_hex(32)
        for (number, _, _), node in zip(runners, self.hosts):
            self._connect(node, number)
            self._fill_etc(node, munge, munge_key, seal_key)
            node.start_sshd()
            if self._with_munge:
                node.start_munged(munge)
        for node in self.hosts:
            if self._with_munge:
                node.wait_munged()
        if self.login is not None:
            self.slurm = SlurmDaemons(self.login, self.nodes, self.run_id)
            self.slurm.configure(_account("slurm"))
            self.slurm.start()
        if self.pam_module == PAM_MODULE:
            for node in self.hosts:
                node.begin_agent()
            for node in self.hosts:
                node.wait_agent()
        for node in self.hosts:
            node.wait_sshd()
        if self.slurm is not None:
            self.slurm.wait_up()
        self.write_state()

    @property
    def _with_munge(self) -> bool:
        return self._with_slurm or self.seal == "munge"

    # Namespaces and network

    def _start_runner(self, name: str) -> Tuple[subprocess.Popen[bytes], NodeSpec]:
        directory = self.directory / name
        (directory / "stage").mkdir(parents=True)
        spec = NodeSpec(
            name=name,
            run_dir=str(self.directory),
            node_dir=str(directory),
            home_dir=str(self.directory / "home"),
            source_dir=str(SOURCE_DIR),
            hide_v1=self.hide_v1,
            slurm=self._with_slurm,
        )
        group = self.group.child(name).child("system").make()
        procs_files = group.procs_files()

        def enter() -> None:
            for file in procs_files:
                Path(file).write_text("0", encoding="ascii")
            kernel.die_with_parent(signal.SIGKILL)

        runner = subprocess.Popen(
            [PYTHON, "-B", "-m", "lab.node_runner", json.dumps(asdict(spec))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": str(SOURCE_DIR / "tests"), "PATH": os.defpath + ":/usr/sbin:/sbin"},
            preexec_fn=enter,
            start_new_session=True,
        )
        self._runners.append(runner)
        return runner, spec

    @staticmethod
    def _new_network_namespace() -> int:
        """A network namespace that lives as long as the descriptor returned."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                kernel.unshare(kernel.CLONE_NEWNET)
                os.write(writer, b"1")
                signal.pause()
            finally:
                os._exit(1)
        os.close(writer)
        try:
            if os.read(reader, 1) != b"1":
                raise RuntimeError("a network namespace cannot be made: is this root, with CAP_SYS_ADMIN?")
            return os.open(f"/proc/{child}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(reader)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    @staticmethod
    def _ip(network: int, commands: List[str]) -> None:
        done = subprocess.run(
            ["ip", "-batch", "-"],
            input="\n".join(commands) + "\n",
            text=True,
            capture_output=True,
            check=False,
            preexec_fn=lambda: kernel.setns(network, kernel.CLONE_NEWNET),
        )
        if done.returncode != 0:
            raise RuntimeError(f"ip -batch: {done.stderr.strip()} (of: {'; '.join(commands)})")

    def _connect(self, node: Node, number: int) -> None:
        assert self._switch is not None
        self._ip(
            self._switch,
            [
                f"link add port{number} type veth peer name eth0 netns {node.runner_pid}",
                f"link set port{number} master br0 up",
            ],
        )
        inside = [
            "link set lo up",
            f"addr add {node.ipv4}/24 dev eth0",
            # Nobody else can have the address here, and duplicate detection takes a second.
            f"addr add {node.ipv6}/64 dev eth0 nodad",
            "link set eth0 up",
        ]
        node.run(["ip", "-batch", "-"], text="\n".join(inside) + "\n")

    # Files

    def _make_keys(self) -> None:
        keys = self.directory / "keys"
        keys.mkdir(mode=0o700)
        for name in ("host", *[user.name for user in (*PEOPLE, ROOT)]):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(keys / name)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        # One key with a passphrase: the client asks for it in the middle of a login. One round, for speed.
        shutil.copy(keys / "alice", keys / "locked")
        lock = ["ssh-keygen", "-q", "-p", "-a", "1", "-P", "", "-N", PEOPLE[0].password, "-f", str(keys / "locked")]
        subprocess.run(lock, check=True, stdin=subprocess.DEVNULL, capture_output=True)

    def _key(self, name: str) -> str:
        return (self.directory / "keys" / name).read_text(encoding="ascii")

    def _fill_etc(self, node: Node, munge: User, munge_key: str, seal_key: str) -> None:
        for name in ("nologin", "hosts.allow", "hosts.deny"):
            node.path(f"/etc/{name}").unlink(missing_ok=True)
        hashes = [(user, kernel.crypt_sha512(user.password, secrets.token_hex(8))) for user in PEOPLE]
        addresses = [(n.name, n.ipv4, n.ipv6) for n in self.hosts]
        node.write("/etc/hostname", f"{node.name}\n")
        node.write("/etc/hosts", etc_files.hosts(addresses))
        node.write("/etc/nsswitch.conf", etc_files.NSSWITCH)
        for name, made in (("passwd", etc_files.passwd), ("group", etc_files.group)):
            node.write(f"/etc/{name}", made(node.path(f"/etc/{name}").read_text(encoding="utf-8").splitlines()))
        node.write("/etc/shadow", etc_files.shadow(hashes), mode=0o600)
        node.write("/etc/ssh/demo_host_key", self._key("host"), mode=0o600)
        node.write("/etc/ssh/ssh_known_hosts", f"* {self._key('host.pub')}")
        version = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr
        penalties = _openssh_version(version) >= (9, 8)
        node.write("/etc/ssh/sshd_config", etc_files.SSHD_CONFIG + (etc_files.SSHD_NO_PENALTIES if penalties else ""))
        node.write("/etc/ssh/ssh_config", etc_files.SSH_CONFIG)
        node.write("/run/askpass", etc_files.ASKPASS, mode=0o755)
        for user in (*PEOPLE, ROOT):
            self._fill_home(node, user)
        node.write("/etc/munge/munge.key", munge_key, mode=0o400, owner=munge.uid)
        for directory in ("/etc/munge", "/run/munge", "/var/log/munge"):
            node.path(directory).mkdir(exist_ok=True)
            os.chown(node.path(directory), munge.uid, munge.gid)
        node.write("/etc/adoptd/adoptd.key", f"{seal_key}\n", mode=0o600)
        jobs = "" if self._with_slurm else f"{node.group.path}/jobs/uid_{{uid}}/job_{{job}}"
        node.write("/etc/adoptd/adoptd.toml", etc_files.agent_toml(jobs, self.seal))
        node.set_pam(self.pam_module, "")

    def _fill_home(self, node: Node, user: User) -> None:
        # In the order sshd will insist on: nobody but the owner may write to any of it.
        for directory in (user.home, f"{user.home}/.ssh"):
            node.path(directory).mkdir(exist_ok=True)
            node.path(directory).chmod(0o700)
            os.chown(node.path(directory), user.uid, user.gid)
        node.write(f"{user.home}/.ssh/id_ed25519", self._key(user.name), mode=0o600, owner=user.uid)
        node.write(f"{user.home}/.ssh/authorized_keys", self._key(f"{user.name}.pub"), mode=0o600, owner=user.uid)
        if user is PEOPLE[0]:
            node.write(f"{user.home}/.ssh/locked", self._key("locked"), mode=0o600, owner=user.uid)
            node.write(f"{user.home}/.ssh/locked.pub", self._key("alice.pub"), owner=user.uid)

    def close(self) -> None:
        """End and remove everything of the run. Can be called twice."""
        try:
            for node in self.hosts:
                node.close()
        finally:
            for runner in self._runners:
                runner.kill()
                with runner:
                    runner.wait()
            if self._switch is not None:
                os.close(self._switch)
            self.nodes, self.login, self._runners, self._switch = [], None, [], None
            remove_nodes(self.run_id)


def _account(name: str) -> User:
    """Whom a daemon runs as, from the accounts of this host. Raises RuntimeError if there is no such account."""
    for line in Path("/etc/passwd").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            uid, gid = line.split(":")[2:4]
            return User(name, int(uid), int(gid), "/", "")
    raise RuntimeError(f"there is no user {name}: is the package installed that makes it?")


def _openssh_version(text: str) -> Tuple[int, int]:
    """(9, 2) of ``OpenSSH_9.2p1 Debian-2...``. Raises ValueError."""
    major, _, rest = text.partition("_")[2].partition(".")
    return int(major), int("".join(c for c in rest[:2] if c.isdigit()))
