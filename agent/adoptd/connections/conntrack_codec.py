"""The conntrack messages: a question about one translated TCP connection to bytes, and bytes of the answer. No I/O.

Owns the layout of ctnetlink's tuples (include/uapi/linux/netfilter/nfnetlink_conntrack.h). Never takes an answer for
one about another connection. Called by conntrack, which asks.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Dict, Optional

from adoptd.connections.netlink import attribute, attributes, nested, number
from adoptd.model import Connection, Endpoint, IPAddress, ProtocolError

# (NFNL_SUBSYS_CTNETLINK << 8) | IPCTNL_MSG_CT_*
CT_NEW, CT_GET = 0x100, 0x101
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY = 1, 2
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_IP_SOURCES = {4: (1, 2), 6: (3, 4)}  # CTA_IP_V4_SRC, CTA_IP_V4_DST; CTA_IP_V6_SRC, CTA_IP_V6_DST
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_GENERAL = struct.Struct("=BBH")  # struct nfgenmsg: family, version, resource id


def encode_question(connection: Connection) -> bytes:
    """Asks for the entry whose answers go from the connection's destination to its source, as seen outside."""
    source, destination = connection.source, connection.destination
    from_kind, to_kind = _CTA_IP_SOURCES[connection.version]
    return _GENERAL.pack(_FAMILIES[connection.version], 0, 0) + nested(
        _CTA_TUPLE_REPLY,
        nested(
            _CTA_TUPLE_IP,
            attribute(from_kind, destination.address.packed),
            attribute(to_kind, source.address.packed),
        ),
        nested(
            _CTA_TUPLE_PROTO,
            attribute(_CTA_PROTO_NUM, bytes([socket.IPPROTO_TCP])),
            attribute(_CTA_PROTO_SRC_PORT, destination.port.to_bytes(2, "big")),
            attribute(_CTA_PROTO_DST_PORT, source.port.to_bytes(2, "big")),
        ),
    )


def decode_answer(body: bytes, connection: Connection) -> Optional[Connection]:
    """What ``connection`` was before it was translated; None if it was not. Raises ProtocolError.

    The kernel finds an entry by either of its two tuples, so one of a connection the other way round is no answer.
    """
    if len(body) < _GENERAL.size:
        raise ProtocolError(f"conntrack entry of {len(body)} bytes")
    family = body[0]
    version = next((version for version, known in _FAMILIES.items() if known == family), None)
    if version is None:
        raise ProtocolError(f"conntrack entry is of address family {family}")
    found = attributes(body[_GENERAL.size :])
    answers = _tuple_of(found, _CTA_TUPLE_REPLY, version)
    if answers != Connection(connection.destination, connection.source):
        return None
    before = _tuple_of(found, _CTA_TUPLE_ORIG, version)
    return before if before != connection else None


def _tuple_of(found: Dict[int, bytes], kind: int, version: int) -> Connection:
    try:
        whole = attributes(found[kind])
        addresses, protocol = attributes(whole[_CTA_TUPLE_IP]), attributes(whole[_CTA_TUPLE_PROTO])
        from_kind, to_kind = _CTA_IP_SOURCES[version]
        ends = _address(addresses[from_kind], version), _address(addresses[to_kind], version)
    except KeyError as error:
        raise ProtocolError(f"conntrack entry has a tuple without attribute {error}") from None
    if number(protocol, _CTA_PROTO_NUM, "=B") != socket.IPPROTO_TCP:
        raise ProtocolError("conntrack entry is not of a TCP connection")
    ports = number(protocol, _CTA_PROTO_SRC_PORT, "!H"), number(protocol, _CTA_PROTO_DST_PORT, "!H")
    try:
        return Connection(Endpoint(ends[0], ports[0]), Endpoint(ends[1], ports[1]))
    except ValueError as error:
        raise ProtocolError(f"conntrack entry has a tuple that is no connection: {error}") from None


def _address(packed: bytes, version: int) -> IPAddress:
    if len(packed) != (4 if version == 4 else 16):
        raise ProtocolError(f"conntrack entry has an address of {len(packed)} bytes")
    return ipaddress.ip_address(packed)
