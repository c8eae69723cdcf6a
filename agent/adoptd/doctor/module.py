"""The doctor's look at the module's file: found where libpam looks, fit to be loaded, and root's alone to change; and
whether the modules of the other lines are there, without which libpam refuses as well.

Changes nothing, and loads our module only in a process of its own, and only one that nobody but root could have
written. Called through the table of checks.
"""

from __future__ import annotations

import difflib
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Mapping, Optional, Sequence, Tuple

from adoptd.doctor.findings import FileRule, Finding, Scene, bytes_of, failure, fault_of, ok, open_to_others, warning
from adoptd.doctor.stack import Reach, action_for, name_of, reached
from adoptd.pam_lines import MODULE, PamLine, lines_of

# Where distributions build libpam to look, and what it takes besides.
_MODULE_DIRECTORIES = ("/lib", "/usr/lib", "/lib64", "/usr/lib64")
_BESIDE = "pam_unix.so"
_LOAD = "import ctypes, os, sys; m = ctypes.CDLL(sys.argv[1], os.RTLD_NOW); m.pam_sm_acct_mgmt; m.pam_sm_open_session"
_REGULAR = FileRule("a regular file", 0o022, stat.S_ISREG)
# No other module has it in it: where to ask by default.
_OURS = b"/run/adoptd/pam.sock"
_MODULE_MAX_BYTES = 8 << 20
# What libpam calls in a module, by the line's kind, and what becomes of logins where it cannot. Passwords are not
# changed at most logins.
_CALLS: Mapping[str, Tuple[bytes, str]] = {
    "auth": (b"pam_sm_authenticate", "nobody gets in by password"),
    "account": (b"pam_sm_acct_mgmt", "nobody gets in, not even root"),
    "session": (b"pam_sm_open_session", "nobody gets in, not even root"),
}
_NOTHING = "has nothing"
# What the linker says, and what to do. The last is for all else.
_LINKER: Tuple[Tuple[str, str], ...] = (
    ("failed to map segment", "mount the file system of {path} without noexec (findmnt -T {path}), or look at SELinux"),
    ("ermission denied", "look at the mode of {path} and of what is above it, and at SELinux"),
    ("cannot open shared object", "install what the library that it names is of, or the package adoptd again"),
    ("", "install the package adoptd again (built for this machine), or take the line out"),
)


@dataclass(frozen=True)
class ModuleFile:
    """One place that libpam may take the module from. ``status`` is (st_mode, st_uid), None where nothing is.

    ``load_error``: what the dynamic linker says, "" where it takes it; None: not tried. ``above``: the
    directories above it that others can write to, each with why. ``ours``: whether it is this module at all, by what
    is in it.
    """

    path: str
    status: Optional[Tuple[int, int]]
    load_error: Optional[str] = None
    above: Sequence[Tuple[str, str]] = ()
    ours: bool = True


def judge_module(files: Sequence[ModuleFile], line: PamLine) -> Iterator[Finding]:
    """Whether libpam finds the module that ``line`` names, and can use it."""
    there = [file for file in files if file.status is not None]
    # A dash before the line's type does not matter here: libpam refuses all the same, and does not log it (1.5.2).
    ignored = action_for(line, "module_unknown") == "ignore"
    effect = "the line is passed over: nobody is refused or adopted" if ignored else "nobody can log in, not even root"
    if not there:
        where = "there" if line.module.startswith("/") else f"in {_places(files)}"
        yield failure("module", f"{line} loads {line.module}, which is not {where}: {effect}", remedy_for("", ""))
        return
    for file in there:
        fault = fault_of(file.status, _REGULAR)
        if fault is not None and file.status is not None and not _REGULAR.kind(file.status[0]):
            yield failure("module", f"{file.path} {fault}: {effect}", remedy_for("", file.path))
        elif fault is not None:
            seen = f"{file.path} {fault}: who can write it is root at the next login"
            yield failure("module", seen, f"chown root:root {file.path} && chmod 0644 {file.path}")
        elif file.load_error:
            remedy = remedy_for(file.load_error, file.path)
            yield failure("module", f"{file.path} cannot be loaded: {file.load_error}; {effect}", remedy)
        elif not file.ours:
            seen = f"{file.path} is some other module under this name: it adopts nobody"
            yield failure("module", seen, remedy_for("", ""))
        elif file.load_error is None and not file.above:
            yield ok("module", f"{file.path} is there; only root can try to load it")
        elif not file.above:
            yield ok("module", f"{file.path} loads")
        for path, fault in file.above[:1]:
            seen = f"{path} {fault}: others can put a module of theirs in place of {file.path}"
            yield failure("module", seen, f"chown root:root {path} && chmod go-w {path}")


def _places(files: Sequence[ModuleFile]) -> str:
    return ", ".join(str(Path(file.path).parent) for file in files) or "any directory of PAM modules"


