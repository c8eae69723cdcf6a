"""A command's parser as data: its commands, their options and arguments. All that is known of argparse's insides.

Called by the pages and the completions, which list nothing of their own.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import List, Tuple

from adoptd.cli import adoptctl_parser, adoptd_parser


@dataclass(frozen=True)
class Argument:
    """One option, or an argument, which has no ``flags``. ``value`` is what stands for its value, "" for none."""

    flags: Tuple[str, ...]
    value: str
    choices: Tuple[str, ...]
    text: str
    required: bool
    repeats: bool
    is_file: bool
    dest: str


@dataclass(frozen=True)
class Subcommand:
    """One of a program's commands. Of each of ``alternatives``, which are arguments' ``dest``, one is given."""

    name: str
    text: str
    arguments: Tuple[Argument, ...]
    alternatives: Tuple[Tuple[str, ...], ...] = ()

    @property
    def options(self) -> Tuple[Argument, ...]:
        """Those with a flag."""
        return tuple(argument for argument in self.arguments if argument.flags)

    @property
    def operands(self) -> Tuple[Argument, ...]:
        """Those without."""
        return tuple(argument for argument in self.arguments if not argument.flags)


@dataclass(frozen=True)
class Program:
    """A program with commands. ``options`` are those that stand before a command."""

    name: str
    text: str
    options: Tuple[Argument, ...]
    commands: Tuple[Subcommand, ...]

    @property
    def shared(self) -> Tuple[Argument, ...]:
        """The options of its commands that all of them have, --help left out."""
        flags = [{option.flags for option in command.options} for command in self.commands]
        return tuple(
            option
            for option in self.commands[0].options
            if "--help" not in option.flags and all(option.flags in each for each in flags)
        )


def programs() -> Tuple[Program, ...]:
    """adoptd and adoptctl as their parsers have them."""
    return tuple(_program(parser) for parser in (adoptd_parser(), adoptctl_parser()))


def _program(parser: argparse.ArgumentParser) -> Program:
    commands: List[Subcommand] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, below in action.choices.items():
                commands.append(Subcommand(name, texts.get(name, ""), _arguments(below), _alternatives(below)))
    return Program(parser.prog, parser.description or "", _arguments(parser), tuple(commands))


def _alternatives(parser: argparse.ArgumentParser) -> Tuple[Tuple[str, ...], ...]:
    return tuple(
        tuple(action.dest for action in group._group_actions)
        for group in parser._mutually_exclusive_groups
        if group.required
    )


def _arguments(parser: argparse.ArgumentParser) -> Tuple[Argument, ...]:
    found: List[Argument] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        choices = tuple(str(choice) for choice in action.choices or ())
        text = parser._get_formatter()._expand_help(action) if action.help else ""
        found.append(
            Argument(
                tuple(action.option_strings),
                "" if action.nargs == 0 else _value(action, choices),
                choices,
                text,
                action.required,
                action.nargs in ("*", "+") or isinstance(action, argparse._AppendAction),
                action.type is Path,
                action.dest,
            )
        )
    return tuple(found)


def _value(action: argparse.Action, choices: Tuple[str, ...]) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    if choices:
        return "|".join(choices)
    if action.type is Path:
        return "FILE"
    return action.dest.upper()
