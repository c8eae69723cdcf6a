"""adoptctl's commands for users: what they ask, what they print, and how they end."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

import pytest
from nobody import environment
from scripted import Reply, scripted_agent

from adoptd.cli import adoptctl_main
from adoptd.printing import event_line
from adoptd.wire.control import Command, Result, encode_result
from lab.waiting import until

Captured = pytest.CaptureFixture[str]

SESSION: Result = {
    "session": "42-7",
    "pid": 42,
    "user": "alice",
    "uid": 1001,
    "job": "17",
    "since": 0.0,
    "reason": "callerid",
    "witness": "bpf",
    "from": "10.0.0.1:40000",
    "service": "sshd",
}
WHEREAMI: Result = {
    "node": "n1",
    "uid": 1001,
    "pid": 43,
    "job": "17",
    "why": "",
    "limits": {
        "memory_max": 2 << 30,
        "memory_used": 512 << 20,
        "cpus": 1.5,
        "cpu_list": "0-3",
        "pids_max": 100,
        "pids_used": 3,
    },
    "session": {"session": "42-7", "job": "17", "reason": "callerid", "witness": "bpf"},
    "other_jobs": ["18", "19"],
    "advice": "",
}
JOINED: Result = {"outcome": "joined", "session": "42-7", "from": "17", "job": "18", "moved": 4, "left": [],
                  "message": "4 of 4 processes of this session are in job 18 now"}  # fmt: skip
EVENT: Result = {"kind": "adoption", "at": 0.0, "uid": 1001, "user": "alice", "decision": "adopted", "job": "17",
                 "reason": "callerid", "latency_ms": 1.25, "stages": "long", "request": "ab12cd34"}  # fmt: skip


def ctl(path: Path, reply: Reply, *words: str) -> List[Command]:
    """What the command asked for; it must end with 0."""
    with scripted_agent(path, lambda command: reply) as commands:
        assert adoptctl_main([words[0], "--socket", str(path), *words[1:]]) == 0
    return commands


def stream(*results: Result) -> bytes:
    bodies = [encode_result(result) for result in ({"watching": True}, *results)]
    return b"".join(struct.pack("!I", len(body)) + body for body in bodies)


@pytest.mark.parametrize(
    ("words", "reply", "arguments"),
    [
        (["sessions"], {"sessions": [SESSION]}, {}),
        (["whereami"], WHEREAMI, {}),
        (["join", "18"], JOINED, {"job": "18"}),
        (["join", "18", "--session", "42"], JOINED, {"job": "18", "session": "42"}),
        (["explain", "42-7"], {**SESSION, "stages": []}, {"session": "42-7"}),
    ],
)
def test_what_is_asked_and_the_document(
    capsys: Captured, tmp_path: Path, words: List[str], reply: Result, arguments: Dict[str, str]
) -> None:
    """The command with its arguments and nothing else; with --json exactly what the agent said."""
    (command,) = ctl(tmp_path / "s", reply, *words, "--json")
    assert (command.name, command.arguments) == (words[0], arguments)
    assert json.loads(capsys.readouterr().out) == reply


def test_sessions_for_people(capsys: Captured, tmp_path: Path) -> None:
    """One a line, under a heading."""
    ctl(tmp_path / "s", {"sessions": [SESSION]}, "sessions")
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["SESSION", "USER", "JOB", "SINCE", "REASON", "WITNESS", "FROM"]
    assert re.fullmatch(r"42-7 +alice +17 +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d callerid +bpf +10\.0\.0\.1:40000", row)


def test_whereami_for_people(capsys: Captured, tmp_path: Path) -> None:
    """In units that people use."""
    ctl(tmp_path / "s", WHEREAMI, "whereami")
    assert capsys.readouterr().out.splitlines() == [
        "job:     17",
        "memory:  512.0 MiB used by the job, limit 2.0 GiB",
        "cpus:    1.5 (of processors 0-3)",
        "tasks:   3 running, limit 100",
        "session: 42-7, put into job 17 (callerid by bpf)",
        "others:  18, 19",
    ]
    nowhere = {**WHEREAMI, "job": None, "limits": {}, "session": None, "other_jobs": [], "advice": "Do this."}
    ctl(tmp_path / "t", nowhere, "whereami")
    assert capsys.readouterr().out.splitlines() == ["job:     none", "Do this."]


def test_join_that_left_something_behind_is_no_success(capsys: Captured, tmp_path: Path) -> None:
    """Status 1, and each of them with its reason."""
    partly = {**JOINED, "outcome": "partly", "left": [{"pid": 44, "why": "the kernel\nsays no"}]}
    with scripted_agent(tmp_path / "s", lambda command: partly):
        assert adoptctl_main(["join", "18", "--socket", str(tmp_path / "s")]) == 1
    assert "  left behind: process 44: the kernel\\nsays no\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [["join"], ["explain", "42", "--user", "alice"], ["watch", "--kind", "logins"], ["whereami", "43"]],
    ids=" ".join,
)
def test_arguments_that_are_wrong(words: List[str]) -> None:
    """Status 2."""
    with pytest.raises(SystemExit) as ended:
        adoptctl_main(words)
    assert ended.value.code == 2


@pytest.mark.parametrize("option", [["--from", "10.0.0.1:1"], ["--to", "10.0.0.1:1"], ["--option", "mode=enforce"]])
def test_a_session_is_explained_as_it_was_decided(capsys: Captured, option: List[str]) -> None:
    """What would change a decision is for a user's next login."""
    assert adoptctl_main(["explain", "42", "--socket", "/nonexistent", *option]) == 2
    assert "go with --user" in capsys.readouterr().err


