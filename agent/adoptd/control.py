"""The commands of ``adoptctl``, as the agent carries them out for whoever the kernel says is calling.

Owns who may see what: root everything, others what concerns themselves. Changes nothing. The table at
the end is the list of commands. Called by the users' door.
"""

from __future__ import annotations

import ipaddress
import pwd
import socket
import time
from typing import Awaitable, Callable, Dict, Iterable, List, Mapping, Optional, Tuple

from adoptd import __version__
from adoptd.adoption import Adoptions, Decision, Login
from adoptd.callerid import Asker, Inquiry, SealRoom
from adoptd.config import Config
from adoptd.deadline import Deadline
from adoptd.jobs import JobBackend
from adoptd.model import AdoptdError, Connection, Endpoint, IPAddress, Job
from adoptd.policy import ALLOWED_ACTIONS, Action, Options
from adoptd.sessions import PendingLogins
from adoptd.watch import Watch
from adoptd.wire.control import Command, Result
from adoptd.workers import Workers

# A person is waiting, not a login; long enough for a walk of /proc on a busy node.
COMMAND_MS = 5000.0

SSH_PORT = 22

# The agent imports this as it starts; a reload makes a new Control, and is no new start.
_STARTED_S = time.monotonic()


class CommandRefused(AdoptdError):
    """The command is not carried out; the text is for the caller."""


class Control:
    """Carries out commands."""

    def __init__(
        self,
        config: Config,
        jobs: JobBackend,
        seals: Optional[SealRoom],
        inquiry: Inquiry,
        asker: Optional[Asker],
        adoptions: Adoptions,
        pending: PendingLogins,
        watch: Watch,
        workers: Workers,
    ) -> None:
        self._config = config
        self._jobs = jobs
        self._seals = seals
        self._inquiry = inquiry
        self._asker = asker
        self._adoptions = adoptions
        self._pending = pending
        self._watch = watch
        self._workers = workers

    async def execute(self, command: Command, caller_uid: int) -> Result:
        """The result of ``command``. Raises CommandRefused, or AdoptdError if it failed."""
        try:
            carry_out, required, optional = _COMMANDS[command.name]
        except KeyError:
            raise CommandRefused(
                f"unknown command {command.name!r}, this agent knows {', '.join(sorted(_COMMANDS))}"
            ) from None
        given = command.arguments.keys()
        if not required <= given or not given <= required | optional:
            raise CommandRefused(
                f"{command.name} takes {_names(required)} and may take {_names(optional)}, got {_names(given)}"
            )
        return await carry_out(self, command.arguments, caller_uid, Deadline.after_ms(COMMAND_MS))

    async def _status(self, arguments: Mapping[str, str], caller_uid: int, deadline: Deadline) -> Result:
        status = self._watch.status
        return {
            "version": __version__,
            "node": self._config.agent.shown_name(),
            "uptime_s": round(time.monotonic() - _STARTED_S, 1),
            "jobs_backend": self._jobs.name,
            "seal": None if self._seals is None else self._seals.scheme,
            "witnesses": {witness.value: reason or "ok" for witness, reason in status.witnesses.items()},
            "probe": {
                "attached": status.probe_attached,
                "reason": status.probe_reason,
                "self_test": status.self_test,
                "self_test_age_s": None
                if status.self_test_at is None
                else round(time.monotonic() - status.self_test_at, 1),
                "events": dict(self._watch.probe_counters()),
            },
            "logins_between_phases": len(self._pending),
        }

    async def _list_jobs(self, arguments: Mapping[str, str], caller_uid: int, deadline: Deadline) -> Result:
        jobs: Tuple[Job, ...]
        if caller_uid == 0:
            jobs = await self._workers.run(lambda: self._jobs.all_jobs(deadline), deadline)
        else:
            jobs = await self._workers.run(lambda: self._jobs.jobs_of(caller_uid, deadline), deadline)
        return {"jobs": [{"job": job.id, "uid": job.uid} for job in jobs]}

    async def _whois(self, arguments: Mapping[str, str], caller_uid: int, deadline: Deadline) -> Result:
        connection = _connection(arguments["source"], arguments["destination"])
        # Root may ask about anybody's connection, others about their own only: Slurm's rule as well.
        login_uid = None if caller_uid == 0 else caller_uid
        if "at" in arguments:
            if self._asker is None:
                raise CommandRefused("callerid is switched off in this node's configuration")
            at = await self._resolve(arguments["at"], connection.version, deadline)
            told = await self._asker.ask(connection, login_uid, deadline, at)
            return {
                "connection": str(connection),
                "at": str(at),
                "outcome": told.outcome.value,
                "reason": told.reason,
                "job": told.job_id,
                "witness": None if told.witness is None else told.witness.value,
                "moved": told.moved,
                "hint": told.hint,
                "detail": told.detail,
            }
        settled = await self._inquiry.settle(connection, login_uid, deadline)
        owner = settled.owner if login_uid is None or (settled.owner and settled.owner.uid == login_uid) else None
        return {
            "connection": str(connection),
            "at": "this node",
            "outcome": settled.outcome.value,
            "reason": settled.reason.value,
            "job": None if settled.job is None else settled.job.id,
            "witness": None if owner is None else owner.witness.value,
            "moved": settled.moved,
            "hint": settled.hint,
            "detail": settled.detail if login_uid is None else "",
            "uid": None if owner is None else owner.uid,
            "pid": None if owner is None else owner.pid,
            "comm": None if owner is None else owner.comm,
        }

    async def _explain(self, arguments: Mapping[str, str], caller_uid: int, deadline: Deadline) -> Result:
        name = arguments["user"]
        try:
            account = await self._workers.run(lambda: pwd.getpwnam(name), deadline)
        except KeyError:
            raise CommandRefused(f"there is no user {name!r} on this node") from None
        if caller_uid not in (0, account.pw_uid):
            raise CommandRefused(f"only root may ask about another user ({name!r})")
        connection = None
        if "from" in arguments:
            remote = _endpoint(arguments["from"])
            local = _endpoint(arguments["to"]) if "to" in arguments else _local_end(remote)
            connection = _same_version(remote, local)
        login = Login(account.pw_uid, name, connection, _options(arguments.get("options", "")))
        if account.pw_uid == 0:
            return {"user": name, "verdict": "ignore", "reason": "root", "job": None, "witness": None, "stages": []}
        return _explained(name, await self._adoptions.explain(login, deadline))

    async def _resolve(self, host: str, version: int, deadline: Deadline) -> IPAddress:
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        try:
            found = await self._workers.run(
                lambda: socket.getaddrinfo(host, None, family=family, type=socket.SOCK_STREAM), deadline
            )
        except (OSError, UnicodeError) as error:
            # UnicodeError: what cannot be a host name at all, such as a label of 64 characters.
            raise CommandRefused(f"{host!r} has no IPv{version} address ({error})") from None
        return ipaddress.ip_address(str(found[0][4][0]).partition("%")[0])


