"""The commented configuration file that a package installs: every key, its default behind a ``#``.

A comment is taken away to change a key; a file of comments only is the defaults. Called by the command line of this
package.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from derived.described import configuration

_HEAD = """\
# The configuration of adoptd; adoptd.toml(5) says more about each key.
# What is behind a "#" here is the default. Files of conf.d/ beside this one are read after it, by name.
# "adoptd config check" says whether all of it is right, "systemctl reload adoptd" has it taken over.
"""
_WIDTH = 100


def template(keys: Path) -> str:
    """The file's text. Raises DocumentationError where a key has no description."""
    parts = [_HEAD]
    for table in configuration(keys):
        lines = [f"[{table.name}]"]
        for key in table.keys:
            lines += textwrap.wrap(
                key.text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False
            )
            lines += [f"#{key.name} = {key.default}", ""]
        parts.append("\n".join(lines))
    return "\n".join(parts).rstrip("\n") + "\n"
