"""The pam_adopt.so lines of a PAM configuration: found, and their options checked as the module does.

Owns the module's options for Python; pam_hook/options.c has them for C, and a test runs both on the
same words. Reads files, changes nothing. Called by ``adoptd doctor``, ``adoptctl explain`` and adoptions.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Tuple

MODULE = "pam_adopt.so"
PAM_DIRECTORY = Path("/etc/pam.d")

# The stacks the module does something in; in any other it lets nobody in but root, or is an error to libpam.
KINDS = ("account", "session")

# An administrator who edits a stack waits that long at most for the module to know.
_KEEP_S = 5.0
_SERVICES_MAX = 16
# A stack is a page of text in a few files.
_FILE_MAX_BYTES = 1 << 20
_FILES_MAX = 256

# Whose logins a line is for that does not say.
_SERVICE = "sshd"
_LEVELS = ("quiet", "fatal", "error", "info", "verbose", "debug", "debug2", "debug3", "debug4", "debug5")


def _words(*words: str) -> Callable[[str], bool]:
    return lambda value: value.lower() in words


def _is_level(value: str) -> bool:
    # A number as C writes it; what is above the highest level is taken for it.
    number = re.fullmatch(r"0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*", value)
    return value.lower() in _LEVELS or (number is not None and len(value) <= 10)


def _is_timeout(value: str) -> bool:
    return value.isascii() and value.isdigit() and len(value) <= 5 and 50 <= int(value) <= 30_000


def _is_node_name(value: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_.\-]{1,63}", value) is not None


def _is_socket(value: str) -> bool:
    return value.startswith("/") and len(value.encode()) <= 107


# name: (whether a value is one of its, what is expected in words)
OPTIONS: Mapping[str, Tuple[Callable[[str], bool], str]] = {
    "action_no_jobs": (_words("deny", "ignore"), "deny or ignore"),
    "action_unknown": (_words("newest", "allow", "deny"), "newest, allow or deny"),
    "action_adopt_failure": (_words("allow", "deny"), "allow or deny"),
    "action_generic_failure": (_words("ignore", "allow", "deny"), "ignore, allow or deny"),
    "ignore_root": (_words("0", "1"), "0 or 1"),
    "single_job_skip_rpc": (_words("0", "1"), "0 or 1"),
    "disable_x11": (_words("0", "1"), "0 or 1"),
    "join_container": (_words("true", "false"), "true or false"),
    "log_level": (_is_level, f"one of {', '.join(_LEVELS)}, or a number"),
    "mode": (_words("enforce", "observe"), "enforce or observe"),
    "timeout_ms": (_is_timeout, "a number of milliseconds from 50 to 30000"),
    "service": (bool, "the name of a PAM service, or *"),
    "nodename": (_is_node_name, "a node name of 1 to 63 letters, digits, dots, dashes or underscores"),
    "socket": (_is_socket, "an absolute path of at most 107 bytes"),
}


@dataclass(frozen=True)
class PamLine:
    """One line of a PAM stack. ``kind`` is account, session, auth or password; ``module`` its file, "" if none is.

    ``quiet``: its kind has a dash before it, so a missing module is not logged. ``within``: the substacks it is in,
    outermost first, each as the line that says substack; an included line is in no other stack than that line.
    """

    file: Path
    number: int
    kind: str
    control: str
    module: str
    options: Tuple[str, ...]
    quiet: bool = False
    within: Tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"

    @property
    def words(self) -> Tuple[str, ...]:
        """The options with their names in small letters: the module takes them in any case."""
        pairs = (word.partition("=") for word in self.options)
        return tuple(f"{name.lower()}{equals}{value}" for name, equals, value in pairs)

    def loads(self, module: str) -> bool:
        """Whether this line is about ``module``, by name or by path."""
        return self.module.rpartition("/")[2] == module


def wrong_options(line: PamLine) -> List[str]:
    """What the module will refuse in ``line``, one sentence each; empty if it is right."""
    faults: List[str] = []
    if line.kind not in KINDS:
        faults.append(f"{MODULE} belongs in the account and session stacks, not in {line.kind}")
    for word in line.options:
        name, equals, value = word.partition("=")
        name = name.lower()
        if not equals or name not in OPTIONS:
            faults.append(f"{word!r} is no option of {MODULE}, expected one of {', '.join(OPTIONS)}")
        elif not OPTIONS[name][0](value):
            faults.append(f"{name} is {value!r}, expected {OPTIONS[name][1]}")
    return faults


def options_of(line: PamLine) -> Mapping[str, str]:
    """The options in force: of one that is there twice the last counts, as in the module."""
    pairs = (word.partition("=") for word in line.words)
    return {name: value for name, _, value in pairs}


def is_for(line: PamLine, service: str) -> bool:
    """Whether the module does anything there for ``service``, whose case it does not look at."""
    return options_of(line).get("service", _SERVICE).lower() in ("*", service.lower())


def adopt_lines(service: str, directory: Path = PAM_DIRECTORY) -> List[PamLine]:
    """The lines of ``service`` that load the module, includes followed, in order. Raises OSError."""
    return [line for line in lines_of(service, directory) if line.loads(MODULE)]


class AccountAlone:
    """Whether a service has an account line of the module and no session line, looked up again when it is old.

    Called from worker threads: it reads files. Two of them at once read twice, and no more.
    """

    def __init__(self, directory: Path = PAM_DIRECTORY, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._clock = clock
        self._known: Dict[str, Tuple[float, bool]] = {}

    def __call__(self, service: str) -> bool:
        """False also where it cannot be told: a session line then does what it does."""
        now = self._clock()
        known = self._known.get(service)
        if known is not None and now - known[0] < _KEEP_S:
            return known[1]
        if len(self._known) >= _SERVICES_MAX:
            self._known.clear()
        found = self._look(service)
        self._known[service] = (now, found)
        return found

    def _look(self, service: str) -> bool:
        if not service or Path(service).name != service:
            return False
        try:
            lines = adopt_lines(service, self._directory)
        except (OSError, ValueError):
            # ValueError: a NUL in the name.
            return False
        # A line that only observes joins nothing, nor does one for another service.
        acting = [line for line in lines if options_of(line).get("mode", "").lower() != "observe"]
        kinds = {line.kind for line in acting if is_for(line, service)}
        return "account" in kinds and "session" not in kinds


def lines_of(service: str, directory: Path = PAM_DIRECTORY) -> List[PamLine]:
    """Every line of ``service``, includes followed, in order. Raises OSError, also for what libpam cannot follow."""
    return list(_stack(directory / service, None, (), (), [0]))


def _stack(
    file: Path, kind: Optional[str], above: Tuple[Path, ...], within: Tuple[str, ...], read: List[int]
) -> Iterator[PamLine]:
    if file in above:
        # libpam follows it until there is no memory left (1.5), and whoever logs in is gone.
        raise OSError(errno.ELOOP, "it includes itself", str(above[-1]))
    above = (*above, file)
    for number, raw in _assembled(file, _text_of(file, read)):
        words = _split(raw)
        if words[:1] == ["@include"] and len(words) == 2:
            yield from _stack(file.parent / words[1], kind, above, within, read)
        elif words:
            found = words[0].lstrip("-").lower()
            quiet = words[0].startswith("-")
            if kind is not None and found != kind:
                continue
            # One that ends early is an error to libpam, which shuts the whole service for it.
            words += [""] * (3 - len(words))
            if words[1] in ("include", "substack") and words[2]:
                inside = within if words[1] == "include" else (*within, f"{file}:{number}")
                yield from _stack(file.parent / words[2], found, above, inside, read)
            else:
                yield PamLine(file, number, found, words[1], words[2], tuple(words[3:]), quiet, within)


def _text_of(file: Path, read: List[int]) -> str:
    """A file's text; ``read``: how many files were, of one service. Raises OSError, and never waits for a pipe."""
    if "\0" in str(file):
        # As in what an editor wrote as UTF-16.
        raise OSError(errno.EINVAL, "its name has a byte of zero in it", str(file))
    status = os.stat(file)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(file))
    read[0] += 1
    if status.st_size > _FILE_MAX_BYTES or read[0] > _FILES_MAX:
        raise OSError(errno.EFBIG, f"larger than {_FILE_MAX_BYTES} bytes, or more than {_FILES_MAX} files", str(file))
    # As bytes: the line ends of DOS are part of a word to libpam.
    return file.read_bytes().decode("utf-8", "backslashreplace")


