"""Bounds on work: a pool of threads for calls that may block (munged, the job manager), and turns for requests.

Owns the rule that a stuck callee costs a bounded number of threads and no request more than its
deadline. A call that outlives its deadline is abandoned, not awaited: its thread ends when the callee's
own timeout does, and until then counts against the bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import AsyncIterator, Callable, Dict, Hashable, List, TypeVar

from adoptd.deadline import Deadline
from adoptd.model import AdoptdError

_T = TypeVar("_T")


class OutOfTime(AdoptdError):
    """The deadline passed before the call returned."""


class Overloaded(AdoptdError):
    """So many calls are under way or waiting that one more would only wait past its deadline."""


class Workers:
    """``threads`` threads, and at most ``backlog`` calls under way or waiting at once."""

    def __init__(self, name: str, threads: int, backlog: int) -> None:
        self._name = name
        self._backlog = backlog
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._pending = 0

    @property
    def pending(self) -> int:
        """Calls under way or waiting, abandoned ones included."""
        return self._pending

    async def run(self, call: Callable[[], _T], deadline: Deadline) -> _T:
        """The result of ``call()``, made in a thread. Raises what it raises, OutOfTime or Overloaded."""
        if deadline.expired:
            # Not even begun: a move into a job must not happen after its login was told that it failed.
            raise OutOfTime(f"{self._name}: no time left")
        with self._lock:
            if self._pending >= self._backlog:
                raise Overloaded(f"{self._name}: {self._pending} calls are under way, at most {self._backlog}")
            self._pending += 1
        try:
            future = self._executor.submit(call)
        except BaseException:
            self._finished(None)
            raise
        future.add_done_callback(self._finished)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), deadline.remaining_s())
        except asyncio.TimeoutError:
            raise OutOfTime(f"{self._name}: no result within the deadline") from None

    def close(self) -> None:
        """Take no more calls, and begin none that waits. Not waited for here, but by the interpreter at its exit."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _finished(self, _: object) -> None:
        with self._lock:
            self._pending -= 1


class Turns:
    """At most ``at_once`` requests under way, and of them at most ``of_one`` for any one key. For one event loop.

    Who has the most requests waits for their own: a flood of one user's takes no turn of another's.
    """

    def __init__(self, at_once: int, of_one: int) -> None:
        self._of_one = of_one
        self._all = asyncio.Semaphore(at_once)
        # A key is here while somebody has or awaits a turn of it.
        self._each: Dict[Hashable, asyncio.Semaphore] = {}
        self._users: Dict[Hashable, int] = {}

    @contextlib.asynccontextmanager
    async def taken(self, key: Hashable, deadline: Deadline) -> AsyncIterator[None]:
        """Hold a turn of ``key``. Raises OutOfTime if none is to be had by ``deadline``."""
        each = self._each.setdefault(key, asyncio.Semaphore(self._of_one))
        self._users[key] = self._users.get(key, 0) + 1
        held: List[asyncio.Semaphore] = []
        try:
            # Its own first: who waits for that must not keep a turn of all from the others.
            for semaphore in (each, self._all):
                await _acquire(semaphore, deadline)
                held.append(semaphore)
            yield
        finally:
            for semaphore in held:
                semaphore.release()
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key], self._each[key]


async def _acquire(semaphore: asyncio.Semaphore, deadline: Deadline) -> None:
    if not semaphore.locked() and not deadline.expired:
        # Does not wait then, and wait_for() would make a task of it: three rounds of the event loop for nothing.
        await semaphore.acquire()
        return
    try:
        await asyncio.wait_for(semaphore.acquire(), deadline.remaining_s())
    except asyncio.TimeoutError:
        raise OutOfTime("no turn within the deadline") from None
