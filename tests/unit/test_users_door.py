"""The users' door with the real commands behind it: streams, who is meant by a socket that was handed on, fairness."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, AsyncIterator, Awaitable, Callable, Dict, List, Tuple

import pytest
from control_scene import ControlScene
from fakes import ALICE, BOB, FakeBackend, job, until
from nobody import NOBODY, environment, nobody_command, public_path

from adoptd.client import AgentError, follow_agent
from adoptd.control import Asking, CommandRefused, Control
from adoptd.control.watching import shown
from adoptd.deadline import Deadline
from adoptd.events import BACKLOG, WATCHERS_MAX_PER_UID, Event, EventKind
from adoptd.handlers import Desk, Handlers
from adoptd.metrics import Door
from adoptd.model import Job, JobFault, JobManagerError
from adoptd.printing import print_sessions
from adoptd.process import open_process
from adoptd.server import USER_MAX_PER_UID, Doorkeeper
from adoptd.sessions import Strays
from adoptd.sessions.whereabouts import Found, Place
from adoptd.sockets import bind_unix
from adoptd.wire import control as control_wire
from adoptd.wire import frame
from adoptd.wire.control import Command, Result

__all__ = ["public_path"]


class Agent:
    """The users' door, and what is behind it over fakes."""

    def __init__(self, path: Path) -> None:
        self.path = str(path / "user")
        self.backend = FakeBackend(job("17"), Job("9", NOBODY, 0, (3,)))
        self.behind = ControlScene(self.backend)
        self.sessions, self.events, self.metrics = self.behind.sessions, self.behind.events, self.behind.metrics
        desk = Desk(self.behind.adoptions, None, self.behind.control, 300)
        self.handlers = Handlers(lambda: desk, self.metrics, self.events)
        listener = bind_unix(self.path, 0o666)
        self.door = Doorkeeper(Door.USER, [listener], self.handlers.user, self.metrics, 2.0, 64, 32)
        self.door.open()

    def publish(self, count: int = 1, kind: EventKind = EventKind.ADOPTION, uid: int = ALICE, size: int = 1) -> None:
        for number in range(count):
            self.events.publish(Event(kind, uid, {"n": number, "stages": "s" * size, "detail": "secret"}))

    @property
    def watchers(self) -> int:
        return sum(not each.closed for each in self.events._subscriptions)

    async def close(self) -> None:
        self.events.close()
        await self.door.close(2.0)
        self.behind.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}


@contextlib.asynccontextmanager
async def agent(directory: Path) -> AsyncIterator[Agent]:
    made = Agent(directory)
    try:
        yield made
    finally:
        await made.close()


def run(story: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(story())  # type: ignore[arg-type]


class Client:
    """A connection on which a command was sent, and its replies."""

    def __init__(self, path: str, name: str, **arguments: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.socket.setblocking(False)
        self.socket.send(frame.encode_frame(control_wire.encode_command(Command(name, arguments)), 8192))

    async def reply(self) -> Any:
        (length,) = struct.unpack("!I", await self._exactly(4))
        return control_wire.decode_reply(await self._exactly(length))

    async def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.socket, count - len(data)), 5.0)
            assert chunk, "closed"
            data += chunk
        return data


# ---- watch


def test_events_as_they_happen_until_the_agent_stops(tmp_path: Path) -> None:
    """A first reply that says it has begun, each event, and a last one."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            client = Client(here.path, "watch")
            assert await client.reply() == {"watching": True}
            here.publish(2)
            first, second = await client.reply(), await client.reply()
            assert (first["kind"], first["n"], second["n"], first["uid"]) == ("adoption", 0, 1, ALICE)
            assert first["detail"] == "secret"
            here.events.close()
            assert await client.reply() == {"end": "the agent is stopping"}
            await until(lambda: here.watchers == 0)
            client.socket.close()

    run(story)


def test_only_what_was_asked_for(tmp_path: Path) -> None:
    """By kind and by user."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            client = Client(here.path, "watch", kinds="denial,escape", user="nobody")
            await client.reply()
            here.publish(uid=NOBODY)
            here.publish(kind=EventKind.DENIAL, uid=BOB)
            here.publish(kind=EventKind.ESCAPE, uid=NOBODY)
            told = await client.reply()
            assert (told["kind"], told["uid"]) == ("escape", NOBODY)
            client.socket.close()

    run(story)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kinds": "logins"}, "kinds are 'logins', expected some of adoption, denial"),
        ({"kinds": "adoption,"}, "kinds are 'adoption,'"),
        ({"user": "no-such-user-here"}, "there is no user 'no-such-user-here'"),
        ({"since": "1"}, "watch takes nothing and may take kinds, user, got since"),
    ],
)
def test_a_watch_that_is_refused(tmp_path: Path, arguments: Dict[str, str], words: str) -> None:
    """In words, and nobody watches then."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            client = Client(here.path, "watch", **arguments)
            told = await client.reply()
            assert isinstance(told, str)
            assert words in told
            await until(lambda: here.watchers == 0)
            client.socket.close()

    run(story)


def test_an_ordinary_user_sees_their_own_and_not_all_of_it(public_path: Path) -> None:
    """Through the socket, as the kernel says who asks."""
    code = """
