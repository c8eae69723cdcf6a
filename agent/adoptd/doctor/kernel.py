"""The doctor's look at the kernel: what BPF needs here, the loopback device, the cgroup layout.

Owns what is said of it, as functions of facts. Changes nothing. Called through the table of checks.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import FrozenSet, Iterator, Optional, Sequence

from adoptd.connections.diag import DiagWitness
from adoptd.doctor.findings import Finding, Scene, failure, ok, warning
from adoptd.doctor.probing import filesystem_at
from adoptd.doctor.processes import link, read
from adoptd.hierarchy import Hierarchy, HierarchyKind, read_hierarchies
from adoptd.model import JobManagerError, ProbeError
from adoptd.probe.mounts import mounts
from adoptd.probe.sources import find_sources

# The oldest kernel the probe was tried on.
_OLDEST = (5, 10)
# load_func() has attach_type from here on.
_BCC_OLDEST = (0, 25)
# include/linux/proc_ns.h: the first namespaces.
_PID_INIT, _CGROUP_INIT = "pid:[4026531836]", "cgroup:[4026531835]"
# A directory that is left without its files is a module to Python, too, and has no origin.
_BCC = "import importlib.metadata as m, importlib.util as u; u.find_spec('bcc').origin[0]; print(m.version('bcc'))"
# What bcc's libbcc.py loads, without its Python, which takes half a second.
_LIBBCC = "import ctypes; ctypes.CDLL('libbcc.so.0')"
_LOOPBACK_S = 0.5


@dataclass(frozen=True)
class KernelFacts:
    """``bpffs``: the type of the filesystem that the pin directory is on or would be. ``lockdown``: its word in force.

    ``bcc`` is the version, None where there is none; ``libbcc``: why its library cannot be loaded. ``btf``: whether the
    kernel describes itself. ``diag``: None where sock_diag answers, else why not. ``loopback``: None where a connection
    to ourselves comes about, else why not.
    """

    release: str
    bpffs: str
    lockdown: str
    btf: bool
    bcc: Optional[str]
    headers: Optional[str]
    diag: Optional[str]
    pid_namespace: str
    loopback: Optional[str] = None
    libbcc: Optional[str] = None


def look_at_kernel(scene: Scene) -> Iterator[Finding]:
    """What BPF needs."""
    yield from judge_kernel(_facts(scene), scene.settings.probe.pin_dir, scene.settings.probe.enabled)


def judge_kernel(facts: KernelFacts, pin_dir: str, wanted: bool) -> Iterator[Finding]:
    """``wanted``: whether the configuration asks for the probe."""
    number = re.match(r"(\d+)\.(\d+)", facts.release)
    if number is None or (int(number[1]), int(number[2])) >= _OLDEST:
        yield ok("kernel", f"Linux {facts.release}")
    else:
        seen = f"Linux {facts.release} is older than {'.'.join(map(str, _OLDEST))}, the oldest the probe is known on"
        yield warning("kernel", seen, "sock_diag and /proc are asked instead; a newer kernel has faster answers")
    if facts.pid_namespace not in (_PID_INIT, ""):
        seen = "this is not the first pid namespace: pids that the probe noted mean other processes here"
        yield failure("kernel", seen, "run the agent (and this) on the host, not in a container")
    if facts.loopback is not None:
        seen = f"nothing can connect to 127.0.0.1 here ({facts.loopback}): no self-test passes, slower ways are gone"
        yield failure("kernel", seen, "let through what comes by lo: nft list ruleset; iptables -S; ip link set lo up")
    elif facts.diag is None:
        yield ok("kernel", "sock_diag answers")
    else:
        remedy = "modprobe tcp_diag; echo tcp_diag > /etc/modules-load.d/adoptd.conf"
        yield warning("kernel", f"sock_diag does not answer: {facts.diag}", remedy)
    if not wanted:
        return
    if facts.bpffs != "bpf":
        seen = f"{pin_dir} would be on {facts.bpffs or 'nothing that is mounted'}, not on bpffs"
        yield warning("kernel", seen, "mount -t bpf bpf /sys/fs/bpf (systemd does it at boot: sys-fs-bpf.mount)")
    if facts.lockdown == "confidentiality":
        seen = "the kernel is locked down for confidentiality, which forbids the probe to read"
        yield warning("kernel", seen, "boot with lockdown=integrity, or do without the probe: [probe] enabled = false")
    if not facts.btf:
        seen = (
            "/sys/kernel/btf/vmlinux is missing: sockets that are older than the probe are not labelled, and second"
            " sockets with the addresses of a connection are not looked for"
        )
        yield warning("kernel", seen, "a kernel with CONFIG_DEBUG_INFO_BTF; until then start the agent at boot")
    yield from _judge_compiler(facts)


def _judge_compiler(facts: KernelFacts) -> Iterator[Finding]:
    if facts.headers is not None:
        yield failure("bcc", facts.headers, "install the package adoptd again, or set [probe] source_dir")
    if facts.bcc is None:
        seen = "BCC is not installed for the distribution's Python: the probe cannot be compiled"
        yield warning("bcc", seen, "apt install python3-bpfcc (dnf install python3-bcc); never from PyPI")
        return
    if facts.libbcc is not None:
        seen = f"BCC's library cannot be loaded, so no probe compiled: {facts.libbcc}"
        yield warning("bcc", seen, "apt install --reinstall libbpfcc python3-bpfcc; ldconfig -p | grep libbcc")
    number = re.match(r"v?(\d+)\.(\d+)", facts.bcc)
    if number is None or (int(number[1]), int(number[2])) >= _BCC_OLDEST:
        yield ok("bcc", f"BCC {facts.bcc}")
    else:
        seen = f"BCC {facts.bcc} is older than {'.'.join(map(str, _BCC_OLDEST))}: it cannot load the probe's programs"
        yield warning("bcc", seen, "upgrade it from the distribution's newer release or backports")


def _facts(scene: Scene) -> KernelFacts:
    section = scene.settings.probe
    witness = DiagWitness()
    try:
        diag = witness.self_test()
    finally:
        witness.close()
    return KernelFacts(
        release=os.uname().release,
        bpffs=filesystem_at(section.pin_dir, list(mounts())),
        lockdown=_chosen(Path("/sys/kernel/security/lockdown")),
        btf=Path("/sys/kernel/btf/vmlinux").exists(),
        bcc=_bcc_version(0.9 * scene.timeout_s),
        headers=_headers_fault(section.source_dir),
        diag=diag,
        pid_namespace=link("/proc/self/ns/pid"),
        loopback=_loopback_fault(),
        libbcc=_libbcc_fault(0.9 * scene.timeout_s),
    )


def _libbcc_fault(timeout_s: float) -> Optional[str]:
    command = ["/usr/bin/python3", "-I", "-c", _LIBBCC]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False, text=True
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 or not lines else lines[-1].partition(": ")[2] or lines[-1]


def _loopback_fault() -> Optional[str]:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=_LOOPBACK_S).close()
    except OSError as error:
        return str(error)
    return None


def _chosen(file: Path) -> str:
    """The word in brackets, as in ``none [integrity] confidentiality``; "" where there is no such file."""
    found = re.search(r"\[(\w+)\]", read(file))
    return "" if found is None else found[1]


def _bcc_version(timeout_s: float) -> Optional[str]:
    for python in dict.fromkeys((sys.executable, "/usr/bin/python3")):
        try:
            command = [python, "-I", "-c", _BCC]
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False, text=True
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    return None


def _headers_fault(source_dir: str) -> Optional[str]:
    try:
        sources = find_sources(Path(source_dir) if source_dir else None)
    except ProbeError as error:
        return str(error)
    missing = [name for name in ("adopt_record.h", "include/linux/types.h") if not (sources / name).is_file()]
    return f"{sources} lacks {', '.join(missing)}, which the probe is compiled with" if missing else None


def look_at_cgroups(scene: Scene) -> Iterator[Finding]:
    """Which hierarchies there are."""
    try:
        found = read_hierarchies()
    except JobManagerError as error:
        yield failure("cgroups", str(error), "mount /proc")
        return
    unified = next((each.mount_point for each in found if each.kind is HierarchyKind.V2), None)
    controllers = frozenset() if unified is None else _controllers(unified)
    yield from judge_cgroups(found, link("/proc/self/ns/cgroup"), controllers)


def judge_cgroups(found: Sequence[Hierarchy], namespace: str, controllers: FrozenSet[str]) -> Iterator[Finding]:
    """The layout in one word, and where each hierarchy is. ``controllers``: of v2; empty where they are not known."""
    if namespace not in (_CGROUP_INIT, ""):
        seen = "this is not the first cgroup namespace: jobs are seen by other paths, or not at all"
        yield failure("cgroups", seen, "run the agent (and this) on the host, not in a container")
    v2 = [each for each in found if each.kind is HierarchyKind.V2]
    v1 = [each for each in found if each.kind is HierarchyKind.V1]
    if not found:
        yield failure("cgroups", "no cgroup hierarchy is mounted", "mount -t cgroup2 cgroup2 /sys/fs/cgroup")
        return
    layout = layout_of(found)
    places = [f"v2 at {each.mount_point}" for each in v2]
    if v1:
        labels = " ".join(sorted(each.label for each in v1))
        places.append(f"v1 ({labels}) at {os.path.commonpath([each.mount_point for each in v1])}")
    yield ok("cgroups", f"{layout}: {', '.join(places)}")
    resources = {"memory", "cpuset", "cpu"}
    if v2 and not v1 and controllers:
        missing = resources - controllers
        if missing:
            seen = f"{v2[0].mount_point} has no controller {', '.join(sorted(missing))}: jobs cannot be limited by it"
            yield warning("cgroups", seen, "look at the kernel's command line for cgroup_disable=")


def layout_of(found: Sequence[Hierarchy]) -> str:
    """The hierarchies of this host in one word: v1, v2, or both as hybrid."""
    kinds = {each.kind for each in found}
    return "hybrid" if len(kinds) > 1 else "v2" if HierarchyKind.V2 in kinds else "v1"


def _controllers(mount_point: str) -> FrozenSet[str]:
    try:
        return frozenset((Path(mount_point) / "cgroup.controllers").read_text("ascii").split())
    except OSError:
        return frozenset()
