"""Running something that must be cleared up, whatever is killed: two processes that answer for each other.

The caller's process only waits and passes signals on. Its child, the supervisor, does the work in a session
and cgroups of its own; told by the kernel if the caller dies, it ends and takes everything down. If the
supervisor is killed, the caller clears up. Must never be used in a process with threads: it forks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Callable, Dict, NoReturn, Optional

from lab import kernel
from lab.cgroups import Group, paths_of_process
from lab.runs import remove_run, supervisor_group
from lab.waiting import until

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# When a signal is raised again that came where Python raises nothing.
_AGAIN_S = 0.01
# How often a supervisor that stays looks for orphans even if no signal told it to.
REAP_INTERVAL_S = 60.0
REAP_TIMEOUT_S = 5.0


class Stopped(BaseException):
    """A signal asked the supervisor to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


def _stop(number: int, _frame: Optional[FrameType]) -> NoReturn:
    # Once: a second Ctrl-C must not interrupt the clearing up that the first has begun.
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    """Of a signal that came in a destructor, or in Python's own hooks around a fork, the exception is only printed."""
    stopped = lost.exc_value
    if not isinstance(stopped, Stopped):
        sys.__unraisablehook__(lost)
        return
    number = stopped.number
    signal.signal(signal.SIGALRM, lambda *_: _stop(number, None))
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)


class Supervisor:
    """What the work is given: the means to stay behind."""

    def __init__(self, to_parent: int) -> None:
        self._to_parent = to_parent

    def stay(self, status: int) -> int:
        """Let the caller's process go with this exit status, and stay. Ends only by raising Stopped."""
        kernel.die_with_parent(0)
        # Blocked, or the kernel would drop it while nobody waits.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)
        os.write(self._to_parent, bytes([status]))
        os.close(self._to_parent)
        while True:
            _reap_orphans()
            signal.sigtimedwait([signal.SIGCHLD], REAP_INTERVAL_S)


def _reap_orphans() -> bool:
    """Whether there is nobody left to wait for."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        return True
    return False


def _reap_all() -> None:
    """Wait for every child and orphan; all have been killed by now, or were not ours to wait for any longer."""
    with contextlib.suppress(TimeoutError):
        until(_reap_orphans, "the end of every process", REAP_TIMEOUT_S)


def _return_to(origin: Dict[str, str], group: Group) -> None:
    """Leave our own cgroup for where we came from, or for the root if that is gone or closed, and remove it."""
    for hierarchy in group.hierarchies:
        for path in (origin.get(hierarchy.name, "/"), "/"):
            try:
                Group((hierarchy,), path).enter(os.getpid())
                break
            except OSError:
                continue
    group.remove()


def _supervise(run_id: str, parent: int, to_parent: int, work: Callable[[Supervisor], int]) -> int:
    os.setsid()
    sys.unraisablehook = _unraisable
    for number in SIGNALS:
        signal.signal(number, _stop)
    kernel.die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        return 1
    kernel.adopt_orphans()
    os.chdir("/")
    # The caller's shell may be in a group that is killed as a whole when it ends; whoever clears up must not be.
    origin = dict(paths_of_process(Path("/proc/self/cgroup").read_text(encoding="utf-8")))
    group = supervisor_group(run_id).make()
    try:
        group.enter(os.getpid())
        return work(Supervisor(to_parent))
    finally:
        _reap_all()
        _return_to(origin, group)


def run_supervised(run_id: str, work: Callable[[Supervisor], int]) -> int:
    """Run ``work`` in a supervisor and return its exit status. What it says goes to our stdout and stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    # The orphans of a supervisor that is killed come to us, and do not linger until init sees to them.
    kernel.adopt_orphans()
    from_child, to_parent = os.pipe()
    parent = os.getpid()
    # A signal between fork and the handlers below waits, in both.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(from_child)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            status = _supervise(run_id, parent, to_parent, work)
            sys.stdout.flush()
        except Stopped as stopped:
            status = 128 + stopped.number
        except RuntimeError as error:
            sys.stderr.write(f"demo: {error}\n")
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(to_parent)
    for number in SIGNALS:
        signal.signal(number, lambda received, _frame: os.kill(child, received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    with os.fdopen(from_child, "rb") as pipe:
        kept = pipe.read(1)
    if kept:
        return kept[0]
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # Nothing to do unless the supervisor was killed, or interrupted in its own clearing up.
    remove_run(run_id)
    _reap_all()
    return status if status >= 0 else 128 - status
