"""What adoptctl and adoptd show people: no Python, no noise, nothing that is not so."""

from __future__ import annotations

from pathlib import Path
from typing import List

import pytest

from adoptd.cli import adoptd_main
from adoptd.printing import print_fields, print_sessions, print_status, print_whereami
from adoptd.wire.control import Result

JOINED: Result = {"session": "42-7", "user": "alice", "job": "18", "since": 0.0, "reason": "join", "witness": "bpf"}


def _printed(capsys: pytest.CaptureFixture[str]) -> List[str]:
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_values_are_words_of_people(capsys: pytest.CaptureFixture[str]) -> None:
    """Yes and no, lists without brackets; zero and no are values, nothing and an empty table are none."""
    print_fields(
        {"attached": True, "moved": False, "pinned": ("a", "b"), "jobs": 0, "hint": None, "detail": "", "unheard": {}}
    )
    assert _printed(capsys) == ["attached: yes", "moved: no", "pinned: a, b", "jobs: 0"]


def test_status_leaves_out_what_never_happened(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the probe's counters only; a table of theirs that is all zeros is not there at all."""
    probe = {"attached": True, "events": {"labelled": 7, "seed_disagreed": 0}}
    print_status({"node": "n1", "sessions": 0, "probe": probe})
    assert _printed(capsys) == ["node: n1", "sessions: 0", "probe:", "attached: yes", "events:", "labelled: 7"]
    print_status({"probe": {"attached": False, "events": {"labelled": 0}}})
    assert _printed(capsys) == ["probe:", "attached: no"]


def test_who_joined_was_put_there_by_no_witness(capsys: pytest.CaptureFixture[str]) -> None:
    """The witness is that of the job before."""
    print_sessions({"sessions": [{**JOINED, "from": "10.0.0.1:40000"}]})
    assert _printed(capsys)[1].endswith(" join - 10.0.0.1:40000")
    print_whereami({"job": "18", "session": JOINED})
    assert _printed(capsys)[1] == "session: 42-7, put into job 18 (join)"


def test_the_check_of_a_configuration_names_what_was_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A file of conf.d by another name is not, and is missed here."""
    (tmp_path / "conf.d").mkdir()
    for name in ("adoptd.toml", "conf.d/10-site.toml", "conf.d/20-site.conf"):
        (tmp_path / name).write_text("[agent]\n", encoding="utf-8")
    assert adoptd_main(["config", "check", "--config", str(tmp_path / "adoptd.toml")]) == 0
    assert _printed(capsys) == [f"{tmp_path}/adoptd.toml, {tmp_path}/conf.d/10-site.toml: right"]