def run_watch(path: Path, *words: str) -> subprocess.Popen[str]:
    code = "import sys\nfrom adoptd.cli import adoptctl_main\nsys.exit(adoptctl_main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, "watch", "--socket", str(path), *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Ignored by all that a shell starts in the background, us among them, and by what we start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_watch_prints_lines_until_the_agent_goes(tmp_path: Path) -> None:
    """As it gets them; the last words are on standard error, and the status says that it did not end by our wish."""
    script = stream(EVENT, {"dropped": 3}, {"end": "the agent is stopping"})
    with scripted_agent(tmp_path / "s", lambda command: script) as commands:
        out, err = run_watch(tmp_path / "s", "--kind", "adoption", "--kind", "denial", "--user", "x").communicate(
            timeout=120
        )
    assert commands[0] == Command("watch", {"kinds": "adoption,denial", "user": "x"})
    first, second = out.splitlines()
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d adoption  alice +adopted job 17 reason=callerid latency_ms=1\.25 request=ab12cd34", first
    )
    assert (second, err) == ("-- 3 events were too many to be shown", "watch: the agent is stopping\n")


def test_watch_as_json_is_one_document_per_line(tmp_path: Path) -> None:
    """The events whole, and how many were dropped."""
    script = stream(EVENT, {"dropped": 3})
    with scripted_agent(tmp_path / "s", lambda command: script):
        process = run_watch(tmp_path / "s", "--json")
        out, err = process.communicate(timeout=120)
    assert [json.loads(line) for line in out.splitlines()] == [EVENT, {"dropped": 3}]
    assert (process.returncode, err) == (1, "watch: the agent has gone; it may have been restarted\n")


def test_watch_is_interrupted_without_a_traceback(tmp_path: Path) -> None:
    """130, as a shell has it, and nothing said."""
    reader, writer = os.pipe()

    def script(command: Command) -> Reply:
        os.read(reader, 1)
        return None

    with scripted_agent(tmp_path / "s", script) as commands:
        process = run_watch(tmp_path / "s")
        until(lambda: commands or process.poll() is not None, "the command")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        os.write(writer, b"x")
    os.close(reader)
    os.close(writer)
    assert (process.returncode, out, err) == (130, "", "")


HOSTILE = "\x1b[2J\x1b]0;title\x07\nroot"


def test_a_terminal_is_not_driven_by_names(capsys: Captured, tmp_path: Path) -> None:
    """Users, jobs and addresses are whatever others chose."""
    line = event_line({**EVENT, "user": HOSTILE, "job": HOSTILE, "reason": HOSTILE, "kind": HOSTILE, HOSTILE: HOSTILE})
    assert line.isprintable()
    hostile = {name: HOSTILE if isinstance(value, str) else value for name, value in SESSION.items()}
    ctl(tmp_path / "s", {"sessions": [hostile]}, "sessions")
    ctl(tmp_path / "t", {**hostile, "stages": [{"stage": HOSTILE, "found": HOSTILE, "at_ms": 1}]}, "explain", "42")
    ctl(tmp_path / "u", {**WHEREAMI, "job": HOSTILE, "other_jobs": [HOSTILE], "advice": HOSTILE}, "whereami")
    assert all(shown.isprintable() for shown in capsys.readouterr().out.splitlines())
