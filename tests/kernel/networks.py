"""Network namespaces of a test's own, joined by veth pairs, and gone with it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import Iterator

from kernel.actors import CLONE_NEWNET, LIBC, Line, actor


class Network:
    """One network namespace with its loopback up."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        def live(line: Line) -> None:
            assert LIBC.unshare(CLONE_NEWNET) == 0
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            line.tell({"pid": os.getpid()})
            line.wait()

        pid = actor(stack, live).hear()["pid"]
        self.path = f"/proc/{pid}/ns/net"
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, self._fd)

    def ip(self, *arguments: str) -> None:
        """Run ip(8) in it."""
        subprocess.run(["nsenter", f"--net={self.path}", "ip", *arguments], check=True)

    def sysctl(self, name: str, value: int) -> None:
        """Set one of its own settings."""
        subprocess.run(["nsenter", f"--net={self.path}", "sysctl", "-qw", f"{name}={value}"], check=True)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread, and what it makes and forks, is in this namespace meanwhile."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            assert LIBC.setns(self._fd, CLONE_NEWNET) == 0
            try:
                yield
            finally:
                assert LIBC.setns(before, CLONE_NEWNET) == 0
        finally:
            os.close(before)


def link(one: Network, one_name: str, other: Network, other_name: str) -> None:
    """A veth pair between two namespaces, both ends up and their link-local addresses usable at once."""
    one.ip("link", "add", one_name, "type", "veth", "peer", "name", other_name, "netns", other.path.split("/")[2])
    for network, name in ((one, one_name), (other, other_name)):
        network.sysctl(f"net.ipv6.conf.{name}.accept_dad", 0)
        network.ip("link", "set", name, "up")
