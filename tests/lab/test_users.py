"""The users' commands and messages on real logins: what they see, what they can move, and what is not disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import pytest

from adoptd.control.rates import JOINS_MAX
from lab.etc_files import ALICE, BOB, ROOT, User
from lab.job_kinds import CgroupJobs
from lab.lab import Lab, Session
from lab.node import Node, Place
from lab.node_runner import SOURCE_IN_NODE
from lab.waiting import DEADLINE_S, has_ended, until

ADOPTCTL = "/run/adoptctl"
NOTICE = "This session is in job"
BATCH = ("-o", "BatchMode=yes")
PAYLOAD = bytes(range(256)) * 1024


def install_adoptctl(lab: Lab) -> None:
    """adoptctl on both nodes, as users have it."""
    code = "import sys; from adoptd.cli import adoptctl_main; sys.exit(adoptctl_main())"
    script = f"#!/bin/sh\nPYTHONPATH={SOURCE_IN_NODE}/agent exec /usr/bin/python3 -B -c '{code}' \"$@\"\n"
    for node in (lab.first, lab.second):
        node.write(ADOPTCTL, script, mode=0o755)


@pytest.fixture(autouse=True)
def _ready(lab: Lab) -> None:
    """The PAM stack as it is delivered."""
    install_adoptctl(lab)
    lab.pam("action_unknown=newest")


@pytest.fixture
def fresh(lab: Lab) -> Iterator[None]:
    """An agent of which nobody has asked for a join yet: how often one may is counted."""
    with lab.agent_settings(lab.second, ""):
        yield


def ctl(node: Node, *words: str, user: User = ROOT, place: Optional[Place] = None) -> Tuple[int, str, str]:
    """Run adoptctl on a node, outside any session."""
    process = node.popen([ADOPTCTL, *words], user=user, group=place)
    out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out.decode(), err.decode()


class Held:
    """A login whose session waits for words to carry out, one shell command each, and says what came of them."""

    def __init__(self, lab: Lab, user: User = ALICE) -> None:
        self._node = lab.second
        self._name = f"/run/gates/held-{user.name}-{time.monotonic_ns()}"
        self._count = 0
        name = self._name
        loop = (
            f"n=0; echo $$ > {name}.pid; while sleep 0.02; do if [ -e {name}.$((n+1)).in ]; then n=$((n+1)); "
            f"sh {name}.$n.in > {name}.$n.out 2>&1; echo $? > {name}.$n.rc; fi; done"
        )
        self.login: Session = lab.start_login(command=loop, user=user)
        self.pid = int(until(lambda: self._read("pid").strip() or None, "the session's shell"))

    def _read(self, suffix: str) -> str:
        path = self._node.path(f"{self._name}.{suffix}")
        return path.read_text("utf-8") if path.exists() else ""

    def run(self, command: str) -> Tuple[int, str]:
        """Exit status, and standard output and error together."""
        self._count += 1
        self._node.write(f"{self._name}.{self._count}.in", command + "\n")
        status = until(lambda: self._read(f"{self._count}.rc").strip() or None, f"the end of {command}")
        return int(status), self._read(f"{self._count}.out")

    def close(self) -> None:
        self.login.process.kill()
        self.login.process.communicate()
        for path in self._node.path("/run/gates").glob(Path(self._name).name + "*"):
            path.unlink()


@contextlib.contextmanager
def held(lab: Lab, user: User = ALICE) -> Iterator[Held]:
    session = Held(lab, user)
    try:
        yield session
    finally:
        session.close()


def job_of(lab: Lab, pid: int) -> Optional[str]:
    return lab.kind.job_in(lab.second, Path(f"/proc/{pid}/cgroup").read_text("ascii"))


def field(pid: int, index: int) -> int:
    """A field of /proc/PID/stat, counted as proc_pid_stat(5) does."""
    return int(Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[index - 3])


def document(text: str) -> Dict[str, Any]:
    value = json.loads(text)
    assert isinstance(value, dict)
    return value


# ---- where am I


def test_whereami_in_a_session(lab: Lab) -> None:
    """The job, what it uses and may use, the session and why it is there, and the user's other jobs."""
    with lab.jobs(2) as (older, newest), held(lab) as session:
        status, out = session.run(f"{ADOPTCTL} whereami --json")
        told = document(out)
        assert (status, told["job"], told["other_jobs"], told["uid"]) == (0, newest, [older], ALICE.uid)
        assert told["session"]["reason"] == "newest"
        assert told["session"]["session"].startswith(f"{field(field(session.pid, 4), 4)}-")
        assert told["limits"]["memory_used"] > 0
        assert told["limits"]["cpus"] == len(os.sched_getaffinity(session.pid))
        status, out = session.run(f"{ADOPTCTL} whereami")
        assert f"job:     {newest}\n" in out
        assert f"others:  {older}\n" in out


