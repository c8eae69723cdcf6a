"""Jobs on this kernel's own cgroups, with real processes. Needs root and a cgroup hierarchy mounted whole.

Each test has a tree of its own, named after this process, in v2 and in the v1 controllers it asks for. Where
this host mounts no v1 controllers, the tests that are about them are skipped with that reason.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Sequence

import pytest

from adoptd.deadline import Deadline
from adoptd.hierarchy import HierarchyKind, path_of_id
from adoptd.jobs import CgroupFinding
from adoptd.jobs.cgroup import CgroupJobs
from adoptd.model import AdoptionFailed, Ambiguous, Job
from adoptd.process import ProcessHandle, open_process
from kernel.cgroup_tree import V2, Cgroups

ALICE, BOB = 61001, 61002
_THREADS = "import threading,sys\nfor _ in range(3): threading.Thread(target=sys.stdin.read).start()\nprint(flush=True)"


def soon() -> Deadline:
    return Deadline.after_ms(20_000)


@pytest.fixture
def victim(cgroups: Cgroups) -> Iterator[ProcessHandle]:
    """A process like a login's: somewhere outside every job."""
    with open_process(cgroups.child().pid) as handle:
        yield handle


def only_job(jobs: CgroupJobs, uid: int) -> Job:
    (job,) = jobs.jobs_of(uid, soon())
    return job


def test_a_failed_move_is_undone_everywhere(cgroups: Cgroups, victim: ProcessHandle) -> None:
    """A v1 cpuset without cpus takes no process (ENOSPC): the hierarchies already done are put back."""
    labels = cgroups.need(V2, "cpuset", "memory")
    path = cgroups.job(ALICE, "5", labels)
    home = f"{cgroups.top}/home"
    cgroups.make(home, [V2])
    cgroups.at(V2, f"{home}/cgroup.procs").write_text(str(victim.pid))
    before = cgroups.where(victim.pid)
    jobs = cgroups.jobs()
    with pytest.raises(AdoptionFailed) as caught:
        jobs.adopt(victim, only_job(jobs, ALICE), soon())
    message = str(caught.value)
    assert f"{path} in hierarchy cpuset" in message
    assert "ENOSPC" in message
    assert "cpuset.cpus" in message
    assert message.endswith("put back where it was")
    assert cgroups.where(victim.pid) == before
    assert before[V2] == home


def test_a_v2_cgroup_that_may_not_hold_processes_says_so(cgroups: Cgroups, victim: ProcessHandle) -> None:
    """A domain beside threaded cgroups is invalid (EOPNOTSUPP): the message tells to set the leaf."""
    labels = cgroups.need(V2)
    path = cgroups.job(ALICE, "5", labels)
    cgroups.make(f"{cgroups.top}/uid_{ALICE}/threads", labels)
    cgroups.at(V2, f"{cgroups.top}/uid_{ALICE}/threads/cgroup.type").write_text("threaded")
    before = cgroups.where(victim.pid)
    jobs = cgroups.jobs()
    with pytest.raises(AdoptionFailed, match="set `leaf`") as caught:
        jobs.adopt(victim, only_job(jobs, ALICE), soon())
    assert f"{path} in hierarchy v2" in str(caught.value)
    assert cgroups.where(victim.pid) == before


def test_a_job_removed_and_made_again_is_not_adopted_into(cgroups: Cgroups, victim: ProcessHandle) -> None:
    """Same path, another job: the kernel never gives its inode number again."""
    labels = cgroups.need(*_some(cgroups))
    path = cgroups.job(ALICE, "5", labels)
    jobs = cgroups.jobs()
    old = only_job(jobs, ALICE)
    cgroups.remove(path)
    with pytest.raises(AdoptionFailed, match="is gone"):
        jobs.adopt(victim, old, soon())
    cgroups.job(ALICE, "5", labels)
    before = cgroups.where(victim.pid)
    with pytest.raises(AdoptionFailed, match="is gone"):
        jobs.adopt(victim, old, soon())
    assert cgroups.where(victim.pid) == before
    new = only_job(jobs, ALICE)
    assert new.created > old.created
    jobs.adopt(victim, new, soon())
    assert jobs.contains(new, victim.pid)
    assert not jobs.contains(old, victim.pid)


