"""Sessions on this kernel's own cgroups with a guard over them, and the means to move them out of their job.

A tree of cgroups of the test's own, real processes as sessions, the real probe's watch or none. Owns no expectation.
Used by the tests of escapes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import subprocess
import time
from pathlib import Path
from typing import AsyncIterator, Dict, List, Mapping, Optional, Sequence, Set

import pytest

from adoptd.deadline import Deadline
from adoptd.events import Event, EventKind, Events
from adoptd.hierarchy import CgroupMounts, Hierarchy
from adoptd.jobs.cgroup import CgroupJobs
from adoptd.jobs.template import JobPath
from adoptd.metrics import Metrics
from adoptd.model import Job, ProbeError, Witness
from adoptd.probe.watching import OpenWatch, open_watch
from adoptd.process import open_process
from adoptd.sessions import Session, Sessions
from adoptd.sessions.escapes import OnEscape
from adoptd.sessions.guard import Guard
from adoptd.sessions.store import SessionStore
from adoptd.workers import Workers
from kernel.cgroup_tree import removed
from lab.waiting import until, until_in_loop

ALICE, BOB = 61001, 61002
_SERIAL = itertools.count(1)


class Shell:
    """A shell that does what it is told, one line at a time, as the process of a session or as somebody else."""

    def __init__(self, uid: int = 0) -> None:
        drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
        self._process = subprocess.Popen(
            [*drop, "bash", "--norc"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", text=True, bufsize=1
        )
        self.pid = self._process.pid
        # setpriv has become the shell by then: until it has, it is still root's.
        self.do("true")

    def do(self, line: str) -> str:
        """What ``line`` prints, once it is done."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}; echo .end\n")
        self._process.stdin.flush()
        said: List[str] = []
        while True:
            out = self._process.stdout.readline()
            assert out, f"the shell ended in: {line}"
            if out.strip() == ".end":
                return "".join(said).strip()
            said.append(out)

    def start(self, line: str = "sleep 600") -> int:
        """The pid of a child of its own."""
        return int(self.do(f"{line} >/dev/null 2>&1 & echo $!"))

    def start_daemon(self) -> int:
        """The pid of a process in a session of its own, whose parent has ended."""
        pid = int(self.do("echo $(setsid -f sh -c 'echo $$; exec sleep 600 >/dev/null 2>&1')"))
        assert pid != self.pid
        return pid

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


class Tree:
    """Cgroups under ``/adoptd-test-PID-N``, jobs among them."""

    def __init__(self) -> None:
        self.mounts = CgroupMounts()
        self.hierarchies: Dict[str, Hierarchy] = {each.label: each for each in self.mounts.hierarchies()}
        self.top = f"/adoptd-test-{os.getpid()}-{next(_SERIAL)}"
        # In version 2, where the probe looks; and in a version 1 controller if this host has one.
        self.labels: Sequence[str] = [label for label in ("v2", "memory") if label in self.hierarchies]
        self.jobs = CgroupJobs(JobPath.parse_template(self.top + "/uid_{uid}/job_{job}"), "", self.mounts)

    def at(self, path: str, label: str) -> Path:
        return Path(f"{self.hierarchies[label].mount_point}{self.top}/{path}")

    def make(self, path: str, owner: int = 0, labels: Optional[Sequence[str]] = None) -> None:
        for label in labels or self.labels:
            directory = self.at(path, label)
            directory.mkdir(parents=True, exist_ok=True)
            for each in (directory, directory / "cgroup.procs"):
                os.chown(each, owner, owner)

    def job(self, uid: int, job_id: str) -> Job:
        self.make(f"uid_{uid}/job_{job_id}")
        return next(job for job in self.jobs.jobs_of(uid, Deadline.after_ms(20_000)) if job.id == job_id)

    def put(self, pid: int, path: str, labels: Optional[Sequence[str]] = None) -> None:
        """As root by hand: in a process of its own, since what the guard's own process moves is no escape."""
        for label in labels or self.labels:
            write = ["sh", "-c", 'echo "$0" > "$1"', str(pid), str(self.at(path, label) / "cgroup.procs")]
            subprocess.run(write, check=True)

    def where(self, pid: int) -> Mapping[str, str]:
        """The path below the tree, by hierarchy; what is not below it is as it is."""
        found = self.mounts.membership(pid)
        assert found is not None
        return {label: found[self.hierarchies[label].number].replace(self.top + "/", "") for label in self.labels}

    def is_in(self, pid: int, path: str) -> bool:
        return set(self.where(pid).values()) == {path}

    def close(self) -> None:
        for label in self.labels:
            top = Path(self.hierarchies[label].mount_point + self.top)
            for directory in [*sorted(top.rglob("*"), reverse=True), top]:
                # Busy until its last process has been reaped, by init if need be.
                until(functools.partial(_emptied, directory), f"{directory} removed")
        self.mounts.close()


