"""What every command of a user is given: who asks, as the kernel says, what the agent has, and words to refuse with.

Owns the types that the commands share and the reading of their arguments. Decides nothing. Used by the
modules of this package.
"""

from __future__ import annotations

import ipaddress
import pwd
import socket
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple

from adoptd.adoption import Adoptions
from adoptd.callerid import Asker, Inquiry, SealRoom
from adoptd.config import Config
from adoptd.control.rates import Rates
from adoptd.deadline import Deadline
from adoptd.environment import uids_of
from adoptd.events import Events
from adoptd.jobs import JobBackend
from adoptd.metrics import Metrics
from adoptd.model import AdoptdError, Connection, Endpoint
from adoptd.pam_lines import OPTIONS
from adoptd.policy import ALLOWED_ACTIONS, Action, Options
from adoptd.process import ProcessHandle
from adoptd.sessions import PendingLogins, Sessions
from adoptd.watch import Watch
from adoptd.workers import Workers

SSH_PORT = 22


class CommandRefused(AdoptdError):
    """The command is not carried out; the text is for the caller."""


@dataclass(frozen=True)
class Asking:
    """Who asks: the effective uid at connect(), and the very process that connected, None if it has ended.

    A socket that was handed on still speaks for the process that connected it, and for nobody else.
    """

    uid: int
    process: Optional[ProcessHandle] = None

    def caller(self) -> ProcessHandle:
        """The process, for what is about it and not about its uid. Raises CommandRefused.

        Its uids must all be the one that asked. Otherwise it is a program that runs with two users' rights, and
        whose wish this is cannot be told: a setuid program, or one that has changed sides since it connected.
        """
        if self.process is None or not self.process.alive():
            raise CommandRefused("the process that connected to the agent has ended")
        uids = uids_of(self.process)
        if uids is None:
            raise CommandRefused("the process that connected to the agent has ended")
        if uids != frozenset((self.uid,)):
            raise CommandRefused("the process that asks runs with the rights of more than one user")
        return self.process


@dataclass(frozen=True)
class Parts:
    """What the commands work with. ``rates``, ``sessions`` and ``events`` outlive a reload."""

    config: Config
    jobs: JobBackend
    seals: Optional[SealRoom]
    inquiry: Inquiry
    asker: Optional[Asker]
    adoptions: Adoptions
    pending: PendingLogins
    watch: Watch
    workers: Workers
    sessions: Sessions
    events: Events
    metrics: Metrics
    rates: Rates


async def uid_of_user(name: str, asking: Asking, workers: Workers, deadline: Deadline) -> int:
    """The uid of a user who the caller may ask about. Raises CommandRefused."""
    try:
        account = await workers.run(lambda: pwd.getpwnam(name), deadline)
    except KeyError:
        raise CommandRefused(f"there is no user {name!r} on this node") from None
    if asking.uid not in (0, account.pw_uid):
        raise CommandRefused(f"only root may ask about another user ({name!r})")
    return account.pw_uid


def parse_endpoint(text: str) -> Endpoint:
    """Raises CommandRefused."""
    try:
        return Endpoint.parse(text)
    except ValueError as error:
        raise CommandRefused(str(error)) from None


def parse_connection(source: str, destination: str) -> Connection:
    """Raises CommandRefused."""
    return connect(parse_endpoint(source), parse_endpoint(destination))


def connect(source: Endpoint, destination: Endpoint) -> Connection:
    """Raises CommandRefused if the ends are of different IP versions."""
    try:
        return Connection(source, destination)
    except ValueError as error:
        raise CommandRefused(str(error)) from None


def local_end(remote: Endpoint) -> Endpoint:
    """Where a connection from ``remote`` would most likely have reached this node's sshd. Raises CommandRefused."""
    family = socket.AF_INET6 if remote.address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((str(remote.address), remote.port))  # a datagram socket sends nothing by this
        except OSError as error:
            raise CommandRefused(f"no route to {remote.address}: {error.strerror}; say --to") from None
        return Endpoint(ipaddress.ip_address(str(sock.getsockname()[0]).partition("%")[0]), SSH_PORT)


@dataclass(frozen=True)
class PamWords:
    """What the options of a PAM line come to for a decision.

    ``root_passes``: root is let pass before anybody is asked (ignore_root=). ``nodename``: whose jobs count, "" for
    this node's.
    """

    options: Options
    root_passes: bool
    nodename: str


def parse_options(text: str) -> PamWords:
    """``name=value`` words, as on the PAM line. Those that do not change the decision are checked and passed over.

    Raises CommandRefused for what the module would refuse: then it asks nobody, and lets nobody in but root.
    """
    chosen: Dict[str, Action] = {}
    given = {"single_job_skip_rpc": "1", "ignore_root": "1", "nodename": ""}
    for word in text.split():
        name, _, value = word.partition("=")
        name = name.lower()
        if name not in OPTIONS:
            raise CommandRefused(f"{name} is no option of pam_adopt.so, expected one of {', '.join(OPTIONS)}")
        accepts, expected = OPTIONS[name]
        if not accepts(value):
            raise CommandRefused(f"{name} is {value!r}, expected {expected}")
        if name in ALLOWED_ACTIONS:
            chosen[name] = Action(value.lower())
        elif name in given:
            given[name] = value
    options = Options(single_job_skip_rpc=given["single_job_skip_rpc"] == "1", **chosen)
    return PamWords(options, given["ignore_root"] == "1", given["nodename"])


def shown_stages(stages: Sequence[Tuple[str, str, float]]) -> List[Dict[str, object]]:
    """Stages as a result has them; times in milliseconds."""
    return [{"stage": name, "found": found, "at_ms": round(at_ms, 2)} for name, found, at_ms in stages]
