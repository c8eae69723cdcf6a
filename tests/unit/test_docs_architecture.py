"""ARCHITECTURE.md is true: its tree has every module at its layer, its tables have the protocol's own words."""

from __future__ import annotations

import ast
import re
from typing import List

from adoptd.wire.callerid import Outcome, Reason
from documents import ROOT, read

PAGE = read("ARCHITECTURE.md")
TREE = PAGE[PAGE.index("## Where things live") : PAGE.index("How to change:")]


def layers() -> List[List[str]]:
    """The layers of the import contract, from the edge to the core."""
    text = read("pyproject.toml")
    (found,) = re.findall(r"^layers = (\[.*?^\])", text, re.DOTALL | re.MULTILINE)
    return [[name.strip() for name in layer.split("|")] for layer in ast.literal_eval(found)]


def places() -> List[str]:
    """The names in the left column of the tree, in their order, the agent's alone."""
    agent = TREE[TREE.index(" agent/adoptd/") : TREE.index(" bpf/")]
    left = [re.split(r"\s{2,}", line[3:])[0] for line in agent.splitlines() if re.match(r" {3}\S", line)]
    return [word.strip("/") for line in left for word in re.split(r"[\s|]+", line) if word]


def test_every_module_is_in_the_tree_and_no_other() -> None:
    """As the import contract has them, which is exhaustive."""
    assert sorted(places()) == sorted(name for layer in layers() for name in layer)


def test_layers_come_in_their_order() -> None:
    """What is further up in the tree is nowhere lower in the contract."""
    rank = {name: index for index, layer in enumerate(layers()) for name in layer}
    ranks = [rank[name] for name in places()]
    assert ranks == sorted(ranks)


def test_every_directory_of_the_clone_is_in_the_tree() -> None:
    """Of those that are kept in git."""
    named = {line.split()[0].split("/")[0] for line in TREE.splitlines() if re.match(r" \w", line)}
    ours = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert ours - {"dist", "__pycache__"} <= named
    tests = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    told = TREE[TREE.index(" tests/") : TREE.index(" dev ")]
    assert [name for name in sorted(tests) if not re.search(rf"\b{name}\b", told)] == []


def test_the_wire_table_has_the_protocols_words() -> None:
    """Outcomes, and reasons that are there."""
    row = next(line for line in PAGE.splitlines() if line.startswith("| `outcome` |"))
    assert re.findall(r"`(\w+)`", row)[1:] == [outcome.value for outcome in Outcome]
    row = next(line for line in PAGE.splitlines() if line.startswith("| `reason` |"))
    named = re.findall(r"`([a-z_]+)`", row.split("|")[3])
    assert named
    assert set(named) <= {reason.value for reason in Reason}


def test_files_that_are_named_are_there() -> None:
    """Below the clone, or below the agent's package."""
    named = set(re.findall(r"`([\w/]+\.(?:py|c|h|md))`", PAGE))
    assert len(named) > 8
    for name in sorted(named):
        tops = (ROOT, ROOT / "agent/adoptd", ROOT / "docs")
        assert any((top / name).exists() for top in tops), name
