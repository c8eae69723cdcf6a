"""What the agent needs to know of a job manager, and nothing of any particular one.

Owns the JobBackend protocol and the verdict about a cgroup id. A backend must never answer "no jobs"
when it means "I cannot tell", and never leave a process half in a job. Called by callerid, adoption
and sessions, always from a worker thread: every method may block, up to its deadline.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from typing import Callable, ContextManager, Mapping, Optional, Protocol, Sequence, Tuple

from adoptd.deadline import Deadline
from adoptd.model import Job
from adoptd.process import ProcessHandle


class CgroupFinding(enum.Enum):
    """What a cgroup-v2 id alone says about the job of whatever had it.

    Only JOB and NO_JOB are answers. CANNOT_TELL means that somebody else must be asked (the process
    itself, if it is still the same); taking it for NO_JOB would deny users their own jobs. GONE is the same of a
    cgroup that has been removed, where jobs are in v2 alone: it was empty then, so who is still there was moved.
    """

    JOB = "job"
    NO_JOB = "no_job"
    CANNOT_TELL = "cannot_tell"
    GONE = "gone"


@dataclass(frozen=True)
class CgroupVerdict:
    """The finding, the job exactly when the finding is JOB, and for the log what led to it.

    ``holds``: whether the process that was asked about is in the job now; None if none was, or it is gone.
    """

    finding: CgroupFinding
    why: str
    job: Optional[Job] = None
    holds: Optional[bool] = None

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


Adopt = Callable[[ProcessHandle, Job, bool, bool, Deadline], JobSession]


@dataclass(frozen=True)
class JobsHere:
    """One user's jobs, newest first, and how to adopt into one of them: as JobBackend.adopt_for_session.

    ``suspended`` are the user's others, also newest first: whatever is put into one stands still, sshd too, so they
    are no jobs to log in to.
    """

    jobs: Tuple[Job, ...]
    adopt: Adopt
    suspended: Tuple[Job, ...] = ()


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
        """The user's jobs on this node, newest first, suspended ones among them.

        Raises JobManagerError: it cannot be asked, or not in time.
        """

    def here(self, uid: int, deadline: Deadline) -> ContextManager[JobsHere]:
        """:meth:`jobs_of`, with whatever the manager was asked through kept open, for an adoption that comes at once.

        Suspended jobs are apart. One thread's, for as long as it takes to decide. Raises what jobs_of raises.
        """

    def all_jobs(self, deadline: Deadline) -> Tuple[Job, ...]:
        """Every job on this node, by uid and then newest first. Raises JobManagerError."""

    def job_of_process(self, pid: int) -> Optional[Job]:
        """The job a process is in; None: in none, or gone.

        The caller answers for the pid still being the process it means. Raises Ambiguous if the process is
        in more than one job, JobManagerError.
        """

    def job_of_cgroup(self, cgroup_id: int, pid: Optional[int] = None) -> CgroupVerdict:
        """What a cgroup-v2 id says, and whether process ``pid`` is in that job: :meth:`contains` with the same look.

        Raises JobManagerError.
        """

    def job_cgroups(self, where: Mapping[int, str]) -> Mapping[int, str]:
        """Of a process that is at ``where`` (CgroupMounts.membership), its job's cgroup as a whole, by hierarchy.

        By the paths alone, and only the hierarchies in which it is in a job's.
        """

    def adopt(self, process: ProcessHandle, job: Job, deadline: Deadline) -> None:
        """Move the process into the job and read back that it is there; it is, or AdoptionFailed is raised.

        All or nothing: after AdoptionFailed the process is where it was, or the message says where it is
        stuck. A process already in the job is left as it is. A suspended job takes it in too. Raises nothing else.
        """

    def adopt_for_session(
        self, process: ProcessHandle, job: Job, x11: bool, namespaces: bool, deadline: Deadline
    ) -> JobSession:
        """:meth:`adopt`, then :meth:`session`. Raises what they raise; after JobManagerError it is in the job.

        For a login: AdoptionFailed also if the job is suspended.
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