def test_a_user_cannot_make_a_job(cgroups: Cgroups) -> None:
    """alice owns uid_ALICE in one hierarchy, makes job_999 there and moves herself in: she is in no job."""
    label = next(iter(_some(cgroups)))
    cgroups.make(f"{cgroups.top}/uid_{ALICE}", [label], owner=ALICE)
    cgroups.make(f"{cgroups.top}/uid_{BOB}/job_6", [label])
    made = cgroups.at(label, f"{cgroups.top}/uid_{ALICE}/job_999")
    alice = f"import os; os.setuid({ALICE}); os.mkdir({str(made)!r})"
    subprocess.run([sys.executable, "-c", alice], check=True, cwd="/")
    child = cgroups.child()
    (made / "cgroup.procs").write_text(str(child.pid))
    jobs = cgroups.jobs()
    assert jobs.jobs_of(ALICE, soon()) == ()
    assert [job.id for job in jobs.all_jobs(soon())] == ["6"]
    assert jobs.job_of_process(child.pid) is None
    forged = Job("999", ALICE, made.stat().st_ino, (cgroups.hierarchies[label].number, made.stat().st_ino))
    assert not jobs.contains(forged, child.pid)
    with open_process(child.pid) as process, pytest.raises(AdoptionFailed, match="gone"):
        jobs.adopt(process, forged, soon())


def test_a_job_owned_by_another_user_is_nobodys(cgroups: Cgroups) -> None:
    """The path says alice, the kernel says bob."""
    labels = _some(cgroups)
    path = cgroups.job(ALICE, "5", labels)
    cgroups.make(path, labels[-1:], owner=BOB)
    jobs = cgroups.jobs()
    assert jobs.jobs_of(ALICE, soon()) == jobs.jobs_of(BOB, soon()) == ()
    cgroups.make(path, labels, owner=ALICE)
    assert only_job(jobs, ALICE).id == "5"


@pytest.mark.parametrize("reaped", [False, True])
def test_a_killed_process_is_not_adopted(cgroups: Cgroups, reaped: bool) -> None:
    """Zombie or gone: the failure says exited, and nothing is in the job."""
    labels = _some(cgroups)
    path = cgroups.job(ALICE, "5", labels)
    jobs = cgroups.jobs()
    child = cgroups.child()
    with open_process(child.pid) as process:
        child.send_signal(signal.SIGKILL)
        if reaped:
            child.wait()
        else:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(AdoptionFailed, match=f"process {child.pid} has exited"):
            jobs.adopt(process, only_job(jobs, ALICE), soon())
    assert all(cgroups.at(label, f"{path}/cgroup.procs").read_text() == "" for label in labels)


def test_killing_processes_during_adoption_leaves_a_clear_answer(cgroups: Cgroups) -> None:
    """Twenty killed at about the moment they are moved: each is in the job or its failure says exited."""
    cgroups.job(ALICE, "5", _some(cgroups))
    jobs = cgroups.jobs()
    job = only_job(jobs, ALICE)
    outcomes: List[str] = []
    for _ in range(20):
        child = cgroups.child()
        with open_process(child.pid) as process:
            killer = subprocess.Popen(["/bin/kill", "-KILL", str(child.pid)])
            try:
                outcomes.append(_outcome(jobs, process, job))
            finally:
                killer.wait()
    assert [each for each in outcomes if each and "has exited" not in each and "ESRCH" not in each] == []


def test_a_process_named_by_two_jobs_is_ambiguous(cgroups: Cgroups) -> None:
    """v2 says 5, v1 says 6."""
    cgroups.need(V2, "pids")
    child = cgroups.child()
    for label, job_id in ((V2, "5"), ("pids", "6")):
        path = cgroups.job(ALICE, job_id, [label])
        cgroups.at(label, f"{path}/cgroup.procs").write_text(str(child.pid))
    with pytest.raises(Ambiguous, match="5, 6"):
        cgroups.jobs().job_of_process(child.pid)


