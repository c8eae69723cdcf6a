"""The doctor's look at the network: our ports, our own answers, and a named peer's.

Owns the question that is asked for the sake of its answer, about a connection that nobody has, and what is concluded
from it, which is no more than was shown. Called through the table of checks.
"""

from __future__ import annotations

import asyncio
import fcntl
import http.client
import ipaddress
import os
import socket
import ssl
import stat
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, FrozenSet, Iterator, List, Optional, Tuple, TypeVar

from adoptd.callerid import Asker, AskFault, SealRoom
from adoptd.config import MetricsConfig
from adoptd.deadline import Deadline
from adoptd.doctor.findings import Finding, Scene, TookTooLong, failure, ok, warning, within
from adoptd.metrics import Metrics
from adoptd.model import Connection, Endpoint, IPAddress
from adoptd.seal import Opened, Seal, SealError
from adoptd.slurm_site import configured_seal
from adoptd.wire.callerid import Reason
from adoptd.workers import Workers

_T = TypeVar("_T")

# What a peer is given, longer than a login would wait, so that a slow one is told from one that is silent.
_ASK_MS = 2_000
_RESOLVE_S = 1.5
_CONNECT_S = 1.0
_SEAL_S = 3.0
_EXPORTER_S = 1.5
_LISTEN = "0A"
# netdevice(7)
_SIOCGIFFLAGS = 0x8913
_IFF_UP = 0x1
# A clock that is that far off is worth a word before the seal refuses it.
_CLOCK_SHARE = 0.3
# No socket has it: the question is about nobody's connection.
_NOBODYS_PORT = 1
_SSHD_PORT = 22


@dataclass(frozen=True)
class Listener:
    """A port on which somebody listens here. ``holders``: names of programs, empty where they cannot be told."""

    address: IPAddress
    port: int
    holders: Tuple[str, ...] = ()
    uid: Optional[int] = None


def look_at_ports(scene: Scene) -> Iterator[Finding]:
    """Who has our ports."""
    section, metrics = scene.settings.callerid, scene.settings.metrics
    wanted: List[Tuple[str, str, int]] = []
    if section.enabled:
        wanted += [("callerid", address, section.port) for address in section.listen]
    if metrics.enabled:
        wanted.append(("metrics", metrics.listen, metrics.port))
    ports = frozenset(port for _, _, port in wanted)
    yield from judge_loopback(_is_up("lo"))
    ipv6 = Path("/proc/net/if_inet6").exists()
    yield from judge_ports(wanted, _listeners(ports, Path("/proc")), scene.settings.callerid.enabled, ipv6)


def judge_ports(
    wanted: List[Tuple[str, str, int]], found: List[Listener], callerid: bool, ipv6: bool = True
) -> Iterator[Finding]:
    """``wanted``: what for, address and port."""
    for what, address, port in wanted:
        there = ipaddress.ip_address(address)
        holders = [each for each in found if each.port == port and _keeps(each.address, there)]
        foreign = [each for each in holders if each.uid not in (0, None)]
        if not holders:
            seen = f"nobody listens on {address} port {port} ({what})"
            if there.version == 6 and not ipv6:
                yield failure("port", f"{seen}, and this host has no IPv6", f"take {address} out of [callerid] listen")
            elif what == "callerid":
                yield failure("port", seen, "systemctl restart adoptd; other nodes cannot ask this one until then")
            else:
                yield warning(
                    "port", seen, "systemctl restart adoptd; Prometheus has nothing from this node until then"
                )
        elif foreign:
            who = ", ".join(foreign[0].holders) or "a program"
            seen = f"{address} port {port} ({what}) is held by {who} of uid {foreign[0].uid}, who is not root"
            yield failure(
                "port", seen, f"end it (ss -ltnp sport = :{port}); adoptd-callerid.socket keeps the port from users"
            )
        else:
            who = ", ".join(holders[0].holders)
            yield ok("port", f"{address} port {port} ({what}{': ' + who if who else ''})")
    if not callerid:
        yield warning(
            "port", "other nodes are not asked: [callerid] enabled is false", "set it to true for several jobs per node"
        )


