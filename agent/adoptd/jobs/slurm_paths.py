"""Which job a cgroup path belongs to, by Slurm's layouts. Pure: no I/O, and no belief either.

Owns the layouts of cgroup v1 and v2 that slurmstepd has made from 18.08 to 26.11. Paths are matched whole,
from the root and component by component: a path that merely looks like a job's is nobody's. What is found
here is what a path says; the slurm backend checks it against the job's step. Called by it alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import List, Optional, Tuple

from adoptd.hierarchy import HierarchyKind
from adoptd.model import UID_MAX

# src/common/sluid.c: Crockford's base 32 without I, L, O and U; 13 digits hold 65 bits, so the first is below G.
_BASE_32 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_SLUID = re.compile(r"s[0-9A-F][0-9ABCDEFGHJKMNPQRSTVWXYZ]{12}")
# 0 is no job; NO_VAL and its neighbours (slurm.h) are none either.
_JOB_ID_MAX = 0xFFFFFFEF
_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}")
# log_build_step_id_str(): a heterogeneous step's component follows a "+".
_STEP = re.compile(r"step_(extern|batch|interactive|[0-9]{1,10}(\+[0-9]{1,10})?)")
_EXTERN = "step_extern"
_SCOPE = "slurmstepd.scope"
DEFAULT_SLICE = "system.slice"
DEFAULT_PREPEND = "/slurm"


@dataclass(frozen=True)
class NamedJob:
    """The job that a path names: by ``job_id`` or, in v2 from 26.05 on, by ``sluid``; v1 names the ``uid`` too."""

    job_id: Optional[int]
    sluid: Optional[int]
    uid: Optional[int]


@dataclass(frozen=True)
class SlurmPaths:
    """The layouts of one node.

    ``node_name`` is in the path where Slurm was built for several slurmds on a host (Debian's is).
    ``slice`` is CgroupSlice of cgroup.conf, ``prepend`` CgroupPrepend (v1 of older releases).
    """

    node_name: str
    slice: str = DEFAULT_SLICE
    prepend: str = DEFAULT_PREPEND

    def tops(self, kind: HierarchyKind) -> Tuple[str, ...]:
        """The directories that Slurm's jobs are in, one of which a node has."""
        if kind is HierarchyKind.V1:
            return (self.prepend, f"{self.prepend}_{self.node_name}")
        slices = [f"/{self.slice.strip('/')}"]
        nested = _systemd_path(self.slice)
        if nested is not None and nested not in slices:
            slices.append(nested)
        scopes = (_SCOPE, f"{self.node_name}_{_SCOPE}")
        return tuple(f"{each}/{scope}" for each in slices for scope in scopes)

    def parse(self, kind: HierarchyKind, path: str) -> Optional[NamedJob]:
        """The job named by the path of a process's cgroup; None if it is not in a step of one.

        A process in the job's own cgroup, above the steps, is a slurmstepd on its way: no process of the job's.
        """
        for top in self.tops(kind):
            if path.startswith(top + "/"):
                return _parse_below(kind, path[len(top) + 1 :].split("/"))
        return None

    def extern_steps(self, kind: HierarchyKind, uid: int, job_id: int, sluid: Optional[int]) -> Tuple[str, ...]:
        """Where the extern step of a job can be."""
        if kind is HierarchyKind.V1:
            return tuple(f"{top}/uid_{uid}/job_{job_id}/{_EXTERN}" for top in self.tops(kind))
        names = [f"job_{job_id}"] if sluid is None else [f"job_{job_id}", format_sluid(sluid)]
        return tuple(f"{top}/{name}/{_EXTERN}" for top in self.tops(kind) for name in names)


def parse_sluid(text: str) -> Optional[int]:
    """The number of an SLUID as Slurm writes it; None if it is none. Lower case and I, L, O are for people only."""
    if not _SLUID.fullmatch(text):
        return None
    value = 0
    for digit in text[1:]:
        value = value * 32 + _BASE_32.index(digit)
    return value


def format_sluid(value: int) -> str:
    """An SLUID as Slurm writes it."""
    return "s" + "".join(_BASE_32[(value >> shift) & 31] for shift in range(60, -1, -5))


def parse_job_id(text: str) -> Optional[int]:
    """A job id in decimal as Slurm writes it: no sign, no leading zero; None if it is none."""
    if not _NUMBER.fullmatch(text):
        return None
    job_id = int(text)
    return job_id if 1 <= job_id <= _JOB_ID_MAX else None


def _parse_below(kind: HierarchyKind, parts: List[str]) -> Optional[NamedJob]:
    # A cgroup namespace shows what is outside it with "..": whatever that is, it is no path from the root.
    if "" in parts or "." in parts or ".." in parts:
        return None
    uid: Optional[int] = None
    if kind is HierarchyKind.V1:
        number = parts[0][4:]
        if not parts[0].startswith("uid_") or not _NUMBER.fullmatch(number) or int(number) > UID_MAX:
            return None
        uid, parts = int(number), parts[1:]
    if len(parts) < 2 or not _STEP.fullmatch(parts[1]):
        return None
    if parts[0].startswith("job_"):
        job_id = parse_job_id(parts[0][4:])
        return None if job_id is None else NamedJob(job_id, None, uid)
    sluid = parse_sluid(parts[0]) if kind is HierarchyKind.V2 else None
    return None if sluid is None else NamedJob(None, sluid, uid)


def _systemd_path(slice_name: str) -> Optional[str]:
    """Where systemd puts a slice with dashes in its name: a-b.slice is /a.slice/a-b.slice (systemd.slice(5))."""
    stem, dot, rest = slice_name.partition(".slice")
    if not dot or rest or "/" in stem or not stem:
        return None
    pieces = stem.split("-")
    if "" in pieces:
        return None
    return "".join(f"/{'-'.join(pieces[: count + 1])}.slice" for count in range(len(pieces)))
