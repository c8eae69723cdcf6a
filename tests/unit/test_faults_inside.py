"""Faults of the agent's own are told from those of the other end, and nothing is worked out twice."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
from pathlib import Path
from typing import List

import pytest
from fakes import ALICE, FakeBackend, FakeWitness, connection, job, sample, soon

from adoptd import cli
from adoptd.callerid import Inquiry
from adoptd.connections import Witnesses
from adoptd.jobs import CgroupFinding, CgroupVerdict
from adoptd.metrics import Door, Metrics
from adoptd.model import Owner, Witness
from adoptd.server import Conversation, Doorkeeper
from adoptd.sockets import bind_unix
from adoptd.wire.callerid import Outcome
from adoptd.workers import Workers


def test_a_fault_of_our_own_is_not_taken_for_a_peer_that_went(tmp_path: Path) -> None:
    """No descriptors left, say: counted and logged as internal, where a peer that is gone leaves no trace."""

    async def out_of_descriptors(conversation: Conversation) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async def main(metrics: Metrics) -> None:
        keeper = Doorkeeper(Door.USER, [bind_unix(str(tmp_path / "s"), 0o600)], out_of_descriptors, metrics, 5.0, 10)
        keeper.open()
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        assert await reader.read() == b""
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        await keeper.close(1.0)

    metrics = Metrics()
    asyncio.run(main(metrics))
    assert sample(metrics, "adoptd_messages_refused_total", socket="user", reason="internal") == 1


def test_two_witnesses_that_name_one_cgroup_cost_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """What job a cgroup is takes a third of a millisecond to find out: most of what an answer costs."""
    backend = FakeBackend(job("17"))
    backend.of_cgroup[1] = CgroupVerdict(CgroupFinding.JOB, "test", job("17"))
    asked: List[int] = []
    verdict_of = backend.job_of_cgroup
    monkeypatch.setattr(backend, "job_of_cgroup", lambda number, pid: asked.append(number) or verdict_of(number))
    ends = connection()
    witnesses = Witnesses(
        [FakeWitness(name, {ends: Owner(name, ALICE, cgroup_id=1)}) for name in (Witness.BPF, Witness.DIAG)]
    )
    workers = Workers("w", 1, 2)
    with contextlib.closing(witnesses), contextlib.closing(workers):
        settled = asyncio.run(Inquiry(witnesses, backend, workers).settle(ends, ALICE, soon()))
    assert (settled.outcome, asked) == (Outcome.JOB, [1])


def test_a_misspelled_option_of_explain_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """It would otherwise be passed over, and the decision shown be another line's."""
    assert cli.adoptctl_main(["explain", "--user", "root", "--option", "action_unknwon=deny"]) == 2
    assert "'action_unknwon=deny' is no option" in capsys.readouterr().err


def test_unloading_says_in_json_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One document on standard output, as for load and status."""
    file = tmp_path / "adoptd.toml"
    file.write_text(f"[probe]\npin_dir = '{tmp_path}/pins'\n")
    monkeypatch.setattr(cli.probe, "unload", lambda pin_dir: "was not loaded")
    assert cli.adoptd_main(["probe", "unload", "--json", "--config", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["loaded"] is False
