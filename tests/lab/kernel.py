"""The few system calls that Python 3.9 has no name for: namespaces, mounts, prctl.

Owns the constants and the error handling, and no policy. Safe to call between fork and exec: libc
is opened at import, and no call allocates anything but its error. Called by the node's runner, by
everything that starts a process in a node, and by the demo's supervisor.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Optional

# include/uapi/linux/sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWNET = 0x40000000

# include/uapi/linux/nsfs.h: _IOR(0xb7, 13, __u64), since 6.18
NS_GET_ID = 0x8008B70D

# include/uapi/linux/mount.h
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

# include/uapi/linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """unshare(2). Raises OSError."""
    _check(_libc.unshare(flags), f"unshare({flags:#x})")


def setns(namespace_fd: int, kind: int) -> None:
    """setns(2): ``kind`` is the CLONE_NEW* the descriptor must be of. Raises OSError."""
    _check(_libc.setns(namespace_fd, kind), f"setns({kind:#x})")


def namespace_id(kind: str) -> Optional[int]:
    """The number of our namespace of this kind ("mnt", "uts"...); None where the kernel does not tell."""
    number = ctypes.c_uint64()
    with open(f"/proc/self/ns/{kind}", "rb") as file:
        if _libc.ioctl(file.fileno(), ctypes.c_ulong(NS_GET_ID), ctypes.byref(number)) != 0:
            return None
    return number.value


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2). Raises OSError naming source and target."""
    arguments = [text.encode() for text in (source, target, kind)]
    result = _libc.mount(*arguments, ctypes.c_ulong(flags), data.encode())
    _check(result, f"mount {source} on {target}")


def unmount(target: str) -> None:
    """umount2(2), lazily. Raises OSError naming the target."""
    _check(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def set_hostname(name: str) -> None:
    """sethostname(2), for the UTS namespace of the caller. Raises OSError."""
    encoded = name.encode()
    _check(_libc.sethostname(encoded, len(encoded)), f"sethostname {name}")


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send this process ``signal_number`` when its parent ends.

    A change of uid clears the wish (prctl(2)), so call it after setuid.
    """
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def adopt_orphans() -> None:
    """Make this process the reaper of its descendants' orphans (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")


def start_time_ticks(pid: int) -> Optional[int]:
    """Start time of a process in clock ticks since boot (proc(5), stat field 22); None when it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # comm may hold spaces and parentheses, so the fields are counted from its last closing one.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def crypt_sha512(password: str, salt: str) -> str:
    """crypt(3) with SHA-512. The standard library's crypt module is gone in Python 3.13.

    Raises OSError if libcrypt (which PAM itself needs) cannot be loaded.
    """
    if not re.fullmatch(r"[A-Za-z0-9./]{8,16}", salt):
        raise ValueError(f"salt {salt!r} is not 8 to 16 of A-Z a-z 0-9 . /")
    library = ctypes.CDLL("libcrypt.so.1", use_errno=True)
    library.crypt.restype = ctypes.c_char_p
    hashed: Optional[bytes] = library.crypt(password.encode(), f"$6${salt}$".encode())
    if not hashed or not hashed.startswith(b"$6$"):
        raise OSError("crypt(3) does not do SHA-512 here")
    return hashed.decode()