def judge_loopback(up: Optional[bool]) -> Iterator[Finding]:
    """Without it nothing of ours can test itself; ``up`` None: cannot be told."""
    if up is False:
        seen = "the loopback device is down: no self-test can pass, and Prometheus on this node has nothing"
        yield failure("port", seen, "ip link set lo up")


def _is_up(device: str) -> Optional[bool]:
    request = struct.pack("16sH14x", device.encode(), 0)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, request)
    except OSError:
        return None
    return bool(struct.unpack("16sH14x", answer)[1] & _IFF_UP)


def _keeps(bound: IPAddress, wanted: IPAddress) -> bool:
    """Whether nobody else can listen at ``wanted`` while somebody does at ``bound``."""
    return bound == wanted or (bound.is_unspecified and bound.version == wanted.version)


def _listeners(ports: FrozenSet[int], proc: Path) -> List[Listener]:
    rows: List[Tuple[IPAddress, int, int, str]] = []
    for name in ("tcp", "tcp6"):
        try:
            with (proc / "net" / name).open(encoding="ascii") as table:
                next(table, None)
                for line in table:
                    fields = line.split()
                    if fields[3] == _LISTEN:
                        address, port = _place(fields[1])
                        if port in ports:
                            rows.append((address, port, int(fields[7]), fields[9]))
        except OSError:
            continue
    holders = _holders(frozenset(inode for *_, inode in rows), proc)
    return [Listener(address, port, holders.get(inode, ()), uid) for address, port, uid, inode in rows]


def _place(text: str) -> Tuple[IPAddress, int]:
    """An address as /proc/net/tcp has it: 32-bit words in host order (proc(5))."""
    host, _, port = text.partition(":")
    words = bytes.fromhex(host)
    packed = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
    return ipaddress.ip_address(packed), int(port, 16)


def _holders(inodes: FrozenSet[str], proc: Path) -> Dict[str, Tuple[str, ...]]:
    found: Dict[str, Tuple[str, ...]] = {}
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    for entry in os.listdir(proc):
        if not entry.isdigit():
            continue
        try:
            for fd in os.listdir(proc / entry / "fd"):
                inode = wanted.get(os.readlink(proc / entry / "fd" / fd))
                if inode is not None:
                    name = (proc / entry / "comm").read_text("utf-8", "replace").strip()
                    found[inode] = tuple(dict.fromkeys((*found.get(inode, ()), f"{name} (pid {entry})")))
        except OSError:
            continue
    return found


@dataclass(frozen=True)
class Heard:
    """What came of a question: ``reason`` is a value of Reason or AskFault.

    ``ahead_s`` is the answerer's clock less ours, to within ``precision_s``.
    """

    reason: str
    detail: str
    took_ms: float
    ahead_s: Optional[float] = None
    precision_s: float = 0.0


class _NotedSeal:
    """The seal in force here, and when by the answerer's clock the last answer was sealed."""

    def __init__(self, seal: Seal) -> None:
        self._seal = seal
        self.scheme = seal.scheme
        self.may_block = seal.may_block
        self.identity = seal.identity
        self.ahead_s: Optional[float] = None

    def seal(self, payload: bytes, reader_uid: int = 0) -> bytes:
        """As the seal's."""
        return self._seal.seal(payload, reader_uid)

    def open(self, sealed: bytes) -> Opened:
        """As the seal's."""
        opened = self._seal.open(sealed)
        if opened.sealed_at_s is not None:
            self.ahead_s = opened.sealed_at_s - time.time()
        return opened

    def close(self) -> None:
        """As the seal's."""
        self._seal.close()


class _HereAndNow(SealRoom):
    """Seals in the thread that asks, which is abandoned as a whole if it hangs."""

    async def run(self, call: Callable[[], _T], deadline: Deadline) -> _T:
        return call()


