"""What the doctor says: findings, how bad they are, and the checks that make them, kept from harming each other.

Owns the fence around a check: what it raises is a finding that names it, and one that does not come back is left
where it hangs. Looks at nothing itself. Used by every module of this package.
"""

from __future__ import annotations

import enum
import os
import stat
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Collection, Generic, Iterable, List, Optional, Sequence, Tuple, TypeVar

from adoptd.config import Config

_T = TypeVar("_T")
_TURN_S = 0.0005
_COMMAND_MAX = 80
_MADE_UP = ("/proc/", "/sys/")
_PACKAGE = f"{os.sep}adoptd{os.sep}"


class Grade(enum.Enum):
    """How bad a finding is; the exit status is that of the worst."""

    OK = 0
    WARNING = 1
    FAILURE = 2


@dataclass(frozen=True)
class Finding:
    """What one check saw, and what to do about it (empty where there is nothing to do).

    ``cause``: the check whose failure, where it fails, is all that there is to mend.
    """

    check: str
    grade: Grade
    seen: str
    remedy: str = ""
    cause: str = ""


@dataclass(frozen=True)
class Scene:
    """What is looked at. ``settings`` are of ``file``; ``root``: whether we may look everywhere.

    ``peers`` are nodes to ask. ``deep`` allows what touches a job or compiles: a process of our own in a job, and
    gone at once, and a probe beside the one in use. ``timeout_s``: when a check is given up.
    """

    file: Path
    settings: Config
    pam_directory: Path
    service: str
    peers: Tuple[str, ...] = ()
    deep: bool = False
    root: bool = True
    timeout_s: float = 4.5


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    name: str
    look: Callable[[Scene], Iterable[Finding]]


def ok(check: str, seen: str) -> Finding:
    """All is as it should be."""
    return Finding(check, Grade.OK, seen)


def warning(check: str, seen: str, remedy: str, cause: str = "") -> Finding:
    """Logins work, but not as the administrator may expect, or not for ever."""
    return Finding(check, Grade.WARNING, seen, remedy, cause)


def failure(check: str, seen: str, remedy: str, cause: str = "") -> Finding:
    """Logins are refused that should not be, or let in that should not be, or adopted into nothing."""
    return Finding(check, Grade.FAILURE, seen, remedy, cause)


def worst(findings: Sequence[Finding]) -> Grade:
    """The worst grade there is."""
    found: Optional[Grade] = max((finding.grade for finding in findings), key=lambda grade: grade.value, default=None)
    return Grade.OK if found is None else found


class TookTooLong(Exception):
    """A call did not come back in time. It goes on in its thread, which ends with the process.

    Its text is the file that is waited for, "" where that is not known.
    """


class _Call(Generic[_T]):
    """A call in a thread of its own. A library that hangs can be abandoned, and not ended."""

    def __init__(self, call: Callable[[], _T]) -> None:
        self._call = call
        self._result: List[_T] = []
        self._error: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            # No more threads may be had here (pids.max, ulimit).
            self._error = error

    def _run(self) -> None:
        try:
            self._result.append(self._call())
        except BaseException as error:
            self._error = error

    def place(self) -> str:
        """The innermost lines that it is at now, for whoever has to find out why it hangs."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        lines = traceback.extract_stack(frame)[-3:] if frame is not None else []
        return " > ".join(f"{Path(line.filename).name}:{line.lineno} {line.name}" for line in lines)

    def awaited(self) -> Tuple[str, str]:
        """The file, and the command, that it waits for now; "" where that is not known."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        while frame is not None:
            # "self" of Path.open() is the path.
            for value in list(frame.f_locals.values()):
                if isinstance(value, subprocess.Popen):
                    words = value.args if isinstance(value.args, (list, tuple)) else [value.args]
                    return "", " ".join(map(str, words)).strip()[:_COMMAND_MAX]
                if isinstance(value, Path) or (isinstance(value, str) and value.startswith("/")):
                    # What the kernel makes up is slow at worst.
                    return ("" if f"{value}/".startswith(_MADE_UP) else str(value)), ""
            # Further out is what it was called for, and not what it waits for.
            frame = frame.f_back if _PACKAGE not in frame.f_code.co_filename else None
        return "", ""

    def result(self, within_s: float) -> _T:
        """Raises what the call raised, or TookTooLong."""
        if self._thread.ident is not None:
            self._thread.join(max(within_s, 0.0))
        if self._error is not None:
            raise self._error
        if not self._result:
            raise TookTooLong
        return self._result[0]


def within(limit_s: float, call: Callable[[], _T]) -> _T:
    """What ``call`` returns. Raises what it raises, or TookTooLong, which names the file that it waits for."""
    running = _Call(call)
    try:
        return running.result(limit_s)
    except TookTooLong:
        raise TookTooLong(running.awaited()[0]) from None


