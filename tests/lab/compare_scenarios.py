"""The logins that both modules are tried with. Each is one situation of a site's life, with that site's options.

A scenario sets its situation up, has the stage try logins under both modules, and leaves the nodes as it found them.
``differs`` gives the reason wherever the two need not be equal; everything else has to be.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from pathlib import Path
from typing import Callable, Iterator, Mapping, Sequence, Tuple

from lab.compare_sides import Stage
from lab.etc_files import ALICE, BOB, ROOT
from lab.lab import LOGIN_TIMEOUT_S, NOBODY_IN, Login
from lab.node import Node
from lab.scenarios_journey import ANSWERS
from lab.scenarios_slurm import SESSION_END_S, staying_session, x11_job
from lab.scenarios_slurm_asking import FALLBACK, ssh_in_salloc
from lab.slurm_daemons import SPOOL_DIR
from lab.waiting import has_ended, until

SLURMD_PORT = 6818
# slurmd's and the agent's, and what lies between: all that either of the two would ask.
ASKED_PORTS = f"{SLURMD_PORT}-6830"
# pam_slurm_adopt tells jobs' ages by whole seconds.
JOBS_APART_S = 1.1
# Of what takes seconds.
SLOW_ROUNDS = 2
IN_A, IN_B, NOT_IN = "job A on node2", "job B on node2", "no job on node2"
# The default, which the lab's agents are otherwise more patient than.
CALLERID_DEFAULT = "[callerid]\ntimeout_ms = 300\n"
FREEZER = "/sys/fs/cgroup/freezer"
MANY = 20

HINT = "the login node's agent reads the job from the environment of the ssh client ([callerid] hint)"
WITNESS = "the source is asked over IPv6 as over IPv4"
WHOLE_WORDS = "a word that is no value of its option closes the line to all but root"
READ_BACK = "pam_adopt.so's agent reads back where the process is, whatever the step said of it"
NO_SPOOL = 'a spool directory that is not there is a generic failure, not "no jobs"'
ROOT_ASKED = "with ignore_root=0 root is a user like any other, to be refused where it has no job"
AGENT = "the node's own agent is what pam_adopt.so asks: action_generic_failure"


@contextlib.contextmanager
def _two_jobs(stage: Stage, *, on_both: bool) -> Iterator[Tuple[str, str]]:
    nodes = [stage.lab.first, stage.lab.second] if on_both else [stage.lab.second]
    with stage.lab.jobs(1, on=nodes) as (older,):
        time.sleep(JOBS_APART_S)
        with stage.lab.jobs(1, on=nodes) as (newer,):
            yield older, newer


def _from_login_node(stage: Stage) -> Login:
    return stage.lab.login(source=stage.slurm.login)


def _login_from_login_node(stage: Stage) -> Callable[[], Login]:
    return lambda: _from_login_node(stage)


def no_job(stage: Stage) -> None:
    """alice has no job on the node."""
    stage.compare("action_no_jobs by default", NOBODY_IN, lambda: _from_login_node(stage))
    for value, expected in (("deny", NOBODY_IN), ("ignore", NOT_IN)):
        options = f"action_no_jobs={value}"
        stage.compare(options, expected, lambda: _from_login_node(stage), options=options)


def one_job(stage: Stage) -> None:
    """alice has one job on the node: nobody need be asked which."""
    with stage.lab.jobs(1, on=[stage.lab.second]) as jobs:
        for options in ("", "single_job_skip_rpc=0", "service=*", "log_level=debug3", "log_level=7"):
            what = options or "default options"
            stage.compare(what, IN_A, lambda: _from_login_node(stage), options=options, jobs=jobs)


def spellings(stage: Stage) -> None:
    """One job, and options written as pam_slurm_adopt also takes them."""
    with stage.lab.jobs(1, on=[stage.lab.second]) as jobs:
        for options in (
            "Action_No_Jobs=Deny ACTION_UNKNOWN=NEWEST",
            "Log_Level=DEBUG",
            "log_level=0x3",
            "log_level=99",
            "ignore_root=1 single_job_skip_rpc=1 disable_x11=0 join_container=true",
        ):
            stage.compare(options, IN_A, lambda: _from_login_node(stage), options=options, jobs=jobs)


def two_jobs_inside(stage: Stage) -> None:
    """alice has two jobs on both nodes and logs in from inside either: the source says which."""
    with _two_jobs(stage, on_both=True) as jobs:
        for job, expected in zip(jobs, (IN_A, IN_B)):
            stage.compare(
                f"from {'AB'[jobs.index(job)]}, action_unknown=deny",
                expected,
                _from_inside(stage, jobs, jobs.index(job)),
                options="action_unknown=deny",
                jobs=jobs,
            )


def two_jobs_login_node(stage: Stage) -> None:
    """alice has two jobs on the node and logs in from the login node, out of no job."""
    with _two_jobs(stage, on_both=False) as jobs:
        for value, expected in (("newest", IN_B), ("allow", NOT_IN), ("deny", NOBODY_IN)):
            options = f"action_unknown={value}"
            stage.compare(options, expected, lambda: _from_login_node(stage), options=options, jobs=jobs)
        stage.compare("action_unknown by default", IN_B, lambda: _from_login_node(stage), jobs=jobs)


def root(stage: Stage) -> None:
    """root logs in: passes, and is put nowhere."""
    for options in ("", "action_no_jobs=deny action_generic_failure=deny"):
        login = _login_of_root(stage)
        stage.compare(options or "default options", NOT_IN, login, options=options)
    login = _login_of_root(stage)
    stage.compare("ignore_root=0", NOBODY_IN, login, options="ignore_root=0", differs=ROOT_ASKED)


def _login_of_root(stage: Stage) -> Callable[[], Login]:
    return lambda: stage.lab.login(source=stage.slurm.login, user=ROOT)


def other_users_job(stage: Stage) -> None:
    """Only alice has a job on the node, and bob logs in."""
    with stage.lab.jobs(1, on=[stage.lab.second]) as jobs:
        stage.compare("bob", NOBODY_IN, lambda: stage.lab.login(source=stage.slurm.login, user=BOB), jobs=jobs)


@contextlib.contextmanager
def _no_slurmd(stage: Stage, node: Node) -> Iterator[None]:
    node.stop("slurmd")
    try:
        yield
    finally:
        stage.slurm.start_slurmd(node)
        until(lambda: _listens(node, SLURMD_PORT), f"{node.name}: slurmd's port")


def _listens(node: Node, port: int) -> bool:
    rows = Path(f"/proc/{node.runner_pid}/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    # proc(5), net/tcp: local address is the second column, state the fourth, 0A is LISTEN.
    return any(row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "0A" for row in rows)


def source_stopped(stage: Stage) -> None:
    """Two jobs, and on the node alice comes from neither slurmd nor the agent runs."""
    lab = stage.lab
    with _two_jobs(stage, on_both=True) as jobs, _no_slurmd(stage, lab.first), lab.agent_down(lab.first):
        for options, expected in (("", IN_B), ("action_unknown=deny", NOBODY_IN)):
            what = f"from A, {options or 'default options'}"
            stage.compare(what, expected, lambda: lab.login(job=jobs[0]), options=options, jobs=jobs)


def source_drops(stage: Stage) -> None:
    """Two jobs, and the node alice comes from drops all packets to slurmd and to the agent."""
    lab = stage.lab
    default = lab.agent_settings(lab.second, CALLERID_DEFAULT)
    with default, _two_jobs(stage, on_both=True) as jobs, lab.packets_dropped(lab.first, ASKED_PORTS):
        stage.compare("from A, default options", IN_B, _from_inside(stage, jobs, 0), jobs=jobs, rounds=SLOW_ROUNDS)


def source_not_migrated(stage: Stage) -> None:
    """Two jobs, and the node alice comes from has slurmd and no agent yet: [callerid] fallback = "slurm"."""
    lab = stage.lab
    with _two_jobs(stage, on_both=True) as jobs, lab.agent_down(lab.first), lab.agent_settings(lab.second, FALLBACK):
        for index, expected in enumerate((IN_A, IN_B)):
            what = f"from {'AB'[index]}, action_unknown=deny"
            login = _from_inside(stage, jobs, index)
            stage.compare(what, expected, login, options="action_unknown=deny", jobs=jobs)


def node_itself(stage: Stage) -> None:
    """One job, and a daemon of the node that is logged in to is stopped."""
    lab = stage.lab
    with lab.jobs(1, on=[lab.second]) as jobs:
        with _no_slurmd(stage, lab.second):
            stage.compare("its slurmd", IN_A, lambda: _from_login_node(stage), jobs=jobs)
        with lab.agent_down(lab.second):
            for options, expected in (("", NOT_IN), ("action_generic_failure=deny", NOBODY_IN)):
                what = f"its agent, {options or 'default options'}"
                stage.compare(
                    what, expected, lambda: _from_login_node(stage), options=options, jobs=jobs, differs=AGENT
                )


def generic_failure(stage: Stage) -> None:
    """The jobs cannot be looked up: slurmd's spool directory is not there."""
    lab = stage.lab
    with lab.jobs(1, on=[lab.second]) as jobs:
        lab.second.run(["mv", SPOOL_DIR, f"{SPOOL_DIR}.away"])
        try:
            for value, expected in (("ignore", NOT_IN), ("allow", NOT_IN), ("deny", NOBODY_IN)):
                options = f"action_generic_failure={value}"
                login = _login_from_login_node(stage)
                stage.compare(options, expected, login, options=options, jobs=jobs, differs=NO_SPOOL)
        finally:
            lab.second.run(["mv", f"{SPOOL_DIR}.away", SPOOL_DIR])


