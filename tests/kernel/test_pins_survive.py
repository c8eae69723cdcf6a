"""The probe's pins under a real agent: squatted, tampered with, taken away, replaced. Refused and said, never believed.

In every case logins and questions go on, by the other witnesses where it must be; and what can be put right is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import threading
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator, List, Mapping, Optional, Set, Tuple

import pytest
from real_agent import JobProcess, RealAgent, agent, job, made_agent, watchful

from adoptd import probe
from adoptd.client import AgentError
from adoptd.model import Connection
from adoptd.probe import mounts, syscalls
from lab.waiting import PATIENCE, until
from marked_probe import in_kernel, marked_sources, tags_of

__all__ = ["agent", "job", "watchful"]

pytestmark = pytest.mark.timeout(300 * PATIENCE)

NOBODY = 65534
_MNT_DETACH = 2
_MS_RDONLY, _MS_REMOUNT = 1, 32
_libc = ctypes.CDLL(None, use_errno=True)


def _degraded(made: RealAgent, job: JobProcess, words: str) -> None:
    """The agent is without the probe and says why, in its status, its metrics and its log, and answers all the same."""
    until(lambda: made.probe["attached"] is False and words in str(made.probe["reason"]), f"a probe lost for: {words}")
    witnesses = made.status()["witnesses"]
    assert isinstance(witnesses, dict)
    assert words in witnesses["bpf"]
    assert witnesses["diag"] == witnesses["proc"] == "ok"
    assert made.metric("adoptd_probe_attached") == 0
    assert made.metric('adoptd_witness_up{witness="bpf"}') == 0
    assert any("probe_unavailable" in line and words in line for line in made.log.read_text().splitlines())
    found = made.whois(job.connect())
    assert (found["witness"], found["job"], found["uid"]) == ("diag", job.ID, 0)


def _well(made: RealAgent, job: JobProcess) -> None:
    """The agent has the probe, and it tells the truth."""
    until(lambda: made.probe["attached"] is True and made.probe["reason"] == "attached", "a probe that is well")
    assert made.metric("adoptd_probe_attached") == 1
    assert made.metric('adoptd_witness_up{witness="bpf"}') == 1
    found = made.whois(job.connect())
    assert (found["witness"], found["job"], found["pid"]) == ("bpf", job.ID, job.pid)


# ---- what is there before the start


def _another_owner(pin_dir: Path, _: Path) -> str:
    pin_dir.mkdir(0o700)
    os.chown(pin_dir, NOBODY, NOBODY)
    return f"has owner {NOBODY} and mode 0700, expected owner 0"


def _open_to_others(pin_dir: Path, _: Path) -> str:
    pin_dir.mkdir(0o777)
    pin_dir.chmod(0o777)
    return "mode 0777, expected owner 0 and mode 0700"


def _symbolic_link(pin_dir: Path, theirs: Path) -> str:
    # To a sound probe that somebody else has loaded, on another bpffs.
    probe.load(theirs / "adoptd")
    pin_dir.symlink_to(theirs / "adoptd")
    return "is a symbolic link, expected a directory"


def _a_map(pin_dir: Path, theirs: Path) -> str:
    probe.load(theirs / "adoptd")
    fd = syscalls.obj_get(str(next((theirs / "adoptd").glob("*/adopt_owners"))))
    syscalls.obj_pin(fd, str(pin_dir))
    os.close(fd)
    return "cannot be opened as a directory"


SQUATTED: List[Callable[[Path, Path], str]] = [_another_owner, _open_to_others, _symbolic_link, _a_map]


@pytest.fixture
def theirs() -> Iterator[Path]:
    """Somebody else's bpffs; a probe on it is taken away again."""
    directory = Path(f"/tmp/adoptd-test-{os.getpid()}-theirs")
    directory.mkdir()
    mounts.mount_bpffs(directory)
    try:
        yield directory
    finally:
        if (directory / "adoptd").is_dir():
            probe.unload(directory / "adoptd")
        _libc.umount2(os.fsencode(directory), _MNT_DETACH)
        directory.rmdir()


