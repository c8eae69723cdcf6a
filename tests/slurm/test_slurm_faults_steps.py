"""Steps and slurmd that are not as they should be, on a real cluster: where logins land, what is counted and logged."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Iterator, List, Optional, Tuple

import pytest

from lab.etc_files import ALICE, BOB
from lab.lab import NOBODY_IN, Lab
from lab.slurm_daemons import SPOOL_DIR
from lab.waiting import until
from slurm.faults import (
    ADOPT_FAILURE,
    GENERIC,
    NO_JOBS,
    Watch,
    check,
    restart_agent,
    slurm_of,
    step_socket,
    stopped,
    unknown,
)
from slurmstepd_double import BY_NAME, RELEASES, Fault, Release, Step, stale_socket

pytestmark = pytest.mark.timeout(240)

# What anybody can run: a listener that talks to whoever connects.
LISTEN = """
import contextlib, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(8)
print("up", flush=True)
while True:
    connection, heard = listener.accept()[0], b""
    with contextlib.suppress(OSError):
        connection.sendall(b"x" * 64)
    with contextlib.suppress(OSError):
        heard = connection.recv(64)
    print("heard", len(heard), flush=True)
    connection.close()
"""
ADD_EXTERN_PID = 22
# Beyond any that Slurm gives here.
STRANGE_JOB = 900001


def test_slurmd_stopped_and_started_again(faults_lab: Lab) -> None:
    """Steps outlive their slurmd: logins go on as before, in and out of jobs, and the agent says once what is wrong."""
    lab, slurm = faults_lab, slurm_of(faults_lab)
    lab.pam("action_unknown=deny action_generic_failure=deny")
    with lab.jobs(2) as jobs:
        assert lab.login(job=jobs[0]).landed == f"job {jobs[0]} on node2"
        watch = Watch(lab.second)
        lab.second.kill("slurmd")
        try:
            for job in jobs:
                assert lab.login(job=job).landed == f"job {job} on node2"
            watch.counts("adoptd_job_faults_total", 1, stage="worked_around", fault="manager_stopped")
            watch.logs(r"warning job_fault fault=manager_stopped .*slurmd, process \d+, is not running any more")
        finally:
            slurm.start_slurmd(lab.second)
            slurm.wait_up()
        slurm.wait(lambda: lab.login(job=jobs[0]).landed == f"job {jobs[0]} on node2", "a login with slurmd back")
        assert lab.login(user=BOB).landed == NOBODY_IN


def test_slurmd_restarted_with_another_spool_directory(faults_lab: Lab) -> None:
    """slurm.conf names another: the steps of before are where they were, those to come are in the new one."""
    lab, slurm = faults_lab, slurm_of(faults_lab)
    other, include = "/var/lib/slurm/other", "/etc/slurm/paths.conf"
    before = lab.second.path(include).read_text()
    lab.pam("action_no_jobs=deny action_generic_failure=deny action_adopt_failure=deny")
    lab.second.path(other).mkdir()
    lab.second.path(other).chmod(0o755)
    watch = Watch(lab.second)
    try:
        with lab.jobs(1, on=[lab.second]) as (job,):
            assert lab.login().landed == f"job {job} on node2"
            lab.second.write(include, before.replace(f"SlurmdSpoolDir={SPOOL_DIR}", f"SlurmdSpoolDir={other}"))
            assert lab.login().landed == f"job {job} on node2"
            watch.counts("adoptd_job_faults_total", 1, stage="worked_around", fault="configuration")
            watch.logs(
                f"warning job_fault fault=configuration .*names the spool directory {other}, which has no job steps"
            )
        slurm.wait_idle()
        lab.second.kill("slurmd")
        slurm.start_slurmd(lab.second)
        slurm.wait_up()
        (new,) = slurm_job(lab)
        try:
            socket_name = step_socket(lab, new).replace(SPOOL_DIR, other)
            slurm.wait(lab.second.path(socket_name).exists, "a step in the new directory")
            slurm.wait(lambda: lab.login().landed == f"job {new} on node2", "a login into the new step's job")
        finally:
            slurm.cancel(new)
            slurm.wait(lambda: not list(lab.second.path(other).glob(f"*_{new}.*")), "the job's end")
    finally:
        lab.second.write(include, before)
        slurm.wait_idle()
        lab.second.kill("slurmd")
        slurm.start_slurmd(lab.second)
        slurm.wait_up()


def slurm_job(lab: Lab) -> Tuple[str]:
    """A job of alice's on the second node, which may not have started."""
    return (slurm_of(lab).allocate(ALICE, [lab.second]),)