import json
for event in client.follow_agent(sys.argv[1], Command("watch", {}), 1):
    print(json.dumps(event), flush=True)
"""

    async def story() -> None:
        async with agent(public_path) as here:
            process = await asyncio.create_subprocess_exec(
                *nobody_command(code, here.path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
            )
            assert process.stdout is not None
            assert b"watching" in await asyncio.wait_for(process.stdout.readline(), 20)
            for uid in (0, ALICE, NOBODY, BOB):
                here.publish(uid=uid)
            here.events.publish(Event(EventKind.CALLERID, None, {"peer": "10.0.0.1"}))
            here.events.close()
            out, err = await asyncio.wait_for(process.communicate(), 20)
            assert out.count(b"\n") == 1
            assert b'"uid": 65534' in out
            assert b"secret" not in out
            assert b"the agent is stopping" in err

    run(story)


def test_what_is_the_administrator_s_is_not_shown_to_others() -> None:
    """Who asked, and what names other users' processes."""
    fields = {"peer": "10.0.0.1", "detail": "pid 7 of uid 1002", "by_uid": 0, "mover_pid": 1, "mover_uid": 0,
              "mover_comm": "sh", "job": "17", "witness": None}  # fmt: skip
    event = Event(EventKind.CALLERID, ALICE, fields, 5.0)
    assert shown(event, ALICE) == {"kind": "callerid", "at": 5.0, "uid": ALICE, "job": "17"}
    assert set(shown(event, 0)) == {"kind", "at", "uid", *fields} - {"witness"}


def test_a_watcher_who_does_not_read_loses_events_and_holds_up_nobody(tmp_path: Path) -> None:
    """The agent goes on; the watcher is told how many it has lost, and sees the newest."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            lazy, busy = Client(here.path, "watch"), Client(here.path, "watch")
            await lazy.reply()
            await busy.reply()
            sent = 3 * BACKLOG
            for number in range(sent):
                here.events.publish(Event(EventKind.ADOPTION, ALICE, {"n": number, "stages": "s" * 2000}))
                assert (await busy.reply())["n"] == number
            got: List[int] = []
            dropped = 0
            while not got or got[-1] != sent - 1:
                told = await lazy.reply()
                dropped += told.get("dropped", 0)
                got += [told["n"]] if "n" in told else []
            assert dropped > 0
            assert len(got) + dropped == sent
            lazy.socket.close()
            busy.socket.close()

    run(story)


def test_a_watcher_who_goes_makes_room_though_nothing_happens(tmp_path: Path) -> None:
    """Also one with events that were not read."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            for unread in (0, 2000):
                client = Client(here.path, "watch")
                await client.reply()
                assert here.watchers == 1
                here.publish(unread, size=1000)
                client.socket.close()
                await until(lambda: here.watchers == 0)

    run(story)


def test_one_user_s_watches_are_bounded(public_path: Path) -> None:
    """Two, and the third is told why not; root still watches."""
    code = f"""
watches = [client.follow_agent(sys.argv[1], Command("watch", {{}}), 1) for _ in range({WATCHERS_MAX_PER_UID + 1})]
try:
    for each in watches:
        next(each)
except client.AgentError as error:
    print(error)
"""

    async def story() -> None:
        async with agent(public_path) as here:
            process = await asyncio.create_subprocess_exec(
                *nobody_command(code, here.path), stdout=subprocess.PIPE, env=environment()
            )
            out, _ = await asyncio.wait_for(process.communicate(), 20)
            assert f"uid {NOBODY} is watching {WATCHERS_MAX_PER_UID} times already" in out.decode()
            root = Client(here.path, "watch")
            assert await root.reply() == {"watching": True}
            root.socket.close()

    run(story)


