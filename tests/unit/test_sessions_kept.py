"""Sessions on disk: what is not whole, not ours, not of this boot or not of a living process is not believed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Callable, Dict

import pytest
from fakes import ALICE, connection, job
from logs import LogLines, log_lines

from adoptd.model import ProtocolError, Witness
from adoptd.process import open_process
from adoptd.sessions import Session, Sessions, registry
from adoptd.sessions.fields import FILE_MAX_BYTES
from adoptd.sessions.kept import decode_session, encode_session
from adoptd.sessions.store import SessionStore, StoreError

__all__ = ["log_lines"]

BOOT = "0a7f6f2e-3b66-4b52-8a43-57a1f0b1c001"
SESSION = Session(
    id="4711-1234567",
    pid=4711,
    start_ticks=1234567,
    uid=ALICE,
    user="älice\n",
    job=job("17", created=3, identity=(8, 9, 1 << 63)),
    witness=Witness.BPF,
    reason="adopt_named",
    since_s=1764000000.25,
    connection=connection(),
    service="sshd",
    stages=(("jobs_here", "17, 18\x1b[2J", 0.5), ("adopt", "in job 17", 12.25)),
    nodename="n1",
)


def changed(**values: Any) -> bytes:
    value: Dict[str, object] = json.loads(encode_session(SESSION, BOOT))
    value.update(values)
    return json.dumps(value).encode()


THE_JOB = {"id": "17", "uid": ALICE, "created": 3, "identity": [8]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        encode_session(SESSION, BOOT)[:-1],
        b"[]",
        b"\xff",
        changed(v=2),
        changed(boot_id="another"),
        changed(boot_id=None),
        changed(pid=4712),
        changed(pid=0),
        changed(pid=True),
        changed(start_ticks=1234568),
        changed(start_ticks="1234567"),
        changed(uid=-1),
        changed(uid=0xFFFFFFFF),
        changed(uid=ALICE + 1),
        changed(user=None),
        changed(user="x" * 257),
        changed(job=None),
        changed(job={**THE_JOB, "id": "../17"}),
        changed(job={**THE_JOB, "id": ""}),
        changed(job={**THE_JOB, "uid": 0}),
        changed(job={**THE_JOB, "identity": []}),
        changed(job={**THE_JOB, "identity": [8] * 65}),
        changed(job={**THE_JOB, "identity": ["8"]}),
        changed(job={**THE_JOB, "identity": [True]}),
        changed(job={**THE_JOB, "more": 1}),
        changed(witness="oracle"),
        changed(since_s=None),
        changed(since_s=-1),
        changed(connection=["10.0.0.1:1"]),
        changed(connection=["10.0.0.1:1", "10.0.0.2"]),
        changed(connection=["10.0.0.1:1", "[fd00::1]:22"]),
        changed(connection="10.0.0.1:1 > 10.0.0.2:22"),
        changed(stages=[["a", "b"]]),
        changed(stages=[["a", "b", "c"]]),
        changed(stages=[["a", "b", 1]] * 33),
        changed(stages={}),
        changed(more=1),
    ],
)
def test_what_is_not_exactly_a_session_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_session(data, SESSION.id, BOOT)


def test_another_name_is_refused() -> None:
    """A file that was renamed, or linked, to pass for another session."""
    with pytest.raises(ProtocolError, match="4711-1234567, expected what its file is called"):
        decode_session(encode_session(SESSION, BOOT), "4712-1234567", BOOT)


def test_there_and_back() -> None:
    assert decode_session(encode_session(SESSION, BOOT), SESSION.id, BOOT) == SESSION


def test_without_what_may_be_missing() -> None:
    bare = dataclasses.replace(SESSION, witness=None, connection=None, stages=(), user="", nodename="")
    assert decode_session(encode_session(bare, BOOT), bare.id, BOOT) == bare


def test_what_is_too_long_is_cut() -> None:
    """A decision with a page for each of a thousand stages still makes a file that is read back."""
    long = dataclasses.replace(SESSION, user="ü" * 999, stages=(("n" * 999, "\x00" * 99999, 1.0),) * 1000)
    data = encode_session(long, BOOT)
    assert len(data) < FILE_MAX_BYTES
    back = decode_session(data, long.id, BOOT)
    assert (len(back.user), len(back.stages)) == (256, 32)


# ---- the directory


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o770, 0o711])
def test_a_directory_that_others_reach_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "sessions"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(StoreError, match="expected owner 0 and mode 0700"):
        SessionStore(directory)


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "sessions"
    directory.mkdir(mode=0o700)
    os.chown(directory, ALICE, ALICE)
    with pytest.raises(StoreError, match=f"has owner {ALICE}"):
        SessionStore(directory)


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "sessions").symlink_to(tmp_path / "real")
    with pytest.raises(StoreError, match="cannot be opened as a directory"):
        SessionStore(tmp_path / "sessions")


def of_nobodys(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0o600)
    os.chown(path, ALICE, ALICE)


def linked(path: Path) -> None:
    other = path.with_name("other")
    other.write_text("{}")
    other.chmod(0o600)
    os.link(other, path)


def huge(path: Path) -> None:
    path.touch(0o600)
    os.truncate(path, FILE_MAX_BYTES + 1)


def readable(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0o640)


@pytest.mark.parametrize(
    "make",
    [of_nobodys, linked, huge, readable, os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/etc/passwd")],
    ids=["others", "two_names", "huge", "readable", "fifo", "directory", "symlink"],
)
def test_what_is_no_file_of_ours_is_not_read(tmp_path: Path, make: Callable[[Path], object]) -> None:
    with contextlib.closing(SessionStore(tmp_path / "sessions")) as store:
        make(tmp_path / "sessions" / "4711-1")
        assert [name for name, data in store.files() if isinstance(data, bytes)] == []


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with contextlib.closing(SessionStore(tmp_path / "sessions")) as store:
        store.write("a", b"one")
        store.write("a", b"two")
        # Killed while it wrote: the next write is not in its way.
        (tmp_path / "sessions" / ".unfinished").write_bytes(b"ha")
        store.write("b", b"three")
        assert list(store.files()) == [("a", b"two"), ("b", b"three")]
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / "sessions").iterdir()} == {0o600}
        store.remove("a")
        store.remove("a")
        assert [name for name, _ in store.files()] == ["b"]


# ---- after a restart


def kept(directory: Path) -> Sessions:
    sessions = Sessions(lambda: 1000.0, SessionStore(directory))
    sessions.restore()
    return sessions


def add_myself(sessions: Sessions) -> Session:
    with open_process(os.getpid()) as process:
        return sessions.add(
            process,
            uid=ALICE,
            user="alice",
            job=job("17"),
            witness=None,
            reason="single_job",
            connection=None,
            service="sshd",
            stages=(),
        )


def test_found_again(tmp_path: Path) -> None:
    with contextlib.closing(kept(tmp_path / "sessions")) as before:
        session = before.moved(add_myself(before), job("18"))
    with contextlib.closing(kept(tmp_path / "sessions")) as after:
        assert after.all() == (session,)
        held = after.hold(session)
        assert held is not None
        held.close()


def test_an_ended_session_is_known_for_its_daemons(tmp_path: Path, log_lines: LogLines) -> None:
    """Sessions end, also while there is no agent; the probe's list says of a process only which session it is of."""
    with contextlib.closing(kept(tmp_path / "sessions")) as before:
        session = add_myself(before)
        other = dataclasses.replace(session, id=f"{session.pid}-1", start_ticks=1)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    path = tmp_path / "sessions" / other.id
    path.write_bytes(encode_session(other, boot_id))
    path.chmod(0o600)
    with contextlib.closing(kept(tmp_path / "sessions")) as after:
        assert after.all() == (session,)
        assert after.find(other.id) is None
        assert after.known(other.id) == other
    assert path.exists()
    assert log_lines() == []


