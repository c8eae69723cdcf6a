"""Scenarios about jobs that come again, and about many jobs and many logins, each told from the others."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Dict, List

from lab.etc_files import ALICE
from lab.lab import REPORT, Lab
from lab.outcome import Findings, Outcome, tally
from lab.scenarios_slurm import slurm_of, staying_session
from lab.waiting import until

JOBS = 20
STORM_JOBS = 4
STORM_LOGINS_PER_JOB = 50
STORM_TIMEOUT_S = 110.0
# Two hundred key exchanges on few cores take seconds, and whoever answers waits for a core as long as they do.
# An administrator who would rather have late logins than misplaced ones sets these.
PATIENT_PAM = "action_unknown=deny timeout_ms=30000"
PATIENT_AGENT = "[callerid]\ntimeout_ms = 10000\n"
# slurmd remembers by the second which jobs of an id were killed, and would start nothing of one that follows at once.
REQUEUE_DELAY_S = 3


def requeue_same_id(lab: Lab) -> Outcome:
    """alice's job is requeued while she is logged in: her session ends, and the next is in the new run of that id."""
    seen, slurm = Findings(), slurm_of(lab)
    lab.pam("action_unknown=deny")
    tail = lab.second.syslog()
    job = slurm.submit(ALICE, [lab.second], "--requeue")
    try:
        slurm.wait_started(job, ALICE, [lab.second])
        with staying_session(lab) as (session, _):
            before = slurm.extern_daemon(lab.second, job)
            slurm.run(["scontrol", "requeue", job])
            seen.check("before", f"job {job} on node2", session.end().landed)
        slurm.wait_gone(job, [lab.second])
        slurm.wait(lambda: slurm.state_of(job) == "PENDING", f"job {job} to be requeued")
        seen.check("in between", "denied", lab.login().landed)
        # It is held back for two minutes unless it is told otherwise.
        slurm.run(["scontrol", "update", f"JobId={job}", f"StartTime=now+{REQUEUE_DELAY_S}"])
        slurm.wait_started(job, ALICE, [lab.second])
        after = slurm.extern_daemon(lab.second, job)
        seen.check("after", f"job {job} on node2", lab.login().landed)
    finally:
        lab.kind.end([job], ALICE, [lab.second])
    seen.record(lab.pam_records(tail))
    return seen.outcome(f"its extern step was process {before}, and is {after}")


def twenty_jobs(lab: Lab) -> Outcome:
    """alice has twenty jobs on both nodes: from inside each, ssh lands in that one."""
    seen = Findings()
    lab.pam("action_unknown=deny")
    tail = lab.second.syslog()
    with lab.jobs(JOBS) as jobs:
        wrong = []
        for job in jobs:
            landed = lab.login(job=job).landed
            if landed != f"job {job} on node2":
                wrong.append(f"from {job}: {landed}")
        seen.check("", f"{JOBS} of {JOBS} in their own job", f"{JOBS - len(wrong)} of {JOBS} in their own job")
        lab.pam("action_unknown=newest")
        seen.check("from no job", f"job {jobs[-1]} on node2", lab.login().landed)
    seen.record(lab.pam_records(tail))
    return seen.outcome("; ".join(wrong) or "one question each, however many jobs there are")


# Run by Slurm as the job's batch script: the ssh clients are the job's own processes, started by nobody else.
_STORM_SCRIPT = """\
until [ -e {go} ]; do sleep 0.1; done
for i in $(seq {logins}); do
    nice ssh -o BatchMode=yes -o ConnectTimeout=100 {node} '{report}' > {results}/$SLURM_JOB_ID.$i 2>&1 &
done
wait
touch {results}/$SLURM_JOB_ID.done
exec sleep 1000
"""


def storm(lab: Lab) -> Outcome:
    """Four of alice's jobs log in fifty times each, all at once, from their batch scripts: each in the right job."""
    with lab.agent_settings(lab.first, PATIENT_AGENT), lab.agent_settings(lab.second, PATIENT_AGENT):
        return _storm(lab)


def _storm(lab: Lab) -> Outcome:
    seen, slurm = Findings(), slurm_of(lab)
    lab.pam(PATIENT_PAM)
    tail = lab.second.syslog()
    results = f"{ALICE.home}/storm-{secrets.token_hex(3)}"
    nodes = [lab.first, lab.second]
    jobs: List[str] = []
    slurm.run(["mkdir", results], user=ALICE, node=lab.first)
    directory = lab.first.path(results)
    script = _STORM_SCRIPT.format(
        go=f"{results}/go", logins=STORM_LOGINS_PER_JOB, node=lab.second.name, report=REPORT, results=results
    )
    try:
        jobs += [slurm.submit(ALICE, nodes, script=script) for _ in range(STORM_JOBS)]
        for job in jobs:
            slurm.wait_started(job, ALICE, nodes)
        (directory / "go").touch()
        until(lambda: all((directory / f"{job}.done").exists() for job in jobs), "the storm's end", STORM_TIMEOUT_S)
        places = {job: _places(lab, directory, job) for job in jobs}
        for job in jobs:
            expected = tally([f"job {job} on node2"] * STORM_LOGINS_PER_JOB)
            seen.check(f"from {job}", expected, tally(places[job]))
    finally:
        lab.kind.end(jobs, ALICE, nodes)
        slurm.run(["rm", "-rf", results], node=lab.first)
    records = seen.record(lab.pam_records(tail))
    milliseconds = sorted(record.ms for record in records if record.ms is not None)
    middle = milliseconds[len(milliseconds) // 2] if milliseconds else 0.0
    return seen.outcome(
        f"{STORM_JOBS * STORM_LOGINS_PER_JOB} logins at once; half of them took PAM under {middle:.0f} ms"
    )


def _places(lab: Lab, directory: Path, job: str) -> List[str]:
    reports: Dict[int, str] = {}
    for number in range(1, STORM_LOGINS_PER_JOB + 1):
        reports[number] = (directory / f"{job}.{number}").read_text(errors="replace")
    return [lab.landed(report) or f"no session: {report.strip()[:60]}" for report in reports.values()]


SLURM_MANY_SCENARIOS = (requeue_same_id, twenty_jobs, storm)
