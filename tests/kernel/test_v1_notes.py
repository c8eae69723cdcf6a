"""The job of an owner that has ended, where jobs are on cgroup v1, on v2, and on both: real cgroups, probe and ring.

The agent's part runs in a process of its own, in a mount namespace where v1 or v2 is hidden, with the ring read by the
real note taker. Ports that are watched are the test's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import pytest

from adoptd import probe
from adoptd.callerid import Inquiry
from adoptd.connections import Witnesses
from adoptd.connections.bpf import BpfWitness
from adoptd.deadline import Deadline
from adoptd.hierarchy import CgroupMounts, HierarchyKind
from adoptd.jobs.cgroup import CgroupJobs
from adoptd.jobs.template import JobPath
from adoptd.model import Connection
from adoptd.notes import NOTES_OF_USER_MAX, Notes, NoteTaker
from adoptd.probe.connects import OpenConnects, open_connects
from adoptd.probe.record import CONNECTED_OF_USER_MAX, decode_connected
from adoptd.workers import Workers
from kernel.actors import ALICE, BOB, LIBC, Line, actor, become, bound, connection_of, fork, listener
from kernel.cgroup_tree import V2, Cgroups
from lab.waiting import DEADLINE_S, PATIENCE, until

BUDGET_MS = 20_000.0
_CLONE_NEWNS, _MNT_DETACH = 0x20000, 2


@pytest.fixture(scope="module", autouse=True)
def legacy() -> Iterator[None]:
    """A v1 hierarchy without controllers, where the host mounts none of v1."""
    if any(each.kind is HierarchyKind.V1 for each in CgroupMounts().hierarchies()):
        yield
        return
    point = tempfile.mkdtemp(prefix=f"adoptd-test-{os.getpid()}-")
    name = f"adoptd{os.getpid()}"
    subprocess.run(["mount", "-t", "cgroup", "-o", f"none,name={name}", name, point], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", point], check=True)
        os.rmdir(point)


@pytest.fixture
def stack(cgroups: Cgroups) -> Iterator[contextlib.ExitStack]:
    """Ends before the cgroups go."""
    with contextlib.ExitStack() as opened:
        yield opened


def hide(kind: Optional[HierarchyKind]) -> None:
    """In this process alone: no hierarchy of this kind is mounted."""
    assert LIBC.unshare(_CLONE_NEWNS) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for each in CgroupMounts().hierarchies():
        if each.kind is kind:
            assert LIBC.umount2(os.fsencode(each.mount_point), _MNT_DETACH) == 0


class Agent:
    """What of an agent takes notes and answers, as a process; ``port`` is the one it watches."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        pins: Path,
        template: str,
        port: int,
        hidden: Optional[HierarchyKind] = None,
        taking: bool = True,
    ) -> None:
        def live(line: Line) -> None:
            hide(hidden)
            _Inside(pins, template, port).serve(line, taking)

        self._line = actor(stack, live)
        self.ready = self._line.hear()

    def ask(self, **question: Any) -> Dict[str, Any]:
        self._line.tell(question)
        return self._line.hear()

    def settle(self, asked: Connection, uid: int = ALICE) -> Dict[str, Any]:
        """What it answers: outcome, reason, job and moved."""
        ends = [(str(end.address), end.port) for end in (asked.source, asked.destination)]
        return self.ask(do="settle", source=ends[0], destination=ends[1], uid=uid)

    def knows(self, pid: int) -> bool:
        """Whether it has noted a connection of that process's."""
        return bool(self.ask(do="knows", pid=pid)["knows"])

    def noted(self) -> int:
        return int(self.ask(do="count")["count"])


