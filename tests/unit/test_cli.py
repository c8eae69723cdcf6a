"""The commands as people and scripts meet them: exit statuses, one JSON document, and what goes where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import pytest
from nobody import environment
from scripted import scripted_agent

from adoptd import __version__, config
from adoptd.cli import adoptctl_main, adoptd_main
from adoptd.wire.control import Command, Result

Captured = pytest.CaptureFixture[str]

EXPLAINED: Result = {
    "user": "alice",
    "verdict": "deny",
    "outcome": "denied",
    "reason": "unknown",
    "job": None,
    "witness": None,
    "message": "Access to n1 refused",
    "stages": [{"stage": "jobs_here", "found": "18, 17", "at_ms": 0.51}],
}
RESULTS: Dict[str, Result] = {
    "status": {"version": __version__, "witnesses": {"bpf": "ok", "proc": "no /proc"}, "seal": None},
    "jobs": {"jobs": [{"job": "17", "uid": 0}, {"job": "18", "uid": 4294000000}]},
    "whois": {"connection": "a > b", "job": "17", "witness": "bpf", "detail": ""},
    "explain": EXPLAINED,
}


def ctl(path: Path, *words: str) -> Tuple[int, List[Command]]:
    """The exit status of ``adoptctl``, and what it asked the agent."""
    with scripted_agent(path, lambda command: dict(RESULTS[command.name])) as commands:
        status = adoptctl_main([words[0], "--socket", str(path), *words[1:]])
    return status, commands


# ---- the command line is wrong: 2


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["reboot"],
        ["status", "extra"],
        ["whois"],
        ["whois", "127.0.0.1:1"],
        ["whois", "127.0.0.1:1", "localhost:22"],
        ["whois", "::1:1", "[::1]:22"],
        ["whois", "127.0.0.1:0", "127.0.0.1:22"],
        ["explain"],
        ["explain", "--user", "alice", "--from", "10.0.0.1"],
        ["jobs", "--json=yes"],
    ],
    ids=" ".join,
)
def test_adoptctl_arguments_that_are_wrong(capsys: Captured, words: Sequence[str]) -> None:
    """Status 2, the usage on standard error, nothing on standard output."""
    with pytest.raises(SystemExit) as ended:
        adoptctl_main(words)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: adoptctl")


@pytest.mark.parametrize(
    "words", [[], ["start"], ["probe"], ["probe", "reload"], ["config", "edit"], ["config"]], ids=" ".join
)
def test_adoptd_arguments_that_are_wrong(capsys: Captured, words: Sequence[str]) -> None:
    """Likewise."""
    with pytest.raises(SystemExit) as ended:
        adoptd_main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().out == ""


def test_an_abbreviated_option_is_told_apart(capsys: Captured) -> None:
    """The message for an endpoint shows what was given and the form that was expected."""
    with pytest.raises(SystemExit):
        adoptctl_main(["whois", "10.0.0.1", "10.0.0.2:22"])
    assert "'10.0.0.1' is not IPV4:PORT or [IPV6]:PORT" in capsys.readouterr().err


# ---- the configuration is wrong: 2; the thing failed: 1


@pytest.mark.parametrize("words", [["config", "check"], ["config", "show"], ["probe", "status"]])
def test_a_configuration_that_is_wrong(capsys: Captured, tmp_path: Path, words: List[str]) -> None:
    """Status 2 and the one sentence of config, with the command before it."""
    path = tmp_path / "adoptd.toml"
    path.write_text("[callerid]\nport = 'x'\n")
    assert adoptd_main([*words, "--config", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (f"{words[0]}: {path}: callerid.port is 'x', expected a whole number in 1..65535\n")


def test_a_configuration_that_is_not_there(capsys: Captured, tmp_path: Path) -> None:
    """Named on the command line, so an error for adoptctl as well."""
    path = tmp_path / "gone.toml"
    assert adoptctl_main(["status", "--config", str(path)]) == 2
    assert capsys.readouterr().err == f"status: {path}: cannot be read: No such file or directory\n"


@pytest.mark.parametrize("words", [["status"], ["jobs"], ["whois", "127.0.0.1:1", "127.0.0.1:22"]])
@pytest.mark.parametrize("as_json", [True, False])
def test_no_agent(capsys: Captured, tmp_path: Path, words: List[str], as_json: bool) -> None:
    """Status 1, a sentence on standard error, and no half of a JSON document."""
    status = adoptctl_main([*words, "--socket", str(tmp_path / "s"), *(["--json"] if as_json else [])])
    captured = capsys.readouterr()
    assert (status, captured.out) == (1, "")
    assert captured.err == f"{words[0]}: no agent is running: nobody serves {tmp_path}/s\n"


def test_the_agent_s_refusal_is_shown(capsys: Captured, tmp_path: Path) -> None:
    """Its words, status 1."""
    with scripted_agent(tmp_path / "s", lambda command: "only root may ask about another user ('bob')"):
        assert (
            adoptctl_main(["explain", "--user", "bob", "--option", "mode=enforce", "--socket", str(tmp_path / "s")])
            == 1
        )
    assert capsys.readouterr().err == "explain: only root may ask about another user ('bob')\n"


def test_only_root_runs_the_agent() -> None:
    """Status 1 and why, before anything is opened."""
    code = "import os\nfrom adoptd.cli import adoptd_main\nos.setuid(65534)\n"
    ended = subprocess.run(
        [sys.executable, "-c", code + "print(adoptd_main(['run', '--config', '/nonexistent']))"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.stdout, ended.stderr) == ("1\n", "run: the agent runs as root, not as uid 65534\n")


def test_run_with_a_configuration_that_is_wrong(capsys: Captured, tmp_path: Path) -> None:
    """The start stops with status 2 and the sentence."""
    path = tmp_path / "adoptd.toml"
    path.write_text("[agnet]\n")
    assert adoptd_main(["run", "--config", str(path)]) == 2
    assert "unknown table [agnet]" in capsys.readouterr().err


# ---- what is printed


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["status"], Command("status", {})),
        (["jobs"], Command("jobs", {})),
        (
            ["whois", "[::ffff:10.0.0.1]:40000", "10.0.0.2:22"],
            Command("whois", {"source": "10.0.0.1:40000", "destination": "10.0.0.2:22"}),
        ),
        (
            ["whois", "[fd00::1]:40000", "[fd00::2]:22", "--at", "n2"],
            Command("whois", {"source": "[fd00::1]:40000", "destination": "[fd00::2]:22", "at": "n2"}),
        ),
        (
            ["explain", "--user", "alice", "--from", "10.0.0.1:5", "--option", "mode=observe", "--option", "service=*"],
            Command("explain", {"user": "alice", "from": "10.0.0.1:5", "options": "mode=observe service=*"}),
        ),
    ],
)
def test_json_is_one_document_and_nothing_else(
    capsys: Captured, tmp_path: Path, words: List[str], command: Command
) -> None:
    """The agent's result as it came, for every command; standard error is silent."""
    status, commands = ctl(tmp_path / "s", *words, "--json")
    captured = capsys.readouterr()
    assert (status, captured.err, commands) == (0, "", [command])
    assert json.loads(captured.out) == RESULTS[command.name]


