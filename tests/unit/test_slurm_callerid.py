"""slurmd's word through scontrol: a helper that lies, hangs or floods is nobody's word, and none is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from pathlib import Path
from typing import AsyncIterator, Awaitable, Callable, FrozenSet, Iterator, List, Optional, Tuple

import pytest
from fakes import ALICE, FakeSeal, connection, sample, soon, until

from adoptd.callerid import Asker, SealRoom, Told
from adoptd.deadline import Deadline
from adoptd.metrics import Metrics
from adoptd.model import JobManagerError, Witness
from adoptd.slurm_callerid import NoWord, SlurmdCallerid, SlurmdFault
from adoptd.wire.callerid import Outcome
from adoptd.workers import Workers
from lab.waiting import until as until_now

ENDS = connection()
# A helper is a process, and scripts of two more.
PATIENT_MS = 60_000.0


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers("slow", 4, 64)
    yield made
    made.close()


def program(directory: Path, body: str, mode: int = 0o755) -> str:
    """A scontrol that does what ``body`` says; its process id is in the file "pid" beside it."""
    path = directory / "scontrol"
    path.write_text(f"#!/bin/sh\necho $$ >> {directory}/pid\n{body}\n")
    path.chmod(mode)
    return str(path)


def started(directory: Path) -> List[int]:
    file = directory / "pid"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def ask(
    path: str, workers: Workers, ms: float = PATIENT_MS, conf: Callable[[], Optional[str]] = lambda: "/etc/s/slurm.conf"
) -> str:
    async def story() -> str:
        try:
            return await SlurmdCallerid(path, conf, workers).job_of(ENDS, Deadline.after_ms(ms))
        finally:
            await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})

    return asyncio.run(story())


def fault(
    path: str, workers: Workers, ms: float = PATIENT_MS, **how: Callable[[], Optional[str]]
) -> Tuple[SlurmdFault, str]:
    with pytest.raises(NoWord) as refusal:
        ask(path, workers, ms, **how)
    return refusal.value.fault, str(refusal.value)


# ---- no word


@pytest.mark.parametrize(
    "printed",
    [
        b"",
        b"17",
        b"17\n",
        b"17 \n",
        b"17 n1",
        b"17 n1\n\n",
        b"17 n1 \n",
        b" 17 n1\n",
        b"-17 n1\n",
        b"+17 n1\n",
        b"017 n1\n",
        b"0 n1\n",
        b"0x11 n1\n",
        b"17 n1\n18 n1\n",
        b"17  n1\n",
        b"17\tn1\n",
        b"4294967294 n1\n",
        b"4294967295 n1\n",
        b"99999999999 n1\n",
        b"17 n\x00\n",
        b"17 \xff\n",
        b"JobId=17 n1\n",
    ],
)
def test_what_scontrol_never_prints_is_no_word(tmp_path: Path, workers: Workers, printed: bytes) -> None:
    """One line, a decimal job id, one blank, a node name; anything else, or more, names nothing."""
    (tmp_path / "printed").write_bytes(printed)
    assert fault(program(tmp_path, f"cat {tmp_path}/printed"), workers)[0] is SlurmdFault.MALFORMED


@pytest.mark.parametrize("where", ["", " >&2"])
def test_a_flood_is_cut_off(tmp_path: Path, workers: Workers, where: str) -> None:
    """On either pipe; what floods is killed at once, and its pid is free again."""
    path = program(tmp_path, f"exec yes 17{where}")
    began = time.monotonic()
    assert fault(path, workers)[0] is SlurmdFault.MALFORMED
    assert time.monotonic() - began < PATIENT_MS / 2000
    assert not any(Path(f"/proc/{pid}").exists() for pid in started(tmp_path))


def test_a_refusal_says_what_scontrol_said(tmp_path: Path, workers: Workers) -> None:
    """Its complaint is for the log; what it printed before failing is not looked at."""
    path = program(tmp_path, "echo 17 n1; echo first >&2; echo unable to retrieve >&2; exit 1")
    assert fault(path, workers) == (SlurmdFault.NONE_NAMED, "scontrol callerid ended with 1: first; unable to retrieve")


def test_a_helper_that_dies_of_a_signal(tmp_path: Path, workers: Workers) -> None:
    """libslurm ends its process on a configuration it does not like: not ours."""
    assert fault(program(tmp_path, "echo 17 n1; kill -ABRT $$"), workers)[0] is SlurmdFault.NONE_NAMED


def test_one_that_hangs_is_killed_at_the_deadline_and_reaped(tmp_path: Path, workers: Workers) -> None:
    """With what it started: a site's wrapper script must not leave its child behind at every login."""
    path = program(tmp_path, f"sleep 1000 & echo $! >> {tmp_path}/pid; trap '' TERM; wait")
    # Longer, until it has come to hang by then.
    for ms in (400.0, 2000.0, 10_000.0, 50_000.0):
        began = time.monotonic()
        assert fault(path, workers, ms)[0] is SlurmdFault.TIMEOUT
        assert time.monotonic() - began < 100.0
        pids = started(tmp_path)
        if len(pids) >= 2:
            break
    assert len(pids) >= 2
    until_now(lambda: not any(_runs(pid) for pid in pids), f"the end of {pids}")