@contextlib.contextmanager
def _refusing(stage: Stage, job: str) -> Iterator[None]:
    """The job's extern step takes no process: the file it would be written to is read-only for slurmstepd."""
    node = stage.lab.second
    inside = f"slurm_{stage.slurm.name_of(node)}/uid_{ALICE.uid}/job_{job}/step_extern/cgroup.procs"
    file = f"{FREEZER}/{inside}"
    node.run(["mount", "--bind", file, file])
    try:
        node.run(["mount", "-o", "remount,bind,ro", file])
        yield
    finally:
        node.run(["umount", file])


def adopt_failure(stage: Stage) -> None:
    """alice's job cannot take another process, and its step does not say so."""
    with stage.lab.jobs(1, on=[stage.lab.second]) as jobs, _refusing(stage, jobs[0]):
        for value, expected in (("allow", NOT_IN), ("deny", NOBODY_IN)):
            options = f"action_adopt_failure={value}"
            login = _login_from_login_node(stage)
            stage.compare(options, expected, login, options=options, jobs=jobs, differs=READ_BACK, rounds=SLOW_ROUNDS)


def _ended_by(stage: Stage, end: Callable[[str], object], script: str) -> Login:
    """A session in a job that ``end`` brings to its end: where it was, and whether it ended too."""
    lab, slurm = stage.lab, stage.slurm
    job = slurm.submit(ALICE, [lab.second], script=script)
    try:
        slurm.wait_started(job, ALICE, [lab.second])
        with staying_session(lab) as (session, pid):
            end(job)
            ended = has_ended(pid, SESSION_END_S)
            if not ended:
                session.process.kill()
            done = session.end()
    finally:
        slurm.cancel(job)
        slurm.wait_gone(job, [lab.second])
    landed = done.landed.replace(f"job {job}", "its job")
    return Login(f"{landed}, {'ended with it' if ended else 'still there'}", done.errors, done.seconds)


