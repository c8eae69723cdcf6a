"""The sshds that listen on this host, how each was started, and the files that it was told to read.

Owns the reading of their titles and of what sshd_config includes; what the settings come to, sshd itself says. Never
opens what is no regular file. Called by the doctor's look at sshd.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from adoptd.doctor.ports import listening_rows
from adoptd.doctor.processes import PROC, Running, holders_of, identity, read, running

DEFAULT_FILE = "/etc/ssh/sshd_config"
_BESIDE = Path("/etc/ssh")
_LISTENERS_MAX = 4
_FILES_MAX = 64
_FILE_MAX_BYTES = 1 << 20
_INIT = 1
_NULL = os.makedev(1, 3)


@dataclass(frozen=True)
class Started:
    """What an sshd was told on its command line: its file, and the settings that count before those in it."""

    file: str = DEFAULT_FILE
    settings: Tuple[str, ...] = ()


@dataclass(frozen=True)
class Listener:
    """One sshd that waits for connections."""

    process: Running
    started: Started


@dataclass(frozen=True)
class ConfigFile:
    """A file that sshd reads. ``status`` is None where it cannot be seen."""

    path: str
    status: Optional[os.stat_result]

    @property
    def is_regular(self) -> bool:
        """Whether reading it ends."""
        return self.status is not None and stat.S_ISREG(self.status.st_mode)

    @property
    def is_endless(self) -> bool:
        """Whether reading it may never end, or take all memory. The null device, which some give, is at its end, and a
        directory, as "*" may match one, cannot be read at all."""
        if self.status is None or stat.S_ISDIR(self.status.st_mode):
            return False
        return not self.is_regular and self.status.st_rdev != _NULL


@dataclass(frozen=True)
class Setting:
    """One line of sshd's configuration, outside of any Match."""

    place: str
    key: str
    value: str


def listeners() -> Tuple[Listener, ...]:
    """Those that see our files, one for each way they were started: one that serves a login has another title."""
    found: Dict[Tuple[Started, str], Listener] = {}
    for process in running("sshd"):
        started = started_by(process.title)
        if started is not None and process.uid == 0 and len(found) < _LISTENERS_MAX:
            found.setdefault((started, process.name), Listener(process, started))
    return tuple(found.values())


def started_by(title: str) -> Optional[Started]:
    """What the listener with this title was told; None for an sshd that serves a login."""
    if " -i" in title or (re.match(r"[^ /]*sshd[^ /]*: ", title) and "[listener]" not in title):
        return None
    words = iter(title.partition(" [listener]")[0].split())
    file, settings = DEFAULT_FILE, []
    for word in words:
        letter, value = word[:2], word[2:]
        if letter not in ("-f", "-o"):
            continue
        value = value or next(words, "")
        if letter == "-f":
            file = value if value.startswith("/") else file
        else:
            # The title has lost the quotes of -o "UsePAM no".
            settings.append(value if "=" in value else f"{value}={next(words, '')}")
    return Started(file, tuple(settings))


def files_of(file: str) -> List[ConfigFile]:
    """The file and all that it includes, in the order in which they are read."""
    found: List[ConfigFile] = []
    list(_settings(file, found))
    return found


def settings_of(file: str) -> List[Setting]:
    """The lines outside of Match, in order: of one that is there twice sshd takes the first."""
    return list(_settings(file, []))


def says(file: str, key: str) -> Optional[Setting]:
    """Where ``key`` (lower-case) is set, and to what; None where it is by default."""
    return next((line for line in settings_of(file) if line.key == key), None)


def _settings(file: str, seen: List[ConfigFile]) -> Iterator[Setting]:
    try:
        status: Optional[os.stat_result] = os.stat(file)
    except OSError:
        status = None
    here = ConfigFile(file, status)
    if len(seen) >= _FILES_MAX or here in seen:
        return
    seen.append(here)
    if not here.is_regular:
        return
    for number, line in enumerate(_text_of(file).splitlines(), 1):
        words = re.split(r"[ \t=]+", line.strip().partition("#")[0], maxsplit=1)
        key, value = words[0].lower(), (words[1] if len(words) > 1 else "").strip()
        if key == "match":
            return
        if key == "include":
            for path in _included(value):
                yield from _settings(path, seen)
        elif key:
            yield Setting(f"{file}:{number}", key, value.strip('"'))


def _text_of(file: str) -> str:
    try:
        with open(file, "rb") as opened:
            return opened.read(_FILE_MAX_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _included(patterns: str) -> List[str]:
    found: List[str] = []
    for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', patterns):
        found += sorted(glob.glob(str(_BESIDE / (quoted or plain))))
    return found


def hidden_from(process: Running, paths: Sequence[str], proc: Path = PROC) -> List[str]:
    """Those of ``paths`` that are here, and that the process sees nothing of, or another thing: its unit hides them."""
    return [path for path in paths if identity(path) not in (None, identity(f"{proc}/{process.pid}/root{path}"))]


def read_at_s(listener: Listener, pid_file: str) -> Optional[float]:
    """When the listener last read its files; None where that cannot be told: a reload leaves its start as it is.

    It writes its pid file each time.
    """
    try:
        written_s = os.stat(pid_file).st_mtime
    except OSError:
        return None
    return written_s if read(pid_file).strip() == str(listener.process.pid) else None


def changed_since(files: Sequence[ConfigFile], since_s: float) -> List[str]:
    """Which were changed after that time."""
    return [file.path for file in files if file.status is not None and file.status.st_ctime > since_s]


def is_kept_by_init(port: int) -> bool:
    """Whether the service manager listens on the port, and starts sshd when somebody comes (ssh.socket)."""
    inodes = [inode for _, bound, _, inode in listening_rows() if bound == port]
    return any(_INIT in holders for holders in holders_of(inodes).values())
