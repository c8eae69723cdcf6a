"""The doctor's look at the kernel: what BPF needs here, whether the probe and the watch are there, the cgroup layout.

Owns what is said of it, as functions of facts. Loads nothing itself: a trial is made by a child, in a directory of its
own (trial.py). Called through the table of checks.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import FrozenSet, Iterator, Mapping, Optional, Sequence, Tuple

from adoptd import probe
from adoptd.connections.diag import DiagWitness
from adoptd.doctor.findings import FileRule, Finding, Scene, failure, fault_of, ok, warning
from adoptd.doctor.trial import TRIAL_PREFIX
from adoptd.hierarchy import Hierarchy, HierarchyKind, read_hierarchies
from adoptd.model import JobManagerError, ProbeError
from adoptd.probe.mounts import Mount, mounts
from adoptd.probe.sources import find_sources
from adoptd.probe.watching import open_watch

# The oldest kernel the probe was tried on.
_OLDEST = (5, 10)
# load_func() has attach_type from here on.
_BCC_OLDEST = (0, 25)
# include/linux/proc_ns.h: the first namespaces.
_PID_INIT, _CGROUP_INIT = "pid:[4026531836]", "cgroup:[4026531835]"
# A directory that is left without its files is a module to Python, too, and has no origin.
_BCC = "import importlib.metadata as m, importlib.util as u; u.find_spec('bcc').origin[0]; print(m.version('bcc'))"
_REFUSED_SHARE = 0.01
_PINS = FileRule("a directory", 0o077, stat.S_ISDIR)


@dataclass(frozen=True)
class KernelFacts:
    """``bpffs``: the type of the filesystem that the pin directory is on or would be. ``lockdown``: its word in force.

    ``bcc`` is the version, None where there is none. ``btf``: whether the kernel describes itself. ``diag``: None where
    sock_diag answers, else why not.
    """

    release: str
    bpffs: str
    lockdown: str
    btf: bool
    bcc: Optional[str]
    headers: Optional[str]
    diag: Optional[str]
    pid_namespace: str


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
    if facts.diag is None:
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
        seen = "/sys/kernel/btf/vmlinux is missing: sockets that are older than the probe are not labelled"
        yield warning("kernel", seen, "start the agent at boot, before users connect; nothing else is lost")
    yield from _judge_compiler(facts)


def _judge_compiler(facts: KernelFacts) -> Iterator[Finding]:
    if facts.headers is not None:
        yield failure("bcc", facts.headers, "install the package adoptd again, or set [probe] source_dir")
    if facts.bcc is None:
        seen = "BCC is not installed for the distribution's Python: the probe cannot be compiled"
        yield warning("bcc", seen, "apt install python3-bpfcc (dnf install python3-bcc); never from PyPI")
        return
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
        pid_namespace=_link("/proc/self/ns/pid"),
    )


def filesystem_at(path: str, mounted: Sequence[Mount]) -> str:
    """The type of the filesystem that ``path`` is on, or would be once made; "" where no mount tells."""
    best: Tuple[int, str] = (-1, "")
    for mount in mounted:
        point = mount.point.rstrip("/")
        if (path == point or path.startswith(point + "/")) and len(point) >= best[0]:
            # Of two on one point the later hides the earlier.
            best = (len(point), mount.fstype)
    return best[1]


def _chosen(file: Path) -> str:
    """The word in brackets, as in ``none [integrity] confidentiality``; "" where there is no such file."""
    try:
        found = re.search(r"\[(\w+)\]", file.read_text("ascii", "replace"))
    except OSError:
        return ""
    return "" if found is None else found[1]


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


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


@dataclass(frozen=True)
class ProbeFacts:
    """``problem`` and ``self_test``: None where all is well. ``watch``: why the watch is not there, None if it is.

    ``trial``: what became of loading one beside it: "" it works, None not tried.
    """

    schema: Optional[str]
    problem: Optional[str]
    self_test: Optional[str]
    seeded: Optional[bool]
    watch: Optional[str]
    counters: Mapping[str, int]
    trial: Optional[str] = None
    leftovers: Tuple[str, ...] = ()
    pins_fault: Optional[str] = None


def look_at_probe(scene: Scene) -> Iterator[Finding]:
    """The probe that is loaded, and where it is not sound, whether it can be."""
    section = scene.settings.probe
    if not section.enabled:
        yield warning("probe", "switched off in the configuration", "set [probe] enabled = true")
        return
    if not scene.root:
        yield warning("probe", "only root can look at it", "sudo adoptd doctor")
        return
    yield from judge_probe(_probe_facts(scene), section.pin_dir)


def judge_probe(facts: ProbeFacts, pin_dir: str) -> Iterator[Finding]:
    """The remedy depends on whether the kernel takes the probe at all."""
    if facts.pins_fault not in (None, "is missing"):
        yield failure("probe", f"{pin_dir} {facts.pins_fault}, expected root's with mode 0700", f"chmod 0700 {pin_dir}")
    if facts.problem is None and facts.self_test is None:
        seeded = "" if facts.seeded is not False else ", sockets older than it not labelled"
        second = "; another loads here, too" if facts.trial == "" else ""
        yield ok("probe", f"attached, schema {facts.schema}, self-test passed{seeded}{second}")
        if facts.trial:
            seen = f"the probe is attached, and could not be loaded again: {facts.trial}"
            yield warning("probe", seen, "put BCC and the probe's sources right before the next reboot or upgrade")
        if facts.watch is not None:
            seen = f"moves of sessions out of their jobs are not seen as they happen: {facts.watch}"
            yield warning("watch", seen, "they are looked for by walks of /proc meanwhile: adoptd probe load says why")
        else:
            yield ok("watch", "attached")
    else:
        seen = facts.problem or f"its self-test fails: {facts.self_test}"
        why = {None: "", "": "; this kernel takes it"}.get(facts.trial, f"; loading it here fails: {facts.trial}")
        remedy = (
            "the other witnesses are asked; a kernel or BCC that takes it is needed"
            if facts.trial
            else "systemctl restart adoptd (or: adoptd probe load); slower witnesses are asked meanwhile"
        )
        yield warning("probe", seen + why, remedy)
    refused, labelled = facts.counters.get("storage_refused", 0), facts.counters.get("labelled", 0)
    # Any user can have a few of their own refused; they are nobody's then, and never another's.
    if refused > labelled * _REFUSED_SHARE:
        seen = f"of {refused + labelled} connections {refused} could not be labelled"
        yield warning("probe", seen, "raise net.core.optmem_max: sysctl -w net.core.optmem_max=131072")
    for path in facts.leftovers:
        yield warning("probe", f"{path} was left by an earlier doctor that was killed", f"rm -r {path}")


def _probe_facts(scene: Scene) -> ProbeFacts:
    section = scene.settings.probe
    pin_dir = Path(section.pin_dir)
    source_dir = Path(section.source_dir) if section.source_dir else None
    status = probe.status(pin_dir, source_dir)
    self_test: Optional[str] = None
    watch: Optional[str] = None
    if status.problem is None:
        try:
            with probe.open_probe(pin_dir, source_dir) as opened:
                probe.self_test(opened)
        except ProbeError as error:
            self_test = str(error)
        try:
            open_watch(pin_dir, source_dir).close()
        except ProbeError as error:
            watch = str(error)
    on_bpffs = filesystem_at(str(pin_dir), list(mounts())) == "bpf"
    sound = status.problem is None and self_test is None
    trial = _trial(pin_dir, source_dir, 0.8 * scene.timeout_s) if on_bpffs and (scene.deep or not sound) else None
    leftovers = _left_over(pin_dir.parent) if on_bpffs else ()
    try:
        found = os.lstat(pin_dir)
        pins_fault = fault_of((found.st_mode, found.st_uid), _PINS)
    except OSError:
        pins_fault = "is missing"
    return ProbeFacts(
        status.schema, status.problem, self_test, status.seeded, watch, status.counters, trial, leftovers, pins_fault
    )


def _left_over(bpffs: Path) -> Tuple[str, ...]:
    """Directories of trials whose process has ended; another doctor's may be under way."""
    found = sorted(bpffs.glob(f"{TRIAL_PREFIX}*"))
    return tuple(str(path) for path in found if not Path("/proc", path.name[len(TRIAL_PREFIX) :]).exists())


