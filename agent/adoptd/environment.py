"""The environment that a process was started with, from /proc/PID/environ.

Owns when it is believed: it must be the process that the caller holds, whole, and of the one uid it is read for. It
must never be taken for more than that user's own word: a process can write whatever it likes there. Called by
callerid (the job hint) and by jobs.environment (the job environment).
"""

from __future__ import annotations

import os
import re
from typing import Dict, Optional, Set

from adoptd.process import ProcessHandle

# An environment can take a quarter of the stack limit, 2 MiB by default (execve(2)). Larger is no job's.
ENVIRON_MAX_BYTES = 2 << 20
_STATUS_MAX_BYTES = 64 << 10

# POSIX 8.1, with lower case, and what pam_adopt.so takes.
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_UIDS = re.compile(rb"^Uid:\t(\d+)\t(\d+)\t(\d+)\t(\d+)$", re.MULTILINE)


def environment_of(process: ProcessHandle, uid: int, proc_root: str = "/proc") -> Optional[Dict[str, str]]:
    """The environment of ``process``, if all its uids are ``uid`` and it lived until it was read; else None.

    A name that is there twice is left out, as readers differ about which counts, and so is what is no NAME=value.
    Bytes that are not UTF-8 are kept (surrogateescape).
    """
    directory = f"{proc_root}/{process.pid}"
    status = _read(f"{directory}/status", _STATUS_MAX_BYTES)
    data = _read(f"{directory}/environ", ENVIRON_MAX_BYTES)
    if status is None or data is None:
        return None
    uids = _UIDS.search(status)
    if uids is None or {int(each) for each in uids.groups()} != {uid}:
        return None
    # Asked after reading: while it lives, the pid was its own all along.
    return _parsed(data) if process.alive() else None


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
