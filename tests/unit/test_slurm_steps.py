"""Which jobs a user has, asked of doubles of six releases: faults and forgeries first. Needs root."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

import pytest
from slurm_scene import ALICE, BOB, HASTY_MS, PATIENT_MS, SLICE, V1, Scene, heard, ids, soon

from adoptd.jobs import CgroupFinding
from adoptd.jobs.slurm import SlurmJobs
from adoptd.jobs.slurm_conf import SlurmConf
from adoptd.jobs.slurm_paths import format_sluid
from adoptd.model import AdoptionFailed, Ambiguous, JobFault, JobManagerError
from adoptd.process import open_process
from fake_cgroups import V2
from lab.waiting import until
from slurmstepd_double import BY_NAME, RELEASES, Fault, Release, stale_socket

ALL_RELEASES = pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
SILENT = pytest.mark.parametrize(
    "fault",
    [
        Fault.HANGS,
        Fault.DEAF,
        Fault.HANGS_AFTER_HELLO,
        Fault.CLOSES_AT_ONCE,
        Fault.CLOSES_AFTER_HELLO,
        Fault.REFUSES_VERSION,
        Fault.SHORT_READ,
        Fault.ODD_STATE,
    ],
    ids=lambda fault: fault.name.lower(),
)
IN_HASTE = pytest.mark.parametrize("step_ms", [HASTY_MS], ids=["hasty"])
SLUID = (7 << 52) + 12345


@pytest.fixture
def step_ms() -> float:
    return PATIENT_MS


@pytest.fixture
def scene(tmp_path: Path, step_ms: float) -> Iterator[Scene]:
    descriptors = len(os.listdir("/proc/self/fd"))
    with Scene(tmp_path, step_ms=step_ms) as made:
        yield made
    # The watched mountinfo of the host under test is its own.
    assert len(os.listdir("/proc/self/fd")) - descriptors <= 2, "descriptors are left open"


def test_a_missing_spool_directory_is_not_no_jobs(scene: Scene) -> None:
    """Nor an unreadable one."""
    scene.spool.rmdir()
    with pytest.raises(JobManagerError, match="spool: No such file"):
        scene.jobs.jobs_of(ALICE, soon())
    with pytest.raises(JobManagerError, match="spool: No such file"):
        scene.jobs.all_jobs(soon())
    scene.spool.touch()
    with pytest.raises(JobManagerError, match="Not a directory"):
        scene.jobs.jobs_of(ALICE, soon())


@pytest.mark.parametrize("mode", [0o757, 0o1757, 0o777])
def test_a_spool_directory_that_others_can_write_to(scene: Scene, mode: int) -> None:
    """Anybody could put a job of anybody's there, sticky or not."""
    scene.step(5)
    scene.spool.chmod(mode)
    with pytest.raises(JobManagerError, match="others can write"):
        scene.jobs.jobs_of(ALICE, soon())


def test_a_spool_directory_that_a_group_can_write_to(scene: Scene) -> None:
    """Root's group is root; any other is not."""
    scene.step(5)
    scene.spool.chmod(0o775)
    assert ids(scene.jobs.jobs_of(ALICE, soon())) == ["5"]
    os.chown(scene.spool, 0, 100)
    with pytest.raises(JobManagerError, match="others can write"):
        scene.jobs.jobs_of(ALICE, soon())


def test_a_spool_directory_that_others_could_replace(scene: Scene) -> None:
    """Whoever can write to the directory above can put another in its place."""
    scene.step(5)
    scene.spool.parent.chmod(0o777)
    with pytest.raises(JobManagerError, match="others can write to"):
        scene.jobs.jobs_of(ALICE, soon())
    scene.spool.parent.chmod(0o1777)
    assert ids(scene.jobs.jobs_of(ALICE, soon())) == ["5"]
    os.chown(scene.spool, ALICE, ALICE)
    with pytest.raises(JobManagerError, match="belongs to uid 1001"):
        scene.jobs.jobs_of(ALICE, soon())


def test_a_spool_directory_behind_a_link(scene: Scene) -> None:
    """Followed once, and then looked at where it really is."""
    scene.step(5)
    real = scene.spool.rename(scene.spool.with_name("elsewhere"))
    scene.spool.symlink_to(real)
    assert ids(scene.jobs.jobs_of(ALICE, soon())) == ["5"]


