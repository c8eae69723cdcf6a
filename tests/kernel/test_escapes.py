"""Sessions stay where they were put: real moves, by everybody who can make one, and what is no escape."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Callable

import pytest

from adoptd import probe
from adoptd.probe.sources import find_sources
from adoptd.probe.watching import open_watch
from adoptd.sessions import escapes, guard
from adoptd.sessions.escapes import OnEscape
from kernel.guarded import ALICE, BOB, Guarded, Shell, guarded
from lab.waiting import until_in_loop

HOME = f"uid_{ALICE}/job_17"


def stays(place: Guarded, pid: int, path: str) -> None:
    assert place.tree.is_in(pid, path), place.tree.where(pid)


# ---- what is no escape


def test_a_move_inside_the_job_is_none(shared_pin_dir: Path) -> None:
    """srun in the session, a user's own cgroups in the job: still limited by it."""

    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            place.tree.make(f"{HOME}/step")
            place.tree.put(session.pid, f"{HOME}/step")
            await place.has_looked()
            stays(place, session.pid, f"{HOME}/step")
            assert place.escapes() == []

    asyncio.run(story())


def test_another_job_of_the_same_user_is_none(shared_pin_dir: Path) -> None:
    """As `adoptctl join` does it; the processes may be moved before it is noted."""

    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            other = place.tree.job(ALICE, "18")
            place.tree.put(session.pid, f"uid_{ALICE}/job_18")
            await place.has_looked()
            stays(place, session.pid, f"uid_{ALICE}/job_18")
            entry = place.sessions.find(str(session.pid))
            assert entry is not None
            place.sessions.moved(entry, other)
            # From now on that is where it belongs.
            place.tree.put(session.pid, ".")
            # Told once it is back: by then it has been there for a moment.
            await until_in_loop(lambda: place.escapes(), "told")
            stays(place, session.pid, f"uid_{ALICE}/job_18")
            assert [escape["job"] for escape in place.escapes()] == ["18"]

    asyncio.run(story())


def test_another_users_job_is_one(shared_pin_dir: Path) -> None:
    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            place.tree.job(BOB, "18")
            place.tree.put(session.pid, f"uid_{BOB}/job_18")
            await until_in_loop(lambda: place.tree.is_in(session.pid, HOME), "back in alice's job")
            await until_in_loop(lambda: place.counted("root", "readopted") == 1, "counted")

    asyncio.run(story())


def test_another_users_process_in_that_users_job_is_none(shared_pin_dir: Path) -> None:
    """What an administrator starts by hand in a session, a job manager, has its children in everybody's jobs.

    Alice's own process beside it does not belong there, and nor does what runs as two users.
    """

    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            session = place.session(ALICE, place.tree.job(ALICE, "17"), place.shell(0))
            place.tree.job(BOB, "18")
            as_user = "setpriv --ruid={0} --euid={1} --regid={0} --clear-groups sleep 600"
            bobs, alices, both = (
                session.start(as_user.format(real, effective))
                for real, effective in ((BOB, BOB), (ALICE, ALICE), (BOB, ALICE))
            )
            for pid, uids in ((bobs, f"{BOB}\t{BOB}"), (alices, f"{ALICE}\t{ALICE}"), (both, f"{BOB}\t{ALICE}")):
                status = Path(f"/proc/{pid}/status")
                await until_in_loop(lambda s=status, u=uids: f"Uid:\t{u}\t" in s.read_text(), "it has its uids")
                place.tree.put(pid, f"uid_{BOB}/job_18")
            await until_in_loop(
                lambda: place.tree.is_in(alices, HOME) and place.tree.is_in(both, HOME), "back in alice's job"
            )
            await place.has_looked()
            stays(place, bobs, f"uid_{BOB}/job_18")

    asyncio.run(story())


def test_the_end_of_a_job_is_none(shared_pin_dir: Path) -> None:
    """Its manager moves out what is left in it and removes it."""

    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            place.tree.put(session.pid, ".")
            for label in place.tree.labels:
                place.tree.at(HOME, label).rmdir()
            # The next job of that name is another one.
            place.tree.job(ALICE, "17")
            await place.has_looked()
            assert not place.tree.is_in(session.pid, HOME)
            assert place.escapes() == []

    asyncio.run(story())


