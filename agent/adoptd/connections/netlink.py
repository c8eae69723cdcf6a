"""Netlink: messages, attributes, and one question with a bounded answer.

Owns the framing (include/uapi/linux/netlink.h) and nothing of what is asked. Never waits longer than the deadline,
never takes a message from anybody but the kernel, and takes bytes that break the framing for an error. Each question
has a socket of its own, in the network namespace of the calling thread. Called by conntrack and routes; diag, whose
socket stays, has the framing from here.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Dict, List, Tuple

from adoptd.deadline import Deadline
from adoptd.model import ProtocolError

NLMSG_ERROR, _NLMSG_DONE = 2, 3
NLM_F_REQUEST, _NLM_F_DUMP_INTR = 0x1, 0x10
NLM_F_DUMP = 0x300
_NLA_F_NESTED, _NLA_TYPE_MASK = 0x8000, 0x3FFF

HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port id
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length with header, type
ERROR = struct.Struct("=i")  # struct nlmsgerr up to the message it answers
_KERNEL = 0  # the port id that only the kernel sends from, netlink(7)
_SEQUENCE = 1

# The kernel fills at most 32 KiB of a dump at once (NLMSG_GOODSIZE, netlink_dump); longer arrives cut, and is refused.
_PART_BYTES_MAX = 65536
# A dump of links has one message per device, of 1 to 2 KiB.
_PARTS_MAX = 1024
# The kernel answers before send() returns; this bounds what should never happen.
_PART_S = 0.05


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind) + payload + bytes(-len(payload) % 4)


def nested(kind: int, *inner: bytes) -> bytes:
    """An attribute that holds others."""
    return attribute(kind | _NLA_F_NESTED, b"".join(inner))


def attributes(data: bytes) -> Dict[int, bytes]:
    """The attributes in ``data``, by type. Raises ProtocolError; one that is there twice is an error too."""
    found: Dict[int, bytes] = {}
    at = 0
    while at < len(data):
        if len(data) - at < _ATTRIBUTE.size:
            raise ProtocolError(f"netlink attribute at byte {at} is cut short")
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        kind &= _NLA_TYPE_MASK
        if not _ATTRIBUTE.size <= length <= len(data) - at:
            raise ProtocolError(f"netlink attribute at byte {at} has length {length}")
        if kind in found:
            raise ProtocolError(f"netlink attribute {kind} is there twice")
        found[kind] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found


def number(found: Dict[int, bytes], kind: int, order: str = "=I") -> int:
    """The number in an attribute. Raises ProtocolError if it is missing or has another width."""
    try:
        (value,) = struct.unpack(order, found[kind])
    except (KeyError, struct.error):
        raise ProtocolError(f"netlink attribute {kind} is missing, or no number as {order}") from None
    return int(value)


def ask(protocol: int, kind: int, body: bytes, wanted: int, deadline: Deadline, flags: int = 0) -> List[bytes]:
    """The bodies of the messages of type ``wanted`` that the kernel answers with: one, or all with NLM_F_DUMP.

    Raises OSError with the kernel's own number, TimeoutError, and ProtocolError.
    """
    question = HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | flags, _SEQUENCE, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as channel:
        channel.bind((0, 0))
        channel.connect((_KERNEL, 0))
        channel.send(question)
        answers: List[bytes] = []
        for _ in range(_PARTS_MAX):
            left_s = min(deadline.remaining_s(), _PART_S)
            if left_s <= 0.0:
                raise TimeoutError(errno.ETIMEDOUT, "no time left for the kernel's answer")
            channel.settimeout(left_s)
            data, (sender, _) = channel.recvfrom(_PART_BYTES_MAX)
            if sender != _KERNEL:
                continue
            done, found = decode(data, wanted)
            answers += found
            # Whether there is more is not asked of the message: conntrack says so of a single one (NLM_F_MULTI).
            if done or (found and not flags & NLM_F_DUMP):
                return answers
    raise ProtocolError(f"netlink answer has more than {_PARTS_MAX} parts")


def ask_one(protocol: int, kind: int, body: bytes, wanted: int, deadline: Deadline) -> bytes:
    """The body of the one message that the kernel answers with. Raises as :func:`ask`."""
    answers = ask(protocol, kind, body, wanted, deadline)
    if len(answers) != 1:
        raise ProtocolError(f"netlink answer has {len(answers)} messages, expected 1")
    return answers[0]


def decode(data: bytes, wanted: int) -> Tuple[bool, List[bytes]]:
    """Whether the answer ends with ``data``, and the bodies of its messages. Raises OSError, ProtocolError."""
    bodies: List[bytes] = []
    at = 0
    while at < len(data):
        if len(data) - at < HEADER.size:
            raise ProtocolError(f"netlink message at byte {at} has no header")
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, at)
        if not HEADER.size <= length <= len(data) - at:
            raise ProtocolError(f"netlink message at byte {at} has length {length}")
        body = data[at + HEADER.size : at + length]
        at += (length + 3) & ~3
        if sequence != _SEQUENCE:
            raise ProtocolError(f"netlink message answers question {sequence}, expected {_SEQUENCE}")
        if kind in (NLMSG_ERROR, _NLMSG_DONE):
            _raise_for(kind, body)
            return True, bodies
        if flags & _NLM_F_DUMP_INTR:
            raise InterruptedError(errno.EINTR, "what was asked about changed meanwhile")
        if kind != wanted:
            raise ProtocolError(f"netlink message is of type {kind}, expected {wanted}")
        bodies.append(body)
    return False, bodies


def _raise_for(kind: int, body: bytes) -> None:
    if len(body) < ERROR.size:
        if kind == NLMSG_ERROR:
            raise ProtocolError(f"netlink error of {len(body)} bytes has no number")
        return
    (value,) = ERROR.unpack_from(body)
    if value < 0:
        raise OSError(-value, os.strerror(-value))
    if value > 0:
        raise ProtocolError(f"netlink error has number {value}")