class _Inside:
    """In the agent's process."""

    def __init__(self, pins: Path, template: str, port: int) -> None:
        mounts = CgroupMounts()
        self._backend = CgroupJobs(JobPath.parse_template(template), "", mounts)
        self._notes, self._pins = Notes(), pins
        self._opened = probe.open_probe(pins)
        workers = Workers("notes", 1, 1)
        self._taker = NoteTaker(
            self._notes, lambda: self._backend, lambda: open_connects(pins), (port,), workers, mounts
        )

    def serve(self, line: Line, taking: bool) -> None:
        if taking:
            self._take()
        line.tell({"attached": self._taker.attached})
        while True:
            question = line.hear()
            line.tell(getattr(self, "_" + question.pop("do"))(**question))

    def _take(self) -> Dict[str, Any]:
        attached = threading.Event()

        async def run() -> None:
            task = asyncio.create_task(self._taker.run())
            while not attached.is_set():
                await asyncio.sleep(0.05)
                # After its first look it is attached, or it is not going to be.
                if task.done() or self._taker.looked:
                    attached.set()
            await task

        threading.Thread(target=lambda: asyncio.run(run()), daemon=True).start()
        assert attached.wait(DEADLINE_S)
        return {}

    def _count(self) -> Dict[str, Any]:
        return {"count": len(self._notes)}

    def _knows(self, pid: int) -> Dict[str, Any]:
        return {"knows": any(key[0] == pid for key in list(self._notes._notes))}

    def _settle(self, source: Sequence[Any], destination: Sequence[Any], uid: int) -> Dict[str, Any]:
        workers, hearing = Workers("test", 2, 8), Witnesses([BpfWitness(self._opened)])
        asked = connection_of({"source": source, "destination": destination})
        inquiry = Inquiry(hearing, self._backend, workers, notes=self._notes)
        settled = asyncio.run(inquiry.settle(asked, uid, Deadline.after_ms(BUDGET_MS)))
        job = None if settled.job is None else settled.job.id
        return {"outcome": settled.outcome.value, "reason": settled.reason.value, "job": job, "moved": settled.moved}


class Scene:
    """Jobs A and B of ALICE's in one hierarchy, and a server."""

    def __init__(self, stack: contextlib.ExitStack, tree: Cgroups, labels: Sequence[str]) -> None:
        self.stack, self.tree, self.labels = stack, tree, tree.need(*labels)
        self.jobs = {name: tree.job(ALICE, name, labels) for name in "AB"}
        self.template = tree.top + "/uid_{uid}/job_{job}"
        self.server = listener(stack, backlog=4096)
        self.port = int(self.server.getsockname()[1])

    def enter(self, name: str, pid: int = 0) -> None:
        for label in self.labels:
            (self.tree.at(label, self.jobs[name]) / "cgroup.procs").write_text(str(pid or os.getpid()))

    def agent(self, pins: Path, hidden: Optional[HierarchyKind] = None, taking: bool = True) -> Agent:
        return Agent(self.stack, pins, self.template, self.port, hidden, taking)

    def connected(self, ends: bool = True, reap: bool = True) -> Any:
        """A process of ALICE's that connects from job A, and ``ends``; its parent holds the connection, on the line."""

        def live(line: Line) -> None:
            client = bound()
            port = client.getsockname()[1]
            stay, let_go = os.pipe()

            def connect() -> None:
                os.close(let_go)
                self.enter("A")
                become(ALICE)
                client.connect(self.server.getsockname())
                os.read(stay, 1)

            pid = fork(connect)
            until(lambda: _is_connected(client), "connected")
            line.say(client, port, pid=pid)
            if ends:
                line.hear()
                os.close(let_go)
                if reap:
                    os.waitpid(pid, 0)
                else:
                    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
                line.tell({"ended": True})
            line.wait()

        line = actor(self.stack, live)
        return line, line.hear()


def _is_connected(client: socket.socket) -> bool:
    try:
        client.getpeername()
    except OSError:
        return False
    return True


def a_controller(tree: Cgroups) -> str:
    """A v1 hierarchy of this host, which any process may be in whatever else it is in."""
    found = [each for each in tree.hierarchies.values() if each.kind is HierarchyKind.V1]
    # Not cpuset: a new group of that takes no process before it has processors.
    return next(each.label for each in found if "cpuset" not in each.controllers)


def end(line: Line) -> None:
    """Have the process that connected end."""
    line.tell({"end": True})
    assert line.hear() == {"ended": True}


JOB_A = {"outcome": "job", "reason": "owner", "job": "A", "moved": False}
NOT_TOLD = {"outcome": "unknown", "reason": "job_not_told", "job": None, "moved": False}


