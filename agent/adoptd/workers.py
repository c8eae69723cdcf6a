"""Bounds on work: a pool of threads for calls that may block (munged, the job manager), and turns for requests.

Owns the rule that a stuck callee costs a bounded number of threads and no request more than its
deadline. A call that outlives its deadline is abandoned, not awaited: its thread ends when the callee's
own timeout does, and until then counts against the bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import AsyncIterator, Callable, Deque, Dict, Hashable, TypeVar

from adoptd.deadline import Deadline
from adoptd.model import AdoptdError

_T = TypeVar("_T")


class OutOfTime(AdoptdError):
    """The deadline passed before the call returned."""


class Overloaded(AdoptdError):
    """So many calls are under way or waiting that one more would only wait past its deadline, or none is taken."""


class Workers:
    """``threads`` threads, and at most ``backlog`` calls under way or waiting at once.

    The result is handed to asyncio here, without wrap_future() and wait_for(): those cost more than the pool itself,
    and wait_for() before Python 3.12 forgets a cancellation that comes together with the result. A trip to a thread
    is 47 us of processor time; with threads of our own it was 32, and with eight askers no less: 2% of an answer.
    """

    def __init__(self, name: str, threads: int, backlog: int) -> None:
        self._name = name
        self._backlog = backlog
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._pending = 0

    @property
    def name(self) -> str:
        """In errors and metrics."""
        return self._name

    @property
    def pending(self) -> int:
        """Calls under way or waiting, abandoned ones included."""
        return self._pending

    async def run(self, call: Callable[[], _T], deadline: Deadline) -> _T:
        """The result of ``call()``, made in a thread. Raises what it raises, OutOfTime or Overloaded."""
        if deadline.expired:
            # Not even begun: a move into a job must not happen after its login was told that it failed.
            raise OutOfTime(f"{self._name}: no time left")
        loop = asyncio.get_running_loop()
        told: asyncio.Future[_T] = loop.create_future()
        made = self._submit(call)
        made.add_done_callback(lambda made: self._ended(made, told, loop))
        timer = loop.call_later(deadline.remaining_s(), _out_of_time, told)
        try:
            return await told
        except OutOfTime as error:
            # One that the call itself raised says where the time went.
            raise error if str(error) else OutOfTime(f"{self._name}: no result within the deadline") from None
        finally:
            timer.cancel()
            # One that no thread has begun is not made any more. Of one that goes on, what it makes is not kept by the
            # traceback of our own error: it may be descriptors.
            made.cancel()
            del made

    def close(self) -> None:
        """Take no more calls, and begin none that waits. Not waited for here, but by the interpreter at its exit."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _submit(self, call: Callable[[], _T]) -> Future[_T]:
        with self._lock:
            if self._pending >= self._backlog:
                raise Overloaded(f"{self._name}: {self._pending} calls are under way, at most {self._backlog}")
            try:
                made = self._executor.submit(call)
            except RuntimeError as error:  # closed, or no thread can be had
                raise Overloaded(f"{self._name}: {error}") from None
            self._pending += 1
            return made

    def _ended(self, made: Future[_T], told: asyncio.Future[_T], loop: asyncio.AbstractEventLoop) -> None:
        """In the thread, or where the call was given up before one had begun it."""
        with self._lock:
            self._pending -= 1
        if not made.cancelled():
            # A loop that has been closed has nobody left to tell.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_tell, made, told)


def _tell(made: Future[_T], told: asyncio.Future[_T]) -> None:
    if told.done():
        return
    error = made.exception()
    if error is None:
        told.set_result(made.result())
    else:
        told.set_exception(error)


def _out_of_time(told: asyncio.Future[_T]) -> None:
    if not told.done():
        told.set_exception(OutOfTime())


class Turns:
    """At most ``at_once`` requests under way, and of them at most ``of_one`` for any one key. Safe between threads.

    Who has the most requests waits for their own: a flood of one user's takes no turn of another's. Those that
    wait are served key by key in turn, and for one key in the order they came.
    """

    def __init__(self, at_once: int, of_one: int) -> None:
        self._of_one = of_one
        self._lock = threading.Lock()
        self._free = at_once
        self._held: Dict[Hashable, int] = {}
        self._waiting: OrderedDict[Hashable, Deque[_Waiter]] = OrderedDict()

    def take_now(self, key: Hashable) -> bool:
        """Whether a turn of ``key`` was free and is now the caller's, until :meth:`give_back`. From any thread."""
        # Who waits cannot be overtaken here: a turn is never free while somebody waits who may have it.
        with self._lock:
            return self._take(key)

    def give_back(self, key: Hashable) -> None:
        """End a turn of ``key``; whoever may have it next has it at once. From any thread."""
        with self._lock:
            self._release(key)

    @contextlib.asynccontextmanager
    async def taken(self, key: Hashable, deadline: Deadline) -> AsyncIterator[None]:
        """Hold a turn of ``key``. Raises OutOfTime if none is to be had by ``deadline``."""
        await self.take(key, deadline)
        try:
            yield
        finally:
            self.give_back(key)

    async def take(self, key: Hashable, deadline: Deadline) -> None:
        """Wait for a turn of ``key``, which the caller gives back. Raises OutOfTime if none is to be had in time."""
        if deadline.expired:
            raise OutOfTime("no turn within the deadline")
        with self._lock:
            if self._take(key):
                return
            waiter = _Waiter(asyncio.get_running_loop())
            self._waiting.setdefault(key, deque()).append(waiter)
        # Not wait_for(), which before Python 3.12 forgets that it was cancelled if the turn comes at the same time.
        timer = waiter.loop.call_later(deadline.remaining_s(), waiter.give_up)
        try:
            await waiter.granted
        except BaseException:
            self._withdraw(key, waiter)
            raise
        finally:
            timer.cancel()

    def _take(self, key: Hashable) -> bool:
        held = self._held.get(key, 0)
        if not self._free or held >= self._of_one:
            return False
        self._free -= 1
        self._held[key] = held + 1
        return True

    def _release(self, key: Hashable) -> None:
        self._free += 1
        self._held[key] -= 1
        if not self._held[key]:
            del self._held[key]
        for other, waiters in self._waiting.items():
            if self._take(other):
                waiter = waiters.popleft()
                if waiters:
                    self._waiting.move_to_end(other)
                else:
                    del self._waiting[other]
                waiter.grant()
                return

    def _withdraw(self, key: Hashable, waiter: _Waiter) -> None:
        with self._lock:
            if waiter.has_turn:
                self._release(key)
                return
            waiters = self._waiting[key]
            waiters.remove(waiter)
            if not waiters:
                del self._waiting[key]


class _Waiter:
    """Somebody in the event loop who waits for a turn. ``has_turn`` changes under the lock of the turns only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.granted: asyncio.Future[None] = loop.create_future()
        self.has_turn = False

    def grant(self) -> None:
        self.has_turn = True
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._tell)

    def give_up(self) -> None:
        """In the event loop, at the deadline."""
        if not self.granted.done():
            self.granted.set_exception(OutOfTime("no turn within the deadline"))

    def _tell(self) -> None:
        if not self.granted.done():
            self.granted.set_result(None)
