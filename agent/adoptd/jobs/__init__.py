"""What the agent needs to know of a job manager, and nothing of any particular one.

Owns the JobBackend protocol and the verdict about a cgroup id. A backend must never answer "no jobs"
when it means "I cannot tell", and never leave a process half in a job. Called by callerid, adoption
and sessions, always from a worker thread: every method may block, up to its deadline.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from typing import Mapping, Optional, Protocol, Sequence, Tuple

from adoptd.deadline import Deadline
from adoptd.model import Job
from adoptd.process import ProcessHandle


class CgroupFinding(enum.Enum):
    """What a cgroup-v2 id alone says about the job of whatever had it.

    Only JOB and NO_JOB are answers. CANNOT_TELL means that somebody else must be asked (the process
    itself, if it is still the same); taking it for NO_JOB would deny users their own jobs.
    """

    JOB = "job"
    NO_JOB = "no_job"
    CANNOT_TELL = "cannot_tell"


@dataclass(frozen=True)
class CgroupVerdict:
    """The finding, the job exactly when the finding is JOB, and for the log what led to it."""

    finding: CgroupFinding
    why: str
    job: Optional[Job] = None

    def __post_init__(self) -> None:
        if (self.finding is CgroupFinding.JOB) != (self.job is not None):
            raise ValueError(f"finding {self.finding.value} with job {self.job}")


class JobSession:
    """What a session is given: an environment, and namespace descriptors, which are closed with this object.

    Also when nobody closes it: a call that outlived its deadline leaves its result to nobody.
    """

    def __init__(self, environment: Mapping[str, str], descriptors: Sequence[int] = ()) -> None:
        self.environment = environment
        self.descriptors = tuple(descriptors)

    def close(self) -> None:
        """Close the descriptors. May be called twice."""
        descriptors, self.descriptors = self.descriptors, ()
        for descriptor in descriptors:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


class JobBackend(Protocol):
    """One job manager. Two Job values are the same job if ``id``, ``uid`` and ``identity`` are equal.

    ``created`` orders the jobs of one answer and one user; it is not comparable between answers.
    """

    @property
    def name(self) -> str:
        """The word for it in configuration, logs and metrics."""

    @property
    def job_variable(self) -> str:
        """The environment variable that names a process's job, as the manager or its site sets it."""

    def jobs_of(self, uid: int, deadline: Deadline) -> Tuple[Job, ...]:
        """The user's jobs on this node, newest first. Raises JobManagerError: it cannot be asked, or not in time."""

    def all_jobs(self, deadline: Deadline) -> Tuple[Job, ...]:
        """Every job on this node, by uid and then newest first. Raises JobManagerError."""

    def job_of_process(self, pid: int) -> Optional[Job]:
        """The job a process is in; None: in none, or gone.

        The caller answers for the pid still being the process it means. Raises Ambiguous if the process is
        in more than one job, JobManagerError.
        """

    def job_of_cgroup(self, cgroup_id: int) -> CgroupVerdict:
        """What a cgroup-v2 id says. Raises JobManagerError."""

    def adopt(self, process: ProcessHandle, job: Job, deadline: Deadline) -> None:
        """Move the process into the job and read back that it is there; it is, or AdoptionFailed is raised.

        All or nothing: after AdoptionFailed the process is where it was, or the message says where it is
        stuck. A process already in the job is left as it is. Raises nothing else.
        """

    def contains(self, job: Job, pid: int) -> bool:
        """Whether the process is in this very job (not in a later one of the same id). Raises JobManagerError."""

    def processes(self, job: Job, deadline: Deadline) -> Tuple[int, ...]:
        """Pids in the job, in no order and not always all; where the manager can tell, only of what it started
        itself, not of sessions put in from outside. The caller checks each (contains). Raises JobManagerError."""

    def session(self, job: Job, x11: bool, namespaces: bool, deadline: Deadline) -> JobSession:
        """What a session in this job is given: its environment, with ``x11`` the job's X11 display, with
        ``namespaces`` the namespaces it has to enter. Raises JobManagerError if those cannot be had."""

    def for_node(self, node_name: str) -> JobBackend:
        """This backend as seen under another node name, where the manager knows the node by one; "" is its own."""
