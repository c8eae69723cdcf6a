"""Jobs on plain cgroups, on fake trees: v1 only, v2 only and both. Needs root, to give directories away."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, Tuple

import pytest

from adoptd.deadline import Deadline
from adoptd.hierarchy import Hierarchy, HierarchyKind, open_root
from adoptd.jobs import CgroupFinding, CgroupVerdict
from adoptd.jobs import cgroup as cgroup_module
from adoptd.jobs import directories as directories_module
from adoptd.jobs.cgroup import CgroupJobs
from adoptd.jobs.template import JobPath
from adoptd.model import AdoptionFailed, Ambiguous, Job, JobFault, JobManagerError
from adoptd.process import open_process
from fake_cgroups import V2, FakeHost

ALICE, BOB = 1001, 1002
V1_ONLY = ["cpu,cpuacct", "memory", "name=systemd"]
V2_ONLY = [V2]
HYBRID = [V2, "memory", "pids"]
LAYOUTS = pytest.mark.parametrize("layout", [V1_ONLY, V2_ONLY, HYBRID], ids=["v1", "v2", "hybrid"])
WITH_UID = "/jobs/uid_{uid}/job_{job}"
WITHOUT_UID = "/jobs/job_{job}"


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    """Every question closes what it opened, whatever came of it."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) - before <= 1  # the watched mountinfo of the host under test


def soon() -> Deadline:
    return Deadline.after_ms(5000)


def jobs_on(host: FakeHost, template: str = WITH_UID, leaf: str = "") -> CgroupJobs:
    return CgroupJobs(JobPath.parse_template(template), leaf, host.mounts)


def ids(jobs: Sequence[Job]) -> List[Tuple[int, str]]:
    return [(job.uid, job.id) for job in jobs]


