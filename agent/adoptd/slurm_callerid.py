"""The word of a slurmd on a node without our agent, through ``scontrol callerid``.

Owns the helper process from its start to its reaping. It must never run in a shell or with our environment, take
output that is not exactly what scontrol prints, nor let a helper outlive its login. libslurm is not called here:
its ABI changes, and a wrong configuration makes it end the process it is in. Called by :mod:`adoptd.callerid`.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import re
import signal
import stat
from typing import Callable, Dict, Optional, Set, Tuple

from adoptd.deadline import Deadline
from adoptd.jobs.slurm_paths import parse_job_id
from adoptd.model import AdoptdError, Connection, JobManagerError
from adoptd.workers import OutOfTime, Overloaded, Workers

# Where packages and builds of Slurm put it; all of them root's on a sane host, which is checked.
SCONTROL_PLACES = ("/usr/bin", "/usr/local/bin", "/opt/slurm/bin", "/usr/sbin", "/usr/local/sbin")

# Each takes some 30 ms of a core (22.05): more at once would only make each later.
AT_ONCE = 4

# "JOBID NODENAME\n" (src/scontrol/scontrol.c, 18.08 to 26.05): a decimal uint32 and a host name.
_OUTPUT_MAX_BYTES = 512
_OUTPUT = re.compile(rb"([0-9]{1,10}) [!-~]{1,255}\n")


class SlurmdFault(enum.Enum):
    """Why slurmd's word named no job; values of the same metric label as callerid's own."""

    UNAVAILABLE = "slurmd_unavailable"
    TIMEOUT = "slurmd_timeout"
    NONE_NAMED = "slurmd_names_none"
    MALFORMED = "slurmd_malformed"
    OTHER_NAMED = "slurmd_names_other"


class NoWord(AdoptdError):
    """Nothing that can be used came back. ``fault`` is for counting, the text for the log."""

    def __init__(self, fault: SlurmdFault, detail: str) -> None:
        super().__init__(detail)
        self.fault = fault


class SlurmdCallerid:
    """Asks source nodes' slurmds, at most ``at_once`` at a time. Used from one event loop.

    The word says which job the connection's owner is in, not whose: the caller compares it with the user's own
    jobs. slurmd searches /proc of its job steps only, so "none named" can also mean that it was not reached.
    """

    def __init__(
        self,
        scontrol: str,
        conf_file: Callable[[], Optional[str]],
        workers: Workers,
        at_once: int = AT_ONCE,
    ) -> None:
        """``scontrol``: its absolute path, "" to look in SCONTROL_PLACES. ``conf_file`` names slurm.conf, may
        block, and may raise JobManagerError; None leaves it to scontrol."""
        self._scontrol = scontrol
        self._conf_file = conf_file
        self._workers = workers
        self._turns = asyncio.Semaphore(at_once)
        self._under_way: Set[asyncio.Task[str]] = set()

    async def job_of(self, connection: Connection, deadline: Deadline) -> str:
        """The job id that the slurmd at ``connection``'s source names. Raises NoWord, at the deadline at the latest.

        The time spent waiting for a turn counts. A helper that is stuck keeps its turn until it is reaped.
        """
        task = asyncio.create_task(self._in_turn(connection, deadline))
        self._under_way.add(task)
        task.add_done_callback(self._ended)
        try:
            done, _ = await asyncio.wait({task}, timeout=deadline.remaining_s())
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not done:
            # Not awaited: a process that cannot be killed yet (in the kernel, on NFS) must not hold the login.
            task.cancel()
            raise NoWord(SlurmdFault.TIMEOUT, f"scontrol callerid {connection}: no answer in time")
        return task.result()

    async def all_reaped(self) -> None:
        """Wait until no helper is left, not even one whose asker has given up. Before its event loop is closed."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    def _ended(self, task: asyncio.Task[str]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()

    async def _in_turn(self, connection: Connection, deadline: Deadline) -> str:
        async with self._turns:
            try:
                path, environment = await self._workers.run(self._prepare, deadline)
            except (OutOfTime, Overloaded) as error:
                raise NoWord(SlurmdFault.TIMEOUT, str(error)) from None
            return await _run(path, environment, connection)

    def _prepare(self) -> Tuple[str, Dict[str, str]]:
        """The helper and its environment. In a thread: a file system that hangs must not hold the event loop."""
        path = helper_at(self._scontrol)
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
        try:
            conf_file = self._conf_file()
        except JobManagerError as error:
            raise NoWord(SlurmdFault.UNAVAILABLE, str(error)) from None
        if conf_file is not None:
            environment["SLURM_CONF"] = conf_file
        return path, environment


