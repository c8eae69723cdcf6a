"""The doors, on real sockets: hostile clients lose their own connection and cost nobody else theirs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Awaitable, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from fakes import sample, until
from logs import LogLines, log_lines
from nobody import NOBODY, environment, nobody_command, public_path

from adoptd.activation import Passed
from adoptd.callerid import Refused
from adoptd.config import AgentConfig, CalleridConfig, Config, MetricsConfig
from adoptd.doors import Doors
from adoptd.metrics import Door, Metrics, Refusal
from adoptd.model import AdoptdError
from adoptd.server import (
    USER_KEPT_FOR_ROOT,
    USER_MAX,
    USER_MAX_PER_UID,
    Conversation,
    Doorkeeper,
    Handler,
)
from adoptd.sockets import BACKLOG, Caller, SocketName, bind_tcp, bind_unix

__all__ = ["log_lines", "public_path"]

FRAME_MAX = 4096


async def echo(conversation: Conversation) -> None:
    """The handler of most tests: one frame in, the same out."""
    body = await conversation.read_frame(FRAME_MAX)
    conversation.heard()
    await conversation.send(struct.pack("!I", len(body)) + body)


class House:
    """One door with its metrics. ``path`` for a unix socket, None for TCP on an ephemeral port."""

    def __init__(
        self,
        handler: Handler = echo,
        path: Optional[Path] = None,
        read_s: float = 60.0,
        bound: int = 100,
        bound_per_caller: Optional[int] = None,
        kept_for_root: int = 0,
    ) -> None:
        self.metrics = Metrics()
        self.door = Door.PEER if path is None else Door.USER
        self.path = path
        if path is not None:
            self.sockets = [bind_unix(str(path), 0o666)]
        else:
            self.sockets = [*bind_tcp(["127.0.0.1"], 0), *bind_tcp(["::1"], 0)]
        bounds = (bound, bound_per_caller)
        self.keeper = Doorkeeper(
            self.door, self.sockets, handler, self.metrics, read_s, *bounds, kept_for_root=kept_for_root
        )
        self.address = self.sockets[0].getsockname()
        self.keeper.open()

    def connect(self) -> socket.socket:
        client = socket.socket(self.sockets[0].family, socket.SOCK_STREAM)
        try:
            client.connect(self.address)
        except OSError:
            client.close()
            raise
        client.setblocking(False)
        return client

    async def ask(self, body: bytes = b"hello") -> bytes:
        """A well-behaved caller's answer."""
        loop = asyncio.get_running_loop()
        with self.connect() as client:
            await loop.sock_sendall(client, struct.pack("!I", len(body)) + body)
            return (await everything(client))[4:]

    def refused(self, reason: Refusal) -> float:
        return sample(self.metrics, "adoptd_messages_refused_total", socket=self.door.value, reason=reason.value)

    @property
    def in_flight(self) -> float:
        return sample(self.metrics, "adoptd_requests_in_flight", socket=self.door.value)

    async def __aenter__(self) -> House:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.keeper.close(1.0)
        assert self.in_flight == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def everything(client: socket.socket) -> bytes:
    """What the server sends until it closes."""
    loop = asyncio.get_running_loop()
    data = b""
    while True:
        try:
            chunk = await asyncio.wait_for(loop.sock_recv(client, 65536), 60.0)
        except ConnectionResetError:
            return data
        if not chunk:
            return data
        data += chunk


