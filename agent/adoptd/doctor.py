"""``adoptd doctor``: will a login on this node do what the administrator expects, and if not, why?

Owns the checks. Each looks at one thing, changes nothing, and says what it saw and what to do; none
stops another. Called by the command line.
"""

from __future__ import annotations

import enum
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, List, Optional

from adoptd import config, probe
from adoptd.client import AgentError, ask_agent
from adoptd.config import AgentConfig, Config
from adoptd.model import ConfigError
from adoptd.pam_lines import MODULE, PAM_DIRECTORY, PamLine, adopt_lines, lines_of, wrong_options
from adoptd.seal import SealError
from adoptd.slurm_site import configured_seal
from adoptd.wire.control import Command


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


def examine(file: Path, pam_directory: Path = PAM_DIRECTORY, service: str = "sshd") -> List[Finding]:
    """All findings, in the order in which a login meets what they are about."""
    findings: List[Finding] = list(_pam(pam_directory, service))
    try:
        settings = config.load(file)
    except ConfigError as error:
        findings.append(
            Finding("configuration", Grade.FAILURE, str(error), "the agent does not start until this is right")
        )
        return findings
    findings.append(Finding("configuration", Grade.OK, f"{file} is right"))
    findings.extend(_same_socket(settings, pam_directory, service))
    for check in _CHECKS:
        findings.extend(check(settings))
    return findings


def _pam(directory: Path, service: str) -> Iterator[Finding]:
    try:
        stack = lines_of(service, directory)
    except (OSError, UnicodeError) as error:
        yield Finding(
            "pam", Grade.FAILURE, f"{directory / service} cannot be read: {error}", "libpam refuses such a stack too"
        )
        return
    lines = [line for line in stack if line.loads(MODULE)]
    kinds = {line.kind for line in lines}
    if "account" not in kinds:
        yield Finding(
            "pam",
            Grade.WARNING,
            f"no account line of {directory / service} loads pam_adopt.so: logins are neither refused nor adopted",
            f"add to {directory / service}: account required pam_adopt.so",
        )
    if "account" in kinds and "session" not in kinds:
        yield Finding(
            "pam",
            Grade.WARNING,
            "pam_adopt.so is in the account stack only: keyboard-interactive logins are not adopted",
            f"add at the end of {directory / service}: session required pam_adopt.so",
        )
    for line in lines:
        faults = wrong_options(line)
        for fault in faults:
            yield Finding("pam", Grade.FAILURE, f"{line}: {fault}", "until it is right, only root can log in")
        if not faults:
            yield _placed(line, stack)


def _placed(line: PamLine, stack: List[PamLine]) -> Finding:
    """Whether a line whose words are right is also where it can do its work."""
    if line.kind == "account" and line.control in ("optional", "sufficient"):
        seen = f"{line}: the control is {line.control}, so nobody is refused by it"
        return Finding("pam", Grade.WARNING, seen, "make it: account required pam_adopt.so ...")
    for later in stack[stack.index(line) :] if line.kind == "session" else ():
        if later.kind == "session" and later.loads("pam_systemd.so"):
            seen = f"{line}: pam_systemd.so comes after it ({later}) and takes the session out of its job again"
            return Finding("pam", Grade.WARNING, seen, "move the session line of pam_adopt.so to the end")
    return Finding("pam", Grade.OK, f"{line}: {line.kind} {line.control} {' '.join(line.options)}".rstrip())


def _same_socket(settings: Config, directory: Path, service: str) -> Iterator[Finding]:
    try:
        lines = adopt_lines(service, directory)
    except (OSError, UnicodeError):
        return  # said by _pam
    for line in lines:
        given = [word.partition("=")[2] for word in line.options if word.startswith("socket=")]
        asked = given[-1] if given else AgentConfig().pam_socket
        if asked != settings.agent.pam_socket:
            yield Finding(
                "pam",
                Grade.FAILURE,
                f"{line}: asks at {asked}, the agent answers at {settings.agent.pam_socket}",
                f"put socket={settings.agent.pam_socket} on that line, or change [agent] pam_socket",
            )


def _agent(settings: Config) -> Iterator[Finding]:
    try:
        status = ask_agent(settings.agent.user_socket, Command("status", {}))
    except AgentError as error:
        yield Finding("agent", Grade.FAILURE, str(error), "start it: systemctl start adoptd")
        return
    yield Finding("agent", Grade.OK, f"version {status.get('version')} answers on {settings.agent.user_socket}")
    witnesses = status.get("witnesses")
    for name, state in witnesses.items() if isinstance(witnesses, dict) else ():
        if state != "ok":
            yield Finding("witness", Grade.WARNING, f"{name}: {state}", "the other witnesses are asked in its place")


def _pam_socket(settings: Config) -> Iterator[Finding]:
    path = settings.agent.pam_socket
    try:
        found = os.lstat(path)
    except OSError as error:
        yield Finding("pam_socket", Grade.FAILURE, f"{path}: {error.strerror}", "start the agent")
        return
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != 0 or stat.S_IMODE(found.st_mode) != 0o600:
        yield Finding(
            "pam_socket",
            Grade.FAILURE,
            f"{path} is mode {stat.S_IMODE(found.st_mode):04o} of uid {found.st_uid}, expected a socket 0600 of root",
            "find out who made it, remove it, start the agent again",
        )
    else:
        yield Finding("pam_socket", Grade.OK, f"{path} is a socket of root, mode 0600")


def _seal(settings: Config) -> Iterator[Finding]:
    if os.geteuid() != 0:
        yield Finding("seal", Grade.WARNING, "only root can try it", "sudo adoptd doctor")
        return
    try:
        seal = configured_seal(settings)
        try:
            opened = seal.open(seal.seal(b"doctor", os.geteuid()))
        finally:
            seal.close()
    except SealError as error:
        yield Finding(
            "seal", Grade.FAILURE, str(error), "nodes cannot ask each other: start munged, or make the key file"
        )
        return
    grade = Grade.OK if opened.payload == b"doctor" and opened.uid == 0 else Grade.FAILURE
    yield Finding("seal", grade, f"{seal.scheme}: sealed and opened as uid {opened.uid}")


def _probe(settings: Config) -> Iterator[Finding]:
    if not settings.probe.enabled:
        yield Finding("probe", Grade.WARNING, "switched off in the configuration", "set [probe] enabled = true")
        return
    source_dir = Path(settings.probe.source_dir) if settings.probe.source_dir else None
    status = probe.status(Path(settings.probe.pin_dir), source_dir)
    if status.problem is None:
        yield Finding("probe", Grade.OK, f"attached, schema {status.schema}")
    else:
        yield Finding(
            "probe", Grade.WARNING, status.problem, "adoptd probe load says why; slower witnesses are asked meanwhile"
        )


_CHECKS: tuple[Callable[[Config], Iterator[Finding]], ...] = (_agent, _pam_socket, _seal, _probe)


def worst(findings: List[Finding]) -> Grade:
    """The worst grade there is."""
    found: Optional[Grade] = max((finding.grade for finding in findings), key=lambda grade: grade.value, default=None)
    return Grade.OK if found is None else found