def test_jobs_for_people(capsys: Captured, tmp_path: Path) -> None:
    """A table; a uid that has no name is shown as the number."""
    ctl(tmp_path / "s", "jobs")
    assert [row.split() for row in capsys.readouterr().out.splitlines()] == [
        ["JOB", "USER"],
        ["17", "root"],
        ["18", "4294000000"],
    ]


def test_status_for_people(capsys: Captured, tmp_path: Path) -> None:
    """Nested parts indented, empty ones left out."""
    ctl(tmp_path / "s", "status")
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert rows == [["version:", __version__], ["witnesses:"], ["bpf:", "ok"], ["proc:", "no", "/proc"]]


def test_explain_for_people(capsys: Captured, tmp_path: Path) -> None:
    """Stage by stage with its time, then the decision."""
    ctl(tmp_path / "s", "explain", "--user", "alice", "--option", "mode=enforce")
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["0.51", "ms", "jobs_here", "18,", "17"]
    assert ["verdict:", "deny"] in [row.split() for row in rows]
    assert ["message:", "Access", "to", "n1", "refused"] in [row.split() for row in rows]


def test_config_check_and_show(capsys: Captured, tmp_path: Path) -> None:
    """check says it is right; show writes what load() reads back to the same value."""
    path = tmp_path / "adoptd.toml"
    path.write_text("[callerid]\nport = 7000\n")
    assert adoptd_main(["config", "check", "--config", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: right\n"
    assert adoptd_main(["config", "show", "--config", str(path)]) == 0
    shown = tmp_path / "shown.toml"
    shown.write_text(capsys.readouterr().out)
    assert config.load(shown) == config.load(path)


def test_the_socket_of_the_configuration(capsys: Captured, tmp_path: Path) -> None:
    """Without --socket the configuration says where the agent is."""
    path = tmp_path / "adoptd.toml"
    path.write_text(f'[agent]\nuser_socket = "{tmp_path}/u"\n')
    with scripted_agent(tmp_path / "u", lambda command: dict(RESULTS["jobs"])):
        assert adoptctl_main(["jobs", "--config", str(path)]) == 0


def test_versions(capsys: Captured) -> None:
    """Both commands say theirs, status 0."""
    for main, name in ((adoptd_main, "adoptd"), (adoptctl_main, "adoptctl")):
        with pytest.raises(SystemExit) as ended:
            main(["--version"])
        assert ended.value.code == 0
        assert capsys.readouterr().out == f"{name} {__version__}\n"


def test_a_reader_that_has_gone_is_no_traceback(tmp_path: Path) -> None:
    """adoptctl jobs | head: a quiet end with a status."""
    rows = {"jobs": [{"job": str(n), "uid": 0} for n in range(20_000)]}
    reading, writing = os.pipe()
    os.close(reading)
    with scripted_agent(tmp_path / "s", lambda command: rows):
        ended = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys\nfrom adoptd.cli import adoptctl_main\nsys.exit(adoptctl_main(sys.argv[1:]))",
                "jobs",
                "--socket",
                str(tmp_path / "s"),
            ],
            env=environment(),
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_an_ordinary_user_finds_the_agent_without_the_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The default file is root's to read: then the agent is asked where it is by default."""
    asked: List[str] = []

    def ask(path: str, command: Command) -> Result:
        asked.append(path)
        return {}

    monkeypatch.setattr("adoptd.cli.DEFAULT_FILE", tmp_path / "not-readable.toml")
    monkeypatch.setattr("adoptd.cli.ask_agent", ask)
    assert adoptctl_main(["status", "--json"]) == 0
    assert asked == [config.AgentConfig().user_socket]
