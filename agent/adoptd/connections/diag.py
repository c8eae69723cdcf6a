"""The sock_diag witness: asks the kernel for one socket by its addresses, over raw netlink.

Owns the netlink socket and the self-test that tells "no such socket" from "no tcp_diag module". Never
dumps the socket table and never believes a reply that it has not compared with the question. Called by
Witnesses in the event loop (10 to 20 microseconds), and by the proc witness in a thread for the inode.

Sees its own network namespace only. It cannot tell which of two local sockets called connect(): the caller must
ask with the connecting end as the source.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from typing import Callable, Optional, Protocol, Sequence, Tuple, Union

from adoptd.connections.candidates import NO_DEVICE, all_devices, search
from adoptd.connections.diag_codec import DiagError, DiagSocket, decode_reply, encode_question
from adoptd.deadline import Deadline
from adoptd.model import Connection, Endpoint, Owner, ProtocolError, Witness, WitnessUnavailable

_NETLINK_SOCK_DIAG = 4  # include/uapi/linux/netlink.h
_KERNEL = 0  # the port id that only the kernel sends from, netlink(7)

# The kernel queues the reply before send() returns; this only bounds, in the event loop, what should never happen.
_REPLY_TIMEOUT_US = 20_000
# A reply is 124 bytes on Linux 6.18. A longer one than this arrives cut, and is refused for its length.
_REPLY_BYTES_MAX = 4096
# Messages not from the kernel that are skipped before giving up. Sending them takes CAP_NET_ADMIN.
_STRANGERS_MAX = 8
# How long a failed self-test stands before it is tried again: loopback may come up, the module may be loaded.
_RETRY_S = 10.0
# For a loopback connection in the self-test, which is made within microseconds unless a firewall drops it.
_SELF_TEST_S = 0.05


class Channel(Protocol):
    """The part of a connected netlink socket that is used."""

    def send(self, data: bytes, /) -> int:
        """As socket.send."""
        ...

    def recvfrom(self, bufsize: int, /) -> Tuple[bytes, Tuple[int, int]]:
        """As socket.recvfrom: the message, and (port id, groups) of its sender."""
        ...

    def close(self) -> None:
        """As socket.close."""
        ...


def open_channel() -> Channel:
    """A netlink socket to sock_diag in the caller's network namespace. Raises OSError."""
    channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
    try:
        channel.bind((0, 0))
        channel.connect((_KERNEL, 0))
        # Not settimeout(), which would add a poll() to every question.
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, _REPLY_TIMEOUT_US))
    except OSError:
        channel.close()
        raise
    return channel


class DiagWitness:
    """Names the uid and the cgroup of the task that called socket(). Safe to use from several threads."""

    name = Witness.DIAG
    may_block = False

    def __init__(
        self,
        open_channel: Callable[[], Channel] = open_channel,
        clock: Callable[[], float] = time.monotonic,
        devices: Callable[[], Sequence[int]] = all_devices,
        tested: bool = True,
    ) -> None:
        """Runs the self-test; if that fails, says so on every question until a later one succeeds.

        Not ``tested``: in a network namespace that is not ours to make connections in.
        """
        self._open_channel = open_channel
        self._clock = clock
        self._devices = devices
        self._lock = threading.Lock()
        self._channel: Optional[Channel] = None
        self._sequence = 0
        self._fault: Optional[str] = None
        self._tested_at_s = 0.0
        if tested:
            self.self_test()

    def owner_of(self, connection: Connection, deadline: Deadline) -> Optional[Owner]:
        """The owner of the socket at the source's end, or None. Raises WitnessUnavailable, Ambiguous."""
        found = self.find(connection, deadline)
        if found is None or found.uid is None:
            return None
        return Owner(Witness.DIAG, found.uid, cgroup_id=found.cgroup_id)

    def find(self, connection: Connection, deadline: Deadline) -> Optional[DiagSocket]:
        """The socket at the source's end, or None: not here, not connected, or held by no process any more.

        Raises WitnessUnavailable, and Ambiguous if several could be it.
        """
        if self._fault is not None and self._clock() - self._tested_at_s >= _RETRY_S:
            self.self_test()
        if self._fault is not None:
            raise WitnessUnavailable(self._fault)
        if deadline.expired:
            raise WitnessUnavailable(f"no time left to ask sock_diag about {connection}")
        return search(connection, lambda device: self._look_up(connection, device), self._devices)

    def self_test(self) -> Optional[str]:
        """Look up a connection made for this on loopback. None: found, else what is wrong.

        ENOENT means "no such socket" and "no tcp_diag module" alike; only a socket that is known to be
        there tells them apart.
        """
        self._tested_at_s = self._clock()
        try:
            self._fault = self._try_own_connection()
        except OSError as error:
            self._fault = f"sock_diag cannot be tested on loopback: {error}"
        except WitnessUnavailable as error:
            self._fault = str(error)
        return self._fault

    def close(self) -> None:
        """Close the netlink socket. A later question opens another."""
        with self._lock:
            self._drop_channel()

    def _try_own_connection(self) -> Optional[str]:
        with socket.socket() as listener, socket.socket() as client:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            client.settimeout(_SELF_TEST_S)
            client.connect(listener.getsockname())
            found = self._look_up(Connection(_endpoint(client.getsockname()), _endpoint(client.getpeername())))
            if found is None:
                return "sock_diag does not know a connection made to test it: is the tcp_diag module missing?"
            inode = os.fstat(client.fileno()).st_ino
            if found.inode != inode:
                return f"sock_diag says inode {found.inode} of a socket whose inode is {inode}"
            return None

    def _look_up(self, connection: Connection, device: int = NO_DEVICE) -> Optional[DiagSocket]:
        with self._lock:
            reply = self._exchange(connection, device)
        if isinstance(reply, DiagError):
            if reply.errno == errno.ENOENT:
                return None
            raise WitnessUnavailable(f"sock_diag refused a question: {os.strerror(reply.errno)}")
        # The kernel falls back to a listener on the source's port, and shows connections in TIME_WAIT.
        return reply if reply.is_source_of(connection) else None

    def _exchange(self, connection: Connection, device: int) -> Union[DiagSocket, DiagError]:
        """Ask, and on any trouble ask once more on a fresh socket, where no stale reply can be waiting."""
        trouble: Optional[Exception] = None
        for _ in range(2):
            try:
                return self._ask(connection, device)
            except (OSError, ProtocolError) as error:
                self._drop_channel()
                trouble = error
        raise WitnessUnavailable(f"sock_diag does not answer: {trouble}") from trouble

    def _ask(self, connection: Connection, device: int) -> Union[DiagSocket, DiagError]:
        if self._channel is None:
            self._channel = self._open_channel()
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self._channel.send(encode_question(connection, self._sequence, device))
        for _ in range(_STRANGERS_MAX):
            data, (sender, _groups) = self._channel.recvfrom(_REPLY_BYTES_MAX)
            if sender == _KERNEL:
                return decode_reply(data, self._sequence)
        raise ProtocolError(f"{_STRANGERS_MAX} messages, none of them from the kernel")

    def _drop_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def find_here(connection: Connection) -> Optional[DiagSocket]:
    """The connection's socket in the calling thread's network namespace, if it is bound to no device.

    Whether sock_diag works at all is not tried. Raises WitnessUnavailable.
    """
    witness = DiagWitness(tested=False)
    try:
        return witness._look_up(connection)
    finally:
        witness.close()


def _endpoint(name: Tuple[str, int]) -> Endpoint:
    return Endpoint.parse(f"{name[0]}:{name[1]}")
