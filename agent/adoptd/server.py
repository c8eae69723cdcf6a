"""The agent's doors: the PAM socket, the peers' TCP port, the users' socket.

Owns accepting, bounds, and deadlines for bytes that do not come. What is behind a door is a handler given at
construction; no policy here. A message that is refused costs one counter, one log line and its own connection,
never another request. Built by the doors, over sockets of :mod:`adoptd.sockets`.
"""

from __future__ import annotations

import asyncio
import errno
import select
import socket
import time
from collections import Counter, OrderedDict
from typing import Awaitable, Callable, Dict, Optional, Sequence

from adoptd import log
from adoptd.callerid import Refused
from adoptd.metrics import Door, Metrics, Refusal
from adoptd.model import AdoptdError, ProtocolError
from adoptd.ration import Ration
from adoptd.sockets import BACKLOG, Caller, SocketName
from adoptd.wire import frame

# A caller on this host has its whole message ready when it connects; a peer is a round trip away.
LOCAL_READ_S = 0.5
PEER_READ_S = 1.0
# A reply fits the socket's buffer: whoever makes it wait has stopped reading.
SEND_S = 1.0

# How many may be connected at once, and how many from one caller (a user id, a peer's address). A login
# takes 5 to 20 ms here, sixteen at a time, so 1024 are a queue of about a second, a login's budget; a peer asks
# once per login; a person types one command at a time.
PAM_MAX = 1024
PEER_MAX = 1024
PEER_MAX_PER_ADDRESS = 256
USER_MAX = 64
USER_MAX_PER_UID = 8
# Of USER_MAX. With subordinate uids one user can be as many callers as fill the rest.
USER_KEPT_FOR_ROOT = 8

# As the caller at a unix socket.
_ROOT = "uid 0"

# Out of descriptors: the pause keeps a full table from spinning.
_ACCEPT_PAUSE_S = 0.05

# Refusals of one reason, or failures to accept, that a door says in the log within so many seconds. Anybody can be
# refused thousands of times a second, and a log full of that hides what happens at the same time; the metric counts
# all of them.
REFUSALS_LOGGED = 20
REFUSALS_LOGGED_S = 10.0


class PeerGone(OSError):
    """The other end of a connection is not there any more: no fault of ours, unlike any other OSError."""


class Conversation:
    """One accepted connection, for the handler: bounded reading, and the end of the waiting time."""

    def __init__(self, sock: socket.socket, peer: str, heard: Callable[[], None]) -> None:
        self.sock = sock
        self.peer = peer
        self._heard = heard
        self._loop = asyncio.get_running_loop()

    async def read_exactly(self, count: int) -> bytes:
        """``count`` bytes. Raises Refused (truncated) if the peer closes before it has sent them, or PeerGone."""
        data = bytearray()
        while len(data) < count:
            try:
                chunk = await self._loop.sock_recv(self.sock, count - len(data))
            except OSError as error:
                raise PeerGone(error.errno, error.strerror) from None
            if not chunk:
                raise Refused(Refusal.TRUNCATED, f"closed after {len(data)} of {count} bytes")
            data += chunk
        return bytes(data)

    async def read_frame(self, max_bytes: int) -> bytes:
        """One frame's body, of at most ``max_bytes``. Raises Refused."""
        prefix = await self.read_exactly(frame.PREFIX_BYTES)
        try:
            length = frame.decode_length(prefix, max_bytes)
        except ProtocolError as error:
            raise Refused(Refusal.MALFORMED, str(error)) from None
        return await self.read_exactly(length)

    def heard(self) -> None:
        """The message is complete: the connection is no longer one that may be dropped for its silence.

        Raises PeerGone if the peer has given up, as one does whose message waited while there was no agent.
        """
        self._heard()
        self.check_peer()

    def check_peer(self) -> None:
        """Raises PeerGone if nobody waits for the reply any more: no work is to be done for them."""
        # Askers keep their side open until they have the answer. On a unix socket half a close is told from a whole
        # one; of TCP the end of the peer's data is all that is known.
        gone = select.POLLHUP | select.POLLERR
        if self.sock.family != socket.AF_UNIX:
            gone |= select.POLLRDHUP
        waiting = select.poll()
        waiting.register(self.sock, gone)
        if waiting.poll(0):
            raise PeerGone(errno.EPIPE, "gave up before its turn came")

    async def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """All of ``data``, with copies of ``descriptors`` at its first byte (unix sockets only).

        Raises PeerGone, or Refused (slow) if the peer does not read.
        """
        try:
            # A new connection's buffer is empty, so what brings the descriptors goes at once.
            sent = socket.send_fds(self.sock, [data], list(descriptors)) if descriptors else self._send_at_once(data)
            if sent < len(data):
                await asyncio.wait_for(self._loop.sock_sendall(self.sock, data[sent:]), SEND_S)
        except asyncio.TimeoutError:
            raise Refused(Refusal.SLOW, f"did not read its reply within {SEND_S:g} s") from None
        except OSError as error:
            raise PeerGone(error.errno, error.strerror) from None

    def _send_at_once(self, data: bytes) -> int:
        """How much went without waiting: as a rule all, and then it takes no task and no timer. Raises OSError."""
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0


