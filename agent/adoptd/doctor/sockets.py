"""The doctor's look at the agent's sockets and the directory around them: whose they are, and who answers there.

Owns the table of what each has to be. Who listens it has from the kernel: nobody is connected to, but the users' socket
where the agent is not found by its lock. Changes nothing. Called through the table of checks.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Optional, Tuple

from adoptd.client import AgentError, ask_agent
from adoptd.doctor.files import judge_directory
from adoptd.doctor.findings import (
    FileRule,
    Finding,
    Scene,
    TookTooLong,
    failure,
    fault_of,
    ok,
    status_of,
    warning,
    within,
)
from adoptd.doctor.processes import agent_pid, holders_of, names_of
from adoptd.doctor.unix_sockets import bound_as, listening
from adoptd.doors import PAM_MODE, USER_MODE
from adoptd.wire.control import Command

_ANEW = "systemctl stop adoptd; systemctl restart adoptd.socket adoptd-user.socket; systemctl start adoptd"
# Beside the sockets: sessions and logins in progress, for the agent that comes next.
_KEPT = ("sessions", "logins")
_KEPT_RULE = FileRule("a directory", 0o077, stat.S_ISDIR)
_INIT = 1
_ANSWER_S = 1.0


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
    locked = agent_pid(agent.pam_socket)
    # Who changes pam_socket in the files, or removes the lock, has an agent that nobody finds by it.
    ours = answering(agent.user_socket) if locked is None and scene.root else locked
    for check, path, mode in (
        ("pam_socket", agent.pam_socket, PAM_MODE),
        ("user_socket", agent.user_socket, USER_MODE),
    ):
        status = status_of(path)
        above = Path(path).parent
        if not scene.root and status_of(str(above)) is not None and not os.access(above, os.X_OK):
            yield warning(check, f"{above}: only root can look into it", "sudo adoptd doctor")
            continue
        yield from judge_socket(check, path, status, mode)
        if status is not None and stat.S_ISSOCK(status[0]) and listeners is not None:
            inode = listeners.get(bound_as(path))
            holders = () if inode is None else holders_of((inode,)).get(inode, ())
            yield from judge_listener(check, path, inode is not None, holders, ours)
            if check == "pam_socket" and locked is None and ours in holders:
                yield from judge_lock(path, ours)
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
        above = Path(path).parent
        hides = (
            f"findmnt {above}: what is mounted there hides what was; umount {above} if it is not meant to be; "
            if above.is_mount()
            else ""
        )
        yield failure(check, f"{path} is missing: nobody is asked there", hides + _ANEW, cause="agent")
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


def judge_lock(path: str, ours: Optional[int]) -> Iterator[Finding]:
    """``ours`` is the agent, which nobody holds the lock of that is beside the socket."""
    seen = f"{path}.lock is not the one that the agent (pid {ours}) holds: a second agent could take its sockets"
    yield warning("pam_socket", seen, "it was removed or replaced: systemctl restart adoptd")


def answering(path: str) -> Optional[int]:
    """The agent's pid by its own word at the users' socket, which only root is believed; None if there is none."""
    try:
        said = within(_ANSWER_S, lambda: ask_agent(path, Command("configuration", {})))
    except (AgentError, TookTooLong, RuntimeError):
        return None
    pid = said.get("pid")
    return pid if isinstance(pid, int) else None


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
