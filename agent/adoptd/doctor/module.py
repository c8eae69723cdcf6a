"""The doctor's look at the module's file: found where libpam looks, fit to be loaded, and root's alone to change.

Changes nothing, and loads the module only in a process of its own, and only one that nobody but root could have
written. Called through the table of checks.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, Tuple

from adoptd.doctor.findings import FileRule, Finding, Scene, failure, fault_of, ok
from adoptd.doctor.stack import action_for
from adoptd.pam_lines import PamLine, adopt_lines

# Where distributions build libpam to look, and what it takes besides.
_MODULE_DIRECTORIES = ("/lib", "/usr/lib", "/lib64", "/usr/lib64")
_BESIDE = "pam_unix.so"
_LOAD = "import ctypes, os, sys; m = ctypes.CDLL(sys.argv[1], os.RTLD_NOW); m.pam_sm_acct_mgmt; m.pam_sm_open_session"
_REGULAR = FileRule("a regular file", 0o022, stat.S_ISREG)
# No other module has it in it: where to ask by default.
_OURS = b"/run/adoptd/pam.sock"
_MODULE_MAX_BYTES = 8 << 20


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
        elif not file.ours:
            yield failure("module", f"{file.path} is some other module under this name: it adopts nobody", _reinstall())
        elif file.load_error is None:
            yield ok("module", f"{file.path} is there; only root can try to load it")
        else:
            yield ok("module", f"{file.path} loads")
        for path, fault in file.above[:1]:
            seen = f"{path} {fault}: others can put a module of theirs in place of {file.path}"
            yield failure("module", seen, f"chown root:root {path} && chmod go-w {path}")


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
    real = Path(path).resolve()
    above = [(str(each), fault) for each in real.parents for fault in (_open_to_others(each),) if fault is not None]
    if not root or fault_of(status, _REGULAR) is not None:
        return ModuleFile(path, status, None, above)
    return ModuleFile(path, status, _load_error(path, timeout_s), above, _is_ours(real))


def _open_to_others(directory: Path) -> Optional[str]:
    try:
        found = os.stat(directory)
    except OSError:
        return None
    if found.st_uid != 0:
        return f"is owned by uid {found.st_uid}"
    # What is root's in a sticky directory, as /tmp, stays; and root's group is root.
    writers = 0o002 if found.st_gid == 0 else 0o022
    open_to_all = found.st_mode & writers and not found.st_mode & stat.S_ISVTX
    return f"has mode {stat.S_IMODE(found.st_mode):04o}" if open_to_all else None


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as opened:
            return _OURS in opened.read(_MODULE_MAX_BYTES)
    except OSError:
        return True  # said otherwise


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