def _runs(pid: int) -> bool:
    # The orphan of a killed wrapper is init's to reap, and in some containers init never does.
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_one_that_closes_its_output_and_stays(tmp_path: Path, workers: Workers) -> None:
    """An answer counts when the helper has ended and says so by its exit status."""
    path = program(tmp_path, "echo 17 n1; exec >&- 2>&-; sleep 1000")
    assert fault(path, workers, ms=400.0)[0] is SlurmdFault.TIMEOUT


def test_no_time_left_starts_nothing(tmp_path: Path, workers: Workers) -> None:
    """The login's budget is used up already."""
    assert fault(program(tmp_path, "echo 17 n1"), workers, ms=0.0)[0] is SlurmdFault.TIMEOUT
    assert started(tmp_path) == []


def test_a_login_that_goes_away_takes_its_helper_with_it(tmp_path: Path, workers: Workers) -> None:
    """Cancelled: killed and reaped all the same."""
    path = program(tmp_path, "sleep 1000")

    async def story() -> None:
        task = asyncio.create_task(SlurmdCallerid(path, lambda: None, workers).job_of(ENDS, soon(60000)))
        await until(lambda: started(tmp_path))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started(tmp_path)))
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})

    asyncio.run(story())


def test_few_at_once_and_the_others_wait_within_their_time(tmp_path: Path, workers: Workers) -> None:
    """Two turns, both taken by what hangs: the third starts nothing and is out of time."""
    path = program(tmp_path, "sleep 1000")

    async def story() -> None:
        slurmd = SlurmdCallerid(path, lambda: None, workers, at_once=2)
        hanging = [asyncio.create_task(slurmd.job_of(ENDS, soon(60000))) for _ in range(2)]
        await until(lambda: len(started(tmp_path)) == 2)
        with pytest.raises(NoWord) as refusal:
            await slurmd.job_of(ENDS, soon(200))
        assert refusal.value.fault is SlurmdFault.TIMEOUT
        assert len(started(tmp_path)) == 2
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
        program(tmp_path, "echo 17 n1")
        assert await slurmd.job_of(ENDS, soon()) == "17", "turns come back"
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})

    asyncio.run(story())


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o644])
def test_a_program_that_others_could_have_written_is_not_run(tmp_path: Path, workers: Workers, mode: int) -> None:
    """It would run as root. Nor is one run that is no program."""
    assert fault(program(tmp_path, "echo 17 n1", mode), workers)[0] is SlurmdFault.UNAVAILABLE
    assert started(tmp_path) == []


def test_somebody_else_s_program_is_not_run(tmp_path: Path, workers: Workers) -> None:
    """Owned by a user, mode 0755."""
    path = program(tmp_path, "echo 17 n1")
    os.chown(path, ALICE, 0)
    assert fault(path, workers) == (SlurmdFault.UNAVAILABLE, f"{path}: others than root can write to it")
    assert started(tmp_path) == []


