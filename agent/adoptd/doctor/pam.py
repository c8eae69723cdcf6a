"""The doctor's look at PAM: the stack of the service, the other services that load the module, and the module's file.

Owns what is said of a stack, as functions of its lines. Changes nothing, and loads the module only in a process of
its own, and only one that nobody but root could have written. Called through the table of checks.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Mapping, Optional, Sequence, Tuple

from adoptd.config import AgentConfig
from adoptd.doctor.findings import FileRule, Finding, Scene, failure, fault_of, ok, warning
from adoptd.doctor.stack import REFUSING, Reach, action_for, actions_of, name_of, overshoots, reached, refuses
from adoptd.pam_lines import MODULE, PamLine, adopt_lines, lines_of, wrong_options

# Of package managers and editors; to libpam they are services all the same, which nobody asks for.
_LEFTOVERS = (".dpkg-old", ".dpkg-new", ".dpkg-dist", ".rpmsave", ".rpmnew", ".orig", ".bak", "~")
_SERVICES_MAX = 256
# Where distributions build libpam to look, and what it takes besides.
_MODULE_DIRECTORIES = ("/lib", "/usr/lib", "/lib64", "/usr/lib64")
_BESIDE = "pam_unix.so"
_LOAD = "import ctypes, os, sys; m = ctypes.CDLL(sys.argv[1], os.RTLD_NOW); m.pam_sm_acct_mgmt; m.pam_sm_open_session"
_REGULAR = FileRule("a regular file", 0o022, stat.S_ISREG)
_KINDS = ("auth", "account", "password", "session")
# Options that each line has for itself.
_OF_ONE_LINE = frozenset({"timeout_ms", "log_level"})


def look_at_stack(scene: Scene) -> Iterator[Finding]:
    """The stack of the service that is asked about."""
    try:
        stack = lines_of(scene.service, scene.pam_directory)
    except OSError as error:
        file = error.filename or scene.pam_directory / scene.service
        where = scene.pam_directory / scene.service
        yield failure(
            "pam", f"{file} cannot be read: {error.strerror}", f"libpam refuses {where} as a whole: put {file} right"
        )
        return
    yield from judge_stack(scene.service, scene.pam_directory / scene.service, stack)
    yield from judge_sockets(stack, scene.settings.agent.pam_socket)
    for path in dict.fromkeys(
        (scene.pam_directory, scene.pam_directory / scene.service, *(line.file for line in stack))
    ):
        yield from judge_file(path, os.stat(path))


def judge_file(path: Path, status: os.stat_result) -> Iterator[Finding]:
    """Who can change what libpam reads."""
    rule = FileRule("a file or directory", 0o022, lambda mode: stat.S_ISREG(mode) or stat.S_ISDIR(mode))
    fault = fault_of((status.st_mode, status.st_uid), rule)
    if fault is not None:
        yield failure(
            "pam",
            f"{path} {fault}: whoever can write it is root at the next login",
            f"chown root {path}; chmod go-w {path}",
        )


def judge_stack(service: str, file: Path, stack: Sequence[PamLine]) -> Iterator[Finding]:
    """What the lines of one service come to."""
    ours = [line for line in stack if line.loads(MODULE)]
    kinds = {line.kind for line in ours}
    if "account" not in kinds:
        yield warning(
            "pam",
            f"no account line of {file} loads {MODULE}: logins are neither refused nor adopted",
            f"add to {file}, behind the other account lines: account required {MODULE}",
        )
    if "account" in kinds and "session" not in kinds:
        systemd = any(line.kind == "session" and line.loads("pam_systemd.so") for line in stack)
        more = ", and pam_systemd.so takes each session out of its job until the watch puts it back" if systemd else ""
        yield warning(
            "pam",
            f"{MODULE} is in the account stack only: keyboard-interactive logins are not adopted{more}",
            f"add at the end of {file}: session required {MODULE}",
        )
    for line in stack:
        form = _form_fault(line)
        if form is not None:
            yield failure("pam", f"{line}: {form[0]}", form[1])
        elif actions_of(line.control) is None:
            seen = f"{line}: {line.control!r} is no control: libpam takes every answer of {line.module} for a failure"
            yield failure("pam", seen, "make it required, requisite, sufficient, optional or [value=action ...]")
        elif overshoots(line, stack):
            seen = f"{line}: {line.control}: it jumps over more lines than follow, and libpam lets nobody in for that"
            yield failure("pam", seen, "count again the lines that are to be skipped; a substack is one")
    for line in ours:
        faults = wrong_options(line)
        for fault in faults:
            yield failure("pam", f"{line}: {fault}", "until it is right, only root can log in")
        if not faults:
            # A path of an included file may be told by several stacks.
            yield from _judge_line(service, line, stack)
    yield from _judge_together(ours, stack)


def _form_fault(line: PamLine) -> Optional[Tuple[str, str]]:
    """What makes a line none at all, and what to do about it."""
    words = (line.kind, line.control, line.module, *line.options)
    if any("\r" in word for word in words):
        return "has the line ends of DOS, so names a module that there is not", f"sed -i 's/\\r$//' {line.file}"
    if line.kind not in _KINDS and not line.loads(MODULE):
        seen = f"{line.kind!r} is no stack: to libpam a line of auth that always fails, so logins by password do"
        return seen, f"expected one of {', '.join(_KINDS)}; look for what else is in that line"
    if not line.module:
        return "names no module: libpam lets nobody in by such a stack", "complete it or take it out"
    return None


def _judge_line(service: str, line: PamLine, stack: Sequence[PamLine]) -> Iterator[Finding]:
    """Whether a line whose words are right is also where it can do its work."""
    found = list(_faults(service, line, stack))
    yield from found
    if not found:
        yield ok("pam", f"{line}: {line.kind} {line.control} {' '.join(line.options)}".rstrip() + _notes(line, stack))


def _faults(service: str, line: PamLine, stack: Sequence[PamLine]) -> Iterator[Finding]:
    options = last_options(line)
    named = options.get("service", "sshd")
    if named not in ("*", service):
        seen = f"{line}: service={named}, so it does nothing for {service}"
        yield failure("pam", seen, f"add to that line: service={service}")
        return
    place = reached(line, stack)
    if place.by is not None and place.reach is Reach.NONE:
        seen = f"{line}: is never asked: {name_of(place.by)} ({place.by}, {place.by.control}) skips the lines below"
        yield failure("pam", seen, f"put the line of {MODULE} above {place.by}")
    elif place.by is not None and line.kind == "session":
        seen = f"{line}: is not asked for those of whom {name_of(place.by)} ({place.by}, {place.by.control}) says yes"
        yield warning("pam", seen, f"put the line of {MODULE} above {place.by}, if they are to be adopted")
    if line.kind == "account":
        yield from _refusing(line, stack)
    for later in stack[stack.index(line) :] if line.kind == "session" else ():
        if later.kind == "session" and later.loads("pam_systemd.so"):
            seen = f"{line}: pam_systemd.so comes after it ({later}) and takes the session out of its job again"
            yield warning("pam", seen, f"move the session line of {MODULE} to the end")
    if options.get("mode", "").lower() == "observe":
        seen = f"{line}: mode=observe: it decides, logs and counts, and lets everybody in, into no job"
        yield warning("pam", seen, "when the log shows what you expect, take mode=observe out of that line")


def _refusing(line: PamLine, stack: Sequence[PamLine]) -> Iterator[Finding]:
    if refuses(line):
        return
    below = stack[stack.index(line) + 1 :]
    judge = next(
        (each for each in below if each.kind == "account" and name_of(each) in REFUSING and refuses(each)), None
    )
    if judge is None:
        seen = f"{line}: the control is {line.control}, so nobody is refused by it"
        yield warning("pam", seen, f"make it: account required {MODULE} ...")


def _notes(line: PamLine, stack: Sequence[PamLine]) -> str:
    """What is right as it is and good to know."""
    notes: List[str] = []
    options = last_options(line)
    below = [each for each in stack[stack.index(line) + 1 :] if each.kind == line.kind]
    if line.kind == "account":
        place = reached(line, stack)
        if place.by is not None:
            notes.append(f"not asked for whom {name_of(place.by)} ({place.by}) lets in")
        if not refuses(line):
            judge = next((name_of(each) for each in below if name_of(each) in REFUSING and refuses(each)), "")
            notes.append(f"whom it refuses {judge} decides on")
        said = options.get("action_generic_failure", "ignore").lower()
        if said == "allow" or (said == "ignore" and not any(name_of(each) in REFUSING for each in below)):
            notes.append(f"action_generic_failure={said}: while the agent is down users come in without a job")
        above = stack[: stack.index(line)]
        if any(each.kind == "account" and _lets_expired_past(each, line) for each in above):
            notes.append("a user whose password has expired is not asked about")
    return f" ({'; '.join(notes)})" if notes else ""


def _lets_expired_past(each: PamLine, line: PamLine) -> bool:
    # Debian's common-account has it: new_authtok_reqd=done ends the stack, unless it is one of its own.
    inside = line.within[: len(each.within)] == each.within
    return inside and name_of(each) == "pam_unix.so" and action_for(each, "new_authtok_reqd") == "done"


def _judge_together(ours: Sequence[PamLine], stack: Sequence[PamLine]) -> Iterator[Finding]:
    """What only several lines together tell."""
    by_kind = {kind: [line for line in ours if line.kind == kind] for kind in ("account", "session")}
    for kind, lines in by_kind.items():
        if len(lines) > 1:
            seen = f"{MODULE} is in the {kind} stack {len(lines)} times: {', '.join(map(str, lines))}"
            yield warning("pam", seen, "each asks the agent again: leave one")
    if by_kind["account"] and by_kind["session"]:
        account, session = by_kind["account"][-1], by_kind["session"][-1]
        first, second = last_options(account), last_options(session)
        differ = sorted(
            name
            for name in {*first, *second} - _OF_ONE_LINE
            if first.get(name, "").lower() != second.get(name, "").lower()
        )
        if differ:
            seen = f"{account} and {session} differ in {', '.join(differ)}: the phases of a login go by different rules"
            yield warning("pam", seen, "give both lines the same options")
    rivals = [line for line in stack if line.kind == "account" and line.loads("pam_slurm_adopt.so")]
    enforcing = [line for line in by_kind["account"] if last_options(line).get("mode", "").lower() != "observe"]
    if rivals and enforcing:
        seen = (
            f"{rivals[0]}: pam_slurm_adopt.so is there too, and enforces: a session lands where the later one puts it"
        )
        yield warning("pam", seen, "comment that line out, or add mode=observe to ours")
    for line in ours:
        if line.quiet:
            seen = f"{line}: where the module is missing, the dash before {line.kind} only keeps that out of the log"
            yield warning("pam", seen, "take the dash away; module_unknown=ignore is what passes over a missing module")


def last_options(line: PamLine) -> Mapping[str, str]:
    """The options in force: of one that is there twice the last counts, as in the module."""
    pairs = (word.partition("=") for word in line.words)
    return {name: value for name, _, value in pairs}


def judge_sockets(stack: Sequence[PamLine], answers_at: str) -> Iterator[Finding]:
    """Whether each line asks where the agent answers."""
    for line in stack:
        if line.loads(MODULE):
            asked = last_options(line).get("socket", AgentConfig().pam_socket)
            if asked != answers_at:
                seen = f"{line}: asks at {asked}, the agent answers at {answers_at}"
                yield failure("pam", seen, f"put socket={answers_at} on that line, or change [agent] pam_socket")


def look_at_nologin(scene: Scene) -> Iterator[Finding]:
    """What keeps everybody out before we are asked."""
    for file in ("/etc/nologin", "/run/nologin"):
        if os.path.lexists(file):
            yield warning(
                "pam", f"{file} is there: pam_nologin.so lets nobody in but root", f"rm {file}, once it is time"
            )


def look_at_services(scene: Scene) -> Iterator[Finding]:
    """Which other services load the module, and whether it does anything there."""
    names = sorted(entry.name for entry in scene.pam_directory.iterdir() if not entry.name.endswith(_LEFTOVERS))
    unread: List[str] = []
    elsewhere: List[str] = []
    for name in names[:_SERVICES_MAX]:
        if name == scene.service or name.startswith("common-") or not (scene.pam_directory / name).is_file():
            continue
        try:
            lines = adopt_lines(name, scene.pam_directory)
        except OSError as error:
            unread.append(f"{name} ({error.filename}: {error.strerror})")
            continue
        for line in lines:
            for fault in wrong_options(line):
                yield failure("pam", f"{line} (service {name}): {fault}", f"until it is right, only root passes {name}")
        acting = [line for line in lines if last_options(line).get("service", "sshd") in ("*", name)]
        if acting:
            elsewhere.append(f"{name} ({acting[0]})")
        elif lines:
            seen = f"{lines[0]}: in the stack of {name} it does nothing, for want of service={name}"
            yield warning("pam", seen, f"add service={name} to it, or take it out if {name} is not to be guarded")
    if elsewhere:
        yield ok("pam", f"also asked by {', '.join(elsewhere)}")
    if unread:
        yield warning("pam", f"services that libpam refuses: {', '.join(unread)}", "put the named files right")


@dataclass(frozen=True)
class ModuleFile:
    """One place that libpam may take the module from. ``status`` is (st_mode, st_uid), None where nothing is.

    ``load_error``: what the dynamic linker says, "" where it takes it; None: not tried.
    """

    path: str
    status: Optional[Tuple[int, int]]
    load_error: Optional[str] = None


def judge_module(files: Sequence[ModuleFile], line: PamLine) -> Iterator[Finding]:
    """Whether libpam finds the module that ``line`` names, and can use it."""
    there = [file for file in files if file.status is not None]
    # A dash before the line's type does not matter here: libpam refuses all the same, and does not log it (1.5.2).
    ignored = action_for(line, "module_unknown") == "ignore"
    effect = "the line is passed over: nobody is refused or adopted" if ignored else "nobody can log in, not even root"
    if not there:
        where = ", ".join(file.path for file in files) or "any directory of PAM modules"
        yield failure("module", f"{line} loads {line.module}, which is not in {where}: {effect}", _reinstall())
        return
    for file in there:
        fault = fault_of(file.status, _REGULAR)
        if fault is not None:
            seen = f"{file.path} {fault}: who can write it is root at the next login"
            yield failure("module", seen, f"chown root:root {file.path} && chmod 0644 {file.path}")
        elif file.load_error:
            yield failure("module", f"{file.path} cannot be loaded: {file.load_error}; {effect}", _reinstall())
        elif file.load_error is None:
            yield ok("module", f"{file.path} is there; only root can try to load it")
        else:
            yield ok("module", f"{file.path} loads")


def _reinstall() -> str:
    return "install the package adoptd again (built for this machine), or take the line out"


def look_at_module(scene: Scene) -> Iterator[Finding]:
    """The file of the module, as the first line that loads it names it."""
    try:
        lines = adopt_lines(scene.service, scene.pam_directory)
    except OSError:
        return  # said by look_at_stack
    for module in dict.fromkeys(line.module for line in lines):
        line = next(line for line in lines if line.module == module)
        yield from judge_module(
            [_module_file(path, scene.root, 0.9 * scene.timeout_s) for path in _paths_of(module)], line
        )


def _paths_of(module: str) -> List[str]:
    """Where libpam looks for a module: the path itself, or the directories that have the usual modules."""
    if module.startswith("/"):
        return [module]
    directories = [Path(top) / "security" for top in _MODULE_DIRECTORIES]
    for top in _MODULE_DIRECTORIES[:2]:
        directories += sorted(Path(top).glob("*-linux-gnu*/security"))
    # /lib and /usr/lib are one on most systems.
    real = dict.fromkeys(directory.resolve() for directory in directories if directory.is_dir())
    paths = [str(directory / module) for directory in real if (directory / _BESIDE).exists()]
    others = [str(directory / module) for directory in real if (directory / module).exists()]
    present = [path for path in paths if os.path.lexists(path)]
    # Debian's libpam looks in /usr/lib/security besides, where its other modules are not.
    return present or others or paths


def _module_file(path: str, root: bool, timeout_s: float) -> ModuleFile:
    try:
        found = os.stat(path)
    except OSError:
        return ModuleFile(path, None)
    status = (found.st_mode, found.st_uid)
    if not root or fault_of(status, _REGULAR) is not None:
        return ModuleFile(path, status)
    return ModuleFile(path, status, _load_error(path, timeout_s))


def _load_error(path: str, timeout_s: float) -> str:
    """What the dynamic linker has against a module; "" if nothing."""
    command = [sys.executable, "-I", "-c", _LOAD, path]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False, env={"LC_ALL": "C"}
        )
    except subprocess.TimeoutExpired:
        return f"not loaded after {timeout_s:.0f} s"
    if done.returncode == 0:
        return ""
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[-1].partition(": ")[2] or lines[-1] if lines else f"the linker ended with {done.returncode}"