@pytest.mark.parametrize("squat", SQUATTED, ids=[each.__name__[1:] for each in SQUATTED])
def test_a_squatted_place_is_refused_and_left_alone(
    watchful: RealAgent, job: JobProcess, pin_dir: Path, theirs: Path, squat: Callable[[Path, Path], str]
) -> None:
    """And as soon as it is free, the agent that runs takes it: nobody has to restart it."""
    words = squat(pin_dir, theirs)
    before = os.lstat(pin_dir)
    watchful.start()
    _degraded(watchful, job, words)
    after = os.lstat(pin_dir)
    assert (after.st_ino, after.st_uid, after.st_mode) == (before.st_ino, before.st_uid, before.st_mode)
    if pin_dir.is_dir() and not pin_dir.is_symlink():
        assert list(pin_dir.iterdir()) == []
        pin_dir.rmdir()
    else:
        pin_dir.unlink()
    _well(watchful, job)


def test_a_user_who_may_write_to_bpffs_gains_nothing(
    agent: RealAgent, job: JobProcess, bpffs: Path, pin_dir: Path
) -> None:
    """A bpffs open to all, as some distributions have had it: who makes our directory first keeps the probe away, and
    is not believed."""
    bpffs.chmod(0o1777)
    subprocess.run(["setpriv", f"--reuid={NOBODY}", "--clear-groups", "mkdir", "-m", "700", str(pin_dir)], check=True)
    agent.start()
    _degraded(agent, job, f"has owner {NOBODY}")


def test_a_sound_probe_of_other_hands_is_not_believed(
    agent: RealAgent, job: JobProcess, pin_dir: Path, theirs: Path
) -> None:
    """Under our schema's name, whole, but in a directory of mode 0755: refused, although every object is right."""
    probe.load(theirs / "adoptd")
    ours = next((theirs / "adoptd").iterdir())
    copy = pin_dir / ours.name
    copy.mkdir(0o755, parents=True)
    pin_dir.chmod(0o700)
    copy.chmod(0o755)
    for pin in ours.iterdir():
        fd = syscalls.obj_get(str(pin))
        syscalls.obj_pin(fd, str(copy / pin.name))
        os.close(fd)
    agent.start()
    # In a directory that is root's alone the loader may put things right, and does: with objects of its own.
    _well(agent, job)
    (mine,) = pin_dir.iterdir()
    assert _ids(mine).isdisjoint(_ids(ours))


# ---- what happens while it runs


def _ids(schema_dir: Path) -> Set[Tuple[str, int]]:
    """Kind and number of all that is pinned."""
    found = set()
    for pin in schema_dir.iterdir():
        fd = syscalls.obj_get(str(pin))
        try:
            kind = syscalls.kind_of(fd)
            describe = {"bpf-map": syscalls.map_info, "bpf-prog": syscalls.prog_info, "bpf-link": syscalls.link_info}
            found.add((kind, describe[kind](fd).id))
        finally:
            os.close(fd)
    return found


def _swap(pin_dir: Path, name: str, source: Path) -> None:
    (ours,) = pin_dir.iterdir()
    fd = syscalls.obj_get(str(source))
    (ours / name).unlink()
    syscalls.obj_pin(fd, str(ours / name))
    os.close(fd)


@pytest.mark.parametrize("name", ["adopt_owners", "adopt_query", "adopt_connect4"])
def test_pins_exchanged_under_a_running_agent_are_put_right(
    watchful: RealAgent, job: JobProcess, pin_dir: Path, theirs: Path, name: str
) -> None:
    """Another's map or program under our name: the agent goes on with what it opened, and loads what is pinned anew."""
    watchful.start()
    _well(watchful, job)
    probe.load(theirs / "adoptd")
    (other,) = (theirs / "adoptd").iterdir()
    loaded = watchful.lines(" probe_attached ")
    with watchful.paused():
        _swap(pin_dir, name, other / name)
    until(lambda: watchful.lines(" probe_attached ") > loaded, "a probe that was loaded anew")
    _well(watchful, job)
    (mine,) = pin_dir.iterdir()
    assert _ids(mine).isdisjoint(_ids(other))
    assert probe.status(pin_dir).problem is None


def test_a_link_exchanged_for_another_s_is_put_right(
    watchful: RealAgent, job: JobProcess, pin_dir: Path, theirs: Path
) -> None:
    """Our own link has gone with its pin: nothing hears connect() for us any more, which the self-test finds out."""
    watchful.start()
    _well(watchful, job)
    probe.load(theirs / "adoptd")
    (other,) = (theirs / "adoptd").iterdir()
    with watchful.paused():
        _swap(pin_dir, "link_connect4", other / "link_connect4")
    until(lambda: watchful.lines(" probe_attached ") >= 2, "a probe that was loaded anew")
    _well(watchful, job)
    (mine,) = pin_dir.iterdir()
    assert _ids(mine).isdisjoint(_ids(other))