def test_a_socket_of_somebody_elses(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Not believed, not asked, said once."""
    step = scene.step(5)
    os.chown(step.path, ALICE, ALICE)
    for _ in range(2):
        assert scene.jobs.jobs_of(ALICE, soon()) == ()
    assert step.asked == []
    assert [record.getMessage().count("not a socket of root's") for record in caplog.records] == [1]


def test_what_is_no_socket_of_an_extern_step(scene: Scene) -> None:
    """Files, links, other steps, other nodes, numbers as Slurm does not write them."""
    real = scene.step(5)
    (scene.spool / "n1_6.4294967292").touch()
    (scene.spool / "n1_7.4294967292").symlink_to(real.path)
    for name in ("n1_8.0", "n1_8.4294967291", "n2_8.4294967292", "xn1_8.4294967292", "n1_08.4294967292"):
        stale_socket(scene.spool, name)
    for name in ("n1_0.4294967292", "n1_8.4294967292x", "n1_8.4294967292.", "n1_99999999999.4294967292", "n1_8"):
        stale_socket(scene.spool, name)
    assert ids(scene.jobs.jobs_of(ALICE, soon())) == ["5"]


def test_a_stale_socket_is_no_job_and_stays(scene: Scene) -> None:
    """It is Slurm's to remove."""
    path = stale_socket(scene.spool, "n1_9.4294967292")
    scene.step(5)
    assert ids(scene.jobs.jobs_of(ALICE, soon())) == ["5"]
    assert path.exists()


@IN_HASTE
@SILENT
def test_a_silent_step_that_was_never_heard_may_be_the_users(scene: Scene, fault: Fault) -> None:
    """So the question has no answer. "No jobs", or only the others, would be a wrong one."""
    scene.step(6, cgroups=False)
    scene.step(5, cgroups=False, fault=fault)
    started = time.monotonic()
    with pytest.raises(JobManagerError, match=r"n1_5\.4294967292"):
        scene.jobs.jobs_of(ALICE, soon())
    assert time.monotonic() - started < 30.0


@IN_HASTE
@SILENT
def test_a_silent_step_that_was_never_heard_but_has_an_owner(scene: Scene, fault: Fault) -> None:
    """cgroup v1 names the owner of a job: everybody else is answered, the owner is not."""
    scene.step(5, uid=BOB, fault=fault)
    scene.step(6)
    until(lambda: heard(scene.jobs, ALICE) == ["6"], "alice's step to be heard")
    with pytest.raises(JobManagerError, match="n1_5"):
        scene.jobs.jobs_of(BOB, soon())
    assert ids(scene.jobs.all_jobs(soon())) == ["6"]


@IN_HASTE
@pytest.mark.parametrize("fault", [Fault.HANGS, Fault.HANGS_AFTER_HELLO, Fault.CLOSES_AFTER_HELLO])
def test_a_step_that_was_heard_and_falls_silent(scene: Scene, fault: Fault) -> None:
    """Its owner is known for good, so others do not even ask it; the owner's job is still counted."""
    hanging = scene.step(5, uid=BOB, cgroups=False)
    scene.step(6)
    until(lambda: (heard(scene.jobs, ALICE), heard(scene.jobs, BOB)) == (["6"], ["5"]), "both to be heard")
    before = scene.jobs.jobs_of(BOB, soon())
    hanging.fault = fault
    asked = list(hanging.asked)
    assert ids(scene.jobs.jobs_of(ALICE, soon())) == ["6"]
    assert hanging.asked == asked
    assert scene.jobs.jobs_of(BOB, soon()) == before
    assert scene.jobs.jobs_of(BOB, soon(0.1)) == before


@IN_HASTE
def test_ten_hanging_steps_cost_no_more_than_one(scene: Scene) -> None:
    """They are waited for together, and the eleventh is heard."""
    hanging = [scene.step(10 + number) for number in range(10)]
    scene.step(5)
    until(lambda: len(heard(scene.jobs, ALICE) or ()) == 11, "all to be heard")
    for step in hanging:
        step.fault = Fault.HANGS
    started = time.monotonic()
    assert len(scene.jobs.jobs_of(ALICE, soon())) == 11
    assert time.monotonic() - started < 10 * HASTY_MS / 1000


@pytest.mark.timeout(300)
def test_a_step_that_hangs_is_waited_for_once_and_not_at_every_login(scene: Scene) -> None:
    """The backend would wait a minute for each of these; and as soon as it answers it is heard."""
    hanging = scene.step(5)
    scene.step(6)
    before = scene.jobs.jobs_of(ALICE, soon())
    hanging.fault = Fault.HANGS
    assert scene.jobs.jobs_of(ALICE, soon(300)) == before
    for _ in range(20):
        assert scene.jobs.jobs_of(ALICE, soon()) == before
    hanging.fault = None
    hanging.state = 3
    until(lambda: ids(scene.jobs.jobs_of(ALICE, soon())) == ["6"], "the step to be heard")


def test_what_no_login_fails_of_is_noted(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Each socket that is left behind once, in one line; a silent step at every login; a user's socket too."""
    for number in range(7):
        stale_socket(scene.spool, f"n1_{100 + number}.4294967292")
    foreign = stale_socket(scene.spool, "n1_200.4294967292")
    os.chown(foreign, ALICE, ALICE)
    noted: List[JobFault] = []
    jobs = SlurmJobs(
        SlurmConf(scene.overrides, {}, scene.view), scene.host.mounts, step_ms=PATIENT_MS, noted=noted.append
    )
    step = scene.step(5)
    for _ in range(3):
        assert ids(jobs.jobs_of(ALICE, soon())) == ["5"]
    step.fault = Fault.HANGS
    assert ids(jobs.jobs_of(ALICE, soon(HASTY_MS))) == ["5"]
    assert noted.count(JobFault.STALE_SOCKET) == 7
    assert noted.count(JobFault.FOREIGN_SOCKET) == 4
    assert noted.count(JobFault.STEP_SILENT) == 1
    assert len(noted) == 12
    lines = [record.message for record in caplog.records]
    (left,) = [line for line in lines if "nobody listens" in line]
    assert "on 7 step sockets (n1_100.4294967292, " in left
    assert "and 2 more" in left
    assert len([line for line in lines if "n1_200" in line and "ignored" in line]) == 1
    assert len([line for line in lines if "n1_5" in line and "still counted" in line]) == 1


def test_no_time_left_is_not_no_jobs(scene: Scene) -> None:
    """An answer made of nothing would be."""
    scene.step(5)
    with pytest.raises(JobManagerError, match="in time"):
        scene.jobs.jobs_of(ALICE, soon(0))


def test_a_step_that_ends_while_it_is_asked(scene: Scene) -> None:
    """Closed, and gone when looked for again: no job, and no error."""
    step = scene.step(5, fault=Fault.HANGS_AFTER_HELLO)
    done = threading.Timer(0.05, step.end)
    done.start()
    assert scene.jobs.jobs_of(ALICE, soon()) == ()
    done.join()


def test_a_connection_lost_once_is_tried_again(scene: Scene) -> None:
    """The second is answered."""
    scene.step(5, fault=Fault.CLOSES_FIRST_TIME)
    assert ids(scene.jobs.jobs_of(ALICE, soon())) == ["5"]


def test_answers_in_pieces(scene: Scene) -> None:
    """A stream has no frames."""
    scene.step(5, fault=Fault.DRIBBLES)
    assert ids(scene.jobs.jobs_of(ALICE, soon())) == ["5"]


def test_a_guessed_node_name_that_is_nobodys(scene: Scene) -> None:
    """Steps of another node and none of ours: then the guess is wrong, and "no jobs" would turn users away."""
    scene.overrides = type(scene.overrides)(spool_dir=str(scene.spool))
    (scene.spool.parent / "slurm.conf").write_text(f"SlurmdSpoolDir={scene.spool}\n")
    scene.view = type(scene.view)(
        scene.view.proc_root, scene.view.hosts_file, (str(scene.spool.parent / "slurm.conf"),), "/nowhere", "n1"
    )
    jobs = scene.backend()
    assert jobs.jobs_of(ALICE, soon()) == ()
    step = scene.step(5, node="compute-1")
    with pytest.raises(JobManagerError, match="steps of node compute-1 and none of n1"):
        jobs.jobs_of(ALICE, soon())
    scene.step(6)
    assert ids(jobs.jobs_of(ALICE, soon())) == ["6"]
    step.end()


def test_a_spool_path_longer_than_a_sockets_may_be(tmp_path: Path) -> None:
    """107 bytes are for the name alone: the directory is held open. A name beyond that is an error, not "no jobs"."""
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    with Scene(deep) as scene:
        here = os.open(scene.spool, os.O_RDONLY)
        try:
            # Bound by its short name, as slurmstepd could not: its own path must fit.
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"/proc/self/fd/{here}/n1_5.4294967292")
            listener.listen()
            with pytest.raises(JobManagerError, match="no answer in time"):
                scene.jobs.jobs_of(ALICE, soon(100))
            listener.close()
            os.rename(scene.spool / "n1_5.4294967292", scene.spool / f"{'n' * 99}_5.4294967292")
            scene.overrides = type(scene.overrides)(node_name="n" * 99, spool_dir=str(scene.spool))
            long_named = scene.backend()
            with pytest.raises(JobManagerError, match="too long"):
                long_named.jobs_of(ALICE, soon())
        finally:
            os.close(here)


@ALL_RELEASES
def test_whose_jobs_are_whose(scene: Scene, release: Release) -> None:
    """Of every release; the newest first, by the age of the socket and not by the number."""
    scene.step(30, release=release)
    older = scene.step(10, uid=BOB, release=release)
    # The clock of files has ticks of its own.
    tick = scene.spool.parent / "tick"
    until(lambda: tick.touch() or tick.stat().st_mtime_ns > older.path.stat().st_mtime_ns, "a later time")
    scene.step(20, release=release)
    for _ in range(2):
        assert ids(scene.jobs.jobs_of(ALICE, soon())) == ["20", "30"]
        assert ids(scene.jobs.jobs_of(BOB, soon())) == ["10"]
        assert scene.jobs.jobs_of(0, soon()) == ()
    assert [(job.uid, job.id) for job in scene.jobs.all_jobs(soon())] == [(ALICE, "20"), (ALICE, "30"), (BOB, "10")]


@pytest.mark.parametrize(
    ("release", "state"),
    [(release, state) for release in RELEASES for state in range(5) if state < 4 or 4 in release.ending],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_step_that_is_ending_has_no_job(scene: Scene, release: Release, state: int) -> None:
    """By that release's own numbers; one that is still starting has."""
    scene.step(5, release=release, state=state)
    assert ids(scene.jobs.jobs_of(ALICE, soon())) == ([] if state in release.ending else ["5"])


def _write(scene: Scene, label: str, path: str, name: str, text: str) -> None:
    file = scene.host.roots[label] / path.strip("/") / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _here(scene: Scene, uid: int = ALICE) -> Tuple[List[str], List[str]]:
    """Running and suspended; all of them are the user's jobs all the same."""
    with scene.jobs.here(uid, soon()) as here:
        assert set(here.jobs) | set(here.suspended) == set(scene.jobs.jobs_of(uid, soon()))
        return ids(here.jobs), ids(here.suspended)


@pytest.mark.parametrize(
    ("state", "is_frozen"),
    [("THAWED\n", False), ("FREEZING\n", True), ("FROZEN\n", True), ("", False), ("FROZEN?\n", False), (None, False)],
)
def test_a_job_that_stands_still_in_cgroup_v1(scene: Scene, state: Optional[str], is_frozen: bool) -> None:
    """By the state of its extern step in the freezer, which counts what is above; by nothing in another hierarchy."""
    scene.step(5)
    scene.step(6, uid=BOB)
    _write(scene, "memory", scene.path("memory", 5), "freezer.state", "FROZEN\n")
    if state is not None:
        _write(scene, "freezer", scene.path("freezer", 5), "freezer.state", state)
    assert _here(scene) == (([], ["5"]) if is_frozen else (["5"], []))
    assert _here(scene, BOB) == (["6"], [])
    assert ids(scene.jobs.all_jobs(soon())) == ["5", "6"]


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(f"{SLICE}/job_5/step_extern/user", id="what Slurm itself freezes"),
        pytest.param(f"{SLICE}/job_5/step_extern", id="the step"),
        pytest.param(f"{SLICE}/job_5", id="the job"),
        pytest.param("/system.slice", id="all of Slurm"),
    ],
)
def test_a_job_that_stands_still_in_cgroup_v2(tmp_path: Path, where: str) -> None:
    """There a file says only what was asked of that very cgroup: those above it are read too."""
    with Scene(tmp_path, layout=[V2]) as scene:
        scene.step(5)
        for file in ("", "0\n", "1\n"):
            _write(scene, V2, where, "cgroup.freeze", file)
            assert _here(scene) == (([], ["5"]) if file == "1\n" else (["5"], []))
        _write(scene, V2, where, "cgroup.freeze", "0\n")
        _write(scene, V2, f"{SLICE}/job_5/step_0", "cgroup.freeze", "1\n")
        assert _here(scene) == (["5"], [])


