"""The doctor's look at the probe: loaded, sound, complete, and whether this kernel takes another.

Owns what is said of it, as functions of facts. Loads nothing itself: a trial is made by a child, in a directory of its
own (trial.py). Called through the table of checks.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Mapping, Optional, Sequence, Tuple

from adoptd import probe
from adoptd.doctor.findings import FileRule, Finding, Scene, failure, fault_of, ok, warning
from adoptd.doctor.likeness import ask_child
from adoptd.doctor.processes import read
from adoptd.doctor.trial import TRIAL_PREFIX
from adoptd.model import Connection, Endpoint, ProbeError
from adoptd.probe.mounts import Mount, mounts
from adoptd.probe.watching import open_watch

_REFUSED_SHARE = 0.01
_PINS = FileRule("a directory", 0o077, stat.S_ISDIR)
_CONNECT_S = 0.5
_BTF = Path("/sys/kernel/btf/vmlinux")
# A label takes some 200 bytes of it; the kernel's own default was never less than 10240, and is the other since 6.9.
_OPTMEM_LEAST, _OPTMEM_WELL = 4096, 131072
_OPTMEM = Path("/proc/sys/net/core/optmem_max")
_RAISE_OPTMEM = f"raise net.core.optmem_max, and look below /etc/sysctl.d: sysctl -w net.core.optmem_max={_OPTMEM_WELL}"
_READ_ONLY = "Read-only file system"
# Of a self-test that could not be made.
_LOOPBACK = "on the loopback: "
# Of a check's time: what comes after the trial needs some, too.
_TRIAL_SHARE = 0.6


def filesystem_at(path: str, mounted: Sequence[Mount]) -> str:
    """The type of the filesystem that ``path`` is on, or would be once made; "" where no mount tells."""
    best: Tuple[int, str] = (-1, "")
    for mount in mounted:
        point = mount.point.rstrip("/")
        if (path == point or path.startswith(point + "/")) and len(point) >= best[0]:
            # Of two on one point the later hides the earlier.
            best = (len(point), mount.fstype)
    return best[1]


@dataclass(frozen=True)
class ProbeFacts:
    """``problem`` and ``self_test``: None where all is well. ``watch``: why the watch is not there, None if it is.

    ``trial``: what became of loading one beside it: "" it works, None not tried. ``twins``: whether it looks for second
    sockets with a connection's addresses, None if not known. ``optmem``: bytes that a socket may have for such.
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
    twins: Optional[bool] = None
    optmem: Optional[int] = None


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
        seen = (
            f"{pin_dir} {facts.pins_fault}, expected root's with mode 0700: a probe that others can reach is not used"
        )
        yield failure("probe", seen, f"chown root:root {pin_dir} && chmod 0700 {pin_dir}; systemctl restart adoptd")
        # All else that does not work follows.
        return
    if facts.problem is None and facts.self_test is None:
        seeded = "" if facts.seeded is not False else ", sockets older than it not labelled"
        second = "; another loads here, too" if facts.trial == "" else ""
        yield ok("probe", f"attached, schema {facts.schema}, self-test passed{seeded}{second}")
        if facts.trial:
            seen = f"the probe is attached, and could not be loaded again: {facts.trial}"
            remedy = "put BCC and the probe's sources right before the next reboot or upgrade"
            yield warning("probe", seen, _remount(pin_dir) if _READ_ONLY in facts.trial else remedy)
        if facts.watch is not None:
            seen = f"moves of sessions out of their jobs are not seen as they happen: {facts.watch}"
            yield warning("watch", seen, "they are looked for by walks of /proc meanwhile: adoptd probe load says why")
        else:
            yield ok("watch", "attached")
        if facts.twins is False:
            seen = "second sockets with a connection's addresses are not looked for, so may be taken for their owner's"
            remedy = "adoptd probe unload && adoptd probe load says why (BTF, lockdown); docs/owners.md what it means"
            yield warning("probe", seen, remedy)
    else:
        seen = facts.problem or f"its self-test fails: {facts.self_test}"
        why = {None: "", "": "; this kernel takes it"}.get(facts.trial, f"; loading it here fails: {facts.trial}")
        remedy = "systemctl restart adoptd (or: adoptd probe load); slower witnesses are asked meanwhile"
        if _READ_ONLY in seen + why:
            remedy = _remount(pin_dir)
        elif facts.optmem is not None and facts.optmem < _OPTMEM_LEAST:
            why, remedy = f"; net.core.optmem_max is {facts.optmem}, too little for a label", _RAISE_OPTMEM
        elif _LOOPBACK in seen:
            remedy = "put right what is said of the loopback; the probe itself may be well"
        elif facts.trial:
            remedy = "the other witnesses are asked; a kernel or BCC that takes it is needed"
        yield warning("probe", seen + why, remedy)
    refused, labelled = facts.counters.get("storage_refused", 0), facts.counters.get("labelled", 0)
    # Any user can have a few of their own refused; they are nobody's then, and never another's.
    if refused > labelled * _REFUSED_SHARE:
        seen = f"of {refused + labelled} connections {refused} could not be labelled"
        if facts.optmem is None or facts.optmem < _OPTMEM_WELL:
            yield warning("probe", seen, _RAISE_OPTMEM)
        else:
            # Counted since the probe was loaded: it may be over.
            yield ok("probe", f"{seen}; net.core.optmem_max is {facts.optmem} now, which is well")
    for path in facts.leftovers:
        yield warning("probe", f"{path} was left by an earlier doctor that was killed", f"rm -r {path}")


