"""Logging: one line per event, ``word key=value ...``; in the journal, with its fields as the journal's own.

Owns the only place where text from outside becomes part of a line: control characters are escaped
here and nowhere else, so a user name or a peer cannot forge a line. Under the journal an entry goes to its
socket; elsewhere, and where that is not to be had, the line goes to standard error.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Dict, Mapping, Union

from adoptd import journal

_LOGGER = logging.getLogger("adoptd")

# syslog(3). As a <N> prefix they give a line on standard error its priority in the journal (sd-daemon(3)).
_PRIORITY = {logging.DEBUG: "7", logging.INFO: "6", logging.WARNING: "4", logging.ERROR: "3"}

Field = Union[str, int, float, bool, None]

# Where a record of ours keeps its fields; one of a module with a logger of its own has none.
_FIELDS = "adoptd_fields"

# The journal's names for what an administrator looks a decision up by. What is not here is ADOPTD_ and its own name.
JOURNAL_FIELDS: Mapping[str, str] = {
    "job": "JOB_ID",
    "remote": "REMOTE_ADDR",
    "decision": "DECISION",
    "reason": "REASON",
    "witness": "WITNESS",
    "latency_ms": "LATENCY_MS",
    "request": "REQUEST_ID",
}
# What an event's line has under a word of its own, and the journal under these as well.
_ALSO: Mapping[str, Mapping[str, str]] = {
    "callerid_answered": {"peer": "REMOTE_ADDR", "outcome": "DECISION"},
    "join": {"outcome": "DECISION"},
    "escape": {"outcome": "DECISION", "mover": "REASON"},
    "observed_disagreement": {"would": "DECISION", "would_be_job": "JOB_ID"},
    "observed_unknown": {"would": "DECISION", "would_be_job": "JOB_ID"},
}


class _Formatter(logging.Formatter):
    def __init__(self, for_journal: bool) -> None:
        super().__init__("%(message)s")
        self._for_journal = for_journal

    def format(self, record: logging.LogRecord) -> str:
        line = shown(super().format(record), record)
        if self._for_journal:
            return f"<{_PRIORITY.get(record.levelno, '6')}>{line}"
        return f"{self.formatTime(record)} {record.levelname.lower()} {line}"


class _JournalHandler(logging.Handler):
    def __init__(self, to: journal.Journal) -> None:
        super().__init__()
        self._to = to

    def emit(self, record: logging.LogRecord) -> None:
        fields: Dict[str, str] = {
            "MESSAGE": shown(self.format(record), record),
            "PRIORITY": _PRIORITY.get(record.levelno, "6"),
            "SYSLOG_IDENTIFIER": "adoptd",
            "CODE_MODULE": record.name,
        }
        given: Mapping[str, Field] = getattr(record, _FIELDS, {})
        event = record.getMessage().partition(" ")[0]
        if hasattr(record, _FIELDS):
            fields["ADOPTD_EVENT"] = event
        also = _ALSO.get(event, {})
        for name, value in given.items():
            if value is not None:
                fields[JOURNAL_FIELDS.get(name, f"ADOPTD_{name.upper()}")] = scrub(_plain(value))
                if name in also:
                    fields[also[name]] = scrub(_plain(value))
        self._to.send(fields)

    def close(self) -> None:
        self._to.close()
        super().close()


def configure(level: str, for_journal: bool, journal_socket: str = journal.SOCKET) -> None:
    """Send events of ``level`` (error, warning, info, debug) and above to the journal, or to standard error."""
    handler: logging.Handler
    try:
        if not (for_journal and journal_socket):
            raise FileNotFoundError(journal_socket)
        handler = _JournalHandler(journal.Journal(journal_socket))
    except OSError:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter(for_journal))
    for before in _LOGGER.handlers:
        before.close()
    _LOGGER.handlers[:] = [handler]
    _LOGGER.propagate = False
    _LOGGER.setLevel(level.upper())


def silence() -> None:
    """Log nothing: for a command that says itself what it found."""
    _LOGGER.addHandler(logging.NullHandler())


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
    _LOGGER.debug("%s", _line(event, fields), extra={_FIELDS: fields})


def info(event: str, **fields: Field) -> None:
    """Something the administrator may look up later."""
    _LOGGER.info("%s", _line(event, fields), extra={_FIELDS: fields})


def warning(event: str, **fields: Field) -> None:
    """Something that works less well than it should."""
    _LOGGER.warning("%s", _line(event, fields), extra={_FIELDS: fields})


def error(event: str, **fields: Field) -> None:
    """Something that does not work."""
    _LOGGER.error("%s", _line(event, fields), extra={_FIELDS: fields})


def scrub(text: str) -> str:
    """``text`` with every character that is not printable replaced by its escape: one line stays one line."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def shown(text: str, record: logging.LogRecord) -> str:
    """The line for a formatted record: one style, also for modules that log sentences and tracebacks."""
    if not hasattr(record, _FIELDS):
        text = _line(record.name.rpartition(".")[2], {"text": text})
    return scrub(text)


def _line(event: str, fields: dict[str, Field]) -> str:
    return " ".join([event, *(f"{key}={_value(value)}" for key, value in fields.items() if value is not None)])


def _plain(value: Field) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _value(value: Field) -> str:
    text = _plain(value)
    if text and not any(char in text for char in ' "=\\') and text.isprintable():
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
