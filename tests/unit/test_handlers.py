"""Behind the doors, on real sockets: who may speak, what is said to whom, and what the log holds of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import AsyncIterator, Awaitable, Callable, List, Optional, Tuple

import pytest
from fakes import ALICE, BOB, HERE, FakeBackend, FakeSeal, FakeWitness, connection, job, pam_record, sample, until
from logs import LogLines, log_lines
from nobody import NOBODY, environment, nobody_command, public_path

from adoptd import handlers as handlers_module
from adoptd.adoption import Adoptions
from adoptd.callerid import Inquiry, Responder, SealRoom
from adoptd.connections import Witnesses
from adoptd.control import Asking, Control
from adoptd.deadline import Deadline
from adoptd.decision import Decision
from adoptd.events import Event, EventKind, Events
from adoptd.handlers import Desk, Handlers
from adoptd.jobs import CgroupFinding, CgroupVerdict
from adoptd.metrics import Door, Metrics, Refusal
from adoptd.model import AdoptdError, OutOfDescriptors, Owner, Witness
from adoptd.process import ProcessHandle
from adoptd.seal.replay import ReplayCache
from adoptd.server import Doorkeeper
from adoptd.sessions import PendingLogins
from adoptd.sockets import bind_tcp, bind_unix
from adoptd.wire import control as control_wire
from adoptd.wire import frame
from adoptd.wire.callerid import Outcome, Question, decode_answer, encode_question
from adoptd.wire.control import Command, Result
from adoptd.wire.pam import REPLY_BYTES, REQUEST_BYTES, PamReply, PamRequest
from adoptd.workers import Workers

__all__ = ["log_lines", "public_path"]

ENDS = connection()
NONCE = "0123456789abcdef" * 2


class FakeControl:
    """Stands in for control.Control: repeats the command, or fails as told."""

    def __init__(self) -> None:
        self.error: Optional[AdoptdError] = None
        self.padding = ""
        self.callers: List[int] = []

    async def execute(self, command: Command, asking: Asking) -> Result:
        self.callers.append(asking.uid)
        if self.error is not None:
            raise self.error
        padding = {"padding": self.padding} if self.padding else {}
        return {"name": command.name, **command.arguments, **padding}


class Agent:
    """Three doors over fakes."""

    def __init__(self, directory: Path, pam_mode: int) -> None:
        self.backend = FakeBackend(job("17"))
        self.backend.of_cgroup[1] = CgroupVerdict(CgroupFinding.JOB, "test", job("17"))
        self.metrics = Metrics()
        self.workers = Workers("w", 2, 8)
        self.witnesses = Witnesses([FakeWitness(Witness.BPF, {ENDS: Owner(Witness.BPF, ALICE, cgroup_id=1)})])
        self.control = FakeControl()
        inquiry = Inquiry(self.witnesses, self.backend, self.workers)
        self.responder: Optional[Responder] = Responder(
            inquiry, SealRoom(FakeSeal(), self.workers), ReplayCache(100, time.time), 10, self.workers
        )
        self.adoptions = Adoptions("n1", self.backend, None, PendingLogins(time.monotonic), self.workers, self.metrics)
        self.events = Events()
        handlers = Handlers(self.desk, self.metrics, self.events)
        pam, user = bind_unix(str(directory / "pam"), pam_mode), bind_unix(str(directory / "user"), 0o666)
        peer = bind_tcp(["127.0.0.1"], 0)
        self.addresses = {"pam": pam.getsockname(), "user": user.getsockname(), "peer": peer[0].getsockname()}
        self.doors = [
            Doorkeeper(Door.PAM, [pam], handlers.pam, self.metrics, 2.0, 10),
            Doorkeeper(Door.USER, [user], handlers.user, self.metrics, 2.0, 10),
            Doorkeeper(Door.PEER, peer, handlers.peer, self.metrics, 2.0, 10),
        ]
        for door in self.doors:
            door.open()

    def desk(self) -> Desk:
        control: Control = self.control  # type: ignore[assignment]
        return Desk(self.adoptions, self.responder, control, 300)

    def refused(self, door: str, reason: Refusal) -> float:
        return sample(self.metrics, "adoptd_messages_refused_total", socket=door, reason=reason.value)

    async def send(self, door: str, data: bytes) -> bytes:
        """Everything that comes back for ``data``."""
        loop = asyncio.get_running_loop()
        address = self.addresses[door]
        with socket.socket(socket.AF_INET if door == "peer" else socket.AF_UNIX) as client:
            client.connect(address)
            client.setblocking(False)
            await loop.sock_sendall(client, data)
            reply = b""
            while True:
                try:
                    chunk = await asyncio.wait_for(loop.sock_recv(client, 65536), 5.0)
                except ConnectionResetError:
                    return reply
                if not chunk:
                    return reply
                reply += chunk


@contextlib.asynccontextmanager
async def agent(directory: Path, pam_mode: int = 0o600) -> AsyncIterator[Agent]:
    made = Agent(directory, pam_mode)
    try:
        yield made
    finally:
        await asyncio.gather(*(door.close(1.0) for door in made.doors))
        made.workers.close()
        made.witnesses.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}


def run(story: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(story())  # type: ignore[arg-type]


def framed(payload: bytes) -> bytes:
    return frame.encode_frame(payload, frame.CONTROL_MAX_BYTES)


# ---- sshd's door


def test_another_user_on_the_pam_socket(public_path: Path, log_lines: LogLines) -> None:
    """Even where the socket's mode lets them in: the kernel says it is not root, and nothing is read."""

    async def story() -> None:
        async with agent(public_path, pam_mode=0o666) as here:
            code = "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
            code += "s.sendall(bytes.fromhex(sys.argv[2])); print(len(s.recv(4096)))"
            child = subprocess.Popen(
                nobody_command(code, here.addresses["pam"], pam_record(uid=0).hex()),
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            await asyncio.get_running_loop().run_in_executor(None, child.communicate)
            await until(lambda: here.refused("pam", Refusal.NOT_ROOT) == 1)
            assert here.backend.adopted == {}

    run(story)
    assert [f"is of uid {NOBODY}, only root may ask" in line for line in log_lines()] == [True]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (bytes(REQUEST_BYTES), Refusal.MALFORMED),
        (pam_record(version=2), Refusal.MALFORMED),
        (pam_record(phase=9), Refusal.MALFORMED),
        (b"\xff" * REQUEST_BYTES, Refusal.MALFORMED),
    ],
)
def test_a_record_that_is_none(tmp_path: Path, log_lines: LogLines, record: bytes, reason: Refusal) -> None:
    """Closed without a reply, so that the module takes its generic failure; counted and logged once."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            assert await here.send("pam", record) == b""
            assert here.refused("pam", reason) == 1
            assert here.backend.tried == []
            assert len(await here.send("pam", pam_record())) >= REPLY_BYTES

    run(story)
    assert len([line for line in log_lines() if line.startswith("<4>refused socket=pam reason=malformed")]) == 1


def test_a_login_is_adopted_answered_logged_and_measured(tmp_path: Path, log_lines: LogLines) -> None:
    """The caller's own process is moved, one line says so, and the histogram has one more."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            reply = await here.send("pam", pam_record(over=ENDS))
            assert (reply[8], reply[9]) == (1, 1)
            assert reply[REPLY_BYTES:] == b"SLURM_JOB_ID=17\0"
            assert here.backend.adopted[os.getpid()].id == "17"
            await until(lambda: sample(here.metrics, "adoptd_adoption_duration_seconds_count", phase="account") == 1)

    run(story)
    (line,) = [line for line in log_lines() if " phase=account " in line]
    assert line.startswith("<6>adoption phase=account mode=enforce decision=adopted reason=only_job job=17 user=alice ")
    assert f'uid={ALICE} pid={os.getpid()} connection="{ENDS}" service=sshd' in line