def test_whereami_shows_the_limits_in_force(lab: Lab) -> None:
    """The job's memory and process limits, in whichever hierarchy they are kept."""
    with lab.jobs(1) as (job,), held(lab) as session:
        names = {"memory.max": 64 << 20, "memory.limit_in_bytes": 64 << 20, "pids.max": 77}
        kind = lab.kind
        assert isinstance(kind, CgroupJobs)
        set_here = set()
        for directory in kind.place(lab.second, ALICE, job).directories():
            for name, value in names.items():
                if (directory / name).exists():
                    (directory / name).write_text(str(value), encoding="ascii")
                    set_here.add(name)
        assert set_here, "no hierarchy of this host has a limit to set"
        told = document(session.run(f"{ADOPTCTL} whereami --json")[1])["limits"]
        if {"memory.max", "memory.limit_in_bytes"} & set_here:
            assert told["memory_max"] == 64 << 20
        if "pids.max" in set_here:
            assert told["pids_max"] == 77


def test_whereami_outside_any_job(lab: Lab) -> None:
    """Says so, and what to do."""
    status, out, _ = ctl(lab.second, "whereami", "--json", user=BOB)
    told = document(out)
    assert (status, told["job"], told["session"], told["other_jobs"]) == (0, None, None, [])
    assert "You have no job on this node" in told["advice"]
    with lab.jobs(1, user=BOB) as (job,):
        told = document(ctl(lab.second, "whereami", "--json", user=BOB)[1])
        assert (told["job"], told["other_jobs"]) == (None, [job])
        assert "This process is in no job" in told["advice"]
        # A process of the job itself is in it without a session.
        told = document(ctl(lab.second, "whereami", "--json", user=BOB, place=lab.kind.place(lab.second, BOB, job))[1])
        assert (told["job"], told["session"]) == (job, None)


# ---- sessions and explain


def test_sessions_and_why_they_are_where_they_are(lab: Lab) -> None:
    """Root sees all, others their own; explain replays both phases, by session and by any process of it."""
    with lab.jobs(2) as (_, newest), held(lab) as session:
        leader = field(field(session.pid, 4), 4)
        rows = document(ctl(lab.second, "sessions", "--json")[1])["sessions"]
        (row,) = [row for row in rows if row["pid"] == leader]
        assert (row["user"], row["job"], row["reason"]) == ("alice", newest, "newest")
        assert row["from"].startswith(f"{lab.first.ipv4}:")
        assert document(ctl(lab.second, "sessions", "--json", user=ALICE)[1])["sessions"] == [row]
        assert document(ctl(lab.second, "sessions", "--json", user=BOB)[1])["sessions"] == []
        for name in (row["session"], str(leader), str(session.pid)):
            told = document(ctl(lab.second, "explain", name, "--json")[1])
            stages = [stage["stage"] for stage in told["stages"]]
            assert stages == ["jobs_here", "ask_source", "adopt", "account_phase", "adopt"]
            assert (told["job"], told["job_now"], told["session"]) == (newest, newest, row["session"])
            times = [stage["at_ms"] for stage in told["stages"]]
            assert times == sorted(times)
        status, _, errors = ctl(lab.second, "explain", row["session"], user=BOB)
        assert (status, "there is no session" in errors) == (1, True)