_Carry = Callable[[Control, Mapping[str, str], int, Deadline], Awaitable[Result]]

# name: (what carries it out, arguments it needs, arguments it may have)
_COMMANDS: Dict[str, Tuple[_Carry, frozenset[str], frozenset[str]]] = {
    "status": (Control._status, frozenset(), frozenset()),
    "jobs": (Control._list_jobs, frozenset(), frozenset()),
    "whois": (Control._whois, frozenset({"source", "destination"}), frozenset({"at"})),
    "explain": (Control._explain, frozenset({"user"}), frozenset({"from", "to", "options"})),
}


def _explained(user: str, decision: Decision) -> Result:
    stages: List[Dict[str, object]] = [
        {"stage": stage.name, "found": stage.found, "at_ms": round(stage.at_ms, 2)} for stage in decision.stages
    ]
    return {
        "user": user,
        "verdict": decision.step.value,
        "outcome": decision.outcome,
        "reason": decision.reason,
        "job": None if decision.job is None else decision.job.id,
        "witness": None if decision.witness is None else decision.witness.value,
        "message": decision.message,
        "stages": stages,
    }


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _endpoint(text: str) -> Endpoint:
    try:
        return Endpoint.parse(text)
    except ValueError as error:
        raise CommandRefused(str(error)) from None


def _connection(source: str, destination: str) -> Connection:
    return _same_version(_endpoint(source), _endpoint(destination))


def _same_version(source: Endpoint, destination: Endpoint) -> Connection:
    try:
        return Connection(source, destination)
    except ValueError as error:
        raise CommandRefused(str(error)) from None


def _local_end(remote: Endpoint) -> Endpoint:
    """Where a connection from ``remote`` would most likely have reached this node's sshd."""
    family = socket.AF_INET6 if remote.address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((str(remote.address), remote.port))  # a datagram socket sends nothing by this
        except OSError as error:
            raise CommandRefused(f"no route to {remote.address}: {error.strerror}; say --to") from None
        return Endpoint(ipaddress.ip_address(str(sock.getsockname()[0]).partition("%")[0]), SSH_PORT)


def _options(text: str) -> Options:
    """``name=value`` words, as on the PAM line; those that do not change the decision are passed over."""
    chosen: Dict[str, Action] = {}
    skip_rpc = True
    for word in text.split():
        name, _, value = word.partition("=")
        if name in ALLOWED_ACTIONS:
            try:
                chosen[name] = Action(value.lower())
            except ValueError:
                raise CommandRefused(f"{name} is {value!r}, expected one of {_words(name)}") from None
        elif name == "single_job_skip_rpc":
            if value not in ("0", "1"):
                raise CommandRefused(f"{name} is {value!r}, expected 0 or 1")
            skip_rpc = value == "1"
    try:
        return Options(single_job_skip_rpc=skip_rpc, **chosen)
    except ValueError as error:
        raise CommandRefused(str(error)) from None


def _words(option: str) -> str:
    return ", ".join(sorted(action.value for action in ALLOWED_ACTIONS[option]))