def test_a_denial_is_logged_like_a_grant(tmp_path: Path, log_lines: LogLines) -> None:
    """Same words, same place."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            reply = await here.send("pam", pam_record(uid=4242, user=b"eve\nforged line"))
            assert (reply[8], reply[9]) == (2, 0)

    run(story)
    (line,) = [line for line in log_lines() if "adoption phase=" in line]
    assert 'decision=denied reason=no_jobs user="eve\\nforged line" uid=4242' in line


def test_one_users_logins_do_not_hold_up_anothers(tmp_path: Path) -> None:
    """While one user's logins wait for a source that says nothing, and more of them queue, another's is served."""

    class Waiting(Adoptions):
        def __init__(self, before: Adoptions, go_on: asyncio.Event) -> None:
            self.__dict__.update(before.__dict__)
            self.go_on, self.waiting = go_on, 0

        async def serve(
            self, request: PamRequest, process: ProcessHandle, deadline: Deadline
        ) -> Tuple[PamReply, Decision]:
            if request.uid == BOB:
                self.waiting += 1
                await self.go_on.wait()
            return await super().serve(request, process, deadline)

    async def story() -> None:
        async with agent(tmp_path) as here:
            go_on = asyncio.Event()
            here.adoptions = waiting = Waiting(here.adoptions, go_on)
            held = [asyncio.create_task(here.send("pam", pam_record(uid=BOB))) for _ in range(9)]
            await until(lambda: waiting.waiting == 8)
            reply = await here.send("pam", pam_record(over=ENDS))
            assert (reply[8], reply[9]) == (1, 1)
            assert waiting.waiting == 8
            go_on.set()
            await asyncio.gather(*held)

    run(story)


def test_trailing_bytes_change_nothing(tmp_path: Path) -> None:
    """One record per connection; what follows it is not read as another."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            assert len(await here.send("pam", pam_record() + pam_record())) >= REPLY_BYTES
            assert here.backend.tried == ["17"]

    run(story)


