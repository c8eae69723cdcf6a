"""Where packets to an address go from here: to this host itself, or to which network namespaces.

Owns the rtnetlink questions (include/uapi/linux/rtnetlink.h, if_link.h, net_namespace.h) of the namespace of the
calling thread. Namespaces are named by the ids that it has for them: it has one for each that a network device of
its own leads to, and none for those that users make for themselves. Called by the conntrack witness.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass
from typing import Dict, FrozenSet, Optional, Set

from adoptd.connections.netlink import NLM_F_DUMP, ask, ask_one, attribute, attributes, number
from adoptd.deadline import Deadline
from adoptd.model import IPAddress, ProtocolError

_RTM_NEWLINK, _RTM_GETLINK = 16, 18
_RTM_NEWROUTE, _RTM_GETROUTE = 24, 26
_RTM_NEWNSID, _RTM_GETNSID = 88, 90
_RTA_DST, _RTA_OIF = 1, 4
_RTN_UNICAST, _RTN_LOCAL = 1, 2
_IFLA_MASTER, _IFLA_EXT_MASK, _IFLA_LINK_NETNSID = 10, 29, 37
_RTEXT_FILTER_SKIP_STATS = 8
_NETNSA_NSID, _NETNSA_FD = 1, 3

_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_GENERAL = struct.Struct("=B3x")  # struct rtgenmsg, padded

# A dump of links is refused while links change, which on a host that starts containers is now and then.
_DUMPS_MAX = 3


@dataclass(frozen=True)
class Route:
    """``local``: the address is one of this host's own. ``device``: the index of the one that packets leave by."""

    local: bool
    device: int


def route_to(address: IPAddress, deadline: Deadline) -> Optional[Route]:
    """How packets to ``address`` go; None if they do not. Raises OSError, ProtocolError."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    body = _ROUTE.pack(family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0) + attribute(_RTA_DST, address.packed)
    try:
        answer = ask_one(socket.NETLINK_ROUTE, _RTM_GETROUTE, body, _RTM_NEWROUTE, deadline)
    except OSError as error:
        if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL):
            return None
        raise
    if len(answer) < _ROUTE.size:
        raise ProtocolError(f"netlink route of {len(answer)} bytes")
    kind = _ROUTE.unpack_from(answer)[7]
    if kind not in (_RTN_UNICAST, _RTN_LOCAL):
        return None
    return Route(kind == _RTN_LOCAL, number(attributes(answer[_ROUTE.size :]), _RTA_OIF))


def namespaces_behind(device: int, deadline: Deadline) -> FrozenSet[int]:
    """The ids of the namespaces that packets on ``device`` may reach: at its other end, or at its bridge's ports.

    Raises OSError, ProtocolError.
    """
    link = ask_one(socket.NETLINK_ROUTE, _RTM_GETLINK, _link_question(device), _RTM_NEWLINK, deadline)
    direct = _namespace_of(link)
    return frozenset({direct}) if direct is not None else _behind_ports(device, deadline)


def namespace_id(fd: int, deadline: Deadline) -> Optional[int]:
    """The id of the namespace that ``fd`` is of; None if it has none here. Raises OSError, ProtocolError."""
    body = _GENERAL.pack(socket.AF_UNSPEC) + attribute(_NETNSA_FD, struct.pack("=I", fd))
    answer = ask_one(socket.NETLINK_ROUTE, _RTM_GETNSID, body, _RTM_NEWNSID, deadline)
    return _id_in(attributes(answer[_GENERAL.size :]), _NETNSA_NSID)


def _behind_ports(bridge: int, deadline: Deadline) -> FrozenSet[int]:
    body = _link_question(0) + attribute(_IFLA_MASTER, struct.pack("=I", bridge))
    for attempt in range(_DUMPS_MAX):
        try:
            links = ask(socket.NETLINK_ROUTE, _RTM_GETLINK, body, _RTM_NEWLINK, deadline, NLM_F_DUMP)
        except InterruptedError:
            if attempt == _DUMPS_MAX - 1:
                raise
            continue
        found: Set[int] = set()
        for link in links:
            facts = _facts_of(link)
            # The kernel may have left the filter aside.
            if _IFLA_MASTER in facts and number(facts, _IFLA_MASTER) == bridge:
                namespace = _id_in(facts, _IFLA_LINK_NETNSID)
                found.update(() if namespace is None else (namespace,))
        return frozenset(found)
    return frozenset()


def _link_question(device: int) -> bytes:
    mask = struct.pack("=I", _RTEXT_FILTER_SKIP_STATS)
    return _LINK.pack(socket.AF_UNSPEC, 0, device, 0, 0) + attribute(_IFLA_EXT_MASK, mask)


def _facts_of(link: bytes) -> Dict[int, bytes]:
    if len(link) < _LINK.size:
        raise ProtocolError(f"netlink link of {len(link)} bytes")
    return attributes(link[_LINK.size :])


def _namespace_of(link: bytes) -> Optional[int]:
    return _id_in(_facts_of(link), _IFLA_LINK_NETNSID)


def _id_in(facts: Dict[int, bytes], kind: int) -> Optional[int]:
    """Negative: that namespace has no id here."""
    if kind not in facts:
        return None
    found = number(facts, kind, "=i")
    return found if found >= 0 else None
