"""An adoption tried for real: a process of the doctor's own, put into a job, read back there, and ended.

Owns that process, and leaves nothing of it. Called by the trial that --deep makes.
"""

from __future__ import annotations

import subprocess
import time
from typing import Iterator, Sequence

from adoptd.deadline import Deadline
from adoptd.doctor.findings import Finding, failure, ok
from adoptd.jobs import JobBackend
from adoptd.model import AdoptionFailed, Job, JobManagerError
from adoptd.process import open_process

_TRIAL_MS = 3_000.0
_TRIAL_S = 20


def try_adoption(backend: JobBackend, jobs: Sequence[Job]) -> Iterator[Finding]:
    """Put a process of ours into the newest job, read it back, and end it."""
    if not jobs:
        yield ok("jobs", "an adoption was not tried: there is no job here to try it in")
        return
    job = max(jobs, key=lambda each: each.created)
    started_s = time.monotonic()
    child = subprocess.Popen(
        ["sleep", str(_TRIAL_S)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with open_process(child.pid) as process:
            backend.adopt(process, job, Deadline.after_ms(_TRIAL_MS))
            inside = backend.contains(job, child.pid)
    except (AdoptionFailed, JobManagerError) as error:
        yield failure(
            "jobs", f"a process of ours could not be put into job {job.id}: {error}", "docs/faults.md has a row for it"
        )
        return
    finally:
        child.kill()
        child.wait()
    took_ms = (time.monotonic() - started_s) * 1000
    if inside:
        yield ok(
            "jobs", f"a process of ours was adopted into job {job.id}, read back there, and ended ({took_ms:.0f} ms)"
        )
    else:
        seen = f"job {job.id} took a process of ours, which is not in it"
        yield failure("jobs", seen, "ProctrackType=proctrack/cgroup; sessions are not adopted here")
