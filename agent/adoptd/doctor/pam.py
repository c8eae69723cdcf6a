"""The doctor's look at PAM: the stack of the service that is asked about.

Owns what is said of a stack, as functions of its lines. Changes nothing. Called through the table of checks.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from adoptd.config import AgentConfig
from adoptd.doctor.findings import FileRule, Finding, Scene, failure, fault_of, ok, warning
from adoptd.doctor.role import is_login_node
from adoptd.doctor.stack import (
    REFUSING,
    Reach,
    action_for,
    actions_of,
    forgets_all,
    name_of,
    overshoots,
    reached,
    refuses,
    shut_by,
)
from adoptd.pam_lines import MODULE, PAM_DIRECTORY, PamLine, lines_of, wrong_options

# Where libpam looks for a service that the administrator's directory has not: the distribution's own.
_VENDOR = Path("/usr/lib/pam.d")
_OTHER = "other"
# libpam before 1.6 reads so much of a line at once, and takes what is left for a line of its own (BUF_SIZE).
_LINE_MAX = 1023
# "required", but that libpam goes on where the module is missing: what docs/admin.md recommends.
_CONTROL = "[success=ok new_authtok_reqd=ok ignore=ignore module_unknown=ignore default=bad]"
_KINDS = ("auth", "account", "password", "session")
# Options that each line has for itself.
_OF_ONE_LINE = frozenset({"timeout_ms", "log_level"})


def look_at_stack(scene: Scene) -> Iterator[Finding]:
    """The stack of the service that is asked about."""
    try:
        stack = lines_of(scene.service, scene.pam_directory)
    except OSError as error:
        where = scene.pam_directory / scene.service
        file = error.filename or where
        if error.errno == errno.ENOENT and str(file) == str(where):
            yield judge_missing(scene.service, where, *_in_its_place(scene))
            return
        remedy = f"libpam refuses {where} as a whole, or never comes back from it: put {file} right"
        yield failure("pam", f"{file} cannot be read: {error.strerror}", remedy)
        return
    yield from judge_stack(scene.service, scene.pam_directory / scene.service, stack, not is_login_node(scene))
    yield from judge_sockets(stack, scene.settings.agent.pam_socket)
    yield from judge_time(stack, scene.settings.callerid.timeout_ms)
    for path in dict.fromkeys(
        (scene.pam_directory, scene.pam_directory / scene.service, *(line.file for line in stack))
    ):
        yield from judge_file(path, os.stat(path))


def judge_missing(service: str, where: Path, instead: Optional[Path], stack: Sequence[PamLine]) -> Finding:
    """The service has no file. ``instead`` is what libpam goes by, with these lines."""
    if instead is None:
        return failure("pam", f"{where} is missing: libpam lets nobody in", f"put the distribution's {service} there")
    if any(line.loads(MODULE) and line.kind == "account" for line in stack):
        return warning("pam", f"{where} is missing: libpam goes by {instead}", f"cp {instead} {where}, and look again")
    shut = shut_by("account", stack)
    effect = f"lets nobody in ({shut})" if shut is not None else f"has no line of {MODULE}: users come in, into no job"
    seen = f"{where} is missing: libpam goes by {instead}, which {effect}"
    return failure("pam", seen, f"put the distribution's {service} there, and the lines of {MODULE} into it")


def _in_its_place(scene: Scene) -> Tuple[Optional[Path], Sequence[PamLine]]:
    places = [(scene.pam_directory, _OTHER)]
    if scene.pam_directory == PAM_DIRECTORY:
        places = [(_VENDOR, scene.service), *places, (_VENDOR, _OTHER)]
    for directory, name in places:
        try:
            return directory / name, lines_of(name, directory)
        except OSError:
            continue
    return None, ()


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


def judge_stack(service: str, file: Path, stack: Sequence[PamLine], wanted: bool = True) -> Iterator[Finding]:
    """What the lines of one service come to. ``wanted``: whether one of ours is to be there."""
    ours = [line for line in stack if line.loads(MODULE)]
    kinds = {line.kind for line in ours}
    if "account" not in kinds and not wanted:
        yield ok("pam", f"no line of {file} loads {MODULE}, as is right on a login node")
    elif "account" not in kinds:
        yield warning(
            "pam",
            f"no account line of {file} loads {MODULE}: logins are neither refused nor adopted{_by_other(stack)}",
            f"add to {file}, behind the other account lines: account {_CONTROL} {MODULE} mode=observe",
        )
    if "account" in kinds and "session" not in kinds:
        systemd = any(line.kind == "session" and line.loads("pam_systemd.so") for line in stack)
        more = ", and pam_systemd.so takes each session out of its job until the watch puts it back" if systemd else ""
        yield warning(
            "pam",
            f"{MODULE} is in the account stack only: keyboard-interactive logins are not adopted{more}",
            f"add at the end of {file}: session {_CONTROL} {MODULE}, with the account line's options",
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
    for kind in ("account", "session"):
        shut = shut_by(kind, stack)
        if shut is not None:
            seen = f"{shut}: pam_deny.so is asked for everybody: no {kind} gets past it"
            yield failure("pam", seen, "take it out, or let a line above jump over it for those who may come in")
    told: Set[str] = set()
    for line in ours:
        faults = wrong_options(line)
        if faults:
            # What is expected is said once.
            *first, last = faults
            words = "; ".join((*(fault.partition(", expected one of")[0] for fault in first), last))
            remedy = "until it is right, only root can log in"
            if words in told:
                words, remedy = words.partition(", expected")[0], "as above"
            told.add(words)
            blanks = "; there are no blanks around the =" if "=" in line.options else ""
            yield failure("pam", f"{line}: {words}", remedy + blanks)
        else:
            # A path of an included file may be told by several stacks.
            yield from _judge_line(service, line, stack)
    yield from _judge_together(ours, stack)


def _by_other(stack: Sequence[PamLine]) -> str:
    if any(line.kind == "account" for line in stack):
        return ""
    return f" (it has no account line at all: libpam takes those of the service {_OTHER})"


def _form_fault(line: PamLine) -> Optional[Tuple[str, str]]:
    """What makes a line none at all, and what to do about it."""
    words = (line.kind, line.control, line.module, *line.options)
    if any("\0" in word for word in words):
        return "has a byte of zero in it, where libpam's line ends", f"it may be UTF-16: file {line.file}"
    if sum(len(word) + 1 for word in words) > _LINE_MAX:
        seen = f"is longer than {_LINE_MAX} characters: libpam before 1.6 takes the rest for a line that fails"
        return seen, "take out options that say what is so by default"
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
    if action_for(line, "ignore") in ("bad", "die"):
        seen = f"{line}: {line.control}: refuses all whom the module leaves to others: root, and all under mode=observe"
        yield failure("pam", seen, "add ignore=ignore to that control")
    if line.kind == "account":
        yield from _refusing(line, stack)
    for later in stack[stack.index(line) :] if line.kind == "session" else ():
        if later.kind == "session" and later.loads("pam_systemd.so"):
            seen = f"{line}: pam_systemd.so comes after it ({later}) and takes the session out of its job again"
            yield warning("pam", seen, f"move the session line of {MODULE} to the end")
    names = [word.partition("=")[0] for word in line.words]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        said = ", ".join(f"{name}={options[name]}" for name in twice)
        yield warning("pam", f"{line}: {', '.join(twice)} is there more than once: {said} counts", "leave one of each")
    if options.get("mode", "").lower() == "observe":
        seen = f"{line}: mode=observe: it decides, logs and counts, and lets everybody in, into no job"
        yield warning("pam", seen, "when the log shows what you expect, take mode=observe out of that line")


def _refusing(line: PamLine, stack: Sequence[PamLine]) -> Iterator[Finding]:
    below = stack[stack.index(line) + 1 :]
    forgets = next((each for each in below if each.kind == "account" and forgets_all(each)), None)
    if forgets is not None and refuses(line):
        seen = f"{line}: {forgets} ({name_of(forgets)}, {forgets.control}) has libpam forget what was refused above it"
        yield failure("pam", seen, f"take the reset out of {forgets}")
    judge = next(
        (each for each in below if each.kind == "account" and name_of(each) in REFUSING and refuses(each)), None
    )
    if judge is None and refuses(line) and last_options(line).get("action_no_jobs", "").lower() == "ignore":
        seen = f"{line}: action_no_jobs=ignore, and no line below refuses anybody: users without a job come in"
        yield warning("pam", seen, "action_no_jobs=deny, or pam_access.so below to say who may come in without a job")
    elif judge is None and not refuses(line):
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
        if options.get("action_unknown", "newest").lower() == "allow":
            notes.append("action_unknown=allow: whose job is not known comes in without one")
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


def judge_time(stack: Sequence[PamLine], callerid_ms: int) -> Iterator[Finding]:
    """Whether a login's time, where a line says it, is longer than a source that does not answer is waited for."""
    for line in stack:
        given = last_options(line).get("timeout_ms", "") if line.loads(MODULE) else ""
        if given.isdigit() and int(given) <= callerid_ms:
            seen = (
                f"{line}: timeout_ms={given}, and a source that does not answer may take {callerid_ms}: no time is left"
            )
            yield warning(
                "pam", seen, "take timeout_ms out of that line (it is 1000 then), or lower [callerid] timeout_ms"
            )
