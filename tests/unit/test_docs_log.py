"""docs/log.md names the events that the agent logs: every one, with its level, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

from documents import ROOT, read

AGENT = ROOT / "agent/adoptd"
LEVELS = {f"log.{level}": level for level in ("debug", "info", "warning", "error")}
EVENT = re.compile(r"[a-z]+(_[a-z]+)*")


def calls(file: Path) -> Iterator[Tuple[str, ast.expr]]:
    """Level and first argument of each ``log.LEVEL(...)``."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in LEVELS:
            yield LEVELS[ast.unparse(node.func)], node.args[0]


def words(event: ast.expr) -> List[str]:
    """The names an event can have: a string, or one of two."""
    return [each.value for each in ast.walk(event) if isinstance(each, ast.Constant) and isinstance(each.value, str)]


def logged() -> Dict[str, Set[str]]:
    """Every event with the levels it is logged at."""
    found: Dict[str, Set[str]] = {}
    for file in sorted(AGENT.rglob("*.py")):
        for level, event in calls(file):
            names = words(event)
            assert names, f"{file}: an event without a name in its place"
            for name in names:
                found.setdefault(name, set()).add(level)
    return found


def documented() -> Dict[str, Set[str]]:
    """Every event of the page's tables with its level."""
    found: Dict[str, Set[str]] = {}
    for names, level in re.findall(r"^\| (`[^|]+`) \| (\w+) \|", read("docs/log.md"), re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            assert name not in found, f"{name} is there twice"
            found[name] = {level}
    return found


def test_every_event_is_on_the_page_and_no_other() -> None:
    """An administrator who searches for a line's first word finds it, with the level that it is written at."""
    found = logged()
    assert len(found) > 40
    assert documented() == found


def test_events_have_names_of_one_form() -> None:
    """Lower case words and underscores: they are a field's value in the journal."""
    assert [name for name in logged() if not EVENT.fullmatch(name)] == []


def test_nothing_is_logged_past_the_one_place() -> None:
    """A logger of a module's own writes sentences that have no name and no fields."""
    own = [file for file in AGENT.rglob("*.py") if "getLogger" in file.read_text(encoding="utf-8")]
    assert [str(file.relative_to(AGENT)) for file in own if file.name != "log.py"] == []