def test_the_job_that_runs_is_apart_from_the_one_that_does_not(scene: Scene) -> None:
    """A job without a cgroup in the freezer is not frozen by another's."""
    scene.step(5)
    scene.step(6)
    _write(scene, "freezer", scene.path("freezer", 5), "freezer.state", "FROZEN\n")
    assert _here(scene) == (["6"], ["5"])


def test_a_login_is_not_put_into_a_job_that_was_suspended_since_it_was_listed(scene: Scene) -> None:
    """As long ago as it takes to ask the source, perhaps. Who is to be held in its job is put there all the same."""
    step = scene.step(5)
    with open_process(os.getpid()) as process:
        scene.host.process(process.pid, {})
        with scene.jobs.here(ALICE, soon()) as here:
            (job,) = here.jobs
            _write(scene, "freezer", scene.path("freezer", 5), "freezer.state", "FREEZING\n")
            for adopt in (here.adopt, scene.jobs.adopt_for_session):
                with pytest.raises(AdoptionFailed, match="job 5 is suspended") as failure:
                    adopt(process, job, False, False, soon())
                assert failure.value.fault is JobFault.JOB_ENDED
        assert step.added == []
        scene.jobs.adopt(process, job, soon())
        assert step.added == [process.pid]


def test_heterogeneous_steps(scene: Scene) -> None:
    """A component's number may follow the step's."""
    scene.step(5, suffix=".1")
    assert ids(scene.jobs.jobs_of(ALICE, soon())) == ["5"]


