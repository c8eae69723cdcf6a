"""The directory on bpffs that holds the pinned probe: who may be trusted with it, who may change it.

Owns its checks, its lock and the removal of what is in it. The directory is root's alone (0700), on bpffs
and no symbolic link; anything else is refused, since whoever can write there can pass off another map as
ours. Everything below it is reached through its descriptor, so it cannot be swapped after the check.
Called by the pins (to read) and by the loader (to change).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from pathlib import Path
from typing import Collection, Iterator, List, Optional

from adoptd.deadline import Deadline
from adoptd.model import ProbeError
from adoptd.probe import mounts, syscalls
from adoptd.probe.sources import is_schema

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# How often to try for a lock that another loader holds.
_LOCK_POLL_S = 0.02
# Mounting takes no time; whoever holds this lock longer is stuck.
_MOUNT_LOCK_MS = 10_000
# Names of directories that are being filled or emptied. Not a schema, so never opened by an agent.
_UNFINISHED = "unfinished_"


class MissingProbe(ProbeError):
    """There is nothing pinned here: the probe is not loaded, as opposed to broken."""


def open_trusted(name: str, shown: str, parent_fd: Optional[int] = None) -> int:
    """Open directory ``name`` (in ``parent_fd``), which the caller closes; ``shown`` is its name in messages.

    Raises MissingProbe if it does not exist, ProbeError if it is not a directory of mode 0700 on bpffs
    that belongs to root.
    """
    try:
        fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=parent_fd)
    except FileNotFoundError:
        raise MissingProbe(f"{shown}: does not exist: the probe is not loaded") from None
    except OSError as error:
        with contextlib.suppress(OSError):
            if stat.S_ISLNK(os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode):
                raise ProbeError(f"{shown}: is a symbolic link, expected a directory") from None
        raise ProbeError(f"{shown}: cannot be opened as a directory: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid != 0 or mode != 0o700:
            raise ProbeError(f"{shown}: has owner {status.st_uid} and mode {mode:04o}, expected owner 0 and mode 0700")
        found = mounts.filesystem_of(fd)
        if found != "bpf":
            raise ProbeError(f"{shown}: is on {found or 'an unknown filesystem'}, expected bpf")
    except ProbeError:
        os.close(fd)
        raise
    return fd


def make(pin_dir: Path) -> None:
    """Make ``pin_dir``, mounting bpffs on its parent if there is none. One that exists is left as it is."""
    if mounts.is_on_bpffs(pin_dir):
        return
    parent = pin_dir.parent
    if not mounts.is_on_bpffs(parent):
        with _lock_of(parent, Deadline.after_ms(_MOUNT_LOCK_MS)):
            # Another loader may have been faster: two mounts on one point would hide each other's pins.
            if not mounts.is_on_bpffs(parent):
                mounts.mount_bpffs(parent)
    try:
        os.mkdir(pin_dir, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ProbeError(f"{pin_dir}: cannot be made: {error.strerror}") from None


@contextlib.contextmanager
def locked(pin_dir: Path, deadline: Deadline) -> Iterator[int]:
    """Hold ``pin_dir`` against other loaders; gives its descriptor, checked by :func:`open_trusted`.

    Raises ProbeError if it is not had by ``deadline``, and as open_trusted does.
    """
    while True:
        fd = open_trusted(str(pin_dir), str(pin_dir))
        try:
            _flock(fd, str(pin_dir), deadline)
            # Whoever had the lock before may have removed the directory: then this is not it any more.
            if _is_same(fd, pin_dir):
                yield fd
                return
        finally:
            os.close(fd)


def schemas(directory: int) -> List[str]:
    """The schemas pinned in the directory, sorted. Raises ProbeError."""
    try:
        return sorted(name for name in os.listdir(directory) if is_schema(name))
    except OSError as error:
        raise ProbeError(f"the directory of the probe's pins cannot be listed: {error.strerror}") from None


def begin(directory: int) -> str:
    """Make an empty directory to be filled and then put in place by :func:`finish`. Returns its name."""
    name = f"{_UNFINISHED}{os.getpid()}"
    os.mkdir(name, 0o700, dir_fd=directory)
    return name


def finish(directory: int, name: str, schema: str) -> None:
    """Put ``name`` in place under its schema, at once. A broken one there is moved away first, not mixed."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(schema, f"{_UNFINISHED}old_{os.getpid()}", src_dir_fd=directory, dst_dir_fd=directory)
    os.rename(name, schema, src_dir_fd=directory, dst_dir_fd=directory)


def sweep(directory: int, keep: Collection[str]) -> None:
    """Detach and remove everything of ours but ``keep``: other schemas, and what a killed loader left."""
    for name in os.listdir(directory):
        if name not in keep and (is_schema(name) or name.startswith(_UNFINISHED)):
            remove(directory, name)


def remove(directory: int, name: str) -> None:
    """Detach and remove what is pinned in subdirectory ``name``, and the subdirectory."""
    fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=directory)
    try:
        for pin in os.listdir(fd):
            _detach(f"/proc/self/fd/{fd}/{pin}")
            os.unlink(pin, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=directory)


def remove_store(pin_dir: Path) -> None:
    """Remove the empty ``pin_dir``. One that is a mount point, or holds things of others, stays."""
    try:
        os.rmdir(pin_dir)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise


def _detach(pin: str) -> None:
    # Unpinning detaches too, but from a work queue, some time later: this way unload means detached.
    with contextlib.suppress(OSError):
        fd = syscalls.obj_get(pin)
        try:
            if syscalls.kind_of(fd) == "bpf-link":
                syscalls.link_detach(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _lock_of(directory: Path, deadline: Deadline) -> Iterator[None]:
    try:
        fd = os.open(directory, _DIRECTORY_FLAGS)
    except OSError as error:
        raise ProbeError(f"{directory}: cannot be opened as a directory: {error.strerror}") from None
    try:
        _flock(fd, str(directory), deadline)
        yield
    finally:
        os.close(fd)


def _flock(fd: int, shown: str, deadline: Deadline) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if deadline.expired:
                raise ProbeError(f"{shown}: locked by another loader for too long") from None
            time.sleep(min(_LOCK_POLL_S, deadline.remaining_s()))


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def expect(shown: str, found: object, expected: object) -> None:
    """Raises ProbeError if the thing ``shown`` is not as it must be."""
    if found != expected:
        raise ProbeError(f"{shown}: is {found}, expected {expected}")
