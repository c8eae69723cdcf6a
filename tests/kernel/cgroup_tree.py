"""A test's own tree of cgroups in this host's hierarchies, with jobs in it and processes to put there.

Names carry the process id, so the tests run twice at once. The fixture is conftest.py's ``cgroups``.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence

import pytest

from adoptd.hierarchy import CgroupMounts, Hierarchy
from adoptd.jobs.cgroup import CgroupJobs
from adoptd.jobs.template import JobPath
from lab.waiting import until

V2 = "v2"
_SERIAL = itertools.count(1)


class Cgroups:
    """One test's tree ``/adoptd-test-PID-N`` in this host's hierarchies, and the processes it starts."""

    def __init__(self) -> None:
        self.mounts = CgroupMounts()
        self.hierarchies: Dict[str, Hierarchy] = {each.label: each for each in self.mounts.hierarchies()}
        self.top = f"/adoptd-test-{os.getpid()}-{next(_SERIAL)}"
        self.children: List[subprocess.Popen[bytes]] = []

    def need(self, *labels: str) -> Sequence[str]:
        missing = [label for label in labels if label not in self.hierarchies]
        if missing:
            pytest.skip(f"this host does not mount {', '.join(missing)}")
        return labels

    def at(self, label: str, path: str) -> Path:
        return Path(self.hierarchies[label].mount_point + path)

    def make(self, path: str, labels: Sequence[str], owner: int = 0) -> None:
        for label in labels:
            self.at(label, path).mkdir(parents=True, exist_ok=True)
            os.chown(self.at(label, path), owner, owner)

    def jobs(self, template: str = "/uid_{uid}/job_{job}", leaf: str = "") -> CgroupJobs:
        return CgroupJobs(JobPath.parse_template(self.top + template), leaf, self.mounts)

    def job(self, uid: int, job_id: str, labels: Sequence[str]) -> str:
        path = f"{self.top}/uid_{uid}/job_{job_id}"
        self.make(path, labels)
        return path

    def child(self, *command: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command or ("sleep", "600"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/")
        self.children.append(process)
        return process

    def where(self, pid: int) -> Mapping[str, str]:
        membership = self.mounts.membership(pid)
        assert membership is not None
        return {label: membership[each.number] for label, each in self.hierarchies.items()}

    def remove(self, path: Optional[str] = None) -> None:
        for label in self.hierarchies:
            top = self.at(label, path or self.top)
            for directory in [*sorted(top.rglob("*"), reverse=True), top]:
                if directory.is_dir():
                    # A cgroup is busy until its last process has been reaped by the kernel, not by us.
                    until(functools.partial(removed, directory), f"{directory} removed")

    def close(self) -> None:
        for process in self.children:
            process.kill()
        for process in self.children:
            process.communicate()
        self.remove()
        self.mounts.close()


def removed(directory: Path) -> bool:
    """Whether the cgroup is gone now; not while a process is in it."""
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
