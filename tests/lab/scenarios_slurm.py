"""Scenarios that only Slurm has: what a session is to Slurm once it is in a job's extern step."""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from pathlib import Path
from typing import Iterator, Optional, Tuple

from lab.etc_files import ALICE
from lab.lab import LOGIN_TIMEOUT_S, REPORT, Lab, Session
from lab.node import PYTHON
from lab.outcome import Findings, Outcome
from lab.slurm_cgroups import job_of
from lab.slurm_daemons import SlurmDaemons
from lab.waiting import has_ended, until

GATE = "/run/gates/session"
# scancel sends SIGTERM first and SIGKILL after KillWait (2 s here), which a session's shell may wait for.
SESSION_END_S = 6.0
DISPLAY_NUMBER = 77
JOB_MEMORY_MB = 100
# Touched page by page, so that it is memory and not only address space.
GREEDY = f"{PYTHON} -c 'x = bytearray({4 * JOB_MEMORY_MB} << 20); print(len(x))'"
KILLED = 128 + 9


def slurm_of(lab: Lab) -> SlurmDaemons:
    """The lab's Slurm. Raises RuntimeError where jobs are of another kind."""
    if lab.cluster.slurm is None:
        raise RuntimeError("this scenario is about Slurm, and there is none in these nodes")
    return lab.cluster.slurm


def _number_in(file: Path) -> Optional[int]:
    return int(file.read_text(encoding="ascii").strip() or 0) or None if file.exists() else None


@contextlib.contextmanager
def staying_session(lab: Lab) -> Iterator[Tuple[Session, int]]:
    """A login of alice's to the second node that stays: its client, and the pid of its shell."""
    session = lab.start_login(command=f"{REPORT}; echo $$ > {GATE}; exec sleep 600")
    pid_file = lab.second.path(GATE)
    try:
        yield session, until(lambda: _number_in(pid_file), "the session's pid")
    finally:
        pid_file.unlink(missing_ok=True)
        with session.process:
            session.process.kill()


def extern_step(lab: Lab) -> Outcome:
    """alice's session is in her job's extern step: scontrol lists its processes there, and sstat accounts for them."""
    seen, slurm = Findings(), slurm_of(lab)
    lab.pam("action_unknown=deny")
    tail = lab.second.syslog()
    name = slurm.name_of(lab.second)
    with lab.jobs(1, on=[lab.second]) as (job,), staying_session(lab) as (_, pid):
        where = job_of(Path(f"/proc/{pid}/cgroup").read_text(encoding="ascii"), name)
        seen.check(
            "cgroups", f"job {job}, step extern", "none" if where is None else f"job {where[0]}, step {where[1]}"
        )
        listed = [
            row.split()[:3] for row in slurm.run(["scontrol", "listpids", job, name], node=lab.second).split("\n")
        ]
        ours = [row[2] for row in listed if row[:2] == [str(pid), job]]
        seen.check("scontrol listpids", "extern", " ".join(ours) or f"has no {pid}: {listed}")
        accounted = slurm.run(["sstat", "-n", "-i", "-a", "-P", "-j", f"{job}.extern"]).strip()
        pids = accounted.rpartition("|")[2].split(",")
        seen.check_true("sstat", "has its pid", str(pid) in pids, f"has no {pid}: {accounted}")
    seen.record(lab.pam_records(tail))
    return seen.outcome(f"process {pid} of the session is accounted for in {job}.extern")