def job_ends(stage: Stage) -> None:
    """The job comes to its end, or is cancelled, while alice is logged in: her session ends with it."""
    expected = "its job on node2, ended with it"
    flag = stage.lab.second.path(f"{ALICE.home}/ended-{secrets.token_hex(4)}")
    script = f"until [ -e {ALICE.home}/{flag.name} ]; do sleep 0.1; done"
    try:
        for what, login in (
            ("ends", lambda: _ended_by(stage, lambda _: flag.touch(), _again(flag, script))),
            ("is cancelled", lambda: _ended_by(stage, stage.slurm.cancel, "exec sleep 1000")),
        ):
            stage.compare(what, expected, login, rounds=SLOW_ROUNDS)
    finally:
        flag.unlink(missing_ok=True)


def _again(flag: Path, script: str) -> str:
    flag.unlink(missing_ok=True)
    return script


def salloc_shell(stage: Stage) -> None:
    """alice types ssh in the shell that salloc gave her on the login node; she has another job besides."""

    def in_salloc() -> Login:
        started = time.monotonic()
        job, landed = ssh_in_salloc(stage.lab)
        seconds = time.monotonic() - started
        if "closed by" in landed:
            return Login(NOBODY_IN, landed, seconds)
        return Login(landed.replace(f"job {job}", "that job"), "", seconds)

    lab, that = stage.lab, "that job on node2"
    with lab.jobs(1, on=[lab.second]):
        time.sleep(JOBS_APART_S)
        stage.compare("its job is the newest", that, in_salloc)
        stage.compare("action_unknown=deny", that, in_salloc, options="action_unknown=deny", differs=HINT)
    with _two_jobs(stage, on_both=False) as jobs:
        shell = {"SLURM_JOB_ID": jobs[0]}
        login = _with_environment(stage, shell)
        stage.compare("its job is the older, A", IN_A, login, jobs=jobs, differs=HINT)


