"""The Slurm backend against Debian's slurmctld, slurmd and slurmstepd, on this machine's cgroups."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

import pytest

from adoptd.deadline import Deadline
from adoptd.jobs import CgroupFinding
from adoptd.jobs.slurm import SlurmJobs
from adoptd.model import AdoptionFailed, Job, JobFault, JobManagerError
from adoptd.process import open_process
from lab.waiting import until
from slurm.cluster import ALICE, BOB, SlurmCluster, User

pytestmark = pytest.mark.timeout(180)


def soon(ms: float = 60_000.0) -> Deadline:
    return Deadline.after_ms(ms)


@pytest.fixture
def jobs(cluster: SlurmCluster) -> SlurmJobs:
    """An agent that has just started: it has heard no step yet. One that works is waited for as long as it takes."""
    return SlurmJobs(cluster.conf(), step_ms=30_000.0)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process to be adopted, outside every job."""
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def running(cluster: SlurmCluster, user: User, count: int = 1, *options: str) -> Iterator[List[int]]:
    """Jobs that have started, oldest first; cancelled and gone afterwards."""
    ids: List[int] = []
    try:
        ids += [cluster.submit_started(user, *options) for _ in range(count)]
        yield ids
    finally:
        if ids:
            cluster.cancel(*ids)
        for job_id in ids:
            cluster.wait_gone(job_id)


def numbers(found: Tuple[Job, ...]) -> List[int]:
    return [int(job.id) for job in found]


def heard(jobs: SlurmJobs, user: User) -> Optional[List[int]]:
    """None if a step was too slow."""
    with contextlib.suppress(JobManagerError):
        return numbers(jobs.jobs_of(user.uid, soon()))
    return None


def the_job(jobs: SlurmJobs, job_id: int, user: User = ALICE) -> Job:
    return next(job for job in jobs.jobs_of(user.uid, soon()) if job.id == str(job_id))


def adopt(jobs: SlurmJobs, job: Job, pid: int) -> None:
    with open_process(pid) as handle:
        jobs.adopt(handle, job, soon())


def paths_of(pid: int) -> Dict[str, str]:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return {line.split(":")[1]: line.split(":", 2)[2] for line in lines}


def test_what_slurmd_goes_by_is_found(cluster: SlurmCluster, jobs: SlurmJobs) -> None:
    """From slurm.conf, what it includes, and the host's name: what the daemons here really use."""
    settings = cluster.conf().settings()
    assert settings.node_name == cluster.host
    assert settings.node_name_certain
    assert settings.spool_dir == str(cluster.spool)
    assert settings.auth_type == "auth/munge"
    assert jobs.jobs_of(ALICE.uid, soon()) == ()


def test_whose_jobs_are_whose_and_which_is_newest(cluster: SlurmCluster, jobs: SlurmJobs) -> None:
    """Two of alice's, one of bob's; the step daemon is the one the kernel says listens."""
    with running(cluster, ALICE, 2) as ids, running(cluster, BOB) as bobs:
        found = jobs.jobs_of(ALICE.uid, soon())
        assert numbers(found) == ids[::-1]
        assert numbers(jobs.jobs_of(BOB.uid, soon())) == bobs
        assert numbers(jobs.all_jobs(soon())) == [*ids[::-1], *bobs]
        assert jobs.jobs_of(0, soon()) == ()
        for job in found:
            command = Path(f"/proc/{job.identity[1]}/cmdline").read_bytes()
            assert command.startswith(f"slurmstepd: [{job.id}.extern]".encode())


def test_the_job_of_a_process(cluster: SlurmCluster, jobs: SlurmJobs, child: subprocess.Popen[bytes]) -> None:
    """By this machine's v1 cgroups, with the node's name in them; not by its v2, in which nothing is moved."""
    with running(cluster, ALICE, 2) as ids:
        for job_id in ids:
            script = cluster.batch_pids(job_id)[0]
            assert f"/slurm_{cluster.host}/uid_{ALICE.uid}/job_{job_id}/step_batch" in paths_of(script)["freezer"]
            job = the_job(jobs, job_id)
            assert jobs.job_of_process(script) == job
            assert jobs.contains(job, script)
        assert jobs.job_of_process(child.pid) is None
        v2 = os.stat(Path("/sys/fs/cgroup/unified") / paths_of(cluster.batch_pids(ids[0])[0])[""].lstrip("/")).st_ino
        assert jobs.job_of_cgroup(v2).finding is CgroupFinding.CANNOT_TELL


