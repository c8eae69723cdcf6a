"""A probe that is like no other on this host, and how much of it is in the kernel, pinned or not.

Other tests' and agents' probes have programs, links and maps of the same names. A number on the stack of the programs
makes one's own known by their tags, which the kernel makes of the instructions. Used by the tests of what is left.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Dict, List, Mapping, Set

from adoptd.probe.sources import find_sources

_PROGRAMS = ("adopt_connect4", "adopt_connect6", "adopt_query")


def marked_sources(directory: Path, number: int) -> Path:
    """The probe's sources in a new ``directory``, as another release would have them; ``number`` is the mark."""
    shutil.copytree(find_sources(), directory)
    program = directory / "probe.c"
    text = program.read_text()
    mark = f"volatile int adopt_mark = {number}; (void)adopt_mark;"
    for function in _PROGRAMS:
        start = text.index("{", text.index(f"int {function}("))
        text = f"{text[: start + 1]}\n\t{mark}\n{text[start + 1 :]}"
    program.write_text(text)
    return directory


def tags_of(pin_dir: Path) -> Set[str]:
    """The tags of the marked programs that are pinned. Those for IPv4 and IPv6 may well have the same."""
    found = set()
    for name in _PROGRAMS:
        (pin,) = pin_dir.glob(f"*/{name}")
        found.add(json.loads(_bpftool("prog", "show", "pinned", str(pin)))["tag"])
    return found


def in_kernel(tags: Set[str]) -> Mapping[str, int]:
    """How many programs, links and maps there are in the kernel of the probes with these tags."""
    programs = [each for each in _shown("prog") if each.get("tag") in tags]
    ids = {each["id"] for each in programs}
    maps = {number for each in programs for number in _numbers(each.get("map_ids", []))}
    links = [each for each in _shown("link") if each.get("prog_id") in ids]
    return {"programs": len(programs), "links": len(links), "maps": len(maps)}


def _shown(kind: str) -> List[Dict[str, object]]:
    shown: List[Dict[str, object]] = json.loads(_bpftool(kind, "show"))
    return shown


def _bpftool(*arguments: str) -> bytes:
    return subprocess.run(["bpftool", "-j", *arguments], check=True, capture_output=True).stdout


def _numbers(value: object) -> List[int]:
    return [int(each) for each in value] if isinstance(value, list) else []