def _remount(pin_dir: str) -> str:
    return f"mount -o remount,rw {Path(pin_dir).parent}; ReadWritePaths= of the unit; systemctl restart adoptd"


def _probe_facts(scene: Scene) -> ProbeFacts:
    section = scene.settings.probe
    pin_dir = Path(section.pin_dir)
    source_dir = Path(section.source_dir) if section.source_dir else None
    status = probe.status(pin_dir, source_dir)
    self_test: Optional[str] = None
    watch: Optional[str] = None
    twins: Optional[bool] = None
    if status.problem is None:
        try:
            with probe.open_probe(pin_dir, source_dir) as opened:
                probe.self_test(opened)
                # Without BTF it cannot, as the look at the kernel says.
                twins = _looks_for_twins(opened) if _BTF.exists() else None
        except ProbeError as error:
            self_test = str(error)
        try:
            open_watch(pin_dir, source_dir).close()
        except ProbeError as error:
            watch = str(error)
    on_bpffs = filesystem_at(str(pin_dir), list(mounts())) == "bpf"
    # Where the loopback is shut the trial could not be tested either.
    unsound = status.problem is not None or (self_test is not None and _LOOPBACK not in self_test)
    trial = _trial(scene, pin_dir, source_dir) if on_bpffs and (scene.deep or unsound) else None
    leftovers = _left_over(pin_dir.parent) if on_bpffs else ()
    try:
        found = os.lstat(pin_dir)
        pins_fault = fault_of((found.st_mode, found.st_uid), _PINS)
    except OSError:
        pins_fault = "is missing"
    optmem = read(_OPTMEM).strip()
    return ProbeFacts(
        status.schema,
        status.problem,
        self_test,
        status.seeded,
        watch,
        status.counters,
        trial,
        leftovers,
        pins_fault,
        twins,
        int(optmem) if optmem.isdigit() else None,
    )


def _left_over(bpffs: Path) -> Tuple[str, ...]:
    """Directories of trials whose process has ended; another doctor's may be under way."""
    found = sorted(bpffs.glob(f"{TRIAL_PREFIX}*"))
    return tuple(str(path) for path in found if not Path("/proc", path.name[len(TRIAL_PREFIX) :]).exists())


def _looks_for_twins(opened: probe.OpenProbe) -> Optional[bool]:
    """By its answer about a connection of our own; None where there is none."""
    try:
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            client = stack.enter_context(socket.create_connection(server.getsockname(), timeout=_CONNECT_S))
            here = ipaddress.ip_address("127.0.0.1")
            answer = opened.ask(Connection(*(Endpoint(here, int(each.getsockname()[1])) for each in (client, server))))
    except (OSError, ProbeError):
        return None
    return None if answer.record is None else answer.twins is not None


def _trial(scene: Scene, pin_dir: Path, source_dir: Optional[Path]) -> Optional[str]:
    """What another process that loads, tests and removes a probe says: "" if all went well; None: not in time.

    It is a process of its own so that it clears up after itself whatever becomes of this one, and has the agent's
    rights where there is an agent.
    """
    said = ask_child(scene, "probe", (str(pin_dir.parent), str(source_dir or "")), _TRIAL_SHARE * scene.timeout_s)
    if said is None:
        return None
    return str(said.get("error", "the trial said nothing"))
