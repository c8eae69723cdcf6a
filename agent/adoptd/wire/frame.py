"""Length-prefixed frames, for the agents' TCP port and the control socket.

A frame is a 4-byte length in network byte order, then that many bytes. The bound is checked on the
prefix alone, so a hostile length costs four bytes of reading and no memory.
"""

from __future__ import annotations

import struct

from adoptd.model import ProtocolError

_PREFIX = struct.Struct("!I")

PREFIX_BYTES = _PREFIX.size

# A sealed question or answer has 300 to 900 bytes; 4 KiB leaves room for a longer
# header of either scheme and is still nothing to a node that is sent thousands of them.
CALLERID_MAX_BYTES = 4096

# A control reply lists sessions or jobs: a node has at most a few thousand of each, 200 bytes apiece.
CONTROL_MAX_BYTES = 1 << 20


def encode_frame(body: bytes, max_bytes: int) -> bytes:
    """The frame for ``body``. Raises ProtocolError if it is empty or longer than ``max_bytes``."""
    _check(len(body), max_bytes)
    return _PREFIX.pack(len(body)) + body


def decode_length(prefix: bytes, max_bytes: int) -> int:
    """The body length that a 4-byte prefix announces. Raises ProtocolError if it is 0 or over ``max_bytes``."""
    if len(prefix) != PREFIX_BYTES:
        raise ProtocolError(f"frame prefix is {len(prefix)} bytes, expected {PREFIX_BYTES}")
    (length,) = _PREFIX.unpack(prefix)
    _check(length, max_bytes)
    return int(length)


def _check(length: int, max_bytes: int) -> None:
    if not 1 <= length <= max_bytes:
        raise ProtocolError(f"frame of {length} bytes, expected 1 to {max_bytes}")
