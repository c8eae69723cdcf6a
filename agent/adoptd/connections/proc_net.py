"""Reads PROC/net/tcp and PROC/net/tcp6: the inode and uid of the sockets with a connection's addresses.

Owns the row format of those two files. Never takes the first row that fits: all of them are returned, because
sockets bound to a device can share one 4-tuple in one network namespace. Called by the proc witness.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Iterator, Optional, Set, Tuple

from adoptd.connections.candidates import CONNECTED_STATES
from adoptd.deadline import Deadline
from adoptd.model import Connection, Endpoint, WitnessUnavailable

# One read. The kernel fills a page or so at a time, so the deadline is looked at every few dozen rows.
_CHUNK_BYTES = 64 * 1024
_ROW_BYTES_MAX = 4096
# Columns of a row (tcp4_seq_show, net/ipv4/tcp_ipv4.c), counted after splitting at blanks.
_STATE_COLUMN, _UID_COLUMN, _INODE_COLUMN = 3, 7, 9


@dataclass(frozen=True)
class SocketRow:
    """A connected socket: its creator's uid (fsuid, or who it was fchown()ed to) and its inode in sockfs.

    ``state``: its TCP state. ``device``: None, since the table does not say what it is bound to.
    """

    uid: int
    inode: int
    state: int
    device: Optional[int] = None


def rows_of(proc_root: Path, connection: Connection, deadline: Deadline) -> Tuple[SocketRow, ...]:
    """Every connected socket with the source as its local end and the destination as its remote one.

    Sockets that no process holds any more (inode 0: TIME_WAIT, orphans) are left out. Raises WitnessUnavailable.
    """
    tables = [(proc_root / "net" / "tcp6", _needle(connection, mapped=True))]
    if connection.version == 4:
        tables.insert(0, (proc_root / "net" / "tcp", _needle(connection, mapped=False)))
    found: Set[SocketRow] = set()
    for path, needle in tables:
        try:
            with path.open("rb", buffering=0) as table:
                found.update(_matching(table, needle, path, deadline))
        except FileNotFoundError:
            # A kernel without IPv6 has no tcp6, and then no such socket either.
            if path.name == "tcp":
                raise WitnessUnavailable(f"there is no {path}") from None
        except OSError as error:
            raise WitnessUnavailable(f"cannot read {path}: {error.strerror}") from error
    return tuple(sorted(found, key=lambda row: row.inode))


def _needle(connection: Connection, mapped: bool) -> bytes:
    source, destination = _words(connection.source, mapped), _words(connection.destination, mapped)
    # The colon is that of the row number: no later pair of columns can be taken for the addresses.
    return f": {source} {destination} ".encode("ascii")


def _words(endpoint: Endpoint, mapped: bool) -> str:
    """An address as the kernel prints it: 32-bit words of network order, each printed in host order."""
    packed = endpoint.address.packed
    if mapped and len(packed) == 4:
        packed = b"\0" * 10 + b"\xff\xff" + packed
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{endpoint.port:04X}"


def _matching(table: BinaryIO, needle: bytes, path: Path, deadline: Deadline) -> Iterator[SocketRow]:
    rest = b""
    read_bytes = 0
    while True:
        if deadline.expired:
            raise WitnessUnavailable(f"out of time after {read_bytes} bytes of {path}")
        chunk = table.read(_CHUNK_BYTES)
        read_bytes += len(chunk)
        rows, _, rest = (rest + chunk).rpartition(b"\n")
        if len(rest) > _ROW_BYTES_MAX or (not chunk and rest):
            raise WitnessUnavailable(f"{path} has a row without an end at byte {read_bytes}")
        at = rows.find(needle)
        while at != -1:
            start, end = rows.rfind(b"\n", 0, at) + 1, rows.find(b"\n", at)
            yield from _parse(rows[start : end if end != -1 else len(rows)], path)
            at = rows.find(needle, at + len(needle))
        if not chunk:
            return


def _parse(row: bytes, path: Path) -> Iterator[SocketRow]:
    try:
        columns = row.split()
        state, uid, inode = int(columns[_STATE_COLUMN], 16), int(columns[_UID_COLUMN]), int(columns[_INODE_COLUMN])
    except (IndexError, ValueError):
        raise WitnessUnavailable(f"{path} has a row of an unknown format: {row[:200]!r}") from None
    if state in CONNECTED_STATES and inode != 0:
        yield SocketRow(uid, inode, state)
