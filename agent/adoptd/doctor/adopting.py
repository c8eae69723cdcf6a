"""An adoption tried for real: a process of the doctor's own, put into a job, read back there, and ended.

Owns that process, and leaves nothing of it that can be ended. Called by the trial that --deep makes.
"""

from __future__ import annotations

import subprocess
import time
from typing import Iterator, Optional, Sequence

from adoptd.deadline import Deadline
from adoptd.doctor.findings import Finding, failure, ok
from adoptd.jobs import JobBackend
from adoptd.model import AdoptionFailed, Job, JobManagerError
from adoptd.process import open_process

_TRIAL_MS = 3_000.0
_TRIAL_S = 20
# One that is killed ends at once, but not in a frozen cgroup of v1, nor while it waits for a dead file server.
_END_S = 1.0


def try_adoption(backend: JobBackend, jobs: Sequence[Job]) -> Iterator[Finding]:
    """Put a process of ours into the newest job, read it back, and end it. One finding."""
    if not jobs:
        yield ok("jobs", "an adoption was not tried: there is no job here to try it in")
        return
    job = max(jobs, key=lambda each: each.created)
    started_s = time.monotonic()
    child = subprocess.Popen(
        ["sleep", str(_TRIAL_S)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    failed: Optional[str] = None
    inside = False
    try:
        with open_process(child.pid) as process:
            backend.adopt(process, job, Deadline.after_ms(_TRIAL_MS))
            inside = backend.contains(job, child.pid)
    except (AdoptionFailed, JobManagerError) as error:
        failed = str(error)
    finally:
        ended = _ends(child)
    took_ms = (time.monotonic() - started_s) * 1000
    if not ended:
        seen = f"a process of ours (pid {child.pid}) was put into job {job.id} and cannot be ended there"
        thaw = f"resume it (scontrol resume {job.id}), or thaw it if nobody suspended it"
        remedy = f"is the job's cgroup frozen? {thaw}; it ends then"
        yield failure("jobs", f"{seen}: while it is frozen logins to it are refused", remedy)
    elif failed is not None:
        seen = f"a process of ours could not be put into job {job.id}: {failed}"
        yield failure("jobs", seen, "docs/faults.md has a row for it")
    elif inside:
        yield ok(
            "jobs", f"a process of ours was adopted into job {job.id}, read back there, and ended ({took_ms:.0f} ms)"
        )
    else:
        seen = f"job {job.id} took a process of ours, which is not in it"
        yield failure("jobs", seen, "ProctrackType=proctrack/cgroup; sessions are not adopted here")


def _ends(child: subprocess.Popen[bytes]) -> bool:
    child.kill()
    try:
        child.wait(_END_S)
    except subprocess.TimeoutExpired:
        return False
    return True
