"""The job environment: whose is not taken and what is not sent, then what a session gets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Dict, Iterator, Mapping, Optional, Tuple

import pytest
from fakes import ALICE, BOB, FakeBackend, job, soon
from hypothesis import given
from hypothesis import strategies as st
from slurm_scene import V1, Scene
from slurm_scene import soon as scene_soon

from adoptd import environment
from adoptd.adoption import Adoptions
from adoptd.deadline import Deadline
from adoptd.environment import ENVIRON_MAX_BYTES, environment_of, uids_of
from adoptd.jobs.cgroup import CgroupJobs
from adoptd.jobs.environment import FORBIDDEN, JobEnvironment, is_forbidden, parse_pattern, processes_below
from adoptd.jobs.template import JobPath
from adoptd.metrics import Metrics
from adoptd.policy import Options
from adoptd.process import ProcessHandle, open_process
from adoptd.sessions import PendingLogins
from adoptd.wire.pam import ENVIRONMENT_MAX_BYTES, Mode, PamRequest, Phase, encode_reply
from adoptd.workers import Workers
from fake_cgroups import V2, FakeHost

JOB = job("17")
OWN = {"SLURM_JOB_ID": "17"}


@contextlib.contextmanager
def process(uid: int = ALICE, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of ``uid``'s with exactly this environment, which has begun to run."""
    argv = ["/usr/bin/python3", "-ISc", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables, user=uid, group=uid
    ) as made:
        assert made.stdout is not None
        made.stdout.readline()
        try:
            yield made
        finally:
            made.kill()


@contextlib.contextmanager
def held(pid: int) -> Iterator[ProcessHandle]:
    with open_process(pid) as handle:
        yield handle


def added(
    backend: FakeBackend, *patterns: str, own: Mapping[str, str] = OWN, deadline: Optional[Deadline] = None
) -> Mapping[str, str]:
    return JobEnvironment(patterns or ("SLURM_*",)).added_to(own, backend, JOB, deadline or soon())


def with_processes(*made: subprocess.Popen[bytes]) -> FakeBackend:
    backend = FakeBackend(JOB)
    backend.of_process.update({each.pid: JOB for each in made})
    return backend


# ---- whose environment is not read


def fake_proc(root: Path, uids: str, environ: bytes) -> str:
    """/proc with one process, ours as far as the kernel is concerned, that says this of itself."""
    directory = root / str(os.getpid())
    directory.mkdir(parents=True)
    (directory / "status").write_text(f"Name:\tx\nUid:\t{uids}\nGid:\t0\t0\t0\t0\n")
    (directory / "environ").write_bytes(environ)
    return str(root)


def read(root: str, uid: int = ALICE) -> Optional[Dict[str, str]]:
    with held(os.getpid()) as handle:
        return environment_of(handle, uid, root)


@pytest.mark.parametrize(
    "uids",
    [
        "1002\t1002\t1002\t1002",
        "1001\t0\t1001\t1001",
        "0\t1001\t1001\t1001",
        "1001\t1001\t0\t1001",
        "1001\t1001\t1001\t0",
        "1001\t1001",
        "",
    ],
)
def test_a_process_of_mixed_or_other_uids_is_not_read(tmp_path: Path, uids: str) -> None:
    """Real, effective, saved and file-system uid: a setuid program's environment is not its owner's."""
    assert read(fake_proc(tmp_path, uids, b"A=1\0")) is None


def test_an_environment_larger_than_any_is_not_read(tmp_path: Path) -> None:
    """Whole or not at all."""
    assert read(fake_proc(tmp_path, "1001\t1001\t1001\t1001", b"A=" + b"x" * ENVIRON_MAX_BYTES + b"\0")) is None


def test_a_process_that_ended_meanwhile_is_not_believed() -> None:
    """What was read may be another's by then."""
    with process(A="1") as made, held(made.pid) as handle:
        assert environment_of(handle, ALICE) == {"A": "1"}
        made.kill()
        made.wait()
        assert environment_of(handle, ALICE) is None


