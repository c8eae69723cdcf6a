"""A stand-in for slurmstepd that speaks the protocol of six releases, and misbehaves on demand.

It listens on a real unix socket in a directory that stands for slurmd's spool, one thread per connection, as
the real one does. What it does to processes is the test's: ``move`` is called for each one it is asked to add.
Used where the real slurmstepd cannot be: other releases, and faults.
"""

from __future__ import annotations

import array
import contextlib
import enum
import os
import socket
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Callable, List, Optional, Sequence, Set, Tuple, Type

I32 = struct.Struct("=i")
U32 = struct.Struct("=I")
U64 = struct.Struct("=Q")
CLONE_NEWNS = 0x00020000


@dataclass(frozen=True)
class Release:
    """What differs between releases. ``ending`` are the state numbers of a step that takes nothing any more."""

    name: str
    version: int
    extern_step: int
    ending: Tuple[int, ...]

    @property
    def oldest_client(self) -> int:
        """Two releases back, three from 24.11 on (SLURM_MIN_PROTOCOL_VERSION)."""
        return self.version - ((3 if self.version >= 42 << 8 else 2) << 8)

    @property
    def has_sluid(self) -> bool:
        """From 25.11 on: ops 1 and 28, and op 26 without a reply where there is no namespace."""
        return self.version >= 44 << 8


RELEASES = (
    Release("20.02", 35 << 8, 4294967295, (3,)),
    Release("20.11", 36 << 8, 4294967292, (3,)),
    Release("22.05", 38 << 8, 4294967292, (3,)),
    Release("23.11", 40 << 8, 4294967292, (3, 4)),
    Release("24.11", 42 << 8, 4294967292, (3, 4)),
    Release("25.11", 44 << 8, 4294967292, (3, 4)),
    Release("26.05", 45 << 8, 4294967292, (3, 4)),
)
BY_NAME = {release.name: release for release in RELEASES}
DEFAULT = BY_NAME["22.05"]


class Fault(enum.Enum):
    """What can be wrong with a step."""

    HANGS = "accepts, reads and never answers"
    DEAF = "has a full queue and accepts nobody"
    HANGS_AFTER_HELLO = "answers the handshake and then nothing"
    HANGS_ON_ADD = "answers everything but the adoption"
    CLOSES_AT_ONCE = "accepts and closes"
    CLOSES_AFTER_HELLO = "answers the handshake and closes"
    CLOSES_FIRST_TIME = "closes the first connection, serves the rest"
    REFUSES_VERSION = "answers -1 to the handshake"
    SHORT_READ = "sends half of an answer and closes"
    DRIBBLES = "sends its answers a byte at a time"
    ODD_STATE = "is in a state that no release has"
    ADD_FAILS = "answers -1 to the adoption"
    ADD_MOVES_NOTHING = "answers 0 to the adoption and moves nothing"
    ADD_THEN_CLOSES = "moves the process and closes without an answer"
    FORGETS = "moves the process, and does not know it when asked"


