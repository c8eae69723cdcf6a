"""Stand-ins with the real interfaces, and the small values that many unit tests speak of.

No mock library: each class satisfies the Protocol it stands in for (mypy checks this file), does what
it was told at construction, and notes what it was asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import struct
import threading
from typing import Awaitable, Callable, Dict, FrozenSet, Iterator, List, Mapping, Optional, Sequence, Set, Tuple, Union

from adoptd.callerid import Asker, Peers, Told
from adoptd.connections import ConnectionWitness
from adoptd.deadline import Deadline
from adoptd.jobs import CgroupFinding, CgroupVerdict, JobBackend, JobSession, JobsHere
from adoptd.metrics import Metrics
from adoptd.model import AdoptionFailed, Connection, Endpoint, IPAddress, Job, JobFault, JobManagerError, Owner, Witness
from adoptd.process import ProcessHandle
from adoptd.seal import Opened, Seal, SealError, SealFault
from lab.waiting import DEADLINE_S, until_in_loop

ALICE = 1001
BOB = 1002

HERE = ipaddress.ip_address("127.0.0.1")


def connection(source_port: int = 40000, source: str = "127.0.0.1", destination: str = "127.0.0.2") -> Connection:
    return Connection(
        Endpoint(ipaddress.ip_address(source), source_port), Endpoint(ipaddress.ip_address(destination), 22)
    )


def job(job_id: str, uid: int = ALICE, created: int = 0, identity: Tuple[int, ...] = (1,)) -> Job:
    return Job(job_id, uid, created, identity)


def soon(ms: float = 30_000.0) -> Deadline:
    """Time enough on any machine; what is to run out of it says ``ms``."""
    return Deadline.after_ms(ms)


def longer(ms: float) -> Iterator[float]:
    """A time that runs out on purpose, and longer ones where the machine was too busy to get that far in it."""
    while ms < 100_000.0:
        yield ms
        ms *= 4


async def until(condition: Callable[[], object], within_s: float = DEADLINE_S) -> None:
    """Return as soon as ``condition()`` holds; fail if it does not within ``within_s``."""
    await until_in_loop(condition, "what the test waits for", within_s)


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    """The value of one series, 0 if it was never touched."""
    return metrics.registry.get_sample_value(name, labels) or 0.0


class FakeBackend:
    """Jobs in memory. ``adopted`` maps pids to the job they were moved into; ``tried`` lists every attempt.

    ``suspended`` are the ids of those of ``jobs`` that stand still.
    """

    name = "fake"
    job_variable = "FAKE_JOB_ID"

    def __init__(self, *jobs: Job) -> None:
        self.jobs: List[Job] = list(jobs)
        self.suspended: Set[str] = set()
        self.down: Optional[str] = None
        self.hang: Optional[threading.Event] = None
        self.cannot_adopt: Dict[str, str] = {}
        self.adopted: Dict[int, Job] = {}
        self.tried: List[str] = []
        self.of_process: Dict[int, Union[Job, Exception]] = {}
        self.of_cgroup: Dict[int, CgroupVerdict] = {}
        self.environment: Dict[str, str] = {"SLURM_JOB_ID": "{job}"}
        self.cgroups: Dict[int, str] = {}
        self.display: Optional[str] = None
        self.namespaces: Optional[Sequence[str]] = ()
        self.nodes: Dict[str, FakeBackend] = {}

    def _answering(self, deadline: Optional[Deadline] = None) -> None:
        if self.hang is not None:
            self.hang.wait(DEADLINE_S)
        if self.down is not None:
            raise JobManagerError(self.down)

    def jobs_of(self, uid: int, deadline: Deadline) -> Tuple[Job, ...]:
        self._answering(deadline)
        return tuple(j for j in self.jobs if j.uid == uid)

    @contextlib.contextmanager
    def here(self, uid: int, deadline: Deadline) -> Iterator[JobsHere]:
        jobs = self.jobs_of(uid, deadline)
        suspended = tuple(j for j in jobs if j.id in self.suspended)
        yield JobsHere(tuple(j for j in jobs if j not in suspended), self.adopt_for_session, suspended)

    def all_jobs(self, deadline: Deadline) -> Tuple[Job, ...]:
        self._answering(deadline)
        return tuple(self.jobs)

    def job_of_process(self, pid: int) -> Optional[Job]:
        self._answering()
        found = self.of_process.get(pid)
        if isinstance(found, Exception):
            raise found
        return found

    def job_of_cgroup(self, cgroup_id: int, pid: Optional[int] = None) -> CgroupVerdict:
        self._answering()
        verdict = self.of_cgroup.get(cgroup_id, CgroupVerdict(CgroupFinding.CANNOT_TELL, "not known"))
        if verdict.job is None or pid is None:
            return verdict
        return dataclasses.replace(verdict, holds=self.of_process.get(pid) == verdict.job)

    def job_cgroups(self, where: Mapping[int, str]) -> Mapping[int, str]:
        return self.cgroups

    def adopt(self, process: ProcessHandle, job: Job, deadline: Deadline) -> None:
        self.tried.append(job.id)
        if deadline.expired:
            raise AdoptionFailed("no time")
        if job.id in self.cannot_adopt:
            raise AdoptionFailed(self.cannot_adopt[job.id])
        if job not in self.jobs:
            raise AdoptionFailed(f"job {job.id} is gone", JobFault.JOB_ENDED)
        self.adopted[process.pid] = job

    def adopt_for_session(
        self, process: ProcessHandle, job: Job, x11: bool, namespaces: bool, deadline: Deadline
    ) -> JobSession:
        if job.id in self.suspended:
            raise AdoptionFailed(f"job {job.id} is suspended", JobFault.JOB_ENDED)
        self.adopt(process, job, deadline)
        return self.session(job, x11, namespaces, deadline)

    def contains(self, job: Job, pid: int) -> bool:
        self._answering()
        return self.of_process.get(pid) == job

    def processes(self, job: Job, deadline: Deadline) -> Tuple[int, ...]:
        self._answering(deadline)
        return tuple(pid for pid, found in self.of_process.items() if found == job)

    def session(self, job: Job, x11: bool, namespaces: bool, deadline: Deadline) -> JobSession:
        if namespaces and self.namespaces is None:
            raise JobManagerError("the namespaces cannot be had")
        environment = {name: value.format(job=job.id) for name, value in self.environment.items()}
        if x11 and self.display is not None:
            environment["DISPLAY"] = self.display
        opened = [os.open(path, os.O_RDONLY) for path in (self.namespaces or ())] if namespaces else []
        return JobSession(environment, opened)

    def for_node(self, node_name: str) -> FakeBackend:
        return self.nodes[node_name] if node_name else self


class FakeWitness:
    """Knows the owners it is given; raises ``error`` instead if there is one; counts its questions."""

    def __init__(
        self,
        name: Witness = Witness.BPF,
        owners: Optional[Mapping[Connection, Owner]] = None,
        may_block: bool = False,
        error: Optional[Exception] = None,
        hang: Optional[threading.Event] = None,
    ) -> None:
        self.name = name
        self.may_block = may_block
        self.owners = dict(owners or {})
        self.error = error
        self.hang = hang
        self.asked: List[Connection] = []

    def owner_of(self, connection: Connection, deadline: Deadline) -> Optional[Owner]:
        self.asked.append(connection)
        if self.hang is not None:
            self.hang.wait(DEADLINE_S)
        if self.error is not None:
            raise self.error
        return self.owners.get(connection)


class FakeSeal:
    """A seal that hides nothing: ``FAKE <uid> <payload>``. ``fault`` makes open() or seal() fail."""

    scheme = "fake"

    def __init__(self, uid: int = 0, may_block: bool = False) -> None:
        self.uid = uid
        self.may_block = may_block
        self.identity: Tuple[object, ...] = (uid,)
        self.open_fault: Optional[SealFault] = None
        self.seal_fault: Optional[SealFault] = None
        self.hang: Optional[threading.Event] = None
        self.sealed_for: List[int] = []

    def seal(self, payload: bytes, reader_uid: int = 0) -> bytes:
        if self.hang is not None:
            self.hang.wait(DEADLINE_S)
        if self.seal_fault is not None:
            raise SealError(self.seal_fault, "told to fail")
        self.sealed_for.append(reader_uid)
        return b"FAKE %d " % self.uid + payload

    def open(self, sealed: bytes) -> Opened:
        if self.hang is not None:
            self.hang.wait(DEADLINE_S)
        if self.open_fault is not None:
            raise SealError(self.open_fault, "told to fail")
        words = sealed.split(b" ", 2)
        if len(words) != 3 or words[0] != b"FAKE" or not words[1].isdigit():
            raise SealError(SealFault.BAD_SEAL, "not sealed by this fake")
        return Opened(words[2], int(words[1]), None)

    def close(self) -> None:
        pass


class FakeAsker:
    """Stands in for callerid.Asker: says ``told``, and notes connection, login uid and node of each question."""

    def __init__(self, told: Told) -> None:
        self.told = told
        self.asked: List[Tuple[Connection, Optional[int], Optional[IPAddress]]] = []
        self.theirs: FrozenSet[str] = frozenset()
        self.peers = Peers(lambda: 0.0)

    async def ask(
        self,
        connection: Connection,
        login_uid: Optional[int],
        deadline: Deadline,
        at: Optional[IPAddress] = None,
        theirs: FrozenSet[str] = frozenset(),
    ) -> Told:
        self.asked.append((connection, login_uid, at))
        self.theirs = theirs
        return self.told


# The record as pam_hook/adopt_wire.h lays it out, written by hand from the header; test_wire_pam.py compares it with
# what the C compiler says.
REQUEST_LAYOUT: Sequence[Tuple[str, str]] = (
    ("magic", "I"),
    ("version", "H"),
    ("size", "H"),
    ("phase", "B"),
    ("mode", "B"),
    ("action_no_jobs", "B"),
    ("action_unknown", "B"),
    ("action_adopt_failure", "B"),
    ("action_generic_failure", "B"),
    ("single_job_skip_rpc", "B"),
    ("join_container", "B"),
    ("disable_x11", "B"),
    ("family", "B"),
    ("remote_port", "H"),
    ("local_port", "H"),
    ("reserved", "H"),
    ("uid", "I"),
    ("timeout_ms", "I"),
    ("remote_address", "16s"),
    ("local_address", "16s"),
    ("service", "64s"),
    ("user", "256s"),
    ("nodename", "64s"),
)

_ACTIONS = {"ignore": 1, "allow": 2, "deny": 3, "newest": 4}


def pam_record(
    uid: int = ALICE,
    session: bool = False,
    observe: bool = False,
    over: Optional[Connection] = None,
    **changes: Union[int, bytes, str],
) -> bytes:
    """A request as the module would send it; an action may be given by its word, any field by its bytes."""
    values: Dict[str, Union[int, bytes]] = {
        "magic": 0x54504441,
        "version": 1,
        "size": struct.calcsize("=" + "".join(code for _, code in REQUEST_LAYOUT)),
        "phase": 2 if session else 1,
        "mode": 2 if observe else 1,
        "action_no_jobs": 3,
        "action_unknown": 4,
        "action_adopt_failure": 2,
        "action_generic_failure": 1,
        "single_job_skip_rpc": 1,
        "join_container": 1,
        "disable_x11": 0,
        "family": 0,
        "remote_port": 0,
        "local_port": 0,
        "reserved": 0,
        "uid": uid,
        "timeout_ms": 1000,
        "remote_address": b"",
        "local_address": b"",
        "service": b"sshd",
        "user": b"alice",
        "nodename": b"",
    }
    if over is not None:
        values.update(
            family=over.version,
            remote_address=over.source.address.packed,
            remote_port=over.source.port,
            local_address=over.destination.address.packed,
            local_port=over.destination.port,
        )
    for name, value in changes.items():
        if name not in values:
            raise KeyError(name)
        values[name] = _ACTIONS[value] if isinstance(value, str) else value
    codes = "=" + "".join(code for _, code in REQUEST_LAYOUT)
    return struct.pack(codes, *(values[name] for name, _ in REQUEST_LAYOUT))


# mypy holds the fakes to the interfaces they stand in for.
_BACKEND: Callable[[], JobBackend] = FakeBackend
_SEAL: Callable[[], Seal] = FakeSeal
_WITNESS: Callable[[], ConnectionWitness] = FakeWitness
_ASK: Callable[[Asker, Connection, Optional[int], Deadline], Awaitable[Told]] = Asker.ask
_FAKE_ASK: Callable[[FakeAsker, Connection, Optional[int], Deadline], Awaitable[Told]] = FakeAsker.ask
