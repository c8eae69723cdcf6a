"""The doctor's look at the configuration's files: whether they can be read, and who can change them.

Changes nothing. Called through the table of checks.
"""

from __future__ import annotations

import codecs
import errno
import os
import stat
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, Tuple

from adoptd.doctor.findings import (
    FileRule,
    Finding,
    Scene,
    TookTooLong,
    failure,
    fault_of,
    given_up,
    ok,
    open_to_others,
    status_of,
    warning,
)
from adoptd.model import ConfigError

_DIRECTORY = FileRule("a directory", 0o022, stat.S_ISDIR)
_FILE = FileRule("a regular file", 0o022, stat.S_ISREG)
# What other programs' drop-ins end in.
_LIKE_OURS = (".conf", ".cfg", ".ini")
_BEGINNING_BYTES = 65536


def unread(file: Path, error: Exception, after_s: float) -> Finding:
    """The configuration could not be loaded; ``after_s``: how long it was waited for, where that is what was wrong."""
    if isinstance(error, TookTooLong):
        return given_up("configuration", after_s, str(error) or str(file), "", "")
    if not isinstance(error, ConfigError):
        return failure("configuration", f"{file} was not read: {error}", "look from a shell that may start processes")
    if os.geteuid() != 0 and os.strerror(errno.EACCES) in str(error):
        seen = f"{error}: only root can read it, and what goes by it was not looked at"
        return warning("configuration", seen, "sudo adoptd doctor")
    # What is wrong begins with the name of the file that it is wrong in.
    named = Path(str(error).partition(": ")[0])
    return failure("configuration", str(error), _remedy_for(named, _beginning(named)))


def _remedy_for(file: Path, text: Optional[bytes]) -> str:
    more = "the agent does not start until it is right; what goes by it was not looked at"
    if text is None:
        return f"put {file} there (an empty one takes all defaults), or what it is a link to; {more}"
    if text.startswith(codecs.BOM_UTF8):
        return f"an editor wrote a byte order mark: sed -i '1s/^\\xEF\\xBB\\xBF//' {file}; {more}"
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return f"it is UTF-16: iconv -f utf-16 -t utf-8 {file}; {more}"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(text)
    except UnicodeDecodeError:
        return f"it is not UTF-8: iconv -f latin1 -t utf-8 {file}; {more}"
    return f"adoptd config check; {more}"


def _beginning(file: Path) -> Optional[bytes]:
    """The first of a file, None where there is none; never waits for the other end of a pipe."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return os.read(descriptor, _BEGINNING_BYTES)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def look_at_configuration(scene: Scene) -> Iterator[Finding]:
    """Who can change what the agent goes by."""
    drop_ins = scene.file.parent / "conf.d"
    paths = [scene.file, *sorted(drop_ins.glob("*.toml"))]
    sound: List[str] = []
    for path in paths:
        fault = fault_of(status_of(str(path), follow=True), _FILE)
        if fault is None:
            sound.append(str(path))
            yield from judge_above("configuration", path, (scene.file.parent, drop_ins))
        else:
            seen = f"{path} {fault}: whoever can write it decides who gets in"
            yield failure("configuration", seen, f"chown root:root {path} && chmod 0644 {path}")
    for directory in (scene.file.parent, drop_ins):
        status = status_of(str(directory), follow=True)
        if status is not None:
            yield from judge_directory("configuration", str(directory), status, quiet=True)
    passed_over = sorted(str(path) for path in drop_ins.glob("*") if _is_meant(path.name))
    if passed_over:
        seen = f"{', '.join(passed_over[:4])}: passed over, as only *.toml is read"
        yield warning("configuration", seen, "rename it to end in .toml, or remove it")
    if sound:
        yield ok("configuration", f"{', '.join(sound)}: root's to write")


def judge_above(check: str, path: Path, judged: Sequence[Path] = ()) -> Iterator[Finding]:
    """The directories above what ``path`` leads to, but for those that are ``judged``."""
    for directory in path.resolve().parents:
        fault = open_to_others(directory)
        if fault is not None and directory not in judged:
            seen = f"{directory} {fault}: others can put theirs in place of {path}"
            yield failure(
                check, seen, f"chown root:root {directory}; chmod go-w {directory}; or keep the file elsewhere"
            )


def _is_meant(name: str) -> bool:
    """Whether a file beside the drop-ins looks like one, and is not read. A README does not."""
    meant = ".toml" in name.lower() or name.lower().endswith(_LIKE_OURS)
    return meant and not name.endswith(".toml") and not name.startswith(".")


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