def test_another_job_of_the_same_id(scene: Scene) -> None:
    """Requeued: neither equal nor believed to hold what the first held."""
    first = scene.step(5)
    before = scene.jobs.jobs_of(ALICE, soon())[0]
    scene.host.process(7, {"freezer": scene.path("freezer", 5), "memory": scene.path("memory", 5)})
    assert scene.jobs.contains(before, 7)
    first.end()
    # An inode that is free is given out again: the second must not be told by it alone.
    keeper = scene.spool / "keeper"
    keeper.touch()
    scene.step(5)
    after = scene.jobs.jobs_of(ALICE, soon())[0]
    assert (after.id, after.uid) == (before.id, before.uid)
    assert after.identity != before.identity
    assert not scene.jobs.contains(before, 7)
    assert scene.jobs.contains(after, 7)


def test_a_changed_mode_makes_no_other_job(scene: Scene) -> None:
    """It changes the socket's ctime, and the session phase has to find its job again."""
    step = scene.step(5)
    before = scene.jobs.jobs_of(ALICE, soon())[0]
    step.path.chmod(0o700)
    assert scene.jobs.jobs_of(ALICE, soon())[0].identity == before.identity


# The job of a process


@pytest.mark.parametrize(
    "paths",
    [
        {},
        {"freezer": "/slurm_n1/uid_1001/job_5"},
        {"freezer": "/user/slurm_n1/uid_1001/job_5/step_0"},
        {"freezer": "/slurm_n2/uid_1001/job_5/step_0"},
        {"freezer": "/slurm_n1/uid_1002/job_5/step_0"},
        {"freezer": "/slurm_n1/uid_1001/job_6/step_0"},
        {"memory": f"{SLICE}/job_5/step_0/user/task_0"},
    ],
)
def test_a_process_outside_every_job(scene: Scene, paths: Dict[str, str]) -> None:
    """Elsewhere, above the steps, another node's, another owner's than the step says, or a job without a step."""
    scene.step(5)
    scene.host.process(7, paths)
    assert scene.jobs.job_of_process(7) is None


