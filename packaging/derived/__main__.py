"""Writes all that is made for a package below one directory: man/, bash/, zsh/ and adoptd.toml."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Dict

from derived import completion
from derived.commands import programs
from derived.described import DocumentationError
from derived.manual import pages
from derived.template import template

SOURCES = Path(__file__).resolve().parents[2] / "docs" / "man"


def everything(epoch_s: int) -> Dict[str, str]:
    """Each file's text by its path. Raises DocumentationError."""
    files = {f"man/{name}": text for name, text in pages(SOURCES, epoch_s).items()}
    files["adoptd.toml"] = template(SOURCES / "keys.txt")
    for program in programs():
        files[f"bash/{program.name}"] = completion.bash(program)
        files[f"zsh/_{program.name}"] = completion.zsh(program)
    return files


def main() -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m derived", description=__doc__)
    parser.add_argument("--into", type=Path, required=True, metavar="DIR", help="made if it is not there")
    given = parser.parse_args()
    try:
        files = everything(int(os.environ.get("SOURCE_DATE_EPOCH") or time.time()))
    except DocumentationError as error:
        print(error, file=sys.stderr)
        return 1
    for name, text in files.items():
        path = given.into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
