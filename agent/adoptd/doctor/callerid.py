"""The doctor's look at callerid: our own agent's answers, a named peer's, and what the agent has heard from others.

Owns the question that is asked for the sake of its answer, about a connection that nobody has, and what is concluded
from it, which is no more than was shown. Called through the table of checks.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import time
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Tuple, TypeVar

from adoptd import __version__
from adoptd.callerid import Asker, AskFault, SealRoom
from adoptd.deadline import Deadline
from adoptd.doctor.findings import Finding, Scene, TookTooLong, failure, ok, warning, within
from adoptd.doctor.ports import own_address
from adoptd.metrics import Metrics
from adoptd.model import Connection, Endpoint, IPAddress
from adoptd.seal import Opened, Seal, SealError
from adoptd.slurm_site import configured_seal
from adoptd.wire.callerid import Reason
from adoptd.wire.control import Result
from adoptd.workers import Workers

_T = TypeVar("_T")

# What a peer is given, longer than a login would wait, so that a slow one is told from one that is silent.
_ASK_MS = 2_000
_RESOLVE_S = 1.5
_CONNECT_S = 1.0
_SEAL_S = 3.0
# A clock that is that far off is worth a word before the seal refuses it.
_CLOCK_SHARE = 0.3
# No socket has it: the question is about nobody's connection.
_NOBODYS_PORT = 1
_SSHD_PORT = 22
_ONE_HOST = "--peer takes the name or the address of one host, without a user or a port; once more for another"
_HOST = re.compile(r"[\w.-]+|[0-9a-fA-F:.]+(%\w+)?")


@dataclass(frozen=True)
class Heard:
    """What came of a question: ``reason`` is a value of Reason or AskFault.

    ``ahead_s`` is the answerer's clock less ours, to within ``precision_s``. ``release`` is the answering agent's.
    """

    reason: str
    detail: str
    took_ms: float
    ahead_s: Optional[float] = None
    precision_s: float = 0.0
    release: str = ""


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
    return Heard(told.reason, told.detail, took_ms, seal.ahead_s, precision_s, told.release)


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
        remedy = "put right what is said of the agent, its port and the seal; journalctl -u adoptd"
        yield failure("answer", seen, remedy, cause="agent")


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
        except (OSError, UnicodeError) as error:
            # UnicodeError: a part of the name that is empty, or too long for a name.
            seen = f"{name} is no host here: {getattr(error, 'strerror', None) or error}"
            remedy = f"getent hosts {name}; add it to /etc/hosts or the name service"
            yield failure("peer", seen, remedy if _HOST.fullmatch(name) else _ONE_HOST)
            return
        for address in addresses[:2]:
            if _leads_here(address, section.port):
                seen = f"{name} is {address} here: logins from it would be asked about at this node itself"
                yield warning("peer", seen, f"give {name} its own address in /etc/hosts, or name another node")
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


def judge_peers_asked(status: Result) -> Iterator[Finding]:
    """What the agent, asked by root, says of the nodes that it has asked within the hour: see control's ``status``."""
    releases, unheard = status.get("releases"), status.get("unheard")
    if not isinstance(releases, dict) or not isinstance(unheard, dict):
        return  # an older agent, of which its version is said
    asked = {str(release): nodes for release, nodes in releases.items() if isinstance(nodes, dict)}
    others = [
        f"{release} on {nodes.get('nodes')} ({_shortened(nodes)})"
        for release, nodes in asked.items()
        if release != __version__
    ]
    if others:
        seen = f"nodes that answered within the hour run another version than {__version__}: {', '.join(others)}"
        yield warning("peers", seen, _ONE_RELEASE)
    elif asked:
        count = asked[__version__].get("nodes")
        yield ok("peers", f"version {__version__} on all nodes asked within the hour ({count})")
    elif not unheard:
        yield ok("peers", "no other node was asked within the hour; --peer NODE asks one")
    # Who refuses has no agent: a login node, as a rule.
    silent = {node: why for node, why in unheard.items() if not str(why).startswith(AskFault.REFUSED.value)}
    if silent:
        node, why = next(iter(silent.items()))
        seen = f"{len(silent)} of the nodes asked within the hour did not answer, at last {node}: {why}"
        yield warning("peers", seen, f"adoptd doctor --peer {node}")


