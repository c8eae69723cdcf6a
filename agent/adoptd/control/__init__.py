"""The commands of ``adoptctl``, as the agent carries them out for whoever the kernel says is calling.

Owns the list of commands and what each may be given; who may see what is each command's own. Root sees
everything, others what concerns themselves. Only ``join`` changes anything. Called by the users' door.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from typing import AsyncGenerator, Awaitable, Callable, Dict, Iterable, List, Mapping, Tuple

from adoptd import __version__, config
from adoptd.callerid import reason_for, reason_told
from adoptd.control.asking import Asking, CommandRefused, Parts, parse_connection
from adoptd.control.explaining import explain, list_sessions
from adoptd.control.joining import join
from adoptd.control.rates import Rates
from adoptd.control.watching import results, subscribe
from adoptd.control.whereami import in_words, whereami
from adoptd.deadline import Deadline
from adoptd.model import IPAddress, JobManagerError
from adoptd.wire.control import Command, Result

__all__ = ["ABOUT_THE_CALLER", "COMMAND_MS", "WATCH", "Asking", "CommandRefused", "Control", "Parts", "Rates"]

# A person is waiting, not a login; long enough for a walk of /proc on a busy node.
COMMAND_MS = 5000.0

# Commands about the very process that asks, which has to be held for them.
ABOUT_THE_CALLER = frozenset({"whereami", "join"})

# The one command whose results do not end by themselves.
WATCH = "watch"

# A screenful; how many there are is a metric.
_UNHEARD_SHOWN = 20
_RELEASES_SHOWN = 10
_NODES_NAMED = 5

# The agent imports this as it starts; a reload makes a new Control, and is no new start.
_STARTED_S = time.monotonic()


class Control:
    """Carries out commands."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def execute(self, command: Command, asking: Asking) -> Result:
        """The result of ``command``. Raises CommandRefused, or AdoptdError if it failed."""
        try:
            carry_out, required, optional = _COMMANDS[command.name]
        except KeyError:
            known = ", ".join(sorted([*_COMMANDS, WATCH]))
            raise CommandRefused(f"unknown command {command.name!r}, this agent knows {known}") from None
        _check(command, required, optional)
        return await carry_out(self._parts, command.arguments, asking, Deadline.after_ms(COMMAND_MS))

    async def watch(self, command: Command, asking: Asking) -> AsyncGenerator[Result, None]:
        """The results of a ``watch`` until the agent stops. Raises CommandRefused, or AdoptdError, before the first."""
        _check(command, frozenset(), frozenset({"kinds", "user"}))
        subscription = await subscribe(self._parts, command.arguments, asking, Deadline.after_ms(COMMAND_MS))
        try:
            async for result in results(subscription, asking):
                yield result
        finally:
            subscription.close()


async def _status(parts: Parts, arguments: Mapping[str, str], asking: Asking, deadline: Deadline) -> Result:
    status = parts.watch.status
    return {
        "version": __version__,
        "node": parts.config.agent.shown_name(),
        "uptime_s": round(time.monotonic() - _STARTED_S, 1),
        "jobs_backend": parts.jobs.name,
        "seal": None if parts.seals is None else parts.seals.scheme,
        "witnesses": {witness.value: reason or "ok" for witness, reason in status.witnesses.items()},
        "probe": {
            "attached": status.probe_attached,
            "reason": status.probe_reason,
            "self_test": status.self_test,
            "self_test_age_s": None
            if status.self_test_at is None
            else round(time.monotonic() - status.self_test_at, 1),
            "events": dict(parts.watch.probe_counters()),
        },
        "logins_between_phases": len(parts.pending),
        "sessions": len(parts.sessions),
        "sessions_watched_by": parts.sessions.watched_by,
        # Other hosts are root's business.
        **(_peers(parts) if asking.uid == 0 else {}),
    }


def _peers(parts: Parts) -> Result:
    """Source nodes asked within the hour, the latest first: those that did not answer with the reason and how long ago,
    the others by the release of their agents."""
    peers = () if parts.asker is None else parts.asker.peers.now()
    silent = [peer for peer in peers if peer.reason]
    releases: Dict[str, List[str]] = {}
    for peer in peers:
        if peer.release:
            releases.setdefault(peer.release, []).append(str(peer.address))
    return {
        "unheard": {str(peer.address): f"{peer.reason}, {peer.ago_s:.0f} s ago" for peer in silent[:_UNHEARD_SHOWN]},
        "releases": {
            release: {"nodes": len(nodes), "latest": ", ".join(nodes[:_NODES_NAMED])}
            for release, nodes in sorted(releases.items())[:_RELEASES_SHOWN]
        },
    }


