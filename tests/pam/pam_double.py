"""The agent's place in the PAM tests: a real unix socket that answers by script, right or wrong.

Packs and unpacks adopt_wire.h a second time, on purpose without the agent's own codec: these tests
must be able to write replies that the agent never would. Nothing here decides anything.
"""

from __future__ import annotations

import array
import ctypes
import os
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import Callable, List, Optional, Sequence, Tuple

MAGIC = 0x54504441
ENVIRONMENT_MAX = 65536
DESCRIPTORS_MAX = 8
REQUEST = struct.Struct("=IHH 8B BBHHH II 16s16s 64s256s64s")
REPLY = struct.Struct("=IHH BBBB I 64s128s512s")
SUCCESS, DENY, IGNORE = 1, 2, 3

# x86_64 and aarch64 number it differently; ctypes has no name for a thread's own credentials.
_SYS_SETRESUID = {"x86_64": 117, "aarch64": 147}[os.uname().machine]


@dataclass(frozen=True)
class Request:
    """What the module sent, every field as it is in the record."""

    magic: int
    version: int
    size: int
    phase: int
    mode: int
    action_no_jobs: int
    action_unknown: int
    action_adopt_failure: int
    action_generic_failure: int
    single_job_skip_rpc: int
    join_container: int
    disable_x11: int
    family: int
    remote_port: int
    local_port: int
    reserved: int
    uid: int
    timeout_ms: int
    remote_address: bytes
    local_address: bytes
    service: bytes
    user: bytes
    nodename: bytes


@dataclass(frozen=True)
class Reply:
    """A reply that is right until a field is replaced. ``environment_bytes`` None: the true length."""

    magic: int = MAGIC
    version: int = 1
    size: int = REPLY.size
    verdict: int = SUCCESS
    adopted: int = 1
    descriptors: int = 0
    reserved: int = 0
    environment_bytes: Optional[int] = None
    job: bytes = b"17"
    summary: bytes = b"reason=callerid witness=bpf"
    message: bytes = b""
    environment: bytes = b""

    def pack(self) -> bytes:
        """The record and the environment behind it."""
        announced = len(self.environment) if self.environment_bytes is None else self.environment_bytes
        record = REPLY.pack(
            self.magic,
            self.version,
            self.size,
            self.verdict,
            self.adopted,
            self.descriptors,
            self.reserved,
            announced,
            self.job,
            self.summary,
            self.message,
        )
        return record + self.environment


DENIAL = Reply(verdict=DENY, adopted=0, job=b"", summary=b"reason=no_jobs", message=b"You have no job on this node.")
IGNORED = Reply(verdict=IGNORE, adopted=0, job=b"", summary=b"reason=no_jobs")

Script = Callable[[socket.socket], None]


def say(data: bytes, descriptors: Sequence[int] = ()) -> Script:
    """Send ``data`` at once, with the descriptors at its first byte, and leave the connection open."""

    def script(connection: socket.socket) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        connection.sendmsg([data], ancillary)
        wait_for_close(connection)

    return script


def say_and_close(data: bytes) -> Script:
    """Send ``data`` and close at once."""
    return lambda connection: connection.sendall(data)


def dribble(data: bytes, pause_s: float) -> Script:
    """Send ``data`` a byte at a time, with a pause before each, until all is sent or nobody listens."""

    def script(connection: socket.socket) -> None:
        for i in range(len(data)):
            time.sleep(pause_s)
            connection.sendall(data[i : i + 1])
        wait_for_close(connection)

    return script


def wait_for_close(connection: socket.socket) -> None:
    """Say nothing for as long as the other end stays."""
    while connection.recv(4096):
        pass


@dataclass
class Agent:
    """Serves ``path`` in a thread, each connection by the next script; the last one is used for all further ones.

    ``listen_uid``: whom the kernel names as the server. ``read_request``: False to answer unasked.
    """

    path: str
    scripts: Tuple[Script, ...]
    listen_uid: int = 0
    read_request: bool = True
    requests: List[Request] = field(default_factory=list)
    _failure: Optional[BaseException] = None

    def __post_init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Agent:
        _listen_as(self._listener, self.listen_uid)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # A listener that is shut down refuses accept(): the thread ends.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        os.unlink(self.path)
        if self._failure:
            raise self._failure

    def _serve(self) -> None:
        try:
            for number in range(1 << 30):
                try:
                    connection, _ = self._listener.accept()
                except OSError:
                    return
                with connection:
                    self._answer(connection, self.scripts[min(number, len(self.scripts) - 1)])
        except BaseException as failure:  # handed to the test's own thread
            self._failure = failure

    def _answer(self, connection: socket.socket, script: Script) -> None:
        try:
            if self.read_request:
                record = connection.recv(REQUEST.size, socket.MSG_WAITALL)
                if len(record) < REQUEST.size:
                    return
                self.requests.append(Request(*REQUEST.unpack(record)))
            script(connection)
        except (BrokenPipeError, ConnectionResetError):
            # The module hung up on a bad reply, as it should.
            pass


def _listen_as(listener: socket.socket, uid: int) -> None:
    """listen() with an effective uid of its own: the kernel notes it for SO_PEERCRED, and only for this thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    failures: List[int] = []

    def listen() -> None:
        if libc.syscall(_SYS_SETRESUID, -1, uid, -1) != 0:
            failures.append(ctypes.get_errno())
        listener.listen()

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    if failures:
        raise OSError(failures[0], "setresuid")