def warnings(caplog: pytest.LogCaptureFixture) -> List[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@LAYOUTS
def test_a_directory_of_jobs_that_the_user_owns_gives_no_job(
    tmp_path: Path, layout: Sequence[str], caplog: pytest.LogCaptureFixture
) -> None:
    """alice, who was given uid_1001, can make job_999 there: it is not hers, and the reason is logged once."""
    host = FakeHost(tmp_path, layout)
    host.cgroup(f"/jobs/uid_{ALICE}/job_999", owner=ALICE)
    host.cgroup(f"/jobs/uid_{ALICE}", owner=ALICE)
    jobs = jobs_on(host)
    host.process(7, dict.fromkeys(layout, f"/jobs/uid_{ALICE}/job_999"))
    for _ in range(2):
        assert jobs.jobs_of(ALICE, soon()) == ()
        assert jobs.all_jobs(soon()) == ()
        assert jobs.job_of_process(7) is None
    assert len(warnings(caplog)) == len(layout)
    assert "owned by uid 1001, not by root" in warnings(caplog)[0]


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
@pytest.mark.parametrize("path", ["/jobs", f"/jobs/uid_{ALICE}"])
def test_a_directory_that_others_can_write_to_gives_no_job(tmp_path: Path, path: str, mode: int) -> None:
    """Group or others: either could make the job's directory."""
    host = FakeHost(tmp_path, HYBRID)
    host.cgroup(f"/jobs/uid_{ALICE}/job_5")
    jobs = jobs_on(host)
    assert ids(jobs.jobs_of(ALICE, soon())) == [(ALICE, "5")]
    host.cgroup(path, mode=mode)
    assert jobs.jobs_of(ALICE, soon()) == ()
    assert jobs.all_jobs(soon()) == ()


def test_a_job_refused_in_one_hierarchy_is_refused_in_all(tmp_path: Path) -> None:
    """One delegated v1 controller is enough to lie with; the other user's jobs are not harmed."""
    host = FakeHost(tmp_path, HYBRID)
    host.cgroup(f"/jobs/uid_{ALICE}/job_5")
    host.cgroup(f"/jobs/uid_{BOB}/job_6")
    host.cgroup(f"/jobs/uid_{ALICE}", owner=ALICE, only=["pids"])
    host.cgroup(f"/jobs/uid_{ALICE}/job_999", only=["pids"])
    jobs = jobs_on(host)
    assert jobs.jobs_of(ALICE, soon()) == ()
    assert ids(jobs.all_jobs(soon())) == [(BOB, "6")]


def test_a_job_of_another_owner_is_no_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The path says alice, the directory bob: neither of them gets it."""
    host = FakeHost(tmp_path, HYBRID)
    host.cgroup(f"/jobs/uid_{ALICE}/job_5")
    host.cgroup(f"/jobs/uid_{ALICE}/job_5", owner=BOB, only=["memory"])
    host.process(7, {V2: f"/jobs/uid_{ALICE}/job_5"})
    jobs = jobs_on(host)
    assert jobs.jobs_of(ALICE, soon()) == jobs.jobs_of(BOB, soon()) == ()
    assert jobs.job_of_process(7) is None
    assert len(warnings(caplog)) == 1
    assert "owned by uid 1002, not by uid 1001" in warnings(caplog)[0]


def test_without_uid_a_job_of_roots_is_nobodys(tmp_path: Path) -> None:
    """Neither root's nor anybody's; and one with two owners is neither's."""
    host = FakeHost(tmp_path, HYBRID)
    host.cgroup("/jobs/job_5")
    host.cgroup("/jobs/job_6", owner=ALICE)
    host.cgroup("/jobs/job_6", owner=BOB, only=["memory"])
    jobs = jobs_on(host, WITHOUT_UID)
    assert jobs.all_jobs(soon()) == jobs.jobs_of(0, soon()) == jobs.jobs_of(ALICE, soon()) == ()


def test_a_link_is_no_job(tmp_path: Path) -> None:
    """Nothing on the way to a job is followed, not even to a job."""
    host = FakeHost(tmp_path, V2_ONLY)
    host.cgroup(f"/jobs/uid_{ALICE}/job_5")
    users = host.roots[V2] / "jobs"
    (users / f"uid_{ALICE}" / "job_6").symlink_to("job_5")
    (users / f"uid_{BOB}").symlink_to(f"uid_{ALICE}")
    jobs = jobs_on(host)
    assert ids(jobs.all_jobs(soon())) == [(ALICE, "5")]
    assert jobs.jobs_of(BOB, soon()) == ()
    with pytest.raises(AdoptionFailed, match="gone"), open_process(os.getpid()) as process:
        jobs.adopt(process, Job("6", ALICE, 1, (0, 1)), soon())


FREEZER = "freezer"
SOURCES = [
    pytest.param([FREEZER, "memory"], FREEZER, "freezer.state", "FROZEN\n", "THAWED\n", 4, id="v1"),
    pytest.param([FREEZER, "memory"], FREEZER, "freezer.state", "FREEZING\n", "", 4, id="v1, on its way"),
    *(pytest.param(HYBRID, V2, "cgroup.freeze", "1\n", "0\n", depth, id=f"v2, {depth} down") for depth in (1, 2, 3, 4)),
]


@pytest.mark.parametrize(("layout", "label", "name", "frozen", "thawed", "depth"), SOURCES)
def test_a_job_that_stands_still_is_apart(
    tmp_path: Path, layout: Sequence[str], label: str, name: str, frozen: str, thawed: str, depth: int
) -> None:
    """By the leaf that sessions go into, and in v2 by what is above it. It is the user's job all the same."""
    host = FakeHost(tmp_path, layout)
    leaf = f"/jobs/uid_{ALICE}/job_5/ssh"
    host.cgroup(leaf)
    host.cgroup(f"/jobs/uid_{ALICE}/job_6/other")
    host.cgroup(f"/jobs/uid_{BOB}/job_7/ssh")
    jobs = jobs_on(host, leaf="ssh")
    file = host.roots[label].joinpath(*leaf.split("/")[1 : depth + 1], name)
    for text in ("", frozen, thawed):
        file.write_text(text)
        with jobs.here(ALICE, soon()) as here:
            assert set(here.jobs + here.suspended) == set(jobs.jobs_of(ALICE, soon()))
            # What is above the user's jobs stops all that have the leaf there.
            assert [job.id for job in here.suspended] == (["5"] if text == frozen else [])
            assert [job.id for job in here.jobs] == (["6"] if text == frozen else ["6", "5"])
    file.write_text(frozen)
    with jobs.here(BOB, soon()) as here:
        assert [job.id for job in here.suspended] == (["7"] if depth == 1 else [])


def test_what_is_frozen_where_nobody_goes_is_no_matter(tmp_path: Path) -> None:
    """Another leaf of the job, the file of the other interface, and a hierarchy without the job."""
    host = FakeHost(tmp_path, [V2, FREEZER, "memory"])
    host.cgroup(f"/jobs/uid_{ALICE}/job_5/ssh", only=["memory"])
    host.cgroup("/jobs", only=[V2])
    (host.roots[V2] / "jobs" / "cgroup.freeze").write_text("1\n")
    for name, text in (("freezer.state", "FROZEN\n"), ("cgroup.freeze", "1\n")):
        (host.roots["memory"] / f"jobs/uid_{ALICE}/job_5/ssh" / name).write_text(text)
    with jobs_on(host, leaf="ssh").here(ALICE, soon()) as here:
        assert ([job.id for job in here.jobs], here.suspended) == (["5"], ())


def test_a_login_is_not_put_into_a_job_that_was_suspended_since_it_was_listed(tmp_path: Path) -> None:
    """The check comes before anything of the process is touched."""
    host = FakeHost(tmp_path, [FREEZER])
    path = f"/jobs/uid_{ALICE}/job_5"
    host.cgroup(path)
    jobs = jobs_on(host)
    procs = host.roots[FREEZER] / path[1:] / "cgroup.procs"
    with open_process(os.getpid()) as process, jobs.here(ALICE, soon()) as here:
        host.process(process.pid, {})
        (host.roots[FREEZER] / path[1:] / "freezer.state").write_text("FROZEN\n")
        with pytest.raises(AdoptionFailed, match="job 5 is suspended") as failure:
            here.adopt(process, here.jobs[0], False, False, soon())
        assert failure.value.fault is JobFault.JOB_ENDED
        assert procs.read_text() == ""


def test_names_that_are_no_jobs_are_passed_over(tmp_path: Path) -> None:
    """Files, other directories and near misses beside real jobs."""
    host = FakeHost(tmp_path, V2_ONLY)
    for name in ("job_5", "job_", "xjob_6", "job_7 ", "job_-8", "other"):
        host.cgroup(f"/jobs/uid_{ALICE}/{name}")
    host.cgroup(f"/jobs/uid_0{ALICE}/job_9")
    host.cgroup("/jobs/uid_4294967295/job_9")
    (host.roots[V2] / f"jobs/uid_{ALICE}/job_10").touch()
    assert ids(jobs_on(host).all_jobs(soon())) == [(ALICE, "5")]


def test_no_directory_of_jobs_anywhere_is_no_jobs_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A manager may make it with the first job; a typing error must still be seen. Said again if it goes again."""
    host = FakeHost(tmp_path, HYBRID)
    jobs = jobs_on(host)
    for _ in range(2):
        assert jobs.jobs_of(ALICE, soon()) == jobs.all_jobs(soon()) == ()
    assert len(warnings(caplog)) == 1
    assert "/jobs is in no cgroup hierarchy" in warnings(caplog)[0]
    host.cgroup("/jobs", only=["pids"])
    assert jobs.jobs_of(ALICE, soon()) == ()
    (host.roots["pids"] / "jobs" / "cgroup.procs").unlink()
    (host.roots["pids"] / "jobs").rmdir()
    assert jobs.jobs_of(ALICE, soon()) == ()
    assert len(warnings(caplog)) == 2


def test_no_hierarchy_at_all_is_a_failure(tmp_path: Path) -> None:
    """It is not "no jobs"."""
    jobs = jobs_on(FakeHost(tmp_path, []))
    with pytest.raises(JobManagerError, match="no cgroup hierarchy"):
        jobs.jobs_of(ALICE, soon())
    with pytest.raises(JobManagerError, match="no cgroup hierarchy"):
        jobs.all_jobs(soon())


def test_a_hierarchy_that_went_away_is_a_failure(tmp_path: Path) -> None:
    """Known a moment ago and not there now: the jobs in it cannot be told."""
    host = FakeHost(tmp_path, HYBRID)
    jobs = jobs_on(host)
    assert jobs.jobs_of(ALICE, soon()) == ()
    host.roots["memory"].rmdir()
    with pytest.raises(JobManagerError, match="memory"):
        jobs.jobs_of(ALICE, soon())


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO])
def test_a_directory_removed_while_being_read_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The last job's end may take its user's directory along; any other error is a failure."""
    host = FakeHost(tmp_path, V2_ONLY)
    host.cgroup(f"/jobs/uid_{ALICE}")
    jobs = jobs_on(host)

    def fails(descriptor: int) -> Iterator[None]:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", fails)
        if number == errno.ENOENT:
            assert jobs.jobs_of(ALICE, soon()) == ()
        else:
            with pytest.raises(JobManagerError, match="hierarchy v2"):
                jobs.jobs_of(ALICE, soon())


def test_too_many_entries_or_too_late_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded in number and in time."""
    host = FakeHost(tmp_path, V2_ONLY)
    for number in range(20):
        host.cgroup(f"/jobs/uid_{ALICE}/job_{number}")
    jobs = jobs_on(host)
    with pytest.raises(JobManagerError, match="in time"):
        jobs.jobs_of(ALICE, Deadline.after_ms(-1))
    assert len(jobs.jobs_of(ALICE, soon())) == 20
    monkeypatch.setattr(directories_module, "ENTRIES_MAX", 10)
    with pytest.raises(JobManagerError, match="more than 10"):
        jobs.jobs_of(ALICE, soon())


def test_a_process_in_two_jobs_is_in_neither(tmp_path: Path) -> None:
    """Two hierarchies, two believed jobs: no answer."""
    host = FakeHost(tmp_path, HYBRID)
    host.cgroup(f"/jobs/uid_{ALICE}/job_5")
    host.cgroup(f"/jobs/uid_{ALICE}/job_6")
    host.process(7, {V2: f"/jobs/uid_{ALICE}/job_5", "pids": f"/jobs/uid_{ALICE}/job_6"})
    with pytest.raises(Ambiguous, match="5, 6"):
        jobs_on(host).job_of_process(7)


def test_hierarchies_that_name_no_job_or_a_refused_one_do_not_count(tmp_path: Path) -> None:
    """alice cannot get out of her job by making one where she may."""
    host = FakeHost(tmp_path, HYBRID)
    host.cgroup(f"/jobs/uid_{ALICE}/job_5", only=[V2])
    host.cgroup(f"/jobs/uid_{ALICE}/job_999", owner=ALICE, only=["pids"])
    host.cgroup(f"/jobs/uid_{ALICE}", owner=ALICE, only=["pids"])
    jobs = jobs_on(host)
    host.process(7, {V2: f"/jobs/uid_{ALICE}/job_5/sub/x:y", "pids": f"/jobs/uid_{ALICE}/job_999"})
    found = jobs.job_of_process(7)
    assert found is not None
    assert (found.id, found.uid) == ("5", ALICE)
    host.process(7, {V2: f"/x/jobs/uid_{ALICE}/job_5"})
    assert jobs.job_of_process(7) is None
    host.process(7, {V2: f"/jobs/uid_{ALICE}/job_5 (deleted)"})
    assert jobs.job_of_process(7) is None
    assert jobs.job_of_process(8) is None


def test_a_job_remade_is_another_job(tmp_path: Path) -> None:
    """Same path, other inode: not adopted into, not contained."""
    host = FakeHost(tmp_path, HYBRID)
    path = f"/jobs/uid_{ALICE}/job_5"
    host.cgroup(path)
    host.process(os.getpid(), dict.fromkeys(HYBRID, path))
    jobs = jobs_on(host)
    (old,) = jobs.jobs_of(ALICE, soon())
    assert jobs.contains(old, os.getpid())
    directory = host.roots["pids"] / path[1:]
    directory.rename(directory.with_name("old"))
    host.cgroup(path)
    (new,) = jobs.jobs_of(ALICE, soon())
    assert new.identity != old.identity
    assert not jobs.contains(old, os.getpid())
    assert jobs.contains(new, os.getpid())
    with open_process(os.getpid()) as process:
        with pytest.raises(AdoptionFailed, match="job 5 of uid 1001 is gone"):
            jobs.adopt(process, old, soon())
        jobs.adopt(process, new, soon())


def test_a_job_that_has_come_to_another_hierarchy_is_still_the_same(tmp_path: Path) -> None:
    """Seen while its manager was still making it; one that has left a hierarchy is ending."""
    host = FakeHost(tmp_path, HYBRID)
    path = f"/jobs/uid_{ALICE}/job_5"
    host.cgroup(path, only=[V2])
    jobs = jobs_on(host)
    (early,) = jobs.jobs_of(ALICE, soon())
    host.cgroup(path)
    (late,) = jobs.jobs_of(ALICE, soon())
    host.process(7, dict.fromkeys(HYBRID, path))
    assert jobs.contains(early, 7)
    assert jobs.contains(late, 7)
    host.process(7, {V2: path})
    assert not jobs.contains(early, 7)
    host.process(7, dict.fromkeys(HYBRID, path))
    directory = host.roots["pids"] / path[1:]
    (directory / "cgroup.procs").unlink()
    directory.rmdir()
    assert jobs.contains(early, 7)
    assert not jobs.contains(late, 7)


def test_a_move_that_does_not_show_is_a_failure(tmp_path: Path) -> None:
    """A write that succeeds and moves nothing is found by reading back."""
    host = FakeHost(tmp_path, HYBRID)
    host.cgroup(f"/jobs/uid_{ALICE}/job_5")
    host.cgroup("/home")
    host.process(os.getpid(), dict.fromkeys(HYBRID, "/home"))
    jobs = jobs_on(host)
    (job,) = jobs.jobs_of(ALICE, soon())
    with open_process(os.getpid()) as process, pytest.raises(AdoptionFailed) as caught:
        jobs.adopt(process, job, soon())
    assert "is in '/home' of hierarchy v2" in str(caught.value)
    assert "put back where it was" in str(caught.value)


@pytest.mark.parametrize("origin", ["/../outside", "/home (deleted)"])
def test_a_process_that_could_not_be_put_back_is_not_moved(tmp_path: Path, origin: str) -> None:
    """Outside our cgroup namespace or in a removed cgroup: nothing is written."""
    host = FakeHost(tmp_path, V2_ONLY)
    path = f"/jobs/uid_{ALICE}/job_5"
    host.cgroup(path)
    host.process(os.getpid(), {V2: origin})
    jobs = jobs_on(host)
    (job,) = jobs.jobs_of(ALICE, soon())
    with open_process(os.getpid()) as process, pytest.raises(AdoptionFailed, match="put back"):
        jobs.adopt(process, job, soon())
    assert (host.roots[V2] / path[1:] / "cgroup.procs").read_text() == ""


def test_a_missing_leaf_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    """It must be in each hierarchy that has the job."""
    host = FakeHost(tmp_path, HYBRID)
    path = f"/jobs/uid_{ALICE}/job_5"
    host.cgroup(path)
    host.cgroup(f"{path}/step/user", only=[V2, "pids"])
    host.cgroup("/home")
    host.process(os.getpid(), dict.fromkeys(HYBRID, "/home"))
    jobs = jobs_on(host, leaf="step/user")
    (job,) = jobs.jobs_of(ALICE, soon())
    with open_process(os.getpid()) as process, pytest.raises(AdoptionFailed) as caught:
        jobs.adopt(process, job, soon())
    assert f"leaf {path}/step/user in hierarchy memory" in str(caught.value)
    assert all((root / path[1:] / "cgroup.procs").read_text() == "" for root in host.roots.values())


def test_a_late_adoption_moves_nothing(tmp_path: Path) -> None:
    """The deadline is looked at before each move."""
    host = FakeHost(tmp_path, HYBRID)
    host.cgroup(f"/jobs/uid_{ALICE}/job_5")
    host.process(os.getpid(), {})
    for root in host.roots.values():
        (root / "cgroup.procs").touch()
    jobs = jobs_on(host)
    (job,) = jobs.jobs_of(ALICE, soon())
    with open_process(os.getpid()) as process, pytest.raises(AdoptionFailed, match="in time"):
        jobs.adopt(process, job, Deadline.after_ms(-1))


@pytest.mark.parametrize(
    ("job", "why"),
    [
        (Job("../x", ALICE, 1, (0, 1)), "job id"),
        (Job("5", -1, 1, (0, 1)), "uid -1"),
        (Job("5", ALICE, 1, ()), "gone"),
        (Job("5", ALICE, 1, (0, 1)), "gone"),
        (Job("6", ALICE, 1, (0, 1)), "gone"),
        (Job("5", BOB, 1, (0, 1)), "gone"),
    ],
)
def test_a_job_that_cannot_be_is_not_adopted_into(tmp_path: Path, job: Job, why: str) -> None:
    """A Job from anywhere is checked like any other."""
    host = FakeHost(tmp_path, V2_ONLY)
    host.cgroup(f"/jobs/uid_{ALICE}/job_5")
    jobs = jobs_on(host)
    host.process(os.getpid(), {V2: f"/jobs/uid_{ALICE}/job_5"})
    assert not jobs.contains(job, os.getpid())
    with open_process(os.getpid()) as process, pytest.raises(AdoptionFailed, match=why):
        jobs.adopt(process, job, soon())


def test_a_job_whose_name_only_begins_alike_is_another(tmp_path: Path) -> None:
    """Being in job 55 is not being in job 5."""
    host = FakeHost(tmp_path, V2_ONLY)
    host.cgroup(f"/jobs/uid_{ALICE}/job_5")
    host.cgroup(f"/jobs/uid_{ALICE}/job_55")
    host.process(os.getpid(), {V2: f"/jobs/uid_{ALICE}/job_55"})
    jobs = jobs_on(host)
    job = next(each for each in jobs.jobs_of(ALICE, soon()) if each.id == "5")
    assert not jobs.contains(job, os.getpid())
    with open_process(os.getpid()) as process, pytest.raises(AdoptionFailed, match=r"not in .*job_5$|not in .*job_5;"):
        jobs.adopt(process, job, soon())


def test_a_cgroup_removed_while_its_job_is_looked_at_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job found may be a later one of the same path."""
    host = FakeHost(tmp_path, V2_ONLY)
    host.cgroup(f"/jobs/uid_{ALICE}/job_5")
    answers: List[Optional[str]] = [f"/jobs/uid_{ALICE}/job_5", None]
    monkeypatch.setattr(cgroup_module, "path_of_id", lambda hierarchy, cgroup_id: answers.pop(0))
    assert jobs_on(host).job_of_cgroup(44).finding is CgroupFinding.GONE
    assert answers == []


def test_a_v2_id_tells_nothing_without_v2(tmp_path: Path) -> None:
    """v1-only hosts: somebody else has to be asked."""
    verdict = jobs_on(FakeHost(tmp_path, V1_ONLY)).job_of_cgroup(44)
    assert verdict.finding is CgroupFinding.CANNOT_TELL


@pytest.mark.parametrize("finding", list(CgroupFinding))
def test_a_verdict_has_a_job_exactly_when_it_says_so(finding: CgroupFinding) -> None:
    """The other combinations cannot be made."""
    job = None if finding is CgroupFinding.JOB else Job("5", ALICE, 1, (0, 1))
    with pytest.raises(ValueError, match=finding.value):
        CgroupVerdict(finding, "", job)


def test_jobs_without_a_common_hierarchy_are_not_ordered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two counters cannot be compared; other users' jobs are still listed, and one job needs no order."""
    host = FakeHost(tmp_path, HYBRID)
    host.cgroup(f"/jobs/uid_{ALICE}/job_5", only=["memory"])
    host.cgroup(f"/jobs/uid_{BOB}/job_7")
    jobs = jobs_on(host)
    assert ids(jobs.jobs_of(ALICE, soon())) == [(ALICE, "5")]
    host.cgroup(f"/jobs/uid_{ALICE}/job_6", only=["pids"])
    with pytest.raises(JobManagerError, match="5, 6 are in no common"):
        jobs.jobs_of(ALICE, soon())
    assert ids(jobs.all_jobs(soon())) == [(BOB, "7")]
    assert any("jobs_left_out uid=1001" in line for line in warnings(caplog))


@LAYOUTS
@pytest.mark.parametrize("template", [WITH_UID, WITHOUT_UID])
def test_jobs_are_found_in_every_layout(tmp_path: Path, layout: Sequence[str], template: str) -> None:
    """Each user's own, whichever way the owner is told; created and identity are inode numbers."""
    host = FakeHost(tmp_path, layout)
    parsed = JobPath.parse_template(template)
    for uid, job_id in ((ALICE, "5"), (BOB, "6"), (ALICE, "7")):
        host.cgroup(parsed.render(uid if parsed.has_uid else None, job_id), owner=uid)
    jobs = jobs_on(host, template)
    assert sorted(ids(jobs.jobs_of(ALICE, soon()))) == [(ALICE, "5"), (ALICE, "7")]
    assert sorted(ids(jobs.all_jobs(soon()))) == [(ALICE, "5"), (ALICE, "7"), (BOB, "6")]
    assert jobs.jobs_of(1003, soon()) == ()
    (job,) = jobs.jobs_of(BOB, soon())
    path = parsed.render(BOB if parsed.has_uid else None, "6")[1:]
    numbers = sorted(host.numbers.values())
    labels = {number: label for label, number in host.numbers.items()}
    inodes = [(host.roots[labels[number]] / path).stat().st_ino for number in numbers]
    assert job.identity == tuple(value for pair in zip(numbers, inodes) for value in pair)
    assert job.created == inodes[0]
    host.process(7, {layout[-1]: "/" + path + "/below"})
    assert jobs.job_of_process(7) == job
    assert jobs.session(job, False, False, Deadline.after_ms(1000)).environment == {"ADOPTD_JOB_ID": "6"}


def test_newest_is_by_inode_in_the_shared_hierarchy(tmp_path: Path) -> None:
    """Jobs 5 and 6 are both in pids only: what they have elsewhere does not order them."""
    host = FakeHost(tmp_path, HYBRID)
    host.cgroup(f"/jobs/uid_{ALICE}/job_5", only=["pids", V2])
    host.cgroup(f"/jobs/uid_{ALICE}/job_6", only=["pids", "memory"])
    found = jobs_on(host).jobs_of(ALICE, soon())
    pids = host.roots["pids"] / f"jobs/uid_{ALICE}"
    expected = sorted(("5", "6"), key=lambda job_id: (pids / f"job_{job_id}").stat().st_ino, reverse=True)
    assert [job.id for job in found] == expected
    assert [job.created for job in found] == [(pids / f"job_{job_id}").stat().st_ino for job_id in expected]


def test_a_directory_that_is_of_another_file_system_is_no_job_s(tmp_path: Path) -> None:
    """What is mounted over a job's directory, and found as it is opened: it is not of the hierarchy."""
    inside = Hierarchy(HierarchyKind.V2, 0, (), "/", os.stat("/").st_dev)
    assert os.stat("/proc").st_dev != inside.device
    (tmp_path / "job_5").mkdir()
    here = Hierarchy(HierarchyKind.V2, 0, (), str(tmp_path), tmp_path.stat().st_dev)
    for hierarchy, name, found in ((inside, "proc", False), (here, "job_5", True)):
        parent = open_root(hierarchy)
        try:
            opened = directories_module._open_below(parent, name, hierarchy)
            assert (opened is not None) is found
            if opened is not None:
                os.close(opened[0])
        finally:
            os.close(parent)
