"""The other end of the users' socket, for ``adoptctl``: one command, one reply in time, or a stream of them.

Must believe nothing that is not said by root: a socket that somebody else serves is no agent.
"""

from __future__ import annotations

import contextlib
import select
import socket
from typing import Iterator

from adoptd.deadline import Deadline
from adoptd.model import AdoptdError, ProtocolError
from adoptd.sockets import Caller
from adoptd.wire import frame
from adoptd.wire.control import COMMAND_MAX_BYTES, Command, Result, decode_reply, encode_command

# More than the agent gives itself for any command.
TIMEOUT_MS = 7000.0
# How long after a signal came at the wrong moment it is heard at the latest.
_LOOK_MS = 1000

_CLOSED = "the agent closed the connection without a reply; its log says why"


class AgentError(AdoptdError):
    """The agent cannot be asked, or refused the command; the text is for the person who typed it."""


def ask_agent(path: str, command: Command) -> Result:
    """What the agent at the unix socket ``path`` says to ``command``. Raises AgentError."""
    deadline = Deadline.after_ms(TIMEOUT_MS)
    with _asked(path, command, deadline) as sock:
        return _result(sock, deadline)


def follow_agent(path: str, command: Command, output: int) -> Iterator[Result]:
    """What the agent says to ``command``, one after another until it says that it ends; the first in time.

    ``output`` is where the caller writes: when nobody reads there any more BrokenPipeError is raised, also while
    nothing happens. Raises AgentError, also when the agent goes without a word.
    """
    with _asked(path, command, Deadline.after_ms(TIMEOUT_MS)) as sock:
        yield _result(sock, Deadline.after_ms(TIMEOUT_MS))
        waiting = select.poll()
        waiting.register(sock, select.POLLIN)
        # Of a pipe whose reader has gone the kernel says POLLERR, asked for or not.
        waiting.register(output, 0)
        while True:
            # Not for ever: of a signal that comes just before the wait Python hears only when it is over.
            ready = dict(waiting.poll(_LOOK_MS))
            if not ready:
                continue
            if output in ready:
                break
            try:
                result = _result(sock, Deadline.after_ms(TIMEOUT_MS))
            except _Closed:
                raise AgentError("the agent has gone; it may have been restarted") from None
            if "end" in result:
                raise AgentError(f"{result['end']}")
            yield result
    raise BrokenPipeError("nobody reads the output any more")


class _Closed(AgentError):
    """The connection ended where a reply might have begun."""


@contextlib.contextmanager
def _asked(path: str, command: Command, deadline: Deadline) -> Iterator[socket.socket]:
    """A connection to the agent over which the command was sent. Raises AgentError, also for what is done with it."""
    try:
        body = encode_command(command)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(deadline.remaining_s())
            sock.connect(path)
            server = Caller.of(sock)
            if server.uid != 0:
                raise AgentError(f"{path} is served by uid {server.uid}, expected root: this is not the agent")
            sock.sendall(frame.encode_frame(body, COMMAND_MAX_BYTES))
            yield sock
    except (FileNotFoundError, ConnectionRefusedError):
        raise AgentError(f"no agent is running: nobody serves {path}") from None
    except ProtocolError as error:
        raise AgentError(str(error)) from None
    except OSError as error:
        raise AgentError(f"{path}: {error.strerror or error}") from None


def _result(sock: socket.socket, deadline: Deadline) -> Result:
    length = frame.decode_length(_read(sock, frame.PREFIX_BYTES, deadline), frame.CONTROL_MAX_BYTES)
    reply = decode_reply(_read(sock, length, deadline))
    if isinstance(reply, str):
        raise AgentError(reply)
    return reply


def _read(sock: socket.socket, count: int, deadline: Deadline) -> bytes:
    data = bytearray()
    while len(data) < count:
        sock.settimeout(max(deadline.remaining_s(), 0.001))
        chunk = sock.recv(count - len(data))
        if not chunk:
            raise _Closed(_CLOSED)
        data += chunk
    return bytes(data)
