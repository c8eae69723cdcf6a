"""The pages of docs/ as tests read them: fenced blocks, the heading each is under, and links.

Owns the reading of our own Markdown, no other; raises where a page has something it does not understand. Called by
the tests that hold a page against what is really there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Tuple

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^ *```(\S*)\s*$")
_HEADING = re.compile(r"^#+ +(.*)$")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FILE = re.compile(r"^# (/\S+)$")


@dataclass(frozen=True)
class Block:
    """What is between two fences: the word behind the first one, and the heading above."""

    heading: str
    kind: str
    line: int
    text: str


def read(name: str) -> str:
    """A page, by its path in the clone."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, *kinds: str) -> List[Block]:
    """All fenced blocks of these kinds, or of any. Raises ValueError for one that does not end."""
    found: List[Block] = []
    heading, inside, kind, start = "", False, "", 0
    collected: List[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        fence = _FENCE.match(line)
        if fence and inside:
            found.append(Block(heading, kind, start, "\n".join(collected) + "\n"))
            inside = False
        elif fence:
            inside, kind, start, collected = True, fence[1], number, []
        elif inside:
            collected.append(line)
        else:
            title = _HEADING.match(line)
            heading = title[1] if title else heading
    if inside:
        raise ValueError(f"the block that begins in line {start} has no end")
    return [block for block in found if not kinds or block.kind in kinds]


def files(of: List[Block]) -> Dict[str, str]:
    """The files that blocks are, each named in its block's first line. Raises ValueError for one without a name."""
    found: Dict[str, str] = {}
    for block in of:
        first, _, rest = block.text.partition("\n")
        name = _FILE.match(first)
        if name is None:
            raise ValueError(f"line {block.line + 1}: {first!r}, expected the name of a file")
        found[name[1]] = rest
    return found


def links(text: str) -> List[str]:
    """Where its links lead, those in code left out."""
    return _LINK.findall(re.sub(r"`[^`\n]*`", "", text))


def anchors(text: str) -> List[str]:
    """The names that a page's headings have in links, as GitHub makes them."""
    titles: List[Tuple[str, ...]] = [tuple(m) for m in re.findall(r"^(#+) +(.*)$", text, re.MULTILINE)]
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in titles]