def test_what_is_not_there(tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named path, any of the usual places, an interpreter, a slurm.conf."""
    assert "No such file" in fault(str(tmp_path / "scontrol"), workers)[1]
    monkeypatch.setattr("adoptd.slurm_callerid.SCONTROL_PLACES", (str(tmp_path),))
    assert fault("", workers) == (SlurmdFault.UNAVAILABLE, f"scontrol is in none of {tmp_path}")
    (tmp_path / "scontrol").write_text("#!/nowhere\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert fault("", workers)[0] is SlurmdFault.UNAVAILABLE

    def none() -> Optional[str]:
        raise JobManagerError("no slurm.conf")

    path = program(tmp_path, "echo 17 n1")
    assert fault(path, workers, conf=none) == (SlurmdFault.UNAVAILABLE, "no slurm.conf")
    assert started(tmp_path) == []


# ---- the word


def test_what_the_helper_is_given(tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection and its IP version, three variables of ours and none of the agent's, no input, no shell."""
    monkeypatch.setenv("SLURM_CONF", "/tmp/evil.conf")
    monkeypatch.setenv("LD_PRELOAD_TEST", "x")
    saw = tmp_path / "saw"
    body = (
        "import json, os, sys; print(os.environ.get('PWD'), file=sys.stderr);"
        f"json.dump([sys.argv[1:], dict(os.environ), sys.stdin.read(), os.getcwd()], open({str(saw)!r}, 'w'));"
        "print('17 n1')"
    )
    path = tmp_path / "scontrol"
    path.write_text(f"#!/usr/bin/python3 -I\n{body}\n")
    path.chmod(0o755)
    assert ask(str(path), workers) == "17"
    argv, environment, stdin, directory = json.loads(saw.read_text())
    assert argv == ["callerid", "127.0.0.1", "40000", "127.0.0.2", "22", "4"]
    environment.pop("LC_CTYPE", None)  # the interpreter's own doing
    assert environment == {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "SLURM_CONF": "/etc/s/slurm.conf"}
    assert (stdin, directory) == ("", "/")


def test_a_job_and_any_complaint_beside_it(tmp_path: Path, workers: Workers) -> None:
    """Warnings on the other pipe do not spoil an answer; the largest job id there is."""
    assert ask(program(tmp_path, "echo warning >&2; echo 4294967279 node-1.example"), workers) == "4294967279"


# ---- in the asker


@contextlib.asynccontextmanager
async def nobody() -> AsyncIterator[int]:
    """A port of 127.0.0.1 that refuses."""
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    yield port


@contextlib.asynccontextmanager
async def closing() -> AsyncIterator[int]:
    """A port of 127.0.0.1 that takes connections and closes them."""

    def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(close, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


Door = Callable[[], "contextlib.AbstractAsyncContextManager[int]"]
THEIRS = frozenset({"17", "18"})


def told(
    path: Optional[str],
    workers: Workers,
    door: Door = nobody,
    theirs: FrozenSet[str] = THEIRS,
    elsewhere: bool = False,
) -> Tuple[Told, Metrics]:
    async def story() -> Tuple[Told, Metrics]:
        metrics = Metrics()
        fallback = None if path is None else SlurmdCallerid(path, lambda: None, workers)
        async with door() as port:
            asker = Asker(SealRoom(FakeSeal(), workers), port, 5000, metrics, fallback)
            asking: Awaitable[Told] = asker.ask(
                ENDS, ALICE, soon(5000), ENDS.source.address if elsewhere else None, theirs
            )
            return await asking, metrics

    return asyncio.run(story())


def test_without_the_fallback_nothing_is_started(tmp_path: Path, workers: Workers) -> None:
    """The default: a node without an agent cannot say."""
    answer, _ = told(None, workers)
    assert (answer.outcome, answer.reason) == (Outcome.UNKNOWN, "refused")


def test_only_a_refusal_leads_to_slurmd(tmp_path: Path, workers: Workers) -> None:
    """An agent that is there and does not answer is not gone round."""
    answer, _ = told(program(tmp_path, "echo 17 n1"), workers, closing)
    assert answer.reason == "closed"
    assert started(tmp_path) == []


@pytest.mark.parametrize("how", [{"theirs": frozenset()}, {"elsewhere": True}])
def test_whois_is_not_answered_by_slurmd(tmp_path: Path, workers: Workers, how: object) -> None:
    """slurmd tells root whose-ever job it is: only a login with jobs here to compare with makes use of that."""
    answer, _ = told(program(tmp_path, "echo 17 n1"), workers, **how)  # type: ignore[arg-type]
    assert answer.reason == "refused"
    assert started(tmp_path) == []


def test_a_job_that_is_not_the_user_s_here_is_not_told(tmp_path: Path, workers: Workers) -> None:
    """Not even its number: users may read the stages of their own logins."""
    answer, metrics = told(program(tmp_path, "echo 7777 n1"), workers)
    assert (answer.outcome, answer.reason, answer.job_id) == (Outcome.UNKNOWN, "slurmd_names_other", None)
    assert "7777" not in answer.detail
    labels = {"outcome": "unknown", "reason": "slurmd_names_other", "witness": "none"}
    assert sample(metrics, "adoptd_callerid_asked_total", **labels) == 1


def test_slurmd_s_silence_is_counted_under_its_own_reason(tmp_path: Path, workers: Workers) -> None:
    """The refusal before it is no longer the news."""
    answer, metrics = told(program(tmp_path, "exit 1"), workers)
    assert (answer.outcome, answer.reason) == (Outcome.UNKNOWN, "slurmd_names_none")
    labels = {"outcome": "unknown", "reason": "slurmd_names_none", "witness": "none"}
    assert sample(metrics, "adoptd_callerid_asked_total", **labels) == 1


def test_the_user_s_own_job_by_slurmd_s_word(tmp_path: Path, workers: Workers) -> None:
    """Told with a witness of its own, counted under it."""
    answer, metrics = told(program(tmp_path, "echo 18 n1"), workers)
    assert answer == Told(Outcome.JOB, "owner", "18", Witness.SLURMD)
    labels = {"outcome": "job", "reason": "owner", "witness": "slurmd"}
    assert sample(metrics, "adoptd_callerid_asked_total", **labels) == 1
