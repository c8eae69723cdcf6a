"""Jobs that stand still, on a real Slurm: nobody is put into one, sshd least of all, and the user hears why."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Iterator, List, Sequence

import pytest

from lab.etc_files import ALICE, ROOT, User
from lab.job_kinds import CgroupJobs
from lab.lab import NOBODY_IN, Lab
from lab.slurm_cgroups import StepGroup
from lab.slurm_daemons import SlurmDaemons
from lab.test_users import ctl, document, install_adoptctl
from lab.waiting import until

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def slurm_lab(slurm_lab: Lab) -> Lab:
    """With adoptctl on its nodes."""
    install_adoptctl(slurm_lab)
    return slurm_lab


def _slurm(lab: Lab) -> SlurmDaemons:
    assert lab.cluster.slurm is not None
    return lab.cluster.slurm


def _freezer(extern: StepGroup) -> Path:
    (directory,) = (each for each in extern.directories() if "/freezer/" in str(each))
    return directory / "freezer.state"


def _names_in(extern: StepGroup) -> List[str]:
    names = []
    for pid in extern.pids():
        with contextlib.suppress(OSError):
            names.append(Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip())
    return names


@contextlib.contextmanager
def suspended(lab: Lab, job: str, words: Sequence[str], user: User) -> Iterator[StepGroup]:
    """The job's extern step on the second node, frozen by a command of Slurm's; thawed at the end, come what may."""
    extern = _slurm(lab).extern(lab.second, ALICE, job)
    state = _freezer(extern)
    try:
        _slurm(lab).run([*words, job], user=user)
        _slurm(lab).wait(lambda: state.read_text("ascii").strip() == "FROZEN", f"job {job} to stand still")
        yield extern
    finally:
        # Not by Slurm, which may be what has failed: who is frozen is ended by nobody.
        with contextlib.suppress(OSError):
            state.write_text("THAWED", encoding="ascii")


STOPS = [
    pytest.param(["scancel", "--signal=STOP"], ["scancel", "--signal=CONT"], ALICE, id="by its user"),
    pytest.param(["scontrol", "suspend"], ["scontrol", "resume"], ROOT, id="by the administrator"),
]


@pytest.mark.parametrize(("stop", "go_on", "user"), STOPS)
def test_nobody_logs_in_to_a_job_that_stands_still(
    slurm_lab: Lab, stop: Sequence[str], go_on: Sequence[str], user: User
) -> None:
    """Refused with a sentence, and no sshd left standing in it, which neither its own alarm nor SIGKILL would end."""
    lab = slurm_lab
    lab.pam("action_unknown=newest")
    sentence = "your job {job} on node2 is suspended, and a session in it would stand still. Log in when it runs again."
    with lab.jobs(1, on=[lab.second]) as (job,):
        with suspended(lab, job, stop, user) as extern:
            login = lab.login()
            assert (login.landed, sentence.format(job=job) in login.errors) == (NOBODY_IN, True), login
            assert "sshd" not in _names_in(extern)
            status, out, errors = ctl(lab.second, "explain", "--user", "alice", "--json")
            assert status == 0, errors
            told = document(out)
            assert (told["outcome"], told["reason"]) == ("denied", "no_jobs")
            assert sentence.format(job=job) in told["message"]
            assert [row["found"] for row in told["stages"] if row["stage"] == "jobs_here"] == [
                f"none; suspended: {job}"
            ]
            status, out, errors = ctl(lab.second, "jobs", "--json", user=ALICE)
            assert [row["job"] for row in document(out)["jobs"]] == [job], errors
            _slurm(lab).run([*go_on, job], user=user)
            until(lambda: _freezer(extern).read_text("ascii").strip() == "THAWED", "the job to run again")
        assert lab.login().landed == f"job {job} on node2"


def test_a_plain_cgroup_that_stands_still(lab: Lab) -> None:
    """In every hierarchy of the job that can hold processes still, by the kernel's own word for it."""
    words = {"cgroup.freeze": ("1", "0"), "freezer.state": ("FROZEN", "THAWED")}
    lab.pam("action_unknown=newest")
    with lab.jobs(1, on=[lab.second]) as (job,):
        assert isinstance(lab.kind, CgroupJobs)
        directories = lab.kind.place(lab.second, ALICE, job).directories()
        files = [directory / name for directory in directories for name in words if (directory / name).exists()]
        assert files, "no hierarchy here can freeze"
        for file in files:
            freeze, thaw = words[file.name]
            file.write_text(freeze, encoding="ascii")
            try:
                login = lab.login()
            finally:
                file.write_text(thaw, encoding="ascii")
            assert (login.landed, f"your job {job} on node2 is suspended" in login.errors) == (NOBODY_IN, True), login
            assert lab.login().landed == f"job {job} on node2"


def test_the_other_job_is_taken(slurm_lab: Lab) -> None:
    """The newest stands still: the login is as one of a user who has the older alone."""
    lab = slurm_lab
    lab.pam("action_unknown=deny")
    with lab.jobs(2, on=[lab.second]) as (older, newest), suspended(lab, newest, ["scancel", "--signal=STOP"], ALICE):
        assert lab.login().landed == f"job {older} on node2"
