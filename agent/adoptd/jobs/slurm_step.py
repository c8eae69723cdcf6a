"""One connection to one job step of Slurm: connects, asks, and waits no longer than it was told to.

Owns the socket, the timeouts and the meaning of silence. It must never unlink a socket, wait without a
deadline, nor take a closed connection for an answer. Called by slurm_spool (which steps are there) and
by the slurm backend (what is done with one).
"""

from __future__ import annotations

import array
import contextlib
import errno
import math
import os
import select
import socket
import struct
from types import TracebackType
from typing import Container, List, Mapping, Optional, Sequence, Set, Tuple, Type, TypeVar

from adoptd.deadline import Deadline
from adoptd.jobs import slurm_wire as wire
from adoptd.jobs.slurm_wire import Got, Namespace, Op, Reply, Want, X11Display
from adoptd.model import AdoptdError, JobFault, ProtocolError

# struct ucred of SO_PEERCRED: pid, uid, gid.
_UCRED = struct.Struct("=iII")
_CLOSED = "closed the connection without a reply"
# Closing with requests unread is a reset to the other end (unix_release_sock).
_CLOSING = frozenset({errno.ECONNRESET, errno.EPIPE})
# One would do; room for more, so that what is sent beyond what was announced is seen and closed.
_DESCRIPTORS_ROOM = 8

T = TypeVar("T")


class StepError(AdoptdError):
    """The step did not answer as a step does. What it is cannot be told."""

    fault = JobFault.STEP_PROTOCOL


class StepGone(StepError):
    """Nobody listens there any more: the step has ended, its socket may have been left behind."""

    fault = JobFault.JOB_ENDED


class StepLeftBehind(StepGone):
    """The step's socket is there, and nobody listens on it."""


class StepForeign(StepGone):
    """Somebody listens there who is neither root nor Slurm's user."""

    fault = JobFault.FOREIGN_SOCKET


class StepClosed(StepError):
    """The step closed the connection instead of answering, as one that ends may do."""

    fault = JobFault.STEP_CLOSED


class StepSilent(StepError):
    """No answer within the time there was."""

    fault = JobFault.STEP_SILENT