# ---- the peers' door


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (framed(b"nonsense"), Refusal.BAD_SEAL),
        (framed(b"FAKE 0 nonsense"), Refusal.MALFORMED),
        (struct.pack("!I", 5000) + b"x" * 5000, Refusal.MALFORMED),
    ],
)
def test_a_question_that_is_none(tmp_path: Path, data: bytes, reason: Refusal) -> None:
    """No answer, counted by reason, and the next question is answered."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            assert await here.send("peer", data) == b""
            assert here.refused("peer", reason) == 1
            assert here.refused("peer", Refusal.INTERNAL) == 0

    run(story)


def test_a_question_carried_here_from_another_address(tmp_path: Path) -> None:
    """The address is the one the connection was accepted at, which the sender does not choose."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            for responder, nonce in (("127.0.0.2", NONCE), ("10.0.0.1", NONCE[::-1])):
                asked = Question(nonce, type(HERE)(responder), ENDS, ALICE)
                assert await here.send("peer", framed(b"FAKE 0 " + encode_question(asked))) == b""
            assert here.refused("peer", Refusal.WRONG_HOST) == 2

    run(story)


def test_no_seal_no_answers(tmp_path: Path) -> None:
    """An agent with nothing to open seals with says so in its metrics and nothing to the peer."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            here.responder = None
            assert await here.send("peer", framed(b"FAKE 0 x")) == b""
            assert here.refused("peer", Refusal.UNAVAILABLE) == 1

    run(story)


def test_a_question_is_answered_logged_and_counted(tmp_path: Path, log_lines: LogLines) -> None:
    """The sealed answer in one frame, and one line with the evidence that stays on this node."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            asked = Question(NONCE, HERE, ENDS, ALICE)
            reply = await here.send("peer", framed(b"FAKE 0 " + encode_question(asked)))
            answer = decode_answer(reply[4:].split(b" ", 2)[2])
            assert (answer.outcome, answer.job_id, answer.nonce) == (Outcome.JOB, "17", NONCE)
            labels = {"outcome": "job", "reason": "owner", "witness": "bpf"}
            await until(lambda: sample(here.metrics, "adoptd_callerid_answered_total", **labels) == 1)

    run(story)
    (line,) = [line for line in log_lines() if "callerid_answered" in line]
    assert line.startswith(
        f"<6>callerid_answered peer=127.0.0.1 outcome=job reason=owner job=17 witness=bpf uid={ALICE} "
    )