def _with_environment(stage: Stage, shell: Mapping[str, str]) -> Callable[[], Login]:
    return lambda: stage.lab.login(source=stage.slurm.login, env=shell)


def ipv6(stage: Stage) -> None:
    """Two jobs, and alice logs in over IPv6 from inside the older."""
    lab = stage.lab
    with _two_jobs(stage, on_both=True) as jobs:
        login = _over_ipv6(stage, jobs[0])
        stage.compare("from A, default options", IN_A, login, jobs=jobs, differs=WITNESS)
    with lab.jobs(1, on=[lab.second]) as jobs_of_one:
        stage.compare("one job", IN_A, lambda: lab.login(to=lab.second.ipv6), jobs=jobs_of_one)


def _over_ipv6(stage: Stage, job: str) -> Callable[[], Login]:
    return lambda: stage.lab.login(job=job, to=stage.lab.second.ipv6)


def wrong_nodename(stage: Stage) -> None:
    """nodename= names a node that Slurm does not know."""
    with stage.lab.jobs(1, on=[stage.lab.second]) as jobs:
        for more, expected in (("", NOBODY_IN), (" action_no_jobs=ignore", NOT_IN)):
            options = f"nodename=nosuchnode{more}"
            stage.compare(options, expected, lambda: _from_login_node(stage), options=options, jobs=jobs)


def bad_value(stage: Stage) -> None:
    """An option has a value that it does not have."""
    options = "action_no_jobs=perhaps"
    with stage.lab.jobs(1, on=[stage.lab.second]) as jobs:
        stage.compare(
            f"alice, {options}",
            NOBODY_IN,
            lambda: _from_login_node(stage),
            options=options,
            jobs=jobs,
            differs=WHOLE_WORDS,
        )
    stage.compare(f"root, {options}", NOT_IN, _login_of_root(stage), options=options)


def other_service(stage: Stage) -> None:
    """The line is for another PAM service."""
    with stage.lab.jobs(1, on=[stage.lab.second]) as jobs:
        options = "service=login"
        stage.compare(options, NOT_IN, lambda: _from_login_node(stage), options=options, jobs=jobs)


