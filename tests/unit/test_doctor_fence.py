"""What doctor says of what hangs: the file or the command that it waits for, once, and in time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Iterator, List

import pytest

from adoptd import doctor
from adoptd.config import Config
from adoptd.doctor.files import unread
from adoptd.doctor.findings import Check, Finding, Grade, Scene, TookTooLong, failure, ok, run_checks, warning, within
from adoptd.doctor.shown import as_json, as_lines
from adoptd.model import ConfigError

SCENE = Scene(Path("/etc/adoptd/adoptd.toml"), Config(), Path("/etc/pam.d"), "sshd", timeout_s=0.5)


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """A pipe that nobody writes to, until the test is over."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    yield path
    # Whoever waits for it goes on.
    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
    while threading.active_count() > 1:
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            break


def test_the_file_that_is_waited_for(pipe: Path) -> None:
    """By a module of ours, by pathlib; and one that is there is read."""

    def opens(scene: Scene) -> Iterator[Finding]:
        yield ok("a", str(len(pipe.read_bytes())))

    (found,) = run_checks((Check("a", opens),), SCENE)
    assert found.seen.startswith(f"{pipe} does not answer")
    assert f"ls -l {pipe}" in found.remedy
    pipe.unlink()
    pipe.write_text("now")
    (found,) = run_checks((Check("a", opens),), SCENE)
    assert found == ok("a", "3")
    pipe.unlink()
    os.mkfifo(pipe)


def test_the_command_that_is_waited_for() -> None:
    """It can be run by hand then."""
    started: List[subprocess.Popen[bytes]] = []

    def waits(scene: Scene) -> Iterator[Finding]:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        started[0].wait()
        yield ok("a", "done")

    try:
        (found,) = run_checks((Check("a", waits),), SCENE)
        assert f"{sys.executable} -c import time" in found.seen
        assert "by hand" in found.remedy
    finally:
        started[0].kill()
        started[0].wait()


def test_a_configuration_that_is_a_pipe(pipe: Path, tmp_path: Path) -> None:
    """Or is on a file server that is away. It was read outside of every fence once."""
    found = doctor.examine(pipe, tmp_path, timeout_s=1.0)
    assert found[0].grade is Grade.FAILURE
    assert found[0].seen.startswith(f"{pipe} does not answer")
    with pytest.raises(TookTooLong, match=str(pipe)):
        within(0.1, pipe.read_text)


def test_where_no_thread_is_to_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As under pids.max or ulimit -v: it is said, once, and what to look at."""

    def refuses(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuses)
    found = doctor.examine(tmp_path / "adoptd.toml", tmp_path)
    assert {each.grade for each in found} == {Grade.FAILURE}
    assert all("can't start new thread" in each.seen for each in found)
    assert any("pids.max" in each.remedy for each in found)


def test_one_cause_is_told_once() -> None:
    """To people; programs have it by check."""
    found = [failure("a", "x", "y"), failure("b", "x", "y"), warning("b", "x", "y"), failure("a", "x", "y")]
    lines = as_lines(found, 100)
    assert lines[0].split() == ["failure", "a", "x", "(also", "for:", "b)"]
    assert lines[-1] == "1 failure, 1 warning, 0 ok"
    assert len(as_json(found)["findings"]) == 4  # type: ignore[arg-type]


def test_a_configuration_that_is_not_ours_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be as right as can be; who is not root is told so."""
    error = ConfigError(f"{tmp_path}/adoptd.toml: cannot be read: Permission denied")
    for uid, grade in ((65534, Grade.WARNING), (0, Grade.FAILURE)):
        monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid)
        assert unread(tmp_path / "adoptd.toml", error, 1.0).grade is grade


def test_what_follows_from_another_thing() -> None:
    """Without an agent there are no sockets; with one that is there, a missing socket is a cause of its own."""
    missing = failure("pam_socket", "no socket", "make it", cause="agent")
    lines = as_lines([missing, failure("agent", "none runs", "start it")], 100)
    assert [line.split()[:2] for line in lines if not line.startswith(" ")][:-1] == [["failure", "agent"]]
    assert "(also for: pam_socket)" in lines[0]
    for other in (ok("agent", "runs"), warning("agent", "old", "restart it")):
        assert any("no socket" in line for line in as_lines([missing, other], 100))


def test_the_turns_are_put_back() -> None:
    """Whoever else runs in the process has its own."""
    before = sys.getswitchinterval()
    run_checks((Check("a", lambda _: [ok("a", "fine")]),), SCENE)
    assert sys.getswitchinterval() == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xef\xbb\xbf[seal]\n", "byte order mark: sed -i"),
        (b"\xff\xfe[\0", "iconv -f utf-16"),
        (b"# caf\xe9\n[seal\n", "iconv -f latin1"),
        (b"[seal\n", "adoptd config check"),
        (None, "put"),
    ],
)
def test_why_a_configuration_is_not_read(tmp_path: Path, content: bytes, words: str) -> None:
    """What editors do to files has a remedy of its own."""
    file = tmp_path / "adoptd.toml"
    if content is not None:
        file.write_bytes(content)
    found = unread(file, ConfigError(f"{file}: not TOML: something"), 1.0)
    assert (found.grade, words in found.remedy) == (Grade.FAILURE, True), found.remedy
