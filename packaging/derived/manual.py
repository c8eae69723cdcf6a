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
        lines += ["Needs a restart."] * item.restart
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
        own = _own(command, program.shared)
        lines += [f".It Ic {command.name}{''.join(f' {part}' for part in _usage(command, own))}"]
        lines += [_plain(_sentence(_capital(command.text)))]
        lines += _described(own)
    lines += [".El"]
    if program.shared:
        lines += [".Pp", "All of them take:", *_described(program.shared)]
    return "\n".join(lines)


def _described(arguments: Sequence[Argument]) -> Sequence[str]:
    texts = [argument for argument in arguments if argument.text]
    if not texts:
        return ()
    lines = [".Bl -tag -width Ds"]
    for argument in texts:
        lines += [f".It {_term(argument)}", _plain(_sentence(_capital(argument.text)))]
    return [*lines, ".El"]


def _own(command: Subcommand, shared: Sequence[Argument]) -> Sequence[Argument]:
    """What is to be said of a command itself: not what all have, unless it is another thing here."""
    common = {(option.flags, option.text) for option in shared}
    options = [each for each in command.options if "--help" not in each.flags and (each.flags, each.text) not in common]
    return [*command.operands, *options]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _term(argument: Argument) -> str:
    value = f" Ar {_words(argument.value)}" if argument.value else ""
    if not argument.flags:
        return value.strip()
    return " , ".join(f"Fl {flag[1:]}{value}" for flag in argument.flags)


def _usage(command: Subcommand, arguments: Sequence[Argument]) -> Sequence[str]:
    """The arguments as the head of the command's entry has them; alternatives as one, with a bar between them."""
    parts: List[str] = []
    for argument in arguments:
        group = next((dests for dests in command.alternatives if argument.dest in dests), ())
        several = " ..." if argument.repeats else ""
        if group and argument.dest != group[0]:
            continue
        if group:
            parts.append(" | ".join(_term(each) for dest in group for each in arguments if each.dest == dest))
        elif argument.required:
            parts.append(_term(argument) + several)
        else:
            # Oo and Oc: what Op encloses goes on to the end of the line, the options that follow included.
            parts.append(f"Oo {_term(argument)} Oc{several}")
    return parts