def test_explain_for_root_heeds_ignore_root(lab: Lab) -> None:
    """ignore_root=1 is the module's default, and root passes; with 0 root is treated as everybody else."""
    told = document(ctl(lab.second, "explain", "--user", "root", "--json")[1])
    assert (told["verdict"], told["reason"]) == ("ignore", "root")
    told = document(ctl(lab.second, "explain", "--user", "root", "--option", "ignore_root=0", "--json")[1])
    assert (told["verdict"], told["reason"]) == ("deny", "no_jobs")


# ---- join


@pytest.mark.usefixtures("fresh")
def test_join_moves_the_whole_session(lab: Lab) -> None:
    """sshd's processes, the shell and its children; from then on the session lives and ends with the new job."""
    with lab.jobs(2) as (older, newest), held(lab) as session:
        leader = field(field(session.pid, 4), 4)
        # Other runs of this test have sleepers of their own.
        mine = f"{os.getpid()}"
        session.run(f"sleep 641.{mine} & setsid sleep 642.{mine} & (sleep 643.{mine} &) ; exit 0")
        sleep = ["pgrep", "-u", str(ALICE.uid), "-f", rf"^sleep 64[123]\.{mine}$"]
        shown = subprocess.run(sleep, capture_output=True, text=True)
        sleepers = [int(word) for word in shown.stdout.split()]
        # Of the shell that ended, its children have lost their parent; two are still of the session's kernel session.
        everybody = [leader, field(session.pid, 4), session.pid]
        assert {job_of(lab, pid) for pid in (*everybody, *sleepers)} == {newest}
        status, out = session.run(f"{ADOPTCTL} join {older} --json")
        told = document(out)
        assert (status, told["outcome"], told["from"], told["job"], told["left"]) == (0, "joined", newest, older, [])
        assert told["moved"] >= len(everybody)
        assert {job_of(lab, pid) for pid in everybody} == {older}
        (row,) = [r for r in document(ctl(lab.second, "sessions", "--json")[1])["sessions"] if r["pid"] == leader]
        assert (row["job"], row["reason"]) == (older, "join")
        stages = document(session.run(f"{ADOPTCTL} explain $$ --json")[1])["stages"]
        assert stages[-1]["stage"] == "join"
        # What it starts from now on is born there, and the end of the job it left does not concern it.
        assert f"job_{older}" in session.run("cat /proc/self/cgroup")[1]
        lab.kind.end([newest], ALICE, [lab.first, lab.second])
        assert session.run("echo still here") == (0, "still here\n")
        lab.kind.end([older], ALICE, [lab.first, lab.second])
        assert has_ended(leader, DEADLINE_S)
        assert has_ended(session.pid, DEADLINE_S)


@pytest.mark.usefixtures("fresh")
def test_join_takes_orphans_of_its_kernel_session_along(lab: Lab) -> None:
    """A background process whose shell has ended is found as long as the process that made its session lives."""
    with lab.jobs(2) as (older, _), held(lab) as session:
        made = "import os,time,sys\nif os.fork():\n os.wait(); time.sleep(600)\nos.setsid()\n"
        made += "if os.fork() == 0:\n  if os.fork(): os._exit(0)\n  open(sys.argv[1],'w').write(str(os.getpid()))\n"
        made += "  time.sleep(600)\ntime.sleep(600)\n"
        lab.second.write("/run/gates/orphan.py", made)
        file = f"/run/gates/orphan-{session.pid}"
        try:
            session.run(f"python3 /run/gates/orphan.py {file} > /dev/null 2>&1 &")
            path = lab.second.path(file)
            orphan = int(
                until(lambda: (path.read_text("ascii").strip() or None) if path.exists() else None, "the orphan")
            )
            until(lambda: field(orphan, 4) != session.pid and job_of(lab, orphan) is not None, "its parent's end")
            status, out = session.run(f"{ADOPTCTL} join {older} --json")
            assert (status, document(out)["left"]) == (0, [])
            assert job_of(lab, orphan) == older
        finally:
            lab.second.path(file).unlink(missing_ok=True)
            lab.second.path("/run/gates/orphan.py").unlink(missing_ok=True)