def ask(scene: Scene, at: IPAddress, from_address: Optional[IPAddress] = None) -> Heard:
    """Ask the agent at ``at`` about a connection that nobody has. Raises SealError."""
    seal = _NotedSeal(configured_seal(scene.settings))
    try:
        workers = Workers("doctor", threads=1, backlog=1)
        asker = Asker(_HereAndNow(seal, workers), scene.settings.callerid.port, _ASK_MS, Metrics(), hints=False)
        ours = from_address or _our_address(at, scene.settings.callerid.port)
        connection = Connection(Endpoint(at, _NOBODYS_PORT), Endpoint(ours, _SSHD_PORT))
        started_s = time.monotonic()
        told = asyncio.run(asker.ask(connection, None, Deadline.after_ms(_ASK_MS)))
        took_ms = (time.monotonic() - started_s) * 1000
    finally:
        seal.close()
    precision_s = (1.0 if seal.scheme == "munge" else 0.0) + took_ms / 1000
    return Heard(told.reason, told.detail, took_ms, seal.ahead_s, precision_s)


def look_at_own_answer(scene: Scene) -> Iterator[Finding]:
    """Ask this node's agent as another node would, over the network and under the seal."""
    section = scene.settings.callerid
    if not section.enabled:
        return
    if not scene.root:
        yield warning("answer", "only root can ask as an agent does", "sudo adoptd doctor")
        return
    here = own_address(section.listen)
    try:
        heard = ask(scene, here, here)
    except SealError:
        return  # said by the look at the seal
    if heard.reason in _ANSWERS:
        yield ok(
            "answer", f"this node's agent answers questions on {here} port {section.port} ({heard.took_ms:.1f} ms)"
        )
    else:
        seen = f"this node's agent does not answer on {here} port {section.port}: {heard.detail or heard.reason}"
        yield failure(
            "answer", seen, "put right what is said of the agent, its port and the seal; journalctl -u adoptd"
        )


def own_address(listen: Tuple[str, ...]) -> IPAddress:
    """An address of ours at which the agent can be asked from here."""
    first = ipaddress.ip_address(listen[0])
    if first.is_unspecified:
        return ipaddress.ip_address("127.0.0.1" if first.version == 4 else "::1")
    return first


# What an agent says of a connection that nobody has: that it was asked, and looked.
_ANSWERS = frozenset(reason.value for reason in Reason)


def look_at_peer(name: str) -> Callable[[Scene], Iterator[Finding]]:
    """The check of one named node."""

    def look(scene: Scene) -> Iterator[Finding]:
        section = scene.settings.callerid
        if not scene.root:
            yield warning("peer", f"{name}: only root can ask as an agent does", "sudo adoptd doctor")
            return
        try:
            addresses = within(_RESOLVE_S, lambda: _resolve(name))
        except TookTooLong:
            seen = f"{name}: no name service answers within {_RESOLVE_S:g} s"
            yield failure(
                "peer", seen, f"getent hosts {name}; look at /etc/resolv.conf and hosts: in /etc/nsswitch.conf"
            )
            return
        except OSError as error:
            seen = f"{name} is no host here: {error.strerror}"
            yield failure("peer", seen, f"getent hosts {name}; add it to /etc/hosts or the name service")
            return
        for address in addresses[:2]:
            if address.is_loopback:
                seen = f"{name} is {address} here: logins from it would be asked about at this node itself"
                yield warning("peer", seen, f"give {name} its own address in /etc/hosts")
                continue
            try:
                heard = within(_SEAL_S + _ASK_MS / 1000, lambda: ask(scene, address))  # noqa: B023 (waited for here)
            except SealError as error:
                yield failure(
                    "peer", f"{name}: not asked, for want of a seal here: {error}", "see what is said of the seal"
                )
                return
            except TookTooLong:
                yield failure("peer", f"{name}: not asked: sealing here hangs", "systemctl restart munge")
                return
            except OSError as error:
                yield failure("peer", f"{name} ({address}): {error.strerror}", f"ip route get {address}")
                continue
            silent = heard.reason in (AskFault.TIMEOUT.value, AskFault.CLOSED.value)
            connects = _connects(address, section.port) if silent else None
            yield from judge_peer(f"{name} ({address})", section.port, heard, connects, scene)

    return look


