"""Other network namespaces of this host: found by the processes in them, entered by a thread made for it.

Owns the walk over PROC/PID/ns/net and setns(2). A thread that has entered another namespace is never used for
anything else: it ends there. A namespace is taken only if the kernel gives it the id that was asked for, so it does
not matter which process led to it. Called by the conntrack witness.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from typing import Callable, Dict, FrozenSet, Generic, Iterator, List, Optional, Set, TypeVar

from adoptd.connections.routes import namespace_id
from adoptd.deadline import Deadline
from adoptd.model import ProtocolError, WitnessUnavailable

_CLONE_NEWNET = 0x40000000
# Namespaces looked at in one walk, each for some 15 us: users can make thousands.
NAMESPACES_MAX = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_Result = TypeVar("_Result")


@contextlib.contextmanager
def held(
    wanted: FrozenSet[int], first: Optional[int], deadline: Deadline, proc_root: str = "/proc"
) -> Iterator[Dict[int, int]]:
    """Descriptors of the namespaces with the ids ``wanted``, as far as a process is in them; closed afterwards.

    ``first``: the pid to look at before all others. Raises WitnessUnavailable if the walk cannot be finished.
    """
    with contextlib.ExitStack() as opened:
        yield _find(wanted, first, deadline, proc_root, opened)


def _find(
    wanted: FrozenSet[int], first: Optional[int], deadline: Deadline, proc_root: str, opened: contextlib.ExitStack
) -> Dict[int, int]:
    found: Dict[int, int] = {}
    seen: Set[int] = set()
    for pid in _pids(first, proc_root):
        if found.keys() == wanted:
            break
        if deadline.expired:
            raise WitnessUnavailable(f"out of time after {len(seen)} network namespaces")
        path = f"{proc_root}/{pid}/ns/net"
        try:
            inode = os.stat(path).st_ino
            if inode in seen:
                continue
            if len(seen) == NAMESPACES_MAX:
                raise WitnessUnavailable(f"there are more than {NAMESPACES_MAX} network namespaces")
            seen.add(inode)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            # The process is gone, or is one that even root may not look into.
            continue
        except OSError as error:
            raise WitnessUnavailable(f"{path}: {error.strerror}") from None
        keep = False
        try:
            number = namespace_id(fd, deadline)
            keep = number in wanted and number not in found
            if keep and number is not None:
                found[number] = fd
                opened.callback(os.close, fd)
        except (OSError, ProtocolError) as error:
            raise WitnessUnavailable(f"the id of a network namespace cannot be had: {error}") from None
        finally:
            if not keep:
                os.close(fd)
    return found


def _pids(first: Optional[int], proc_root: str) -> Iterator[int]:
    if first is not None:
        yield first
    try:
        with os.scandir(proc_root) as entries:
            for entry in entries:
                if entry.name.isdigit():
                    yield int(entry.name)
    except OSError as error:
        raise WitnessUnavailable(f"cannot list {proc_root}: {error.strerror}") from None


def inside(namespace: int, action: Callable[[], _Result], deadline: Deadline) -> _Result:
    """What ``action`` returns in the network namespace of a descriptor. Raises what it raises, WitnessUnavailable.

    Sockets that it makes are of that namespace, wherever they are used.
    """
    entered = os.dup(namespace)
    errand = _Errand(entered, action)
    try:
        errand.start()
    except RuntimeError as error:  # no thread can be had
        os.close(entered)
        raise WitnessUnavailable(f"a network namespace cannot be entered: {error}") from None
    errand.join(deadline.remaining_s())
    return errand.result()


class _Errand(threading.Thread, Generic[_Result]):
    """Goes into a namespace, does one thing there, and ends."""

    def __init__(self, namespace: int, action: Callable[[], _Result]) -> None:
        """Takes over ``namespace``."""
        super().__init__(name="adoptd-namespace", daemon=True)
        self._namespace = namespace
        self._action = action
        self._results: List[_Result] = []
        self._error: Optional[BaseException] = None

    def run(self) -> None:
        try:
            if _libc.setns(self._namespace, _CLONE_NEWNET) != 0:
                why = os.strerror(ctypes.get_errno())
                raise WitnessUnavailable(f"a network namespace cannot be entered: {why}")
            self._results.append(self._action())
        except BaseException as error:
            self._error = error
        finally:
            os.close(self._namespace)

    def result(self) -> _Result:
        """Raises WitnessUnavailable if it is not back yet."""
        if self._results:
            return self._results[0]
        if self._error is not None:
            raise self._error
        raise WitnessUnavailable("no answer in time from within a network namespace")
