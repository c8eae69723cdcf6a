"""Manual pages in mdoc(7): the prose of ``docs/man/*.in`` with what the code knows in the place of its ``@...@`` lines.

``@commands@`` becomes the commands of the page's program, ``@keys@`` those of the configuration, ``@options@`` those
of the PAM module, ``@date@`` the day of the release. Called by the command line of this package.
"""

from __future__ import annotations

import re
import textwrap
import time
from pathlib import Path
from typing import Callable, List, Mapping, Sequence

from derived.commands import Argument, Program, Subcommand, programs
from derived.described import Described, configuration, pam_options

_WIDTH = 78
PAGES = ("adoptd.8", "adoptctl.1", "adoptd.toml.5", "pam_adopt.8")

_PLACE = re.compile(r"@(\w+)@", re.MULTILINE)
# A macro's name as a word of an argument would be read as the macro (mdoc(7), MACRO SYNTAX).
_MACRO = re.compile(r"[A-Z][A-Za-z]{1,2}")


def pages(sources: Path, epoch_s: int) -> Mapping[str, str]:
    """Each page's text by its file name. Raises DocumentationError where text and code do not agree."""
    program = {program.name: program for program in programs()}
    values: Mapping[str, Callable[[str], str]] = {
        "commands": lambda page: _commands(program[page.partition(".")[0]]),
        "keys": lambda page: _keys(sources / "keys.txt"),
        "options": lambda page: _list(pam_options(sources / "pam_options.txt"), "="),
        "date": lambda page: time.strftime("%B %-d, %Y", time.gmtime(epoch_s)),
    }

    def page(name: str) -> str:
        text = (sources / f"{name}.in").read_text(encoding="utf-8")
        return _wrapped(_PLACE.sub(lambda match: values[match[1]](name), text))

    return {name: page(name) for name in PAGES}


def _wrapped(page: str) -> str:
    """The page with no line of text longer than others can read in their terminals; literal ones stay as they are."""
    lines: List[str] = []
    literal = False
    for line in page.splitlines():
        literal = line.startswith(".Bd -literal") or (literal and not line.startswith(".Ed"))
        if literal or line.startswith("."):
            lines.append(line)
        else:
            # No word may come first that roff would take for a request.
            lines += [
                _first(part) for part in textwrap.wrap(line, _WIDTH, break_long_words=False, break_on_hyphens=False)
            ]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text as roff takes it: one sentence a line, so that it is spaced as sentences are."""
    sentences = re.split(r"(?<=[a-z0-9)\"][.!?]) +(?=[A-Z])", text.strip())
    return "\n".join(_line(sentence) for sentence in sentences)


def _line(text: str) -> str:
    return _first(text.replace("\\", "\\e"))


def _first(line: str) -> str:
    return f"\\&{line}" if line[:1] in (".", "'") else line


def _words(text: str) -> str:
    """Text as words of a macro's line."""
    return " ".join(f"\\&{word}" if _MACRO.fullmatch(word) else word.replace('"', "\\(dq") for word in text.split())


def _list(items: Sequence[Described], equals: str) -> str:
    lines = [".Bl -tag -width Ds"]
    for item in items:
        value = item.default if item.default else "VALUE"
        lines += [
            f".It Cm {item.name} Ns Li {equals}{_words(value)}"
            if equals == "="
            else f".It Cm {item.name} Li = {_words(value)}"
        ]
        lines += [_plain(_sentence(item.text)), f"Expected: {_line(item.expected)}."]
    return "\n".join([*lines, ".El"])


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _keys(file: Path) -> str:
    lines: List[str] = []
    for table in configuration(file):
        lines += [f".Ss [{table.name}]", _plain(table.text[:1].upper() + table.text[1:]), _list(table.keys, " = ")]
    return "\n".join(lines)


def _commands(program: Program) -> str:
    lines = [".Bl -tag -width Ds"]
    for command in program.commands:
        lines += [f".It Ic {command.name}{''.join(f' {_usage(a)}' for a in (*command.operands, *_shown(command)))}"]
        lines += [_plain(_sentence(command.text[:1].upper() + command.text[1:]))]
        described = [argument for argument in (*command.operands, *_shown(command)) if argument.text]
        if described:
            lines += [".Bl -tag -width Ds"]
            for argument in described:
                lines += [f".It {_term(argument)}", _plain(_sentence(argument.text[:1].upper() + argument.text[1:]))]
            lines += [".El"]
    return "\n".join([*lines, ".El"])


def _shown(command: Subcommand) -> Sequence[Argument]:
    return [option for option in command.options if "--help" not in option.flags]


def _term(argument: Argument) -> str:
    value = f" Ar {_words(argument.value)}" if argument.value else ""
    if not argument.flags:
        return value.strip()
    return " , ".join(f"Fl {flag[1:]}{value}" for flag in argument.flags)


def _usage(argument: Argument) -> str:
    if not argument.flags:
        shown = _term(argument) + (" ..." if argument.repeats else "")
        return shown if argument.required else f"Op {shown}"
    shown = _term(argument)
    return shown if argument.required else f"Op {shown}"
