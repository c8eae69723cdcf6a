"""An agent that says what it is told: for the tests of adoptctl and its client."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from pathlib import Path
from typing import Callable, Iterator, List, Union

from adoptd.wire.control import Command, Result, decode_command, encode_error, encode_result

Reply = Union[Result, str, bytes, None]


@contextlib.contextmanager
def scripted_agent(path: Path, script: Callable[[Command], Reply]) -> Iterator[List[Command]]:
    """Serves ``path``; yields the commands it got.

    From ``script`` a dict is a result and a str an error; bytes go out as they are, None closes.
    """
    commands: List[Command] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(8)
    stopping = threading.Event()

    def serve() -> None:
        while not stopping.is_set():
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                client.settimeout(60.0)
                prefix = _read(client, 4)
                if len(prefix) < 4:
                    continue
                command = decode_command(_read(client, struct.unpack("!I", prefix)[0]))
                commands.append(command)
                reply = script(command)
                if isinstance(reply, dict):
                    reply = _framed(encode_result(reply))
                elif isinstance(reply, str):
                    reply = _framed(encode_error(reply))
                client.sendall(reply or b"")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield commands
    finally:
        stopping.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(60.0)
        listener.close()


def _framed(body: bytes) -> bytes:
    return struct.pack("!I", len(body)) + body


def _read(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = client.recv(count - len(data))
        if not chunk:
            break
        data += chunk
    return data
