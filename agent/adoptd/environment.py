"""The environment that a process was started with, from /proc/PID/environ, and whose process it is.

Owns when it is believed: it must be the process that the caller holds, whole, and of the one uid it is read for; and
that nobody waits for one who does not let it be read. It must never be taken for more than that user's own word: a
process can write whatever it likes there. Called by callerid (the job hint) and by jobs.environment (the job
environment).
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections import Counter
from typing import ClassVar, Dict, FrozenSet, Optional, Set

from adoptd.process import ProcessHandle, uids_in

# An environment can take a quarter of the stack limit, 2 MiB by default (execve(2)). Larger is no job's.
ENVIRON_MAX_BYTES = 2 << 20
_STATUS_MAX_BYTES = 64 << 10
# The file is the process's memory, and whoever maps a FUSE file of their own can hold that locked for as long as they
# like (mmap_lock, while fuse_file_mmap() waits for their server). So it is read in a thread of its own, which is left
# behind when it is late: so many at once in all, so many for one user.
_READ_S = 0.2
READERS_MAX = 16
READERS_OF_ONE = 4
# Linux 5.9, the same number on every architecture; include/uapi/linux/close_range.h.
_SYS_CLOSE_RANGE, _CLOSE_RANGE_UNSHARE = 436, 1 << 1

# POSIX 8.1, with lower case, and what pam_adopt.so takes.
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_libc = ctypes.CDLL(None, use_errno=True)


def environment_of(process: ProcessHandle, uid: int, proc_root: str = "/proc") -> Optional[Dict[str, str]]:
    """The environment of ``process``, if all its uids are ``uid`` and it lived until it was read; else None.

    A name that is there twice is left out, as readers differ about which counts, and so is what is no NAME=value.
    Bytes that are not UTF-8 are kept (surrogateescape).
    """
    directory = f"{proc_root}/{process.pid}"
    if uids_of(process, proc_root) != frozenset((uid,)):
        return None
    data = _read_in_time(f"{directory}/environ", uid)
    # Asked after reading: while it lives, the pid was its own all along.
    return _parsed(data) if data is not None and process.alive() else None


def uids_of(process: ProcessHandle, proc_root: str = "/proc") -> Optional[FrozenSet[int]]:
    """The real, effective, saved and file system uid of ``process`` as a set; None if it has ended."""
    status = _read(f"{proc_root}/{process.pid}/status", _STATUS_MAX_BYTES)
    uids = None if status is None else uids_in(status)
    return frozenset(uids) if uids is not None and process.alive() else None


class _Reader(threading.Thread):
    """Reads one file of a process's memory, and ends."""

    # By uid.
    under_way: ClassVar[Counter[int]] = Counter()
    _lock = threading.Lock()

    def __init__(self, path: str, uid: int) -> None:
        super().__init__(name="environ", daemon=True)
        self._path = path
        self._uid = uid
        self.data: Optional[bytes] = None

    @classmethod
    def may_begin(cls, uid: int) -> bool:
        """Whether there is room for one more of the user's, which is counted until it ends."""
        with cls._lock:
            if cls.under_way[uid] >= READERS_OF_ONE or sum(cls.under_way.values()) >= READERS_MAX:
                return False
            cls.under_way[uid] += 1
            return True

    def run(self) -> None:
        try:
            # A table of descriptors of its own, and empty: a thread that hangs outlives even SIGKILL, and must not
            # keep the agent's sockets from the next agent. Without it (before Linux 5.9) it reads all the same.
            _libc.syscall(_SYS_CLOSE_RANGE, ctypes.c_uint(3), ctypes.c_uint(0xFFFFFFFF), _CLOSE_RANGE_UNSHARE)
            self.data = _read(self._path, ENVIRON_MAX_BYTES)
        finally:
            self.forget(self._uid)

    @classmethod
    def forget(cls, uid: int) -> None:
        """One has ended."""
        with cls._lock:
            cls.under_way[uid] -= 1
            if not cls.under_way[uid]:
                del cls.under_way[uid]


def _read_in_time(path: str, uid: int) -> Optional[bytes]:
    """The file as :func:`_read`; None also if that takes too long, or too many of the user's do already."""
    if not _Reader.may_begin(uid):
        return None
    reader = _Reader(path, uid)
    try:
        reader.start()
    except RuntimeError:  # no thread can be had
        _Reader.forget(uid)
        return None
    reader.join(_READ_S)
    return reader.data


def _parsed(data: bytes) -> Dict[str, str]:
    found: Dict[str, str] = {}
    twice: Set[str] = set()
    # What follows the last NUL was cut off, or overwritten by the process.
    for entry in data.split(b"\0")[:-1]:
        name, equals, value = entry.decode("utf-8", "surrogateescape").partition("=")
        if not equals or not NAME.fullmatch(name):
            continue
        if name in found:
            twice.add(name)
        found[name] = value
    return {name: value for name, value in found.items() if name not in twice}


def _read(path: str, max_bytes: int) -> Optional[bytes]:
    """The whole file; None if it cannot be read or is longer."""
    chunks = b""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        while len(chunks) <= max_bytes:
            chunk = os.read(descriptor, max_bytes + 1 - len(chunks))
            if not chunk:
                return chunks
            chunks += chunk
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None
