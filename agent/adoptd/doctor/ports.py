"""The doctor's look at our ports: who listens there, and whether the loopback device is up.

Owns what is concluded from the kernel's tables of listeners. Called through the table of checks.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import FrozenSet, Iterator, List, Optional, Sequence, Tuple

import psutil

from adoptd.doctor.findings import Finding, Scene, failure, ok, warning
from adoptd.doctor.processes import PROC, agent_pid, holders_of, names_of, read
from adoptd.model import IPAddress

_LISTEN = "0A"
_INIT = 1


@dataclass(frozen=True)
class Listener:
    """A port on which somebody listens here. ``holders``: names of programs, with their ``pids``; empty where they
    cannot be told."""

    address: IPAddress
    port: int
    holders: Tuple[str, ...] = ()
    uid: Optional[int] = None
    pids: Tuple[int, ...] = ()


def look_at_ports(scene: Scene) -> Iterator[Finding]:
    """Who has our ports."""
    section, metrics = scene.settings.callerid, scene.settings.metrics
    wanted: List[Tuple[str, str, int]] = []
    if section.enabled:
        wanted += [("callerid", address, section.port) for address in section.listen]
    if metrics.enabled:
        wanted.append(("metrics", metrics.listen, metrics.port))
    ports = frozenset(port for _, _, port in wanted)
    if metrics.enabled and not is_ours(metrics.listen):
        seen = f"[metrics] listen is {metrics.listen}, which is no address of this host: nothing is exported"
        yield failure("port", seen, "ip address; put this host's own there")
    if section.enabled and metrics.enabled:
        yield from judge_overlap(section.listen, section.port, metrics.listen, metrics.port)
    if section.enabled:
        yield from judge_addresses(section.listen, [each for each in section.listen if not is_ours(each)])
    yield from judge_loopback(_is_up("lo"))
    ipv6 = Path("/proc/net/if_inet6").exists()
    agent = agent_pid(scene.settings.agent.pam_socket) if scene.root else None
    yield from judge_ports(wanted, _listeners(ports, PROC), scene.settings.callerid.enabled, ipv6, agent)


def judge_ports(
    wanted: List[Tuple[str, str, int]],
    found: List[Listener],
    callerid: bool,
    ipv6: bool = True,
    agent: Optional[int] = None,
) -> Iterator[Finding]:
    """``wanted``: what for, address and port. ``agent``: its pid, None where that is not known."""
    for what, address, port in wanted:
        there = ipaddress.ip_address(address)
        holders = [each for each in found if each.port == port and _keeps(each.address, there)]
        foreign = [each for each in holders if each.uid not in (0, None)]
        others = [each for each in holders if agent is not None and each.pids and not {agent, _INIT} & set(each.pids)]
        if not holders:
            seen = f"nobody listens on {address} port {port} ({what})"
            if there.version == 6 and not ipv6:
                yield failure("port", f"{seen}, and this host has no IPv6", f"take {address} out of [callerid] listen")
            elif what == "callerid":
                remedy = "systemctl restart adoptd; other nodes cannot ask this one until then"
                yield failure("port", seen, remedy, cause="agent")
            else:
                remedy = "systemctl restart adoptd; Prometheus has nothing from this node until then"
                yield warning("port", seen, remedy, cause="agent")
        elif foreign:
            who = ", ".join(foreign[0].holders) or "a program"
            seen = f"{address} port {port} ({what}) is held by {who} of uid {foreign[0].uid}, who is not root"
            yield failure(
                "port", seen, f"end it (ss -ltnp sport = :{port}); adoptd-callerid.socket keeps the port from users"
            )
        elif others:
            seen = f"{address} port {port} ({what}) is held by {', '.join(others[0].holders)}, and not by the agent"
            remedy = f"end it or give it another port, or change [{what}] port; then systemctl restart adoptd"
            yield (failure if what == "callerid" else warning)("port", seen, remedy)
        else:
            who = ", ".join(holders[0].holders)
            yield ok("port", f"{address} port {port} ({what}{': ' + who if who else ''})")
    if not callerid:
        yield warning(
            "port", "other nodes are not asked: [callerid] enabled is false", "set it to true for several jobs per node"
        )


def judge_addresses(listen: Sequence[str], foreign: Sequence[str]) -> Iterator[Finding]:
    """``foreign``: those of ``listen`` that no device here has."""
    if foreign:
        seen = f"[callerid] listen has {', '.join(foreign)}, which is no address of this host: nobody can ask there"
        yield failure("port", seen, "ip address; put this host's own there, or take it out")
    if all(ipaddress.ip_address(each).is_loopback for each in listen):
        seen = "[callerid] listen has loopback addresses alone: no other node can ask this one"
        yield warning("port", seen, 'listen = ["0.0.0.0", "::"], or this host\'s address in the cluster')


def judge_overlap(listen: Sequence[str], port: int, metrics: str, metrics_port: int) -> Iterator[Finding]:
    """Both of ours at one place: only one gets it."""
    wanted = ipaddress.ip_address(metrics)
    there = [each for each in map(ipaddress.ip_address, listen) if _keeps(each, wanted) or _keeps(wanted, each)]
    if port == metrics_port and there:
        seen = f"[metrics] port and [callerid] port are both {port} at {there[0]}: only one of the two can listen"
        yield failure("port", seen, "put another into [metrics] port, such as 9830; systemctl restart adoptd")


def is_ours(address: str) -> bool:
    """Whether a device of this host has it."""
    there = ipaddress.ip_address(address)
    try:
        with socket.socket(socket.AF_INET6 if there.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as attempt:
            attempt.bind((address, 0))
    except OSError as error:
        # A host without IPv6 is said otherwise.
        return error.errno != errno.EADDRNOTAVAIL or there.is_unspecified
    return True


def judge_loopback(up: Optional[bool]) -> Iterator[Finding]:
    """Without it nothing of ours can test itself; ``up`` None: cannot be told."""
    if up is False:
        seen = "the loopback device is down: no self-test can pass, and Prometheus on this node has nothing"
        yield failure("port", seen, "ip link set lo up")


def _is_up(device: str) -> Optional[bool]:
    found = psutil.net_if_stats().get(device)
    return None if found is None else bool(found.isup)


def _keeps(bound: IPAddress, wanted: IPAddress) -> bool:
    """Whether nobody else can listen at ``wanted`` while somebody does at ``bound``."""
    return bound == wanted or (bound.is_unspecified and bound.version == wanted.version)


def _listeners(ports: FrozenSet[int], proc: Path) -> List[Listener]:
    rows = [row for row in listening_rows(proc) if row[1] in ports]
    holders = holders_of((inode for *_, inode in rows), proc)
    return [
        Listener(address, port, tuple(names_of((pid,), proc) for pid in pids), uid, pids)
        for address, port, uid, pids in ((*row[:3], holders.get(row[3], ())) for row in rows)
    ]


def listening_rows(proc: Path = PROC) -> List[Tuple[IPAddress, int, int, int]]:
    """The TCP sockets that listen here: address, port, uid and inode of each."""
    rows: List[Tuple[IPAddress, int, int, int]] = []
    for name in ("tcp", "tcp6"):
        for line in read(proc / "net" / name).splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN:
                rows.append((*_place(fields[1]), int(fields[7]), int(fields[9])))
    return rows


def _place(text: str) -> Tuple[IPAddress, int]:
    """An address as /proc/net/tcp has it: 32-bit words in host order (proc(5))."""
    host, _, port = text.partition(":")
    words = bytes.fromhex(host)
    packed = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
    return ipaddress.ip_address(packed), int(port, 16)


def own_address(listen: Tuple[str, ...]) -> IPAddress:
    """An address of ours at which the agent can be asked from here."""
    first = ipaddress.ip_address(listen[0])
    if first.is_unspecified:
        return ipaddress.ip_address("127.0.0.1" if first.version == 4 else "::1")
    return first
