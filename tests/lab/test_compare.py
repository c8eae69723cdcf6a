"""pam_slurm_adopt and pam_adopt.so in the same stacks, by the command itself: what must be equal is."""

from __future__ import annotations

import json
import os
import re
import subprocess
from typing import Any, Dict, List

import pytest

from lab.compare_scenarios import COMPARISONS, claim_of
from lab.compare_sides import OURS, THEIRS, named
from lab.etc_files import PAM_TIMEOUT_MS
from lab.leftovers import of_run
from lab.node import PYTHON
from lab.nodes import SOURCE_DIR

pytestmark = pytest.mark.timeout(240)

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{SOURCE_DIR}/agent:{SOURCE_DIR}/tests"}
# Short: one round, and of the scenarios those that take no daemon away.
NAMES = (
    "no_job",
    "one_job",
    "spellings",
    "two_jobs_inside",
    "two_jobs_login_node",
    "root",
    "other_users_job",
    "job_ends",
    "salloc_shell",
    "ipv6",
    "wrong_nodename",
    "bad_value",
    "other_service",
    "keyboard_interactive",
    "x11",
    "private_tmp",
)
# Where they may differ, and how pam_adopt.so's side of it ends.
MAY_DIFFER = {"root", "salloc_shell", "ipv6", "bad_value"}


def _compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, "-B", "-m", "lab.standing", "compare", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, cwd="/", capture_output=True, text=True, check=False, timeout=220)


@pytest.fixture(scope="module")
def short() -> Dict[str, Any]:
    """One short run: the document, after it was seen to leave nothing behind."""
    arguments = [word for name in NAMES for word in ("--only", name)]
    done = _compare("--json", "--rounds", "1", "--extra", f"timeout_ms={PAM_TIMEOUT_MS}", *arguments)
    run = re.search(r"^run (\w+):", done.stderr, re.MULTILINE)
    assert run, done.stderr
    assert of_run(run[1]) == []
    document: Dict[str, Any] = json.loads(done.stdout)
    document["status"], document["told"] = done.returncode, done.stderr
    return document


def _rows(document: Dict[str, Any], name: str) -> List[Dict[str, Any]]:
    found = [row for row in document["rows"] if row["scenario"] == name]
    assert found, f"{name} is not in the document"
    return found


@pytest.mark.parametrize("name", NAMES)
def test_both_do_the_same(short: Dict[str, Any], name: str) -> None:
    """pam_adopt.so does what it has to in every row, and the same as pam_slurm_adopt unless the row says why not."""
    for row in _rows(short, name):
        ours, theirs = row["seen"][OURS]["landed"], row["seen"][THEIRS]["landed"]
        assert ours == row["expected"], (row["what"], short["told"])
        assert ours == theirs or row["differs"], (row["what"], theirs)
        assert not row["differs"] or name in MAY_DIFFER


def test_the_document_says_how_it_went(short: Dict[str, Any]) -> None:
    """Exit status, verdict and times: every login reached the module's line in sshd, under both."""
    assert (short["status"], short["ok"]) == (0, True), short["told"]
    assert all(row["seen"][side]["account_ms"] for row in short["rows"] for side in (OURS, THEIRS))
    assert {row["scenario"] for row in short["rows"]} == set(NAMES)


def test_a_denial_says_why_under_both(short: Dict[str, Any]) -> None:
    """The user who is refused reads a sentence about it."""
    refused = [row for name in ("no_job", "other_users_job") for row in _rows(short, name)]
    for row in refused:
        for side in (OURS, THEIRS):
            if row["seen"][side]["landed"] == "denied":
                assert "job" in row["seen"][side]["told"], row


def test_every_scenario_says_what_it_is_about() -> None:
    """The names in this file are scenarios, and each has a claim."""
    assert set(NAMES) <= set(COMPARISONS)
    assert all(claim_of(name).endswith(".") for name in COMPARISONS)


def test_jobs_have_the_same_names_in_every_run() -> None:
    """Ids of the run's jobs become letters; any other stays and is seen."""
    assert named("job 12 on node2", ("7", "12")) == "job B on node2"
    assert named("job 13 on node2", ("7", "12")) == "job 13 on node2"
    assert named("denied", ()) == "denied"


def test_what_is_wrong_is_said() -> None:
    """Before anything is brought up."""
    for arguments in (("--rounds", "0"), ("--nodes", "1"), ("--only", "nothing")):
        done = _compare(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