def test_a_cgroup_id_tells_the_job_no_job_or_nothing(cgroups: Cgroups) -> None:
    """NO_JOB and GONE only while jobs are in v2 alone; the root and v1-only jobs tell nothing."""
    cgroups.need(V2)
    jobs = cgroups.jobs()
    outside = f"{cgroups.top}-outside"
    ids: Dict[str, int] = {}
    try:
        cgroups.make(outside, [V2])
        ids["outside"] = cgroups.at(V2, outside).stat().st_ino
        assert jobs.job_of_cgroup(ids["outside"]).finding is CgroupFinding.CANNOT_TELL
        path = cgroups.job(ALICE, "5", [V2])
        cgroups.make(f"{path}/below", [V2])
        ids["below"] = cgroups.at(V2, f"{path}/below").stat().st_ino
        verdict = jobs.job_of_cgroup(ids["below"])
        assert verdict.finding is CgroupFinding.JOB
        assert verdict.job == only_job(jobs, ALICE)
        assert jobs.job_of_cgroup(ids["outside"]).finding is CgroupFinding.NO_JOB
        assert jobs.job_of_cgroup(cgroups.at(V2, "/").stat().st_ino).finding is CgroupFinding.CANNOT_TELL
        cgroups.make(path, [V2], owner=BOB)
        assert jobs.job_of_cgroup(ids["below"]).finding is CgroupFinding.NO_JOB
        cgroups.remove(path)
        assert jobs.job_of_cgroup(ids["below"]).finding is CgroupFinding.GONE
        cgroups.job(ALICE, "5", cgroups.need(V2, "pids"))
        for name in ("outside", "below"):
            assert jobs.job_of_cgroup(ids[name]).finding is CgroupFinding.CANNOT_TELL
    finally:
        cgroups.remove(outside)


def test_an_id_is_found_through_a_mount_elsewhere(cgroups: Cgroups, tmp_path: Path) -> None:
    """In a mount namespace that binds the hierarchy to another place, with the first one covered."""
    cgroups.need(V2)
    cgroups.make(f"{cgroups.top}/a:b (x)", [V2])
    cgroup_id = cgroups.at(V2, f"{cgroups.top}/a:b (x)").stat().st_ino
    unified = cgroups.hierarchies[V2]
    assert path_of_id(unified, cgroup_id) == f"{cgroups.top}/a:b (x)"
    assert path_of_id(unified, cgroup_id + 1) is None  # one of the files inside it
    script = (
        "import sys; from adoptd.hierarchy import *; import subprocess as s\n"
        "source, place, number = sys.argv[1:]\n"
        "s.run(['mount', '--bind', source, place], check=True)\n"
        "s.run(['mount', '-t', 'tmpfs', 'none', source], check=True)\n"
        "v2 = [h for h in read_hierarchies() if h.kind is HierarchyKind.V2]\n"
        "print([h.mount_point for h in v2], path_of_id(v2[0], int(number)))\n"
    )
    place = tmp_path / "place with space"
    place.mkdir()
    command = ["unshare", "-m", sys.executable, "-c", script, unified.mount_point, str(place), str(cgroup_id)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, cwd="/", text=True)
    assert done.stdout == f"[{str(place)!r}] {cgroups.top}/a:b (x)\n"


def test_inode_numbers_only_go_up(cgroups: Cgroups) -> None:
    """In every hierarchy, also for a name used again: what identity and "newest" rest on."""
    labels = list(cgroups.hierarchies)
    seen: Dict[str, List[int]] = {label: [] for label in labels}
    for name in ("a", "b", "c", "b", "a", "a"):
        if cgroups.at(labels[0], f"{cgroups.top}/{name}").exists():
            cgroups.remove(f"{cgroups.top}/{name}")
        cgroups.make(f"{cgroups.top}/{name}", labels)
        for label in labels:
            seen[label].append(cgroups.at(label, f"{cgroups.top}/{name}").stat().st_ino)
    for label in labels:
        assert seen[label] == sorted(set(seen[label])), label


def test_newest_is_the_one_made_last(cgroups: Cgroups, victim: ProcessHandle) -> None:
    """Whatever the ids are called, and whatever happened in the older ones since."""
    labels = _some(cgroups)
    for job_id in ("10", "9", "11"):
        cgroups.job(ALICE, job_id, labels)
    jobs = cgroups.jobs()
    cgroups.make(f"{cgroups.top}/uid_{ALICE}/job_10/later", labels)
    assert [job.id for job in jobs.jobs_of(ALICE, soon())] == ["11", "9", "10"]
    jobs.adopt(victim, jobs.jobs_of(ALICE, soon())[0], soon())
    found = jobs.job_of_process(victim.pid)
    assert found is not None
    assert found.id == "11"