async def _configuration(parts: Parts, arguments: Mapping[str, str], asking: Asking, deadline: Deadline) -> Result:
    """What the agent goes by, for who compares it with the files."""
    if asking.uid != 0:
        raise CommandRefused("only root may see the configuration in force")
    return {"config": config.show(parts.config), "pid": os.getpid()}


async def _list_jobs(parts: Parts, arguments: Mapping[str, str], asking: Asking, deadline: Deadline) -> Result:
    try:
        if asking.uid == 0:
            jobs = await parts.workers.run(lambda: parts.jobs.all_jobs(deadline), deadline)
        else:
            jobs = await parts.workers.run(lambda: parts.jobs.jobs_of(asking.uid, deadline), deadline)
    except JobManagerError as error:
        raise in_words(error) from None
    return {"jobs": [{"job": job.id, "uid": job.uid} for job in jobs]}


async def _whois(parts: Parts, arguments: Mapping[str, str], asking: Asking, deadline: Deadline) -> Result:
    connection = parse_connection(arguments["source"], arguments["destination"])
    # Root may ask about anybody's connection, others about their own only: Slurm's rule as well.
    login_uid = None if asking.uid == 0 else asking.uid
    if "at" in arguments:
        if parts.asker is None:
            raise CommandRefused("callerid is switched off in this node's configuration")
        at = await _resolve(parts, arguments["at"], connection.version, asking, deadline)
        told = await parts.asker.ask(connection, login_uid, deadline, at)
        return {
            "connection": str(connection),
            "at": str(at),
            "outcome": told.outcome.value,
            "reason": reason_told(asking.uid, told.reason),
            "job": told.job_id,
            "witness": None if told.witness is None else told.witness.value,
            "moved": told.moved,
            "hint": told.hint,
            "release": told.release or None,
            "detail": told.detail,
        }
    settled = await parts.inquiry.settle(connection, login_uid, deadline)
    owner = settled.owner if login_uid is None or (settled.owner and settled.owner.uid == login_uid) else None
    return {
        "connection": str(connection),
        "at": "this node",
        "outcome": settled.outcome.value,
        "reason": reason_for(asking.uid, settled.reason).value,
        "job": None if settled.job is None else settled.job.id,
        "witness": None if owner is None else owner.witness.value,
        "moved": settled.moved,
        "hint": settled.hint,
        "detail": settled.detail if login_uid is None else "",
        "uid": None if owner is None else owner.uid,
        "pid": None if owner is None else owner.pid,
        "comm": None if owner is None else owner.comm,
    }


async def _resolve(parts: Parts, host: str, version: int, asking: Asking, deadline: Deadline) -> IPAddress:
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    if asking.uid != 0:
        # A name server of the caller's choice may take half a minute to say nothing, in one of the few threads that
        # everybody's commands share. adoptctl looks names up by itself.
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            raise CommandRefused(f"{host!r} is no IP address; only root may give a name here") from None
        if address.version != version:
            raise CommandRefused(f"{host!r} has no IPv{version} address")
        return address
    try:
        found = await parts.workers.run(
            lambda: socket.getaddrinfo(host, None, family=family, type=socket.SOCK_STREAM), deadline
        )
    except (OSError, UnicodeError) as error:
        # UnicodeError: what cannot be a host name at all, such as a label of 64 characters.
        raise CommandRefused(f"{host!r} has no IPv{version} address ({error})") from None
    return ipaddress.ip_address(str(found[0][4][0]).partition("%")[0])


_Carry = Callable[[Parts, Mapping[str, str], Asking, Deadline], Awaitable[Result]]

# name: (what carries it out, arguments it needs, arguments it may have)
_COMMANDS: Dict[str, Tuple[_Carry, frozenset[str], frozenset[str]]] = {
    "status": (_status, frozenset(), frozenset()),
    "configuration": (_configuration, frozenset(), frozenset()),
    "jobs": (_list_jobs, frozenset(), frozenset()),
    "sessions": (list_sessions, frozenset(), frozenset()),
    "whois": (_whois, frozenset({"source", "destination"}), frozenset({"at"})),
    "explain": (explain, frozenset(), frozenset({"user", "session", "from", "to", "options"})),
    "whereami": (whereami, frozenset(), frozenset()),
    "join": (join, frozenset({"job"}), frozenset({"session"})),
}


def _check(command: Command, required: frozenset[str], optional: frozenset[str]) -> None:
    given = command.arguments.keys()
    if not required <= given or not given <= required | optional:
        raise CommandRefused(
            f"{command.name} takes {_names(required)} and may take {_names(optional)}, got {_names(given)}"
        )


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