def _trial(pin_dir: Path, source_dir: Optional[Path], timeout_s: float) -> Optional[str]:
    """What another process that loads, tests and removes a probe says: "" if all went well; None: not in time.

    It is a process of its own so that it clears up after itself whatever becomes of this one.
    """
    command = [sys.executable, "-m", "adoptd.doctor.trial", str(pin_dir.parent), str(source_dir or "")]
    package = str(Path(__file__).resolve().parents[2])
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": package, "PYTHONDONTWRITEBYTECODE": "1"}
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        said, _ = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # It goes on, and clears up after itself.
        return None
    try:
        result = json.loads(said)["error"]
    except (ValueError, KeyError):
        return f"the trial ended with {child.returncode}"
    return str(result)


def look_at_cgroups(scene: Scene) -> Iterator[Finding]:
    """Which hierarchies there are."""
    try:
        found = read_hierarchies()
    except JobManagerError as error:
        yield failure("cgroups", str(error), "mount /proc")
        return
    unified = next((each.mount_point for each in found if each.kind is HierarchyKind.V2), None)
    controllers = frozenset() if unified is None else _controllers(unified)
    yield from judge_cgroups(found, _link("/proc/self/ns/cgroup"), controllers)


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
    layout = "hybrid" if v2 and v1 else "v2" if v2 else "v1"
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


def _controllers(mount_point: str) -> FrozenSet[str]:
    try:
        return frozenset((Path(mount_point) / "cgroup.controllers").read_text("ascii").split())
    except OSError:
        return frozenset()
