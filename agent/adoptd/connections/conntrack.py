"""The conntrack witness: connections whose addresses this host translates, such as those of containers.

What another node sees of a connection made in a container is this host's address (source NAT). Conntrack knows what
the connection was before; the routes know which network namespace that address is in; and the socket there has its
label, and its uid and cgroup. Owns this order. Never looks at a namespace that no device of this host leads to, where
any user can make any connection, and never chooses between two sockets. Called by Witnesses in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import functools
from typing import Dict, FrozenSet, List, Optional, Protocol, Sequence

from adoptd.connections import ConnectionWitness, agreed_owner
from adoptd.connections.bpf import owner_by_label
from adoptd.connections.conntrack_codec import CT_GET, CT_NEW, decode_answer, encode_question
from adoptd.connections.diag import find_here
from adoptd.connections.diag_codec import DiagSocket
from adoptd.connections.namespaces import held, inside
from adoptd.connections.netlink import ask_one
from adoptd.connections.routes import namespaces_behind, route_to
from adoptd.deadline import Deadline
from adoptd.model import Ambiguous, Connection, Endpoint, Owner, ProtocolError, Witness, WitnessUnavailable
from adoptd.probe.record import Answer

_NETLINK_NETFILTER = 12  # include/uapi/linux/netlink.h
# There exactly if nf_conntrack is loaded. Asking without it would have the kernel load it.
_COUNT = "/proc/sys/net/netfilter/nf_conntrack_count"
# Why a host without it has no use for this witness: nothing is wrong with it.
NOTHING_TRANSLATED = "no connection is translated here: nf_conntrack is not loaded"
# Namespaces on one bridge that are looked into for one connection, at 10 us each.
NAMESPACES_MAX = 256
_SELF_TEST_MS = 100.0
# Addresses for documentation (RFC 5737): nothing is connected to them.
_NOWHERE = Connection(Endpoint.parse("192.0.2.1:9"), Endpoint.parse("192.0.2.2:9"))


class LabelReader(Protocol):
    """The bpf witness, as it is asked about another namespace."""

    def look_in(self, connection: Connection, netns: int) -> Optional[Answer]:
        """The socket in the namespace with this id, labelled or not. Raises WitnessUnavailable."""
        ...


class ConntrackWitness:
    """Names who connected before the connection was translated. Asked in several threads at once."""

    name = Witness.CONNTRACK
    may_block = True

    def __init__(self, labels: LabelReader, direct: Sequence[ConnectionWitness]) -> None:
        """``direct`` are asked about connections of this host's own that are translated."""
        self._labels = labels
        self._direct = tuple(direct)

    def self_test(self) -> Optional[str]:
        """None if conntrack can be asked, else why not."""
        # The first question may have the kernel load nf_conntrack_netlink, which takes as long as it takes.
        with contextlib.suppress(WitnessUnavailable):
            _before(_NOWHERE, Deadline.after_ms(_SELF_TEST_MS))
        try:
            _before(_NOWHERE, Deadline.after_ms(_SELF_TEST_MS))
        except WitnessUnavailable as error:
            return str(error)
        return None

    def owner_of(self, connection: Connection, deadline: Deadline) -> Optional[Owner]:
        """The owner, or None: the connection is not translated here, or its maker is not on this host.

        Raises WitnessUnavailable, and Ambiguous if two sockets could be it, or who made it is contradicted.
        """
        before = _before(connection, deadline)
        if before is None:
            return None
        try:
            route = route_to(before.source.address, deadline)
            if route is None:
                return None
            namespaces = None if route.local else namespaces_behind(route.device, deadline)
        except (OSError, ProtocolError) as error:
            raise WitnessUnavailable(f"where {before.source} is cannot be told: {error}") from None
        if namespaces is None:
            heard = (witness.owner_of(before, deadline) for witness in self._direct)
            return _together(before, [owner for owner in heard if owner is not None])
        if len(namespaces) > NAMESPACES_MAX:
            raise WitnessUnavailable(f"{before.source} may be in any of {len(namespaces)} network namespaces")
        return self._in_one_of(namespaces, before, deadline)

    def _in_one_of(self, namespaces: FrozenSet[int], before: Connection, deadline: Deadline) -> Optional[Owner]:
        try:
            answers = {each: self._labels.look_in(before, each) for each in namespaces}
        except WitnessUnavailable:
            # Without labels: what sock_diag says alone, wherever there is a process.
            return _together(before, _owners_of(_by_diag(namespaces, None, before, deadline), before))
        seen = {each: answer for each, answer in answers.items() if answer is not None}
        if len(seen) > 1 or any(answer.twins for answer in seen.values()):
            raise Ambiguous(f"more than one socket is {before}, which {_where(seen)}")
        if not seen:
            return None
        ((_, answer),) = seen.items()
        labelled = owner_by_label(answer)
        pid = None if labelled is None else labelled.pid
        owners = [] if labelled is None else [labelled]
        return _together(before, owners + _owners_of(_by_diag(frozenset(seen), pid, before, deadline), before))


def _where(seen: Dict[int, Answer]) -> str:
    """Where sockets were found, for a message."""
    return f"is in {len(seen)} network namespaces" if len(seen) > 1 else "is twice in one network namespace"


def _before(connection: Connection, deadline: Deadline) -> Optional[Connection]:
    """What the connection was before it was translated; None if it is not. Raises WitnessUnavailable."""
    try:
        with open(_COUNT, "rb", buffering=0) as count:
            if int(count.read()) == 0 and connection is not _NOWHERE:
                return None
    except FileNotFoundError:
        raise WitnessUnavailable(NOTHING_TRANSLATED) from None
    except (OSError, ValueError) as error:
        raise WitnessUnavailable(f"{_COUNT} cannot be read: {error}") from None
    try:
        body = ask_one(_NETLINK_NETFILTER, CT_GET, encode_question(connection), CT_NEW, deadline)
        return decode_answer(body, connection)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise WitnessUnavailable(f"conntrack cannot be asked: {error.strerror or error}") from None
    except ProtocolError as error:
        raise WitnessUnavailable(f"conntrack's answer is not understood: {error}") from None


def _by_diag(
    namespaces: FrozenSet[int], first: Optional[int], before: Connection, deadline: Deadline
) -> List[DiagSocket]:
    """The sockets that sock_diag has in those of ``namespaces`` that processes are in."""
    look = functools.partial(find_here, before)
    with held(namespaces, first, deadline) as descriptors:
        found = [inside(descriptor, look, deadline) for descriptor in descriptors.values()]
    return [each for each in found if each is not None]


def _owners_of(sockets: Sequence[DiagSocket], before: Connection) -> List[Owner]:
    if len(sockets) > 1:
        raise Ambiguous(f"{len(sockets)} sockets are {before}, in as many network namespaces")
    return [Owner(Witness.DIAG, each.uid, cgroup_id=each.cgroup_id) for each in sockets if each.uid is not None]


def _together(before: Connection, owners: Sequence[Owner]) -> Optional[Owner]:
    """The one owner that all agree on, by uid and cgroup. Raises Ambiguous."""
    if not owners:
        return None
    first = agreed_owner(owners)
    cgroups = {owner.cgroup_id for owner in owners if owner.cgroup_id is not None}
    if len(cgroups) > 1:
        raise Ambiguous(f"the socket of {before} was made in one cgroup and connected in another")
    return Owner(Witness.CONNTRACK, first.uid, first.pid, first.cgroup_id, first.connected_at_ns, first.comm)
