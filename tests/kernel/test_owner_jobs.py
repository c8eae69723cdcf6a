"""Which job a connection is of, on real cgroups and real sockets: what happens to its owner afterwards changes nothing.

The whole inquiry is asked, as the agent asks it: every witness, the cgroup backend, and what they come to together.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import pytest

from adoptd.callerid import Inquiry, Settled
from adoptd.connections import ConnectionWitness, Witnesses
from adoptd.connections.bpf import BpfWitness
from adoptd.connections.diag import DiagWitness
from adoptd.connections.proc import ProcWitness
from adoptd.deadline import Deadline
from adoptd.jobs import CgroupFinding, CgroupVerdict, JobBackend
from adoptd.model import Connection, Witness
from adoptd.probe.pins import OpenProbe
from adoptd.process import started_ns, was_started_before
from adoptd.wire.callerid import Outcome, Reason
from adoptd.workers import Workers
from kernel.actors import (
    ALICE,
    BOB,
    LIBC,
    Line,
    actor,
    become,
    bound,
    connection_of,
    fill_option_memory,
    fork,
    listener,
)
from kernel.cgroup_tree import V2, Cgroups
from kernel.sockets import cgroup2_mount, remove_cgroup
from lab.waiting import until

BUDGET_MS = 20_000.0
_SYS_CLONE3 = 435


class OnlyProcesses:
    """The cgroup backend as on a host whose jobs are on version 1: a cgroup's id tells it nothing."""

    def __init__(self, inner: JobBackend) -> None:
        self._inner = inner

    def job_of_cgroup(self, cgroup_id: int, pid: Optional[int] = None) -> CgroupVerdict:
        return CgroupVerdict(CgroupFinding.CANNOT_TELL, "version 1")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Scene:
    """Jobs A and B of ALICE's, and an agent's inquiry."""

    def __init__(self, stack: contextlib.ExitStack, tree: Cgroups, opened: OpenProbe) -> None:
        self.stack = stack
        self.paths = {name: tree.at(V2, tree.job(ALICE, name, [V2])) for name in "AB"}
        self.outside = tree.at(V2, f"{tree.top}/outside")
        self.outside.mkdir()
        self.backend: Any = tree.jobs()
        self._diag = DiagWitness()
        stack.callback(self._diag.close)
        self.witnesses: Tuple[ConnectionWitness, ...] = (BpfWitness(opened), self._diag, ProcWitness())
        self.server = listener(stack)

    def connected(self, life: Callable[[Line], None]) -> Tuple[Line, Connection, Dict[str, Any]]:
        """Someone who connects as ``life`` says, and the connection."""
        line = actor(self.stack, life)
        facts = line.hear()
        return line, connection_of(facts), facts

    def settle(self, asked: Connection, uid: int = ALICE) -> Settled:
        """What this node says of the connection to the node that ``uid`` logs in on."""
        workers, hearing = Workers("test", 2, 8), Witnesses(self.witnesses)
        try:
            return asyncio.run(Inquiry(hearing, self.backend, workers).settle(asked, uid, Deadline.after_ms(BUDGET_MS)))
        finally:
            workers.close()
            hearing.close()


@pytest.fixture
def scene(cgroups: Cgroups, opened: OpenProbe) -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        yield Scene(stack, cgroups, opened)


def enter(path: Path) -> None:
    """Move this process into a cgroup."""
    (path / "cgroup.procs").write_text(str(os.getpid()))


def move(pid: int, path: Path) -> None:
    """Move another process into a cgroup."""
    (path / "cgroup.procs").write_text(str(pid))


def in_job_a(scene: Scene) -> Callable[[Line], None]:
    """ALICE's process that connects from job A and stays."""

    def live(line: Line) -> None:
        enter(scene.paths["A"])
        become(ALICE)
        client = bound()
        line.say(client, connect(scene, client))
        line.wait()

    return live


def connect(scene: Scene, client: socket.socket) -> int:
    port = int(client.getsockname()[1])
    client.connect(scene.server.getsockname())
    return port


