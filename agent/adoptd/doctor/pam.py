"""The doctor's look at PAM: the stack of the service that is asked about.

Owns what is said of a stack as a whole, as functions of its lines. Changes nothing. Called through the table of checks.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Iterator, Optional, Sequence, Set, Tuple

from adoptd.doctor.files import judge_above
from adoptd.doctor.findings import FileRule, Finding, Scene, failure, fault_of, ok, warning
from adoptd.doctor.lines import judge_line, judge_sockets, judge_time, judge_together
from adoptd.doctor.role import is_login_node
from adoptd.doctor.stack import actions_of, overshoots, shut_by
from adoptd.pam_lines import MODULE, PAM_DIRECTORY, PamLine, is_for, lines_of, wrong_options

# Where libpam looks for a service that the administrator's directory has not: the distribution's own.
_VENDOR = Path("/usr/lib/pam.d")
_OTHER = "other"
# libpam before 1.6 reads so much of a line at once, and takes what is left for a line of its own (BUF_SIZE).
_LINE_MAX = 1023
# "required", but that libpam goes on where the module is missing: what docs/admin.md recommends.
_CONTROL = "[success=ok new_authtok_reqd=ok ignore=ignore module_unknown=ignore default=bad]"
_NAMED_MAX = 8
_KINDS = ("auth", "account", "password", "session")


def look_at_stack(scene: Scene) -> Iterator[Finding]:
    """The stack of the service that is asked about."""
    if not scene.service or Path(scene.service).name != scene.service:
        yield failure("pam", f"{scene.service!r} is no service's name", f"one of those in {scene.pam_directory}")
        return
    vendor = scene.pam_directory == PAM_DIRECTORY and _VENDOR.is_dir()
    if not scene.pam_directory.is_dir() and not vendor:
        seen = f"{scene.pam_directory} is no directory: libpam goes by {_conf(scene)} alone, or lets nobody in"
        yield failure("pam", seen, "put the distribution's files there, and look again")
        return
    yield from judge_conf(_conf(scene), _text_of(_conf(scene)))
    try:
        stack = lines_of(scene.service, scene.pam_directory)
    except OSError as error:
        where = scene.pam_directory / scene.service
        file = error.filename or where
        if error.errno == errno.EACCES and not scene.root:
            yield warning("pam", f"{file}: only root can read it", "sudo adoptd doctor")
            return
        if error.errno == errno.ENOENT and str(file) == str(where):
            yield judge_missing(scene.service, where, *_in_its_place(scene))
            return
        remedy = f"libpam refuses {where} as a whole, or never comes back from it: put {file} right"
        yield failure("pam", f"{file} cannot be read: {error.strerror}", remedy)
        return
    yield from judge_stack(scene.service, scene.pam_directory / scene.service, stack, not is_login_node(scene))
    yield from judge_others(scene.pam_directory / scene.service, stack, _other_lines(scene))
    yield from judge_sockets(stack, scene.settings.agent.pam_socket)
    yield from judge_time(stack, scene.settings.callerid.timeout_ms)
    files = dict.fromkeys((scene.pam_directory / scene.service, *(line.file for line in stack)))
    for path in (scene.pam_directory, *files):
        yield from judge_file(path, os.stat(path))
    # A link may lead out of the directory.
    for path in files:
        yield from judge_above("pam", path, (scene.pam_directory,))


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


def judge_conf(path: Path, text: str) -> Iterator[Finding]:
    """The one file for all services, from before there was a directory of them, beside which it counts for nothing."""
    if any(MODULE in line.partition("#")[0] for line in text.splitlines()):
        seen = f"{path} has a line of {MODULE}: libpam does not read it where there is {path.parent / 'pam.d'}"
        yield warning("pam", seen, f"move it to the service's file in {path.parent / 'pam.d'}, without the first word")


def _conf(scene: Scene) -> Path:
    return scene.pam_directory.parent / "pam.conf"


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:
        return ""


def judge_others(file: Path, stack: Sequence[PamLine], other: Sequence[PamLine]) -> Iterator[Finding]:
    """Whether libpam lets anybody in where it goes by the service "other", for want of lines of a kind."""
    for kind in ("account", "session"):
        if any(line.kind == kind for line in stack):
            continue
        shut = shut_by(kind, other)
        if shut is not None or not any(line.kind == kind for line in other):
            why = f"pam_deny.so refuses everybody ({shut})" if shut is not None else "there is none either"
            seen = f"{file} has no {kind} line: libpam takes those of the service {_OTHER}, where {why}"
            yield failure("pam", seen, f"put the distribution's {kind} lines there, and those of {MODULE}")


def _other_lines(scene: Scene) -> Sequence[PamLine]:
    try:
        return lines_of(_OTHER, scene.pam_directory)
    except OSError:
        return ()


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
    acting = [line for line in ours if is_for(line, service)]
    if "account" not in kinds and not wanted:
        yield ok("pam", f"no line of {file} loads {MODULE}, as is right on a login node")
    elif "account" not in kinds:
        effect = "nobody is refused for want of a job" + ("" if "session" in kinds else ", or adopted")
        yield warning(
            "pam",
            f"no account line of {file} loads {MODULE}: {effect}{_by_other(stack)}",
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
    malformed = list(_malformed(stack))
    yield from malformed[:_NAMED_MAX]
    if malformed[_NAMED_MAX:]:
        seen = f"{file}: {len(malformed) - _NAMED_MAX} more lines are wrong in such ways"
        yield failure("pam", seen, f"look whether it is a PAM file at all: file {file}; head {file}")
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
        elif line in acting or all(each.kind != line.kind for each in acting):
            # In a file that several services include there may be lines for another.
            yield from judge_line(service, line, stack)
    yield from judge_together(acting, stack)


def _malformed(stack: Sequence[PamLine]) -> Iterator[Finding]:
    """Lines that libpam makes something else of than they say."""
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