def test_pins_opened_to_others_while_it_runs_are_doubted_and_said(
    watchful: RealAgent, job: JobProcess, pin_dir: Path
) -> None:
    """The open probe works and is used; that the next agent would refuse the pins is in the status and in the log."""
    watchful.start()
    _well(watchful, job)
    pin_dir.chmod(0o755)
    until(lambda: "its pins are not sound" in str(watchful.probe["reason"]), "the status says so")
    assert "mode 0755, expected owner 0 and mode 0700" in str(watchful.probe["reason"])
    assert watchful.probe["attached"] is True
    assert watchful.whois(job.connect())["witness"] == "bpf"
    assert watchful.lines("probe_pins_unsound") == 1
    pin_dir.chmod(0o700)
    _well(watchful, job)
    assert watchful.lines("probe_pins_unsound") == 1


def test_pins_removed_while_it_runs_come_back(watchful: RealAgent, job: JobProcess, pin_dir: Path) -> None:
    """rm -r on the whole directory: the links go with it."""
    watchful.start()
    _well(watchful, job)
    with watchful.paused():
        shutil.rmtree(pin_dir)
    until(lambda: watchful.lines(" probe_attached ") >= 2, "a probe that was loaded anew")
    _well(watchful, job)
    assert watchful.lines("probe_unavailable") >= 1


# ---- bpffs


@pytest.fixture
def mount_point() -> Iterator[Path]:
    """A directory that no bpffs can be mounted on by the agent itself: it is not empty."""
    directory = Path(f"/tmp/adoptd-test-{os.getpid()}-bpf")
    directory.mkdir()
    (directory / "in use").touch()
    try:
        yield directory
    finally:
        while _libc.umount2(os.fsencode(directory), _MNT_DETACH) == 0:
            pass
        shutil.rmtree(directory)


def _mount(directory: Path) -> None:
    assert _libc.mount(b"bpf", os.fsencode(directory), b"bpf", 0, b"mode=0700") == 0


@pytest.fixture
def unmounted(mount_point: Path, job: JobProcess) -> Iterator[RealAgent]:
    """A watchful agent whose pin directory is to be on ``mount_point``."""
    with made_agent(mount_point / "adoptd", job, interval_s=1) as made:
        yield made


def test_no_bpffs_at_the_start_is_said_and_its_coming_noticed(
    unmounted: RealAgent, job: JobProcess, mount_point: Path
) -> None:
    """Mounted later, by whoever: the running agent loads its probe there."""
    unmounted.start()
    _degraded(unmounted, job, "is not on bpffs, nor an empty directory of root's")
    _mount(mount_point)
    _well(unmounted, job)


def test_bpffs_unmounted_while_it_runs(unmounted: RealAgent, job: JobProcess, mount_point: Path) -> None:
    """The pins go, and with the last of them the probe: degraded, said, and well again when there is a bpffs.

    A mount namespace that was made meanwhile (of another test's node, of a container) has a mount of it of its own,
    and keeps the probe alive: then it is used, and that the next agent would not find it is said.
    """
    _mount(mount_point)
    unmounted.start()
    _well(unmounted, job)
    for times in (1, 2):
        # Busy while the agent looks at its pins.
        until(lambda: _libc.umount2(os.fsencode(mount_point), 0) == 0, "bpffs unmounted")
        until(lambda: "is not on bpffs" in str(unmounted.probe["reason"]), "the status says so")
        if unmounted.probe["attached"] is False:
            _degraded(unmounted, job, "is not on bpffs")
        else:
            assert "attached, but its pins are not sound" in str(unmounted.probe["reason"])
            assert unmounted.whois(job.connect())["witness"] == "bpf"
        _mount(mount_point)
        _well(unmounted, job)
        assert unmounted.lines(" probe_attached ") == 1 + times


