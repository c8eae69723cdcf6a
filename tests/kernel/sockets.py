"""Real TCP connections with a known source port, held by a child process made for the test.

Run as a program this file is that child: it connects to itself as its one argument (JSON) says, prints what it
made, obeys one command per line (see _serve) and ends with its standard input. Everything it makes ends with it:
the network namespace, the forked holders, the sockets (reset, so that no TIME_WAIT is left unless asked for).
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Dict, List, Optional, Tuple, Type

START_S = 60.0


@dataclass(frozen=True)
class ClientSpec:
    """What the child is to do. ``mapped``: an AF_INET6 socket holding IPv4-mapped addresses.

    ``real_uid`` (and ``effective_uid``, else the same) is whom the child becomes before it makes its socket;
    ``socket_uid`` is whom it only makes the socket as, to be root again afterwards.
    """

    address: str = "127.0.0.1"
    source_port: int = 0
    destination_port: int = 0
    mapped: bool = False
    device: Optional[str] = None
    real_uid: Optional[int] = None
    effective_uid: Optional[int] = None
    socket_uid: Optional[int] = None
    cgroup: Optional[str] = None
    own_network: bool = False


class Client:
    """A child that holds both ends of a connection; ``pid``, ``inode`` and ports are of the connecting end."""

    def __init__(self, spec: ClientSpec) -> None:
        command = [sys.executable, str(Path(__file__)), json.dumps(spec.__dict__)]
        if spec.own_network:
            command = ["unshare", "--net", *command]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            facts = self._reply()
            self.pid, self.inode = facts["pid"], facts["inode"]
            self.source_port, self.destination_port = facts["source_port"], facts["destination_port"]
            for wanted, got in (
                (spec.source_port, self.source_port),
                (spec.destination_port, self.destination_port),
            ):
                assert wanted in (0, got), f"asked for port {wanted}, got {got}"
        except BaseException:
            self.close()
            raise

    def tell(self, command: str) -> Dict[str, int]:
        """Give the child one command and return its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._reply()

    def close(self) -> None:
        """End the child; returns when it is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def _reply(self) -> Dict[str, int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the child ended early; its last words are on stderr"
        return {name: int(value) for name, value in json.loads(line).items()}


def cgroup2_mount() -> Path:
    """Where the version 2 hierarchy is mounted; AssertionError if it is not."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] == "cgroup2":
            return Path(before.split()[4])
    raise AssertionError("no cgroup2 hierarchy is mounted")


def remove_cgroup(path: Path) -> None:
    """rmdir as soon as the kernel lets go of the last process."""
    # Not at the top: this file is run as a program, too, which has nothing of ours to import.
    from lab.waiting import until

    def removed() -> bool:
        try:
            path.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    until(removed, f"{path} is empty")


def _connect(spec: ClientSpec) -> Tuple[socket.socket, socket.socket]:
    if spec.own_network:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    if spec.cgroup is not None:
        Path(spec.cgroup, "cgroup.procs").write_text(str(os.getpid()))
    if spec.real_uid is not None:
        effective = spec.real_uid if spec.effective_uid is None else spec.effective_uid
        os.setresuid(spec.real_uid, effective, effective)
    family = socket.AF_INET6 if spec.mapped or ":" in spec.address else socket.AF_INET
    address = f"::ffff:{spec.address}" if spec.mapped else spec.address
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, spec.destination_port))
        listener.listen(1)
        if spec.socket_uid is not None:
            os.seteuid(spec.socket_uid)
        client = socket.socket(family)
        if spec.socket_uid is not None:
            os.seteuid(0)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if spec.device is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, spec.device.encode())
        client.bind((address, spec.source_port))
        client.connect(listener.getsockname())
        server, _ = listener.accept()
    for end in (client, server):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return client, server


def _say(**facts: int) -> None:
    print(json.dumps(facts), flush=True)


def _fork_holder(client: socket.socket, held: List[int], moves_to: Optional[str], uid: Optional[int]) -> int:
    """A child that keeps only the client's socket, until this process ends. Returns its pid once it is ready."""
    ready_r, ready_w = os.pipe()
    end_r, end_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        for descriptor in [end_w, ready_r, *held]:
            os.close(descriptor)
        if moves_to is not None:
            Path(moves_to, "cgroup.procs").write_text(str(os.getpid()))
        if uid is not None:
            os.setresuid(uid, uid, uid)
        os.write(ready_w, b"1")
        os.read(end_r, 1)
        os._exit(0)
    os.close(ready_w)
    os.close(end_r)
    assert os.read(ready_r, 1) == b"1"
    os.close(ready_r)
    held.append(end_w)
    return pid


def _serve(client: socket.socket, server: socket.socket) -> None:
    held: List[int] = []
    opened: List[int] = []
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "fork":  # fork [UID [CGROUP]]
            uid, moves_to = [*rest, None, None][:2]
            _say(pid=_fork_holder(client, held, moves_to, int(uid) if uid else None))
        elif word == "close-client":  # close-client [orderly]
            if rest == ["orderly"]:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
            client.close()
            _say(ok=1)
        elif word == "finish":  # an orderly end, the client first: leaves it in TIME_WAIT
            for end in (client, server):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
                end.close()
            _say(ok=1)
        elif word == "open":  # open PATH, with O_PATH so that any kind of file will do
            opened.append(os.open(rest[0], os.O_PATH))
            _say(fd=opened[-1])
        else:
            raise ValueError(f"unknown command {line!r}")


def _main() -> None:
    spec = ClientSpec(**json.loads(sys.argv[1]))
    client, server = _connect(spec)
    _say(
        pid=os.getpid(),
        inode=os.fstat(client.fileno()).st_ino,
        source_port=client.getsockname()[1],
        destination_port=client.getpeername()[1],
    )
    _serve(client, server)


if __name__ == "__main__":
    _main()
