"""Real logins whose session is moved out of its job, by a module of the stack or by hand, and where they end up."""

from __future__ import annotations

import contextlib
import re
import subprocess
from pathlib import Path
from typing import Iterator, List, Optional

import pytest

from lab.cgroups import Group
from lab.etc_files import PAM_TIMEOUT_MS
from lab.lab import REPORT, Lab, Session
from lab.node import LogTail
from lab.waiting import until

MOVER = "/run/pam_mover.so"
GO = "/home/alice/go"
# Says where it is when it is told to go on; and in which cgroups it began.
SESSION = (
    f"cat /proc/self/cgroup > {GO}.new; mv {GO}.new {GO}.began; while [ ! -e {GO} ]; do sleep 0.02; done; {REPORT}"
)


@pytest.fixture(scope="module")
def mover(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The module that moves its process, built."""
    source, built = Path(__file__).with_name("pam_mover.c"), tmp_path_factory.mktemp("mover") / "pam_mover.so"
    flags = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run(["gcc", *flags, "-o", str(built), str(source)], check=True)
    return built.read_bytes()


class Scene:
    """One lab, its second node's session stack, and what that node's agent says of escapes."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.node = lab.second
        self.slice: Group = self.node.group.child("user.slice").make()
        self._tail = LogTail(self.node.path("/var/log/agent.log"))

    def stack(self, *session: str) -> None:
        """The session lines, with OURS and MOVER by these words."""
        ours = f"{self.lab.cluster.pam_module} timeout_ms={PAM_TIMEOUT_MS}"
        words = {"adopt": ours, "mover": " ".join((MOVER, *self.slice.procs_files()))}
        lines = ["auth required pam_unix.so", f"account required {ours}"]
        lines += [f"session required {words[each]}" for each in session]
        self.node.write("/etc/pam.d/sshd", "\n".join(lines) + "\n")

    def escapes(self) -> List[str]:
        return [line for line in self._tail.lines() if re.search(r"\bescape session=", line)]

    def outcome(self, line: str) -> Optional[str]:
        found = re.search(r" mover=(\w+) .* outcome=(\w+)", line)
        return None if found is None else f"{found[1]} {found[2]}"

    @contextlib.contextmanager
    def session(self, job: str) -> Iterator[Session]:
        """alice's session, begun; it goes on at :meth:`go`."""
        session = self.lab.start_login(command=SESSION)
        try:
            began, ended = self.node.path(f"{GO}.began"), session.process.poll
            until(lambda: began.exists() or ended() is not None, "the session has begun")
            assert ended() is None, f"no session: {session.end()}; the agent: {self._tail.lines()[-6:]}"
            yield session
        finally:
            self.go()
            session.process.kill()
            for stream in (session.process.stdout, session.process.stderr):
                if stream is not None:
                    stream.close()
            session.process.wait()

    def move_by_hand(self, job: str) -> int:
        """Root moves the session's first process out of the job. Returns its pid."""
        kept = self.node.path("/run/adoptd/sessions")
        (name,) = [path.name for path in kept.iterdir() if f'"id":"{job}"' in path.read_text()]
        pid = name.partition("-")[0]
        for file in self.slice.procs_files():
            subprocess.run(["sh", "-c", 'echo "$0" > "$1"', pid, file], check=True)
        return int(pid)

    def go(self) -> None:
        self.node.path(GO).touch()

    def close(self) -> None:
        for name in (GO, f"{GO}.began"):
            self.node.path(name).unlink(missing_ok=True)
        self.lab.pam("")
        self.slice.remove()


@pytest.fixture(params=["lab", "other_lab", "slurm_lab"])
def scene(request: pytest.FixtureRequest, mover: bytes) -> Iterator[Scene]:
    """Plain cgroups in v1 and v2, in v2 alone, and Slurm's."""
    made = Scene(request.getfixturevalue(request.param))
    module = made.node.path(MOVER)
    module.write_bytes(mover)
    module.chmod(0o644)
    try:
        yield made
    finally:
        made.close()
        module.unlink()


@pytest.mark.timeout(150)
def test_moved_before_pam_adopt(scene: Scene) -> None:
    """pam_systemd above us, as it should be: the session phase adopts last, and there is no escape."""
    scene.stack("mover", "adopt")
    with scene.lab.jobs(1) as (job,), scene.session(job) as session:
        began = scene.node.path(f"{GO}.began").read_text()
        assert scene.lab.landed(f"{scene.node.name}\n{began}") == f"job {job} on node2"
        scene.go()
        assert session.end().landed == f"job {job} on node2"
    assert scene.escapes() == []


@pytest.mark.timeout(150)
def test_moved_after_pam_adopt(scene: Scene) -> None:
    """pam_systemd below us: the session begins outside its job, is seen, and is in it a moment later, shell and all."""
    scene.stack("adopt", "mover")
    with scene.lab.jobs(1) as (job,), scene.session(job) as session:
        until(lambda: bool(scene.escapes()), "the agent sees the escape")
        scene.go()
        assert session.end().landed == f"job {job} on node2"
    assert [scene.outcome(line) for line in scene.escapes()] == ["self readopted"]


@pytest.mark.timeout(150)
def test_moved_by_hand_and_only_reported(scene: Scene) -> None:
    """on_escape = "report": root moves it out, and it stays out."""
    scene.stack("adopt")
    reported = scene.lab.agent_settings(scene.node, '[session]\non_escape = "report"\n')
    with reported, scene.lab.jobs(1) as (job,), scene.session(job) as session:
        pid = scene.move_by_hand(job)
        until(lambda: bool(scene.escapes()), "the agent sees the escape")
        assert pid in scene.slice.pids()
        scene.go()
        session.end()
    assert [scene.outcome(line) for line in scene.escapes()] == ["root reported"]


@pytest.mark.timeout(150)
def test_moved_while_the_agent_is_restarted(scene: Scene) -> None:
    """The session is found again, and so is what happened to it meanwhile."""
    scene.stack("adopt")
    with scene.lab.jobs(1) as (job,), scene.session(job) as session:
        with scene.lab.agent_down(scene.node):
            scene.move_by_hand(job)
        until(lambda: bool(scene.escapes()), "the agent sees the escape")
        scene.go()
        assert session.end().landed == f"job {job} on node2"
    assert [scene.outcome(line) for line in scene.escapes()] == ["root readopted"]
