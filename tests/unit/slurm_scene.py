"""A node as the Slurm backend sees it: a spool directory with doubles in it, and cgroups in a directory."""

from __future__ import annotations

import contextlib
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from adoptd.deadline import Deadline
from adoptd.jobs.slurm import SlurmJobs
from adoptd.jobs.slurm_conf import HostView, SlurmConf, SlurmOverrides
from adoptd.model import Job, JobManagerError
from fake_cgroups import V2, FakeHost
from slurmstepd_double import Step

ALICE, BOB = 1001, 1002
V1 = ("freezer", "memory")
SLICE = "/system.slice/slurmstepd.scope"

# Doubles are threads of the test and share its CPU with other tests: only a test of silence is in a hurry.
PATIENT_MS = 60_000.0
HASTY_MS = 400.0


def soon(ms: float = 90_000.0) -> Deadline:
    return Deadline.after_ms(ms)


def ids(jobs: Sequence[Job]) -> List[str]:
    return [job.id for job in jobs]


def heard(jobs: SlurmJobs, uid: int) -> Optional[List[str]]:
    """The ids of a user's jobs for a backend in haste: None if a step was too slow for it, as a sound one may be."""
    with contextlib.suppress(JobManagerError):
        return ids(jobs.jobs_of(uid, soon()))
    return None


class Scene:
    """Use as a context manager; steps started through it end with it."""

    def __init__(self, base: Path, layout: Sequence[str] = V1, step_ms: float = PATIENT_MS) -> None:
        self.layout = layout
        self.host = FakeHost(base, layout)
        self.spool = base / "spool"
        self.spool.mkdir()
        self.spool.chmod(0o755)
        (base / "slurmds").mkdir()
        self.view = HostView(str(base / "slurmds"), str(base / "hosts"), (), "/nowhere", "n1")
        self.overrides = SlurmOverrides(node_name="n1", spool_dir=str(self.spool))
        self.jobs = self.backend(step_ms)
        self._stack = ExitStack()

    def backend(self, step_ms: float = PATIENT_MS) -> SlurmJobs:
        """Another agent on the same node, which has not heard any step yet."""
        return SlurmJobs(SlurmConf(self.overrides, {}, self.view), self.host.mounts, step_ms=step_ms)

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def step(self, job_id: int, uid: int = ALICE, cgroups: bool = True, **facts: object) -> Step:
        """Start an extern step, with its cgroups, to which it moves what it is asked to add."""
        step = Step(self.spool, job_id, uid, **facts)  # type: ignore[arg-type]
        if cgroups:
            for label in self.layout:
                self.host.cgroup(self.path(label, job_id, uid), only=[label])
            if "move" not in facts:
                step.move = self.mover(job_id, uid)
        self._stack.callback(step.end)
        return step.__enter__()

    def path(self, label: str, job_id: int, uid: int = ALICE, step: str = "step_extern") -> str:
        """Where Slurm would have the step."""
        if label == V2:
            return f"{SLICE}/job_{job_id}/{step}"
        return f"/slurm_n1/uid_{uid}/job_{job_id}/{step}"

    def mover(self, job_id: int, uid: int = ALICE, only: Tuple[str, ...] = ()) -> Callable[[int], None]:
        """What moves a process into the job's extern step, in every hierarchy or ``only`` some."""

        def move(pid: int) -> None:
            paths: Dict[str, str] = {}
            for label in only or tuple(self.layout):
                paths[label] = self.path(label, job_id, uid) + ("/user/task_0" if label == V2 else "")
            self.host.process(pid, paths)

        return move