def test_bpffs_that_is_read_only(unmounted: RealAgent, job: JobProcess, mount_point: Path) -> None:
    """Nothing can be pinned there: said with the file system's own words; and a probe that is open goes on."""
    _mount(mount_point)
    assert _libc.mount(b"bpf", os.fsencode(mount_point), b"", _MS_REMOUNT | _MS_RDONLY, b"mode=0700") == 0
    first = unmounted.start()
    _degraded(unmounted, job, "Read-only file system")
    assert _libc.mount(b"bpf", os.fsencode(mount_point), b"", _MS_REMOUNT, b"mode=0700") == 0
    _well(unmounted, job)
    assert _libc.mount(b"bpf", os.fsencode(mount_point), b"", _MS_REMOUNT | _MS_RDONLY, b"mode=0700") == 0
    assert unmounted.whois(job.connect())["witness"] == "bpf"
    # The next one cannot so much as open the pins.
    assert unmounted.stop(first) == 0
    unmounted.start()
    _degraded(unmounted, job, "Read-only file system")
    assert _libc.mount(b"bpf", os.fsencode(mount_point), b"", _MS_REMOUNT, b"mode=0700") == 0
    _well(unmounted, job)


# ---- upgrades and crashes


class _Asking:
    """Asks again and again about connections that are open, and about new ones, in a thread."""

    def __init__(self, made: RealAgent, job: JobProcess, old: List[Connection]) -> None:
        self._made, self._job, self._old = made, job, old
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.witnesses: Counter[object] = Counter()
        self.wrong: List[str] = []

    def __enter__(self) -> _Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._stop.is_set():
            for connection in (*self._old, self._job.connect()):
                try:
                    found = self._made.whois(connection)
                except AgentError as error:
                    self.wrong.append(str(error))
                    continue
                if (found["job"], found["uid"]) != (self._job.ID, 0):
                    self.wrong.append(str(found))
                self.witnesses[found["witness"]] += 1


def test_upgrade_and_back_while_connections_are_open(
    agent: RealAgent, job: JobProcess, pin_dir: Path, tmp_path: Path
) -> None:
    """Every question before, during and after is answered, and right; in the end there is one probe, the one in use."""
    releases = [marked_sources(tmp_path / name, number) for name, number in (("a", os.getpid()), ("b", -os.getpid()))]
    agent.configure(probe=f"source_dir = '{releases[0]}'")
    agent.activate()
    tags = [tags_of(pin_dir)]
    one = in_kernel(tags[0])
    assert (one["programs"], one["links"]) == (3, 2)
    old = [job.connect() for _ in range(20)]
    for release in (releases[1], releases[0]):
        agent.configure(probe=f"source_dir = '{release}'")
        with _Asking(agent, job, old) as asking:
            agent.restart(signal.SIGHUP)
            _well(agent, job)
            until(lambda: asking.witnesses["bpf"] > 0, "an answer by the probe")
        assert asking.wrong == []
        # Labelled by the seed iterator now.
        assert {agent.whois(connection)["witness"] for connection in old} == {"bpf"}
        tags.append(tags_of(pin_dir))
        assert tags[-1].isdisjoint(tags[-2])
        assert len(list(pin_dir.iterdir())) == 1
        until(lambda: in_kernel(tags[0] | tags[1]) == one, "nothing but one probe in the kernel")
    assert tags[0] == tags[2]


def test_agents_killed_while_they_load_leave_one_probe(
    agent: RealAgent, job: JobProcess, pin_dir: Path, tmp_path: Path
) -> None:
    """kill -9 at any moment of the first start, the loader with it or orphaned: the next makes exactly one of it."""
    agent.configure(probe=f"source_dir = '{marked_sources(tmp_path / 'a', os.getpid())}'")
    for pause_s in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8):
        starting = agent.spawn()
        until(agent.answers, "an agent that serves")
        # What is waited for is a moment; whichever it is, the end must be the same.
        with contextlib.suppress(subprocess.TimeoutExpired):
            starting.wait(pause_s)
        agent.kill(starting)
    agent.start()
    _well(agent, job)
    assert len(list(pin_dir.iterdir())) == 1
    found = until(lambda: _settled(tags_of(pin_dir)), "one probe in the kernel")
    assert (found["programs"], found["links"]) == (3, 2)


def _settled(tags: Set[str]) -> Optional[Mapping[str, int]]:
    found = in_kernel(tags)
    return found if (found["programs"], found["links"]) == (3, 2) else None