@pytest.mark.parametrize(
    ("jobs_on", "hidden"),
    [
        (HierarchyKind.V1, None),
        (HierarchyKind.V1, HierarchyKind.V2),
        (HierarchyKind.V2, None),
        (HierarchyKind.V2, HierarchyKind.V1),
    ],
    ids=["hybrid, jobs on v1", "v1 only", "hybrid, jobs on v2", "v2 only"],
)
def test_the_job_of_an_owner_that_has_ended(
    shared_pin_dir: Path,
    cgroups: Cgroups,
    stack: contextlib.ExitStack,
    jobs_on: HierarchyKind,
    hidden: Optional[HierarchyKind],
) -> None:
    """Known from the note taken at connect(), or by the cgroup's id; on v2 alone nothing needs to be noted."""
    scene = Scene(stack, cgroups, [a_controller(cgroups) if jobs_on is HierarchyKind.V1 else V2])
    agent = scene.agent(shared_pin_dir, hidden)
    assert agent.ready == {"attached": hidden is not HierarchyKind.V1}
    line, facts = scene.connected()
    asked = connection_of(facts)
    if hidden is not HierarchyKind.V1:
        until(lambda: agent.knows(facts["pid"]), "noted")
    assert agent.settle(asked) == JOB_A
    end(line)
    assert not Path(f"/proc/{facts['pid']}").exists()
    assert agent.settle(asked) == JOB_A
    assert agent.settle(asked, BOB) == {"outcome": "unknown", "reason": "other_user", "job": None, "moved": False}
    assert agent.noted() == (0 if hidden is HierarchyKind.V1 else 1)


def test_a_cgroup_of_v2_that_is_gone_tells_nothing(
    shared_pin_dir: Path,
    cgroups: Cgroups,
    stack: contextlib.ExitStack,
) -> None:
    """The owner and its job have ended: the id is of no cgroup (ESTALE), and nothing is guessed."""
    scene = Scene(stack, cgroups, [V2])
    agent = scene.agent(shared_pin_dir, HierarchyKind.V1)
    line, facts = scene.connected()
    end(line)
    assert agent.settle(connection_of(facts)) == JOB_A
    cgroups.remove(scene.jobs["A"])
    assert agent.settle(connection_of(facts)) == NOT_TOLD


def test_without_a_note_it_is_not_told(
    shared_pin_dir: Path,
    cgroups: Cgroups,
    stack: contextlib.ExitStack,
) -> None:
    """The agent comes to look when the owner has ended: it is in no cgroup then, which is not taken for no job."""
    scene = Scene(stack, cgroups, [a_controller(cgroups)])
    # A first one has the port watched and is gone: what is told then waits in the ring.
    with contextlib.ExitStack() as first:
        Agent(first, shared_pin_dir, scene.template, scene.port)
    agent = scene.agent(shared_pin_dir, taking=False)
    with contextlib.closing(open_connects(shared_pin_dir)) as connects:
        connects.watch([scene.port])
    line, facts = scene.connected(reap=False)
    end(line)
    assert agent.settle(connection_of(facts)) == NOT_TOLD, "a process that is only waited for is in no job"
    agent.ask(do="take")
    # What is told is read in order, so that was before.
    _, later = scene.connected(ends=False)
    until(lambda: agent.knows(later["pid"]), "a later one is noted")
    assert agent.settle(connection_of(facts)) == NOT_TOLD


def test_who_moves_afterwards_does_not_take_the_connection_along(
    shared_pin_dir: Path,
    cgroups: Cgroups,
    stack: contextlib.ExitStack,
) -> None:
    """On v1 too the job is the one it was connected from; the answer says that the owner has left it."""
    scene = Scene(stack, cgroups, [a_controller(cgroups)])
    agent = scene.agent(shared_pin_dir)
    _, facts = scene.connected(ends=False)
    until(lambda: agent.knows(facts["pid"]), "noted")
    scene.enter("B", facts["pid"])
    assert agent.settle(connection_of(facts)) == {**JOB_A, "moved": True}


