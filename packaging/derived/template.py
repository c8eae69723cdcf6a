"""The commented configuration file that a package installs: every key, its default behind a ``#``.

A comment is taken away to change a key; a file of comments only is the defaults. Called by the command line of this
package.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from derived.described import configuration

_HEAD = """\
# The configuration of adoptd, every key with its default. Better than to change this file, which is the package's:
# write what differs into conf.d/10-site.toml beside it. Files of conf.d/*.toml are read after this one, by name.
# "adoptd config check" says whether all of it is right, "systemctl reload adoptd" has it taken over, but for the keys
# marked (restart), which need "systemctl restart adoptd". See adoptd.toml(5).
"""
_WIDTH = 100


def template(keys: Path) -> str:
    """The file's text. Raises DocumentationError where a key has no description."""
    parts = [_HEAD]
    for table in configuration(keys):
        lines = [f"[{table.name}]"]
        for key in table.keys:
            expected = f"Expected: {key.expected}.{' (restart)' if key.restart else ''}"
            for text in (key.text, expected):
                lines += textwrap.wrap(
                    text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False
                )
            lines += [f"#{key.name} = {key.default}", ""]
        parts.append("\n".join(lines))
    return "\n".join(parts).rstrip("\n") + "\n"