def scancel_kills_session(lab: Lab) -> Outcome:
    """alice cancels her job while she is logged in: Slurm ends the session with it."""
    seen, slurm = Findings(), slurm_of(lab)
    lab.pam("action_unknown=deny")
    tail = lab.second.syslog()
    with lab.jobs(1, on=[lab.second]) as (job,), staying_session(lab) as (session, pid):
        started = time.monotonic()
        slurm.run(["scancel", job], user=ALICE)
        login = session.end()
        seconds = time.monotonic() - started
        seen.check("", f"job {job} on node2", login.landed)
        seen.check_true("session", "ended with it", has_ended(pid, SESSION_END_S), f"process {pid} is alive")
        seen.check_true("client", "told at once", seconds < SESSION_END_S, f"after {seconds:.1f} s")
    seen.record(lab.pam_records(tail))
    return seen.outcome(f"the client was gone {seconds * 1000:.0f} ms after scancel")


_X_SERVER = f"""\
import socket
with socket.create_server(("127.0.0.1", {6000 + DISPLAY_NUMBER})) as listener:
    print("ready", flush=True)
    with listener.accept()[0] as client:
        print(client.recv(100).decode(), flush=True)
"""

_X_CLIENT = """\
import os, socket, subprocess
display = os.environ.get("DISPLAY", "")
print(display, os.environ.get("XAUTHORITY", ""), flush=True)
print(subprocess.run(["xauth", "list", display], capture_output=True, text=True).stdout.split()[-1:], flush=True)
port = 6000 + int(display.partition(":")[2].partition(".")[0])
socket.create_connection(("localhost", port)).sendall(b"TOKEN")
"""


@contextlib.contextmanager
def x11_job(lab: Lab, cookie: str) -> Iterator[str]:
    """An allocation of alice's with X11, made from a shell on the login node that has a display."""
    slurm = slurm_of(lab)
    login = slurm.login
    display = f"localhost:{DISPLAY_NUMBER}.0"
    authority = f"{ALICE.home}/.Xauthority"
    slurm.run(["xauth", "-q", "-f", authority, "add", display, "MIT-MAGIC-COOKIE-1", cookie], user=ALICE)
    env = {"DISPLAY": display, "XAUTHORITY": authority}
    argv = ["salloc", "--x11", "--nodes=1", f"--nodelist={slurm.name_of(lab.second)}", "sleep", "600"]
    job = ""
    try:
        with login.popen(argv, user=ALICE, env=env) as salloc:
            try:
                assert salloc.stderr is not None
                said = []
                for line in salloc.stderr:
                    said.append(line.decode(errors="replace"))
                    granted = re.search(r"Granted job allocation (\d+)", said[-1])
                    if granted:
                        job = granted[1]
                        break
                if not job:
                    raise RuntimeError(f"salloc --x11: {''.join(said)}")
                slurm.wait_started(job, ALICE, [lab.second])
                yield job
            finally:
                if job:
                    lab.kind.end([job], ALICE, [lab.second])
                salloc.kill()
    finally:
        login.path(authority).unlink(missing_ok=True)


def x11_display(lab: Lab) -> Outcome:
    """alice's job has X11 forwarding: her ssh session into it has the job's display, which leads to her own."""
    seen, slurm = Findings(), slurm_of(lab)
    lab.pam("action_unknown=deny")
    tail = lab.second.syslog()
    cookie, token = secrets.token_hex(16), secrets.token_hex(8)
    with slurm.login.popen([PYTHON, "-c", _X_SERVER], user=ALICE) as server:
        try:
            assert server.stdout is not None
            server.stdout.readline()
            with x11_job(lab, cookie) as job:
                # The display of the client's own environment must not be what is seen.
                command = f"{PYTHON} -c '{_quoted(_X_CLIENT.replace('TOKEN', token))}'"
                session = lab.start_login(command=command, env={"DISPLAY": ":5"})
                out, err = session.process.communicate(timeout=LOGIN_TIMEOUT_S)
                lines = [*out.decode().splitlines(), "", ""]
                got = server.stdout.readline().decode().strip() if session.process.returncode == 0 else err.decode()
                display, _, authority = lines[0].partition(" ")
        finally:
            server.kill()
    seen.check_true("DISPLAY", "localhost:N.0", bool(re.fullmatch(r"localhost:\d+\.0", display)), display or "not set")
    seen.check_true(
        "XAUTHORITY", "a file with the job's cookie", lines[1] == f"['{cookie}']", f"{authority} {lines[1]}"
    )
    seen.check_true("display", "reached", got == token, got)
    seen.record(lab.pam_records(tail))
    return seen.outcome(f"job {job} has {display}, which leads to localhost:{DISPLAY_NUMBER} of the login node")


