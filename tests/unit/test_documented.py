"""What people read about keys, options and commands, beside the code that has them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Iterator

import pytest

from adoptd import config

ROOT = Path(__file__).resolve().parents[2]
MAN = ROOT / "docs/man"


@pytest.fixture(autouse=True)
def _generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "packaging"))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "derived"]:
        del sys.modules[name]


def test_every_key_and_option_is_described_and_no_other() -> None:
    """In docs/man/keys.txt and pam_options.txt, from which the pages and the template are made."""
    from derived.described import faults

    assert faults(MAN / "keys.txt", MAN / "pam_options.txt") == ()


def test_a_key_without_a_text_is_a_fault(tmp_path: Path) -> None:
    """And so is a text without a key: the test above can fail."""
    from derived.described import faults

    keys = tmp_path / "keys.txt"
    text = (MAN / "keys.txt").read_text(encoding="utf-8")
    keys.write_text(text.replace("log_level:", "loudness:"), encoding="utf-8")
    found = faults(keys, MAN / "pam_options.txt")
    assert [fault.partition(": ")[2] for fault in found] == [
        "[agent] log_level is not described",
        "there is no [agent] loudness",
    ]


def test_every_command_option_and_argument_has_its_help() -> None:
    """They are what adoptd(8), adoptctl(1) and zsh's completion say."""
    from derived.commands import programs

    for program in programs():
        assert program.text
        for command in program.commands:
            assert command.text, f"{program.name} {command.name}"
            for argument in command.arguments:
                assert argument.text, f"{program.name} {command.name} {argument.flags or argument.dest}"


def test_the_pages_name_every_one_of_them() -> None:
    """No page is made without what it is about."""
    from derived.commands import programs
    from derived.manual import PAGES, pages

    from adoptd.pam_lines import OPTIONS

    made = pages(MAN, 0)
    assert tuple(made) == PAGES
    for program, page in zip(programs(), ("adoptd.8", "adoptctl.1")):
        for command in program.commands:
            assert f".It Ic {command.name}" in made[page]
            for option in command.options:
                assert option.flags[-1] == "--help" or f"Fl {option.flags[-1][1:]}" in made[page]
    for name in OPTIONS:
        assert f".It Cm {name} " in made["pam_adopt.8"]
    assert not [line for text in made.values() for line in text.splitlines() if "@" in line]


def test_the_template_is_the_defaults_and_has_every_key(tmp_path: Path) -> None:
    """As it is installed it changes nothing; with every comment of a key taken away it is the defaults too."""
    from derived.template import template

    text = template(MAN / "keys.txt")
    file = tmp_path / "adoptd.toml"
    file.write_text(text, encoding="utf-8")
    assert config.load(file) == config.Config()
    file.write_text(re.sub(r"^#(\w+ = )", r"\1", text, flags=re.MULTILINE), encoding="utf-8")
    assert config.load(file) == config.Config()
    assert config.show(config.load(file)).count(" = ") == len(re.findall(r"^#\w+ = ", text, re.MULTILINE))


def test_the_modules_defaults_are_the_documented_ones() -> None:
    """By its own initialiser in C."""
    from derived.described import pam_options

    source = (ROOT / "pam_hook/options.c").read_text(encoding="utf-8")
    block = source[source.index("*options = (struct options){") :].partition("};")[0]
    constants = dict(re.findall(r"#define (\w+)\s+(\d+)", (ROOT / "pam_hook/options.h").read_text(encoding="utf-8")))
    found = dict(re.findall(r"\.(\w+) = ([^,]+),", block))
    for option in pam_options(MAN / "pam_options.txt"):
        value = found[option.name]
        if value.startswith('"'):
            value = value.strip('"')
        elif value in constants:
            value = constants[value]
        elif option.expected == "true or false":
            value = "true" if value == "1" else "false"
        else:
            value = re.sub(r"^(ADOPT_ACTION|ADOPT_MODE|LEVEL)_", "", value).lower()
        assert value == option.default, option.name
    assert len(found) == len(pam_options(MAN / "pam_options.txt"))