def test_a_step_that_was_killed(faults_lab: Lab) -> None:
    """slurmstepd killed: its socket stays, and it is no job. Said once, not ours to remove."""
    lab, slurm = faults_lab, slurm_of(faults_lab)
    with lab.jobs(1, on=[lab.second]) as (job,):
        left = lab.second.path(step_socket(lab, job))
        try:
            watch = Watch(lab.second)
            os.kill(slurm.extern_daemon(lab.second, job), signal.SIGKILL)
            until(lambda: _refuses(left), "the socket to be nobody's")
            check(lab, NO_JOBS, log="reason=no_jobs")
            watch.counts("adoptd_job_faults_total", 1, stage="worked_around", fault="stale_socket")
            watch.logs(f"warning job_fault fault=stale_socket .*nobody listens on 1 step sockets .*_{job}")
            assert left.exists()
        finally:
            # Slurm leaves it where it is.
            left.unlink()


def _refuses(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return True
        return False


def test_two_hundred_sockets_left_behind(faults_lab: Lab) -> None:
    """They cost no login its job, and one line in the log."""
    lab, slurm = faults_lab, slurm_of(faults_lab)
    lab.pam("action_generic_failure=deny action_no_jobs=deny")
    name, spool = slurm.name_of(lab.second), lab.second.path(SPOOL_DIR)
    left: List[Path] = []
    try:
        left += [stale_socket(spool, f"{name}_{STRANGE_JOB + number}.4294967292") for number in range(200)]
        with lab.jobs(1, on=[lab.second]) as (job,):
            watch = Watch(lab.second)
            for _ in range(2):
                assert lab.login().landed == f"job {job} on node2"
            watch.counts("adoptd_job_faults_total", 200, stage="worked_around", fault="stale_socket")
            lines = [line for line in watch.text().splitlines() if "nobody listens" in line]
            assert len(lines) == 1
            assert "on 200 step sockets" in lines[0]
            assert "and 195 more" in lines[0]
        assert all(path.exists() for path in left)
    finally:
        for path in left:
            path.unlink()


def test_the_only_job_s_step_hangs(faults_lab: Lab) -> None:
    """It was heard before, so it is known to be alice's: an adoption that fails. bob does not notice."""
    lab, slurm = faults_lab, slurm_of(faults_lab)
    with lab.jobs(1, on=[lab.second]) as (job,), lab.jobs(1, user=BOB, on=[lab.second]) as (bobs,):
        lab.pam("")
        assert lab.login().landed == f"job {job} on node2"
        with stopped(slurm.extern_daemon(lab.second, job)):
            check(
                lab,
                ADOPT_FAILURE,
                fault=("adopt", "step_silent"),
                log=f"adoption .*faults=step_silent .*job {job} of uid {ALICE.uid}: step .*no answer in time",
            )
            assert lab.login(user=BOB).landed == f"job {bobs} on node2"
        lab.pam("action_adopt_failure=deny")
        assert lab.login().landed == f"job {job} on node2"


def test_a_step_that_hangs_and_was_never_heard(faults_lab: Lab) -> None:
    """After the agent's restart nobody knows whose it is but by its cgroup: the jobs cannot be told. bob's can."""
    lab, slurm = faults_lab, slurm_of(faults_lab)
    with lab.jobs(1, on=[lab.second]) as (job,), lab.jobs(1, user=BOB, on=[lab.second]) as (bobs,):
        with stopped(slurm.extern_daemon(lab.second, job)):
            restart_agent(lab.second)
            check(
                lab,
                GENERIC,
                fault=("jobs_here", "step_silent"),
                log=f"adoption .*faults=step_silent .*jobs_here: cannot be asked: step .*_{job}.* no answer in time",
            )
            assert lab.login(user=BOB).landed == f"job {bobs} on node2"
        lab.pam("action_generic_failure=deny")
        assert lab.login().landed == f"job {job} on node2"


def test_one_of_several_hangs(faults_lab: Lab) -> None:
    """Logins into the sound one do not notice; into the hanging one, action_unknown. Within the module's own second."""
    lab, slurm = faults_lab, slurm_of(faults_lab)
    budget = "timeout_ms=1000 action_adopt_failure=deny"
    with lab.jobs(2) as (hanging, sound):
        lab.pam("action_unknown=deny")
        for job in (hanging, sound):
            assert lab.login(job=job).landed == f"job {job} on node2"
        with stopped(slurm.extern_daemon(lab.second, hanging)):
            lab.pam(f"action_unknown=deny {budget}")
            watch = Watch(lab.second)
            for _ in range(3):
                assert lab.login(job=sound).landed == f"job {sound} on node2"
            watch.counts("adoptd_job_faults_total", at_least=3, stage="worked_around", fault="step_silent")
            watch.logs(
                f"warning job_fault fault=step_silent .*_{hanging}.*: no answer in time; its job is still counted"
            )
            check(
                lab,
                unknown(sound, "named_failed"),
                fault=("adopt", "step_silent"),
                log=f"faults=step_silent .*job {hanging} failed: .*no answer in time",
                options=budget,
                login=lambda: lab.login(job=hanging).landed,
            )
        lab.pam(f"action_unknown=deny {budget}")
        assert lab.login(job=hanging).landed == f"job {hanging} on node2"


@contextlib.contextmanager
def _broken_spool(lab: Lab, how: str) -> Iterator[None]:
    spool = lab.second.path(SPOOL_DIR)
    aside = spool.with_name("aside")
    mode = spool.stat().st_mode & 0o7777
    users = lab.second.path("/var/lib/slurm/users")
    try:
        if how == "of_alice":
            os.chown(spool, ALICE.uid, ALICE.uid)
        elif how == "open_to_all":
            spool.chmod(0o777)
        else:
            spool.rename(aside)
            if how == "a_file":
                spool.touch()
            elif how == "a_link_to_a_users":
                users.mkdir()
                os.chown(users, ALICE.uid, ALICE.uid)
                spool.symlink_to("users")
        yield
    finally:
        if aside.exists():
            if spool.is_symlink() or spool.is_file():
                spool.unlink()
            elif spool.exists():
                # slurmd makes it anew when it needs it.
                for each in spool.iterdir():
                    each.unlink()
                spool.rmdir()
            aside.rename(spool)
        if users.exists():
            users.rmdir()
        os.chown(spool, 0, 0)
        spool.chmod(mode)


@pytest.mark.parametrize(
    ("how", "fault", "words"),
    [
        ("gone", "spool_unreadable", "slurmd: No such file"),
        ("a_file", "spool_unreadable", "slurmd: Not a directory"),
        ("of_alice", "spool_untrusted", f"belongs to uid {ALICE.uid}"),
        ("open_to_all", "spool_untrusted", "others can write to"),
        ("a_link_to_a_users", "spool_untrusted", f"users belongs to uid {ALICE.uid}"),
    ],
)
def test_the_spool_directory(faults_lab: Lab, how: str, fault: str, words: str) -> None:
    """Gone, or such that others could put sockets there: the jobs cannot be told, and that is not "no jobs"."""
    lab = faults_lab
    with lab.jobs(1, on=[lab.second]) as (job,):
        with _broken_spool(lab, how):
            check(lab, GENERIC, fault=("jobs_here", fault), log=f"faults={fault} .*spool directory .*{words}")
        lab.pam("action_generic_failure=deny")
        assert lab.login().landed == f"job {job} on node2"


@pytest.mark.parametrize("how", ["socket_of_alice", "listener_is_alice"])
def test_a_socket_that_is_not_slurm_s(faults_lab: Lab, how: str) -> None:
    """Whoever got one there, by its owner or by who listens: alice gets no job of it."""
    lab, slurm = faults_lab, slurm_of(faults_lab)
    path = lab.second.path(f"{SPOOL_DIR}/{slurm.name_of(lab.second)}_{STRANGE_JOB}.4294967292")
    # On the one file system, so that it can be linked into the spool directory.
    directory = lab.second.path("/var/lib/slurm/alice")
    directory.mkdir()
    os.chown(directory, ALICE.uid, ALICE.gid)
    made = "/var/lib/slurm/alice/sock"
    with lab.second.popen(["/usr/bin/python3", "-c", LISTEN, made], user=ALICE) as listener:
        try:
            assert listener.stdout is not None
            assert listener.stdout.readline() == b"up\n"
            denied = lab.second.popen(["/usr/bin/python3", "-c", LISTEN, f"{SPOOL_DIR}/{path.name}"], user=ALICE)
            assert b"PermissionError" in denied.communicate()[1]
            os.link(lab.second.path(made), path)
            os.chown(path, *((ALICE.uid, ALICE.gid) if how == "socket_of_alice" else (0, 0)))
            watch = Watch(lab.second)
            check(lab, NO_JOBS, fault=("worked_around", "foreign_socket"), log="reason=no_jobs")
            words = "not a socket of root's" if how == "socket_of_alice" else f"listened on by uid {ALICE.uid}"
            watch.logs(f"warning job_fault fault=foreign_socket .*{STRANGE_JOB}.*{words}.*ignored")
            listener.kill()
            # Who listens is known before anything is said to it.
            heard = listener.stdout.read().splitlines()
            assert set(heard) == ({b"heard 0"} if how == "listener_is_alice" else set())
        finally:
            listener.kill()
            path.unlink(missing_ok=True)
            lab.second.path(made).unlink(missing_ok=True)
            directory.rmdir()


@contextlib.contextmanager
def _double(
    lab: Lab, fault: Optional[Fault], release: Release = BY_NAME["22.05"], cgroups: bool = True
) -> Iterator[Step]:
    """A double's step on the second node, with cgroups that the real kernel has, which moves nothing by itself."""
    slurm = slurm_of(lab)
    place = slurm.extern(lab.second, ALICE, str(STRANGE_JOB))
    directories = place.directories() if cgroups else ()
    for directory in directories:
        directory.mkdir(parents=True)
    try:
        step = Step(
            lab.second.path(SPOOL_DIR),
            STRANGE_JOB,
            ALICE.uid,
            node=slurm.name_of(lab.second),
            release=release,
            fault=fault,
        )
        with step:
            yield step
    finally:
        for directory in directories:
            directory.rmdir()
            directory.parent.rmdir()
            with contextlib.suppress(OSError):
                directory.parent.parent.rmdir()


@pytest.mark.parametrize(
    ("fault", "label", "words"),
    [
        (Fault.ADD_FAILS, "step_refuses", "refuses process [0-9]+: error -1"),
        (Fault.ADD_MOVES_NOTHING, "not_moved", "has not moved process"),
        (Fault.HANGS_ON_ADD, "step_silent", "(no answer in time|has not answered the adoption before)"),
    ],
    ids=lambda value: value.name.lower() if isinstance(value, Fault) else "",
)
def test_an_adoption_that_the_step_does_not_do(faults_lab: Lab, fault: Fault, label: str, words: str) -> None:
    """A double, because no real step can be brought to it: it answers -1, or 0 and moves nothing, or never."""
    lab = faults_lab
    with _double(lab, fault):
        check(lab, ADOPT_FAILURE, fault=("adopt", label), log=f"faults={label} .*{words}")


def test_a_step_without_cgroups(faults_lab: Lab) -> None:
    """As with ProctrackType=proctrack/linuxproc: the step would say yes and move nothing, so it is not asked."""
    lab = faults_lab
    with _double(lab, None, cgroups=False) as step:
        check(lab, ADOPT_FAILURE, fault=("adopt", "no_cgroup"), log="faults=no_cgroup .*has no cgroup here: Proctrack")
        assert step.added == []


def test_no_turn_in_time(faults_lab: Lab) -> None:
    """One adoption is under way and takes its time: who has less of it than that is not adopted."""
    lab = faults_lab
    with _double(lab, Fault.HANGS_ON_ADD) as step:
        lab.pam("action_adopt_failure=deny timeout_ms=30000")
        slow = lab.start_login()
        try:
            until(lambda: ADD_EXTERN_PID in step.asked, "the step to be asked")
            check(
                lab,
                ADOPT_FAILURE,
                fault=("adopt", "no_turn"),
                log=f"faults=no_turn .*job {STRANGE_JOB}: no turn in time",
                options="timeout_ms=1000",
            )
        finally:
            step.goes_on.set()
            ended = slow.end()
        assert ended.landed == NOBODY_IN


@pytest.mark.parametrize(
    ("fault", "label", "words"),
    [
        (Fault.REFUSES_VERSION, "step_protocol", "refuses protocol version"),
        (Fault.ODD_STATE, "step_protocol", "step state 9 is not in"),
        (Fault.CLOSES_AT_ONCE, "step_closed", "closed the connection without a reply"),
        (Fault.SHORT_READ, "step_closed", "closed the connection without a reply"),
        (Fault.HANGS, "step_silent", "no answer in time"),
    ],
    ids=lambda value: value.name.lower() if isinstance(value, Fault) else "",
)
def test_a_step_that_cannot_be_told(faults_lab: Lab, fault: Fault, label: str, words: str) -> None:
    """A double, as slurmd upgraded under us to a release that we do not know would have it."""
    lab = faults_lab
    with _double(lab, fault):
        check(lab, GENERIC, fault=("jobs_here", label), log=f"faults={label} .*{STRANGE_JOB}.*{words}")


@pytest.mark.parametrize("release", [each for each in RELEASES if each.name != "22.05"], ids=lambda each: each.name)
def test_steps_of_another_release_beside_our_own(faults_lab: Lab, release: Release) -> None:
    """slurmd was upgraded while the agent ran: steps of both releases are there, and both are heard."""
    lab = faults_lab
    with lab.jobs(1, on=[lab.second]) as (job,):
        with _double(lab, Fault.DRIBBLES, release):
            lab.pam("action_unknown=deny")
            watch = Watch(lab.second)
            assert lab.login().landed == NOBODY_IN
            watch.logs(f"jobs_here: ({STRANGE_JOB}, {job}|{job}, {STRANGE_JOB});")
        assert lab.login().landed == f"job {job} on node2"


@pytest.mark.parametrize("how", ["gone", "garbled", "half", "open_to_all"])
def test_slurm_conf_breaks_while_the_agent_runs(faults_lab: Lab, how: str) -> None:
    """What was read stays in force, as it does in slurmd; said once, and mended without a restart."""
    lab = faults_lab
    file = "/etc/slurm/slurm.conf"
    path = lab.second.path(file)
    text = path.read_text()
    lab.pam("action_no_jobs=deny action_generic_failure=deny action_adopt_failure=deny")
    with lab.jobs(1, on=[lab.second]) as (job,):
        assert lab.login().landed == f"job {job} on node2"
        watch = Watch(lab.second)
        try:
            if how == "gone":
                path.unlink()
            elif how == "open_to_all":
                path.chmod(0o666)
                path.write_text(text + "# touched\n")
            else:
                lab.second.write(file, "\0\1 !! \xff" * 100 if how == "garbled" else text[text.index("include") :])
            for _ in range(2):
                assert lab.login().landed == f"job {job} on node2"
            watch.counts("adoptd_job_faults_total", 1, stage="worked_around", fault="configuration")
            watch.logs(
                "warning job_fault fault=configuration .*cannot be read, the one before stays in force: .*slurm.conf"
            )
        finally:
            lab.second.write(file, text)
        assert lab.login().landed == f"job {job} on node2"


@pytest.mark.parametrize("how", ["gone", "open_to_all"])
def test_slurm_conf_is_bad_when_the_agent_starts(faults_lab: Lab, how: str) -> None:
    """Nothing was ever read, so nothing can stay in force: the jobs cannot be told. Said at the start, and mended."""
    lab = faults_lab
    file = "/etc/slurm/slurm.conf"
    path = lab.second.path(file)
    text = path.read_text()
    with lab.jobs(1, on=[lab.second]) as (job,):
        try:
            # slurmd has read it. With the backend named, the agent does not take the node for one without Slurm.
            with lab.agent_settings(lab.second, '[jobs]\nbackend = "slurm"\n'):
                watch = Watch(lab.second)
                if how == "gone":
                    path.unlink()
                else:
                    path.chmod(0o666)
                restart_agent(lab.second)
                watch.logs("error jobs_unavailable .*effect=action_generic_failure")
                words = "no slurm.conf" if how == "gone" else "everybody can write it"
                check(lab, GENERIC, fault=("jobs_here", "configuration"), log=f"faults=configuration .*{words}")
                lab.second.write(file, text)
                lab.pam("action_generic_failure=deny")
                assert lab.login().landed == f"job {job} on node2"
        finally:
            lab.second.write(file, text)


def test_only_steps_of_another_name(faults_lab: Lab) -> None:
    """Nothing says who we are but the host's name, and the steps here are not of that name: not "no jobs"."""
    lab = faults_lab
    file = "/etc/slurm/nameless.conf"
    slurm, text = slurm_of(faults_lab), faults_lab.second.path("/etc/slurm/slurm.conf").read_text()
    nameless = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("NodeName="))
    with lab.jobs(1, on=[lab.second]):
        lab.second.write(file, nameless)
        lab.second.kill("slurmd")
        try:
            with lab.agent_settings(lab.second, f'[jobs]\nbackend = "slurm"\nslurm_conf = "{file}"\n'):
                check(
                    lab,
                    GENERIC,
                    fault=("jobs_here", "other_node"),
                    log=f"faults=other_node .*job steps of node {slurm.name_of(lab.second)} and none of node2",
                )
        finally:
            slurm.start_slurmd(lab.second)
            slurm.wait_up()
            lab.second.path(file).unlink()