@pytest.mark.usefixtures("fresh")
def test_join_takes_a_setuid_program_along(lab: Lab) -> None:
    """It has another user's rights but is where the session put it; and it may ask for nothing by itself."""
    suid = "/usr/local/bin/suid-sleep-of-the-test"
    path = lab.second.path(suid)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy("/bin/sleep", path)
    try:
        path.chmod(0o4755)
        with lab.jobs(2) as (older, newest), held(lab) as session:
            seconds = f"644.{os.getpid()}"
            session.run(f"{suid} {seconds} > /dev/null 2>&1 &")
            search = ["pgrep", "-f", f"^{suid} {seconds}$"]
            pid = int(
                until(lambda: subprocess.run(search, capture_output=True, text=True).stdout, "the setuid program")
            )
            uids = set(Path(f"/proc/{pid}/status").read_text("utf-8").partition("Uid:")[2].split("\n")[0].split())
            assert uids == {str(ALICE.uid), "0"}
            assert job_of(lab, pid) == newest
            session.run(f"{ADOPTCTL} join {older}")
            # Its shell has ended, and it is found by the kernel session that it is in.
            assert job_of(lab, pid) == older
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.usefixtures("fresh")
def test_join_while_the_session_forks(lab: Lab) -> None:
    """Processes that come and go while they are moved: in the end none is left in the old job."""
    with lab.jobs(2) as (older, _), held(lab) as session:
        session.run("(while :; do sh -c 'sleep 0.01; :' ; done) > /dev/null 2>&1 & echo $! > /run/gates/forker")
        status, out = session.run(
            f"sh -c 'while :; do sh -c \"sleep 0.01; :\"; done' & f=$!; {ADOPTCTL} join {older} --json; s=$?; "
            "sleep 0.3; kill $f; exit $s"
        )
        told = document(out)
        assert (status, told["left"]) == (0, [])
        left = {job_of(lab, pid) for pid in (session.pid, field(session.pid, 4))}
        assert left == {older}
        lab.second.path("/run/gates/forker").unlink(missing_ok=True)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("asked", ["unknown", "ended", "other's", "already", "named"])
def test_join_refuses(lab: Lab, asked: str) -> None:
    """With a sentence and status 1; the session stays where it is. Another user's job is as unknown as none."""
    with lab.jobs(2) as (older, newest), lab.jobs(1, user=BOB) as (bobs,), held(lab) as session:
        unknown = "alice has no job '{}' running on this node"
        if asked == "ended":
            lab.kind.end([older], ALICE, [lab.first, lab.second])
        words = {
            "unknown": (f"join {int(newest) + 50}", unknown.format(int(newest) + 50)),
            "ended": (f"join {older}", unknown.format(older)),
            "other's": (f"join {bobs}", unknown.format(bobs)),
            "already": (f"join {newest}", f"this session is in job {newest} already"),
            "named": (f"join {older} --session 1-1", "only root may name a session"),
        }
        command, sentence = words[asked]
        status, out = session.run(f"{ADOPTCTL} {command}")
        assert (status, out.startswith(f"join: {sentence}")) == (1, True), out
        assert job_of(lab, session.pid) == newest


@pytest.mark.usefixtures("fresh")
def test_join_outside_a_session_is_refused(lab: Lab) -> None:
    """A process of a job that no login put there, and one that is in no job at all."""
    with lab.jobs(2) as (older, newest):
        for place in (None, lab.kind.place(lab.second, ALICE, newest)):
            status, _, errors = ctl(lab.second, "join", older, user=ALICE, place=place)
            assert (status, "not a session that was put into a job" in errors) == (1, True)


