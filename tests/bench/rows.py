"""What is measured, one function per question. Each yields its figures as they come.

Owns the order of the cells: contestants take turns in slices within one load, so that a noisy minute of the
machine falls on all of them. Must never report a slice whose answers were not checked. Called by __main__.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from bench import figures
from bench.figures import Figure
from bench.place import PIN_DIR, ROOT, SILENT, SOURCE, UID, WORK, Agent, Place, compile_program, end
from lab.waiting import until
from slurm.cluster import ALICE
from slurm.holder import ADDRESS as NODE

Figures = Iterator[Figure]
# Below this share of rounds that ended as they should, what was measured is something else.
_RIGHT_SHARE = 0.8
SLURMD = "slurmd"
PEER_MODULE = "pam_slurm_adopt"


@dataclass(frozen=True)
class Plan:
    """How much is measured. ``slice_s`` seconds per contestant and turn, ``slices`` turns."""

    connections: Tuple[int, ...] = (0, 10_000, 100_000)
    processes: int = 3000
    slice_s: float = 2.0
    slices: int = 3
    rounds: int = 60
    silent_rounds: int = 4
    fast_lookups: int = 4000
    slow_lookups: int = 9
    probe_turns: int = 400
    cycles: int = 300
    # Over the interval of the self-test, which is most of what an idle agent does.
    idle_s: float = 62.0


QUICK = Plan(
    connections=(0, 10_000),
    processes=0,
    slice_s=0.5,
    slices=2,
    rounds=20,
    silent_rounds=2,
    fast_lookups=1500,
    slow_lookups=3,
    probe_turns=100,
    cycles=300,
    idle_s=4.0,
)


def loads(place: Place, plan: Plan) -> Iterator[str]:
    """The states of the node that are compared, each up while it is the current one."""
    for count in plan.connections:
        with place.connections(count):
            yield "idle" if count == 0 else f"{count:,} more connections"
    if plan.processes:
        with place.processes(plan.processes):
            yield f"{plan.processes:,} more processes"


@dataclass
class Callers:
    """The connections that are asked about: one of a plain cgroup job's process, one of a Slurm job's."""

    port: int
    cgroup_port: int
    slurm_port: Optional[int]
    slurm_job: Optional[int]


@contextlib.contextmanager
def callers(place: Place) -> Iterator[Callers]:
    """Two jobs of the user under each manager that is there, and a connection from the older one of each."""
    with contextlib.ExitStack() as stack:
        sink = place.start([str(WORK / "load"), "sink", NODE])
        stack.callback(end, sink)
        port = int(place.first_line(sink))
        job = place.make_job("1")
        stack.callback(place.remove_jobs)
        place.make_job("2")
        process, cgroup_port = place.client(job.procs_files(), SOURCE, port)
        stack.callback(end, process)
        slurm_port, slurm_job = None, None
        if place.slurm is not None:
            slurm_job = place.slurm.submit_started(ALICE)
            stack.callback(place.slurm.cancel, slurm_job)
            process, slurm_port = place.client(place.slurm_job_files(slurm_job), SOURCE, port)
            stack.callback(end, process)
        yield Callers(port, cgroup_port, slurm_port, slurm_job)


def lookup_and_callerid(place: Place, plan: Plan) -> Figures:
    """The owner of a connection: inside the agent, and asked over the network, on an idle and on a loaded node."""
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(callers(place))
        answerers = _answerers(place, found, stack)
        # One load at a time for both questions: to make 100,000 connections takes longer than to ask about one.
        for node in loads(place, plan):
            yield from _lookups(place, plan, node, found)
            yield from _answers(place, answerers, plan, node)
            if node == "idle" or node.startswith("10,000"):
                yield from _rates(place, answerers, plan, node)
        for missing in _missing_peer(place):
            yield Figure("callerid answer", "idle", SLURMD, "ms", peer=True, missing=missing)


Ask = Callable[[float], List[str]]


@dataclass(frozen=True)
class _Answerer:
    """Who answers: a name, a daemon, and the command that asks it for so many seconds."""

    name: str
    pid: int
    ask: Ask


def _answerers(place: Place, found: Callers, stack: contextlib.ExitStack) -> List[_Answerer]:
    """The agents live as long as ``stack``."""
    munge = _munge_socket(place, stack)
    key_file = WORK / "seal.key"
    key_file.touch(mode=0o600)
    key_file.write_bytes(bytes(range(64)))
    by_munge = f'[seal]\nscheme = "munge"\nmunge_socket = "{munge}"'
    by_key = f'[seal]\nscheme = "key"\nkey_file = "{key_file}"'

    def asker(agent_port: int, scheme: str, where: object, source_port: int) -> Ask:
        words = [str(WORK / "asker"), scheme, str(where), SOURCE, str(agent_port)]
        words += [SOURCE, str(source_port), NODE, str(found.port), str(UID)]
        return lambda seconds: place.command([*words, str(seconds)])

    made: List[_Answerer] = []
    backends: List[Tuple[str, int]] = [("cgroup", found.cgroup_port)]
    if found.slurm_port is not None:
        backends.append(("slurm", found.slurm_port))
    port = 6830
    for backend, source_port in backends:
        for scheme, where, seal in (("munge", munge, by_munge), ("key", key_file, by_key)):
            port += 1
            agent = place.agent(f"{scheme}-{backend}", SOURCE, seal, backend, port)
            stack.callback(end, agent.process)
            ask = asker(port, scheme, where, source_port)
            made.append(_Answerer(f"adoptd {scheme}, {backend} jobs", agent.process.pid, ask))
    if place.slurm is not None and not list(_missing_peer(place)):
        program = compile_program("slurm_asker", ("-lslurm",))
        words = [str(program), SOURCE, str(found.slurm_port), NODE, str(found.port)]
        pid = place.slurm._daemons["slurmd"].pid
        made.append(_Answerer(SLURMD, pid, lambda seconds: place.command([*words, str(seconds)], inside=True)))
    return made


def _missing_peer(place: Place) -> Iterator[str]:
    if place.slurm is None:
        yield place.no_slurm
    elif not Path("/usr/include/slurm/slurm.h").exists():
        yield "not installed: libslurm-dev"


def _munge_socket(place: Place, stack: contextlib.ExitStack) -> str:
    if place.slurm is not None:
        return str(place.slurm.run_dir / "munge" / "socket")
    from munged import running_munged

    return stack.enter_context(running_munged()).socket


def _answers(place: Place, answerers: Sequence[_Answerer], plan: Plan, node: str) -> List[Figure]:
    """One asker: how long it waits, and what the daemon spends on it."""
    idle = figures.idle_percent()
    slices: Dict[str, List[List[float]]] = {each.name: [] for each in answerers}
    lost = {each.name: 0 for each in answerers}
    spent: Dict[str, List[float]] = {each.name: [] for each in answerers}
    for _ in range(plan.slices):
        for each in answerers:
            before_ms = _cpu_ms(each.pid)
            output = _output(place, each.ask(plan.slice_s))
            slices[each.name].append(_milliseconds(output))
            asked = len(output.splitlines())
            lost[each.name] += asked - len(slices[each.name][-1])
            spent[each.name].append((_cpu_ms(each.pid) - before_ms) / max(1, asked))
    found = []
    for each in answerers:
        base = Figure("callerid answer", node, each.name, "ms", lost[each.name], idle_percent=idle)
        found.append(figures.of_slices(replace(base, peer=each.name == SLURMD), slices[each.name]))
    for each in answerers:
        base = Figure("CPU of the daemon per answer", node, each.name, "ms", idle_percent=idle)
        found.append(figures.of_values(replace(base, peer=each.name == SLURMD), spent[each.name]))
    return found


def _rates(place: Place, answerers: Sequence[_Answerer], plan: Plan, node: str) -> List[Figure]:
    """Answers per second with eight askers, on the same cores as who answers."""
    idle = figures.idle_percent()
    rates: Dict[str, List[float]] = {each.name: [] for each in answerers}
    lost = {each.name: 0 for each in answerers}
    for _ in range(plan.slices):
        for each in answerers:
            began = time.monotonic()
            processes = [
                subprocess.Popen(each.ask(plan.slice_s), stdout=subprocess.PIPE, cwd="/", env=place.environment())
                for _ in range(8)
            ]
            try:
                lines = [line for one in processes for line in one.communicate(timeout=120)[0].splitlines()]
            finally:
                for process in processes:
                    end(process)
            if any(process.returncode != 0 for process in processes):
                raise RuntimeError(f"an asker of {each.name} failed (see above)")
            rates[each.name].append((len(lines) - lines.count(b"0")) / (time.monotonic() - began))
            lost[each.name] += lines.count(b"0")
    found = []
    for each in answerers:
        base = Figure("callerid answers, 8 askers", node, each.name, "1/s", lost[each.name], idle_percent=idle)
        found.append(figures.of_values(replace(base, peer=each.name == SLURMD, more_is_better=True), rates[each.name]))
    return found


def _lookups(place: Place, plan: Plan, node: str, found: Callers) -> Figures:
    """Each witness alone, in a process of its own in the node's network, as the agent calls it."""
    idle = figures.idle_percent()
    argv = ["/usr/bin/python3", "-B", "-m", "bench.lookup", str(PIN_DIR), f"{SOURCE}:{found.cgroup_port}"]
    argv += [f"{NODE}:{found.port}", str(UID), str(plan.fast_lookups), str(plan.slow_lookups)]
    for name, samples in json.loads(place.run(argv)).items():
        third = max(1, len(samples) // 3)
        slices = [samples[at : at + third] for at in range(0, len(samples), third)]
        base = Figure("owner lookup, one witness alone", node, name, "us", idle_percent=idle, peer=name == "proc")
        yield figures.of_slices(base, slices)


def account_phase(place: Place, plan: Plan) -> Figures:
    """The account phase through the real libpam: no job, one, two with callerid, two from a node that is silent."""
    with contextlib.ExitStack() as stack:
        seal = f'[seal]\nscheme = "munge"\nmunge_socket = "{_munge_socket(place, stack)}"'
        module = ROOT / "pam_hook" / "build" / "pam_adopt.so"
        options = "service=* action_no_jobs=deny timeout_ms=1000"
        contestants: List[_Contestant] = []
        for backend in ["cgroup"] + ([] if place.slurm is None else ["slurm"]):
            # Two nodes are two agents: the one that decides and the one it asks.
            deciding = place.agent(f"node-{backend}", NODE, seal, backend, 6841 if backend == "slurm" else 6840)
            asked = place.agent(f"source-{backend}", SOURCE, seal, backend, 6841 if backend == "slurm" else 6840)
            stack.callback(end, deciding.process)
            stack.callback(end, asked.process)
            line = f"{module} {options} socket={deciding.pam_socket}"
            contestants.append(_Contestant(f"adoptd, {backend} jobs", backend, line, deciding))
        missing = place.no_slurm
        if place.slurm is not None and not Path("/usr/lib/security/pam_slurm_adopt.so").exists():
            missing = "not installed: libpam-slurm-adopt"
        if not missing and place.slurm is not None:
            line = f"pam_slurm_adopt.so service=* action_no_jobs=deny nodename={place.slurm.host}"
            contestants.append(_Contestant(PEER_MODULE, "slurm", line, None))
        services = WORK / "pam.d"
        services.mkdir()
        for number, contestant in enumerate(contestants):
            (services / f"bench{number}").write_text(f"account required {contestant.line}\n")
        for situation in _situations(place, stack):
            yield from _account_cells(place, plan, situation, contestants)
            if missing:
                what = "PAM account phase"
                yield Figure(what, situation.name, PEER_MODULE, "ms", peer=True, missing=missing)


@dataclass(frozen=True)
class _Contestant:
    name: str
    backend: str
    line: str
    agent: Optional[Agent]


@dataclass(frozen=True)
class _Situation:
    """``reason`` is what our agent must log of every round; ``code`` what PAM must return."""

    name: str
    code: int
    reason: str
    source: str
    procs_files: Dict[str, Sequence[str]]


def _situations(place: Place, stack: contextlib.ExitStack) -> Iterator[_Situation]:
    """In the order in which jobs come to be. The connection comes from the older job: the newest is no lucky guess."""
    yield _Situation("no job", 6, "no_jobs", SOURCE, {"cgroup": (), "slurm": ()})
    stack.callback(place.remove_jobs)
    files: Dict[str, Sequence[str]] = {"cgroup": place.make_job("1").procs_files()}
    if place.slurm is not None:
        job = place.slurm.submit_started(ALICE)
        stack.callback(place.slurm.cancel, job)
        files["slurm"] = place.slurm_job_files(job)
    yield _Situation("one job", 0, "only_job", SOURCE, files)
    place.make_job("2")
    if place.slurm is not None:
        job = place.slurm.submit_started(ALICE)
        stack.callback(place.slurm.cancel, job)
    yield _Situation("two jobs, callerid", 0, "callerid", SOURCE, files)
    yield _Situation("two jobs, source is silent", 0, "newest", SILENT, files)


def _account_cells(place: Place, plan: Plan, situation: _Situation, contestants: Sequence[_Contestant]) -> Figures:
    idle = figures.idle_percent()
    silent = situation.source == SILENT
    slices: Dict[str, List[List[float]]] = {contestant.name: [] for contestant in contestants}
    for _ in range(1 if silent else plan.slices):
        for number, contestant in enumerate(contestants):
            rounds = plan.silent_rounds if silent else plan.rounds
            slices[contestant.name].append(_account_slice(place, situation, contestant, number, rounds))
    for contestant in contestants:
        rounds = plan.silent_rounds if silent else plan.rounds * plan.slices
        lost = rounds - sum(len(each) for each in slices[contestant.name])
        base = Figure("PAM account phase", situation.name, contestant.name, "ms", lost, idle_percent=idle)
        yield figures.of_slices(replace(base, peer=contestant.name == PEER_MODULE), slices[contestant.name])


def _account_slice(
    place: Place, situation: _Situation, contestant: _Contestant, number: int, rounds: int
) -> List[float]:
    seen = 0 if contestant.agent is None else contestant.agent.log.stat().st_size
    argv = [str(WORK / "account"), str(WORK / "pam.d"), f"bench{number}", ALICE.name, NODE, str(rounds)]
    driver = place.start(argv, inside=True)
    client = None
    try:
        port = int(place.first_line(driver))
        client, _ = place.client(situation.procs_files[contestant.backend], situation.source, port)
        with _gone(place, situation.source):
            output, _ = driver.communicate(b"go\n", timeout=120)
    finally:
        end(driver)
        if client is not None:
            end(client)
    results = [line.split() for line in output.decode().splitlines()]
    right = [int(nanoseconds) / 1e6 for code, nanoseconds in results if int(code) == situation.code]
    said = rounds
    if contestant.agent is not None:
        said = _count_lines(contestant.agent, seen, rounds, f" reason={situation.reason} ")
    # On a busy machine a round may be out of time, and then something else was decided: lost, not measured.
    if min(len(right), said) < rounds * _RIGHT_SHARE:
        raise RuntimeError(
            f"{contestant.name}, {situation.name}: {len(right)} of {rounds} as expected, {said} by its log"
        )
    return right


def _count_lines(agent: Agent, seen: int, rounds: int, word: str) -> int:
    """How many rounds the agent logged with ``word``, which it does after it has replied."""

    def lines() -> List[str]:
        with agent.log.open("rb") as log:
            log.seek(seen)
            return [line for line in log.read().decode(errors="replace").splitlines() if "phase=account" in line]

    with contextlib.suppress(TimeoutError):
        until(lambda: len(lines()) >= rounds, "all rounds in the log", timeout_s=1.0)
    return sum(word in line for line in lines())


@contextlib.contextmanager
def _gone(place: Place, source: str) -> Iterator[None]:
    """SILENT takes no packets while this lasts: its address has left the node, and who has it now drops everything."""
    if source != SILENT:
        yield
        return
    place.run(["ip", "addr", "del", f"{SILENT}/24", "dev", "eth0"])
    place.run(["ip", "neigh", "replace", SILENT, "lladdr", "02:00:00:00:00:01", "dev", "eth0", "nud", "permanent"])
    try:
        yield
    finally:
        place.run(["ip", "neigh", "del", SILENT, "dev", "eth0"])
        place.run(["ip", "addr", "add", f"{SILENT}/24", "dev", "eth0"])


def connect_cost(place: Place, plan: Plan) -> Figures:
    """What the probe adds to connect(): loopback connect/close cycles without and with it, and the kernel's count."""
    idle = figures.idle_percent()
    argv = ["/usr/bin/python3", "-B", "-m", "bench.probe_cost", str(PIN_DIR), str(WORK / "load")]
    argv += [str(place.jobs.directories()[0]), str(plan.probe_turns), str(plan.cycles)]
    measuring = place.start(argv, procs_files=place.jobs.procs_files())
    try:
        place.first_line(measuring)
        place.probe("unload")
        output, _ = measuring.communicate(b"go\n", timeout=300)
    finally:
        end(measuring)
        place.probe("load")
    found = json.loads(output)
    added: List[Figure] = []
    for index, cell in ((0, "connect()"), (1, "connect, accept, close")):
        turns = {name: [[pair[index] / 1000 for pair in turn] for turn in found[name]] for name in ("without", "with")}
        for name, samples in turns.items():
            base = Figure("on loopback", cell, f"{name} the probe", "us", idle_percent=idle, peer=name == "without")
            yield figures.of_slices(base, samples)
        medians = [[figures.percentile(sorted(turn), 50) for turn in turns[name]] for name in ("without", "with")]
        differences = [after - before for before, after in zip(*medians)]
        base = Figure("added by the probe", cell, "paired difference", "us", idle_percent=idle)
        added.append(figures.of_values(base, differences))
    base = Figure("added by the probe", "connect()", "the kernel's run statistics", "us", idle_percent=idle)
    yield from [*added, figures.of_values(base, [found["run_ns"] / found["runs"] / 1000])]


def agent_itself(place: Place, plan: Plan) -> Figures:
    """What an agent costs that nobody asks anything."""
    with contextlib.ExitStack() as stack:
        seal = f'[seal]\nscheme = "munge"\nmunge_socket = "{_munge_socket(place, stack)}"'
        starts: List[float] = []
        for _ in range(3):
            agent = place.agent("itself", SOURCE, seal, port=6850)
            starts.append(agent.ready_s)
            if len(starts) < 3:
                end(agent.process)
        stack.callback(end, agent.process)
        idle = figures.idle_percent()
        status = (Path("/proc") / str(agent.process.pid) / "status").read_text()
        resident_kb = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")))
        before_ns, began = _cpu_ns(agent.process.pid), time.monotonic()
        time.sleep(plan.idle_s)
        used = (_cpu_ns(agent.process.pid) - before_ns) / 1e9 / (time.monotonic() - began)
    what = "the agent, idle"
    yield figures.of_values(
        Figure(what, "resident memory", "adoptd munge", "MB", idle_percent=idle), [resident_kb / 1024]
    )
    yield figures.of_values(
        Figure(what, "CPU, percent of a core", "adoptd munge", "%", idle_percent=idle), [used * 100]
    )
    yield figures.of_values(
        Figure(what, "start to ready, probe loaded", "adoptd munge", "s", idle_percent=idle), starts
    )


def _cpu_ns(pid: int) -> int:
    """On-CPU time of all threads: schedstat counts nanoseconds where stat counts ticks of 10 ms."""
    tasks = (Path("/proc") / str(pid) / "task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks)


def _cpu_ms(pid: int) -> float:
    """CPU of a process with the threads that have ended: slurmd has one per question."""
    fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")


def _output(place: Place, argv: Sequence[str]) -> str:
    done = subprocess.run(argv, stdout=subprocess.PIPE, cwd="/", env=place.environment(), timeout=120)
    if done.returncode != 0:
        raise RuntimeError(f"{argv[-11:]} failed (see above)")
    return done.stdout.decode()


def _milliseconds(output: str) -> List[float]:
    """Of the answers; 0 stands for none."""
    return [int(line) / 1e6 for line in output.splitlines() if line != "0"]