def remedy_for(error: str, path: str) -> str:
    """What to do about what the linker says of the module at ``path``."""
    return next(remedy for words, remedy in _LINKER if words in error).format(path=path)


def judge_copy(path: str, installed: Sequence[str]) -> Iterator[Finding]:
    """``installed``: modules of ours where libpam looks by itself, with other contents than the one that is loaded."""
    if installed:
        seen = f"{path} is another one than {installed[0]}, which the package keeps: upgrades do not reach it"
        yield warning("module", seen, f"write {MODULE} in that line without a directory, and remove {path}")


def judge_lacking(stack: Sequence[PamLine], lacks: Mapping[Tuple[str, str], str]) -> Iterator[Finding]:
    """The lines of other modules. ``lacks``: what is wrong with a module in a line of a kind, by both."""
    for line in stack:
        lack = lacks.get((line.module, line.kind))
        refused = action_for(line, "module_unknown") in ("bad", "die")
        if lack is None or not refused or reached(line, stack).reach is Reach.NONE:
            continue
        seen = f"{line}: {line.module!r} {lack}: {_CALLS[line.kind][1]}"
        yield (warning if line.kind == "auth" else failure)("module", seen, _remedy_for_lack(line, lack))


def _remedy_for_lack(line: PamLine, lack: str) -> str:
    if lack.startswith(_NOTHING):
        return f"take it out: {name_of(line)} is for lines of another kind"
    if name_of(line).startswith(MODULE) or difflib.get_close_matches(name_of(line), [MODULE], cutoff=0.85):
        return (
            f"{MODULE} is what it is called: put the line right (sed -n {line.number}p {line.file} | cat -A shows it)"
        )
    return f"install the package that {name_of(line)} is of, or take the line out"


def look_at_module(scene: Scene) -> Iterator[Finding]:
    """The files of our module, each as the first line that names it does; and of the other lines' modules."""
    try:
        stack = lines_of(scene.service, scene.pam_directory)
    except OSError:
        return  # said by look_at_stack
    ours = [line for line in stack if line.loads(MODULE)]
    for module in dict.fromkeys(line.module for line in ours):
        line = next(line for line in ours if line.module == module)
        files = [_module_file(path, scene.root, 0.9 * scene.timeout_s) for path in _paths_of(module)]
        yield from judge_module(files, line)
        if module.startswith("/") and files[0].status is not None:
            yield from judge_copy(module, [path for path in _paths_of(MODULE) if _differ(module, path)])
    others = dict.fromkeys((line.module, line.kind) for line in stack if line not in ours and line.kind in _CALLS)
    lacks = {each: lack for each in others for lack in (_lack(*each),) if lack is not None}
    yield from judge_lacking(stack, lacks)


def _lack(module: str, kind: str) -> Optional[str]:
    """Why libpam cannot call a module in a line of ``kind``; None where it can, or where that cannot be told."""
    # Of none at all, and of one with the line ends of DOS, is said elsewhere; for $ISA libpam puts in what it knows.
    if not module or any(each in module for each in "$\r\0"):
        return None
    paths = _paths_of(module)
    if not paths:
        return None  # a host that has its modules where we do not know
    if not any(map(os.path.isfile, paths)):
        return "is not there" if module.startswith("/") else "is in no directory of PAM modules"
    calls = _CALLS[kind][0]
    texts = [bytes_of(path, _MODULE_MAX_BYTES) for path in paths]
    can = None in texts or any(calls in text for text in texts if text is not None)
    return None if can else f"{_NOTHING} for {kind} lines ({calls.decode()})"


def _differ(path: str, other: str) -> bool:
    first, second = bytes_of(path, _MODULE_MAX_BYTES), bytes_of(other, _MODULE_MAX_BYTES)
    return first is not None and second is not None and first != second


def _paths_of(module: str) -> List[str]:
    """Where libpam may take a module from: the path itself; else the places in the directories with the usual modules
    where something of that name is; else the places in other directories where it is; else all the former."""
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
    """What is at ``path``. Only root loads it, and only where nobody else can write to it or to what is above it."""
    try:
        found = os.stat(path)
    except OSError:
        return ModuleFile(path, None)
    status = (found.st_mode, found.st_uid)
    real = Path(path).resolve()
    directories = dict.fromkeys((*real.parents, *Path(path).parents))
    above = [(str(each), fault) for each in directories for fault in (open_to_others(each),) if fault is not None]
    if above or not root or fault_of(status, _REGULAR) is not None:
        return ModuleFile(path, status, None, above)
    text = bytes_of(path, _MODULE_MAX_BYTES)
    # One that cannot be read is said otherwise.
    return ModuleFile(path, status, _load_error(path, timeout_s), above, text is None or _OURS in text)


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