def helper_at(scontrol: str) -> str:
    """The scontrol that would be run, of ``scontrol`` or found; for the doctor. Raises NoWord if it is not trusted."""
    return _trusted(scontrol) if scontrol else _found()


def _found() -> str:
    for place in SCONTROL_PLACES:
        if os.path.lexists(f"{place}/scontrol"):
            return _trusted(f"{place}/scontrol")
    raise NoWord(SlurmdFault.UNAVAILABLE, f"scontrol is in none of {', '.join(SCONTROL_PLACES)}")


def _trusted(path: str) -> str:
    """``path``, if it is a program that only root could have put there; it will be run as root."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise NoWord(SlurmdFault.UNAVAILABLE, f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode) or not status.st_mode & 0o111:
        raise NoWord(SlurmdFault.UNAVAILABLE, f"{path}: not a program")
    if status.st_uid != 0 or status.st_mode & 0o022:
        raise NoWord(SlurmdFault.UNAVAILABLE, f"{path}: others than root can write to it")
    return path


async def _run(path: str, environment: Dict[str, str], connection: Connection) -> str:
    source, destination = connection.source, connection.destination
    ends = (source.address, source.port, destination.address, destination.port, connection.version)
    loop = asyncio.get_running_loop()
    helper = _Helper(loop.create_future(), loop.create_future())
    starting = asyncio.ensure_future(
        loop.subprocess_exec(
            lambda: helper,
            path,
            "callerid",
            *map(str, ends),
            stdin=asyncio.subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    )
    try:
        transport, _ = await asyncio.shield(starting)
    except asyncio.CancelledError:
        # It may be running already, and asyncio would then kill it without what it has started.
        transport, _ = await starting
        await _end(transport, helper)
        raise
    except OSError as error:
        raise NoWord(SlurmdFault.UNAVAILABLE, f"{path}: {error.strerror}") from None
    try:
        await helper.heard
    finally:
        await _end(transport, helper)
    return _job_in(transport.get_returncode(), helper)


def _job_in(code: Optional[int], helper: _Helper) -> str:
    """Raises NoWord unless the helper printed exactly what scontrol prints for a job, and nothing went wrong."""
    if helper.flooded:
        raise NoWord(SlurmdFault.MALFORMED, f"scontrol callerid printed more than {_OUTPUT_MAX_BYTES} bytes")
    if code != 0:
        words = "; ".join(helper.complaint.decode("ascii", "backslashreplace").splitlines())
        raise NoWord(SlurmdFault.NONE_NAMED, f"scontrol callerid ended with {code}: {words[:200]}")
    line = _OUTPUT.fullmatch(helper.output)
    job_id = None if line is None else parse_job_id(line[1].decode("ascii"))
    if job_id is None:
        raise NoWord(SlurmdFault.MALFORMED, f"scontrol callerid printed {bytes(helper.output[:80])!r}")
    return str(job_id)


class _Helper(asyncio.SubprocessProtocol):
    """One scontrol: what it prints, up to a bound.

    ``heard``: it has ended and both its pipes with it, or has printed too much. ``gone``: reaped, pipes closed.
    """

    def __init__(self, heard: asyncio.Future[None], gone: asyncio.Future[None]) -> None:
        self.heard = heard
        self.gone = gone
        self.output = bytearray()
        self.complaint = bytearray()
        self.flooded = False

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Called by the event loop, at most 256 KiB at a time."""
        into = self.output if fd == 1 else self.complaint
        into += data
        if len(into) > _OUTPUT_MAX_BYTES:
            del into[_OUTPUT_MAX_BYTES:]
            self.flooded = True
            _settle(self.heard)

    def connection_lost(self, exc: Optional[Exception]) -> None:
        """Called by the event loop when the helper is reaped and its pipes are closed."""
        _settle(self.heard)
        _settle(self.gone)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _end(transport: asyncio.SubprocessTransport, helper: _Helper) -> None:
    """Kill the helper, and what it may have started as a site's wrapper script, unless it has ended; reap it."""
    if transport.get_returncode() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(transport.get_pid(), signal.SIGKILL)
    transport.close()
    await helper.gone