# ---- the users' door


def test_a_command_that_is_none(tmp_path: Path) -> None:
    """Refused before it is looked up."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            assert await here.send("user", framed(b'{"v":1}')) == b""
            assert await here.send("user", framed(b"x" * (control_wire.COMMAND_MAX_BYTES + 1))) == b""
            assert here.refused("user", Refusal.MALFORMED) == 2
            assert here.control.callers == []

    run(story)


def test_a_process_that_cannot_be_held_for_want_of_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The login gets its generic failure; who is on call is told of the agent, not of a login that hung up."""

    def full(sock: socket.socket, pid: int) -> ProcessHandle:
        raise OutOfDescriptors(f"process {pid} cannot be opened: Too many open files")

    async def story() -> None:
        async with agent(tmp_path) as here:
            with monkeypatch.context() as patched:
                patched.setattr(handlers_module, "open_peer", full)
                assert await here.send("pam", pam_record()) == b""
            assert here.refused("pam", Refusal.UNAVAILABLE) == 1
            assert here.refused("pam", Refusal.PROCESS_GONE) == 0
            assert len(await here.send("pam", pam_record())) >= REPLY_BYTES

    run(story)


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    """The text of the error is for the caller, and no refusal is counted for it."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            here.control.error = AdoptdError("no such thing")
            reply = await here.send("user", framed(control_wire.encode_command(Command("status", {}))))
            assert control_wire.decode_reply(reply[4:]) == "no such thing"
            assert here.refused("user", Refusal.INTERNAL) == 0

    run(story)


def test_an_answer_that_is_too_long_is_said_to_be(tmp_path: Path) -> None:
    """A node full of sessions: a sentence, and not a connection that ends without a word."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            here.control.padding = "x" * frame.CONTROL_MAX_BYTES
            reply = await here.send("user", framed(control_wire.encode_command(Command("status", {}))))
            said = control_wire.decode_reply(reply[4:])
            assert isinstance(said, str)
            assert said.endswith(f"bytes, and no more than {frame.CONTROL_MAX_BYTES} can be sent")
            assert here.refused("user", Refusal.INTERNAL) == 0

    run(story)


def test_a_command_is_carried_out_for_who_the_kernel_says(tmp_path: Path) -> None:
    """The uid is not in the message."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            reply = await here.send("user", framed(control_wire.encode_command(Command("whois", {"uid": "0"}))))
            assert control_wire.decode_reply(reply[4:]) == {"name": "whois", "uid": "0"}
            assert here.control.callers == [os.getuid()]

    run(story)


# ---- the event stream


def test_what_is_done_is_published(tmp_path: Path, log_lines: LogLines) -> None:
    """An adoption, a denial and an answer, each about whom it concerns, with the request that the log names."""

    async def story() -> None:
        async with agent(tmp_path) as here:
            seen: List[Event] = []
            here.events.subscribe(lambda event: bool(seen.append(event)))
            await here.send("pam", pam_record())
            await here.send("pam", pam_record(uid=BOB))
            await here.send("peer", framed(b"FAKE 0 " + encode_question(Question(NONCE, HERE, ENDS, ALICE))))
            await until(lambda: len(seen) == 3)
            assert [(event.kind, event.uid) for event in seen] == [
                (EventKind.ADOPTION, ALICE),
                (EventKind.DENIAL, BOB),
                (EventKind.CALLERID, ALICE),
            ]
            assert [event.fields.get("job") for event in seen] == ["17", None, "17"]
            for event, line in zip(seen, [line for line in log_lines() if "adoption phase" in line]):
                assert f"request={event.fields['request']}" in line

    run(story)
