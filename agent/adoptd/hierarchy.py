"""Facts about cgroups on this host: which hierarchies there are, where, and who is in which cgroup.

Reads /proc and the cgroup mounts; must never change either, nor know what a job is. A fact it cannot
establish is None or an error, never a guess. Called by the job backends and by what loads the probe.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import functools
import os
import re
import select
import stat
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Tuple

from adoptd.model import JobManagerError

# What the kernel puts after the path of a cgroup that has been removed (proc_cgroup_show, d_path).
_DELETED = " (deleted)"
# FILEID_KERNFS of include/linux/exportfs.h: the handle is the 64-bit kernfs id alone. Linux 5.5.
_FILEID_KERNFS = 0xFE
# A page, which is what the kernel hands out at once.
_READ_BYTES = 4096
_OCTAL = re.compile(r"\\([01][0-7]{2})")


class HierarchyKind(enum.Enum):
    """The two interfaces of cgroups."""

    V1 = "v1"
    V2 = "v2"


@dataclass(frozen=True)
class Hierarchy:
    """One cgroup hierarchy and one mount that shows the whole of it.

    ``number`` is the kernel's id of the hierarchy: 0 for v2, and for v1 unique while the hierarchy exists.
    ``controllers`` are the v1 ones, ``name=...`` included; () for v2. ``root`` is the cgroup at the mount
    point, always "/". ``device`` is the st_dev of everything in it: what tells a mount from the bare
    directory left when it is gone.
    """

    kind: HierarchyKind
    number: int
    controllers: Tuple[str, ...]
    mount_point: str
    device: int
    root: str = "/"

    @property
    def label(self) -> str:
        """For messages: "v2" or the v1 controllers."""
        return "v2" if self.kind is HierarchyKind.V2 else ",".join(self.controllers)


class CgroupMounts:
    """The hierarchies of this host, read again whenever a mount changes. Safe to share between threads."""

    def __init__(self, proc_root: str = "/proc") -> None:
        """Nothing is read before it is asked for."""
        self._proc_root = proc_root
        self._lock = threading.Lock()
        self._watch: Optional[int] = None
        self._stop_watching: Callable[[], object] = lambda: None
        self._stale = True
        self._known: Tuple[Hierarchy, ...] = ()

    def hierarchies(self) -> Tuple[Hierarchy, ...]:
        """Every hierarchy mounted whole here, v2 first. Raises JobManagerError if /proc cannot be read.

        A job manager may mount a v1 controller long after boot, so the list cannot be taken once; polling
        mountinfo for POLLPRI (proc_pid_mountinfo(5)) costs 1 us, reading it on a host full of containers ms.
        """
        with self._lock:
            # A change is reported once: if reading fails, the next question has to read again.
            self._stale = self._mounts_changed() or self._stale
            if self._stale:
                self._known = read_hierarchies(self._proc_root)
                self._stale = False
            return self._known

    def membership(self, pid: int) -> Optional[Mapping[int, str]]:
        """Hierarchy number -> cgroup path of a process; None if it is gone. Raises JobManagerError.

        A hierarchy in which its cgroup has been removed is left out: it is in no cgroup there.
        """
        try:
            # Without open(): it is read twice in every answer and every adoption, and most of the time was its own.
            descriptor = os.open(f"{self._proc_root}/{pid}/cgroup", os.O_RDONLY | os.O_CLOEXEC)
            try:
                parts = [os.read(descriptor, _READ_BYTES)]
                while parts[-1]:
                    parts.append(os.read(descriptor, _READ_BYTES))
            finally:
                os.close(descriptor)
            text = b"".join(parts)
        except (FileNotFoundError, ProcessLookupError):
            return None
        except OSError as error:
            raise JobManagerError(f"{self._proc_root}/{pid}/cgroup: {error.strerror}") from None
        return parse_membership(os.fsdecode(text))

    def close(self) -> None:
        """Stop watching the mounts until asked again. May be called twice; happens by itself when this goes away."""
        with self._lock:
            self._watch = None
            self._stop_watching()

    def _mounts_changed(self) -> bool:
        if self._watch is None:
            path = f"{self._proc_root}/self/mountinfo"
            try:
                self._watch = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise JobManagerError(f"{path}: {error.strerror}") from None
            # A reloaded configuration makes a new backend and drops the old one without ceremony.
            self._stop_watching = weakref.finalize(self, os.close, self._watch)
            return True
        poll = select.poll()
        poll.register(self._watch, select.POLLPRI)
        return bool(poll.poll(0))


def read_hierarchies(proc_root: str = "/proc") -> Tuple[Hierarchy, ...]:
    """Every hierarchy mounted whole in this mount namespace, v2 first. Raises JobManagerError."""
    texts = []
    for name in ("mountinfo", "cgroup"):
        path = Path(proc_root) / "self" / name
        try:
            texts.append(os.fsdecode(path.read_bytes()))
        except OSError as error:
            raise JobManagerError(f"{path}: {error.strerror}") from None
    found: Dict[int, Hierarchy] = {}
    for candidate in parse_mounts(*texts):
        # A mount that another covers shows a different device at its mount point: not the one to use.
        if candidate.number not in found and _device_at(candidate.mount_point) == candidate.device:
            found[candidate.number] = candidate
    return tuple(found[number] for number in sorted(found))


def parse_mounts(mountinfo: str, own_cgroups: str) -> List[Hierarchy]:
    """Every mount of a whole cgroup hierarchy, in mountinfo's order; one hierarchy may come up several times.

    ``own_cgroups`` is /proc/self/cgroup: it alone has the hierarchies' numbers, and tells which of a v1
    mount's options are controllers.
    """
    v1 = [(number, controllers) for number, controllers, _ in _cgroup_lines(own_cgroups) if controllers]
    mounts: List[Hierarchy] = []
    for line in mountinfo.split("\n"):
        before, separator, after = line.partition(" - ")
        fields, source = before.split(" "), after.split(" ")
        if not separator or len(fields) < 6 or len(source) < 3 or unescape(fields[3]) != "/":
            continue
        major, _, minor = fields[2].partition(":")
        device = os.makedev(int(major), int(minor))
        mount_point = unescape(fields[4])
        if source[0] == "cgroup2":
            mounts.append(Hierarchy(HierarchyKind.V2, 0, (), mount_point, device))
        elif source[0] == "cgroup":
            options = set(source[2].split(","))
            for number, controllers in v1:
                if options.issuperset(controllers):
                    mounts.append(Hierarchy(HierarchyKind.V1, number, controllers, mount_point, device))
    return mounts


def parse_membership(text: str) -> Dict[int, str]:
    """/proc/PID/cgroup as hierarchy number -> path, without the cgroups that have been removed.

    A live cgroup whose name ends in " (deleted)" is taken for a removed one; nobody but its maker loses.
    """
    return {number: path for number, _, path in _cgroup_lines(text) if not path.endswith(_DELETED)}


def path_of_id(unified: Hierarchy, cgroup_id: int) -> Optional[str]:
    """The path in the v2 hierarchy of the cgroup with this 64-bit id; None if it has been removed.

    The handle is opened through our own mount, and both the mount's path and the cgroup's are then read
    back from the kernel, so it does not matter what the mount point is called, or bound over, elsewhere.
    Raises JobManagerError if the kernel refuses (CAP_DAC_READ_SEARCH is needed) or the mount is gone.
    """
    if not 0 < cgroup_id < 1 << 64:
        return None
    mount = open_root(unified)
    try:
        descriptor = _open_by_id(mount, cgroup_id, unified.mount_point)
        if descriptor is None:
            return None
        try:
            status = os.fstat(descriptor)
            base = os.readlink(f"/proc/self/fd/{mount}").rstrip("/")
            path = os.readlink(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    finally:
        os.close(mount)
    if path.endswith(_DELETED) or status.st_dev != unified.device:
        return None
    if status.st_ino != cgroup_id:
        return None
    if path == (base or "/"):
        return "/"
    if not path.startswith(base + "/"):
        raise JobManagerError(f"cgroup {cgroup_id} is at {path}, outside {base}")
    return path[len(base) :]


def open_root(hierarchy: Hierarchy) -> int:
    """A descriptor of the hierarchy's root directory. Raises JobManagerError if it is not mounted there any more."""
    return open_root_with_status(hierarchy)[0]


