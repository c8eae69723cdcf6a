"""What a scenario needs of jobs, whoever manages them: the interface, and the kind that is plain cgroups.

A kind makes jobs on nodes, says where a process must be started to be in one, and reads from a session's
/proc/self/cgroup which one it is in. It knows nothing of logins. The other kind is in slurm_jobs.
"""

from __future__ import annotations

import contextlib
import re
from typing import Callable, ContextManager, Dict, Iterator, List, Optional, Protocol, Sequence, Tuple

from lab.cgroups import V2, Group, paths_of_process
from lab.etc_files import ALICE, User
from lab.node import Node, Place
from lab.waiting import until


class JobKind(Protocol):
    """Jobs of one kind on the nodes of one cluster."""

    @property
    def described(self) -> str:
        """What jobs are here, for people."""

    @property
    def why_broken(self) -> str:
        """What is wrong with a broken() job, for people."""

    def start(self, count: int, user: User, nodes: Sequence[Node]) -> Tuple[str, ...]:
        """New jobs of a user on exactly these nodes, oldest first; every node has them when this returns."""

    def end(self, jobs: Sequence[str], user: User, nodes: Sequence[Node]) -> None:
        """End jobs as their manager would, and wait until nothing is left of them. Ended ones are fine."""

    def place(self, node: Node, user: User, job: str) -> Place:
        """Where a process of the job is started, on this node."""

    def job_in(self, node: Node, cgroups: str) -> Optional[str]:
        """The job that a /proc/PID/cgroup of the node is in. None: in none. Raises ValueError: not clearly in one."""

    def broken(self, node: Node, while_sound: Callable[[], object]) -> ContextManager[str]:
        """A job of alice's on one node that is there, but no process can be put into it.

        ``while_sound`` is called before it breaks, if an agent would otherwise not know of the job at all.
        """


class CgroupJobs:
    """Jobs that are cgroups, made here as a simple job manager would, in every hierarchy that the run uses."""

    why_broken = "the kernel refuses to put a process into the job's cgroup"

    def __init__(self, hierarchies: Sequence[str]) -> None:
        self.described = f"cgroups ({' + '.join(hierarchies)})"
        self._last_job = 100

    def start(self, count: int, user: User, nodes: Sequence[Node]) -> Tuple[str, ...]:
        ids: List[str] = []
        for _ in range(count):
            self._last_job += 1
            ids.append(str(self._last_job))
            for node in nodes:
                self._make(node, user, ids[-1])
        return tuple(ids)

    def end(self, jobs: Sequence[str], user: User, nodes: Sequence[Node]) -> None:
        for node in nodes:
            for job in jobs:
                self.place(node, user, job).remove()
            parent = self._jobs_of(node, user)
            if not any(path.is_dir() for top in parent.directories() if top.exists() for path in top.iterdir()):
                parent.remove()

    def _jobs_of(self, node: Node, user: User) -> Group:
        return node.group.child("jobs").child(f"uid_{user.uid}")

    def place(self, node: Node, user: User, job: str) -> Group:
        return self._jobs_of(node, user).child(f"job_{job}")

    def _make(self, node: Node, user: User, job: str) -> None:
        """The cgroup of a job. Its creation time differs from every earlier job's."""
        parent = self._jobs_of(node, user).make()
        made = self.place(node, user, job)
        earlier = {d.stat().st_mtime_ns for top in parent.directories() for d in top.iterdir() if d.is_dir()}

        def differs() -> bool:
            # The kernel stamps directories with its tick, up to 10 ms long.
            made.make()
            if earlier.isdisjoint(d.stat().st_mtime_ns for d in made.directories()):
                return True
            made.remove()
            return False

        until(differs, f"a creation time of its own for job {job}")

    def job_in(self, node: Node, cgroups: str) -> Optional[str]:
        found: Dict[str, Optional[str]] = {}
        pattern = re.compile(re.escape(f"{node.group.path}/jobs/") + r"uid_\d+/job_(\w+)(?:/.*)?")
        paths = paths_of_process(cgroups)
        for hierarchy in node.group.hierarchies:
            match = pattern.fullmatch(paths.get(hierarchy.name, ""))
            found[hierarchy.name] = match[1] if match else None
        if len(set(found.values())) != 1:
            raise ValueError(f"torn between {found}")
        return next(iter(found.values()))

    @contextlib.contextmanager
    def broken(self, node: Node, while_sound: Callable[[], object]) -> Iterator[str]:
        """In cgroup v2, a group beside a threaded one is "domain invalid" (cgroup-v2.rst, Threads) until made
        threaded too. It is all there for the agent to see, but cannot take a process: the kernel answers EOPNOTSUPP.
        """
        if all(hierarchy.name != V2 for hierarchy in node.group.hierarchies):
            raise RuntimeError("a job that refuses processes is made with cgroup v2, and there is none here")
        self._last_job += 1
        job = str(self._last_job)
        parent = self._jobs_of(node, ALICE)
        threaded = parent.child("threaded").make()
        try:
            (threaded.directories()[0] / "cgroup.type").write_text("threaded", encoding="ascii")
            self.place(node, ALICE, job).make()
            yield job
        finally:
            parent.remove()
