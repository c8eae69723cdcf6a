"""A host's cgroups in a temporary directory: any layout, no kernel, no process touched.

Directories made by it belong to root, as a job manager's do, so the tests that use it run as root.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, Mapping, Sequence

from adoptd.hierarchy import CgroupMounts

V2 = "v2"


class FakeHost:
    """``layout`` names the hierarchies: "v2" or v1 controllers as /proc/self/cgroup has them ("cpu,cpuacct")."""

    def __init__(self, base: Path, layout: Sequence[str]) -> None:
        self.proc = base / "proc"
        self.roots: Dict[str, Path] = {}
        self.numbers = {label: 0 if label == V2 else number for number, label in enumerate(layout, 1)}
        device = base.stat().st_dev
        lines = []
        for label in layout:
            root = self.roots[label] = base / "cgroup" / label.replace(",", "+")
            root.mkdir(parents=True)
            root.chmod(0o755)
            kind, options = ("cgroup2", "rw") if label == V2 else ("cgroup", f"rw,{label}")
            where = f"{os.major(device)}:{os.minor(device)}"
            lines.append(f"40 31 {where} / {root} rw,relatime shared:9 - {kind} {kind} {options}\n")
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self" / "mountinfo").write_text("".join(lines))
        (self.proc / "self" / "cgroup").write_text(self._membership({}))
        self.mounts = CgroupMounts(str(self.proc))

    def cgroup(self, path: str, owner: int = 0, only: Sequence[str] = (), mode: int = 0o755) -> None:
        """Make a cgroup in every hierarchy or ``only`` some; ``owner`` and ``mode`` are of the last component."""
        for label in only or self.roots:
            directory = self.roots[label]
            for name in path.strip("/").split("/"):
                directory = directory / name
                if not directory.exists():
                    directory.mkdir()
                    directory.chmod(0o755)
                    (directory / "cgroup.procs").touch()
            os.chown(directory, owner, owner)
            directory.chmod(mode)

    def process(self, pid: int, paths: Mapping[str, str]) -> None:
        """Put a process into cgroups: hierarchy -> path, "/" where not given."""
        directory = self.proc / str(pid)
        directory.mkdir(exist_ok=True)
        (directory / "cgroup").write_text(self._membership(paths))

    def _membership(self, paths: Mapping[str, str]) -> str:
        return "".join(
            f"{number}:{'' if label == V2 else label}:{paths.get(label, '/')}\n"
            for label, number in self.numbers.items()
        )
