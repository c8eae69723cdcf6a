"""What else is had from the real Slurm: slurmd's word on a connection, and the variables of a job."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Iterator, Tuple

import pytest

from adoptd.deadline import Deadline
from adoptd.jobs.environment import JobEnvironment
from adoptd.jobs.slurm import SlurmJobs
from adoptd.model import Connection, Endpoint
from adoptd.slurm_callerid import NoWord, SlurmdCallerid, SlurmdFault
from adoptd.workers import Workers
from slurm.cluster import ALICE, SlurmCluster
from slurm.holder import ADDRESS

pytestmark = pytest.mark.timeout(180)

# A job that connects to a listener of its own and says where from; both ends stay open.
SCRIPT = """\
import socket, sys, time
listener = socket.create_server(("{address}", {port}))
client = socket.create_connection(("{address}", {port}))
with open("{out}", "w") as out:
    out.write("%s:%d" % client.getsockname())
time.sleep(1000)
"""
PORT = 4711

Connected = Tuple[int, Connection]


@pytest.fixture(scope="module")
def connected(cluster: SlurmCluster) -> Iterator[Connected]:
    """A job of alice's and the connection that it has made."""
    out = Path("/tmp") / f"{cluster.host}.port"
    script = cluster.run_dir / "connects.py"
    script.write_text(SCRIPT.format(address=ADDRESS, port=PORT, out=out))
    argv = ["sbatch", "--parsable", "--output=/dev/null", "--chdir=/", f"--wrap=exec python3 {script}"]
    job_id = int(cluster.run(argv, ALICE))
    try:
        cluster.wait(lambda: out.exists() and ":" in out.read_text(), "the job to connect")
        yield job_id, Connection(Endpoint.parse(out.read_text()), Endpoint.parse(f"{ADDRESS}:{PORT}"))
    finally:
        cluster.cancel(job_id)
        cluster.wait_gone(job_id)
        out.unlink(missing_ok=True)


@pytest.fixture
def scontrol(cluster: SlurmCluster, tmp_path: Path) -> str:
    """The real one, in the cluster's namespaces, as a site's wrapper would run it."""
    holder = cluster.holder_pid()
    path = tmp_path / "scontrol"
    path.write_text(f'#!/bin/sh\nexec nsenter -t {holder} -m -n -u -- /usr/bin/scontrol "$@"\n')
    path.chmod(0o755)
    return str(path)


def ask(cluster: SlurmCluster, scontrol: str, connection: Connection, ms: float = 60_000.0) -> str:
    workers = Workers("slow", 2, 8)
    try:
        slurmd = SlurmdCallerid(scontrol, lambda: str(cluster.conf_file), workers)

        async def story() -> str:
            try:
                return await slurmd.job_of(connection, Deadline.after_ms(ms))
            finally:
                await asyncio.wait_for(slurmd.all_reaped(), 60)

        return asyncio.run(story())
    finally:
        workers.close()


def test_a_connection_of_no_job_is_not_named(cluster: SlurmCluster, scontrol: str) -> None:
    """scontrol's own words are in the error, for the log."""
    nobody = Connection(Endpoint.parse(f"{ADDRESS}:1"), Endpoint.parse(f"{ADDRESS}:22"))
    with pytest.raises(NoWord) as refusal:
        ask(cluster, scontrol, nobody)
    assert refusal.value.fault is SlurmdFault.NONE_NAMED
    assert "remote job id indeterminate" in str(refusal.value)


def test_a_node_without_a_slurmd_costs_no_more_than_the_deadline(cluster: SlurmCluster, scontrol: str) -> None:
    """Nobody has that address: Slurm would try for many seconds."""
    gone = Connection(Endpoint.parse("10.67.0.99:40000"), Endpoint.parse(f"{ADDRESS}:22"))
    began = time.monotonic()
    with pytest.raises(NoWord) as refusal:
        ask(cluster, scontrol, gone, ms=300.0)
    assert refusal.value.fault is SlurmdFault.TIMEOUT
    assert time.monotonic() - began < 30.0


def test_slurmd_names_the_job(cluster: SlurmCluster, scontrol: str, connected: Connected) -> None:
    """What the real scontrol prints is what is parsed."""
    job_id, connection = connected
    assert ask(cluster, scontrol, connection) == str(job_id)


def test_the_job_s_variables_are_those_slurm_set(cluster: SlurmCluster, connected: Connected) -> None:
    """From the batch step, whose processes are told apart from the extern step's."""
    job_id, _ = connected
    jobs = SlurmJobs(cluster.conf())
    job = next(job for job in jobs.jobs_of(ALICE.uid, Deadline.after_ms(60_000)) if job.id == str(job_id))
    assert set(jobs.processes(job, Deadline.after_ms(60_000))) == set(cluster.batch_pids(job_id))
    own = {"SLURM_JOB_ID": job.id}
    found = JobEnvironment(("SLURM_*",)).added_to(own, jobs, job, Deadline.after_ms(60_000))
    assert found["SLURM_JOB_ID"] == str(job_id)
    assert found["SLURM_JOB_UID"] == str(ALICE.uid)
    assert found["SLURM_CLUSTER_NAME"] == "adoptd"
    assert all(name.startswith("SLURM_") for name in found)