def _quoted(script: str) -> str:
    return script.replace("'", "'\\''")


def namespace_join(lab: Lab) -> Outcome:
    """Every job has a /tmp of its own (job_container/tmpfs): alice's sessions see the /tmp of the job they are in."""
    seen, slurm = Findings(), slurm_of(lab)
    lab.pam("action_unknown=deny")
    tail = lab.second.syslog()
    file = f"/tmp/adoptd-{secrets.token_hex(4)}"
    with lab.jobs(2) as jobs:
        for job in jobs:
            write = ["srun", f"--jobid={job}", "--overlap", "-N1", "-w", slurm.name_of(lab.second), "sh", "-c"]
            slurm.run([*write, f"echo {job} > {file}"], user=ALICE, node=lab.first)
        for job in jobs:
            login = lab.start_login(job=job, command=f"cat {file}; readlink /proc/self/ns/mnt; ls -A /tmp | wc -l")
            out, err = login.process.communicate(timeout=LOGIN_TIMEOUT_S)
            lines = out.decode().split("\n")
            seen.check(
                f"{file} in a session in {job}", f"job {job}'s", f"job {lines[0]}'s" if lines[0] else err.decode()
            )
        seen.check("on the node itself", "not there", "there" if lab.second.path(file).exists() else "not there")
        lab.pam("action_unknown=deny join_container=false")
        login = lab.start_login(job=jobs[0], command=f"cat {file} 2>/dev/null || echo not there; true")
        out, _ = login.process.communicate(timeout=LOGIN_TIMEOUT_S)
        seen.check("with join_container=false", "not there", out.decode().strip())
    seen.record(lab.pam_records(tail))
    return seen.outcome("the agent hands the job's mount namespace to sshd's PAM, which enters it")


def memory_limit_applies(lab: Lab) -> Outcome:
    """alice's job has a memory limit, and so has her session: a program that exceeds it is killed, the node is not."""
    seen, slurm = Findings(), slurm_of(lab)
    lab.pam("action_unknown=deny")
    tail = lab.second.syslog()
    with _job_with(lab, f"--mem={JOB_MEMORY_MB}") as job:
        session = lab.start_login(command=f"{GREEDY}; echo $?")
        out, err = session.process.communicate(timeout=LOGIN_TIMEOUT_S)
        got = out.decode().strip()
        seen.check(
            f"{4 * JOB_MEMORY_MB} MB in a job of {JOB_MEMORY_MB}",
            f"exit {KILLED}",
            f"exit {got}" if got else err.decode(),
        )
        seen.check("the next login", f"job {job} on node2", lab.login().landed)
        up = slurm.run(["sinfo", "-h", "-N", "-n", slurm.name_of(lab.second), "-o", "%T"]).strip()
        seen.check_true("node", "up", up in ("mixed", "allocated", "idle"), up)
    seen.record(lab.pam_records(tail))
    return seen.outcome("the kernel killed it in the memory cgroup of the job's extern step")


@contextlib.contextmanager
def _job_with(lab: Lab, *options: str) -> Iterator[str]:
    slurm = slurm_of(lab)
    job = slurm.allocate(ALICE, [lab.second], *options)
    try:
        slurm.wait_started(job, ALICE, [lab.second])
        yield job
    finally:
        lab.kind.end([job], ALICE, [lab.second])


SLURM_SESSION_SCENARIOS = (
    extern_step,
    scancel_kills_session,
    x11_display,
    namespace_join,
    memory_limit_applies,
)
