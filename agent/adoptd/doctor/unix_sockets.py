"""Who listens on which unix socket, by the kernel's word (unix_diag): nobody is connected to.

/proc/net/unix is not read for it: it shows names as they were bound, line feeds and all, so any user can write rows of
their own into it. Sees the network namespace of whoever asks. Changes nothing. Called by the looks at
the agent's sockets and at Slurm's steps.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Dict, Optional, Tuple

from adoptd.connections.netlink import NLM_F_DUMP, ask, ask_one, attributes
from adoptd.deadline import Deadline
from adoptd.doctor.processes import PROC, link
from adoptd.model import ProtocolError

# include/uapi/linux/netlink.h, sock_diag.h, unix_diag.h; state as in net/tcp_states.h.
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_SHOW_NAME, _SHOW_VFS, _NAME, _VFS = 1, 2, 0, 1
_ANY_STATE, _ANY_COOKIE, _LISTEN = 0xFFFFFFFF, 0xFFFFFFFF, 10
_QUESTION = struct.Struct("=BBHIIIII")  # struct unix_diag_req
_ANSWER = struct.Struct("=BBBBIII")  # struct unix_diag_msg
_FILE = struct.Struct("=II")  # struct unix_diag_vfs
_ASK_MS, _ASK_ALL_MS = 200.0, 1_000.0
_DESCRIPTORS_MAX = 256


def listens_at(pid: int, proc: Path = PROC) -> Optional[str]:
    """The path of the first unix socket that it listens on, "" if there is none, None if the kernel does not tell."""
    deadline = Deadline.after_ms(_ASK_MS)
    try:
        with socket.socket(socket.AF_UNIX) as ours:
            # What the kernel has no module for and what is no unix socket have one number.
            _ask(os.fstat(ours.fileno()).st_ino, deadline)
        links = [link(proc / str(pid) / "fd" / name) for name in os.listdir(proc / str(pid) / "fd")[:_DESCRIPTORS_MAX]]
        for each in links:
            path = _path_of(int(each[len("socket:[") : -1]), deadline) if each.startswith("socket:[") else ""
            if path:
                return path
    except (OSError, ProtocolError):
        return None
    return ""


def _path_of(inode: int, deadline: Deadline) -> str:
    """Where this socket was bound to; "" if it has no path, does not listen, or is no unix socket."""
    try:
        answer = _ask(inode, deadline)
    except FileNotFoundError:
        return ""
    _, _, state, _, told, _, _ = _ANSWER.unpack_from(answer)
    name = attributes(answer[_ANSWER.size :]).get(_NAME, b"")
    # An abstract name begins with a NUL.
    return os.fsdecode(name.rstrip(b"\0")) if (told, state) == (inode, _LISTEN) and name.startswith(b"/") else ""


def _ask(inode: int, deadline: Deadline) -> bytes:
    """Raises OSError, FileNotFoundError where there is no such socket, and ProtocolError."""
    body = _QUESTION.pack(socket.AF_UNIX, 0, 0, _ANY_STATE, inode, _SHOW_NAME, _ANY_COOKIE, _ANY_COOKIE)
    answer = ask_one(_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, body, _SOCK_DIAG_BY_FAMILY, deadline)
    if len(answer) < _ANSWER.size:
        raise ProtocolError(f"the kernel's word on a unix socket has {len(answer)} bytes")
    return answer


def bound_as(path: str) -> Tuple[int, int]:
    """A file as unix_diag names it: its device in the kernel's form, and 32 bits of its inode."""
    try:
        found = os.lstat(path)
    except OSError:
        return 0, 0
    return os.major(found.st_dev) << 20 | os.minor(found.st_dev), found.st_ino & 0xFFFFFFFF


def listening() -> Optional[Dict[Tuple[int, int], int]]:
    """The inodes of the unix sockets that listen, by the file that they are bound to; None where it cannot be told."""
    body = _QUESTION.pack(socket.AF_UNIX, 0, 0, 1 << _LISTEN, 0, _SHOW_VFS, _ANY_COOKIE, _ANY_COOKIE)
    kind, deadline = _SOCK_DIAG_BY_FAMILY, Deadline.after_ms(_ASK_ALL_MS)
    found: Dict[Tuple[int, int], int] = {}
    try:
        for answer in ask(_NETLINK_SOCK_DIAG, kind, body, kind, deadline, NLM_F_DUMP):
            bound = attributes(answer[_ANSWER.size :]).get(_VFS)
            if bound is not None:
                file, device = _FILE.unpack_from(bound)
                found[device, file] = _ANSWER.unpack_from(answer)[4]
    except (OSError, ProtocolError, struct.error):
        return None
    return found
