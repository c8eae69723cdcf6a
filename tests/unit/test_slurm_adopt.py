"""Adoption through a double's extern step, and what else a step is asked: failures first. Needs root."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Iterator, List, Optional

import pytest
from fakes import longer
from slurm_scene import ALICE, SLICE, Scene, heard, ids, soon

from adoptd.deadline import Deadline
from adoptd.jobs import slurm_adopt
from adoptd.jobs.slurm_step import StepConnection
from adoptd.jobs.slurm_turns import Turns
from adoptd.jobs.slurm_wire import X11Display
from adoptd.model import AdoptionFailed, Job, JobFault, JobManagerError
from adoptd.process import ProcessHandle, open_process
from fake_cgroups import V2
from lab.waiting import until
from slurmstepd_double import BY_NAME, RELEASES, Fault, Release, Step

ADD = 22
# Faults of a step that says nothing more: its time has to run out.
SILENT = (Fault.HANGS, Fault.HANGS_ON_ADD, Fault.DEAF)
CLONE_NEWNS = 0x20000


# Until the test ends it, or the tests end.
STAYS = ("setpriv", "--pdeathsig", "KILL", "sleep", "300")


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with Scene(tmp_path) as made:
        yield made


@pytest.fixture
def process(scene: Scene) -> Iterator[ProcessHandle]:
    """A real process, which the scene's cgroups have in their roots."""
    with subprocess.Popen(STAYS) as child:
        scene.host.process(child.pid, {})
        try:
            with open_process(child.pid) as handle:
                yield handle
        finally:
            child.kill()


def leave_unanswered(scene: Scene, step: Step, process: ProcessHandle, job: Job) -> AdoptionFailed:
    """An adoption that the step was asked for and has not answered: why it failed."""
    failures: List[AdoptionFailed] = []
    # On a busy machine the time may be over before the step is asked, and it may be a while until it has heard.
    for ms in longer(100):
        with pytest.raises(AdoptionFailed) as failure:
            scene.jobs.adopt(process, job, soon(ms))
        if "has not answered the adoption before" not in str(failure.value):
            failures.append(failure.value)
        if ADD in step.asked:
            break
    assert "no answer in time" in str(failures[-1])
    return failures[-1]


def adopted_in(scene: Scene, process: ProcessHandle) -> List[str]:
    """The ids of jobs that have the process completely."""
    return [job.id for job in scene.jobs.all_jobs(soon()) if scene.jobs.contains(job, process.pid)]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault.HANGS_ON_ADD, "no answer in time"),
        (Fault.ADD_FAILS, "refuses process [0-9]+: error -1$"),
        (Fault.ADD_MOVES_NOTHING, "has not moved process [0-9]+: not in its cgroup of freezer, memory$"),
        (Fault.FORGETS, "does not know process [0-9]+; process [0-9]+ is stuck in .*step_extern .freezer."),
        (Fault.ADD_THEN_CLOSES, "closed the connection without a reply; process [0-9]+ is stuck in .*step_extern"),
        (Fault.HANGS, "no answer in time"),
        (Fault.CLOSES_AFTER_HELLO, "closed the connection|peer"),
        (Fault.SHORT_READ, "closed the connection"),
        (Fault.REFUSES_VERSION, "refuses protocol version"),
        (Fault.DEAF, "takes no more connections|no answer in time"),
    ],
    ids=lambda value: getattr(value, "name", "").lower() or "words",
)
def test_an_adoption_that_is_not_proven_has_failed(
    scene: Scene, process: ProcessHandle, fault: Fault, words: str
) -> None:
    """Whatever the step said or did; and the message says if the process is in the job all the same."""
    step = scene.step(5)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    if fault is Fault.DEAF:
        # The queue of one that listens already cannot be filled to order: its limit is lowered first.
        step._stop.set()
        step._listener.listen(0)
        step._fill_queue()
    step.fault = fault
    started = time.monotonic()
    with pytest.raises(AdoptionFailed, match=words):
        scene.jobs.adopt(process, job, soon(300) if fault in SILENT else soon())
    assert time.monotonic() - started < 30.0


def test_a_step_that_moves_half(scene: Scene, process: ProcessHandle) -> None:
    """One controller of two: failed, and said where the process is stuck, for nobody but the step can undo it."""
    scene.step(5, move=scene.mover(5, only=("freezer",)))
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    with pytest.raises(AdoptionFailed, match=r"not in its cgroup of memory; .* stuck in .*step_extern \(freezer\)$"):
        scene.jobs.adopt(process, job, soon())


