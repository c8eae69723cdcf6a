"""Scenarios about who else can say where a connection comes from: the shell it was typed in, and Slurm itself."""

from __future__ import annotations

import re
from typing import Tuple

from lab.etc_files import ALICE, BOB
from lab.lab import NOBODY_IN, REPORT, Lab
from lab.outcome import Findings, Outcome
from lab.scenarios_slurm import slurm_of

SALLOC_TIMEOUT_S = 100.0
# scontrol is a process that must be started, which on a busy machine takes more than the 300 ms that are the default.
FALLBACK = '[callerid]\nfallback = "slurm"\ntimeout_ms = 10000\n'
FALLBACK_PAM = "action_unknown=deny timeout_ms=30000"


def ssh_in_salloc(lab: Lab) -> Tuple[str, str]:
    """What alice gets who types ssh in the shell that salloc gives her on the login node: her job, and the landing."""
    slurm = slurm_of(lab)
    argv = ["salloc", "--nodes=1", f"--nodelist={slurm.name_of(lab.second)}"]
    argv += ["ssh", "-o", "BatchMode=yes", lab.second.name, REPORT]
    with slurm.login.popen(argv, user=ALICE) as process:
        try:
            out, err = process.communicate(timeout=SALLOC_TIMEOUT_S)
        finally:
            process.kill()
    granted = re.search(rb"Granted job allocation (\d+)", err)
    job = granted[1].decode() if granted else ""
    slurm.wait_gone(job, [lab.second])
    return job, lab.landed(out.decode(errors="replace")) or err.decode(errors="replace")


def salloc_hint(lab: Lab) -> Outcome:
    """alice types ssh in salloc's shell on the login node, in no job itself: the job that the shell names."""
    seen, slurm = Findings(), slurm_of(lab)
    lab.pam("action_unknown=deny")
    tail = lab.second.syslog()
    with lab.jobs(2, on=[lab.second]) as jobs, lab.jobs(2, user=BOB, on=[lab.second]):
        allocated, landed = ssh_in_salloc(lab)
        seen.check(f"in the shell of {allocated}", f"job {allocated} on node2", landed)
        for job in jobs:
            login = lab.login(source=slurm.login, env={"SLURM_JOB_ID": job})
            seen.check(f"where SLURM_JOB_ID is {job}", f"job {job} on node2", login.landed)
        login = lab.login(source=slurm.login, user=BOB, env={"SLURM_JOB_ID": jobs[0]})
        seen.check(f"bob, where it is alice's {jobs[0]}", NOBODY_IN, login.landed)
        seen.check("where it is not set", NOBODY_IN, lab.login(source=slurm.login).landed)
    seen.record(lab.pam_records(tail))
    return seen.outcome(
        "the login node's agent reads it from the ssh client; it counts for jobs of the login user only"
    )


def fallback_slurmd(lab: Lab) -> Outcome:
    """No agent on node1 yet, where alice comes from, but slurmd: with fallback = "slurm", that is asked instead."""
    seen = Findings()
    lab.pam(FALLBACK_PAM)
    with lab.jobs(2) as jobs, lab.agent_down(lab.first):
        tail = lab.second.syslog()
        seen.check("without fallback", NOBODY_IN, lab.login(job=jobs[0]).landed)
        with lab.agent_settings(lab.second, FALLBACK):
            for job in jobs:
                seen.check(f"from {job}", f"job {job} on node2", lab.login(job=job).landed)
        seen.record(lab.pam_records(tail))
    return seen.outcome("node2's agent had scontrol ask node1's slurmd")


SLURM_ASKING_SCENARIOS = (salloc_hint, fallback_slurmd)
