"""What the agent does, as it happens, for those who watch: adoptions, denials, answers, escapes, joins.

Owns the closed set of kinds and the bounds: how many may watch, and how far behind one may fall. Must never
hold up or fail whoever publishes, and decides nothing about who may see what: a subscription brings its own
filter. Published to by the handlers and the watch over sessions, subscribed to by ``adoptctl watch``. For
one event loop.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Callable, Deque, List, Mapping, Optional

from adoptd.log import Field
from adoptd.model import AdoptdError

# How many may watch at once, and how many of one uid. Some places are root's alone, so that no number of users can
# keep the administrator from watching.
WATCHERS_MAX = 32
WATCHERS_KEPT_FOR_ROOT = 8
WATCHERS_MAX_PER_UID = 2

# Events that wait for one watcher: 200 logins at once and what belongs to them, about 1 KiB each.
BACKLOG = 512


class EventKind(enum.Enum):
    """What an event is about."""

    ADOPTION = "adoption"
    DENIAL = "denial"
    CALLERID = "callerid"
    ESCAPE = "escape"
    JOIN = "join"


@dataclass(frozen=True)
class Event:
    """Something that happened. ``at_s`` is Unix time; ``uid`` is whose affair it is, None: root's alone.

    ``fields`` are for people and programs to read; their names are the same as in the log.
    """

    kind: EventKind
    uid: Optional[int]
    fields: Mapping[str, Field]
    at_s: float = field(default_factory=time.time)


class TooManyWatchers(AdoptdError):
    """Nobody more may watch at the moment. The text says of whom there are how many."""


class Subscription:
    """What one watcher has not seen yet, oldest first. Made by :meth:`Events.subscribe`; close it after use."""

    def __init__(self, owner_uid: int, accepts: Callable[[Event], bool], backlog: int) -> None:
        self.owner_uid = owner_uid
        self.closed = False
        self._accepts = accepts
        self._waiting: Deque[Event] = deque(maxlen=backlog)
        self._dropped = 0
        self._news = asyncio.Event()

    def offer(self, event: Event) -> None:
        """Keep ``event`` if it is wanted; the oldest goes where there are too many. A filter that fails ends it all."""
        try:
            wanted = not self.closed and self._accepts(event)
        except Exception:
            # Whoever published has done nothing wrong, and an unfiltered event may be somebody else's.
            self.close()
            return
        if wanted:
            self._dropped += len(self._waiting) == self._waiting.maxlen
            self._waiting.append(event)
            self._news.set()

    def take_dropped(self) -> int:
        """How many events were lost since this was last asked: all of them older than the next one."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def close(self) -> None:
        """End it. Who iterates is given what waits, and is told at once. May be called twice."""
        self.closed = True
        self._news.set()

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        while not self._waiting:
            if self.closed:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._waiting.popleft()


class Events:
    """Hands every event to those who subscribed."""

    def __init__(self, backlog: int = BACKLOG) -> None:
        self._backlog = backlog
        self._subscriptions: List[Subscription] = []

    def publish(self, event: Event) -> None:
        """Tell all who want to know. Never waits, never fails. Called in the event loop."""
        for subscription in self._subscriptions:
            subscription.offer(event)

    def subscribe(self, accepts: Callable[[Event], bool], owner_uid: int = 0) -> Subscription:
        """What happens from now on, as far as ``accepts`` says, for a watcher of ``owner_uid``.

        Raises TooManyWatchers.
        """
        self._subscriptions = [each for each in self._subscriptions if not each.closed]
        watchers = Counter(each.owner_uid for each in self._subscriptions)
        others = len(self._subscriptions) - watchers[0]
        if owner_uid != 0 and watchers[owner_uid] >= WATCHERS_MAX_PER_UID:
            raise TooManyWatchers(f"uid {owner_uid} is watching {watchers[owner_uid]} times already")
        if owner_uid != 0 and others >= WATCHERS_MAX - WATCHERS_KEPT_FOR_ROOT:
            raise TooManyWatchers(f"{others} others are watching already; try again later")
        if len(self._subscriptions) >= WATCHERS_MAX:
            raise TooManyWatchers(f"{len(self._subscriptions)} are watching already; try again later")
        subscription = Subscription(owner_uid, accepts, self._backlog)
        self._subscriptions.append(subscription)
        return subscription

    def close(self) -> None:
        """End all subscriptions: the agent stops, and says so to those who watch."""
        for subscription in self._subscriptions:
            subscription.close()
