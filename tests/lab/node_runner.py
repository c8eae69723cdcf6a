"""The one process every node is held by: it makes the node's namespaces, then is its syslog.

Run as ``python -m lab.node_runner SPEC`` with a JSON object, prints ``ready`` and stays until it is
killed; network, mounts, host name and BPF pins of the node end with the last process in it. It must
never leave a mount visible outside (everything is made private first), nor write to the host's /etc.
Everything is imported before the mounts hide the clone (it may be under /home or /root).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import List

from lab import kernel

# Where every node sees the clone, wherever it is on the host, and read-only.
SOURCE_IN_NODE = "/run/adoptd-src"
# kernel/cookie.h, COOKIE_LOCAL_BATCH
NAMESPACE_NUMBERS_PER_CPU = 4096
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


@dataclass(frozen=True)
class NodeSpec:
    """What a node is made from. All paths are the host's and absolute."""

    name: str
    run_dir: str  # of the whole run; seen under the same path inside
    node_dir: str  # of this node, below run_dir: where its mounts are staged
    home_dir: str  # one for all nodes
    source_dir: str  # the clone
    hide_v1: bool  # take the v1 cgroup mounts away, so that the node looks like one of a pure v2 host
    slurm: bool = False  # with a /var/lib/slurm of its own


def _bind(source: str, target: str, *, recursive: bool = False) -> None:
    kernel.mount(source, target, flags=kernel.MS_BIND | (kernel.MS_REC if recursive else 0))


def _make_device_tree(stage: Path) -> None:
    """A /dev of the node's own, so that /dev/log is: device files are bound, which needs no right to make them."""
    stage.mkdir()
    for name in DEVICES:
        (stage / name).touch()
        _bind(f"/dev/{name}", str(stage / name))
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        (stage / name).symlink_to(f"/proc/self/fd{target}")
    (stage / "shm").mkdir(mode=0o1777)
    (stage / "shm").chmod(0o1777)
    (stage / "pts").mkdir()
    kernel.mount("devpts", str(stage / "pts"), "devpts", data="newinstance,ptmxmode=0666,mode=0620,gid=5")
    (stage / "ptmx").symlink_to("pts/ptmx")


def _make_run_tree(stage: Path, spec: NodeSpec) -> None:
    for name in ("sshd", "lock", "munge", "adoptd", "gates"):
        (stage / name).mkdir(parents=True)
    (stage / "gates").chmod(0o1777)
    source = stage / Path(SOURCE_IN_NODE).name
    source.mkdir()
    _bind(spec.source_dir, str(source))
    kernel.mount("none", str(source), flags=kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY)
    inside = stage / Path(spec.run_dir).name
    inside.mkdir()
    _bind(spec.run_dir, str(inside))


def _v1_mounts() -> List[str]:
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    return [line.split()[4] for line in lines if line.partition(" - ")[2].startswith("cgroup ")]


def _make_mounts(spec: NodeSpec) -> None:
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    stage = Path(spec.node_dir) / "stage"
    kernel.mount("adoptd-demo", str(stage), "tmpfs", data="mode=0755")
    for name in ("etc", "log", "root"):
        (stage / name).mkdir()
    # A copy and not an overlay: where / is an overlay itself (containers), another one over it may be refused.
    subprocess.run(["cp", "-a", "/etc/.", str(stage / "etc")], check=True)
    _make_device_tree(stage / "dev")
    # What the node's programs leave there goes with it.
    (stage / "tmp").mkdir()
    (stage / "tmp").chmod(0o1777)
    (stage / "run").mkdir()
    _make_run_tree(stage / "run", spec)
    _bind(str(stage / "etc"), "/etc")
    _bind(str(stage / "log"), "/var/log")
    _bind(str(stage / "root"), "/root")
    _bind(str(stage / "tmp"), "/tmp")
    _bind(spec.home_dir, "/home")
    if spec.slurm:
        (stage / "slurm").mkdir()
        _bind(str(stage / "slurm"), "/var/lib/slurm")
    _bind(str(stage / "dev"), "/dev", recursive=True)
    # Last of the tree: it hides the stage.
    _bind(str(stage / "run"), "/run", recursive=True)
    if Path("/sys/fs/bpf").is_dir():
        kernel.mount("bpf", "/sys/fs/bpf", "bpf", data="mode=0700")
    if spec.hide_v1:
        for point in _v1_mounts():
            kernel.unmount(point)


def _let_later_namespaces_be_later() -> None:
    """See to it that namespaces made from now on, on any CPU, have higher numbers than our mount namespace.

    A mount namespace can be kept by binding it to a file, which job_container/tmpfs does for every job, only in one
    with a lower number (fs/namespace.c, mnt_ns_loop). Since 6.18 each CPU has a stock of numbers of its own, 4096
    at a time: the stock of one that has made few may be lower than ours for long.
    """
    ours = kernel.namespace_id("mnt")
    if ours is None:
        return
    for cpu in os.sched_getaffinity(0):
        child = os.fork()
        if child == 0:
            try:
                os.sched_setaffinity(0, {cpu})
                for _ in range(2 * NAMESPACE_NUMBERS_PER_CPU):
                    kernel.unshare(kernel.CLONE_NEWUTS)
                    if (kernel.namespace_id("uts") or ours) > ours:
                        os._exit(0)
            finally:
                os._exit(1)
        os.waitpid(child, 0)


def main() -> int:
    """Become the node, then write what is logged in it to its ``/var/log/syslog``."""
    spec = NodeSpec(**json.loads(sys.argv[1]))
    os.chdir("/")
    kernel.unshare(kernel.CLONE_NEWNET | kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS)
    _make_mounts(spec)
    if spec.slurm:
        _let_later_namespaces_be_later()
    kernel.set_hostname(spec.name)
    # In memory, like all that a node's daemons write: a login must not wait for the host's disk.
    log = os.open("/var/log/syslog", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("/dev/log")
        Path("/dev/log").chmod(0o666)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        # Whoever reads our caller's output to its end must not have to wait for ours.
        with open(os.devnull, "w", encoding="ascii") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        while True:
            message = listener.recv(65536)
            # RFC 3164 as glibc sends it: a priority in angle brackets first, which a reader of the file does not need.
            os.write(log, message.partition(b">")[2].replace(b"\n", b" ").rstrip(b"\0 ") + b"\n")


if __name__ == "__main__":
    sys.exit(main())