def flood(port: int, uid: int, most: int) -> Callable[[Line], None]:
    """Connects and resets, as fast as it goes."""

    def live(line: Line) -> None:
        become(uid)
        done = 0
        while done < most:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", port))
                done += 1
        line.tell({"done": done})
        line.wait()

    return live


def drain(server: socket.socket) -> None:
    server.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            server.accept()[0].close()


def test_a_flood_disturbs_nobody_else(
    shared_pin_dir: Path,
    cgroups: Cgroups,
    stack: contextlib.ExitStack,
) -> None:
    """BOB connects as fast as one can: what he is noted for is bounded, and ALICE's connection is noted."""
    scene = Scene(stack, cgroups, [a_controller(cgroups)])
    agent = scene.agent(shared_pin_dir)
    with probe.open_probe(shared_pin_dir) as opened:
        before = opened.counters()
        bob = actor(stack, flood(scene.port, BOB, 20_000))
        until(lambda: opened.counters()["connect_withheld"] > before["connect_withheld"], "BOB is too fast")
        drain(scene.server)
        line, facts = scene.connected()
        until(lambda: agent.knows(facts["pid"]), "ALICE's connection is noted")
        bob.hear()
        after = opened.counters()
    told = after["connects"] - before["connects"]
    lost = after["connect_lost"] - before["connect_lost"]
    assert told + after["connect_withheld"] - before["connect_withheld"] + lost == 20_001
    # An emulated machine may not read as fast as it is told.
    assert lost == 0 or PATIENCE > 1
    end(line)
    assert agent.settle(connection_of(facts)) == JOB_A
    assert agent.noted() <= NOTES_OF_USER_MAX + 1


def test_a_full_buffer_is_counted_and_got_over(
    shared_pin_dir: Path,
    cgroups: Cgroups,
    stack: contextlib.ExitStack,
) -> None:
    """Nobody reads, and many users connect: what does not fit is counted; once it is read, notes are taken again."""
    scene = Scene(stack, cgroups, [a_controller(cgroups)])
    with contextlib.closing(open_connects(shared_pin_dir)) as connects:
        connects.watch([scene.port])
    with probe.open_probe(shared_pin_dir) as opened:
        lost = opened.counters()["connect_lost"]
        # 24 bytes each of 64 KiB; each user has a share of its own.
        uids = range(62_000, 62_000 + 4 * 65536 // 24 // CONNECTED_OF_USER_MAX)
        for uid in uids:
            actor(stack, flood(scene.port, uid, CONNECTED_OF_USER_MAX)).hear()
            drain(scene.server)
            if opened.counters()["connect_lost"] > lost:
                break
        assert opened.counters()["connect_lost"] > lost
        agent = scene.agent(shared_pin_dir)
        with contextlib.closing(open_connects(shared_pin_dir)) as connects:
            until(lambda: not select.select([connects.ring], [], [], 0)[0], "all is read")
        told = opened.counters()["connects"]
        line, facts = scene.connected()
        assert opened.counters()["connects"] == told + 1
        until(lambda: agent.knows(facts["pid"]), "noted")
    end(line)
    assert agent.settle(connection_of(facts)) == JOB_A


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_what_is_told_is_what_the_label_says(shared_pin_dir: Path, stack: contextlib.ExitStack, address: str) -> None:
    """Of connections to the watched ports, pid and time as on the label; of others nothing is told."""
    watched, other = listener(stack, address), listener(stack, address)
    connects = open_connects(shared_pin_dir)
    stack.callback(connects.close)
    connects.watch([9, watched.getsockname()[1]])
    stack.callback(connects.watch, [])
    read_all(connects)
    with probe.open_probe(shared_pin_dir) as opened:
        records = []
        for server in (other, watched):
            client = stack.enter_context(bound(address))
            client.connect(server.getsockname())
            asked = connection_of({"source": client.getsockname()[:2], "destination": client.getpeername()[:2]})
            records.append(opened.ask(asked).record)
    record = records[1]
    assert record is not None
    assert read_all(connects) == [(os.getpid(), record.labelled_at_ns)]


def read_all(connects: OpenConnects) -> List[Any]:
    return [decode_connected(event) for event in connects.ring.read(4096)]