def test_a_process_in_two_jobs_is_in_none_of_them(scene: Scene) -> None:
    """Hierarchies that disagree are not voted on."""
    scene.step(5)
    scene.step(6)
    scene.host.process(7, {"freezer": scene.path("freezer", 5), "memory": scene.path("memory", 6)})
    with pytest.raises(Ambiguous, match="5, 6"):
        scene.jobs.job_of_process(7)


@IN_HASTE
def test_a_process_of_a_step_that_cannot_be_told(scene: Scene) -> None:
    """Its path says a job, and nobody confirms it: not "none", not the job. Once heard, it is known."""
    step = scene.step(5, fault=Fault.HANGS)
    scene.host.process(7, {"freezer": scene.path("freezer", 5)})
    with pytest.raises(JobManagerError, match="n1_5"):
        scene.jobs.job_of_process(7)
    step.fault = None
    assert scene.jobs.job_of_process(7) is not None
    step.fault = Fault.HANGS
    job = scene.jobs.job_of_process(7)
    assert job is not None
    assert job.id == "5"


def test_a_gone_process_is_in_no_job(scene: Scene) -> None:
    """As the protocol says."""
    scene.step(5)
    assert scene.jobs.job_of_process(7) is None
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    assert not scene.jobs.contains(job, 7)


