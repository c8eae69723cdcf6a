"""One entry for systemd's journal, in its native protocol: a datagram of fields to a unix socket.

Owns the encoding and the rule that the journal never holds up a login: what it does not take at once is
counted and told with the next entry. Called by :mod:`adoptd.log` only. The protocol is
https://systemd.io/JOURNAL_NATIVE_PROTOCOL/.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from typing import Mapping

SOCKET = "/run/systemd/journal/socket"

# The length before a value that has a newline: 64 bits, little endian.
_LENGTH = struct.Struct("<Q")
# Sent as a file instead: the datagram is longer than the socket's buffer (unix(7)).
_TOO_LONG = frozenset({errno.EMSGSIZE, errno.ENOBUFS})
# journald takes a file that can change no more (man 2 fcntl): F_ADD_SEALS, and the four seals of Linux 3.17.
_F_ADD_SEALS = 1033
_SEALS = 0x1 | 0x2 | 0x4 | 0x8


class Journal:
    """A connection to the journal."""

    def __init__(self, path: str = SOCKET) -> None:
        """Raises OSError if nobody listens there."""
        self._path = path
        self._lost = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise

    def send(self, fields: Mapping[str, str]) -> None:
        """Send one entry, or lose it and count that. Never waits, never raises OSError."""
        entry = dict(fields)
        if self._lost:
            entry["ADOPTD_ENTRIES_LOST"] = str(self._lost)
        data = encode(entry)
        try:
            self._deliver(data)
        except OSError as error:
            self._lost += 1
            if error.errno in (errno.ECONNREFUSED, errno.ENOTCONN, errno.ECONNRESET):
                # journald was restarted without its socket being kept: the next entry goes to the new one.
                with contextlib.suppress(OSError):
                    self._socket.connect(self._path)
        else:
            self._lost = 0

    def close(self) -> None:
        """Hang up. May be called twice."""
        self._socket.close()

    def _deliver(self, data: bytes) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            if error.errno not in _TOO_LONG:
                raise
            descriptor = os.memfd_create("adoptd-journal-entry", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
            with open(descriptor, "wb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEALS)
                socket.send_fds(self._socket, [b""], [descriptor])


def encode(fields: Mapping[str, str]) -> bytes:
    """One entry. Names are ours: capital letters, digits and underscores, not beginning with one of the latter two."""
    parts = []
    for name, text in fields.items():
        value = text.encode("utf-8", "backslashreplace")
        if b"\n" in value:
            parts.append(name.encode("ascii") + b"\n" + _LENGTH.pack(len(value)) + value + b"\n")
        else:
            parts.append(name.encode("ascii") + b"=" + value + b"\n")
    return b"".join(parts)