@pytest.fixture(params=["unix", "tcp"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Optional[Path]:
    """Where the door is: both families behave alike."""
    return tmp_path / "door.sock" if request.param == "unix" else None


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def in_a_loop(story: Callable[[], Awaitable[None]]) -> None:
    """Run ``story`` and require that no descriptor is left."""
    before = descriptors()
    asyncio.run(story())  # type: ignore[arg-type]
    assert descriptors() == before


# ---- hostile clients


def test_silence_ends_at_the_read_deadline(place: Optional[Path]) -> None:
    """A caller who says nothing is dropped, counted as slow, and others are served meanwhile."""

    async def story() -> None:
        async with House(path=place, read_s=1.0) as house:
            with house.connect() as silent:
                started = time.monotonic()
                assert await house.ask() == b"hello"
                assert await everything(silent) == b""
                assert 0.95 < time.monotonic() - started < 30.0
            assert house.refused(Refusal.SLOW) == 1
            assert await house.ask() == b"hello"

    in_a_loop(story)


def test_one_byte_at_a_time_does_not_prolong_the_deadline(place: Optional[Path]) -> None:
    """The deadline is for the whole message, not for the next byte."""

    async def story() -> None:
        async with House(path=place, read_s=0.5) as house:
            loop = asyncio.get_running_loop()
            with house.connect() as slow:
                started = time.monotonic()
                await loop.sock_sendall(slow, struct.pack("!I", 1000))
                dropped = False
                while not dropped and time.monotonic() - started < 15.0:
                    try:
                        await loop.sock_sendall(slow, b"x")
                        await asyncio.wait_for(loop.sock_recv(slow, 1), 0.02)
                        dropped = True
                    except asyncio.TimeoutError:
                        continue
                    except OSError:
                        dropped = True
                assert dropped, "its message of 1000 bytes would have taken 20 s"
            assert house.refused(Refusal.SLOW) == 1
            assert await house.ask() == b"hello"

    in_a_loop(story)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (struct.pack("!I", FRAME_MAX + 1), Refusal.MALFORMED),
        (struct.pack("!I", 0xFFFFFFFF) + b"x" * 1000, Refusal.MALFORMED),
        (struct.pack("!I", 0), Refusal.MALFORMED),
        (b"GET / HTTP/1.0\r\n\r\n", Refusal.MALFORMED),
        (struct.pack("!I", 100) + b"x" * 99, Refusal.TRUNCATED),
        (b"\0\0\0", Refusal.TRUNCATED),
        (b"", Refusal.TRUNCATED),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_no_frame_is_refused_at_once(place: Optional[Path], sent: bytes, reason: Refusal) -> None:
    """No answer, one count by reason, and the door stays open for the next."""

    async def story() -> None:
        async with House(path=place) as house:
            loop = asyncio.get_running_loop()
            with house.connect() as client:
                await loop.sock_sendall(client, sent)
                client.shutdown(socket.SHUT_WR)
                assert await everything(client) == b""
            assert house.refused(reason) == 1
            assert await house.ask() == b"hello"

    in_a_loop(story)


def test_a_reset_in_the_middle_is_no_refusal(place: Optional[Path]) -> None:
    """A caller that is gone is no attack and no defect: nothing is counted, nothing is left."""

    async def story() -> None:
        async with House(path=place) as house:
            loop = asyncio.get_running_loop()
            client = house.connect()
            if place is None:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await loop.sock_sendall(client, b"\0\0")
            await until(lambda: house.in_flight == 1)
            client.close()
            await until(lambda: house.in_flight == 0)
            assert house.refused(Refusal.INTERNAL) == 0
            assert await house.ask() == b"hello"

    in_a_loop(story)


@pytest.mark.parametrize("error", [RuntimeError("defect"), AdoptdError("failed"), KeyError("x"), RecursionError()])
def test_a_handler_that_fails_ends_one_request(place: Optional[Path], error: Exception) -> None:
    """A defect behind the door is counted, and the next caller does not notice."""

    async def story() -> None:
        async def faulty(conversation: Conversation) -> None:
            if await conversation.read_frame(FRAME_MAX) == b"bad":
                raise error
            await conversation.send(b"1234good")

        async with House(faulty, path=place) as house:
            assert await house.ask(b"bad") == b""
            assert house.refused(Refusal.INTERNAL) == 1
            assert await house.ask() == b"good"

    in_a_loop(story)


def test_a_handler_s_refusal_is_counted_by_its_reason(place: Optional[Path]) -> None:
    """The reason a handler gives is the label."""

    async def story() -> None:
        async def strict(conversation: Conversation) -> None:
            raise Refused(Refusal.WRONG_HOST, "not here\nforged=line")

        async with House(strict, path=place) as house:
            assert await house.ask() == b""
            assert house.refused(Refusal.WRONG_HOST) == 1

    in_a_loop(story)


# ---- bounds


def test_over_the_bound_the_oldest_silent_goes_and_newcomers_are_served(place: Optional[Path]) -> None:
    """Whoever fills the door with silence keeps nobody out."""

    async def story() -> None:
        async with House(path=place, bound=5) as house:
            silent = [house.connect() for _ in range(5)]
            await until(lambda: house.in_flight == 5)
            assert await house.ask() == b"hello"
            assert await everything(silent[0]) == b""
            await until(lambda: house.in_flight == 4)
            assert house.refused(Refusal.TOO_MANY) == 1
            for client in silent:
                client.close()

    in_a_loop(story)


def test_a_burst_is_cut_to_the_bound(place: Optional[Path]) -> None:
    """Fifty connections that were all waiting to be accepted leave no more than the bound, the newest."""

    async def story() -> None:
        async with House(path=place, bound=5) as house:
            burst = [house.connect() for _ in range(50)]
            await until(lambda: house.refused(Refusal.TOO_MANY) >= 45)
            await until(lambda: house.in_flight <= 5)
            assert house.in_flight == 5
            assert house.refused(Refusal.TOO_MANY) == 45
            for dropped in burst[:45]:
                assert await everything(dropped) == b""
            assert await house.ask() == b"hello"
            for client in burst:
                client.close()

    in_a_loop(story)


def test_accepting_never_starves_those_already_served(place: Optional[Path]) -> None:
    """A queue of connections that is never empty does not keep the loop from doing anything else."""

    async def story() -> None:
        async with House(path=place, bound=1000) as house:
            turns = 0

            async def count_turns() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            counting = asyncio.create_task(count_turns())
            waiting = [house.connect() for _ in range(100)]
            before = turns
            await until(lambda: house.in_flight == 100)
            assert turns - before >= 100
            counting.cancel()
            await asyncio.gather(counting, return_exceptions=True)
            for client in waiting:
                client.close()

    in_a_loop(story)


def test_one_caller_s_bound_costs_no_other_caller(tmp_path: Path) -> None:
    """The same address loses its own oldest; another address keeps its silent connection."""

    async def story() -> None:
        async with House(bound=100, bound_per_caller=2) as house:
            other = socket.socket(socket.AF_INET6)
            other.connect(house.sockets[1].getsockname())
            other.setblocking(False)
            await until(lambda: house.in_flight == 1)
            mine = [house.connect() for _ in range(6)]
            await until(lambda: house.refused(Refusal.TOO_MANY) == 4 and house.in_flight == 3)
            for dropped in mine[:4]:
                assert await everything(dropped) == b""
            await asyncio.get_running_loop().sock_sendall(other, b"\0\0\0\1x")
            assert await everything(other) == b"\0\0\0\1x"
            assert await house.ask() == b"hello"
            for client in [other, *mine]:
                client.close()

    in_a_loop(story)


@contextlib.contextmanager
def callers(path: Path, uid: int, count: int, sent: bytes = b"") -> Iterator[None]:
    """``count`` connections of ``uid``'s that have sent ``sent`` and stay."""
    code = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
made = [socket.socket(socket.AF_UNIX) for _ in range(int(sys.argv[3]))]
for each in made:
    each.connect(sys.argv[1])
    each.send(bytes.fromhex(sys.argv[4]))
print(flush=True)
sys.stdin.read()
"""
    argv = [sys.executable, "-ISc", code, str(path), str(uid), str(count), sent.hex()]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as made:
        try:
            assert made.stdout is not None
            assert made.stdout.readline() == b"\n"
            yield
        finally:
            made.kill()


def test_others_do_not_get_the_places_that_are_kept_for_root(public_path: Path) -> None:
    """As many uids as a user has subordinate ones, with requests that take long, shut the door even to root."""

    async def story() -> None:
        free = asyncio.Event()

        async def long(conversation: Conversation) -> None:
            body = await conversation.read_frame(FRAME_MAX)
            conversation.heard()
            if conversation.peer != "uid 0":
                await free.wait()
            await conversation.send(struct.pack("!I", len(body)) + body)

        async with House(long, public_path / "door", bound=6, kept_for_root=2) as house:
            with callers(public_path / "door", 1001, 4, b"\0\0\0\1x"):
                await until(lambda: house.in_flight == 4)
                assert house.refused(Refusal.TOO_MANY) == 0, "all the places that are not root's are others'"
                with callers(public_path / "door", 1002, 3):
                    await until(lambda: house.refused(Refusal.TOO_MANY) == 3)
                    mine = [house.connect() for _ in range(2)]
                    await until(lambda: house.in_flight == 6)
                    for each in mine:
                        await asyncio.get_running_loop().sock_sendall(each, b"\0\0\0\1y")
                        assert await everything(each) == b"\0\0\0\1y"
                        each.close()
                free.set()
        assert house.refused(Refusal.TOO_MANY) == 3

    in_a_loop(story)


def test_silence_of_others_costs_root_no_place_and_root_s_others_none_of_theirs(public_path: Path) -> None:
    """Root's own is the oldest and stays; where root has more than is kept for it, the door's bound is for all."""

    async def story() -> None:
        async with House(path=public_path / "door", bound=6, kept_for_root=2) as house:
            oldest = house.connect()
            await until(lambda: house.in_flight == 1)
            with callers(public_path / "door", 1001, 9):
                await until(lambda: house.refused(Refusal.TOO_MANY) == 5 and house.in_flight == 5)
                await asyncio.get_running_loop().sock_sendall(oldest, b"\0\0\0\1x")
                assert await everything(oldest) == b"\0\0\0\1x"
            await until(lambda: house.in_flight == 0)
            mine = [house.connect() for _ in range(10)]
            await until(lambda: house.refused(Refusal.TOO_MANY) == 9 and house.in_flight == 6)
            with callers(public_path / "door", 1001, 3):
                await until(lambda: house.refused(Refusal.TOO_MANY) == 12 and house.in_flight == 6)
                for dropped in mine[:7]:
                    assert await everything(dropped) == b""
            for each in (oldest, *mine):
                each.close()

    in_a_loop(story)


def test_the_users_door_keeps_places_for_root_and_the_others_do_not(tmp_path: Path) -> None:
    """Who comes to the PAM socket is root, and to the port nobody in particular."""

    async def story() -> None:
        agent = AgentConfig(pam_socket=str(tmp_path / "pam"), user_socket=str(tmp_path / "user"))
        callerid = CalleridConfig(listen=("127.0.0.1",), port=0)
        settings = Config(agent=agent, callerid=callerid, metrics=MetricsConfig(enabled=False))
        handlers = SimpleNamespace(pam=echo, user=echo, peer=echo)
        doors = Doors(settings, handlers, Metrics(), Passed({}))  # type: ignore[arg-type]
        doors.bind()
        doors.open()
        try:
            kept = {each._door: each._bound - each._bound_of_others for each in doors._doors}
            assert kept == {Door.PAM: 0, Door.USER: USER_KEPT_FOR_ROOT, Door.PEER: 0}
            assert 0 < USER_MAX_PER_UID <= USER_KEPT_FOR_ROOT < USER_MAX - USER_MAX_PER_UID
        finally:
            await doors.close(1.0)

    in_a_loop(story)


def test_who_has_been_heard_is_not_dropped(tmp_path: Path) -> None:
    """A request under way is finished however many newcomers there are; then the newcomer has to go."""

    async def story() -> None:
        working, heard = asyncio.Event(), []

        async def patient(conversation: Conversation) -> None:
            heard.append(await conversation.read_frame(FRAME_MAX))
            conversation.heard()
            await working.wait()
            await conversation.send(b"1234done")

        async with House(patient, path=tmp_path / "s", bound=2, read_s=1.0) as house:
            first = [asyncio.create_task(house.ask()) for _ in range(2)]
            await until(lambda: len(heard) == 2)
            await asyncio.sleep(1.1)  # past the read deadline, which no longer concerns them
            with house.connect() as newcomer:
                assert await everything(newcomer) == b""
            assert house.refused(Refusal.TOO_MANY) == 1
            assert house.refused(Refusal.SLOW) == 0
            working.set()
            assert await asyncio.gather(*first) == [b"done", b"done"]

    in_a_loop(story)


# ---- the end


def test_close_finishes_what_is_in_flight_and_takes_no_more(place: Optional[Path]) -> None:
    """A request that was heard gets its answer; a silent one is dropped in time; a newcomer is refused."""

    async def story() -> None:
        heard, working = asyncio.Event(), asyncio.Event()

        async def patient(conversation: Conversation) -> None:
            await conversation.read_frame(FRAME_MAX)
            conversation.heard()
            heard.set()
            await working.wait()
            await conversation.send(b"1234done")

        house = House(patient, path=place, read_s=0.5)
        asked = asyncio.create_task(house.ask())
        await heard.wait()
        with house.connect() as silent:
            await until(lambda: house.in_flight == 2)
            closing = asyncio.create_task(house.keeper.close(5.0))
            assert await everything(silent) == b""
            with pytest.raises(ConnectionRefusedError):
                house.connect()
            assert not closing.done()
            working.set()
            assert await asked == b"done"
            await closing
        assert house.in_flight == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}

    in_a_loop(story)


def test_close_does_not_wait_for_ever(place: Optional[Path]) -> None:
    """What does not end within the time given is cancelled, and leaves no task, socket or gauge behind."""

    async def story() -> None:
        begun = asyncio.Event()
        ended = []

        async def stuck(conversation: Conversation) -> None:
            conversation.heard()
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        house = House(stuck, path=place)
        with house.connect() as client:
            await begun.wait()
            started = time.monotonic()
            await house.keeper.close(0.1)
            assert time.monotonic() - started < 30.0
            assert await everything(client) == b""
        assert ended == [True]
        assert house.in_flight == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}

    in_a_loop(story)


class Stubborn:
    """A listening socket with as many callers as anybody likes: ``ends`` of them, or an error in place of the next."""

    def __init__(self, ends: int, error: Optional[OSError] = None) -> None:
        self.left = ends
        self.error = error
        self.closed = False

    def accept(self) -> Tuple[socket.socket, object]:
        if self.left == 0:
            raise self.error or BlockingIOError
        self.left -= 1
        ours, theirs = socket.socketpair()
        theirs.close()
        return ours, ""

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("waiting", "error", "taken"),
    [(5, None, 5), (5, OSError(errno.EMFILE, "Too many open files"), 5), (100_000, None, BACKLOG + 1)],
    ids=["who-waits", "no-descriptors", "a-flood"],
)
def test_the_end_comes_whatever_waits_at_the_door(
    log_lines: LogLines, waiting: int, error: Optional[OSError], taken: int
) -> None:
    """No more are taken than the kernel lets wait, and an error costs those behind it and nothing else."""

    async def story() -> None:
        metrics, stubborn = Metrics(), Stubborn(waiting, error)
        door = Doorkeeper(Door.USER, [stubborn], echo, metrics, 5.0, waiting + 1)  # type: ignore[list-item]
        loop = asyncio.get_running_loop()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(loop, "remove_reader", lambda fd: False)
            await door.close(5.0)
        assert stubborn.closed
        assert waiting - stubborn.left == taken
        assert asyncio.all_tasks() == {asyncio.current_task()}

    in_a_loop(story)
    assert [line for line in log_lines() if "accept_failed" in line] == (
        [] if error is None else ['<3>accept_failed socket=user error="Too many open files"']
    )


# ---- binding


@pytest.mark.parametrize("mode", [0o600, 0o666])
def test_the_mode_holds_from_the_first_moment(tmp_path: Path, mode: int) -> None:
    """Neither a umask nor a moment before a chmod decides who may connect."""
    path = tmp_path / "s"
    seen: List[int] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            try:
                seen.append(stat.S_IMODE(os.lstat(path).st_mode))
            except FileNotFoundError:
                continue

    watcher = threading.Thread(target=look)
    before = os.umask(0o077)
    watcher.start()
    try:
        for _ in range(20):
            bind_unix(str(path), mode).close()
            assert stat.S_IMODE(os.lstat(path).st_mode) == mode
            path.unlink()
        assert os.umask(0o077) == 0o077
    finally:
        stop.set()
        watcher.join()
        os.umask(before)
    assert set(seen) <= {mode}


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    """What an agent that was killed left behind is no obstacle."""
    path = tmp_path / "s"
    bind_unix(str(path), 0o600).close()
    with bind_unix(str(path), 0o600) as again, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert again.getsockname() == str(path)


def test_a_live_socket_is_refused_and_left_alone(tmp_path: Path) -> None:
    """A second agent does not take the first one's socket."""
    path = tmp_path / "s"
    with bind_unix(str(path), 0o600) as first:
        with pytest.raises(AdoptdError, match="is served by another process"):
            bind_unix(str(path), 0o600)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        assert first.fileno() >= 0


@pytest.mark.parametrize("kind", ["file", "directory", "link", "fifo"])
def test_what_is_no_socket_is_never_removed(tmp_path: Path, kind: str) -> None:
    """A path typed wrong in the configuration costs no file; a link is not followed."""
    path = tmp_path / "s"
    make: Dict[str, Callable[[], object]] = {
        "file": path.touch,
        "directory": path.mkdir,
        "link": lambda: path.symlink_to(tmp_path / "elsewhere"),
        "fifo": lambda: os.mkfifo(path),
    }
    make[kind]()
    with pytest.raises(AdoptdError, match="is there and is no socket"):
        bind_unix(str(path), 0o600)
    assert os.path.lexists(path)


def test_tcp_is_all_or_nothing() -> None:
    """When the second address cannot be had the first is given back."""
    before = descriptors()
    with pytest.raises(OSError, match="assign requested address"):
        bind_tcp(["127.0.0.1", "203.0.113.77"], 0)
    assert descriptors() == before


class _NoIPv6(socket.socket):
    """A socket of a kernel that was started with ipv6.disable=1."""

    def __init__(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, *more: object) -> None:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        super().__init__(family, kind)


def test_a_kernel_without_ipv6_has_the_port_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the port is opened on both families. An address that was meant is not passed over."""
    monkeypatch.setattr(socket, "socket", _NoIPv6)
    opened = bind_tcp(["127.0.0.1", "::"], 0)
    assert [sock.getsockname()[0] for sock in opened] == ["127.0.0.1"]
    opened[0].close()
    for meant in (["127.0.0.1", "::1"], ["::"]):
        with pytest.raises(OSError, match=f"{meant[-1]} port 0: Address family not supported"):
            bind_tcp(meant, 0)


def test_both_families_can_have_one_port() -> None:
    """:: and 0.0.0.0 do not get into each other's way, whatever net.ipv6.bindv6only says."""
    first = bind_tcp(["0.0.0.0"], 0)
    port = first[0].getsockname()[1]
    second = bind_tcp(["::"], port)
    for sock in [*first, *second]:
        sock.close()


def test_the_caller_is_who_the_kernel_says(public_path: Path) -> None:
    """SO_PEERCRED: another user's process is that user, whatever it sends."""

    seen: List[Caller] = []

    async def note(conversation: Conversation) -> None:
        seen.append(Caller.of(conversation.sock))
        await conversation.read_exactly(1)
        conversation.heard()
        await conversation.send(b"!")

    async def tell() -> None:
        metrics = Metrics()
        path = str(public_path / "s")
        keeper = Doorkeeper(Door.USER, [bind_unix(path, 0o666)], note, metrics, 5.0, 10)
        keeper.open()
        code = "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(b'x'); print(s.recv(1))"
        child = subprocess.Popen(nobody_command(code, path), env=environment(), stdout=subprocess.PIPE)
        loop = asyncio.get_running_loop()
        out, _ = await loop.run_in_executor(None, child.communicate)
        assert out == b"b'!'\n"
        assert seen == [Caller(child.pid, NOBODY)]
        await keeper.close(1.0)

    asyncio.run(tell())


# ---- over a restart


def test_a_name_is_removed_only_while_it_is_ours(tmp_path: Path) -> None:
    """By its inode: what another process has put in its place stays."""
    path = tmp_path / "s"
    with bind_unix(str(path), 0o600) as first:
        name = SocketName.of(first)
        path.unlink()
        with bind_unix(str(path), 0o600) as second:
            name.remove()
            assert path.exists()
            SocketName.of(second).remove()
            assert not path.exists()
            name.remove()


def test_at_the_end_who_waits_is_served_and_the_name_is_gone_first(tmp_path: Path) -> None:
    """Whoever is in the backlog at SIGTERM was not refused, so is not lost."""

    async def story() -> None:
        path = tmp_path / "s"
        listener = bind_unix(str(path), 0o600)
        keeper = Doorkeeper(Door.USER, [listener], echo, Metrics(), 5.0, 100, names=[SocketName.of(listener)])
        keeper.open()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(struct.pack("!I", 5) + b"hello")
            # Without a turn of the loop in between: it has not been accepted yet.
            await keeper.close(5.0)
            assert client.recv(100) == struct.pack("!I", 5) + b"hello"
        assert not path.exists()

    in_a_loop(story)


def test_who_waits_at_a_socket_that_outlives_us_is_left_to_the_next(tmp_path: Path) -> None:
    """The service manager keeps it open: the one after us serves from the same backlog."""

    async def story() -> None:
        path = tmp_path / "s"
        with bind_unix(str(path), 0o600) as managers, socket.socket(socket.AF_UNIX) as client:
            first = Doorkeeper(Door.USER, [managers.dup()], echo, Metrics(), 5.0, 100, outlive_us=True)
            first.open()
            client.connect(str(path))
            client.sendall(struct.pack("!I", 5) + b"hello")
            await first.close(1.0)
            second = Doorkeeper(Door.USER, [managers.dup()], echo, Metrics(), 5.0, 100, outlive_us=True)
            second.open()
            client.setblocking(False)
            assert await asyncio.get_running_loop().sock_recv(client, 100) == struct.pack("!I", 5) + b"hello"
            await second.close(1.0)
            assert path.exists()

    in_a_loop(story)


def test_no_work_is_done_for_who_has_gone(place: Optional[Path]) -> None:
    """A message that is complete, of a caller that gave up before we came to it: not a refusal, nothing is counted."""

    async def story() -> None:
        read, worked = [], []

        async def work(conversation: Conversation) -> None:
            read.append(await conversation.read_frame(FRAME_MAX))
            conversation.heard()
            worked.append(True)

        async with House(work, path=place) as house:
            client = house.connect()
            await asyncio.get_running_loop().sock_sendall(client, struct.pack("!I", 5) + b"hello")
            client.close()
            await until(lambda: read and house.in_flight == 0)
            assert worked == []
            assert sum(house.refused(reason) for reason in Refusal) == 0

    in_a_loop(story)


def test_half_a_close_of_a_unix_socket_is_no_farewell(tmp_path: Path) -> None:
    """A caller that has said all it has to say may close its side and wait for the answer."""

    async def story() -> None:
        async with House(path=tmp_path / "s") as house:
            with house.connect() as client:
                await asyncio.get_running_loop().sock_sendall(client, struct.pack("!I", 5) + b"hello")
                client.shutdown(socket.SHUT_WR)
                assert (await everything(client))[4:] == b"hello"

    in_a_loop(story)