def open_root_with_status(hierarchy: Hierarchy) -> Tuple[int, os.stat_result]:
    """The same, and the fstat(2) of it that the check needs anyway."""
    try:
        descriptor = os.open(hierarchy.mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise JobManagerError(f"{hierarchy.mount_point}: {error.strerror}") from None
    status = os.fstat(descriptor)
    if status.st_dev != hierarchy.device:
        os.close(descriptor)
        raise JobManagerError(f"{hierarchy.mount_point}: cgroup hierarchy {hierarchy.label} is no longer mounted here")
    return descriptor, status


class _FileHandle(ctypes.Structure):
    """struct file_handle of open_by_handle_at(2) with an 8-byte handle."""

    _fields_ = (("handle_bytes", ctypes.c_uint), ("handle_type", ctypes.c_int), ("cgroup_id", ctypes.c_uint64))


@functools.lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _open_by_id(mount: int, cgroup_id: int, mount_point: str) -> Optional[int]:
    handle = _FileHandle(8, _FILEID_KERNFS, cgroup_id)
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    descriptor: int = _libc().open_by_handle_at(mount, ctypes.byref(handle), flags)
    if descriptor >= 0:
        return descriptor
    error = ctypes.get_errno()
    # ENOTDIR: the id of a file inside a cgroup, which no cgroup ever had.
    if error in (errno.ESTALE, errno.ENOTDIR):
        return None
    raise JobManagerError(f"{mount_point}: cgroup {cgroup_id} cannot be opened by its id: {os.strerror(error)}")


def _cgroup_lines(text: str) -> List[Tuple[int, Tuple[str, ...], str]]:
    lines = []
    for line in text.split("\n"):
        # Paths may hold ":"; the kernel lets no newline into a cgroup's name, so lines are safe.
        fields = line.split(":", 2)
        if len(fields) == 3 and fields[0].isdigit():
            controllers = tuple(fields[1].split(",")) if fields[1] else ()
            lines.append((int(fields[0]), controllers, fields[2]))
    return lines


def unescape(text: str) -> str:
    """A field of mountinfo as the path it stands for."""
    # fs/proc_namespace.c writes space, tab, newline, backslash and "#" as three octal digits, other bytes as they are.
    return _OCTAL.sub(lambda match: chr(int(match.group(1), 8)), text)


def _device_at(path: str) -> Optional[int]:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev if stat.S_ISDIR(status.st_mode) else None