def test_a_job_without_cgroups(scene: Scene, process: ProcessHandle) -> None:
    """proctrack/linuxproc says yes to everything and moves nothing: not even asked."""
    step = scene.step(5, cgroups=False)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    with pytest.raises(AdoptionFailed, match="ProctrackType=proctrack/cgroup is needed"):
        scene.jobs.adopt(process, job, soon())
    assert ADD not in step.asked


@pytest.mark.parametrize(
    ("release", "state"),
    [(release, state) for release in RELEASES for state in release.ending],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_job_that_ends_between_the_decision_and_the_adoption(
    scene: Scene, process: ProcessHandle, release: Release, state: int
) -> None:
    """Its step is still there and says so."""
    step = scene.step(5, release=release)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    step.state = state
    with pytest.raises(AdoptionFailed, match="job 5 is ending"):
        scene.jobs.adopt(process, job, soon())
    assert ADD not in step.asked


def test_a_job_that_has_ended(scene: Scene, process: ProcessHandle) -> None:
    """With its socket removed, and with the socket left behind."""
    for leave_socket in (False, True):
        step = scene.step(5)
        job = scene.jobs.jobs_of(ALICE, soon())[0]
        step.end(leave_socket)
        with pytest.raises(AdoptionFailed, match=r"ended|refused"):
            scene.jobs.adopt(process, job, soon())


def test_another_job_of_the_same_id_does_not_get_the_process(scene: Scene, process: ProcessHandle) -> None:
    """Requeued after the decision."""
    first = scene.step(5)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    first.end()
    (scene.spool / "keeper").touch()
    second = scene.step(5)
    with pytest.raises(AdoptionFailed, match="job 5 has ended"):
        scene.jobs.adopt(process, job, soon())
    assert second.added == []


def test_a_process_that_has_exited(scene: Scene) -> None:
    """Its pid may be another's by now: the step is not asked."""
    step = scene.step(5)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    child = subprocess.Popen(STAYS)
    scene.host.process(child.pid, {})
    with open_process(child.pid) as handle:
        child.kill()
        child.wait()
        with pytest.raises(AdoptionFailed, match="has exited"):
            scene.jobs.adopt(handle, job, soon())
    assert ADD not in step.asked


def test_a_spool_directory_that_is_gone(scene: Scene, process: ProcessHandle) -> None:
    """The only error an adoption raises is its own."""
    step = scene.step(5)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    scene.spool.chmod(0o777)
    with pytest.raises(AdoptionFailed, match="others can write"):
        scene.jobs.adopt(process, job, soon())
    assert step.added == []


def test_no_time_left(scene: Scene, process: ProcessHandle) -> None:
    """Nothing is begun that cannot be read back."""
    step = scene.step(5)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    with pytest.raises(AdoptionFailed, match="in time"):
        scene.jobs.adopt(process, job, soon(0))
    assert step.added == []


def test_none_overtakes_one_that_is_unanswered(scene: Scene, process: ProcessHandle) -> None:
    """The step may still be at the first, and some releases crash of two: the next waits for that answer."""
    step = scene.step(5, fault=Fault.HANGS_ON_ADD)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    first = leave_unanswered(scene, step, process, job)
    with pytest.raises(AdoptionFailed, match="has not answered the adoption before") as second:
        scene.jobs.adopt(process, job, soon(100))
    assert [error.fault for error in (first, second.value)] == [JobFault.STEP_SILENT] * 2
    assert step.asked.count(ADD) == 1


def test_the_next_is_taken_in_as_soon_as_the_one_before_is_answered(scene: Scene, process: ProcessHandle) -> None:
    """No login fails because another did a moment ago."""
    step = scene.step(5, fault=Fault.HANGS_ON_ADD)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    leave_unanswered(scene, step, process, job)
    step.fault = None
    step.goes_on.set()
    with subprocess.Popen(STAYS) as child:
        scene.host.process(child.pid, {})
        try:
            with open_process(child.pid) as another:
                scene.jobs.adopt(another, job, soon())
            assert step.added == [process.pid, child.pid]
        finally:
            child.kill()
    assert step.at_once_max == 1


def test_an_answer_that_is_owed_by_a_step_that_ended_keeps_nobody(scene: Scene, process: ProcessHandle) -> None:
    """Hanging up is an answer too: what is left is what the step's end means."""
    step = scene.step(5, fault=Fault.HANGS_ON_ADD)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    leave_unanswered(scene, step, process, job)
    step.end()
    with pytest.raises(AdoptionFailed, match="has ended") as failure:
        scene.jobs.adopt(process, job, soon())
    assert failure.value.fault is JobFault.JOB_ENDED


def test_owed_answers_are_kept_of_few_jobs(scene: Scene) -> None:
    """Each is an open connection; the oldest is given up first."""
    scene.step(5)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    turns, pairs = Turns(), [socket.socketpair() for _ in range(70)]
    try:
        for number, (ours, _) in enumerate(pairs):
            turns.owes(dataclasses.replace(job, identity=(number,)), ours)
        assert [ours.fileno() == -1 for ours, _ in pairs] == [True] * 6 + [False] * 64
    finally:
        for pair in pairs:
            for each in pair:
                each.close()


def test_a_hanging_job_does_not_hold_up_another(scene: Scene, process: ProcessHandle) -> None:
    """One job's queue is not another's."""
    step = scene.step(5, fault=Fault.HANGS_ON_ADD)
    scene.step(6)
    other, hanging = sorted(scene.jobs.jobs_of(ALICE, soon()), key=lambda job: -int(job.id))
    failures: List[AdoptionFailed] = []

    def hang() -> None:
        try:
            scene.jobs.adopt(process, hanging, soon())
        except AdoptionFailed as error:
            failures.append(error)

    thread = threading.Thread(target=hang)
    thread.start()
    until(lambda: ADD in step.asked, "the adoption that hangs")
    scene.jobs.adopt(process, other, soon())
    assert thread.is_alive()
    step.end()
    thread.join()
    assert len(failures) == 1


def test_one_at_a_time(scene: Scene) -> None:
    """Twenty adoptions into one job at once: the step sees one after the other, and all succeed."""
    mover = scene.mover(5)

    def move_slowly(pid: int) -> None:
        time.sleep(0.002)
        mover(pid)

    step = scene.step(5, move=move_slowly)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    children = [subprocess.Popen(STAYS) for _ in range(20)]
    failures: List[Exception] = []

    def adopt(pid: int) -> None:
        try:
            with open_process(pid) as handle:
                scene.jobs.adopt(handle, job, soon())
        except AdoptionFailed as error:
            failures.append(error)

    try:
        for child in children:
            scene.host.process(child.pid, {})
        threads = [threading.Thread(target=adopt, args=(child.pid,)) for child in children]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert step.at_once_max == 1
        assert sorted(step.added) == sorted(child.pid for child in children)
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_nothing_is_kept_of_a_job_nobody_waits_for(scene: Scene) -> None:
    """Nodes run for months."""
    scene.step(5)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    turns = Turns()
    with turns.of(job, soon()), pytest.raises(AdoptionFailed, match="no turn in time"), turns.of(job, soon(1)):
        pass
    assert turns._queues == {}


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_adoption(scene: Scene, process: ProcessHandle, release: Release) -> None:
    """Into the one that was said, in every release; a second time it is left as it is."""
    step = scene.step(5, release=release)
    scene.step(6, release=release)
    job = next(job for job in scene.jobs.jobs_of(ALICE, soon()) if job.id == "5")
    for _ in range(2):
        scene.jobs.adopt(process, job, soon())
        assert adopted_in(scene, process) == ["5"]
    assert step.asked.count(ADD) == 1
    assert scene.jobs.session(job, False, False, soon()).environment == {"SLURM_JOB_ID": "5"}


def test_a_process_that_was_taken_out_of_one_hierarchy_is_put_back(scene: Scene, process: ProcessHandle) -> None:
    """As pam_systemd does between the account and the session phase."""
    step = scene.step(5)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    scene.host.process(process.pid, {"freezer": scene.path("freezer", 5)})
    scene.jobs.adopt(process, job, soon())
    assert step.added == [process.pid]
    assert adopted_in(scene, process) == ["5"]


def test_a_process_in_another_step_of_the_job_stays_there(scene: Scene, process: ProcessHandle) -> None:
    """What goes on inside a job is the job's business."""
    step = scene.step(5)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    scene.host.process(process.pid, {label: scene.path(label, 5, step="step_0") for label in scene.layout})
    scene.jobs.adopt(process, job, soon())
    assert ADD not in step.asked


@pytest.mark.parametrize("release", ["22.05", "25.11", "26.05"])
def test_adoption_on_cgroup_v2(tmp_path: Path, release: str) -> None:
    """Read back at system.slice/slurmstepd.scope."""
    with Scene(tmp_path, [V2]) as scene, subprocess.Popen(STAYS) as child:
        try:
            scene.host.process(child.pid, {V2: "/user.slice"})
            scene.step(5, release=BY_NAME[release], sluid=77)
            job = scene.jobs.jobs_of(ALICE, soon())[0]
            with open_process(child.pid) as handle:
                scene.jobs.adopt(handle, job, soon())
            assert f"{SLICE}/job_5/step_extern/user/task_0" in (scene.host.proc / f"{child.pid}/cgroup").read_text()
        finally:
            child.kill()


# X11 and namespaces


def test_x11_of_a_job_that_is_gone(scene: Scene) -> None:
    """An error, not "no tunnel"."""
    step = scene.step(5)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    step.end()
    with pytest.raises(JobManagerError, match="job 5"):
        scene.jobs.x11(job, soon())
    with pytest.raises(JobManagerError, match="job 5"):
        scene.jobs.namespaces(job, soon())


def test_x11(scene: Scene) -> None:
    """Display and authority file, in pieces too; None where there is no tunnel."""
    step = scene.step(5, fault=Fault.DRIBBLES)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    assert scene.jobs.x11(job, soon()) is None
    step.x11 = (53, "/tmp/xauth-5")
    assert scene.jobs.x11(job, soon()) == X11Display(53, "/tmp/xauth-5")
    step.x11 = (53, "")
    assert scene.jobs.x11(job, soon()) == X11Display(53, None)


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_namespaces(scene: Scene, release: Release) -> None:
    """Up to 25.05 the mount namespace, then all with their kinds; the older request is never left hanging."""
    descriptors = len(os.listdir("/proc/self/fd"))
    step = scene.step(5, release=release)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    assert scene.jobs.namespaces(job, soon()) == ()
    with open("/proc/self/ns/mnt") as mounts, open("/proc/self/ns/user") as users:
        step.namespaces = ((0x10000000, users.fileno()), (0x00020000, mounts.fileno()))
        found = scene.jobs.namespaces(job, soon())
        kinds = [0x10000000, 0x00020000] if release.has_sluid else [0x00020000]
        assert [each.kind for each in found] == kinds
        links = {each.kind: os.readlink(f"/proc/self/fd/{each.descriptor}") for each in found}
        assert links[0x00020000] == os.readlink("/proc/self/ns/mnt")
        assert not any(os.get_inheritable(each.descriptor) for each in found)
        for each in found:
            os.close(each.descriptor)
    step.end()
    assert len(os.listdir("/proc/self/fd")) - descriptors <= 1


def test_a_namespace_of_no_kind_leaves_nothing_open(scene: Scene) -> None:
    """The ones before it are closed."""
    step = scene.step(5, release=BY_NAME["25.11"])
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    descriptors = len(os.listdir("/proc/self/fd"))
    with open("/proc/self/ns/mnt") as mounts:
        step.namespaces = ((0x00020000, mounts.fileno()), (3, mounts.fileno()))
        with pytest.raises(JobManagerError, match="kind 0x3"):
            scene.jobs.namespaces(job, soon())
    step.end()
    assert len(os.listdir("/proc/self/fd")) <= descriptors


@pytest.mark.parametrize("release", ["22.05", "26.05"])
def test_an_adoption_for_a_session_is_one_conversation(scene: Scene, process: ProcessHandle, release: str) -> None:
    """One connection for the move, the display and the namespaces: each costs the step a thread, and a login time."""
    with open("/proc/self/ns/mnt") as held:
        step = scene.step(
            5, release=BY_NAME[release], x11=(53, "/tmp/xauth-5"), namespaces=[(CLONE_NEWNS, held.fileno())]
        )
        job = scene.jobs.jobs_of(ALICE, soon())[0]
        before = step._served
        given = scene.jobs.adopt_for_session(process, job, True, True, soon())
        assert step._served == before + 1
        with contextlib.closing(given):
            assert adopted_in(scene, process) == ["5"]
            assert given.environment["DISPLAY"] == "localhost:53.0"
            assert [os.fstat(each).st_ino for each in given.descriptors] == [os.fstat(held.fileno()).st_ino]


def test_a_display_that_is_not_told_costs_no_session(scene: Scene, process: ProcessHandle) -> None:
    """The namespaces are then asked for over a connection on which nothing is outstanding."""
    with open("/proc/self/ns/mnt") as held:
        step = scene.step(5, namespaces=[(CLONE_NEWNS, held.fileno())])
        step.x11 = (53, "x" * 100_000)
        job = scene.jobs.jobs_of(ALICE, soon())[0]
        before = step._served
        given = scene.jobs.adopt_for_session(process, job, True, True, soon())
        assert step._served == before + 2
        with contextlib.closing(given):
            assert "DISPLAY" not in given.environment
            assert len(given.descriptors) == 1


def test_who_waits_for_its_turn_does_not_wait_for_another_s_display(scene: Scene, process: ProcessHandle) -> None:
    """The turn is the adoption's alone."""
    step = scene.step(5)
    job = scene.jobs.jobs_of(ALICE, soon())[0]
    seen: List[bool] = []
    asked_x11 = StepConnection.x11

    def x11(connection: StepConnection, deadline: Deadline) -> Optional[X11Display]:
        with scene.jobs._adoptions._turns.of(job, soon()):
            seen.append(True)
        return asked_x11(connection, deadline)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepConnection, "x11", x11)
        scene.jobs.adopt_for_session(process, job, True, False, soon()).close()
    assert seen == [True]
    assert step.added == [process.pid]


