"""What the doctor says: findings, how bad they are, and the checks that make them, kept from harming each other.

Owns the fence around a check: what it raises is a finding that names it, and one that does not come back is left
where it hangs. Looks at nothing itself. Used by every module of this package.
"""

from __future__ import annotations

import enum
import os
import stat
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Generic, Iterable, List, Optional, Sequence, Tuple, TypeVar

from adoptd.config import Config

_T = TypeVar("_T")


class Grade(enum.Enum):
    """How bad a finding is; the exit status is that of the worst."""

    OK = 0
    WARNING = 1
    FAILURE = 2


@dataclass(frozen=True)
class Finding:
    """What one check saw, and what to do about it (empty where there is nothing to do)."""

    check: str
    grade: Grade
    seen: str
    remedy: str = ""


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


def warning(check: str, seen: str, remedy: str) -> Finding:
    """Logins work, but not as the administrator may expect, or not for ever."""
    return Finding(check, Grade.WARNING, seen, remedy)


def failure(check: str, seen: str, remedy: str) -> Finding:
    """Logins are refused that should not be, or let in that should not be, or adopted into nothing."""
    return Finding(check, Grade.FAILURE, seen, remedy)


def worst(findings: Sequence[Finding]) -> Grade:
    """The worst grade there is."""
    found: Optional[Grade] = max((finding.grade for finding in findings), key=lambda grade: grade.value, default=None)
    return Grade.OK if found is None else found


class TookTooLong(Exception):
    """A call did not come back in time. It goes on in its thread, which ends with the process."""


class _Call(Generic[_T]):
    """A call in a thread of its own. A library that hangs can be abandoned, and not ended."""

    def __init__(self, call: Callable[[], _T]) -> None:
        self._call = call
        self._result: List[_T] = []
        self._error: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

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

    def result(self, within_s: float) -> _T:
        """Raises what the call raised, or TookTooLong."""
        self._thread.join(max(within_s, 0.0))
        if self._error is not None:
            raise self._error
        if not self._result:
            raise TookTooLong
        return self._result[0]


def within(limit_s: float, call: Callable[[], _T]) -> _T:
    """What ``call`` returns. Raises what it raises, or TookTooLong."""
    return _Call(call).result(limit_s)


def run_checks(checks: Sequence[Check], scene: Scene) -> List[Finding]:
    """What all of ``checks`` say, in their order. They run at once; none can stop another, nor this from returning."""
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
            seen = f"not known after {scene.timeout_s:g} s: what it asks hangs, or all is slow ({call.place()})"
            findings.extend((*found, failure(check.name, seen, _HANGS.get(check.name, _HANGS[""]))))
        except Exception as error:
            # Whatever it was: on a broken system any check may meet what nobody thought of.
            seen = f"the check itself failed: {type(error).__name__}: {error}"
            findings.extend((*found, failure(check.name, seen, "what it looks at is broken, or adoptd has a defect")))
    return findings


# What a check waits for that can hang, where it is always the same.
_HANGS = {
    "": "adoptd doctor --timeout 30; look at what the node waits for: ps -eo pid,stat,wchan:30,args | grep ' D'",
    "seal": "munged hangs: systemctl restart munge",
    "agent": "the agent takes commands and does not answer: systemctl restart adoptd",
    "answer": "munged hangs here, or the agent does: systemctl restart munge adoptd",
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
