"""Finding bpffs and the cgroup2 root on this host, and mounting what is missing.

Owns the reading of /proc/self/mountinfo (proc(5)) and the two mounts the probe may make: bpffs over an
empty directory, and a private cgroup2 that is gone from the mount table at once. Must never mount over
something in use. Called by the pin store and the loader.
"""

from __future__ import annotations

import ctypes
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Optional, Tuple

from adoptd.hierarchy import unescape
from adoptd.model import ProbeError

_MOUNTINFO = Path("/proc/self/mountinfo")
# The first node of every kernfs hierarchy (fs/kernfs/dir.c, 5.5): tells the real root from a subtree shown as one.
_CGROUP_ROOT_INODE = 1
# umount2(2)
_MNT_DETACH = 2
# mount(2)
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo. ``root``: which directory of the filesystem is mounted, ``/`` for all of it."""

    device: Tuple[int, int]
    root: str
    point: str
    fstype: str


def mounts() -> Iterator[Mount]:
    """The mounts of this process's mount namespace, oldest first. Raises ProbeError if /proc does not tell."""
    try:
        # Not splitlines(): to it a form feed ends a line too, and with FUSE any user names a mount point.
        lines = _MOUNTINFO.read_text("utf-8", "surrogateescape").split("\n")
    except OSError as error:
        raise ProbeError(f"{_MOUNTINFO}: cannot be read: {error.strerror}") from None
    for line in lines:
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) < 5:
            continue
        major, _, minor = fields[2].partition(":")
        yield Mount((int(major), int(minor)), unescape(fields[3]), unescape(fields[4]), right.split(" ")[0])


def filesystem_of(fd: int) -> Optional[str]:
    """The type of the filesystem an open file is on, None if its mount is not in this namespace."""
    number = os.fstat(fd).st_dev
    device = (os.major(number), os.minor(number))
    return next((mount.fstype for mount in mounts() if mount.device == device), None)


def is_on_bpffs(directory: Path) -> bool:
    """Whether ``directory`` exists and is on bpffs. A symbolic link is not followed."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return filesystem_of(fd) == "bpf"
    finally:
        os.close(fd)


def mount_bpffs(directory: Path) -> None:
    """Mount bpffs on ``directory``, mode 0700 as systemd does it.

    Raises ProbeError unless it is an empty directory of root's: a mount hides what is under it.
    """
    try:
        status = os.lstat(directory)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != 0 or os.listdir(directory):
            raise ProbeError(f"{directory}: is not on bpffs, nor an empty directory of root's to mount one on")
        _mount("bpf", directory, "bpf", "mode=0700")
    except OSError as error:
        raise ProbeError(f"{directory}: cannot mount bpffs there: {error.strerror}") from None


def open_cgroup_root() -> int:
    """A descriptor of the root of the cgroup-v2 hierarchy, which the caller closes.

    Where none is mounted (hosts with v1 only), or only a subtree is to be seen, mounts a private one for
    the time of the call. Raises ProbeError if there is no way to it.
    """
    for mount in mounts():
        if mount.fstype == "cgroup2" and mount.root == "/":
            fd = _open_root(mount.point)
            if fd is not None:
                return fd
    return _open_private_cgroup_root()


def _open_root(point: str) -> Optional[int]:
    try:
        fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    # The file type too: the mount may be hidden by a later one on the same point.
    if os.fstat(fd).st_ino == _CGROUP_ROOT_INODE and filesystem_of(fd) == "cgroup2":
        return fd
    os.close(fd)
    return None


def _open_private_cgroup_root() -> int:
    point = Path(tempfile.mkdtemp(prefix="adoptd-cgroup2-"))
    try:
        _mount("adoptd", point, "cgroup2", None)
        try:
            fd = _open_root(str(point))
        finally:
            _libc.umount2(os.fsencode(point), _MNT_DETACH)
    except OSError as error:
        raise ProbeError(f"no cgroup2 is mounted and mounting one fails: {error.strerror}") from None
    finally:
        point.rmdir()
    if fd is None:
        raise ProbeError("the root of the cgroup-v2 hierarchy cannot be reached: this is inside a cgroup namespace")
    return fd


def _mount(source: str, target: Path, fstype: str, options: Optional[str]) -> None:
    data = None if options is None else options.encode()
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    if _libc.mount(source.encode(), os.fsencode(target), fstype.encode(), flags, data) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(target))
