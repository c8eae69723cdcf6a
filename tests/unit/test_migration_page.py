"""docs/migration.md says what the code does: every option, every series of the metric, PAM lines that are right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, List, Tuple

from adoptd.observed import Found, Would, agreement_of
from adoptd.pam_lines import OPTIONS, adopt_lines, lines_of, wrong_options

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")


def rows(header: str) -> List[List[str]]:
    """The cells of the table whose first column is ``header``."""
    table = PAGE[PAGE.index(f"\n| {header} |") + 1 :].split("\n\n")[0].split("\n")[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_every_option_is_there_with_its_values() -> None:
    """And none that the module does not have; each value that is named is one."""
    named: Dict[str, str] = {row[0].strip("`"): row[1] for row in rows("option")}
    assert set(named) == set(OPTIONS)
    for option, values in named.items():
        words = re.findall(r"`([^`]+)`", values)
        assert all(OPTIONS[option][0](word) for word in words), option


def test_every_series_of_the_metric_is_explained() -> None:
    """Where it was found and what we would have done, with the agreement that the agent counts."""
    told: Dict[Tuple[str, str], str] = {}
    for found, would, agreement, meaning in rows("found"):
        assert meaning
        for word in [would.strip("`")] if would != "any" else [each.value for each in Would]:
            told[(found.strip("`"), word)] = agreement
    expected = {(f.value, w.value): agreement_of(w, f).value for f in Found for w in Would}
    # In that job without having chosen one: cannot be.
    impossible = {("that_job", "deny"), ("that_job", "leave_out")}
    assert told == {pair: agreement for pair, agreement in expected.items() if pair not in impossible}


def test_the_stacks_on_the_page_are_right(tmp_path: Path) -> None:
    """Each is read as the agent's own tools read it, and has no word that the module refuses."""
    fenced = re.findall(r"^ *```\w*\n(.*?)^ *```$", PAGE, re.DOTALL | re.MULTILINE)
    blocks = [block for block in fenced if re.search(r"^ *-?account ", block, re.MULTILINE)]
    assert len(blocks) == 3
    for block in blocks:
        (tmp_path / "sshd").write_text(block.replace("...", ""))
        ours = adopt_lines("sshd", tmp_path)
        assert ours
        assert [fault for line in ours for fault in wrong_options(line)] == []
        assert not [line for line in lines_of("sshd", tmp_path) if line.kind == "session" and "slurm" in line.module]
