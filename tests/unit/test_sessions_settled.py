"""Logins between their phases, on disk: known to the next agent, and nothing believed that is not exactly ours."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, Dict, Optional

import pytest
from fakes import ALICE, BOB, connection, job
from logs import LogLines, log_lines
from test_adoption import Node

from adoptd.model import ProtocolError, Witness
from adoptd.policy import Action, Options, Situation, Step
from adoptd.sessions import PendingLogins, Settlement, Story
from adoptd.sessions.settled import PendingLogin, decode_login, encode_login
from adoptd.sessions.store import SessionStore, StoreError
from adoptd.wire.pam import Verdict

__all__ = ["log_lines"]

BOOT = "0a7f6f2e-3b66-4b52-8a43-57a1f0b1c001"
STORY = Story("1f2e3d4c", 12.5, "newest", ("18", "17"), (("jobs_here", "18, 17\x1b[2J", 0.5),))
ADOPTED = Settlement(Step.SUCCEED, Situation.NAMED, job("17", created=3, identity=(8, 1 << 63)), Witness.BPF, STORY)
UNKNOWN = Settlement(Step.DENY, Situation.UNKNOWN, None, None)
REFUSING = Options(action_unknown=Action.DENY)
LOGIN = PendingLogin(ALICE, connection(1), 1600.0, ADOPTED)


def now() -> float:
    return 1000.0


def pending(directory: Path, at_s: float = 1000.0) -> PendingLogins:
    made = PendingLogins(lambda: at_s, keep_s=600.0, capacity=3, store=SessionStore(directory))
    made.restore()
    return made


def test_a_user_let_in_by_another_module_is_let_in_over_a_restart(tmp_path: Path) -> None:
    """We could not tell the job and refused, and pam_access said yes: the next agent's session phase does not undo it.

    A login of which nothing is known is decided anew, and refused.
    """
    old, new = job("17", created=1), job("18", created=2, identity=(2,))
    node = Node(old, new)
    node.adoptions._pending = node.pending = pending(tmp_path / "logins")
    assert node.account(REFUSING).verdict is Verdict.DENY
    # Killed: nothing is closed, nothing more written.
    following = Node(old, new)
    with contextlib.closing(pending(tmp_path / "logins")) as known:
        following.adoptions._pending = known
        assert following.session(REFUSING, over=connection(4711)).verdict is Verdict.DENY
        assert following.session(REFUSING).verdict is Verdict.IGNORE
    assert files(tmp_path / "logins") == 0
    node.pending.close()


def files(directory: Path) -> int:
    return len(list(directory.iterdir()))


@pytest.mark.parametrize("settlement", [ADOPTED, UNKNOWN], ids=["adopted", "unknown"])
def test_known_to_the_next_agent_and_then_taken_once(tmp_path: Path, settlement: Settlement) -> None:
    """All that the session phase goes by; also where nobody could tell the job, and another module let the user in."""
    with contextlib.closing(pending(tmp_path / "logins")) as before:
        before.remember(ALICE, connection(1), settlement)
    with contextlib.closing(pending(tmp_path / "logins")) as after:
        assert after.awaits(ALICE, connection(1))
        assert after.take(BOB, connection(1)) is None
        assert after.take(ALICE, connection(2)) is None
        assert after.take(ALICE, connection(1)) == settlement
    assert files(tmp_path / "logins") == 0


def test_written_once_the_login_need_not_wait(tmp_path: Path) -> None:
    """Not by remember() and take(); and what is over by then is not written at all."""
    with contextlib.closing(pending(tmp_path / "logins")) as logins:
        logins.remember(ALICE, connection(1), UNKNOWN)
        assert files(tmp_path / "logins") == 0
        logins.take(ALICE, connection(1))
        logins.remember(BOB, connection(2), ADOPTED)
        logins.write_due()
        assert files(tmp_path / "logins") == 1
        logins.take(BOB, connection(2))
        assert files(tmp_path / "logins") == 1
        logins.write_due()
        assert files(tmp_path / "logins") == 0


def test_files_are_as_few_as_entries(tmp_path: Path) -> None:
    """The oldest go from both."""
    with contextlib.closing(pending(tmp_path / "logins")) as logins:
        for port in range(1, 20):
            logins.remember(ALICE, connection(port), UNKNOWN)
            logins.write_due()
            assert files(tmp_path / "logins") <= 3
    with contextlib.closing(pending(tmp_path / "logins")) as after:
        assert [port for port in range(1, 20) if after.take(ALICE, connection(port))] == [17, 18, 19]


@pytest.mark.parametrize("at_s", [1600.0, 999.0], ids=["too old", "from the future"])
def test_what_is_out_of_its_time_is_gone(tmp_path: Path, log_lines: LogLines, at_s: float) -> None:
    """Silently: logins are broken off. One that is to last longer than any is none of ours."""
    with contextlib.closing(pending(tmp_path / "logins")) as before:
        before.remember(ALICE, connection(1), UNKNOWN)
    with contextlib.closing(pending(tmp_path / "logins", at_s)) as after:
        assert len(after) == 0
    assert files(tmp_path / "logins") == 0
    assert log_lines() == []


def changed(**values: Any) -> bytes:
    value: Dict[str, object] = json.loads(encode_login(LOGIN, BOOT))
    value.update(values)
    return json.dumps(value).encode()


def story(**values: Any) -> bytes:
    value: Dict[str, object] = json.loads(encode_login(LOGIN, BOOT))["story"]
    value.update(values)
    return changed(story=value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        encode_login(LOGIN, BOOT)[:-1],
        b"[]",
        changed(v=2),
        changed(boot_id="another"),
        changed(uid=BOB),
        changed(uid=-1),
        changed(connection=None),
        changed(connection=["127.0.0.1:2", "127.0.0.2:22"]),
        changed(expires_at_s=None),
        changed(expires_at_s=-1),
        changed(expires_at_s=1e300),
        changed(step="become_root"),
        changed(step=None),
        changed(situation="sunny"),
        changed(job={"id": "17", "uid": BOB, "created": 3, "identity": [8]}),
        changed(job=[]),
        changed(witness="oracle"),
        changed(more=1),
        changed(story=[]),
        story(request_id=""),
        story(request_id=7),
        story(began_s="then"),
        story(because=None),
        story(choices=["17", "../18"]),
        story(choices=["17"] * 257),
        story(choices=[17]),
        story(stages=[["a", "b"]]),
        story(more=1),
    ],
)
def test_what_is_not_exactly_a_login_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_login(data, LOGIN.name, BOOT)


@pytest.mark.parametrize("settlement", [ADOPTED, UNKNOWN])
def test_there_and_back(settlement: Settlement) -> None:
    login = dataclasses.replace(LOGIN, settlement=settlement)
    assert decode_login(encode_login(login, BOOT), login.name, BOOT) == login


def test_refused_files_are_one_line_and_gone(tmp_path: Path, log_lines: LogLines) -> None:
    with contextlib.closing(SessionStore(tmp_path / "logins")) as store:
        for number in range(500):
            store.write(str(number), encode_login(LOGIN, BOOT))
    with contextlib.closing(pending(tmp_path / "logins")) as logins:
        assert len(logins) == 0
    (line,) = log_lines()
    assert "logins_refused files=500" in line
    assert files(tmp_path / "logins") == 0


def test_a_full_disk_is_said_once_and_stops_nobody(
    tmp_path: Path, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SessionStore(tmp_path / "logins")
    fault: Optional[StoreError] = StoreError("no space left")

    def full(name: str, data: bytes) -> None:
        if fault is not None:
            raise fault

    monkeypatch.setattr(store, "write", full)
    with contextlib.closing(PendingLogins(now, store=store)) as logins:
        for port in range(1, 4):
            logins.remember(ALICE, connection(port), UNKNOWN)
            logins.write_due()
        assert logins.take(ALICE, connection(1)) == UNKNOWN
    assert sum("login_not_written" in line for line in log_lines()) == 1
