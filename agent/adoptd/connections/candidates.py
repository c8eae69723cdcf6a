"""Which socket a connection is, where sockets bound to network devices can have the same addresses and ports.

Owns the search through devices and the judgement of what it finds. Never chooses between two sockets that could
both be the connection. Called by the two witnesses that ask the kernel for one socket, bpf and diag.

The kernel's look-up takes a device and returns the first socket of the hash bucket's chain that has the 4-tuple and
is bound to that device or to none. connect() puts a socket at the chain's head, and refuses (EADDRNOTAVAIL) if one
is there that is bound to none or to the same device. So:

- A connected socket bound to no device is newer than every twin and comes before it: whichever device a packet
  arrives on, it is given to this socket. No other device needs to be asked. (What stands behind it in the chain
  is seen by the probe, and makes it doubtful: see Answer.twins.)
- Without one, each socket is seen by asking for its own device, and by no other question. All are asked.

Link-local addresses (RFC 4291, 2.5.6) are the same case: their sockets are bound to the device of the link.
"""

from __future__ import annotations

import socket
from typing import Callable, Dict, Optional, Protocol, Sequence, TypeVar

from adoptd.model import Ambiguous, Connection, WitnessUnavailable

# States (include/net/tcp_states.h) of a connection that was established and whose peer has not closed its end:
# ESTABLISHED, FIN_WAIT1, FIN_WAIT2.
OPEN_STATES = frozenset({1, 4, 5})
# All states of one that was established: also CLOSE_WAIT, LAST_ACK, CLOSING. A server that accepted us cannot be
# facing a SYN_SENT, a request or a listener, and TIME_WAIT has no owner any more.
CONNECTED_STATES = OPEN_STATES | {8, 9, 11}

# The device of a question that names none.
NO_DEVICE = 0
# Each costs a question of 10 us, in the event loop. On hosts with more, sockets bound to a device are left to /proc.
DEVICES_MAX = 64


class Candidate(Protocol):
    """A socket with the connection's 4-tuple. ``device``: the index it is bound to, None if to none."""

    @property
    def state(self) -> Optional[int]:
        """Its TCP state."""
        ...

    @property
    def device(self) -> Optional[int]:
        """The index of the device it is bound to."""
        ...


_Found = TypeVar("_Found", bound=Candidate)


def search(
    connection: Connection,
    ask: Callable[[int], Optional[_Found]],
    devices: Callable[[], Sequence[int]],
) -> Optional[_Found]:
    """The connection's socket, or None. ``ask`` looks for it on one device, for a socket in any state.

    Raises Ambiguous if several could be it, and whatever ``ask`` raises.
    """
    first = ask(NO_DEVICE)
    if first is not None and first.device is None and first.state in CONNECTED_STATES:
        return first
    found: Dict[Optional[int], _Found] = {}
    for index in devices():
        seen = ask(index)
        if seen is not None and seen.state in CONNECTED_STATES:
            found[seen.device] = seen
    return the_one(connection, tuple(found.values()))


def the_one(connection: Connection, found: Sequence[_Found]) -> Optional[_Found]:
    """Which of these connected sockets is the connection. Raises Ambiguous if more than one could be.

    A peer that asks whose its connection is has not closed it. Else whoever leaves ended connections behind could
    make everybody's connections to that peer doubtful.
    """
    likely = [each for each in found if each.state in OPEN_STATES] or found
    if len(likely) > 1:
        raise Ambiguous(f"{len(likely)} sockets are {connection}, in one network namespace")
    return likely[0] if likely else None


def all_devices() -> Sequence[int]:
    """The indexes of this network namespace's devices; none if there are more than DEVICES_MAX.

    Raises WitnessUnavailable if they cannot be listed.
    """
    try:
        indexes = [index for index, _ in socket.if_nameindex()]
    except OSError as error:
        raise WitnessUnavailable(f"the network devices cannot be listed: {error.strerror}") from None
    return indexes if len(indexes) <= DEVICES_MAX else ()