def test_a_process_is_adopted_whole_and_everywhere(cgroups: Cgroups) -> None:
    """Every thread, in every hierarchy that has the job, and in no other."""
    labels = _some(cgroups)
    path = cgroups.job(ALICE, "5", labels)
    child = cgroups.child(sys.executable, "-c", _THREADS)
    assert child.stdout is not None
    child.stdout.readline()
    before = cgroups.where(child.pid)
    jobs = cgroups.jobs()
    job = only_job(jobs, ALICE)
    with open_process(child.pid) as process:
        jobs.adopt(process, job, soon())
    expected = {label: path if label in labels else before[label] for label in cgroups.hierarchies}
    tasks = os.listdir(f"/proc/{child.pid}/task")
    assert len(tasks) == 4
    for task in tasks:
        assert cgroups.where(int(task)) == expected
    assert jobs.job_of_process(child.pid) == job
    assert jobs.contains(job, child.pid)


def test_a_leaf_is_adopted_into_and_what_is_below_stays(cgroups: Cgroups, victim: ProcessHandle) -> None:
    """Twice is once; a process that the job has moved further down is left there."""
    labels = _some(cgroups)
    path = cgroups.job(ALICE, "5", labels)
    cgroups.make(f"{path}/step/user/deeper", labels)
    jobs = cgroups.jobs(leaf="step/user")
    job = only_job(jobs, ALICE)
    jobs.adopt(victim, job, soon())
    jobs.adopt(victim, job, soon())
    assert {cgroups.where(victim.pid)[label] for label in labels} == {f"{path}/step/user"}
    for label in labels:
        cgroups.at(label, f"{path}/step/user/deeper/cgroup.procs").write_text(str(victim.pid))
    jobs.adopt(victim, job, Deadline.after_ms(-1))
    assert {cgroups.where(victim.pid)[label] for label in labels} == {f"{path}/step/user/deeper"}


def test_without_uid_the_directory_says_whose_it_is(cgroups: Cgroups, victim: ProcessHandle) -> None:
    """root's is nobody's; given to alice it is hers, and only hers."""
    labels = _some(cgroups)
    cgroups.make(f"{cgroups.top}/job_5", labels)
    jobs = cgroups.jobs("/job_{job}")
    assert jobs.all_jobs(soon()) == ()
    cgroups.make(f"{cgroups.top}/job_5", labels, owner=ALICE)
    assert jobs.jobs_of(BOB, soon()) == ()
    job = only_job(jobs, ALICE)
    with pytest.raises(AdoptionFailed, match="gone"):
        jobs.adopt(victim, Job("5", BOB, job.created, job.identity), soon())
    jobs.adopt(victim, job, soon())
    assert jobs.job_of_process(victim.pid) == job


def test_a_controller_mounted_later_is_seen(cgroups: Cgroups) -> None:
    """Any change of the mounts makes the list be read again: here in a child's own mount namespace."""
    cgroups.need(V2)
    script = (
        "import subprocess as s; from adoptd.hierarchy import *\n"
        "mounts = CgroupMounts(); v2 = mounts.hierarchies()[0]\n"
        "assert v2.kind is HierarchyKind.V2\n"
        "s.run(['umount', '-l', v2.mount_point], check=True)\n"
        "assert v2 not in mounts.hierarchies()\n"
        "s.run(['mount', '-t', 'cgroup2', 'none', v2.mount_point], check=True)\n"
        "assert v2 in mounts.hierarchies()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run(["unshare", "-m", sys.executable, "-c", script], check=True, env=environment, cwd="/")


def _outcome(jobs: CgroupJobs, process: ProcessHandle, job: Job) -> str:
    """Why the adoption failed, "" if it did not."""
    try:
        jobs.adopt(process, job, soon())
    except AdoptionFailed as failure:
        return str(failure)
    return ""


def _some(cgroups: Cgroups) -> Sequence[str]:
    """Hierarchies for a job: v2 where mounted, and v1 controllers that take processes without being set up."""
    labels = [
        label
        for label, each in cgroups.hierarchies.items()
        if each.kind is HierarchyKind.V2 or label in ("memory", "pids", "freezer")
    ]
    assert labels, "no cgroup hierarchy that a job could be in"
    return labels
