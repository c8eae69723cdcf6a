"""The other end of the users' socket, for ``adoptctl``: one command, one reply, in time.

Must believe nothing that is not said by root: a socket that somebody else serves is no agent.
"""

from __future__ import annotations

import socket

from adoptd.deadline import Deadline
from adoptd.model import AdoptdError, ProtocolError
from adoptd.server import Caller
from adoptd.wire import frame
from adoptd.wire.control import COMMAND_MAX_BYTES, Command, Result, decode_reply, encode_command

# More than the agent gives itself for any command.
TIMEOUT_MS = 7000.0


class AgentError(AdoptdError):
    """The agent cannot be asked, or refused the command; the text is for the person who typed it."""


def ask_agent(path: str, command: Command) -> Result:
    """What the agent at the unix socket ``path`` says to ``command``. Raises AgentError."""
    deadline = Deadline.after_ms(TIMEOUT_MS)
    try:
        body = encode_command(command)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(deadline.remaining_s())
            sock.connect(path)
            server = Caller.of(sock)
            if server.uid != 0:
                raise AgentError(f"{path} is served by uid {server.uid}, expected root: this is not the agent")
            sock.sendall(frame.encode_frame(body, COMMAND_MAX_BYTES))
            length = frame.decode_length(_read(sock, frame.PREFIX_BYTES, deadline), frame.CONTROL_MAX_BYTES)
            reply = decode_reply(_read(sock, length, deadline))
    except (FileNotFoundError, ConnectionRefusedError):
        raise AgentError(f"no agent is running: nobody serves {path}") from None
    except ProtocolError as error:
        raise AgentError(str(error)) from None
    except OSError as error:
        raise AgentError(f"{path}: {error.strerror or error}") from None
    if isinstance(reply, str):
        raise AgentError(reply)
    return reply


def _read(sock: socket.socket, count: int, deadline: Deadline) -> bytes:
    data = bytearray()
    while len(data) < count:
        sock.settimeout(max(deadline.remaining_s(), 0.001))
        chunk = sock.recv(count - len(data))
        if not chunk:
            raise AgentError("the agent closed the connection without a reply; its log says why")
        data += chunk
    return bytes(data)
