"""What any daemon does with its process: its place before others, its descriptors, its tasks.

Owns what is asked of the kernel for the agent as a whole. Knows nothing of logins or jobs. Called by the service and by
its tasks.
"""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path
from typing import Awaitable, Callable, Coroutine

from adoptd import log


async def unless(stop: asyncio.Event, work: Coroutine[object, object, None]) -> None:
    """``work``, cancelled if ``stop`` comes first. Raises what it raises."""
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (stopping, working):
            task.cancel()
        await asyncio.gather(stopping, working, return_exceptions=True)
    if not working.cancelled():
        working.result()


async def woken(event: asyncio.Event, within_s: float) -> None:
    """Wait for ``event``, and no longer than that.

    Not wait_for(), which before Python 3.12 forgets a cancellation that comes together with the event: who waits in a
    loop would then never end.
    """
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((waiting,), timeout=within_s)
    finally:
        waiting.cancel()


async def kept_up(what: str, work: Callable[[], Awaitable[None]]) -> None:
    """``work``, which ends with the agent only: a defect in it is seen at once, not when the agent stops."""
    try:
        await work()
    except Exception as error:
        log.error("background_task_failed", task=what, error=f"{type(error).__name__}: {error}")


def come_before_sessions() -> None:
    """Ask the scheduler not to make a login wait for the logins that it is competing with.

    Under autogrouping (sched(7), on by default on Debian) every session has an equal share of the
    processor, so twenty sshds at their key exchange leave the agent a twentieth. nice(2) does not reach
    across sessions; this file does. Only for a session that is the agent's own, as under systemd.
    """
    if os.getsid(0) != os.getpid():
        return
    try:
        Path("/proc/self/autogroup").write_text("-10")
    except OSError as error:
        log.debug("autogroup_unchanged", error=error.strerror)


def allow_descriptors(wanted: int) -> None:
    """Let every door be full at once. 1024 descriptors, the usual soft limit, are fewer than any user can make the
    peers' door hold; sshd would then wait at the PAM socket in vain."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard if hard != resource.RLIM_INFINITY and hard < wanted else wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
    if enough < wanted:
        log.warning("few_descriptors", limit=enough, expected=wanted, effect="a flood may keep logins waiting")
