"""The manual pages as those who render them see them, and the completions in real shells."""

from __future__ import annotations

import dataclasses
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import List

import pytest

from package.conftest import ROOT

PAGES = ("adoptd.8", "adoptctl.1", "adoptd.toml.5", "pam_adopt.8")
COMPLETE_TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that is made for a package."""
    into = tmp_path_factory.mktemp("made")
    path = f"{ROOT / 'agent'}:{ROOT / 'packaging'}"
    subprocess.run(
        [sys.executable, "-B", "-m", "derived", "--into", into],
        check=True,
        env={**os.environ, "PYTHONPATH": path, "SOURCE_DATE_EPOCH": "0"},
    )
    return into


@pytest.mark.parametrize("page", PAGES)
def test_mandoc_finds_no_fault(made: Path, page: str) -> None:
    """Nothing from warnings up."""
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", made / "man" / page], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("page", PAGES)
def test_groff_renders_it_without_a_warning(made: Path, page: str) -> None:
    """As man(1) does on Debian."""
    done = subprocess.run(
        ["man", "--warnings", "--encoding=UTF-8", "--local-file", made / "man" / page],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "100", "MANROFFOPT": ""},
    )
    assert done.stderr == ""
    assert "NAME" in done.stdout
    assert "SEE ALSO" in done.stdout


@pytest.mark.parametrize(
    ("page", "shown"),
    [
        ("adoptctl.1", "whois SOURCE DESTINATION [--at NODE]"),
        (
            "adoptctl.1",
            "explain SESSION_OR_PID | --user USER [--from IP:PORT] [--to IP:PORT] [--option NAME=VALUE] ...",
        ),
        ("adoptd.8", "doctor [--json] [--service SERVICE] [--peer NODE] ... [--deep] [--timeout SECONDS]"),
    ],
)
def test_options_stand_beside_each_other(made: Path, page: str, shown: str) -> None:
    """Each in brackets of its own, alternatives with a bar; what all commands take is said once."""
    done = subprocess.run(
        ["mandoc", "-T", "utf8", "-O", "width=200", made / "man" / page], capture_output=True, text=True, check=True
    )
    # Bold and underlined letters are overstruck.
    text = re.sub(".\b", "", done.stdout)
    lines = [line.strip() for line in text.splitlines()]
    assert shown in lines, text
    assert "]]" not in text
    assert sum(line.startswith("--config FILE") for line in lines) == 1


def test_the_installed_configuration_says_what_each_key_takes(made: Path) -> None:
    """And which of them a reload does not take over."""
    from adoptd.config import Config

    found = re.findall(r"((?:^# .*\n)+)#(\w+ = .*)$", (made / "adoptd.toml").read_text(), re.MULTILINE)
    about = {setting: text for text, setting in found}
    assert "Expected: one of" in about['notice = "choice"']
    assert "(restart)" not in about['notice = "choice"']
    assert "(restart)" in about["port = 6830"]
    sections = [getattr(Config(), each.name) for each in dataclasses.fields(Config())]
    assert len(found) == sum(len(dataclasses.fields(section)) for section in sections)
    assert [text for text, _ in found if "# Expected: " not in text] == []


def _bash(made: Path, program: str, *words: str) -> List[str]:
    """What bash offers for the last of ``words``, in the function's own variables."""
    array = " ".join(f"'{word}'" for word in (program, *words))
    script = f"""
        . {made}/bash/{program}
        complete -p {program} >/dev/null || exit 9
        compopt() {{ :; }}
        COMP_WORDS=({array}); COMP_CWORD={len(words)}
        _{program}
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("adoptd", "pro"), ["probe"]),
        (("adoptd", "probe", ""), ["load", "unload", "status"]),
        (("adoptd", "probe", "--json", "st"), ["status"]),
        (("adoptd", "config", "--config", "/dev/null", "c"), ["check"]),
        (("adoptd", "config", "--config", "=", "/dev/null", "c"), ["check"]),
        (("adoptd", "--"), ["--help", "--version"]),
        (("adoptctl", "who"), ["whois"]),
        (("adoptctl", "explain", "--user", "roo"), ["root"]),
        (("adoptctl", "explain", "--user", "=", "roo"), ["root"]),
        (("adoptctl", "status", "--js"), ["--json"]),
        (("adoptctl", "status", "--socket", "/dev/nul"), ["/dev/null"]),
        (("adoptctl", "nosuch", "--"), []),
    ],
)
def test_bash_completes(made: Path, words: List[str], offered: List[str]) -> None:
    """Commands, their options, fixed words, users, files; after a value, what comes next."""
    assert _bash(made, *words) == offered


def test_bash_offers_every_command(made: Path) -> None:
    """Those of the parser, and the options before them."""
    from adoptd.cli import adoptctl_parser, adoptd_parser

    for parser in (adoptd_parser(), adoptctl_parser()):
        shown = parser.format_usage() + parser.format_help()
        offered = _bash(made, parser.prog, "")
        assert len(offered) > 3
        assert [name for name in offered if name not in shown] == []


@pytest.mark.parametrize("program", ["adoptd", "adoptctl"])
def test_the_scripts_are_sound(made: Path, program: str) -> None:
    """shellcheck for bash, zsh's own parser for zsh."""
    checked = subprocess.run(["shellcheck", made / "bash" / program], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")
    subprocess.run(["zsh", "-n", made / "zsh" / f"_{program}"], check=True)


def _typed_into_zsh(made: Path, line: str, wanted: str) -> str:
    """What a zsh on a terminal shows once ``line`` and a tab are typed, until ``wanted`` is there."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": "dumb", "ZDOTDIR": str(made), "PS1": ""})
        os.execvp("zsh", ["zsh", "-f", "-i"])
    try:
        begin = f"fpath=({made}/zsh $fpath); autoload -Uz compinit; compinit -u -D; echo re''ady\n"
        _read_until(terminal, begin, "ready\r\n")
        return _read_until(terminal, f"{line}\t", wanted)
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def _read_until(terminal: int, typed: str, wanted: str) -> str:
    os.write(terminal, typed.encode())
    shown, deadline = "", time.monotonic() + COMPLETE_TIMEOUT_S
    while wanted not in shown and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 65536).decode(errors="replace")
    return shown


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("adoptd pro", "adoptd probe"),
        ("adoptd probe unl", "adoptd probe unload"),
        ("adoptctl who", "adoptctl whois"),
        ("adoptctl status --js", "adoptctl status --json"),
        ("adoptctl explain --user roo", "adoptctl explain --user root"),
    ],
)
def test_zsh_completes(made: Path, line: str, wanted: str) -> None:
    """On a real terminal, as it is typed."""
    assert wanted in _typed_into_zsh(made, line, wanted)