def judge_peer(where: str, port: int, heard: Heard, connects: Optional[str], scene: Scene) -> Iterator[Finding]:
    """``connects``: what a bare connect() to the port came to, where there was no answer."""
    at = f"{where} port {port}"
    ttl_s, timeout_ms = scene.settings.seal.ttl_s, scene.settings.callerid.timeout_ms
    fault = _PEER_FAULTS.get(heard.reason)
    if heard.reason in _ANSWERS:
        slow = heard.took_ms > timeout_ms
        seen = f"{at} answered in {heard.took_ms:.1f} ms under our seal; shown from here to there only"
        if slow:
            more = f", and logins wait {timeout_ms} ms at most"
            yield warning("peer", seen + more, "raise [callerid] timeout_ms, or look at the load and munged there")
        else:
            yield ok("peer", seen)
        yield from _judge_peer_clock(where, heard, ttl_s)
    elif heard.reason == AskFault.TIMEOUT.value:
        yield _judge_silence(at, connects)
    elif fault is not None:
        seen, remedy = (text.format(ttl=ttl_s, port=port) for text in fault)
        yield failure("peer", f"{at}: {seen} ({heard.detail})", remedy)
    else:
        yield failure("peer", f"{at}: {heard.detail or heard.reason}", "adoptd doctor there says more")


def _judge_silence(at: str, connects: Optional[str]) -> Finding:
    if connects == "connected":
        seen = f"{at} takes connections, and gave no answer in {_ASK_MS} ms: the agent there hangs, or its munged does"
        return failure("peer", seen, "adoptd doctor there; systemctl restart munge adoptd")
    seen = f"{at}: packets vanish ({connects or 'no answer'}): a firewall drops them instead of rejecting"
    remedy = "let TCP 6830 through between nodes, or reject it: nft add rule inet filter input tcp dport 6830 accept"
    return failure("peer", seen, remedy)


def _judge_peer_clock(where: str, heard: Heard, ttl_s: int) -> Iterator[Finding]:
    if heard.ahead_s is None:
        return
    off_s = abs(heard.ahead_s)
    side = "ahead" if heard.ahead_s > 0 else "behind"
    if off_s - heard.precision_s > ttl_s * _CLOCK_SHARE:
        seen = f"{where}: its clock is {off_s:.1f} s {side} of ours; at {ttl_s} s nodes do not believe each other"
        yield warning("peer", seen, "run chrony or systemd-timesyncd on both")
    else:
        yield ok("peer", f"{where}: clocks agree to within {off_s + heard.precision_s:.1f} s")


_SAME_KEY = "the same key and [seal] scheme on both nodes (munge -n | ssh NODE unmunge; sha256sum adoptd.key)"
# What was seen, and what to do.
_PEER_FAULTS: Dict[str, Tuple[str, str]] = {
    AskFault.REFUSED.value: (
        "connection refused: no agent listens there, or a firewall rejects the port",
        "systemctl status adoptd there; open TCP {port} between nodes",
    ),
    AskFault.UNREACHABLE.value: ("not reachable", "look at routes and at whether the node is up"),
    AskFault.CLOSED.value: (
        "it closed without an answer: our seal is not opened there (other key, scheme, or clocks {ttl} s apart)",
        _SAME_KEY + "; compare date on both; journalctl -u adoptd there says why",
    ),
    AskFault.MALFORMED.value: (
        "what answers there is no agent of this protocol",
        "ss -ltnp sport = :{port} there; the same release on both nodes",
    ),
    AskFault.BAD_SEAL.value: ("its answer is sealed otherwise than ours", _SAME_KEY),
    AskFault.FOREIGN.value: (
        "a user's program answers there in the agent's place",
        "ss -ltnp sport = :{port} there; enable adoptd-callerid.socket, which keeps the port",
    ),
    AskFault.WRONG_HOST.value: (
        "the answer is another host's",
        "an address that is two nodes', or translated on the way",
    ),
    AskFault.SEAL_UNAVAILABLE.value: ("sealing fails here", "see what is said of the seal"),
}


