"""A dual-stack listener that hands each connection to ``sshd -i``, as inetd or systemd would.

Debian's own sshd sets IPV6_V6ONLY on its IPv6 socket, so an IPv4 client never reaches it as
``::ffff:a.b.c.d``; behind a listener like this one it does. Run in a node as
``python -m lab.acceptor PORT COMMAND...`` until it is killed.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys


def _heed_children() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def main() -> int:
    """Serve until killed; one child per connection, which has it as its input and output."""
    port, command = int(sys.argv[1]), sys.argv[2:]
    # The kernel reaps the children: nobody asks how they ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", port))
        listener.listen(64)
        while True:
            connection, _ = listener.accept()
            with connection:
                # sshd waits for its own children, so it must not inherit that they are ignored.
                subprocess.Popen(
                    command, stdin=connection.fileno(), stdout=connection.fileno(), preexec_fn=_heed_children
                )


if __name__ == "__main__":
    sys.exit(main())