def keyboard_interactive(stage: Stage) -> None:
    """alice types a password: sshd runs the account phase in a child that ends, and the session in another process."""
    env = {"SSH_ASKPASS": "/run/askpass", "SSH_ASKPASS_REQUIRE": "force", "ADOPTD_ANSWER": ALICE.password}
    with stage.lab.jobs(1, on=[stage.lab.second]) as jobs:
        stage.compare(
            "with the account line alone",
            NOT_IN,
            lambda: stage.lab.login(source=stage.slurm.login, options=ANSWERS, env=env),
            jobs=jobs,
        )


def _display(stage: Stage) -> Login:
    """What a session has of a job's X11: its DISPLAY, whatever its number, beside the job's id."""
    out, errors, seconds = _output(stage, "printenv DISPLAY || echo not set; printenv SLURM_JOB_ID || echo not set")
    display, job = [*out.split("\n"), "", ""][:2]
    shown = re.sub(r"localhost:\d+\.0", "localhost:N.0", display)
    return Login(f"DISPLAY {shown}, SLURM_JOB_ID of job {job}", errors, seconds)


def _output(stage: Stage, command: str) -> Tuple[str, str, float]:
    """What a session of alice's prints, what the client says, and the seconds it all took."""
    started = time.monotonic()
    session = stage.lab.start_login(command=command)
    with session.process:
        out, err = session.process.communicate(timeout=LOGIN_TIMEOUT_S)
    return out.decode(errors="replace").strip(), err.decode(errors="replace"), time.monotonic() - started


def x11(stage: Stage) -> None:
    """alice's job has X11 forwarding."""
    with x11_job(stage.lab, secrets.token_hex(16)) as job:
        expected = "DISPLAY localhost:N.0, SLURM_JOB_ID of job A"
        stage.compare("default options", expected, lambda: _display(stage), jobs=(job,))
        expected = "DISPLAY not set, SLURM_JOB_ID of job A"
        stage.compare("disable_x11=1", expected, lambda: _display(stage), options="disable_x11=1", jobs=(job,))


def private_tmp(stage: Stage) -> None:
    """alice's job has a /tmp of its own (job_container/tmpfs), with a file in it."""
    lab, slurm = stage.lab, stage.slurm
    file = f"/tmp/adoptd-{secrets.token_hex(4)}"

    def look() -> Login:
        return Login(*_output(stage, f"cat {file} 2>/dev/null || echo the /tmp of the node"))

    with lab.jobs(1, on=[lab.second]) as (job,):
        where = ["srun", f"--jobid={job}", "--overlap", "-N1", "-w", slurm.name_of(lab.second)]
        slurm.run([*where, "sh", "-c", f"echo the /tmp of the job > {file}"], user=ALICE)
        stage.compare("default options", "the /tmp of the job", look)
        stage.compare("join_container=false", "the /tmp of the node", look, options="join_container=false")


def twenty_jobs(stage: Stage) -> None:
    """alice has twenty jobs on both nodes and logs in from inside some of them."""
    with stage.lab.jobs(MANY) as jobs:
        for index in (0, MANY - 1):
            letter = chr(ord("A") + index)
            stage.compare(
                f"from {letter}, action_unknown=deny",
                f"job {letter} on node2",
                _from_inside(stage, jobs, index),
                options="action_unknown=deny",
                jobs=jobs,
            )


def _from_inside(stage: Stage, jobs: Sequence[str], index: int) -> Callable[[], Login]:
    return lambda: stage.lab.login(job=jobs[index])


COMPARISONS: Mapping[str, Callable[[Stage], None]] = {
    function.__name__: function
    for function in (
        no_job,
        one_job,
        spellings,
        two_jobs_inside,
        two_jobs_login_node,
        root,
        other_users_job,
        source_stopped,
        source_drops,
        source_not_migrated,
        node_itself,
        generic_failure,
        adopt_failure,
        job_ends,
        salloc_shell,
        ipv6,
        wrong_nodename,
        bad_value,
        other_service,
        keyboard_interactive,
        x11,
        private_tmp,
        twenty_jobs,
    )
}


def claim_of(name: str) -> str:
    """What a scenario is about, in one sentence."""
    return " ".join((COMPARISONS[name].__doc__ or "").split())
