"""The demo as a command: what it prints, and that it leaves nothing, however it ends."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Dict, Iterator, List, Set

import pytest

from lab import show
from lab.etc_files import ALICE
from lab.lab import Lab
from lab.leftovers import connect_programs, of_run
from lab.node import PYTHON
from lab.nodes import SOURCE_DIR
from lab.outcome import Findings, Outcome
from lab.runs import read_states, run_directory
from lab.waiting import until

pytestmark = pytest.mark.timeout(300)

COMMAND = [PYTHON, "-B", "-m", "lab.demo"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{SOURCE_DIR}/agent:{SOURCE_DIR}/tests"}
ONE = ("--only", "one_job")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env=ENVIRONMENT, cwd="/", capture_output=True, text=True, check=False, timeout=250
    )


@contextlib.contextmanager
def _started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, *arguments], env=ENVIRONMENT, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _id_once_up(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.match(r"run (\w+): 2 nodes are up", line)
    assert match, line
    return match[1]


def _supervisor_of(run_id: str) -> int:
    supervisor = read_states()[run_id].supervisor
    assert supervisor is not None
    return supervisor


def _programs_of(run_id: str) -> Set[int]:
    """What the probes of a run's nodes have attached to connect(): other runs have theirs there too."""
    probes = [Path(f"/proc/{node}/root/sys/fs/bpf/adoptd") for node in read_states()[run_id].nodes.values()]
    pins = [str(pin) for probe in probes for pin in probe.glob("*/adopt_connect[46]")]
    show = [["bpftool", "-j", "prog", "show", "pinned", pin] for pin in pins]
    return {json.loads(subprocess.run(each, check=True, capture_output=True).stdout)["id"] for each in show}


def _wait_until_nothing_is_left(run_id: str) -> None:
    with contextlib.suppress(TimeoutError):
        until(lambda: not of_run(run_id), "nothing left")
    assert of_run(run_id) == []


def _host_files() -> Dict[str, str]:
    names = ("passwd", "group", "shadow", "hosts", "hostname", "nsswitch.conf", "pam.d/sshd", "ssh/sshd_config")
    paths = [Path("/etc") / name for name in names]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.exists()}


def _interfaces() -> List[str]:
    return sorted(path.name for path in Path("/sys/class/net").iterdir())


def test_an_unknown_scenario_is_refused_by_name() -> None:
    """A typing error says what there is, and brings nothing up."""
    done = _run("--only", "one_jbo")
    assert done.returncode == 2
    assert "one_jbo" in done.stderr
    assert "one_job" in done.stderr


def test_a_scenario_that_goes_otherwise_is_said_so() -> None:
    """A wrong landing and an error of the scenario's own are both counted, and shown with what was expected."""
    wrong = Findings()
    wrong.check("", "job 1 on node2", "job 2 on node2")
    outcomes: Dict[str, Outcome] = {"wrong": wrong.outcome("why")}
    right = Findings()
    right.check("", "denied", "denied")
    outcomes["right"] = right.outcome("why")
    text = io.StringIO()
    show.print_table(outcomes, text)
    assert "FAIL" in text.getvalue()
    assert show.verdict(outcomes) == "1 of 2 as expected"
    assert not Findings().outcome("a scenario that looked at nothing shows nothing").ok


def test_json_is_one_document_and_the_host_is_untouched() -> None:
    """stdout parses as a whole; everything said goes to stderr; the host's files and network are as before."""
    before = _host_files(), _interfaces()
    done = _run("--json", *ONE, "--only", "no_job_denied", "--seal", "key")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ok"] is True
    assert [scenario["name"] for scenario in document["scenarios"]] == ["one_job", "no_job_denied"]
    for scenario in document["scenarios"]:
        assert set(scenario) >= {"name", "expected", "got", "ok", "witness", "pam_ms", "explanation"}
        assert scenario["pam_ms"] > 0
    assert any(line.startswith("adoptd_") for line in document["metrics"])
    assert "one_job" in done.stderr
    assert (_host_files(), _interfaces()) == before
    match = re.search(r"run (\w+):", done.stderr)
    assert match
    assert of_run(match[1]) == []


