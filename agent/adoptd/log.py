"""Logging: one line per event, ``word key=value ...``, to standard error, where the journal reads it.

Owns the only place where text from outside becomes part of a line: control characters are escaped
here and nowhere else, so a user name or a peer cannot forge a line.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Union

_LOGGER = logging.getLogger("adoptd")

# sd-daemon(3): a <N> prefix gives the line its syslog priority in the journal.
_PRIORITY = {logging.DEBUG: "<7>", logging.INFO: "<6>", logging.WARNING: "<4>", logging.ERROR: "<3>"}

Field = Union[str, int, float, bool, None]


class _Formatter(logging.Formatter):
    def __init__(self, for_journal: bool) -> None:
        super().__init__("%(message)s")
        self._for_journal = for_journal

    def format(self, record: logging.LogRecord) -> str:
        line = scrub(super().format(record))
        if self._for_journal:
            return _PRIORITY.get(record.levelno, "<6>") + line
        return f"{self.formatTime(record)} {record.levelname.lower()} {line}"


def configure(level: str, for_journal: bool) -> None:
    """Send events of ``level`` (error, warning, info, debug) and above to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(for_journal))
    _LOGGER.handlers[:] = [handler]
    _LOGGER.propagate = False
    _LOGGER.setLevel(level.upper())


def is_journal() -> bool:
    """Whether standard error is the journal, by device and inode number as systemd.exec(5) says.

    The variable alone says little: whatever a service starts inherits it, a shell among them.
    """
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def debug(event: str, **fields: Field) -> None:
    """Something a developer asks for."""
    _LOGGER.debug("%s", _line(event, fields))


def info(event: str, **fields: Field) -> None:
    """Something the administrator may look up later."""
    _LOGGER.info("%s", _line(event, fields))


def warning(event: str, **fields: Field) -> None:
    """Something that works less well than it should."""
    _LOGGER.warning("%s", _line(event, fields))


def error(event: str, **fields: Field) -> None:
    """Something that does not work."""
    _LOGGER.error("%s", _line(event, fields))


def scrub(text: str) -> str:
    """``text`` with every character that is not printable replaced by its escape: one line stays one line."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def _line(event: str, fields: dict[str, Field]) -> str:
    return " ".join([event, *(f"{key}={_value(value)}" for key, value in fields.items() if value is not None)])


def _value(value: Field) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    text = str(value)
    if text and not any(char in text for char in ' "=\\') and text.isprintable():
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
