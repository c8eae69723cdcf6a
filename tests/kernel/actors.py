"""Processes of a test's own that connect in some way, and say how: each a fork of the test that runs one function.

Everything an actor makes ends with it: it leads a process group, and whatever is left of that group is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import struct
import sys
import traceback
from typing import Any, Callable, Dict, List, Tuple

from adoptd.model import Connection, Endpoint
from lab.waiting import DEADLINE_S, PATIENCE

ALICE, BOB = 54321, 54322
START_S = DEADLINE_S * PATIENCE
LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_FILES = 0x10000000, 0x20000000, 0x40000000, 0x400


class Line:
    """One end of the line between an actor and its test: words one way, facts the other."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._end.settimeout(START_S)

    def say(self, client: socket.socket, port: int, pid: int = 0) -> None:
        """Tell of a connection: its ends, who connected it (else: we), and that it has the port it was bound to."""
        source, destination = client.getsockname()[:2], client.getpeername()[:2]
        assert source[1] == port, f"bound to port {port}, connected from {source[1]}"
        self.tell({"pid": pid or os.getpid(), "source": source, "destination": destination})

    def tell(self, facts: Dict[str, Any]) -> None:
        """Send facts, or a word."""
        self._end.send(json.dumps(facts).encode())

    def hear(self) -> Dict[str, Any]:
        """What the other end told next; AssertionError if it ended instead."""
        heard = self._end.recv(65536)
        assert heard, "the actor ended early; its last words are on stderr"
        return dict(json.loads(heard))

    def wait(self) -> None:
        """Until the test is over, however long that takes."""
        self._end.settimeout(None)
        self._end.recv(65536)

    def close(self) -> None:
        """Hang up."""
        self._end.close()


def actor(stack: contextlib.ExitStack, life: Callable[[Line], None]) -> Line:
    """Run ``life`` in a process of its own; what it is given is the other end of what is returned."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        ours.close()
        _live(life, Line(theirs))
    theirs.close()
    line = Line(ours)
    stack.callback(_end, pid, line)
    return line


def _live(life: Callable[[Line], None], line: Line) -> None:
    code = 1
    try:
        life(line)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _end(pid: int, line: Line) -> None:
    line.close()
    # The leader first, so that its pid is still its own; a group outlives it while it has members.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def become(uid: int, effective: int = -1) -> None:
    """Be that user for good, and let nobody's capabilities go along."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    effective = uid if effective == -1 else effective
    os.setresuid(uid, effective, effective)


def fork(action: Callable[[], None]) -> int:
    """Run ``action`` in a child that outlives nothing of the test's; its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def join(pid: int) -> int:
    """Wait for a child that must end well; its pid."""
    assert os.waitpid(pid, 0)[1] == 0
    return pid


def listener(
    stack: contextlib.ExitStack, address: str = "127.0.0.1", port: int = 0, protocol: int = 0, backlog: int = 64
) -> socket.socket:
    """A server's socket on ``address``; connections to it are established without being accepted."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = stack.enter_context(socket.socket(family, socket.SOCK_STREAM, protocol))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((address, port))
    made.listen(backlog)
    return made


def bound(address: str = "127.0.0.1", port: int = 0, device: str = "", protocol: int = 0, reuse: bool = True) -> Any:
    """A client's socket, bound for good to its source port before it connects."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM, protocol)
    if reuse:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if device:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    if port:
        made.bind((address, port))
        return made
    while True:
        # Of a port that nobody had somebody may have been given it since.
        try:
            made.bind((address, _free_port(family, address)))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return made


def _free_port(family: socket.AddressFamily, address: str) -> int:
    """A port to ask for by its number: one that bind() chose is given up when connect() fails."""
    with socket.socket(family) as tried:
        tried.bind((address, 0))
        return int(tried.getsockname()[1])


def disconnect(client: socket.socket) -> None:
    """connect(2) to AF_UNSPEC, which Python has no word for."""
    nowhere = struct.pack("=H14x", socket.AF_UNSPEC)
    assert LIBC.connect(client.fileno(), nowhere, len(nowhere)) == 0


def reset(client: socket.socket) -> None:
    """Close with a reset, so that the port is free at once."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def connection_of(facts: Dict[str, Any]) -> Connection:
    """The connection an actor told of. The scope of link-local addresses stays behind, as on the wire."""
    return Connection(_endpoint(facts["source"]), _endpoint(facts["destination"]))


def connection(client: socket.socket) -> Connection:
    """The connection of a socket of the test's own."""
    return Connection(_endpoint(client.getsockname()[:2]), _endpoint(client.getpeername()[:2]))


def _endpoint(name: Tuple[str, int]) -> Endpoint:
    address = str(name[0]).partition("%")[0]
    return Endpoint.parse(f"[{address}]:{name[1]}" if ":" in address else f"{address}:{name[1]}")


def fill_option_memory(client: socket.socket) -> None:
    """Attach the largest filter that still fits (sk_filter_charge), so that nothing of a label's size does."""
    so_attach_filter, so_detach_filter = 26, 27
    # "ldb [0]": one classic instruction, many of the kernel's own.
    load, accept = struct.pack("=HBBI", 0x30, 0, 0, 0), struct.pack("=HBBI", 0x06, 0, 0, 0xFFFF)

    def attach(length: int) -> bool:
        code = ctypes.create_string_buffer(load * length + accept)
        program = struct.pack("=HxxxxxxQ", length + 1, ctypes.addressof(code))
        try:
            client.setsockopt(socket.SOL_SOCKET, so_attach_filter, program)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            return False
        return True

    low, high = 0, 4095
    while low < high - 1:
        middle = (low + high) // 2
        if attach(middle):
            client.setsockopt(socket.SOL_SOCKET, so_detach_filter, 0)
            low = middle
        else:
            high = middle
    assert high < 4095, "the largest filter allowed does not fill the option memory"
    assert attach(low)


def receive_socket(end: socket.socket) -> socket.socket:
    """A socket passed by SCM_RIGHTS."""
    _, descriptors, _, _ = socket.recv_fds(end, 1, 1)
    return socket.socket(fileno=descriptors[0])


def send_socket(end: socket.socket, client: socket.socket) -> None:
    """Pass a socket by SCM_RIGHTS."""
    sent: List[int] = [client.fileno()]
    socket.send_fds(end, [b"1"], sent)
