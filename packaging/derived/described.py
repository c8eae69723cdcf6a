"""The texts about keys and options that people read, and the tables they are about, brought together.

Owns the format of ``docs/man/keys.txt`` and ``docs/man/pam_options.txt``: a ``[table]`` line, then ``name: text``
or ``name (default): text`` with further lines indented. A name that has no text, or a text whose name is gone, is a
fault, which a test of the project fails for; a package of that day has the name without a text. Called by the pages
and the template.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Mapping, Tuple

from adoptd import config, pam_lines

_TABLE = re.compile(r"\[(\w+)\]")
_ENTRY = re.compile(r"(?P<name>\w+)(?: \((?P<default>[^)]*)\))?: (?P<text>\S.*)")


class DocumentationError(Exception):
    """A file of texts cannot be read."""


@dataclass(frozen=True)
class Described:
    """One key or option. ``default`` and ``expected`` are as a configuration file or a PAM line would have them.

    ``restart``: a reload of the agent does not take another value over.
    """

    name: str
    default: str
    expected: str
    text: str
    restart: bool = False


@dataclass(frozen=True)
class Table:
    """One table of the configuration file."""

    name: str
    text: str
    keys: Tuple[Described, ...]


def faults(keys: Path, options: Path) -> Tuple[str, ...]:
    """Where the texts and the tables do not have the same names, one sentence each. Raises DocumentationError."""
    known = {f"[{table.name}] {key.name}" for table in configuration(keys) for key in table.keys}
    pairs = (
        (keys, {f"[{table}] {name}" for table, name in _read(keys)}, known),
        (options, {name for _, name in _read(options)}, set(pam_lines.OPTIONS)),
    )
    found = [f"{file}: {name} is not described" for file, described, names in pairs for name in names - described]
    found += [f"{file}: there is no {name}" for file, described, names in pairs for name in described - names]
    return tuple(sorted(found))


def configuration(file: Path) -> Tuple[Table, ...]:
    """The tables of adoptd.toml in their order, with the texts in ``file``. Raises DocumentationError."""
    texts, shown, defaults = _read(file), _shown_defaults(), config.Config()
    tables: List[Table] = []
    for item in dataclasses.fields(defaults):
        section = getattr(defaults, item.name)
        keys = [
            Described(
                key.name,
                shown[item.name, key.name],
                key.metadata["rule"].expected,
                texts.get((item.name, key.name), ("", ""))[1],
                key.metadata["rule"].restart,
            )
            for key in dataclasses.fields(section)
        ]
        # The docstring of a section is "[table]: what it is about."
        about = " ".join((section.__doc__ or "").split()).partition(": ")[2]
        tables.append(Table(item.name, about, tuple(keys)))
    return tuple(tables)


def pam_options(file: Path) -> Tuple[Described, ...]:
    """The options of pam_adopt.so, with the texts in ``file``. Raises DocumentationError."""
    texts = {name: entry for (_, name), entry in _read(file).items()}
    return tuple(
        Described(name, texts.get(name, ("", ""))[0], expected, texts.get(name, ("", ""))[1])
        for name, (_, expected) in pam_lines.OPTIONS.items()
    )


def _shown_defaults() -> Mapping[Tuple[str, str], str]:
    # As `adoptd config show` prints them: the one place that knows how a value is written in TOML.
    shown: Dict[Tuple[str, str], str] = {}
    table = ""
    for line in config.show(config.Config()).splitlines():
        match = _TABLE.fullmatch(line)
        if match:
            table = match[1]
        elif line:
            name, _, value = line.partition(" = ")
            shown[table, name] = value
    return shown


def _read(file: Path) -> Mapping[Tuple[str, str], Tuple[str, str]]:
    """(table, name): (default, text)."""
    entries: Dict[Tuple[str, str], Tuple[str, str]] = {}
    table, current = "", ("", "")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        header, entry = _TABLE.fullmatch(line), _ENTRY.fullmatch(line)
        if header:
            table = header[1]
        elif entry:
            current = (table, entry["name"])
            if current in entries:
                raise DocumentationError(f"{file}:{number}: {entry['name']} is described twice")
            entries[current] = (entry["default"] or "", entry["text"].strip())
        elif line.startswith("  ") and current in entries:
            default, text = entries[current]
            entries[current] = (default, f"{text} {line.strip()}")
        else:
            raise DocumentationError(f"{file}:{number}: expected [table], name: text, or an indented line: {line!r}")
    return entries