class StepConnection:
    """A connected step. ``daemon_pid`` and ``daemon_uid`` are of the process that listens, as the kernel says.

    SO_PEERCRED of the connecting end has the credentials of the listen() call (unix(7)), so a step that
    hangs is known all the same, and nobody else can pretend to be it.
    """

    def __init__(self, connected: socket.socket, label: str) -> None:
        """Take over a connected non-blocking socket. ``label`` names the step in errors."""
        self._socket = connected
        self._label = label
        self._version: Optional[int] = None
        self._owes_added = False
        # Asked already, with the adoption: the answers come in this order.
        self._ahead: Set[Op] = set()
        credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        self.daemon_pid, self.daemon_uid, _ = _UCRED.unpack(credentials)

    @property
    def version(self) -> int:
        """The step's protocol version, known once :meth:`greeted` has returned."""
        if self._version is None:
            raise ValueError(f"{self._label}: asked before it was greeted")
        return self._version

    def send(self, data: bytes) -> None:
        """Write a request: a few bytes, which fit the buffer unless nobody reads. Raises StepClosed, StepSilent."""
        try:
            sent = self._socket.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            raise StepSilent(f"{self._label}: does not read its requests") from None
        except OSError as error:
            raise StepClosed(f"{self._label}: {_closed_or(error)}") from None
        if sent != len(data):
            raise StepSilent(f"{self._label}: does not read its requests")

    def greeted(self, deadline: Deadline) -> int:
        """Read the answer to wire.hello(): the step's version. Raises StepError."""
        self._version = self.receive(wire.read_hello(), deadline)
        return self._version

    def receive(self, reply: Reply[T], deadline: Deadline) -> T:
        """Read one reply. Raises StepClosed, StepSilent, and StepError for one that breaks the protocol."""
        got: Optional[Got] = None
        try:
            while True:
                want = next(reply) if got is None else reply.send(got)
                got = self._exactly(want, deadline)
        except StopIteration as stop:
            value: T = stop.value
            return value
        except ProtocolError as error:
            raise StepError(f"{self._label}: {error}") from None

    def ask_to_add(self, pid: int, ahead: Sequence[Op] = ()) -> None:
        """Ask an extern step to take the process in; :meth:`added` is what it says. Raises StepError.

        ``ahead``: what x11() and namespaces() are going to be called for, in that order, so that the step need not be
        waited for again.
        """
        requests = wire.request_about(Op.ADD_EXTERN_PID, pid) + wire.request_about(Op.PID_IN_CONTAINER, pid)
        self.send(requests + b"".join(map(wire.request, ahead)))
        self._owes_added = True
        self._ahead.update(ahead)

    def added(self, deadline: Deadline) -> Tuple[int, bool]:
        """0 or Slurm's error, which is no proof, and whether the step's proctrack plugin has the process afterwards.

        Both were asked at once: one connection's requests are served in order. Raises StepError.
        """
        code = self.receive(wire.read_added(), deadline)
        self._owes_added = False
        return code, self.receive(wire.read_contains(), deadline)

    def owed(self) -> Optional[socket.socket]:
        """The socket, in another descriptor, if the step was asked to take a process in and has not answered."""
        return self._socket.dup() if self._owes_added else None

    def x11(self, deadline: Deadline) -> Optional[X11Display]:
        """The job's X11 tunnel, if it has one. Raises StepError."""
        self._ask(Op.X11_DISPLAY)
        return self.receive(wire.read_x11(), deadline)

    @property
    def op_of_namespaces(self) -> Op:
        """Which request this release answers."""
        return Op.GET_NS_FDS if self.version >= wire.VERSION_25_11 else Op.GET_NS_FD

    def namespaces(self, deadline: Deadline) -> Tuple[Namespace, ...]:
        """The job's namespaces; the caller closes the descriptors. Raises StepError, with none left open.

        Steps from 25.11 on are asked with GET_NS_FDS only: they may leave the older request unanswered.
        """
        self._ask(self.op_of_namespaces)
        if self.op_of_namespaces is Op.GET_NS_FD:
            return self.receive(wire.read_namespace(), deadline)
        found: List[Namespace] = []
        try:
            for _ in range(self.receive(wire.read_namespace_kind_count(), deadline)):
                found.append(self.receive(wire.read_one_namespace(), deadline))
        except StepError:
            for namespace in found:
                os.close(namespace.descriptor)
            raise
        return tuple(found)

    def close(self) -> None:
        """Hang up. May be called twice."""
        self._socket.close()

    def __enter__(self) -> StepConnection:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def _ask(self, op: Op) -> None:
        if op in self._ahead:
            self._ahead.remove(op)
        else:
            self.send(wire.request(op))

    def _exactly(self, want: Want, deadline: Deadline) -> Got:
        """Never more than wanted: a descriptor comes with one byte of its own, and must be met by recvmsg()."""
        data = b""
        descriptors: List[int] = []
        try:
            while len(data) < want.size:
                data += self._some(want.size - len(data), want.descriptor, descriptors, deadline)
            if want.descriptor and len(descriptors) == 1:
                return Got(data, descriptors.pop())
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return Got(data)

    def _some(self, size: int, with_descriptor: bool, descriptors: List[int], deadline: Deadline) -> bytes:
        while True:
            try:
                if not with_descriptor:
                    part = self._socket.recv(size)
                else:
                    room = socket.CMSG_SPACE(_DESCRIPTORS_ROOM * array.array("i").itemsize)
                    part, ancillary, _, _ = self._socket.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
                    descriptors.extend(_descriptors_in(ancillary))
            except BlockingIOError:
                self._wait_readable(deadline)
                continue
            except OSError as error:
                raise StepClosed(f"{self._label}: {_closed_or(error)}") from None
            if not part:
                raise StepClosed(f"{self._label}: {_CLOSED}")
            return part

    def _wait_readable(self, deadline: Deadline) -> None:
        remaining_s = deadline.remaining_s()
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        # Rounded up, or the last millisecond would be spent spinning.
        if remaining_s <= 0 or not poll.poll(math.ceil(remaining_s * 1000)):
            raise StepSilent(f"{self._label}: no answer in time")


_REFUSALS: Mapping[int, Type[StepError]] = {errno.ECONNREFUSED: StepLeftBehind, errno.ENOENT: StepGone}


def connect(directory: int, name: str, label: str, trusted: Container[int]) -> StepConnection:
    """Connect to the step whose socket is ``name`` in the open ``directory``, without waiting.

    Through /proc/self/fd, so it is the directory that was vouched for, and a long spool path costs nothing of
    the 107 bytes that sun_path has. Nothing is said to, nor read from, a listener whose uid is not ``trusted``.
    Raises StepForeign for it, StepGone, StepSilent (its queue is full) and StepError.
    """
    path = f"/proc/self/fd/{directory}/{name}"
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    with contextlib.ExitStack() as undo:
        undo.callback(connected.close)
        try:
            connected.connect(path)
        except BlockingIOError:
            raise StepSilent(f"{label}: takes no more connections") from None
        except OSError as error:
            # An over-long path is refused by Python itself, without an errno.
            text = f"{label}: {error.strerror or error}"
            raise _REFUSALS.get(error.errno or 0, StepError)(text) from None
        connection = StepConnection(connected, label)
        if connection.daemon_uid not in trusted:
            raise StepForeign(f"{label}: listened on by uid {connection.daemon_uid}")
        undo.pop_all()
        return connection


def _closed_or(error: OSError) -> str:
    return _CLOSED if error.errno in _CLOSING else str(error.strerror)


def _descriptors_in(ancillary: List[Tuple[int, int, bytes]]) -> List[int]:
    found: List[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            found.extend(numbers)
    return found