Handler = Callable[[Conversation], Awaitable[None]]


class Doorkeeper:
    """Accepts on the sockets of one door and runs ``handler`` for each connection, within the bounds.

    Over a bound the oldest connection that has not yet sent its message goes. To refuse the newcomer
    instead would let whoever connects and stays silent keep everybody else out. Where places are kept for root, others
    have the rest, and none of theirs costs root one.
    """

    def __init__(
        self,
        door: Door,
        sockets: Sequence[socket.socket],
        handler: Handler,
        metrics: Metrics,
        read_s: float,
        bound: int,
        bound_per_caller: Optional[int] = None,
        *,
        names: Sequence[SocketName] = (),
        outlive_us: bool = False,
        kept_for_root: int = 0,
    ) -> None:
        """``kept_for_root``: how many of ``bound`` nobody else gets. ``names`` are removed at the end.

        ``outlive_us``: the sockets are the service manager's, who keeps them.
        """
        self._door = door
        self._sockets = list(sockets)
        self._names = tuple(names)
        self._outlive_us = outlive_us
        self._handler = handler
        self._metrics = metrics
        self._read_s = read_s
        self._bound = bound
        self._bound_per_caller = bound if bound_per_caller is None else bound_per_caller
        self._bound_of_others = bound - kept_for_root
        self._silent: OrderedDict[asyncio.Task[None], str] = OrderedDict()
        self._callers: Dict[asyncio.Task[None], str] = {}
        self._count: Counter[str] = Counter()
        # By reason; None is for connections that could not be accepted.
        self._said = Ration(REFUSALS_LOGGED, REFUSALS_LOGGED_S, len(Refusal) + 1, time.monotonic)

    def open(self) -> None:
        """Begin to accept."""
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            loop.add_reader(sock.fileno(), self._accept, sock, loop)

    async def close(self, within_s: float) -> None:
        """Accept no more and give those who are here ``within_s`` seconds to end; who says nothing has read_s.

        Of a socket that ends with us, who waits in its backlog is served too. That of a socket which outlives us, and
        all who wait there, is for whoever comes next.
        """
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            loop.remove_reader(sock.fileno())
        for name in self._names:
            name.remove()
        for sock in self._sockets:
            if not self._outlive_us:
                self._accept_those_waiting(sock)
            sock.close()
        if self._callers:
            _, late = await asyncio.wait(list(self._callers), timeout=within_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _accept(self, listener: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        # Not loop.sock_accept(): cancelled at the wrong moment it loses a connection that is accepted already. One at a
        # time: a flood of them must not keep the loop from serving, and even from dropping, those that are here.
        try:
            self._accept_one(listener)
        except OSError as error:
            self._not_accepted(error)
            loop.remove_reader(listener.fileno())
            loop.call_later(_ACCEPT_PAUSE_S, self._accept_again, listener, loop)

    def _accept_again(self, listener: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        # Closed meanwhile: its number may be another's by now.
        if listener.fileno() >= 0:
            loop.add_reader(listener.fileno(), self._accept, listener, loop)

    def _accept_those_waiting(self, listener: socket.socket) -> None:
        # No more than the kernel keeps waiting: whoever goes on connecting must not keep us from ending.
        try:
            for _ in range(BACKLOG + 1):
                if not self._accept_one(listener):
                    return
        except OSError as error:
            self._not_accepted(error)

    def _not_accepted(self, error: OSError) -> None:
        unsaid = self._said.take(None)
        if unsaid is not None:
            log.error("accept_failed", socket=self._door.value, error=error.strerror, unsaid=unsaid or None)

    def _accept_one(self, listener: socket.socket) -> bool:
        """Whether there was one. Raises OSError."""
        try:
            sock, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False
        sock.setblocking(False)
        self._start(sock, address)
        return True

    def _start(self, sock: socket.socket, address: object) -> None:
        if sock.family == socket.AF_UNIX:
            key = f"uid {Caller.of(sock).uid}"
        else:
            key = _sender(str(address[0])) if isinstance(address, tuple) else "?"
        task = asyncio.create_task(self._serve(sock, key))
        self._silent[task] = key
        self._callers[task] = key
        self._count[key] += 1
        self._metrics.in_flight.labels(self._door.value).inc()
        task.add_done_callback(lambda ended: self._ended(ended, sock))
        if self._count[key] > self._bound_per_caller:
            self._drop_oldest(lambda other: other == key)
        elif key != _ROOT and len(self._callers) - self._count[_ROOT] > self._bound_of_others:
            self._drop_oldest(lambda other: other != _ROOT)
        elif len(self._callers) > self._bound:
            self._drop_oldest(lambda _: True)

    async def _serve(self, sock: socket.socket, key: str) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a connection is served outside a task")

        def too_slow() -> None:
            self._refused(Refusal.SLOW, key, f"no complete message within {self._read_s:g} s")
            task.cancel()

        patience = loop.call_later(self._read_s, too_slow)

        def heard() -> None:
            patience.cancel()
            self._silent.pop(task, None)

        try:
            await self._handler(Conversation(sock, key, heard))
        except Refused as error:
            self._refused(error.reason, key, str(error))
        except PeerGone as error:
            log.debug("peer_gone", socket=self._door.value, peer=key, error=error.strerror)
        except AdoptdError as error:
            self._refused(Refusal.INTERNAL, key, str(error))
        except Exception as error:
            # The last line of defence of a root daemon: a defect ends one request, and is seen.
            self._refused(Refusal.INTERNAL, key, f"{type(error).__name__}: {error}")
        finally:
            patience.cancel()

    def _drop_oldest(self, may_go: Callable[[str], bool]) -> None:
        """Of the callers whom ``may_go`` names, the one that has been silent longest, if any is silent."""
        for task, other in self._silent.items():
            if may_go(other):
                self._refused(Refusal.TOO_MANY, other, "too many connections at once, this one was silent longest")
                task.cancel()
                # At once: the task ends later, and the next one over the bound must not choose it again.
                del self._silent[task]
                return

    def _refused(self, reason: Refusal, peer: str, text: str) -> None:
        self._metrics.refuse(self._door, reason)
        unsaid = self._said.take(reason)
        if unsaid is not None:
            log.warning(
                "refused", socket=self._door.value, reason=reason.value, peer=peer, error=text, unsaid=unsaid or None
            )

    def _ended(self, task: asyncio.Task[None], sock: socket.socket) -> None:
        sock.close()
        self._silent.pop(task, None)
        key = self._callers.pop(task)
        self._count[key] -= 1
        if not self._count[key]:
            del self._count[key]
        self._metrics.in_flight.labels(self._door.value).dec()


def _sender(address: str) -> str:
    """Whose share a peer's connection counts in: any user of this node has all of 127.0.0.0/8 to connect from."""
    return "127.0.0.1" if address.startswith("127.") else address