def start_with_pid(pid: int, life: Callable[[], None]) -> None:
    """Fork a child that has ``pid``, which must be free (clone3 with set_tid, Linux 5.5)."""
    wanted = array.array("i", [pid])
    # struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, its size
    address, _ = wanted.buffer_info()
    arguments = ctypes.create_string_buffer(struct.pack("=10Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, address, 1))
    found = LIBC.syscall(_SYS_CLONE3, arguments, ctypes.c_size_t(80))
    if found == 0:
        try:
            life()
        finally:
            os._exit(1)
    assert found == pid, f"pid {pid} cannot be had: {os.strerror(ctypes.get_errno())}"


def test_witnesses_that_name_two_jobs_are_not_believed(scene: Scene) -> None:
    """A socket made in one job and connected in another: unknown, and what is logged names both."""

    def live(line: Line) -> None:
        enter(scene.paths["A"])
        os.seteuid(ALICE)
        client = bound()
        os.seteuid(0)
        enter(scene.paths["B"])
        become(ALICE)
        line.say(client, connect(scene, client))
        line.wait()

    _, asked, _ = scene.connected(live)
    settled = scene.settle(asked)
    assert (settled.outcome, settled.reason) == (Outcome.UNKNOWN, Reason.DISAGREEMENT)
    assert "bpf: job B, diag: job A" in settled.detail


def test_witnesses_that_name_two_users_are_not_believed(scene: Scene) -> None:
    """A socket made by one user and connected by another: unknown for both."""

    def live(line: Line) -> None:
        enter(scene.paths["A"])
        os.seteuid(BOB)
        client = bound()
        os.seteuid(0)
        become(ALICE)
        line.say(client, connect(scene, client))
        line.wait()

    _, asked, _ = scene.connected(live)
    for uid in (ALICE, BOB):
        settled = scene.settle(asked, uid)
        assert (settled.outcome, settled.reason) == (Outcome.UNKNOWN, Reason.DISAGREEMENT)
        assert f"bpf says uid {ALICE}, diag says uid {BOB}" in settled.detail


def test_another_users_login_learns_nothing(scene: Scene) -> None:
    """The connection is passed to BOB, who logs in over it: whose it is, and in which job, is not told."""
    _, asked, _ = scene.connected(in_job_a(scene))
    settled = scene.settle(asked, BOB)
    assert (settled.outcome, settled.reason, settled.job) == (Outcome.UNKNOWN, Reason.OTHER_USER, None)


@pytest.mark.parametrize("knows_cgroups", [True, False], ids=["jobs on v2", "jobs on v1"])
def test_a_pid_used_again_is_not_the_owner(scene: Scene, knows_cgroups: bool) -> None:
    """The owner has ended and a process of another job has its pid: job A where ids tell, else unknown; never job B."""

    def live(line: Line) -> None:
        client = bound()
        port = client.getsockname()[1]

        def connect_in_a() -> None:
            enter(scene.paths["A"])
            become(ALICE)
            client.connect(scene.server.getsockname())

        pid = fork(connect_in_a)
        assert os.waitpid(pid, 0)[1] == 0
        connected_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        ticks = os.sysconf("SC_CLK_TCK")
        until(lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME) - connected_ns > 2e9 / ticks, "two clock ticks")
        ready, done = os.pipe()

        def stranger() -> None:
            enter(scene.paths["B"])
            become(ALICE)
            os.write(done, b"1")
            signal.pause()

        start_with_pid(pid, stranger)
        assert os.read(ready, 1) == b"1"
        line.say(client, port, pid=pid)
        line.wait()

    _, asked, facts = scene.connected(live)
    assert started_ns(facts["pid"]) is not None, "somebody has the pid"
    owner = scene.witnesses[0].owner_of(asked, Deadline.after_ms(BUDGET_MS))
    assert owner is not None
    assert owner.pid == facts["pid"]
    assert owner.connected_at_ns is not None
    assert not was_started_before(facts["pid"], owner.connected_at_ns)
    # The process that made the socket is in no job, and sock_diag would say so.
    scene.witnesses = scene.witnesses[:1]
    if not knows_cgroups:
        scene.backend = OnlyProcesses(scene.backend)
        settled = scene.settle(asked)
        assert (settled.outcome, settled.reason) == (Outcome.UNKNOWN, Reason.JOB_NOT_TOLD)
        return
    settled = scene.settle(asked)
    assert settled.job is not None
    assert (settled.outcome, settled.job.id, settled.moved) == (Outcome.JOB, "A", False)


def test_the_job_of_a_process_that_moved_is_the_one_it_connected_from(scene: Scene) -> None:
    """Moved out, into another job, and back: the answer stays, and says whether it is elsewhere now."""
    _, asked, facts = scene.connected(in_job_a(scene))
    seen = [scene.settle(asked)]
    for place in (scene.outside, scene.paths["B"], scene.paths["A"]):
        move(facts["pid"], place)
        seen.append(scene.settle(asked))
    assert [each.job.id for each in seen if each.job is not None] == ["A"] * 4
    assert [each.moved for each in seen] == [False, True, True, False]
    assert seen[0].owner is not None
    assert seen[0].owner.witness is Witness.BPF


def test_the_job_of_an_owner_that_has_ended(scene: Scene) -> None:
    """By the id of the cgroup it connected from, while another process holds the connection."""

    def live(line: Line) -> None:
        enter(scene.paths["A"])
        become(ALICE)
        client = bound()
        port = client.getsockname()[1]
        pid = fork(lambda: client.connect(scene.server.getsockname()))
        assert os.waitpid(pid, 0)[1] == 0
        line.say(client, port, pid=pid)
        line.wait()

    _, asked, facts = scene.connected(live)
    assert not Path(f"/proc/{facts['pid']}").exists()
    settled = scene.settle(asked)
    assert settled.job is not None
    assert (settled.outcome, settled.job.id, settled.moved) == (Outcome.JOB, "A", False)


def test_where_the_process_is_stands_in_for_a_cgroup_that_is_gone(scene: Scene) -> None:
    """Moved to another job of its user's, and the one it connected from has ended: no id tells of that any more.

    That it was moved is known all the same: a cgroup with a process in it cannot be removed.
    """
    _, asked, facts = scene.connected(in_job_a(scene))
    move(facts["pid"], scene.paths["B"])
    remove_cgroup(scene.paths["A"])
    settled = scene.settle(asked)
    assert settled.job is not None
    assert (settled.outcome, settled.job.id, settled.moved) == (Outcome.JOB, "B", True)


def test_a_label_refused_leaves_the_users_own_job(scene: Scene) -> None:
    """Option memory used up: sock_diag names the user and the job the socket was made in, never anybody else's."""

    def live(line: Line) -> None:
        enter(scene.paths["A"])
        os.seteuid(ALICE)
        client = bound()
        os.seteuid(0)
        fill_option_memory(client)
        become(ALICE)
        line.say(client, connect(scene, client))
        line.wait()

    _, asked, _ = scene.connected(live)
    settled = scene.settle(asked)
    assert settled.owner is not None
    assert settled.job is not None
    assert (settled.owner.witness, settled.owner.uid, settled.job.id) == (Witness.DIAG, ALICE, "A")
    assert scene.settle(asked, BOB).reason is Reason.OTHER_USER


def test_a_thread_in_a_cgroup_of_its_own_is_in_the_job(scene: Scene) -> None:
    """Threaded cgroups below a job's, as whoever has a delegated cgroup can make: still that job."""
    threads = scene.paths["A"] / "threads"

    def live(line: Line) -> None:
        enter(scene.paths["A"])
        become(ALICE)
        client = bound()
        port = client.getsockname()[1]

        def run() -> None:
            line.tell({"thread": threading.get_native_id()})
            line.hear()
            client.connect(scene.server.getsockname())

        connecting = threading.Thread(target=run)
        connecting.start()
        connecting.join()
        line.say(client, port)
        line.wait()

    line = actor(scene.stack, live)
    thread = line.hear()["thread"]
    threads.mkdir()
    (threads / "cgroup.type").write_text("threaded")
    (threads / "cgroup.threads").write_text(str(thread))
    line.tell({"go": True})
    facts = line.hear()
    asked = connection_of(facts)
    owner = scene.witnesses[0].owner_of(asked, Deadline.after_ms(BUDGET_MS))
    assert owner is not None
    assert (owner.pid, owner.cgroup_id) == (facts["pid"], threads.stat().st_ino)
    settled = scene.settle(asked)
    assert settled.job is not None
    assert (settled.outcome, settled.job.id) == (Outcome.JOB, "A")


def test_the_id_is_that_of_the_cgroup_on_this_host(scene: Scene) -> None:
    """What bpf and diag call the cgroup is the inode number of its directory, in the hierarchy that is mounted."""
    _, asked, _ = scene.connected(in_job_a(scene))
    owners = [each.owner_of(asked, Deadline.after_ms(BUDGET_MS)) for each in scene.witnesses[:2]]
    assert [owner and owner.cgroup_id for owner in owners] == [scene.paths["A"].stat().st_ino] * 2
    assert scene.paths["A"].is_relative_to(cgroup2_mount())