@pytest.mark.usefixtures("fresh")
def test_root_moves_a_session_it_names(lab: Lab) -> None:
    """Into a job of the session's user, and no other."""
    with lab.jobs(2) as (older, newest), lab.jobs(1, user=BOB) as (bobs,), held(lab) as session:
        leader = field(field(session.pid, 4), 4)
        status, _, errors = ctl(lab.second, "join", bobs, "--session", str(leader))
        assert (status, f"alice has no job '{bobs}'" in errors) == (1, True)
        assert job_of(lab, session.pid) == newest
        assert ctl(lab.second, "join", older, "--session", str(leader))[0] == 0
        assert job_of(lab, session.pid) == older
        status, _, errors = ctl(lab.second, "join", older, "--session", "1-1")
        assert (status, "there is no session '1-1'" in errors) == (1, True)


@pytest.mark.usefixtures("fresh")
def test_joins_are_counted_per_user(lab: Lab) -> None:
    """The eleventh in a minute waits; another user's first does not."""
    log = lab.second.agent_log()
    with lab.jobs(2, user=BOB) as (older, newest), lab.jobs(2) as (alices, _), held(lab, BOB) as session:
        # In one go: on a busy machine the minute is soon over.
        joins = "".join(f"{ADOPTCTL} join {(older, newest)[count % 2]} || exit 7; " for count in range(JOINS_MAX))
        status, out = session.run(f"{joins}{ADOPTCTL} join {older}")
        assert (status, "too many joins" in out) == (1, True), out
        with held(lab) as other:
            assert other.run(f"{ADOPTCTL} join {alices}")[0] == 0
    # Nor does the watch over sessions take what a user asked for as an escape.
    assert [line for line in log.lines() if " escape " in line] == []


# ---- what is said at a login, and to whom


def shell(lab: Lab, *options: str) -> str:
    """What the terminal of an interactive login shows."""
    ours, theirs = pty.openpty()
    try:
        process = lab.first.popen(
            ["ssh", "-tt", *BATCH, *options, lab.second.name],
            user=ALICE,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={"TERM": "dumb"},
        )
    finally:
        os.close(theirs)
    os.write(ours, b"exit\n")
    shown = b""
    ends = time.monotonic() + DEADLINE_S
    while time.monotonic() < ends and select.select([ours], [], [], DEADLINE_S)[0]:
        try:
            part = os.read(ours, 4096)
        except OSError:  # EIO: the other end is closed
            break
        shown += part
    process.wait(DEADLINE_S)
    os.close(ours)
    return shown.decode(errors="replace")


@pytest.mark.parametrize(
    ("notice", "jobs", "times"),
    [("choice", 2, 1), ("choice", 1, 0), ("always", 1, 1), ("always", 2, 1), ("never", 2, 0)],
)
def test_a_shell_is_told_once_which_job_it_is_in(lab: Lab, notice: str, jobs: int, times: int) -> None:
    """Once, although both phases run; by default only where there was a choice."""
    with lab.agent_settings(lab.second, f'[session]\nnotice = "{notice}"\n'), lab.jobs(jobs) as ids:
        shown = shell(lab)
        assert shown.count(NOTICE) == times, shown
        if times:
            assert f"{NOTICE} {ids[-1]} on node2" in shown
            assert ("it could not be found out" in shown or "could not be found out" in shown) == (jobs == 2)
            assert (f"Also yours here: {ids[0]}" in shown) == (jobs == 2)


TRANSFERS = {
    "scp": ["scp", "-q", *BATCH, "{file}", "node2:{copy}"],
    "scp -O": ["scp", "-q", "-O", *BATCH, "{file}", "node2:{copy}"],
    "sftp": ["sftp", "-q", *BATCH, "-b", "{batch}", "node2"],
    "rsync": ["rsync", "-e", "ssh -o BatchMode=yes", "{file}", "node2:{copy}"],
}


