"""The text of Slurm's configuration files: their values, with all that they include, and what tells of a change.

Owns the format (src/common/parse_config.c). It must never believe a file that others could write, nor take one that
cannot be read for one that is not there. What the values mean is for slurm_conf, which calls this.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Tuple

from adoptd.model import JobFault, JobManagerError

_INCLUDES_MAX = 64
_FILE_MAX_BYTES = 16 << 20
# src/common/parse_config.c: a value is quoted or one word, and there may be spaces around the "=".
_PAIR = re.compile(r'([A-Za-z0-9_.]+)[ \t]*=[ \t]*("[^"]*"|[^ \t"]+)')
_INCLUDE = re.compile(r"[ \t]*include[ \t]+([^ \t]+)[ \t]*", re.IGNORECASE)
_COMMENT = re.compile(r"(?<!\\)#.*")


@dataclass(frozen=True)
class Signature:
    """What tells one content of a file from another without reading it; zeros where there is no file."""

    file: str
    inode: int = 0
    size: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0

    @classmethod
    def of(cls, file: str, status: os.stat_result) -> Signature:
        """As the file is by its ``status``."""
        return cls(file, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True)
class ConfText:
    """A file's merged text: single values by lower-case key, (NodeName, NodeHostname) of each node line, the files.

    ``owner``: the uid that the first of them belongs to.
    """

    values: Mapping[str, str] = field(default_factory=dict)
    nodes: Tuple[Tuple[str, str], ...] = ()
    files: Tuple[Signature, ...] = ()
    owner: int = 0


def read(file: str) -> ConfText:
    """One configuration file and all it includes. Raises JobManagerError."""
    values: Dict[str, str] = {}
    nodes: List[Tuple[str, str]] = []
    files: List[Signature] = []
    owner = _read_into(file, Path(file).parent, values, nodes, files)
    return ConfText(values, tuple(nodes), tuple(files), owner)


def read_if_there(file: str) -> ConfText:
    """As :func:`read`; nothing but the signature where there is no such file. Raises JobManagerError for any other."""
    try:
        os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return ConfText(files=(Signature(file),))
    except OSError as error:
        raise JobManagerError(f"{file}: {error.strerror}", JobFault.CONFIGURATION) from None
    return read(file)


def _read_into(
    file: str, base: Path, values: Dict[str, str], nodes: List[Tuple[str, str]], files: List[Signature]
) -> int:
    if len(files) >= _INCLUDES_MAX:
        raise JobManagerError(f"{file}: more than {_INCLUDES_MAX} files include each other", JobFault.CONFIGURATION)
    text, signature, owner = _content_of(file)
    files.append(signature)
    for line in _lines(text):
        included = _INCLUDE.fullmatch(line)
        if included is not None:
            name = included[1].replace("%c", values.get("clustername", ""))
            if _read_into(str(base / name), base, values, nodes, files) not in (0, owner):
                raise JobManagerError(
                    f"{base / name}: its owner is neither root nor that of the file including it",
                    JobFault.CONFIGURATION,
                )
            continue
        pairs = {key.lower(): value.strip('"') for key, value in _PAIR.findall(line)}
        if "nodename" in pairs:
            nodes.append((pairs["nodename"], pairs.get("nodehostname", pairs["nodename"])))
        elif not pairs.keys() & {"partitionname", "downnodes", "nodeset", "switchname"}:
            values.update(pairs)
    return owner


def _content_of(file: str) -> Tuple[str, Signature, int]:
    """A file's text, its signature from right before it was read, and its owner.

    Raises JobManagerError if it cannot be read or anybody could have written it.
    """
    try:
        with Path(file).open("rb") as opened:
            status = os.fstat(opened.fileno())
            data = opened.read(_FILE_MAX_BYTES + 1)
    except OSError as error:
        raise JobManagerError(f"{file}: {error.strerror}", JobFault.CONFIGURATION) from None
    if not stat.S_ISREG(status.st_mode) or len(data) > _FILE_MAX_BYTES:
        raise JobManagerError(f"{file}: not a configuration file", JobFault.CONFIGURATION)
    if status.st_mode & stat.S_IWOTH:
        raise JobManagerError(f"{file}: everybody can write it", JobFault.CONFIGURATION)
    return data.decode("utf-8", "surrogateescape"), Signature.of(file, status), status.st_uid


def _lines(text: str) -> Iterator[str]:
    """Logical lines: a backslash at the end continues one, an unescaped # ends it."""
    pending = ""
    for line in text.splitlines():
        line = _COMMENT.sub("", line).rstrip()
        if line.endswith("\\"):
            pending += line[:-1] + " "
            continue
        yield (pending + line).replace("\\#", "#")
        pending = ""
    if pending:
        yield pending


def signature_of(file: str) -> Signature:
    """As the file is now."""
    try:
        return Signature.of(file, os.stat(file))
    except OSError:
        return Signature(file)
