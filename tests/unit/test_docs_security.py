"""docs/security.md: every promise names a test, every test that is named exists, and ARCHITECTURE.md leads there."""

from __future__ import annotations

import ast
import re
from typing import FrozenSet, List

import pytest

from documents import ROOT, read

PAGE = read("docs/security.md")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))
PROMISES = PAGE[PAGE.index("## What is promised") : PAGE.index("## A closed node")]


def functions(path: str) -> FrozenSet[str]:
    """The tests that pytest would find in a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    return frozenset(name for name in found if name.startswith("test_"))


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_every_named_test_exists(path: str, name: str) -> None:
    """In the file that is named."""
    assert name in functions(path)


def test_nothing_looks_like_a_test_and_is_not_checked() -> None:
    """Each mention of a test's file names a test in it."""
    assert len(re.findall(r"tests/[\w/]+\.py", PAGE)) == len(re.findall(r"`tests/[\w/]+\.py::\w+`", PAGE))


def promises() -> List[List[str]]:
    """The cells of each row of the tables of promises."""
    rows = [line for line in PROMISES.splitlines() if line.startswith("| ") and not line.startswith("| promise |")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_every_promise_has_a_test() -> None:
    """At least one, and says how it is kept."""
    assert len(promises()) > 25
    for promise, how, tests in promises():
        assert how, promise
        assert "::test_" in tests, promise


def test_the_architecture_page_leads_here() -> None:
    """Where the short form is."""
    assert "docs/security.md" in read("ARCHITECTURE.md")