@pytest.mark.parametrize("tool", list(TRANSFERS))
def test_transfers_are_not_disturbed(lab: Lab, tool: str) -> None:
    """The real tools, with the notice on for everybody: the file arrives whole and nothing is printed anywhere."""
    assert shutil.which(TRANSFERS[tool][0]), f"{TRANSFERS[tool][0]} is not installed"
    tag = f"{time.monotonic_ns()}"
    names = {name: f"/home/alice/{name}-{tag}" for name in ("file", "copy", "batch")}
    home = lab.second.path("/home/alice")
    lab.first.path(names["file"]).write_bytes(PAYLOAD)
    lab.first.path(names["file"]).chmod(0o644)
    lab.first.write(names["batch"], f"put {names['file']} {names['copy']}\n")
    try:
        with lab.agent_settings(lab.second, '[session]\nnotice = "always"\n'), lab.jobs(2):
            process = lab.first.popen([word.format(**names) for word in TRANSFERS[tool]], user=ALICE)
            out, err = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, err) == (0, b"")
        assert [line for line in out.splitlines() if not line.startswith(b"sftp> ")] == []
        assert lab.second.path(names["copy"]).read_bytes() == PAYLOAD
    finally:
        for path in home.glob(f"*-{tag}"):
            path.unlink()


def test_binary_output_is_not_disturbed(lab: Lab) -> None:
    """``ssh host command`` in both directions, byte for byte, with the notice on for everybody."""
    with lab.agent_settings(lab.second, '[session]\nnotice = "always"\n'), lab.jobs(2):
        process = lab.first.popen(["ssh", *BATCH, "node2", "cat"], user=ALICE, stdin=subprocess.PIPE)
        out, err = process.communicate(PAYLOAD, timeout=DEADLINE_S)
    assert (process.returncode, out == PAYLOAD, err) == (0, True, b"")


def test_a_denial_says_what_to_do_and_can_be_quoted(lab: Lab) -> None:
    """The site's own sentence, and the request id that the log and the event have."""
    contact = "Questions: hpc-help@example.org, room 101."
    with lab.agent_settings(lab.second, f'[session]\ncontact = "{contact}"\n'):
        log = lab.second.agent_log()
        login = lab.login(user=BOB)
        assert "Access to node2 refused: you have no job running on node2." in login.errors
        assert contact in login.errors
        request = login.errors.partition("[request ")[2].partition("]")[0]
        lines = [line for line in log.lines() if f"request={request}" in line]
        assert len(request) == 8
        assert any("decision=denied" in line for line in lines)


# ---- watch


class Watching:
    """A running ``adoptctl watch --json``."""

    def __init__(self, node: Node, user: User, *words: str) -> None:
        self.process = node.popen([ADOPTCTL, "watch", "--json", *words], user=user)
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._rest = b""
        self.events: List[Dict[str, Any]] = []

    def until(self, condition: Any, what: str) -> None:
        def seen() -> bool:
            self._read()
            return bool(condition(self.events))

        until(seen, f"{what}; so far {self.events}")

    def _read(self) -> None:
        assert self.process.stdout is not None
        data = self.process.stdout.read()
        self._rest += data or b""
        *lines, self._rest = self._rest.split(b"\n")
        self.events += [json.loads(line) for line in lines]

    def end(self) -> Tuple[int, str]:
        _, err = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, err.decode()


@contextlib.contextmanager
def watching(node: Node, user: User, *words: str) -> Iterator[Watching]:
    watch = Watching(node, user, *words)
    try:
        yield watch
    finally:
        watch.process.kill()
        watch.process.communicate()


def _until_subscribed(lab: Lab, watches: Sequence[Watching]) -> None:
    """A watch sees what happens after it began: log in until each has seen something."""
    for _ in range(20):
        lab.login(command="true")
        lab.login(user=BOB, command="true")
        for watch in watches:
            watch._read()
        if all(watch.events for watch in watches):
            return
    raise AssertionError("a watch has seen nothing of twenty logins")