@pytest.mark.parametrize("step", ["step_extern", "step_0", "step_batch/task_0", "step_0+1"])
def test_a_process_in_a_job(scene: Scene, step: str) -> None:
    """In any of its steps, in one hierarchy that says so and none that says otherwise; also while it is ending."""
    double = scene.step(5)
    scene.step(6, uid=BOB)
    scene.host.process(7, {"freezer": scene.path("freezer", 5, step=step)})
    assert scene.jobs.job_of_process(7) == scene.jobs.jobs_of(ALICE, soon())[0]
    double.state = 3
    job = scene.jobs.job_of_process(7)
    assert job is not None
    assert job.id == "5"


def test_contains_means_every_hierarchy_that_has_the_job(scene: Scene) -> None:
    """One that pam_systemd took out of one of them is not in it any more, and the session phase puts it back."""
    scene.step(5)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    scene.host.process(7, {"freezer": scene.path("freezer", 5)})
    assert not scene.jobs.contains(job, 7)
    scene.host.process(7, {"freezer": scene.path("freezer", 5), "memory": scene.path("memory", 5, step="step_0")})
    assert scene.jobs.contains(job, 7)


@pytest.mark.parametrize("release", ["24.11", "25.11", "26.05"])
def test_a_process_in_a_job_of_cgroup_v2(tmp_path: Path, release: str) -> None:
    """By its number, in whichever release."""
    with Scene(tmp_path, [V2]) as scene:
        scene.step(5, release=BY_NAME[release], sluid=SLUID)
        scene.host.process(7, {V2: f"{SLICE}/job_5/step_0/user/task_0"})
        job = scene.jobs.job_of_process(7)
        assert job == scene.jobs.jobs_of(ALICE, soon())[0]
        assert scene.jobs.contains(job, 7)


def test_a_process_in_a_job_named_by_its_sluid(tmp_path: Path) -> None:
    """26.05: asked of the steps, and of each once. A job of another SLUID is another job."""
    with Scene(tmp_path, [V2]) as scene:
        step = scene.step(5, release=BY_NAME["26.05"], sluid=SLUID, cgroups=False)
        scene.step(6, release=BY_NAME["24.11"], cgroups=False)
        text = format_sluid(SLUID)
        scene.host.cgroup(f"{SLICE}/{text}/step_extern")
        scene.host.process(7, {V2: f"{SLICE}/{text}/step_0/user/task_0"})
        scene.host.process(8, {V2: f"{SLICE}/{format_sluid(SLUID + 1)}/step_0/user/task_0"})
        job = scene.jobs.job_of_process(7)
        assert job is not None
        assert job.id == "5"
        assert scene.jobs.contains(job, 7)
        assert scene.jobs.job_of_process(8) is None
        assert not scene.jobs.contains(job, 8)
        assert step.asked.count(1) == 1


# The job of a cgroup id


def test_a_cgroup_id_on_a_host_of_cgroup_v1(scene: Scene) -> None:
    """There is nothing to be told by it."""
    scene.step(5)
    assert scene.jobs.job_of_cgroup(1).finding is CgroupFinding.CANNOT_TELL


