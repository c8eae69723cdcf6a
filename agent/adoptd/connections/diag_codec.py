"""The sock_diag messages: a question about one TCP socket to bytes, bytes of the reply to a DiagSocket. No I/O.

Owns the layouts of the kernel's netlink structures and every check of a reply's form. Never guesses: any
bytes give a DiagSocket, a DiagError or ProtocolError. Called by diag, which owns the netlink socket.

Integers are in host byte order, ports and addresses in network byte order, as in the kernel's headers.
"""

from __future__ import annotations

import socket
import struct
import sys
from dataclasses import dataclass
from typing import Optional, Union

from adoptd.connections.candidates import CONNECTED_STATES
from adoptd.connections.netlink import ERROR, HEADER, NLM_F_REQUEST, NLMSG_ERROR, attributes
from adoptd.model import UID_MAX, Connection, ProtocolError

_SOCK_DIAG_BY_FAMILY = 20  # include/uapi/linux/sock_diag.h
_INET_DIAG_CGROUP_ID = 21  # include/uapi/linux/inet_diag.h, Linux 5.8; like the next
_INET_DIAG_NOCOOKIE = 0xFFFFFFFF
_ANY_STATE = 0xFFFFFFFF

_REQUEST = struct.Struct("=BBBxI")  # struct inet_diag_req_v2 up to its id: family, protocol, extensions, states
_SOCKET_ID = struct.Struct("=2s2s16s16sIII")  # struct inet_diag_sockid: ports and addresses big-endian, if, cookie
_MESSAGE = struct.Struct("=BBBB")  # struct inet_diag_msg up to its id: family, state, timer, retransmits
_MESSAGE_TAIL = struct.Struct("=IIIII")  # and after it: expires, receive queue, send queue, uid, inode

_MESSAGE_BYTES = _MESSAGE.size + _SOCKET_ID.size + _MESSAGE_TAIL.size
_MAPPED_PREFIX = b"\0" * 10 + b"\xff\xff"  # RFC 4291, 2.5.5.2


@dataclass(frozen=True)
class DiagSocket:
    """One TCP socket as the kernel describes it. Addresses are packed, IPv4-mapped ones as the 4 bytes of IPv4.

    ``uid`` (creator's fsuid, or who it was fchown()ed to) and ``inode`` are None where no process holds it
    any more: the kernel reports 0 for both then. ``cgroup_id``: cgroup-v2 id of the task that called socket();
    None before Linux 5.8. ``device``: index of the network device that it is bound to, None if to none.
    """

    family: int
    state: int
    local_address: bytes
    local_port: int
    remote_address: bytes
    remote_port: int
    uid: Optional[int]
    inode: Optional[int]
    cgroup_id: Optional[int]
    device: Optional[int] = None

    def is_source_of(self, connection: Connection) -> bool:
        """Whether this is the source's socket of exactly that connection, connected and held by somebody."""
        return (
            self.state in CONNECTED_STATES
            and self.inode is not None
            and self.local_port == connection.source.port
            and self.remote_port == connection.destination.port
            and self.local_address == connection.source.address.packed
            and self.remote_address == connection.destination.address.packed
        )


@dataclass(frozen=True)
class DiagError:
    """The kernel's refusal: a positive errno. ENOENT also means that no tcp_diag module is loaded."""

    errno: int


def encode_question(connection: Connection, sequence: int, device: int = 0) -> bytes:
    """The netlink message that asks for the source's socket, bound to no device or to the one with this index.

    An AF_INET question finds AF_INET6 sockets that hold the mapped addresses too (Linux 6.18, measured).
    """
    source, destination = connection.source, connection.destination
    family = socket.AF_INET if connection.version == 4 else socket.AF_INET6
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _ANY_STATE) + _SOCKET_ID.pack(
        source.port.to_bytes(2, "big"),
        destination.port.to_bytes(2, "big"),
        source.address.packed,
        destination.address.packed,
        device,
        _INET_DIAG_NOCOOKIE,
        _INET_DIAG_NOCOOKIE,
    )
    # Without NLM_F_DUMP this is a look-up in the hash, and without NLM_F_ACK there is exactly one reply.
    return HEADER.pack(HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, sequence, 0) + body


def decode_reply(data: bytes, sequence: int) -> Union[DiagSocket, DiagError]:
    """Read one reply to the question numbered ``sequence``. Raises ProtocolError on anything else."""
    if len(data) < HEADER.size:
        raise ProtocolError(f"sock_diag reply of {len(data)} bytes has no header")
    length, kind, _, replied, _ = HEADER.unpack_from(data)
    if length != len(data):
        raise ProtocolError(f"sock_diag reply of {len(data)} bytes says that it has {length}")
    if replied != sequence:
        raise ProtocolError(f"sock_diag reply is to question {replied}, expected {sequence}")
    if kind == NLMSG_ERROR:
        return _decode_error(data)
    if kind != _SOCK_DIAG_BY_FAMILY:
        raise ProtocolError(f"sock_diag reply is of type {kind}")
    return _decode_socket(data)


def _decode_error(data: bytes) -> DiagError:
    if len(data) < HEADER.size + ERROR.size:
        raise ProtocolError(f"sock_diag error of {len(data)} bytes has no number")
    (number,) = ERROR.unpack_from(data, HEADER.size)
    if number >= 0:
        raise ProtocolError(f"sock_diag error has number {number}")
    return DiagError(-number)


def _decode_socket(data: bytes) -> DiagSocket:
    at = HEADER.size
    if len(data) < at + _MESSAGE_BYTES:
        raise ProtocolError(f"sock_diag reply of {len(data)} bytes is shorter than a socket")
    family, state, _, _ = _MESSAGE.unpack_from(data, at)
    at += _MESSAGE.size
    local_port, remote_port, local, remote, device, _, _ = _SOCKET_ID.unpack_from(data, at)
    at += _SOCKET_ID.size
    _, _, _, uid, inode = _MESSAGE_TAIL.unpack_from(data, at)
    if uid > UID_MAX:
        raise ProtocolError("sock_diag reply names no valid uid")
    return DiagSocket(
        family=family,
        state=state,
        local_address=_address(family, local),
        local_port=int.from_bytes(local_port, "big"),
        remote_address=_address(family, remote),
        remote_port=int.from_bytes(remote_port, "big"),
        uid=uid if inode else None,
        inode=inode or None,
        cgroup_id=_cgroup_id(data, at + _MESSAGE_TAIL.size),
        device=device or None,
    )


def _address(family: int, raw: bytes) -> bytes:
    if family == socket.AF_INET:
        return raw[:4]
    if family == socket.AF_INET6:
        return raw[12:] if raw.startswith(_MAPPED_PREFIX) else raw
    raise ProtocolError(f"sock_diag reply is about address family {family}")


def _cgroup_id(data: bytes, at: int) -> Optional[int]:
    found = attributes(data[at:]).get(_INET_DIAG_CGROUP_ID)
    if found is None:
        return None
    if len(found) != 8:
        raise ProtocolError(f"sock_diag cgroup id has {len(found)} bytes, expected 8")
    return int.from_bytes(found, sys.byteorder) or None
