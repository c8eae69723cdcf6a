"""A service manager in small: holds the agent's sockets, hands them to it, and starts it again when it ends.

The protocol is that of sd_listen_fds(3) and nothing more. Run as ``python -m activator SPEC -- COMMAND...`` where SPEC
is a JSON list of ``[name, address, port, mode]`` (a unix socket has a path for an address, and port 0; TCP has mode 0).
Says ``started PID`` for each agent and ``ended STATUS`` for each end on stdout. SIGTERM ends the agent, then this;
SIGHUP asks the agent to end, SIGUSR1 kills it: either way the next is started RESTART_S later.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
import time
from types import FrameType
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from lab import kernel

# RestartSec= of packaging/systemd/adoptd.service.
RESTART_S = 0.1
FIRST_FD = 3
BACKLOG = 1024

Spec = Tuple[str, str, int, int]


def listening(spec: Spec) -> socket.socket:
    """The socket that systemd would make of ListenStream=, SocketMode= and BindIPv6Only=ipv6-only."""
    _, address, port, mode = spec
    if address.startswith("/"):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        umask = os.umask(0o777 & ~mode)
        try:
            sock.bind(address)
        finally:
            os.umask(umask)
    else:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
    sock.listen(BACKLOG)
    return sock


def start(
    command: Sequence[str], sockets: Sequence[socket.socket], names: Sequence[str], env: Mapping[str, str]
) -> int:
    """Start ``command`` with the sockets from descriptor 3 on; its pid."""
    child = os.fork()
    if child:
        return child
    try:
        # First out of the way: one of ours may have a number that another is to get.
        copies = [fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD, FIRST_FD + len(sockets)) for sock in sockets]
        for at, copy in enumerate(copies):
            os.dup2(copy, FIRST_FD + at, inheritable=True)
            os.set_inheritable(copy, False)
        given = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        kernel.die_with_parent(signal.SIGKILL)
        os.execvpe(command[0], list(command), {**env, **given})
    finally:
        os._exit(127)


def main() -> int:
    """Keep the agent running until SIGTERM."""
    spec: List[Spec] = [(str(n), str(a), int(p), int(m)) for n, a, p, m in json.loads(sys.argv[1])]
    command = sys.argv[sys.argv.index("--") + 1 :]
    sockets = [listening(each) for each in spec]
    agent: Dict[str, int] = {}
    stopping = False

    def pass_on(number: int, _frame: Optional[FrameType]) -> None:
        nonlocal stopping
        stopping = stopping or number == signal.SIGTERM
        if "pid" in agent:
            os.kill(agent["pid"], signal.SIGKILL if number == signal.SIGUSR1 else signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, pass_on)
    try:
        while not stopping:
            agent["pid"] = start(command, sockets, [name for name, _, _, _ in spec], os.environ)
            sys.stdout.write(f"started {agent['pid']}\n")
            sys.stdout.flush()
            _, status = os.waitpid(agent["pid"], 0)
            del agent["pid"]
            sys.stdout.write(f"ended {os.waitstatus_to_exitcode(status)}\n")
            sys.stdout.flush()
            if not stopping:
                time.sleep(RESTART_S)
    finally:
        for _, address, _, _ in spec:
            if address.startswith("/"):
                os.unlink(address)
    return 0


if __name__ == "__main__":
    sys.exit(main())