def _shortened(nodes: Mapping[str, object]) -> str:
    count, latest = nodes.get("nodes"), str(nodes.get("latest"))
    return f"{latest}, ..." if count != latest.count(",") + 1 else latest


def judge_peer(where: str, port: int, heard: Heard, connects: Optional[str], scene: Scene) -> Iterator[Finding]:
    """``connects``: what a bare connect() to the port came to, where there was no answer."""
    at = f"{where} port {port}"
    ttl_s, timeout_ms = scene.settings.seal.ttl_s, scene.settings.callerid.timeout_ms
    fault = _PEER_FAULTS.get(heard.reason)
    if heard.reason in _ANSWERS:
        slow = heard.took_ms > timeout_ms
        seen = f"{at} answered in {heard.took_ms:.1f} ms under our seal, version {heard.release}"
        seen += "; shown from here to there only"
        if slow:
            more = f", and logins wait {timeout_ms} ms at most"
            yield warning("peer", seen + more, "raise [callerid] timeout_ms, or look at the load and munged there")
        else:
            yield ok("peer", seen)
        if heard.release != __version__:
            yield warning("peer", f"{where}: version {heard.release}, here it is {__version__}", _ONE_RELEASE)
        yield from _judge_peer_clock(where, heard, ttl_s)
    elif heard.reason == AskFault.TIMEOUT.value:
        yield _judge_silence(at, port, connects)
    elif fault is not None:
        seen, remedy = (text.format(ttl=ttl_s, port=port) for text in fault)
        yield failure("peer", f"{at}: {seen} ({heard.detail})", remedy)
    else:
        yield failure("peer", f"{at}: {heard.detail or heard.reason}", "adoptd doctor there says more")


def _judge_silence(at: str, port: int, connects: Optional[str]) -> Finding:
    if connects == "connected":
        seen = f"{at} takes connections, and gave no answer in {_ASK_MS} ms: the agent there hangs, or its munged does"
        return failure("peer", seen, "adoptd doctor there; systemctl restart munge adoptd")
    seen = f"{at}: packets vanish ({connects or 'no answer'}): the host is down, or a firewall drops them"
    rule = f"nft add rule inet filter input tcp dport {port} accept"
    remedy = f"if ping reaches it: let TCP {port} through between nodes, or reject it: {rule}"
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


_ONE_RELEASE = "install one version of adoptd on all nodes"
_SAME_KEY = "the same key and [seal] scheme on both nodes (munge -n | ssh NODE unmunge; sha256sum adoptd.key)"
# What was seen, and what to do.
_PEER_FAULTS: Dict[str, Tuple[str, str]] = {
    AskFault.REFUSED.value: (
        "connection refused: no agent listens there, or a firewall rejects the port",
        "systemctl status adoptd there; open TCP {port} between nodes",
    ),
    AskFault.UNREACHABLE.value: ("not reachable", "look at routes and at whether the node is up"),
    AskFault.CLOSED.value: (
        "it closed without an answer: our seal is not opened there (other key, scheme, version; clocks {ttl} s apart)",
        _SAME_KEY + "; compare date and adoptd --version on both; journalctl -u adoptd there says why",
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


def _leads_here(address: IPAddress, port: int) -> bool:
    """Whether it is an address of this node. What there is no way to at all is not."""
    try:
        ours = _our_address(address, port)
    except OSError:
        return False
    return ours == address or ours.is_loopback


def _connects(address: IPAddress, port: int) -> str:
    started_s = time.monotonic()
    try:
        socket.create_connection((str(address), port), timeout=_CONNECT_S).close()
    except OSError as error:
        return f"{error.strerror or 'no reply to connect()'} after {time.monotonic() - started_s:.1f} s"
    return "connected"