def test_a_process_is_adopted_and_ends_with_its_job(
    cluster: SlurmCluster, jobs: SlurmJobs, child: subprocess.Popen[bytes]
) -> None:
    """Into the job that was said, every controller of it, once; scancel kills it, and the job's own are untouched."""
    with running(cluster, ALICE, 2) as ids:
        job, other = the_job(jobs, ids[0]), the_job(jobs, ids[1])
        adopt(jobs, job, child.pid)
        paths = paths_of(child.pid)
        step = f"/slurm_{cluster.host}/uid_{ALICE.uid}/job_{ids[0]}/step_extern"
        for controller in ("freezer", "cpuset", "memory", "cpuacct"):
            assert paths[controller] in (step, f"{step}/task_0")
        assert jobs.job_of_process(child.pid) == job
        assert jobs.contains(job, child.pid)
        assert not jobs.contains(other, child.pid)
        adopt(jobs, job, child.pid)
        listed = cluster.run(["scontrol", "listpids", str(ids[0]), cluster.host])
        rows = [line.split() for line in listed.splitlines()]
        assert [row[2] for row in rows if row[0] == str(child.pid)] == ["extern"]
        assert jobs.session(job, False, False, soon()).environment == {"SLURM_JOB_ID": str(ids[0])}
        cluster.cancel(ids[0])
        assert child.wait(60) == -signal.SIGKILL
        cluster.wait_gone(ids[0])
        assert numbers(jobs.jobs_of(ALICE.uid, soon())) == [ids[1]]
        assert not jobs.contains(job, child.pid)


def test_a_process_that_was_moved_out_is_adopted_again(
    cluster: SlurmCluster, jobs: SlurmJobs, child: subprocess.Popen[bytes]
) -> None:
    """As pam_systemd would do with one controller between the two phases of a login."""
    with running(cluster, ALICE) as ids:
        job = the_job(jobs, ids[0])
        adopt(jobs, job, child.pid)
        Path("/sys/fs/cgroup/memory/cgroup.procs").write_text(str(child.pid))
        assert not jobs.contains(job, child.pid)
        adopt(jobs, job, child.pid)
        assert jobs.contains(job, child.pid)


def test_a_requeued_job_is_another_job(cluster: SlurmCluster, jobs: SlurmJobs, child: subprocess.Popen[bytes]) -> None:
    """The same id, another identity: what was decided for the first is not carried out on the second."""
    with running(cluster, ALICE, 1, "--requeue", "--begin=now") as ids:
        before = the_job(jobs, ids[0])
        cluster.run(["scontrol", "requeue", str(ids[0])])
        cluster.wait_gone(ids[0])
        # It is held back for two minutes unless it is told otherwise; slurmd remembers by the second which
        # jobs of that id were killed, and would start nothing of one that follows at once.
        cluster.wait(lambda: "PENDING" in cluster.run(["squeue", "-h", "-j", str(ids[0]), "-o", "%T"]), "the requeue")
        cluster.run(["scontrol", "update", f"JobId={ids[0]}", "StartTime=now+3"])
        cluster.wait(lambda: cluster.has_steps(ids[0]), "the requeued job to start")
        after = the_job(jobs, ids[0])
        assert (after.id, after.uid) == (before.id, before.uid)
        assert after.identity != before.identity
        with pytest.raises(AdoptionFailed, match=f"job {ids[0]} has ended"):
            adopt(jobs, before, child.pid)
        assert jobs.job_of_process(child.pid) is None
        adopt(jobs, after, child.pid)
        assert not jobs.contains(before, child.pid)
        assert jobs.contains(after, child.pid)