def test_the_client_ends_when_nobody_reads_its_output(tmp_path: Path) -> None:
    """Without an event: the pipe itself says so."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            reader, writer = os.pipe()

            def follow() -> str:
                try:
                    for _ in follow_agent(here.path, Command("watch", {}), writer):
                        os.close(reader)
                except BrokenPipeError:
                    return "gone"
                except AgentError as error:
                    return str(error)
                return "ended"

            assert await asyncio.get_running_loop().run_in_executor(None, follow) == "gone"
            os.close(writer)
            await until(lambda: here.watchers == 0)

    run(story)


# ---- who is meant


def test_a_socket_that_was_handed_on_speaks_for_who_connected(public_path: Path) -> None:
    """What an ordinary user connected stays theirs, though it is root who sends the command over it."""

    async def story() -> None:
        async with agent(public_path) as here:
            connects = subprocess.Popen(
                [sys.executable, "-c", _CONNECT_AND_HAND_ON, here.path, str(NOBODY)],
                stdout=subprocess.PIPE,
                env=environment(),
            )
            out, _ = await asyncio.get_running_loop().run_in_executor(None, lambda: connects.communicate(timeout=60))
            pids, reply = out.split(b"\n", 1)
            connected, sent = pids.split()
            told = control_wire.decode_reply(reply)
            assert isinstance(told, dict)
            assert (told["uid"], told["pid"]) == (NOBODY, int(connected))
            assert int(sent) == connects.pid

    run(story)


# ---- where there is nothing to tell of


def test_where_no_job_can_run_whereami_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A login node: its agent answers other nodes, and there is no slurmd. Other faults are told as they are."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            said = "slurmd's spool directory /var/spool/slurmd: No such file or directory"
            for fault, helps in ((JobFault.SPOOL_UNREADABLE, True), (JobFault.OTHER, False)):

                def fail(uid: int, deadline: Deadline, fault: JobFault = fault) -> Tuple[Job, ...]:
                    raise JobManagerError(said, fault)

                monkeypatch.setattr(here.backend, "jobs_of", fail)
                client = Client(here.path, "whereami")
                told = await client.reply()
                client.socket.close()
                assert said in told
                assert ("login node" in told, "squeue --me" in told) == (helps, helps)

    run(story)


def test_where_no_job_can_run_jobs_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To root and to others."""

    async def story() -> None:
        async with agent(tmp_path) as here:

            def fail(deadline: Deadline) -> Tuple[Job, ...]:
                raise JobManagerError("slurmd's spool directory: gone", JobFault.SPOOL_UNREADABLE)

            monkeypatch.setattr(here.backend, "all_jobs", fail)
            client = Client(here.path, "jobs")
            told = await client.reply()
            client.socket.close()
            assert "login node" in told

    run(story)


