"""Processes of this host, for the doctor: by name, by what they hold, and the agent among them.

Owns the reading of /proc for that. Of a process that is not asked about nothing but its name is read: its command
line is in its memory, which may be locked for long. Changes nothing. Called by the checks.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Collection, Dict, FrozenSet, Iterable, Iterator, List, Optional, Tuple, Union

from adoptd.process import started_ns, uids_in

PROC = Path("/proc")


@dataclass(frozen=True)
class Running:
    """One process. ``started_s``: when, by the wall clock; ``program``: its file, "" where that is not to be seen.

    ``state``: one letter, as ps shows it. ``uid``: whose it is.
    """

    pid: int
    name: str
    title: str
    program: str
    started_s: float
    state: str
    uid: int


def running(part: str, owners: Collection[int] = (0,), proc: Path = PROC) -> Iterator[Running]:
    """Processes of ``owners`` with ``part`` in their name and their file's that see our files: a container has others.

    Only root sees others' files; to anybody else only their own processes are there.
    """
    for pid in pids(proc):
        # The one thing that is read of all of them: on a big node there are thousands.
        name = read(f"{proc}/{pid}/comm").strip()
        place = proc / str(pid)
        if part not in name or not _sees_our_files(place, proc / "self"):
            continue
        # By its file, too: a user can start a set-uid program of root's under any name, with any arguments.
        program = link(place / "exe")
        if part not in os.path.basename(program):
            continue
        # Before its command line: anybody can have a program of that name, with one that nobody can read to its end.
        uid = _owner(place)
        started = started_ns(pid, str(proc)) if uid in owners else None
        if started is None:
            continue
        since_boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        yield Running(
            pid,
            name,
            read(place / "cmdline").replace("\0", " ").strip(),
            program,
            time.time() - since_boot_s + started / 1e9,
            read(place / "stat").rpartition(")")[2].strip()[:1],
            uid,
        )


def pids(proc: Path = PROC) -> List[int]:
    """All that there are."""
    return [int(name) for name in os.listdir(proc) if name.isdigit()]


def agent_pid(pam_socket: str, proc: Path = PROC) -> Optional[int]:
    """Who holds the agent's lock; None if nobody does, or it cannot be told. Never by locking: an agent may start."""
    lock = f"{pam_socket}.lock"
    word = read(Path(lock)).strip()
    if not (word.isascii() and word.isdigit()):
        return None
    place = proc / word
    # Its pid may have come to a user's process since, and what links say in a user's namespaces is that user's choice.
    if link(place / "ns/user") != link(proc / "self/ns/user") or not _is_same_owner(place, lock):
        return None
    return int(word) if any(link(fd) == lock for fd in _descriptors(place)) else None


def holders_of(sockets: Iterable[int], proc: Path = PROC) -> Dict[int, Tuple[int, ...]]:
    """The processes that have these sockets open, by the sockets' inodes."""
    wanted = {f"socket:[{inode}]": inode for inode in sockets}
    found: Dict[int, Tuple[int, ...]] = {}
    for pid in pids(proc) if wanted else ():
        for inode in {wanted[each] for each in map(link, _descriptors(proc / str(pid))) if each in wanted}:
            found[inode] = (*found.get(inode, ()), pid)
    return found


def children_of(pid: int, proc: Path = PROC) -> Tuple[int, ...]:
    """The processes that it started and that run still; none where the kernel does not tell."""
    return tuple(int(word) for word in read(proc / str(pid) / "task" / str(pid) / "children").split())


def names_of(found: Iterable[int], proc: Path = PROC) -> str:
    """Processes as people are told of them."""
    return ", ".join(f"{read(proc / str(pid) / 'comm').strip() or '?'} (pid {pid})" for pid in found)


def capabilities_of(pid: Union[int, str], which: str = "CapEff", proc: Path = PROC) -> Optional[FrozenSet[int]]:
    """The numbers of those in one line of its status, by default those in force; None where they cannot be told."""
    for line in read(proc / str(pid) / "status").splitlines():
        name, _, value = line.partition(":\t")
        if name == which:
            bits = int(value, 16)
            return frozenset(number for number in range(64) if bits >> number & 1)
    return None


def read(file: Union[Path, str]) -> str:
    """What is in a file of /proc; "" where there is none."""
    try:
        with open(file, "rb", buffering=0) as opened:
            return (opened.read() or b"").decode("utf-8", "replace")
    except OSError:
        return ""


def link(path: Union[Path, str]) -> str:
    """What a link says; "" where there is none."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


def identity(path: Union[Path, str]) -> Optional[Tuple[int, int]]:
    """A file's device and inode; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _sees_our_files(place: Path, ours: Path) -> bool:
    """In our mount namespace, or in one of its own on our files, as a unit's PrivateTmp= and the like make them."""
    if link(place / "ns/mnt") == link(ours / "ns/mnt"):
        return True
    if any(link(place / "ns" / name) != link(ours / "ns" / name) for name in ("user", "pid", "net")):
        return False
    return all(identity(place / "root" / name) == identity(ours / "root" / name) for name in ("", "etc"))


def _descriptors(place: Path) -> List[str]:
    try:
        return [f"{place}/fd/{name}" for name in os.listdir(place / "fd")]
    except OSError:
        return []


def _is_same_owner(place: Path, lock: str) -> bool:
    try:
        return _owner(place) == os.stat(lock).st_uid
    except OSError:
        return False


def _owner(place: Path) -> int:
    """By its real uid, which no set-uid program changes; -1 if it is gone."""
    uids = uids_in(read(place / "status").encode("utf-8", "replace"))
    return -1 if uids is None else uids[0]