@dataclass
class Step:
    """One extern step. Start it with a ``with``; what it was asked is in ``asked``, whom it added in ``added``."""

    spool: Path
    job_id: int
    uid: int
    node: str = "n1"
    release: Release = DEFAULT
    state: int = 2
    fault: Optional[Fault] = None
    sluid: int = 0
    x11: Tuple[int, str] = (0, "")
    namespaces: Sequence[Tuple[int, int]] = ()
    move: Callable[[int], None] = lambda pid: None
    step_id: Optional[int] = None
    suffix: str = ""
    asked: List[int] = field(default_factory=list)
    added: List[int] = field(default_factory=list)
    at_once: int = 0
    at_once_max: int = 0

    def __post_init__(self) -> None:
        number = self.release.extern_step if self.step_id is None else self.step_id
        self.path = self.spool / f"{self.node}_{self.job_id}.{number}{self.suffix}"
        self._stop = threading.Event()
        # What HANGS_ON_ADD waits for: it then does what it was asked.
        self.goes_on = threading.Event()
        self._lock = threading.Lock()
        self._connections: Set[socket.socket] = set()
        self._threads: List[threading.Thread] = []
        self._fillers: List[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._served = 0

    def __enter__(self) -> Step:
        self._listener.bind(str(self.path))
        self._listener.listen(0 if self.fault is Fault.DEAF else 32)
        self.path.chmod(0o777)
        if self.fault is Fault.DEAF:
            self._fill_queue()
        else:
            self._start(self._accept)
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.end()

    def end(self, leave_socket: bool = False) -> None:
        """End as a step does, or as one that was killed: then its socket stays. May be called twice."""
        # First of all, or who is hung up on could come again and be hung up on again.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._stop.set()
        self.goes_on.set()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(5.0)
        for each in (self._listener, *self._fillers):
            each.close()
        if not leave_socket:
            self.path.unlink(missing_ok=True)

    def _fill_queue(self) -> None:
        while True:
            filler = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            filler.setblocking(False)
            self._fillers.append(filler)
            try:
                filler.connect(str(self.path))
            except BlockingIOError:
                return

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._connections.add(connection)
                self._served += 1
                served = self._served
            self._start(self._serve, connection, served)

    def _serve(self, connection: socket.socket, served: int) -> None:
        try:
            with connection:
                at_once = self.fault is Fault.CLOSES_AT_ONCE
                if at_once or (self.fault is Fault.CLOSES_FIRST_TIME and served == 1):
                    return
                self._converse(connection)
        except (OSError, EOFError):
            return
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _converse(self, connection: socket.socket) -> None:
        hello = self._read(connection, I32)
        if self.fault is Fault.HANGS:
            self._stop.wait()
            return
        if hello < self.release.oldest_client or self.fault is Fault.REFUSES_VERSION:
            connection.sendall(I32.pack(-1))
            return
        connection.sendall(I32.pack(self.release.version))
        if self.fault is Fault.CLOSES_AFTER_HELLO:
            return
        while not self._stop.is_set():
            op = self._read(connection, I32)
            self.asked.append(op)
            if self.fault is Fault.HANGS_AFTER_HELLO:
                self._stop.wait()
                return
            if not self._answer(connection, op):
                return

    def _answer(self, connection: socket.socket, op: int) -> bool:
        """Serve one request; False to hang up, as the real one does where it does not know the request."""
        if op == 5:
            return self._send(connection, U32.pack(9 if self.fault is Fault.ODD_STATE else self.state))
        if op == 20:
            return self._send(connection, U32.pack(self.uid))
        if op == 8:
            known = self._read(connection, I32) in self.added and self.fault is not Fault.FORGETS
            return self._send(connection, b"\1" if known else b"\0")
        if op == 9:
            return self._send(connection, I32.pack(os.getpid()))
        if op == 15:
            return self._send(connection, U32.pack(len(self.added)) + b"".join(map(U32.pack, self.added)))
        if op == 22:
            return self._add(connection)
        if op == 23:
            path = self.x11[1].encode() + b"\0" if self.x11[1] else b""
            return self._send(connection, I32.pack(self.x11[0]) + I32.pack(len(path)) + path)
        if op == 26:
            return self._send_mount_namespace(connection)
        if op == 1 and self.release.has_sluid:
            return self._send(connection, U64.pack(self.sluid))
        if op == 28 and self.release.has_sluid:
            connection.sendall(U32.pack(len(self.namespaces)))
            for kind, descriptor in self.namespaces:
                connection.sendall(I32.pack(kind))
                _send_descriptor(connection, descriptor)
            return True
        return False

    def _add(self, connection: socket.socket) -> bool:
        if self.state in self.release.ending:
            return False
        pid = self._read(connection, I32)
        if self.fault is Fault.HANGS_ON_ADD:
            self.goes_on.wait()
            if self._stop.is_set():
                return False
        if self.fault is Fault.ADD_FAILS:
            return self._send(connection, I32.pack(-1))
        with self._lock:
            self.at_once += 1
            self.at_once_max = max(self.at_once_max, self.at_once)
        if self.fault is not Fault.ADD_MOVES_NOTHING:
            self.move(pid)
        self.added.append(pid)
        with self._lock:
            self.at_once -= 1
        if self.fault is Fault.ADD_THEN_CLOSES:
            return False
        return self._send(connection, I32.pack(0))

    def _send_mount_namespace(self, connection: socket.socket) -> bool:
        mounts = [descriptor for kind, descriptor in self.namespaces if kind == CLONE_NEWNS]
        if not mounts and self.release.has_sluid:
            return True
        connection.sendall(I32.pack(mounts[0] if mounts else 0))
        if mounts:
            _send_descriptor(connection, mounts[0])
        return True

    def _send(self, connection: socket.socket, data: bytes) -> bool:
        if self.fault is Fault.SHORT_READ:
            connection.sendall(data[: len(data) // 2])
            return False
        if self.fault is Fault.DRIBBLES:
            for position in range(len(data)):
                connection.sendall(data[position : position + 1])
            return True
        connection.sendall(data)
        return True

    @staticmethod
    def _read(connection: socket.socket, number: struct.Struct) -> int:
        data = b""
        while len(data) < number.size:
            part = connection.recv(number.size - len(data))
            if not part:
                raise EOFError
            data += part
        value: int = number.unpack(data)[0]
        return value


def _send_descriptor(connection: socket.socket, descriptor: int) -> None:
    rights = array.array("i", [descriptor])
    connection.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


def stale_socket(spool: Path, name: str) -> Path:
    """A socket file that nobody listens on, as a killed step leaves it."""
    path = spool / name
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
    path.chmod(0o777)
    return path