def run_checks(checks: Sequence[Check], scene: Scene) -> List[Finding]:
    """What all of ``checks`` say, in their order. They run at once; none can stop another, nor this from returning."""
    turn_s = sys.getswitchinterval()
    # After each of thousands of small files in /proc a check waits for its turn, while another may be busy.
    sys.setswitchinterval(min(turn_s, _TURN_S))
    try:
        return _run_checks(checks, scene)
    finally:
        sys.setswitchinterval(turn_s)


def _run_checks(checks: Sequence[Check], scene: Scene) -> List[Finding]:
    started_s = time.monotonic()
    running: List[Tuple[Check, List[Finding], _Call[None]]] = []
    for check in checks:
        found: List[Finding] = []
        running.append((check, found, _Call(_collector(check, scene, found))))
    findings: List[Finding] = []
    for check, found, call in running:
        try:
            call.result(started_s + scene.timeout_s - time.monotonic())
            findings.extend(found)
        except TookTooLong:
            findings.extend((*found, given_up(check.name, scene.timeout_s, *call.awaited(), call.place())))
        except Exception as error:
            # Whatever it was: on a broken system any check may meet what nobody thought of.
            seen = f"the check itself failed: {type(error).__name__}: {error}"
            remedy = "what it looks at is broken, or adoptd has a defect"
            if isinstance(error, (RuntimeError, MemoryError)):
                remedy = "memory or processes are short here: ulimit -a; pids.max and memory.max of this shell's cgroup"
            findings.extend((*found, failure(check.name, seen, remedy)))
    return findings


def given_up(check: str, after_s: float, file: str, command: str, place: str) -> Finding:
    """What is said of a check that did not come back. ``place``: where in our own code it waits."""
    if file:
        seen = f"{file} does not answer (waited for {after_s:g} s): a pipe, or on a file server that is away?"
        return failure(check, seen, f"ls -l {file}; findmnt -T {file}; whatever reads it hangs as well")
    if command:
        remedy = f"run it by hand: {command}; if it only is slow: adoptd doctor --timeout 30"
        return failure(check, f"not done after {after_s:g} s: {command}", remedy)
    seen = f"not known after {after_s:g} s: what it asks hangs, or all is slow ({place})"
    return failure(check, seen, _HANGS.get(check, _HANGS[""]))


# What a check waits for that can hang, where it is always the same.
_HANGS = {
    "": "adoptd doctor --timeout 30; look at what the node waits for: ps -eo pid,stat,wchan:30,args | grep ' D'",
    "seal": "munged hangs: systemctl restart munge",
    "agent": "the agent takes commands and does not answer: systemctl restart adoptd",
    "answer": "munged hangs here, or the agent does: systemctl restart munge adoptd",
    "steps": "a step of a job hangs: scontrol listpids",
    "jobs": "a step or a name service hangs: getent passwd root; scontrol listpids",
    "slurm": "a name service hangs (SlurmUser is looked up): getent passwd slurm",
}


def _collector(check: Check, scene: Scene, found: List[Finding]) -> Callable[[], None]:
    # One by one: what was found before it fails or hangs is told all the same.
    def collect() -> None:
        for finding in check.look(scene):
            found.append(finding)

    return collect


@dataclass(frozen=True)
class FileRule:
    """What a file or directory has to be: ``mode`` the bits that may not be set, in words ``expected``."""

    expected: str
    refused_mode: int
    kind: Callable[[int], bool]


def status_of(path: str, *, follow: bool = False) -> Optional[Tuple[int, int]]:
    """The st_mode and st_uid of a file, or with ``follow`` of what a link leads to; None if it cannot be seen."""
    try:
        found = os.stat(path, follow_symlinks=follow)
    except OSError:
        return None
    return found.st_mode, found.st_uid


def fault_of(status: Optional[Tuple[int, int]], rule: FileRule, owners: Iterable[int] = (0,)) -> Optional[str]:
    """What is wrong with a file of this (st_mode, st_uid); None if nothing is, "missing" if it is not there."""
    if status is None:
        return "is missing"
    mode, owner = status
    if not rule.kind(mode):
        return f"is not {rule.expected}"
    if owner not in owners:
        return f"is owned by uid {owner}"
    if stat.S_IMODE(mode) & rule.refused_mode:
        return f"has mode {stat.S_IMODE(mode):04o}"
    return None


def bytes_of(path: str, most: int) -> Optional[bytes]:
    """The first ``most`` bytes of a regular file; None where there is none, or it cannot be read."""
    try:
        # Never waits for a pipe's other end; what lies in a user's directory may be one by now.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(descriptor, "rb") as opened:
        return opened.read(most) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None


def open_to_others(directory: Path, owners: Collection[int] = (0,)) -> Optional[str]:
    """Why others than ``owners`` can put theirs in place of what is in it; None if they cannot, or it is not seen."""
    try:
        found = os.stat(directory)
    except OSError:
        return None
    # What is root's in a sticky directory, as /tmp, stays; and root's group is root.
    open_to = 0 if found.st_mode & stat.S_ISVTX else 0o002 if found.st_gid == 0 else 0o022
    return fault_of((found.st_mode, found.st_uid), FileRule("a directory", open_to, stat.S_ISDIR), owners)