def _resolve(name: str) -> List[IPAddress]:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(each[4][0]).partition("%")[0]) for each in found]
    return list(dict.fromkeys(addresses))


def _our_address(remote: IPAddress, port: int) -> IPAddress:
    """The address of ours that a connection to ``remote`` would have. Raises OSError where there is no way there."""
    family = socket.AF_INET6 if remote.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((str(remote), port))
        return ipaddress.ip_address(str(sock.getsockname()[0]).partition("%")[0])


def _connects(address: IPAddress, port: int) -> str:
    started_s = time.monotonic()
    try:
        socket.create_connection((str(address), port), timeout=_CONNECT_S).close()
    except OSError as error:
        return f"{error.strerror or 'no reply to connect()'} after {time.monotonic() - started_s:.1f} s"
    return "connected"


def look_at_exporter(scene: Scene) -> Iterator[Finding]:
    """Fetch the metrics as Prometheus would."""
    section = scene.settings.metrics
    if not section.enabled:
        if section.textfile:
            yield from judge_textfile(section.textfile, _age_s(section.textfile))
        else:
            yield warning(
                "metrics", "not exported: [metrics] enabled is false and textfile is empty", "set one of the two"
            )
        return
    if section.tls_client_ca:
        yield ok("metrics", "not fetched: that takes a client certificate, which is Prometheus's")
        return
    for path in filter(None, (section.tls_certificate, section.tls_key)):
        if not os.path.isfile(path):
            yield failure(
                "metrics", f"{path} is missing: the next start exports nothing", "put it there, or take TLS out"
            )
    where = f"{own_address((section.listen,))} port {section.port}"
    try:
        status, body = _fetch(section)
    except (OSError, http.client.HTTPException) as error:
        yield warning(
            "metrics", f"{where}: {error}", "systemctl restart adoptd; look at [metrics] and who has the port"
        )
        return
    if status == 200 and b"\nadoptd_" in body:
        yield ok("metrics", f"{where}: {body.count(bytes([10]))} lines")
    else:
        seen = f"{where} answers with status {status}, and not with the agent's metrics"
        yield warning("metrics", seen, f"somebody else has the port: ss -ltnp sport = :{section.port}")


def judge_textfile(path: str, age_s: Optional[float]) -> Iterator[Finding]:
    """It is written every few seconds."""
    if age_s is None:
        yield warning("metrics", f"{path} is missing", "make its directory, writable by the agent (ReadWritePaths=)")
    elif age_s > 300:
        yield warning("metrics", f"{path} is {age_s:.0f} s old", "systemctl restart adoptd; is the directory writable?")
    else:
        yield ok("metrics", f"{path} is {age_s:.0f} s old")


def _age_s(path: str) -> Optional[float]:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return time.time() - found.st_mtime if stat.S_ISREG(found.st_mode) else None


def _fetch(section: MetricsConfig) -> Tuple[int, bytes]:
    host = str(own_address((section.listen,)))
    if section.tls_certificate:
        # Of interest is whether it answers; whose certificate it is Prometheus checks.
        context = ssl._create_unverified_context()  # noqa: S323 (as said above)
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, section.port, timeout=_EXPORTER_S, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, section.port, timeout=_EXPORTER_S)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        return answer.status, b"\n" + answer.read(4 << 20)
    finally:
        connection.close()