def test_jobs_and_an_adoption_are_one_conversation(scene: Scene, process: ProcessHandle) -> None:
    """Asked whose it is, it takes the process in over the same connection."""
    step = scene.step(5, x11=(53, "/tmp/xauth-5"))
    with scene.jobs.here(ALICE, soon()) as here:
        (job,) = here.jobs
        given = here.adopt(process, job, True, False, soon())
    assert step._served == 1
    assert adopted_in(scene, process) == ["5"]
    assert given.environment["DISPLAY"] == "localhost:53.0"


def test_what_a_step_said_a_while_ago_is_asked_again(
    scene: Scene, process: ProcessHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a wait for a turn the job may be ending: nothing is adopted by what was true before it."""
    monkeypatch.setattr(slurm_adopt, "_HEARD_FOR_S", 0.0)
    step = scene.step(5)
    with scene.jobs.here(ALICE, soon()) as here:
        (job,) = here.jobs
        step.state = 3
        with pytest.raises(AdoptionFailed, match="job 5 is ending") as failure:
            here.adopt(process, job, False, False, soon())
    assert failure.value.fault is JobFault.JOB_ENDED
    assert step.added == []


def test_what_follows_a_failed_adoption_is_another_conversation(scene: Scene, process: ProcessHandle) -> None:
    """The answers to the first may still come: they are not taken for those to the second."""
    step = scene.step(5, fault=Fault.ADD_FAILS, x11=(53, "/tmp/xauth-5"))
    with scene.jobs.here(ALICE, soon()) as here:
        (job,) = here.jobs
        with pytest.raises(AdoptionFailed, match="error -1"):
            here.adopt(process, job, True, False, soon())
        step.fault = None
        given = here.adopt(process, job, True, False, soon())
    assert step._served == 2
    assert adopted_in(scene, process) == ["5"]
    assert given.environment["DISPLAY"] == "localhost:53.0"


def test_a_silent_step_is_asked_anew_for_the_adoption(scene: Scene, process: ProcessHandle) -> None:
    """It counts as a job by what it said before; over the connection it was silent on, nothing is read any more."""
    jobs = scene.backend(step_ms=300.0)
    step = scene.step(5)
    until(lambda: heard(jobs, ALICE) == ["5"], "the step to be heard")
    step.fault = Fault.HANGS
    with jobs.here(ALICE, soon()) as here:
        assert ids(here.jobs) == ["5"]
        step.fault = None
        here.adopt(process, here.jobs[0], False, False, soon()).close()
    assert adopted_in(scene, process) == ["5"]


@pytest.mark.parametrize("of", ["another daemon", "another user"])
def test_a_step_that_is_not_the_job_s_any_more_gets_no_process(scene: Scene, process: ProcessHandle, of: str) -> None:
    """The inode of a removed socket is given out again: with the job's id alone it is another job's, or another's."""
    step = scene.step(5)
    (job,) = scene.jobs.jobs_of(ALICE, soon())
    number, daemon, started, inode = job.identity
    theirs = {
        "another daemon": dataclasses.replace(job, identity=(number, daemon, started - 1, inode)),
        "another user": dataclasses.replace(job, uid=ALICE + 1),
    }
    with pytest.raises(AdoptionFailed, match="job 5 has ended"):
        scene.jobs.adopt(process, theirs[of], soon())
    assert ADD not in step.asked
    scene.jobs.adopt(process, job, soon())
    assert ADD in step.asked
