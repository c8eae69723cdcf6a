"""The doctor's look at what the running agent may: its capabilities, and the files as it sees them.

Owns the table of what each capability is for. A drop-in of the unit that takes one away, or hides a directory, leaves
an agent that runs and cannot do its work. Changes nothing. Called through the table of checks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import FrozenSet, Iterator, List, Mapping, Sequence, Tuple

from adoptd.doctor.findings import Finding, Scene, failure, ok, warning
from adoptd.doctor.processes import PROC, agent_pid, capabilities_of, identity
from adoptd.doctor.slurm import is_slurm
from adoptd.hierarchy import read_hierarchies
from adoptd.model import JobManagerError
from adoptd.slurm_site import slurm_conf

# linux/capability.h, and what is missed without it (packaging/systemd/adoptd.service).
_NEEDED: Mapping[int, Tuple[str, str]] = {
    2: ("CAP_DAC_READ_SEARCH", "the job of a process that has ended is not found"),
    12: ("CAP_NET_ADMIN", "the probe cannot be loaded or asked"),
    19: ("CAP_SYS_PTRACE", "sockets and namespaces of users' processes are not seen"),
    23: ("CAP_SYS_NICE", "sshd cannot be moved into a job that has a cpuset"),
}
# Since Linux 5.8 each, in place of CAP_SYS_ADMIN, which has both.
_BPF: Mapping[int, Tuple[str, str]] = {
    38: ("CAP_PERFMON", "the probe cannot be loaded, nor moves out of jobs be watched"),
    39: ("CAP_BPF", "the probe cannot be loaded or asked"),
}
_SYS_ADMIN = 21
_EDIT = "systemctl cat adoptd shows which drop-in takes it away; systemctl edit adoptd"


@dataclass(frozen=True)
class Seen:
    """A path as the host has it and as the agent does. ``hidden``: it sees nothing there, or another thing.

    ``read_only``: the agent cannot write there, though we can.
    """

    path: str
    hidden: bool
    read_only: bool = False


def look_at_rights(scene: Scene) -> Iterator[Finding]:
    """Of the agent that runs, where one does."""
    pid = agent_pid(scene.settings.agent.pam_socket) if scene.root else None
    if pid is None:
        return
    found = capabilities_of(pid)
    if found is not None:
        yield from judge_capabilities(found, scene.settings.probe.enabled)
    root = PROC / str(pid) / "root"
    yield from judge_view([_seen(path, root, writing) for path, writing in _paths(scene)])


def judge_capabilities(found: FrozenSet[int], probe: bool) -> Iterator[Finding]:
    """``probe``: whether the configuration wants it."""
    needed = {**_NEEDED, **(_BPF if probe and _SYS_ADMIN not in found else {})}
    missing = [f"{name} ({effect})" for number, (name, effect) in needed.items() if number not in found]
    if missing:
        yield warning("rights", f"the agent runs without {'; '.join(missing)}", _EDIT)
    else:
        yield ok("rights", "the agent has the capabilities that it needs")


def judge_view(seen: Sequence[Seen]) -> Iterator[Finding]:
    """What the agent goes by is what the administrator looks at."""
    hidden = [each.path for each in seen if each.hidden]
    if hidden:
        text = f"the agent does not see {', '.join(hidden)} as it is here: its unit hides it, or it is a later mount"
        remedy = "systemctl restart adoptd; if it stays: ProtectHome=, PrivateTmp=, InaccessiblePaths= of the unit"
        yield failure("rights", text, remedy)
    shut = [each.path for each in seen if each.read_only and not each.hidden]
    if shut:
        what = "no session is moved, no probe kept, or no metrics written"
        text = f"the agent cannot write below {', '.join(shut)}: {what}"
        yield failure("rights", text, "ReadWritePaths= of the unit (systemctl cat adoptd); findmnt -o TARGET,OPTIONS")


def _paths(scene: Scene) -> List[Tuple[str, bool]]:
    """What the agent has to see, and whether it has to write there."""
    metrics = scene.settings.metrics
    files = (scene.settings.seal.key_file, metrics.tls_certificate, metrics.tls_key, metrics.tls_client_ca)
    paths: List[Tuple[str, bool]] = [(path, False) for path in (str(scene.file), *files) if path]
    if metrics.textfile:
        paths.append((str(Path(metrics.textfile).parent), True))
    if scene.settings.probe.enabled:
        paths.append((str(Path(scene.settings.probe.pin_dir).parent), True))
    try:
        if is_slurm(scene.settings):
            found = slurm_conf(scene.settings).settings()
            paths += [(found.spool_dir, False), *([(found.conf_file, False)] if found.conf_file else [])]
        else:
            paths += [(each.mount_point, True) for each in read_hierarchies()]
    except JobManagerError:
        pass  # said by the looks at them
    return paths


def _seen(path: str, root: Path, writing: bool) -> Seen:
    ours, theirs = identity(path), identity(f"{root}{path}")
    if ours is None:
        return Seen(path, hidden=False)
    if ours != theirs:
        return Seen(path, hidden=True)
    return Seen(path, hidden=False, read_only=writing and _is_read_only(f"{root}{path}"))


def _is_read_only(path: str) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False