def test_of_ended_sessions_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many and no more, on disk too."""
    monkeypatch.setattr(registry, "_ENDED_MAX", 3)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.closing(SessionStore(tmp_path / "sessions")) as store:
        for number in range(9):
            ended = dataclasses.replace(SESSION, id=f"{os.getpid()}-{number}", pid=os.getpid(), start_ticks=number)
            ended = dataclasses.replace(ended, since_s=1000.0 + number)
            store.write(ended.id, encode_session(ended, boot_id))
    with contextlib.closing(kept(tmp_path / "sessions")) as after:
        assert [each.start_ticks for each in after.watched()] == [6, 7, 8]
        add_myself(after)
    assert len(list((tmp_path / "sessions").iterdir())) == 4


@pytest.mark.parametrize("tamper", ["half", "garbage", "another_boot", "readable"])
def test_a_file_that_was_tampered_with_is_said_and_gone(tmp_path: Path, log_lines: LogLines, tamper: str) -> None:
    with contextlib.closing(kept(tmp_path / "sessions")) as before:
        session = add_myself(before)
    path = tmp_path / "sessions" / session.id
    data = path.read_bytes()
    if tamper == "readable":
        path.chmod(0o644)
    else:
        path.write_bytes(
            {"half": data[: len(data) // 2], "garbage": b"\0" * 99, "another_boot": encode_session(session, BOOT)}[
                tamper
            ]
        )
    with contextlib.closing(kept(tmp_path / "sessions")) as after:
        assert after.all() == ()
    assert not path.exists()
    (line,) = log_lines()
    assert f"session_refused file={session.id}" in line


def test_thousands_of_refused_files_are_a_few_lines(tmp_path: Path, log_lines: LogLines) -> None:
    with contextlib.closing(SessionStore(tmp_path / "sessions")) as store:
        for number in range(500):
            store.write(str(number), b"x")
    kept(tmp_path / "sessions").close()
    assert len(log_lines()) == 21
    assert "files=500" in log_lines()[-1]
    assert list((tmp_path / "sessions").iterdir()) == []


def test_a_full_disk_is_said_once_and_stops_nobody(
    tmp_path: Path, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(kept(tmp_path / "sessions")) as sessions:

        def full(name: str, data: bytes) -> None:
            raise StoreError("no space left")

        monkeypatch.setattr(sessions._store, "write", full)
        for _ in range(3):
            add_myself(sessions)
        assert len(sessions) == 1
    assert sum("session_not_written" in line for line in log_lines()) == 1