@pytest.mark.parametrize("moment", ["_read", "_read_in_time"], ids=["its uids are read", "its environment is read"])
def test_a_process_that_ends_while_it_is_read_is_not_believed(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Until it is gone it reads as its own; after that the same pid may be anybody's."""
    with process(A="1") as made, held(made.pid) as handle:
        reading = getattr(environment, moment)

        def meanwhile(*arguments: object) -> object:
            read_by_then = reading(*arguments)
            made.kill()
            made.wait()
            return read_by_then

        monkeypatch.setattr(environment, moment, meanwhile)
        told = uids_of(handle) if moment == "_read" else environment_of(handle, ALICE)
        assert told is None


def test_what_is_no_variable_is_left_out(tmp_path: Path) -> None:
    """Names twice, names that are none, no "=", the rest behind the last NUL; bytes that are no UTF-8 are kept."""
    data = b"A=1\0B=1\0B=2\0=x\0C\0D-D=1\0 E=1\0BASH_FUNC_f%%=() { :; }\0F=\0G=a=b\nc\0H=\xff\0LAST=cut"
    found = read(fake_proc(tmp_path, "1001\t1001\t1001\t1001", data))
    assert found == {"A": "1", "F": "", "G": "a=b\nc", "H": "\udcff"}


@given(st.binary(max_size=200))
def test_any_bytes_of_an_environment(data: bytes) -> None:
    """Nothing but names and values comes of them."""
    with tempfile.TemporaryDirectory() as directory:
        found = read(fake_proc(Path(directory), "1001\t1001\t1001\t1001", data))
    assert found is not None
    for name, value in found.items():
        assert f"{name}={value}".encode("utf-8", "surrogateescape") in data.split(b"\0")


# ---- what is not sent


def test_the_forbidden_names_are_those_of_the_pam_module() -> None:
    """One that only the module knew would make it refuse the whole reply."""
    source = (Path(__file__).parents[2] / "pam_hook" / "reply.c").read_text()
    table = re.search(r"forbidden_names\[\] = \{(.*?)\};", source, re.DOTALL)
    assert table is not None
    assert tuple(re.findall(r'"([^"]+)"', table[1])) == FORBIDDEN


@pytest.mark.parametrize(
    "pattern",
    ["", "*", "**", "A**", "*A", "A*B", "1A", "A-B", "A B", "A=", "A\n", "\u00c4", *FORBIDDEN, "LD_PRE*", "PYTHONX*"],
)
def test_patterns_that_are_refused(pattern: str) -> None:
    """What is no NAME or NAME_PREFIX*, and what can match nothing that may be sent."""
    with pytest.raises(ValueError, match=r"is not NAME|is refused by"):
        parse_pattern(pattern)


def test_a_wide_pattern_sends_no_forbidden_name() -> None:
    """P* is a choice a site may make; PATH and PYTHONPATH are none."""
    variables = {"PATH": "/evil", "PYTHONPATH": "/evil", "PERL5LIB": "/evil", "LD_PRELOAD": "/evil", "PBS_O_HOST": "h"}
    with process(**variables) as made:
        assert added(with_processes(made), "P*", "L*") == {**OWN, "PBS_O_HOST": "h"}


def test_slurm_s_commands_below_us_in_the_stack_take_nothing_from_a_job() -> None:
    """SLURM_CONF names a file, and that names plugins: root's squeue in a pam_exec hook ran the user's code."""
    evil = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_SACK_SOCKET", "SLURM_WORKING_CLUSTER")
    runs = ("SLURM_TASK_PROLOG", "SLURM_STDOUTMODE", "SLURM_SPANK_X", "SLURM_EXPORT_ENV", "SLURM_TIME_FORMAT")
    with process(**dict.fromkeys((*evil, *runs), "/evil"), SLURM_NNODES="2") as made:
        assert added(with_processes(made)) == {**OWN, "SLURM_NNODES": "2"}


@pytest.mark.parametrize(
    "name",
    [
        *("PAM_USER", "SSH_ASKPASS", "OPENSSL_CONF", "KRB5_CONFIG", "KRB5CCNAME", "LUA_INIT", "NODE_OPTIONS"),
        *("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "GIT_SSH_COMMAND", "XDG_CONFIG_HOME", "DBUS_SYSTEM_BUS_ADDRESS"),
        *("SSL_CERT_FILE", "SSLKEYLOGFILE", "CURL_HOME", "ZDOTDIR", "TAR_OPTIONS", "MODULEPATH", "_ModuleTable001_"),
        *("SQUEUE_FORMAT", "SCANCEL_USER", "SBATCH_EXPORT", "SYSTEMD_PAGER", "https_proxy", "LESSOPEN"),
    ],
)
def test_what_programs_of_root_s_are_steered_by_is_refused(name: str) -> None:
    """By name at the start of the agent, and never sent where a wide pattern matches it."""
    with pytest.raises(ValueError, match="is refused by pam_adopt"):
        parse_pattern(name)
    with process(**{name: "/evil"}) as made:
        assert added(with_processes(made), f"{name[:1]}*") == OWN


@pytest.mark.parametrize(
    "name",
    [
        *("SLURM_JOBID", "SLURM_NNODES", "SLURM_NODELIST", "SLURM_STEP_ID", "SLURM_CPUS_PER_TASK", "SLURM_PROCID"),
        *("SLURM_TASKS_PER_NODE", "SLURM_SUBMIT_DIR", "SLURM_CLUSTER_NAME", "SLURM_CPU_BIND", "SLURM_MPI_TYPE"),
        *("SRUN_CPUS_PER_TASK", "SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
        *("PMI_RANK", "PMIX_NAMESPACE", "OMPI_MCA_btl", "I_MPI_FABRICS", "UCX_TLS", "NCCL_DEBUG", "TMPDIR", "LANG"),
    ],
)
def test_what_programs_of_the_user_s_are_given_a_job_for_may_be_sent(name: str) -> None:
    """TMPDIR too: the session is to find what the job keeps there."""
    assert parse_pattern(name) == name
    with process(**{name: "x"}) as made:
        assert added(with_processes(made), f"{name[:2]}*") == {**OWN, name: "x"}


@given(st.sampled_from(FORBIDDEN), st.text("ABC_xyz012", max_size=4))
def test_no_pattern_and_no_name_gets_round_the_list(pattern: str, rest: str) -> None:
    """Each forbidden name, and each that begins with a forbidden prefix."""
    assert is_forbidden(pattern[:-1] + rest if pattern.endswith("*") else pattern)


def test_another_user_s_process_in_the_job_is_not_asked() -> None:
    """Root's daemons and setuid programs are in it as well."""
    with process(BOB, SLURM_A="bob") as one, process(0, SLURM_A="root") as other:
        assert added(with_processes(one, other)) == OWN


def test_a_process_that_is_not_in_this_very_job_is_not_asked() -> None:
    """It left, or the job of that id is another one by now."""
    with process(SLURM_A="1") as made:
        backend = with_processes(made)
        backend.processes = lambda job, deadline: (made.pid,)  # type: ignore[method-assign]
        backend.of_process[made.pid] = job("17", identity=(9,))
        assert added(backend) == OWN


def test_more_than_a_reply_holds_is_left_out_whole(caplog: pytest.LogCaptureFixture) -> None:
    """Half of SLURM_* is what makes tools fail; the log says why there is none."""
    many = {f"SLURM_{number}": "x" * 16000 for number in range(5)}
    with process(**many) as made:
        assert added(with_processes(made)) == OWN
    assert f"at most {ENVIRONMENT_MAX_BYTES}" in caplog.text


def test_a_job_manager_that_cannot_say_costs_no_login(caplog: pytest.LogCaptureFixture) -> None:
    """The session is in its job; without the variables it is less convenient, not less right."""
    backend = FakeBackend(JOB)
    backend.down = "no spool directory"
    assert added(backend) == OWN
    assert "no spool directory" in caplog.text


def test_time_that_is_used_up_costs_no_login() -> None:
    """Nothing is read any more."""
    with process(SLURM_A="1") as made:
        assert added(with_processes(made), deadline=Deadline.after_ms(0)) == OWN


def test_processes_that_have_ended_and_none_at_all() -> None:
    """A job of which only the extern step is on this node."""
    with process(SLURM_A="1") as made:
        backend = with_processes(made)
        made.kill()
        made.wait()
        assert added(backend) == OWN
    assert added(FakeBackend(JOB)) == OWN


# ---- what is


def tick() -> None:
    """Wait until a process that starts now is seen to be younger: start times count ticks of 10 ms."""
    ends = time.monotonic() + 0.02
    while time.monotonic() < ends:
        time.sleep(0.001)


def test_the_oldest_process_that_has_any() -> None:
    """Not the newest, not one whose environment has nothing of it."""
    with contextlib.ExitStack() as stack:
        without = stack.enter_context(process(OTHER="1"))
        tick()
        oldest = stack.enter_context(process(SLURM_A="old", OTHER="2"))
        tick()
        newest = stack.enter_context(process(SLURM_A="new"))
        assert added(with_processes(newest, oldest, without)) == {**OWN, "SLURM_A": "old"}


def test_names_match_whole_and_prefixes_from_the_start() -> None:
    """CUDA_VISIBLE_DEVICES is not CUDA_VISIBLE_DEVICES_2, nor is XSLURM_A a SLURM_*; case counts."""
    variables = {
        "SLURM_A": "1",
        "SLURM_": "2",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "CUDA_VISIBLE_DEVICES_2": "3",
        "XSLURM_A": "4",
        "slurm_a": "5",
    }
    with process(**variables) as made:
        found = added(with_processes(made), "SLURM_*", "CUDA_VISIBLE_DEVICES")
    assert found == {**OWN, "SLURM_A": "1", "SLURM_": "2", "CUDA_VISIBLE_DEVICES": "0,1"}


def test_what_the_manager_says_wins() -> None:
    """The id of the job that the session is in is no matter of a process's opinion."""
    with process(SLURM_JOB_ID="18", DISPLAY=":1") as made:
        own = {"SLURM_JOB_ID": "17", "DISPLAY": "localhost:50.0"}
        assert added(with_processes(made), "SLURM_*", "DISPLAY", own=own) == own


def test_the_pids_of_a_cgroup_and_those_below(tmp_path: Path) -> None:
    """Zeros are processes outside our pid namespace; what cannot be read is passed over; enough is enough."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "cgroup.procs").write_text("7\n0\n")
    (tmp_path / "a" / "b" / "cgroup.procs").write_text("8\n9\n")
    assert sorted(processes_below(str(tmp_path))) == [7, 8, 9]
    assert processes_below(str(tmp_path / "gone")) == ()
    assert processes_below(str(tmp_path), Deadline.after_ms(0)) == (7,), "a tree that is as large as its user likes"
    (tmp_path / "a" / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in range(1, 3000)))
    assert 1024 <= len(processes_below(str(tmp_path))) < 3100


# ---- which processes a job manager names


@pytest.mark.parametrize("layout", [V1, (V2,)])
def test_slurm_s_sessions_are_not_among_the_processes_of_a_job(tmp_path: Path, layout: Tuple[str, ...]) -> None:
    """Every step but the extern step; not another job's, nor those of a later job of the same id."""
    with Scene(tmp_path, layout) as scene:
        scene.step(17)
        scene.step(18)
        for step, pid in (("step_extern", 3), ("step_batch", 5), ("step_0", 6)):
            scene.host.cgroup(scene.path(layout[0], 17, step=step) + "/user/task_0")
            for label in layout:
                file = scene.host.roots[label] / (scene.path(label, 17, step=step) + "/user/task_0").strip("/")
                if file.is_dir():
                    (file / "cgroup.procs").write_text(f"{pid}\n")
        by_id = {job.id: job for job in scene.jobs.jobs_of(ALICE, scene_soon())}
        assert sorted(scene.jobs.processes(by_id["17"], scene_soon())) == [5, 6]
        assert scene.jobs.processes(by_id["18"], scene_soon()) == ()
        assert scene.jobs.processes(replace(by_id["17"], identity=(9,)), scene_soon()) == ()


def test_the_processes_of_a_plain_cgroup(tmp_path: Path) -> None:
    """All in it and below it; none of a job that is gone or another by now."""
    host = FakeHost(tmp_path, [V2])
    host.cgroup(f"/jobs/uid_{ALICE}/job_5")
    host.cgroup(f"/jobs/uid_{ALICE}/job_5/step")
    (tmp_path / f"cgroup/v2/jobs/uid_{ALICE}/job_5/step/cgroup.procs").write_text("7\n")
    jobs = CgroupJobs(JobPath.parse_template("/jobs/uid_{uid}/job_{job}"), "", host.mounts)
    (found,) = jobs.jobs_of(ALICE, soon())
    assert jobs.processes(replace(found, identity=(9,)), soon()) == ()
    assert jobs.processes(replace(found, id="6"), soon()) == ()
    assert jobs.processes(replace(found, id="../x"), soon()) == ()
    assert jobs.processes(found, soon()) == (7,)


# ---- in an adoption


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("mode", list(Mode))
def test_an_adopted_session_is_given_it_in_both_phases(phase: Phase, mode: Mode) -> None:
    """A site with the account line alone has it too; nothing is read for a login that is only observed."""
    backend = FakeBackend(JOB)
    workers = Workers("jobs", 2, 8)
    pending, given = PendingLogins(time.monotonic), JobEnvironment(("CUDA_*",))
    adoptions = Adoptions("n1", backend, None, pending, workers, Metrics(), environment=given)
    request = PamRequest(phase, mode, Options(), ALICE, 1000, None, "sshd", "alice", "", False, True)
    with process(CUDA_VISIBLE_DEVICES="0,1", HOME="/evil") as made, held(os.getpid()) as caller:
        backend.of_process[made.pid] = JOB
        reply, _ = asyncio.run(adoptions.serve(request, caller, soon()))
    workers.close()
    encode_reply(reply)
    expected = {"SLURM_JOB_ID": "17", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert reply.environment == (expected if mode is Mode.ENFORCE else {})
