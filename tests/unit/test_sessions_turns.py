"""A session that is put into another job while it is being moved back ends in that job, whoever comes first."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Set

import pytest
from fakes import ALICE, job, soon, until
from test_control_join import NEW, OLD, Node, node

from adoptd.control import Asking
from adoptd.control.joining import JoinRefused
from adoptd.deadline import Deadline
from adoptd.model import AdoptionFailed, Job
from adoptd.process import ProcessHandle
from adoptd.sessions.whereabouts import Found, Place, Whereabouts

__all__ = ["node"]

THIRD = job("19", created=3, identity=(3,))


class Alone:
    """A session of one process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def pids(self) -> Set[int]:
        return {self.pid}

    def has(self, pid: int, process: ProcessHandle) -> bool:
        return pid == self.pid


def outside(pid: int) -> Found:
    return Found(pid, Place.OUTSIDE, Path(f"/proc/{pid}/cgroup").read_text())


def test_a_look_from_before_a_join_moves_nothing_back(node: Node) -> None:
    """What the guard holds is the session as it was; that it has been put elsewhere since is asked before the move."""
    (leader,) = node.family("echo; exec sleep 600")
    session = node.session(leader)
    del node.backend.of_process[leader]
    node.sessions.moved(session, NEW)
    back = Whereabouts().bring_back(
        node.backend, session, [outside(leader)], Alone(leader), node.sessions.alone, soon()
    )
    assert (back.moved, back.failed, node.backend.tried) == (0, (), [])


def test_a_join_that_comes_during_a_return_moves_last(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noted at once, so that no other return begins; moved once the one under way is over."""
    under_way, go_on = threading.Event(), threading.Event()
    adopt = node.backend.adopt

    def slow(process: ProcessHandle, job: Job, deadline: Deadline) -> None:
        if job == OLD:
            under_way.set()
            assert go_on.wait(30.0)
        adopt(process, job, deadline)

    monkeypatch.setattr(node.backend, "adopt", slow)
    (leader,) = node.family("echo; exec sleep 600")
    session = node.session(leader)
    asking = Asking(ALICE, node.handle(leader))
    del node.backend.of_process[leader]
    returning = threading.Thread(
        target=Whereabouts().bring_back,
        args=(node.backend, session, [outside(leader)], Alone(leader), node.sessions.alone, soon(30_000.0)),
    )
    joining = threading.Thread(target=node.join, args=("18", asking))
    returning.start()
    try:
        assert under_way.wait(30.0)
        joining.start()
        asyncio.run(until(lambda: node.sessions.all()[0].job == NEW, 30.0))
        assert node.backend.moves == []
    finally:
        go_on.set()
        returning.join(30.0)
        joining.join(30.0)
    assert node.backend.tried == ["17", "18"]
    assert node.backend.of_process[leader] == NEW


def test_a_turn_is_one_movers_and_is_not_waited_for_longer_than_there_is_time(node: Node) -> None:
    """Given back afterwards."""
    (leader,) = node.family("echo; exec sleep 600")
    session = node.session(leader)
    with node.sessions.alone(session, soon()) as ours:
        assert ours
        with node.sessions.alone(session, soon(10.0)) as also_ours:
            assert not also_ours
    with node.sessions.alone(session, soon()) as ours:
        assert ours


def test_a_join_that_fails_does_not_undo_a_later_one(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what it noted itself is taken back."""
    (leader,) = node.family("echo; exec sleep 600")
    session = node.session(leader)

    def refuse(process: ProcessHandle, job: Job, deadline: Deadline) -> None:
        node.sessions.moved(session, THIRD)
        raise AdoptionFailed("no")

    monkeypatch.setattr(node.backend, "adopt", refuse)
    with pytest.raises(JoinRefused):
        node.join("18", Asking(ALICE, node.handle(leader)))
    assert node.sessions.all()[0].job == THIRD