class Guarded:
    """A node's sessions under guard. Use :func:`guarded`."""

    def __init__(self, pin_dir: Optional[Path], keep_in: Optional[Path] = None) -> None:
        self.tree = Tree()
        self.pin_dir = pin_dir
        self.sources: Optional[Path] = None
        self.numbers: Set[int] = set()
        self.on_escape = OnEscape.READOPT
        self.keep_in = keep_in
        self.metrics = Metrics()
        self.events = Events()
        self.seen: List[Event] = []
        self.shells: List[Shell] = []
        # Ids of sessions whose session phase is still to come.
        self.in_login: Set[str] = set()
        self._workers = Workers("guard", threads=1, backlog=1)
        self._task: Optional[asyncio.Task[None]] = None
        self._listener = asyncio.create_task(self._listen())

    async def start(self) -> None:
        """A guard over the sessions that are kept."""
        self.sessions = Sessions(time.time, None if self.keep_in is None else SessionStore(self.keep_in))
        self.sessions.restore()
        self.guard = Guard(
            self.sessions,
            lambda: self.tree.jobs,
            lambda: self.on_escape,
            self._open,
            self._workers,
            self.metrics,
            self.events,
            lambda session: session.id in self.in_login,
        )
        self._task = asyncio.create_task(self.guard.run())
        await until_in_loop(lambda: self.guard.status.reason != "not tried yet", "the guard's first look at the probe")

    async def stop(self) -> None:
        """No guard, and nobody that knows of sessions."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
            self.sessions.close()

    def shell(self, uid: int = 0) -> Shell:
        self.shells.append(Shell(uid))
        return self.shells[-1]

    def session(self, uid: int, job: Job, shell: Optional[Shell] = None) -> Shell:
        """A shell of ``uid``'s that was adopted into ``job``."""
        shell = self.shell(uid) if shell is None else shell
        with open_process(shell.pid) as process:
            self.tree.jobs.adopt(process, job, Deadline.after_ms(20_000))
            self.note(shell, job)
        return shell

    def note(self, shell: Shell, job: Job) -> Session:
        with open_process(shell.pid) as process:
            return self.sessions.add(
                process,
                uid=job.uid,
                user=f"u{job.uid}",
                job=job,
                witness=Witness.BPF,
                reason="single_job",
                connection=None,
                service="sshd",
                stages=(),
            )

    def counted(self, mover: str, outcome: str) -> float:
        labels = {"mover": mover, "outcome": outcome}
        return self.metrics.registry.get_sample_value("adoptd_escapes_total", labels) or 0.0

    def escapes(self) -> List[Mapping[str, object]]:
        """What those who watch were told, without the fields that are nothing."""
        return [{key: value for key, value in event.fields.items() if value is not None} for event in self.seen]

    async def has_looked(self) -> None:
        """Return when the guard has dealt with all that happened before: a move after it was seen and undone."""
        job = self.tree.job(BOB, f"witness{next(_SERIAL)}")
        other = self.session(BOB, job)

        # Not by their number: that of what went before is counted before it is told.
        def told() -> List[Event]:
            return [event for event in self.seen if event.fields["pid"] == other.pid]

        self.tree.put(other.pid, ".")
        await until_in_loop(lambda: bool(told()), "the guard sees another escape")
        await until_in_loop(lambda: self.tree.is_in(other.pid, f"uid_{BOB}/job_{job.id}"), "and undoes it")
        other.end()
        await until_in_loop(lambda: self.sessions.find(str(other.pid)) is None, "its session ends")
        (escape,) = told()
        self.seen.remove(escape)

    def _open(self) -> OpenWatch:
        if self.pin_dir is None:
            raise ProbeError("there is none in this test")
        watch = open_watch(self.pin_dir, self.sources)
        self.numbers.add(watch.number)
        return watch

    @property
    def attached(self) -> int:
        """How many watches it has used; the last is in use if it says so."""
        return len(self.numbers) if self.guard.status.told else 0

    async def _listen(self) -> None:
        async for event in self.events.subscribe(lambda event: event.kind is EventKind.ESCAPE):
            self.seen.append(event)

    async def close(self) -> None:
        await self.stop()
        self._listener.cancel()
        await asyncio.gather(self._listener, return_exceptions=True)
        self._workers.close()
        for shell in self.shells:
            with contextlib.suppress(ProcessLookupError):
                shell.end()
        self.tree.close()


@contextlib.asynccontextmanager
async def guarded(
    pin_dir: Optional[Path], keep_in: Optional[Path] = None, sources: Optional[Path] = None
) -> AsyncIterator[Guarded]:
    """Sessions under guard; the probe's watch is the one pinned at ``pin_dir``, None: there is none."""
    if os.geteuid() != 0:
        pytest.skip("not root")
    made = Guarded(pin_dir, keep_in)
    made.sources = sources
    try:
        await made.start()
        yield made
    finally:
        await made.close()


def _emptied(directory: Path) -> bool:
    """Whether the cgroup is gone; what a session of the test's left in it is ended."""
    if not directory.is_dir() or removed(directory):
        return True
    for line in (directory / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(line), 9)
    return False