def _assembled(file: Path, text: str) -> Iterator[Tuple[int, str]]:
    """Lines without comments, each with the number of its first; a backslash at the end continues one.

    As _pam_assemble_line() of libpam 1.5: blanks behind the backslash do not count, comments and empty lines are
    passed over in the middle of a line as well, and a line that has a comment is at its end.
    """
    begun, pending = 0, ""
    for number, raw in enumerate(text.split("\n"), 1):
        line, comment, _ = raw.partition("#")
        if not line.strip(" \t"):
            continue
        begun = begun or number
        if not comment and line.rstrip(" \t").endswith("\\"):
            pending += line.rstrip(" \t")[:-1] + " "
            continue
        yield begun, pending + line
        begun, pending = 0, ""
    if begun:
        raise OSError(errno.EINVAL, "it ends with a backslash, in the middle of a line", str(file))


def _split(line: str) -> List[str]:
    # Blanks and tabs part words, and nothing else: what is written with the line ends of DOS is no module's name.
    # A control may be "[success=1 default=ignore]", and so may an argument that holds spaces: one word either way.
    words: List[str] = []
    for bracketed, plain in re.findall(r"\[((?:[^\]\\]|\\.)*)\]|([^ \t]+)", line):
        words.append(plain or bracketed)
    return words