def test_watch_shows_root_all_and_others_their_own(lab: Lab) -> None:
    """Adoptions, denials and callerid answers, filtered by who asks, by kind and by user."""
    with lab.jobs(2) as (older, _), contextlib.ExitStack() as stack:
        roots, alices, bobs, denials = (
            stack.enter_context(watching(lab.second, ROOT)),
            stack.enter_context(watching(lab.second, ALICE)),
            stack.enter_context(watching(lab.second, BOB)),
            stack.enter_context(watching(lab.second, ROOT, "--kind", "denial", "--user", "bob")),
        )
        _until_subscribed(lab, [roots, alices, bobs, denials])
        lab.login(job=older)
        lab.login(user=BOB)
        roots.until(lambda events: any(e["kind"] == "adoption" and e.get("job") == older for e in events), "hers")
        denials.until(lambda events: len(events) >= 2, "two denials")
        for watch, uid in ((alices, ALICE.uid), (bobs, BOB.uid)):
            watch.until(lambda events: len(events) >= 2, "one's own")
            assert {event["uid"] for event in watch.events} == {uid}
        assert {event["kind"] for event in bobs.events} == {"denial"}
        assert {(event["kind"], event["user"]) for event in denials.events} == {("denial", "bob")}
        assert {event["uid"] for event in roots.events} >= {ALICE.uid, BOB.uid}
        request = bobs.events[-1]["request"]
        assert any(event.get("request") == request for event in roots.events)
        with watching(lab.second, BOB, "--user", "alice") as refused:
            status, errors = refused.end()
            assert (status, "only root may ask about another user" in errors) == (1, True)


def test_watch_on_the_source_shows_answers(lab: Lab) -> None:
    """node1 is asked about alice's connection: root and alice see it there, bob does not."""
    with lab.jobs(2) as (older, _), contextlib.ExitStack() as stack:
        watches = [stack.enter_context(watching(lab.first, user)) for user in (ROOT, ALICE, BOB)]
        for _ in range(20):
            lab.login(job=older, command="true")
            for watch in watches:
                watch._read()
            if watches[0].events and watches[1].events:
                break
        for watch in watches[:2]:
            last = watch.events[-1]
            assert (last["kind"], last["outcome"], last["job"], last["uid"]) == ("callerid", "job", older, ALICE.uid)
        assert "peer" in watches[0].events[-1]
        assert "peer" not in watches[1].events[-1]
        assert watches[2].events == []


def test_watch_ends_as_it_should(lab: Lab) -> None:
    """Interrupted: 130. The agent restarted: a sentence and 1. Nobody reads its output: 1, though nothing happens."""
    with lab.jobs(1), contextlib.ExitStack() as stack:
        interrupted, restarted = (stack.enter_context(watching(lab.second, ROOT)) for _ in range(2))
        closed = stack.enter_context(watching(lab.second, ROOT))
        _until_subscribed(lab, [interrupted, restarted, closed])
        interrupted.process.send_signal(signal.SIGINT)
        status, errors = interrupted.end()
        assert (status, errors) == (130, "")
        assert closed.process.stdout is not None
        closed.process.stdout.close()
        assert closed.process.wait(DEADLINE_S) == 1
        with lab.agent_down(lab.second):
            status, errors = restarted.end()
        assert (status, errors.strip()) == (1, "watch: the agent is stopping")


def test_a_killed_agent_ends_a_watch(lab: Lab) -> None:
    """Without a word from it: the watcher says what it knows."""
    with lab.jobs(1), watching(lab.second, ROOT) as watch:
        _until_subscribed(lab, [watch])
        try:
            lab.second.kill("agent")
            status, errors = watch.end()
        finally:
            lab.second.start_agent()
        assert (status, errors.strip()) == (1, "watch: the agent has gone; it may have been restarted")
