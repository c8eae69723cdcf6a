"""The doctor's look at the agent's sockets and the directory around them: whose they are, and who answers there.

Owns the table of what each has to be, and the question to the kernel who listens (unix_diag): nobody is connected to.
Changes nothing. Called through the table of checks.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, Optional, Tuple

from adoptd.connections.netlink import NLM_F_DUMP, ask, attributes
from adoptd.deadline import Deadline
from adoptd.doctor.files import judge_directory
from adoptd.doctor.findings import FileRule, Finding, Scene, failure, fault_of, ok, status_of, warning
from adoptd.doctor.processes import agent_pid, holders_of, names_of
from adoptd.doors import PAM_MODE, USER_MODE
from adoptd.model import ProtocolError

_ANEW = "systemctl stop adoptd; systemctl restart adoptd.socket adoptd-user.socket; systemctl start adoptd"
# Beside the sockets: sessions and logins in progress, for the agent that comes next.
_KEPT = ("sessions", "logins")
_KEPT_RULE = FileRule("a directory", 0o077, stat.S_ISDIR)
_INIT = 1
# linux/sock_diag.h; linux/unix_diag.h: struct unix_diag_req, unix_diag_msg and unix_diag_vfs.
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_QUESTION, _ANSWER, _VFS = struct.Struct("=BBHIIIII"), struct.Struct("=4sI8x"), struct.Struct("=II")
_LISTENING = 1 << 10
_SHOW_VFS, _ATTRIBUTE_VFS = 2, 1
_DIAG_MS = 1_000.0


@dataclass(frozen=True)
class Place:
    """A file system with room, or not."""

    blocks: int
    inodes: int
    read_only: bool


def look_at_sockets(scene: Scene) -> Iterator[Finding]:
    """Where sshd and users ask."""
    agent = scene.settings.agent
    listeners = listening() if scene.root else None
    ours = agent_pid(agent.pam_socket)
    for check, path, mode in (
        ("pam_socket", agent.pam_socket, PAM_MODE),
        ("user_socket", agent.user_socket, USER_MODE),
    ):
        status = status_of(path)
        found = list(judge_socket(check, path, status, mode))
        yield from found
        if status is not None and stat.S_ISSOCK(status[0]) and listeners is not None:
            inode = listeners.get(identity(path))
            holders = () if inode is None else holders_of((inode,)).get(inode, ())
            yield from judge_listener(check, path, inode is not None, holders, ours)
    for directory in dict.fromkeys(str(Path(path).parent) for path in (agent.pam_socket, agent.user_socket)):
        yield from judge_directory("run_directory", directory, status_of(directory))
        mode_there = status_of(directory)
        if mode_there is not None and not stat.S_IMODE(mode_there[0]) & 0o001:
            seen = f"{directory} has mode {stat.S_IMODE(mode_there[0]):04o}: users cannot reach {agent.user_socket}"
            yield warning("run_directory", seen, f"chmod 0755 {directory}")
    if ours is not None and scene.root:
        beside = Path(agent.pam_socket).parent
        for kept in (str(beside / name) for name in _KEPT):
            yield from judge_kept(kept, status_of(kept))
        yield from judge_place(str(beside), _place(beside))


def judge_socket(check: str, path: str, status: Optional[Tuple[int, int]], mode: int) -> Iterator[Finding]:
    """A socket of root's with exactly this mode."""
    if status is None:
        yield failure(check, f"{path} is missing: nobody is asked there", _ANEW, cause="agent")
        return
    found, owner = status
    if not stat.S_ISSOCK(found):
        yield failure(check, f"{path} is no socket: nobody is asked there", f"find out whose it is; rm {path}; {_ANEW}")
    elif owner != 0 or stat.S_IMODE(found) != mode:
        seen = f"{path} is of uid {owner}, mode {stat.S_IMODE(found):04o}, expected root's and mode {mode:04o}"
        yield failure(check, seen, f"find out who changed it; rm {path}; {_ANEW}")
    else:
        yield ok(check, f"{path} is a socket of root, mode {mode:04o}")


def judge_listener(
    check: str, path: str, listened: bool, holders: Tuple[int, ...], ours: Optional[int]
) -> Iterator[Finding]:
    """``holders`` have the socket open that listens there; ``ours``: the agent, None if none runs."""
    if not listened:
        seen = f"{path}: nobody listens there, as on one that a killed agent left: who asks is refused at once"
        yield failure(check, seen, _ANEW, cause="agent")
    elif holders and not {ours, _INIT} & set(holders):
        seen = f"{path}: {names_of(holders)} listens there, and not the agent: it decides who gets in"
        yield failure(check, seen, f"end it; rm {path}; {_ANEW}")


def judge_kept(path: str, status: Optional[Tuple[int, int]]) -> Iterator[Finding]:
    """What an agent that is started next goes by; this one has it in its memory."""
    fault = fault_of(status, _KEPT_RULE)
    if fault is not None:
        seen = f"{path} {fault}: after a restart the agent does not know the sessions that are open"
        yield warning("run_directory", seen, f"install -d -m 0700 -o root {path}; systemctl restart adoptd")


def judge_place(path: str, place: Optional[Place]) -> Iterator[Finding]:
    """Whether anything can be written there."""
    if place is None:
        return
    for is_so, what in (
        (place.read_only, "is read-only"),
        (place.blocks == 0, "is full"),
        (place.inodes == 0, "has no inode left"),
    ):
        if is_so:
            seen = f"{path}: its file system {what}: sessions are not kept, and a restarted agent has no socket"
            yield failure("run_directory", seen, f"df {path}; df -i {path}; findmnt -T {path}")
            return


def _place(path: Path) -> Optional[Place]:
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    # A file system without a number of blocks or inodes has no end of them.
    blocks = found.f_bfree if found.f_blocks else 1
    inodes = found.f_ffree if found.f_files else 1
    return Place(blocks, inodes, bool(found.f_flag & os.ST_RDONLY))


def identity(path: str) -> Tuple[int, int]:
    """A file as unix_diag names it: its device in the kernel's form, and 32 bits of its inode."""
    try:
        found = os.lstat(path)
    except OSError:
        return 0, 0
    return os.major(found.st_dev) << 20 | os.minor(found.st_dev), found.st_ino & 0xFFFFFFFF


def listening() -> Optional[Dict[Tuple[int, int], int]]:
    """The inodes of the unix sockets that listen, by the file that they are bound to; None where it cannot be told."""
    question = _QUESTION.pack(socket.AF_UNIX, 0, 0, _LISTENING, 0, _SHOW_VFS, 0, 0)
    found: Dict[Tuple[int, int], int] = {}
    try:
        for answer in ask(
            _NETLINK_SOCK_DIAG,
            _SOCK_DIAG_BY_FAMILY,
            question,
            _SOCK_DIAG_BY_FAMILY,
            Deadline.after_ms(_DIAG_MS),
            NLM_F_DUMP,
        ):
            bound = attributes(answer[_ANSWER.size :]).get(_ATTRIBUTE_VFS)
            if bound is not None:
                file, device = _VFS.unpack_from(bound)
                found[device, file] = _ANSWER.unpack_from(answer)[1]
    except (OSError, ProtocolError, struct.error):
        return None
    return found
