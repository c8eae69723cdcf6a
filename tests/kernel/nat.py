"""A node that translates what its containers connect: network namespaces, veth pairs, and nftables' masquerade.

    container --- node (masquerade) --- server

All in namespaces of the test's own; the host's packet filter is never touched.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from typing import Any, Callable, Dict, List, Optional

import pytest

from adoptd.model import Connection, Endpoint
from kernel.actors import CLONE_NEWNET, LIBC, Line, actor, listener
from kernel.networks import Network, link
from lab.waiting import until

CONTAINERS = {4: "10.95.1.{}", 6: "fd95:1::{}"}
SERVERS = {4: "10.95.2.{}", 6: "fd95:2::{}"}
PREFIX = {4: 24, 6: 64}
_RULES = """
table inet adoptd_test {
    chain out {
        type nat hook postrouting priority 100; policy accept;
        oifname "server" masquerade
    }
}
"""


def run(*command: str, words: Optional[str] = None) -> str:
    """Run a tool of the system's; what it printed. Fails with what it said."""
    done = subprocess.run(command, input=words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout


class Node:
    """The node, its server, and as many containers as asked for."""

    def __init__(self, stack: contextlib.ExitStack, containers: int = 1, bridged: bool = False) -> None:
        if shutil.which("nft") is None:
            pytest.fail("nft is not installed: the tests of source NAT cannot run without it (package nftables)")
        self.stack = stack
        self.network = Network(stack)
        self.server = Network(stack)
        link(self.network, "server", self.server, "node")
        for version in (4, 6):
            self._address(self.network, SERVERS[version].format(1), "server")
            self._address(self.server, SERVERS[version].format(2), "node")
        self.network.sysctl("net.ipv4.ip_forward", 1)
        self.network.sysctl("net.ipv6.conf.all.forwarding", 1)
        if bridged:
            self.network.ip("link", "add", "bridge", "type", "bridge")
            self.network.sysctl("net.ipv6.conf.bridge.accept_dad", 0)
            self.network.ip("link", "set", "bridge", "up")
            for version in (4, 6):
                self._address(self.network, CONTAINERS[version].format(1), "bridge")
        self.containers: List[Network] = []
        for number in range(containers):
            self.containers.append(self._container(number, bridged))
        self.rules(_RULES)
        self._await_routes()
        with self.server.entered():
            self.listeners = {version: listener(stack, SERVERS[version].format(2)) for version in (4, 6)}

    def _await_routes(self) -> None:
        """IPv6's addresses are of use some time after they were given."""
        for each in (self.server, self.network, *self.containers):
            words = ("nsenter", f"--net={each.path}", "ip", "-6", "addr", "show", "tentative")
            until(lambda words=words: not run(*words).strip(), "no address is tentative")
            for version in (4, 6):
                for number in (1, 2):
                    route = ("nsenter", f"--net={each.path}", "ip", "route", "get", SERVERS[version].format(number))
                    until(
                        lambda route=route: subprocess.run(route, capture_output=True, check=False).returncode == 0,
                        "a route to the server",
                    )

    def rules(self, text: str) -> None:
        """Load rules into the node's packet filter."""
        run("nsenter", f"--net={self.network.path}", "nft", "-f", "-", words=text)

    def _container(self, number: int, bridged: bool) -> Network:
        made = Network(self.stack)
        name = f"c{number}"
        link(self.network, name, made, "eth0")
        if bridged:
            self.network.ip("link", "set", name, "master", "bridge")
        elif number:
            raise AssertionError("more than one container needs the bridge")
        for version in (4, 6):
            if not bridged:
                self._address(self.network, CONTAINERS[version].format(1), name)
            self._address(made, CONTAINERS[version].format(2 + number), "eth0")
            made.ip(f"-{version}", "route", "add", "default", "via", CONTAINERS[version].format(1))
        return made

    @staticmethod
    def _address(network: Network, address: str, device: str) -> None:
        version = 6 if ":" in address else 4
        extra = ["nodad"] if version == 6 else []
        network.ip("addr", "add", f"{address}/{PREFIX[version]}", "dev", device, *extra)

    def connect(
        self, version: int, life: Callable[[Line, socket.socket], None], network: Optional[Network] = None
    ) -> Any:
        """An actor in the (first) container that connects by ``life``, given the listener; its line and facts."""
        server = self.listeners[version]

        def live(line: Line) -> None:
            life(line, server)

        with (network or self.containers[0]).entered():
            line = actor(self.stack, live)
        return line, line.hear()

    def seen_by_the_server(self, version: int) -> Connection:
        """The next connection as the server has it: its source is whatever the node made of it."""
        accepted, _ = self.listeners[version].accept()
        self.stack.enter_context(accepted)
        return Connection(_endpoint(accepted.getpeername()), _endpoint(accepted.getsockname()))


def _endpoint(name: Any) -> Endpoint:
    return Endpoint.parse(f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}")


def source(facts: Dict[str, Any]) -> Endpoint:
    """The source of a connection as its maker saw it."""
    return _endpoint(facts["source"])


def enter_new_network() -> None:
    """Put this process into a network namespace of its own."""
    assert LIBC.unshare(CLONE_NEWNET) == 0
    run("ip", "link", "set", "lo", "up")