@pytest.mark.parametrize(
    ("path", "finding"),
    [
        (None, CgroupFinding.GONE),
        ("/", CgroupFinding.CANNOT_TELL),
        ("/user.slice/session-3.scope", CgroupFinding.NO_JOB),
        (f"{SLICE}/job_5", CgroupFinding.NO_JOB),
        (f"{SLICE}/job_9/step_0/user/task_0", CgroupFinding.CANNOT_TELL),
        (f"{SLICE}/job_5/step_0/user/task_0", CgroupFinding.JOB),
    ],
)
def test_a_cgroup_id_on_a_host_of_cgroup_v2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Optional[str], finding: CgroupFinding
) -> None:
    """Removed, the root, outside every job, above the steps, of a job without a step here, and a job's."""
    with Scene(tmp_path, [V2]) as scene:
        scene.step(5)
        monkeypatch.setattr("adoptd.jobs.slurm.path_of_id", lambda unified, cgroup_id: path)
        verdict = scene.jobs.job_of_cgroup(77)
        assert verdict.finding is finding
        assert verdict.job == (scene.jobs.jobs_of(ALICE, soon())[0] if finding is CgroupFinding.JOB else None)


def test_a_cgroup_id_where_slurm_uses_v1_beside_v2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of a job may be anywhere in v2 there."""
    with Scene(tmp_path, [V2, *V1]) as scene:
        scene.host.cgroup("/slurm_n1", only=["freezer"])
        scene.host.cgroup(SLICE, only=[V2])
        monkeypatch.setattr("adoptd.jobs.slurm.path_of_id", lambda unified, cgroup_id: "/user.slice")
        assert scene.jobs.job_of_cgroup(77).finding is CgroupFinding.CANNOT_TELL


def test_many_questions_at_once(scene: Scene) -> None:
    """The memory is shared between threads, and so are the answers."""
    for number in range(6):
        scene.step(number + 1, uid=ALICE if number % 2 else BOB)
    answers: List[Tuple[int, int]] = []

    def ask(uid: int) -> None:
        for _ in range(20):
            answers.append((uid, len(scene.jobs.jobs_of(uid, soon()))))

    threads = [threading.Thread(target=ask, args=(uid,)) for uid in (ALICE, BOB, 0) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(answers)) == [(0, 0), (ALICE, 3), (BOB, 3)]


def test_a_directory_s_time_is_no_proof(scene: Scene) -> None:
    """Steps come, end and come again while it stands still: within a tick of the clock, or after one was set back."""

    def stand_still() -> None:
        os.utime(scene.spool, ns=(10**18, 10**18))

    scene.step(1)
    stand_still()
    assert ids(scene.jobs.jobs_of(ALICE, soon())) == ["1"]
    for _ in range(5):
        step = scene.step(2)
        stand_still()
        first = next(job for job in scene.jobs.jobs_of(ALICE, soon()) if job.id == "2")
        step.end()
        stand_still()
        assert ids(scene.jobs.jobs_of(ALICE, soon())) == ["1"]
        again = scene.step(2)
        stand_still()
        second = next(job for job in scene.jobs.jobs_of(ALICE, soon()) if job.id == "2")
        # The inode may be the same again: the socket's ctime is another, and so the job is asked anew.
        assert second.created != first.created
        again.end()
        stand_still()


def test_a_step_that_came_again_is_not_the_one_remembered(scene: Scene) -> None:
    """Requeued with nobody asking in between: the memory of the first run names no job of the second."""
    spool = scene.jobs._spool
    step = scene.step(7)
    scene.jobs.jobs_of(ALICE, soon())
    assert spool.remembered(7) is not None
    step.end()
    assert spool.remembered(7) is None
    scene.step(7, uid=BOB)
    assert spool.remembered(7) is None
    assert ids(scene.jobs.jobs_of(BOB, soon())) == ["7"]
    known = spool.remembered(7)
    assert known is not None
    assert known.uid == BOB


@pytest.mark.parametrize("how", ["others can write to", "belongs to uid 1001"])
def test_a_directory_far_above_the_spool_directory_that_others_could_replace(tmp_path: Path, how: str) -> None:
    """All of the way down to it is whose that directory is, and not only the last of it."""
    far = tmp_path / "far"
    near = far / "near"
    near.mkdir(parents=True)
    for each in (far, near):
        each.chmod(0o755)
    with Scene(near) as scene:
        scene.step(5)
        assert ids(scene.jobs.jobs_of(ALICE, soon())) == ["5"]
        if how.startswith("others"):
            far.chmod(0o777)
        else:
            os.chown(far, ALICE, 0)
        with pytest.raises(JobManagerError, match=how) as refused:
            scene.jobs.jobs_of(ALICE, soon())
        assert str(far) in str(refused.value)
        assert str(near) + " " not in str(refused.value)
