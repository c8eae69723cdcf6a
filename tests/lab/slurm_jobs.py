"""Jobs of the real Slurm: allocations as ``salloc`` makes them, whose extern step is on every node they have.

A batch job waits for the scheduler's next second, an allocation is granted at once. Called through the
interface that scenarios use (job_kinds).
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Callable, Iterator, List, Optional, Sequence, Tuple

from lab.etc_files import ALICE, User
from lab.node import Both, Node, Place
from lab.slurm_cgroups import job_of
from lab.slurm_daemons import SlurmDaemons


class SlurmJobs:
    """Slurm's jobs on a cluster's nodes."""

    described = "Slurm's"
    why_broken = "the job's extern step is stopped and answers nobody"

    def __init__(self, slurm: SlurmDaemons) -> None:
        self._slurm = slurm

    def start(self, count: int, user: User, nodes: Sequence[Node]) -> Tuple[str, ...]:
        ids: List[str] = []
        try:
            for _ in range(count):
                ids.append(self._slurm.allocate(user, nodes))
                # One after the other: what is newest is what came up last.
                self._slurm.wait_started(ids[-1], user, nodes)
        except BaseException:
            self.end(ids, user, nodes)
            raise
        return tuple(ids)

    def end(self, jobs: Sequence[str], user: User, nodes: Sequence[Node]) -> None:
        self._slurm.cancel(*jobs)
        for job in jobs:
            self._slurm.wait_gone(job, nodes)

    def place(self, node: Node, user: User, job: str) -> Place:
        # The node's own for those hierarchies that Slurm leaves alone.
        return Both(node.system_group, self._slurm.extern(node, user, job))

    def job_in(self, node: Node, cgroups: str) -> Optional[str]:
        found = job_of(cgroups, self._slurm.name_of(node))
        return None if found is None else found[0]

    @contextlib.contextmanager
    def broken(self, node: Node, while_sound: Callable[[], object]) -> Iterator[str]:
        """As a slurmstepd that hangs would be, one that the agent knew before: its sockets take connections."""
        (job,) = self.start(1, ALICE, [node])
        try:
            while_sound()
            daemon = self._slurm.extern_daemon(node, job)
            os.kill(daemon, signal.SIGSTOP)
            try:
                yield job
            finally:
                os.kill(daemon, signal.SIGCONT)
        finally:
            self.end([job], ALICE, [node])