def test_sessions_have_what_is_outside_of_their_jobs(tmp_path: Path) -> None:
    """As the gauge counts it, and those that have ended for as long as something of theirs is outside."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
            for pid in (os.getpid(), child.pid):
                with open_process(pid) as process:
                    here.sessions.add(
                        process,
                        uid=ALICE,
                        user="alice",
                        job=job("17"),
                        witness=None,
                        reason="only_job",
                        connection=None,
                        service="sshd",
                        stages=(),
                    )
            mine, childs = here.sessions.all()
            child.communicate()
            await until(lambda: len(here.sessions) == 1)

            async def listed() -> List[Any]:
                client = Client(here.path, "sessions")
                rows = (await client.reply())["sessions"]
                client.socket.close()
                return [(row["session"], row["outside"], row["job_ended"], row["ended"]) for row in rows]

            assert await listed() == [(mine.id, [], False, False)]
            here.sessions.strays = {childs.id: Strays({9: Found(9, Place.JOB_ENDED, "0::/x\n")})}
            left = [{"pid": 9, "cgroup": "/x"}]
            assert await listed() == [(mine.id, [], False, False), (childs.id, left, True, True)]
            here.sessions.strays = {mine.id: Strays({9: Found(9, Place.OUTSIDE, "0::/x\n")})}
            assert await listed() == [(mine.id, left, False, False)]
            # In cgroups of any name, and as many as are looked at: root's own command must not break of it.
            many = {pid: Found(pid, Place.OUTSIDE, "0::/" + "\udcff" * 400 + "\n") for pid in range(64)}
            here.sessions.strays = {mine.id: Strays(many)}
            client = Client(here.path, "sessions")
            row = (await client.reply())["sessions"][0]
            client.socket.close()
            assert (len(row["outside"]), row["outside_count"]) == (8, 64)

    run(story)


def test_what_is_outside_is_a_line_below_its_session(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"session": "8-1", "user": "alice", "job": "17", "since": 0.0, "reason": "only_job", "witness": None}
    outside = [{"pid": 9, "cgroup": "/x"}, {"pid": 10, "cgroup": "/y"}]
    rows = [{**row, "outside": outside}, {**row, "outside": outside[1:], "job_ended": True, "ended": True}, row]
    print_sessions({"sessions": rows})
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith(" ")] == [
        "  outside: process 9 in /x\\x1b, not in its job",
        "  outside: process 10 in /y, not in its job",
        "  has ended, and left what is outside behind",
        "  outside: process 10 in /y, its job has ended",
    ]


# A child becomes nobody, connects and stays; its parent, root, sends the command over that socket.
_CONNECT_AND_HAND_ON = """
import os, socket, sys
from adoptd.wire import control, frame
ours, theirs = socket.socketpair()
child = os.fork()
if child == 0:
    connected = socket.socket(socket.AF_UNIX)
    os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
    connected.connect(sys.argv[1])
    socket.send_fds(theirs, [b"x"], [connected.fileno()])
    theirs.recv(1)
    os._exit(0)
theirs.close()
_, (descriptor,), _, _ = socket.recv_fds(ours, 1, 1)
sock = socket.socket(fileno=descriptor)
sock.sendall(frame.encode_frame(control.encode_command(control.Command("whereami", {})), 8192))
data = b""
while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
    chunk = sock.recv(65536)
    assert chunk, "closed"
    data += chunk
sys.stdout.buffer.write(b"%d %d\\n" % (child, os.getpid()) + data[4:])
ours.send(b"x")
os.waitpid(child, 0)
"""


def test_a_caller_that_has_ended_is_nobody(public_path: Path) -> None:
    """Its socket lives on in another process; commands about the caller are refused, those about its uid are not."""
    code = _CONNECT_AND_HAND_ON.replace("    theirs.recv(1)\n", "").replace(
        "sock = socket", "os.waitpid(child, 0)\nsock = socket"
    )
    code = code.replace('ours.send(b"x")\nos.waitpid(child, 0)\n', "")

    async def story() -> None:
        async with agent(public_path) as here:
            connects = subprocess.Popen(
                [sys.executable, "-c", code, here.path, str(NOBODY)], stdout=subprocess.PIPE, env=environment()
            )
            out, _ = await asyncio.get_running_loop().run_in_executor(None, lambda: connects.communicate(timeout=60))
            told = control_wire.decode_reply(out.split(b"\n", 1)[1])
            assert told == "the process that connected to the agent has ended"

    run(story)


# ---- fairness


def test_one_user_s_commands_wait_for_each_other_and_root_s_for_nobody(tmp_path: Path) -> None:
    """A user whose commands hang takes one place, not all; and beyond a few they are refused at once."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            under_way: List[int] = []
            most: Dict[int, int] = {}
            release = asyncio.Event()

            class Counting(Control):
                async def execute(self, command: Command, asking: Asking) -> Result:
                    under_way.append(asking.uid)
                    most[asking.uid] = max(most.get(asking.uid, 0), under_way.count(asking.uid))
                    await release.wait()
                    under_way.remove(asking.uid)
                    return {}

            async def one(uid: int) -> None:
                async with here.handlers._command_turn(uid):
                    await Counting(None).execute(Command("jobs", {}), Asking(uid))  # type: ignore[arg-type]

            tasks = [asyncio.create_task(one(uid)) for uid in [ALICE] * USER_MAX_PER_UID + [BOB] * 5 + [0] * 20]
            await until(lambda: sorted(set(under_way)) == [0, ALICE, BOB] and under_way.count(0) == 20)
            with pytest.raises(CommandRefused, match=f"{USER_MAX_PER_UID} commands of yours"):
                await one(ALICE)
            release.set()
            await asyncio.gather(*tasks)
            assert (most[ALICE], most[BOB], most[0]) == (1, 1, 20)
            await one(ALICE)

    run(story)