def test_a_job_that_ends_before_the_adoption(
    cluster: SlurmCluster, jobs: SlurmJobs, child: subprocess.Popen[bytes]
) -> None:
    """Cancelled after the decision: refused, whether its step is still there or not, and the process is nowhere."""
    with running(cluster, ALICE) as ids:
        job = the_job(jobs, ids[0])
        cluster.cancel(ids[0])
        cluster.wait(lambda: jobs.jobs_of(ALICE.uid, soon()) == (), "the job to be ending or gone")
        with pytest.raises(AdoptionFailed, match="end"):
            adopt(jobs, job, child.pid)
        assert jobs.job_of_process(child.pid) is None


def test_a_step_that_hangs(cluster: SlurmCluster, child: subprocess.Popen[bytes]) -> None:
    """A stopped slurmstepd: other users do not notice, its owner's job is still counted, adoptions fail in time."""
    noted: List[JobFault] = []
    jobs = SlurmJobs(cluster.conf(), step_ms=30_000.0, noted=noted.append)
    with running(cluster, ALICE) as ids, running(cluster, BOB) as bobs:
        job = the_job(jobs, ids[0])
        jobs.jobs_of(BOB.uid, soon())
        newcomer = SlurmJobs(cluster.conf(), step_ms=500.0)
        os.kill(job.identity[1], signal.SIGSTOP)
        try:
            assert numbers(jobs.jobs_of(BOB.uid, soon())) == bobs
            assert noted == []
            assert jobs.jobs_of(ALICE.uid, soon(300)) == (job,)
            assert noted == [JobFault.STEP_SILENT]
            until(lambda: heard(newcomer, BOB) == bobs, "bob's step heard by an agent that waits half a second")
            with pytest.raises(JobManagerError, match=f"{cluster.host}_{ids[0]}"):
                newcomer.jobs_of(ALICE.uid, soon())
            with open_process(child.pid) as handle, pytest.raises(AdoptionFailed, match="in time"):
                jobs.adopt(handle, job, soon(300))
        finally:
            os.kill(job.identity[1], signal.SIGCONT)


def test_slurmd_stopped_and_started_again(
    cluster: SlurmCluster, jobs: SlurmJobs, child: subprocess.Popen[bytes]
) -> None:
    """Steps outlive their slurmd, so logins do not depend on it; a job keeps its identity."""
    with running(cluster, ALICE) as ids:
        job = the_job(jobs, ids[0])
        cluster.stop("slurmd")
        try:
            assert jobs.jobs_of(ALICE.uid, soon()) == (job,)
            adopt(jobs, job, child.pid)
            assert jobs.contains(job, child.pid)
        finally:
            cluster.start_slurmd()
        assert jobs.jobs_of(ALICE.uid, soon()) == (job,)


def test_a_socket_left_behind(cluster: SlurmCluster, jobs: SlurmJobs) -> None:
    """By a step that was killed: no job, and not ours to remove. The name is that of a job to come."""
    stale = cluster.spool / f"{cluster.host}_999999.4294967292"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(stale))
    try:
        with running(cluster, ALICE) as ids:
            assert numbers(jobs.jobs_of(ALICE.uid, soon())) == ids
        assert stale.exists()
    finally:
        stale.unlink()


def test_a_job_without_a_tunnel_and_without_namespaces(cluster: SlurmCluster, jobs: SlurmJobs) -> None:
    """The real step answers both requests, and says so."""
    with running(cluster, ALICE) as ids:
        job = the_job(jobs, ids[0])
        assert jobs.x11(job, soon()) is None
        assert jobs.namespaces(job, soon()) == ()


def test_twenty_adoptions_at_once(cluster: SlurmCluster, jobs: SlurmJobs) -> None:
    """Over two jobs, from threads: every process in its own."""
    children = [subprocess.Popen(["sleep", "1000"], start_new_session=True) for _ in range(20)]
    try:
        with running(cluster, ALICE, 2) as ids:
            targets = [the_job(jobs, job_id) for job_id in ids]
            failures: List[Exception] = []

            def enter(number: int) -> None:
                try:
                    with open_process(children[number].pid) as handle:
                        jobs.adopt(handle, targets[number % 2], soon())
                except AdoptionFailed as error:
                    failures.append(error)

            threads = [threading.Thread(target=enter, args=(number,)) for number in range(20)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert failures == []
            for number, process in enumerate(children):
                assert jobs.job_of_process(process.pid) == targets[number % 2]
    finally:
        for process in children:
            process.kill()
            process.wait()
