"""The doctor's look at files: the sockets, the directories around them, and the configuration, and who can change them.

Owns the table of what each has to be. Changes nothing. Called through the table of checks.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Iterator, List, Optional, Tuple

from adoptd.doctor.findings import FileRule, Finding, Scene, failure, fault_of, ok, status_of, warning
from adoptd.doors import PAM_MODE, USER_MODE

_DIRECTORY = FileRule("a directory", 0o022, stat.S_ISDIR)
_FILE = FileRule("a regular file", 0o022, stat.S_ISREG)
_START = "systemctl start adoptd (it makes it anew; find out first who else made it)"


def look_at_sockets(scene: Scene) -> Iterator[Finding]:
    """Where sshd and users ask."""
    agent = scene.settings.agent
    yield from judge_socket("pam_socket", agent.pam_socket, status_of(agent.pam_socket), PAM_MODE)
    yield from judge_socket("user_socket", agent.user_socket, status_of(agent.user_socket), USER_MODE)
    for directory in dict.fromkeys(str(Path(path).parent) for path in (agent.pam_socket, agent.user_socket)):
        yield from judge_directory("run_directory", directory, status_of(directory))
        mode = status_of(directory)
        if mode is not None and not stat.S_IMODE(mode[0]) & 0o001:
            seen = f"{directory} has mode {stat.S_IMODE(mode[0]):04o}: users cannot reach {agent.user_socket}"
            yield warning("run_directory", seen, f"chmod 0755 {directory}")


def judge_socket(check: str, path: str, status: Optional[Tuple[int, int]], mode: int) -> Iterator[Finding]:
    """A socket of root's with exactly this mode."""
    if status is None:
        yield failure(check, f"{path} is missing: nobody is asked there", "systemctl start adoptd")
        return
    found, owner = status
    if not stat.S_ISSOCK(found) or owner != 0 or stat.S_IMODE(found) != mode:
        kind = "a socket" if stat.S_ISSOCK(found) else "no socket"
        seen = f"{path} is {kind} of uid {owner}, mode {stat.S_IMODE(found):04o}, expected a socket {mode:04o} of root"
        yield failure(check, seen, f"find out who changed it, rm {path}, then {_START}")
    else:
        yield ok(check, f"{path} is a socket of root, mode {mode:04o}")


def look_at_configuration(scene: Scene) -> Iterator[Finding]:
    """Who can change what the agent goes by."""
    drop_ins = scene.file.parent / "conf.d"
    paths = [scene.file, *sorted(drop_ins.glob("*.toml"))]
    sound: List[str] = []
    for path in paths:
        fault = fault_of(status_of(str(path), follow=True), _FILE)
        if fault is None:
            sound.append(str(path))
        else:
            seen = f"{path} {fault}: whoever can write it decides who gets in"
            yield failure("configuration", seen, f"chown root:root {path} && chmod 0644 {path}")
    for directory in (scene.file.parent, drop_ins):
        status = status_of(str(directory), follow=True)
        if status is not None:
            yield from judge_directory("configuration", str(directory), status, quiet=True)
    passed_over = sorted(str(path) for path in drop_ins.glob("*") if path.suffix != ".toml")
    if passed_over:
        seen = f"{', '.join(passed_over[:4])}: passed over, as only *.toml is read"
        yield warning("configuration", seen, "rename it to end in .toml, or remove it")
    if sound:
        yield ok("configuration", f"{', '.join(sound)}: root's to write")


def judge_directory(
    check: str, path: str, status: Optional[Tuple[int, int]], *, quiet: bool = False
) -> Iterator[Finding]:
    """One in which nobody but root may put things in others' place."""
    fault = fault_of(status, _DIRECTORY)
    # Where it is missing so is what is in it, which says so itself.
    if fault is not None and status is not None:
        seen = f"{path} {fault}: others can put things of theirs in place of what is in it"
        yield failure(check, seen, f"chown root:root {path} && chmod 0755 {path}")
    elif status is not None and not quiet:
        yield ok(check, f"{path} is root's")