def test_a_login_between_its_phases_is_left_to_pam_systemd(shared_pin_dir: Path) -> None:
    """It waits for logind, which waits for the scope it moved the process into; once the login is done, it counts."""

    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            session = place.shell(ALICE)
            entry = place.note(session, place.tree.job(ALICE, "17"))
            place.in_login.add(entry.id)
            place.tree.make("session-1.scope")
            place.tree.put(session.pid, "session-1.scope")
            await place.has_looked()
            stays(place, session.pid, "session-1.scope")
            assert place.escapes() == []
            # No session phase came, or it did and the process is where it should not be.
            place.in_login.clear()
            await until_in_loop(lambda: place.tree.is_in(session.pid, HOME), "put back where it belongs")

    asyncio.run(story())


def test_nobody_is_in_login_for_ever(shared_pin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a session line in PAM there is no session phase to wait for."""
    monkeypatch.setattr(guard, "_LOGIN_S", 0.5)

    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            place.in_login.update(each.id for each in place.sessions.all())
            place.tree.put(session.pid, ".")
            await until_in_loop(lambda: place.tree.is_in(session.pid, HOME), "back in the job")

    asyncio.run(story())


def test_whoever_is_in_no_session_is_let_go(shared_pin_dir: Path) -> None:
    """The job's own processes, and everybody else's."""

    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            place.session(ALICE, place.tree.job(ALICE, "17"))
            task, stranger = place.shell(ALICE), place.shell()
            place.tree.put(task.pid, HOME)
            for shell in (task, stranger):
                place.tree.make("elsewhere")
                place.tree.put(shell.pid, "elsewhere")
            await place.has_looked()
            for shell in (task, stranger):
                stays(place, shell.pid, "elsewhere")
            assert place.escapes() == []

    asyncio.run(story())


# ---- who moved it


def test_root_by_hand(shared_pin_dir: Path) -> None:
    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            session, root = place.session(ALICE, place.tree.job(ALICE, "17")), place.shell()
            place.tree.make("user.slice")
            for label in place.tree.labels:
                root.do(f"echo {session.pid} > {place.tree.at('user.slice', label)}/cgroup.procs")
            await until_in_loop(lambda: place.tree.is_in(session.pid, HOME), "back in its job")
            await until_in_loop(lambda: place.escapes(), "told")
            (escape,) = place.escapes()
            assert escape["mover_pid"] == root.pid
            assert (escape["mover"], escape["mover_uid"], escape["mover_comm"]) == ("root", 0, "bash")
            assert (escape["outcome"], escape["job"], escape["uid"]) == ("readopted", "17", ALICE)
            assert place.tree.top in str(escape["to"])
            assert place.counted("root", "readopted") == 1

    asyncio.run(story())


def test_a_user_with_a_writable_cgroup(shared_pin_dir: Path) -> None:
    """In cgroup v1 that is all it takes."""

    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            if "memory" not in place.tree.hierarchies:
                pytest.skip("this host does not mount the memory controller of cgroup v1")
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            place.tree.make("alices", owner=ALICE, labels=["memory"])
            session.do(f"echo $$ > {place.tree.at('alices', 'memory')}/cgroup.procs")
            await until_in_loop(lambda: place.escapes(), "told")
            stays(place, session.pid, HOME)
            (escape,) = place.escapes()
            assert (escape["mover"], escape["mover_uid"], escape["mover_pid"]) == ("self", ALICE, session.pid)

    asyncio.run(story())


def test_another_user(shared_pin_dir: Path) -> None:
    """In cgroup v2 that takes write permission on three files, which somebody may have given away."""

    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            session, bob = place.session(ALICE, place.tree.job(ALICE, "17")), place.shell(BOB)
            place.tree.make("bobs", owner=BOB)
            for path in (".", HOME):
                (place.tree.at(path, "v2") / "cgroup.procs").chmod(0o666)
            bob.do(f"echo {session.pid} > {place.tree.at('bobs', 'v2')}/cgroup.procs")
            await until_in_loop(lambda: place.counted("other_user", "readopted") == 1, "counted")
            stays(place, session.pid, HOME)

    asyncio.run(story())


# ---- which processes


@pytest.mark.parametrize("start", [Shell.start, Shell.start_daemon], ids=["child", "daemon"])
def test_a_descendant(shared_pin_dir: Path, start: Callable[[Shell], int]) -> None:
    """systemd-run --scope in the session's shell; and in a tmux that has long left it behind."""

    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            pid = start(session)
            stays(place, pid, HOME)
            place.tree.put(pid, ".")
            await until_in_loop(lambda: place.escapes(), "told")
            stays(place, pid, HOME)
            assert place.escapes()[0]["pid"] == pid

    asyncio.run(story())


def test_a_daemon_of_a_session_that_has_ended(shared_pin_dir: Path) -> None:
    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            pid = session.start_daemon()
            session.end()
            await until_in_loop(lambda: place.sessions.find(str(session.pid)) is None, "the session is gone")
            place.tree.put(pid, ".")
            await until_in_loop(lambda: place.escapes(), "told")
            stays(place, pid, HOME)

    asyncio.run(story())


def test_what_it_forked_outside(shared_pin_dir: Path) -> None:
    """A child that was born outside was never moved."""

    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            place.tree.put(session.pid, ".")
            pids = [session.start(), session.start_daemon()]
            await until_in_loop(lambda: place.escapes(), "told")
            for pid in (session.pid, *pids):
                stays(place, pid, HOME)

    asyncio.run(story())


# Everybody's: the tests' own may be where only root can go.
PYTHON = "/usr/bin/python3"
STRAYING_THREAD = """
import sys, threading
def stray():
    open(sys.argv[1], "w").write(str(threading.get_native_id()))
    print(threading.get_native_id(), flush=True)
    sys.stdin.read()
threading.Thread(target=stray).start()
"""


def test_a_single_thread(shared_pin_dir: Path) -> None:
    """In cgroup v1 it can be moved without the rest of its process, whose pid says nothing of it."""

    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            if "memory" not in place.tree.hierarchies:
                pytest.skip("this host does not mount the memory controller of cgroup v1")
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            place.tree.make("alices", owner=ALICE, labels=["memory"])
            tasks = place.tree.at("alices", "memory") / "tasks"
            os.chown(tasks, ALICE, ALICE)
            session.do(f"coproc exec {PYTHON} -I -c '{STRAYING_THREAD}' {tasks} 2>/dev/null")
            thread = int(session.do("read t <&${COPROC[0]}; echo $t"))
            assert thread != int(session.do("echo $COPROC_PID"))
            await until_in_loop(lambda: place.escapes(), "told")
            stays(place, thread, HOME)
            assert place.counted("self", "readopted") == 1

    asyncio.run(story())


RESHAPES = {
    "first_thread_ends": """
import ctypes, os, sys, threading
def rest():
    print("ready", flush=True)
    sys.stdin.read()
threading.Thread(target=rest).start()
ctypes.CDLL(None).syscall(60, 0)
""",
    "thread_execs": """
import os, threading
threading.Thread(target=lambda: os.execv("/bin/sh", ["sh", "-c", "echo ready; exec sleep 600"])).start()
threading.Event().wait()
""",
}


@pytest.mark.parametrize("name", RESHAPES)
def test_a_process_that_changes_its_shape(shared_pin_dir: Path, name: str) -> None:
    """Its pid stays its name, whichever of its threads has it."""

    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            with contextlib.closing(open_watch(shared_pin_dir)) as watch:
                read, write = os.pipe()
                child = subprocess.Popen(
                    [sys.executable, "-I", "-c", RESHAPES[name]],
                    stdin=subprocess.PIPE,
                    stdout=write,
                )
                os.close(write)
                # Forked by the test; on the list as if by the session.
                watch.watch(child.pid, session.pid, 0, ALICE)
                assert os.read(read, 16).strip() == b"ready"
                assert watch.session_of(child.pid) == (session.pid, 0)
                child.kill()
                child.communicate()
                os.close(read)
                await until_in_loop(lambda: watch.session_of(child.pid) is None, "off the list at its end")

    asyncio.run(story())


# ---- how far it goes


def test_only_reported(shared_pin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each place it is found in, not at each look; and moved back at the next look once that is wanted."""
    monkeypatch.setattr(guard, "SWEEP_S", 0.05)

    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            place.on_escape = OnEscape.REPORT
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            for number, path in enumerate(("elsewhere", "further", "elsewhere")):
                place.tree.make(path)
                place.tree.put(session.pid, path)
                await until_in_loop(lambda number=number: len(place.seen) > number, "told")  # type: ignore[misc]
                stays(place, session.pid, path)
            place.on_escape = OnEscape.READOPT
            await until_in_loop(lambda: len(place.seen) == 4, "found at a look")
            stays(place, session.pid, HOME)
            told = [(escape["mover"], escape["outcome"]) for escape in place.escapes()]
            assert told == [("root", "reported")] * 3 + [("unknown", "readopted")]

    asyncio.run(story())


def test_never_in_a_loop(shared_pin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who moves it out each time it is back gets their way, and it is said."""
    monkeypatch.setattr(escapes, "FIRST_WAIT_S", 0.01)

    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            place.tree.make("elsewhere")
            times, stop = [0], threading.Event()

            def evict() -> None:
                while not stop.is_set():
                    if place.tree.is_in(session.pid, HOME):
                        place.tree.put(session.pid, "elsewhere")
                        times[0] += 1

            evictor = threading.Thread(target=evict)
            evictor.start()
            try:
                await until_in_loop(lambda: place.counted("root", "reported") == 1, "given up")
                await place.has_looked()
            finally:
                stop.set()
                evictor.join()
            stays(place, session.pid, "elsewhere")
            outcomes = [escape["outcome"] for escape in place.escapes() if escape["uid"] == ALICE]
            assert outcomes.pop() == "reported"
            assert len(outcomes) == escapes.READOPTIONS_MAX
            assert set(outcomes) <= {"readopted", "failed"}
            assert times[0] <= escapes.READOPTIONS_MAX * 3 + 1

    asyncio.run(story())


def test_a_flood_of_moves_is_that_users_own(shared_pin_dir: Path) -> None:
    """Thousands a second, in a tree that is alice's: bob's session is still brought back, and nobody's is lost."""

    async def story() -> None:
        async with guarded(shared_pin_dir) as place:
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            for name in ("a", "b"):
                place.tree.make(f"{HOME}/{name}", owner=ALICE)
            (place.tree.at(HOME, "v2") / "cgroup.procs").chmod(0o666)
            a, b = (place.tree.at(f"{HOME}/{name}", "v2") / "cgroup.procs" for name in ("a", "b"))
            movers = [session.start(f"sh -c 'while :; do echo $$ > {a}; echo $$ > {b}; done'") for _ in range(8)]
            before = withheld(shared_pin_dir)
            await until_in_loop(lambda: withheld(shared_pin_dir) > before, "more than can be told")
            for _ in range(3):
                await place.has_looked()
            assert place.escapes() == []
            # And one of them that goes out for good is found, told or not.
            place.tree.put(movers[0], ".", labels=["memory"] if "memory" in place.tree.labels else None)
            await until_in_loop(lambda: place.escapes(), "alice's own is found too")
            session.do("kill -9 $(jobs -p)")

    asyncio.run(story())


def withheld(pin_dir: Path) -> int:
    with probe.open_probe(pin_dir) as opened:
        return opened.counters()["move_withheld"]


def test_a_fork_bomb_is_that_users_own(pin_dir: Path, other_sources: Path) -> None:
    """Whoever has more processes than the list gives one user is watched no further; others are, and it recovers."""
    header = other_sources / "adopt_record.h"
    text = header.read_text()
    assert "ADOPT_MEMBERS_OF_USER_MAX 16384" in text
    header.write_text(text.replace("ADOPT_MEMBERS_OF_USER_MAX 16384", "ADOPT_MEMBERS_OF_USER_MAX 8"))
    probe.load(pin_dir, other_sources)

    async def story() -> None:
        async with guarded(pin_dir, sources=other_sources) as place:
            alice = place.session(ALICE, place.tree.job(ALICE, "17"))
            bob = place.session(BOB, place.tree.job(BOB, "18"))
            with contextlib.closing(open_watch(pin_dir, other_sources)) as watch:
                many = [alice.start() for _ in range(20)]
                assert sum(watch.session_of(pid) is not None for pid in many) == 8
                one = bob.start()
                assert watch.session_of(one) is not None
                for pid in many:
                    os.kill(pid, 9)
                await until_in_loop(lambda: not any(map(watch.session_of, many)), "off the list at their end")
                alice.do("wait")
                assert watch.session_of(alice.start()) is not None

    asyncio.run(story())


# ---- what survives


@pytest.mark.parametrize("lives", [True, False], ids=["session", "ended_session"])
def test_an_escape_while_there_is_no_agent(shared_pin_dir: Path, tmp_path: Path, lives: bool) -> None:
    """The list is kept by the kernel, and so is what was to be told; whose it is also if the session has ended."""

    async def story() -> None:
        async with guarded(shared_pin_dir, tmp_path / "sessions") as place:
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            await place.stop()
            root, daemon = place.shell(), session.start_daemon()
            if not lives:
                session.end()
            for label in place.tree.labels:
                root.do(f"echo {daemon} > {place.tree.at('.', label)}/cgroup.procs")
            await place.start()
            assert [each.pid for each in place.sessions.all()] == [session.pid] * lives
            await until_in_loop(lambda: place.escapes(), "told")
            stays(place, daemon, HOME)
            assert place.escapes()[0]["mover_pid"] == root.pid

    asyncio.run(story())


@pytest.mark.parametrize("another", [True, False], ids=["another_release", "tampered_with"])
def test_a_probe_that_is_loaded_anew(
    pin_dir: Path, other_sources: Path, monkeypatch: pytest.MonkeyPatch, another: bool
) -> None:
    """Whoever was on the old one's list is on the new one's: nothing else knows a session's daemons."""
    monkeypatch.setattr(guard, "ATTACH_S", 0.05)
    monkeypatch.setattr(guard, "ATTACH_MAX_S", 0.05)

    async def story() -> None:
        sources = find_sources() if not another else other_sources
        probe.load(pin_dir)
        async with guarded(pin_dir) as place:
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            daemon = session.start_daemon()
            if not another:
                (pinned,) = [each for each in pin_dir.iterdir() if each.is_dir()]
                (pinned / "link_adopt_attach").unlink()
                await until_in_loop(lambda: not place.guard.status.told, "it is missed")
                assert "link_adopt_attach" in place.guard.status.reason
            place.sources = sources
            assert "in place of" in await asyncio.to_thread(probe.load, pin_dir, sources)
            await until_in_loop(lambda: place.attached == 2, "the guard uses the new one")
            place.tree.put(daemon, ".")
            await until_in_loop(lambda: place.counted("root", "readopted") == 1, "told by the new one")
            stays(place, daemon, HOME)

    asyncio.run(story())


@pytest.mark.parametrize("start", [Shell.start, Shell.start_daemon], ids=["child", "daemon"])
def test_without_a_probe_it_looks(monkeypatch: pytest.MonkeyPatch, start: Callable[[Shell], int]) -> None:
    monkeypatch.setattr(guard, "POLL_S", 0.05)

    async def story() -> None:
        async with guarded(None) as place:
            assert not place.guard.status.told
            session = place.session(ALICE, place.tree.job(ALICE, "17"))
            # A shell that is still there when it is looked at: who ends between two looks is missed.
            pid = start(session)
            place.tree.put(session.pid, ".")
            await until_in_loop(lambda: place.counted("unknown", "readopted") == 1, "counted")
            stays(place, session.pid, HOME)
            stays(place, pid, HOME)
            assert place.metrics.registry.get_sample_value("adoptd_session_watch_attached") == 0

    asyncio.run(story())