def test_two_demos_at_once() -> None:
    """They share the host and its kernel, and neither sees the other's jobs."""
    scenarios = ("--only", "multi_hop", "--only", "same_node", "--only", "source_drops_packets")
    with _started(*scenarios) as one, _started(*scenarios) as other:
        ids = [_id_once_up(one), _id_once_up(other)]
        outputs = [process.communicate()[0] for process in (one, other)]
        assert [one.returncode, other.returncode] == [0, 0], outputs
    assert ids[0] != ids[1]
    assert [of_run(run_id) for run_id in ids] == [[], []]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(number: signal.Signals) -> None:
    """Ctrl-C and a polite end in the middle of a scenario: all is taken down, and the exit status says why."""
    with _started() as process:
        run_id = _id_once_up(process)
        process.send_signal(number)
        process.communicate(timeout=100)
        assert process.returncode == 128 + number
    assert of_run(run_id) == []


# A signal that comes while Python can raise nothing: in a destructor here, in its hooks around a fork in the demo.
_UNHEARD = """
import os, signal, time
from lab.runs import new_run_id
from lab.supervisor import run_supervised

class Unheard:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass

def work(supervisor):
    Unheard()
    time.sleep(200)
    return 0

raise SystemExit(run_supervised(new_run_id(), work))
"""


def test_a_signal_that_comes_at_a_bad_moment_is_heard() -> None:
    done = subprocess.run([PYTHON, "-B", "-c", _UNHEARD], env=ENVIRONMENT, cwd="/", check=False, timeout=250)
    assert done.returncode == 128 + signal.SIGTERM


def test_sigkill_of_the_demo_leaves_nothing() -> None:
    """The supervisor hears of the death from the kernel. BPF programs go too, though nobody detached them."""
    with _started() as process:
        run_id = _id_once_up(process)
        ours = _programs_of(run_id)
        assert ours
        assert ours <= connect_programs()
        process.kill()
        process.wait()
        _wait_until_nothing_is_left(run_id)
    until(lambda: not ours & connect_programs(), "the BPF programs are gone")


def test_sigkill_of_the_supervisor_leaves_nothing() -> None:
    """The waiting process clears up after it, and says that this was not as it should be."""
    with _started() as process:
        run_id = _id_once_up(process)
        ours = _programs_of(run_id)
        assert ours
        os.kill(_supervisor_of(run_id), signal.SIGKILL)
        process.communicate(timeout=100)
        assert process.returncode == 128 + signal.SIGKILL
    assert of_run(run_id) == []
    until(lambda: not ours & connect_programs(), "the BPF programs are gone")


def test_sigkill_of_both_is_cleared_up_by_the_next() -> None:
    """Nobody is left to clear up: the next demo does it before it begins."""
    with _started() as process:
        run_id = _id_once_up(process)
        supervisor = _supervisor_of(run_id)
        os.kill(process.pid, signal.SIGSTOP)
        os.kill(supervisor, signal.SIGKILL)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert run_directory(run_id).exists()
        done = _run(*ONE)
        assert done.returncode == 0, done.stderr
    assert of_run(run_id) == []


def test_keep_then_try_then_down() -> None:
    """--keep ends and leaves nodes that can be entered as printed; --down removes that run and no other."""
    done = _run("--keep", *ONE)
    assert done.returncode == 0, done.stderr
    match = re.search(r"run (\w+) stays up", done.stdout)
    assert match, done.stdout
    run_id = match[1]
    try:
        assert of_run(run_id)
        commands = re.findall(r"(?:from inside a job|from no job|ask the agent): +(.*)", done.stdout)
        shown = [
            subprocess.run(command, shell=True, capture_output=True, text=True, check=True, timeout=60).stdout
            for command in commands
        ]
        jobs = re.search(r"has the jobs (\d+) and (\d+)", done.stdout)
        assert jobs
        assert f"/node2/jobs/uid_{ALICE.uid}/job_{jobs[1]}\n" in shown[0]
        # From outside any job the newest is chosen.
        assert f"/node2/jobs/uid_{ALICE.uid}/job_{jobs[2]}\n" in shown[1]
        assert shown[2]
        assert _run("--down", "nosuchrun").returncode == 1
        assert of_run(run_id)
    finally:
        down = _run("--down", run_id)
    assert down.returncode == 0
    assert of_run(run_id) == []


def test_a_failed_start_leaves_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that cannot start is shown with its last words, and what was up by then is taken down."""
    from lab import etc_files
    from lab.nodes import Cluster

    monkeypatch.setattr(etc_files, "agent_toml", lambda jobs_path, seal: "[jobs]\nbackend = 7\n")
    cluster = Cluster()
    with pytest.raises(RuntimeError, match="agent ended with"), cluster:
        pytest.fail("it came up")
    assert of_run(cluster.run_id) == []
