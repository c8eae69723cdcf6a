"""``watch``: what happens on this node as it happens, as far as the caller may know it.

Owns who sees what: root everything, others the events that are about their own uid, without what is for the
administrator alone. Called by :class:`adoptd.control.Control`; the users' door sends what comes out.
"""

from __future__ import annotations

from typing import AsyncIterator, Callable, FrozenSet, Mapping, Optional

from adoptd.control.asking import Asking, CommandRefused, Parts, uid_of_user
from adoptd.deadline import Deadline
from adoptd.events import Event, EventKind, Subscription
from adoptd.wire.control import Result

# Fields that may name other users' processes: of witnesses that disagreed, for example.
_ROOTS_ONLY = frozenset({"detail", "by_uid", "peer", "mover_pid", "mover_uid", "mover_comm"})

# The last thing a watcher hears; a connection that ends without it was lost.
STOPPING = "the agent is stopping"


async def subscribe(parts: Parts, arguments: Mapping[str, str], asking: Asking, deadline: Deadline) -> Subscription:
    """What the caller wants to see and may. Raises CommandRefused, TooManyWatchers."""
    kinds = _kinds(arguments.get("kinds", ""))
    uid: Optional[int] = None
    if "user" in arguments:
        uid = await uid_of_user(arguments["user"], asking, parts.workers, deadline)
    elif asking.uid != 0:
        uid = asking.uid
    return parts.events.subscribe(_filter(kinds, uid), asking.uid)


async def results(subscription: Subscription, asking: Asking) -> AsyncIterator[Result]:
    """What is sent, one frame each: a first that says it has begun, events, how many were dropped, the end."""
    yield {"watching": True}
    async for event in subscription:
        dropped = subscription.take_dropped()
        if dropped:
            yield {"dropped": dropped}
        yield shown(event, asking.uid)
    yield {"end": STOPPING}


def shown(event: Event, reader_uid: int) -> Result:
    """An event as ``reader_uid`` sees it."""
    hidden: FrozenSet[str] = frozenset() if reader_uid == 0 else _ROOTS_ONLY
    fields = {name: value for name, value in event.fields.items() if name not in hidden and value is not None}
    return {"kind": event.kind.value, "at": round(event.at_s, 6), "uid": event.uid, **fields}


def _kinds(text: str) -> FrozenSet[EventKind]:
    if not text:
        return frozenset(EventKind)
    try:
        return frozenset(EventKind(word) for word in text.split(","))
    except ValueError:
        words = ", ".join(kind.value for kind in EventKind)
        raise CommandRefused(f"kinds are {text!r}, expected some of {words}") from None


def _filter(kinds: FrozenSet[EventKind], uid: Optional[int]) -> Callable[[Event], bool]:
    return lambda event: event.kind in kinds and (uid is None or event.uid == uid)
