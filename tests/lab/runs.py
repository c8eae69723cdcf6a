"""The runs on this host: their names, who answers for each, and their removal.

Owns the directories /run/adoptd-demo-<id>, the state files in them, and the cgroups of that name and of Slurm's
nodes of the run. Called by nodes (the cluster), by the supervisor and by the commands that take runs down.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Mapping, Optional

from lab import kernel
from lab.cgroups import Group, find_hierarchies
from lab.slurm_cgroups import remove_slurm_cgroups

RUN_PARENT = Path("/run")
RUN_PREFIX = "adoptd-demo-"
# A directory without a state file belongs to a run that is just starting, or died there.
STATELESS_AGE_S = 60.0


@dataclass(frozen=True)
class RunState:
    """One run. ``supervisor`` is None where it is dead; ``nodes`` are the pids that hold the nodes, by name."""

    run_id: str
    supervisor: Optional[int]
    kept: bool
    nodes: Mapping[str, int]

    @property
    def alive(self) -> bool:
        """Whether somebody answers for it, and its nodes are up."""
        return self.supervisor is not None and bool(self.nodes)


def new_run_id() -> str:
    """Not in use, and short: it is part of socket paths."""
    return secrets.token_hex(3)


def run_directory(run_id: str) -> Path:
    """Where a run keeps its files."""
    return RUN_PARENT / f"{RUN_PREFIX}{run_id}"


def group_of_run(run_id: str) -> Group:
    """The cgroup everything of a run is in."""
    return Group(find_hierarchies(), f"/{RUN_PREFIX}{run_id}")


def supervisor_group(run_id: str) -> Group:
    """The cgroup of the process that answers for a run: beside the run's, which it empties and removes."""
    return Group(find_hierarchies(), f"/{RUN_PREFIX}{run_id}.supervisor")


def cpu_group_of_run(run_id: str) -> Optional[Group]:
    """The cgroup that shares the CPU among a run's services; None where there is no v1 controller for it."""
    found = tuple(hierarchy for hierarchy in find_hierarchies(wanted=("cpu",)) if hierarchy.name == "cpu")
    return Group(found, f"/{RUN_PREFIX}{run_id}") if found else None


def write_state(run_id: str, nodes: Mapping[str, int], *, kept: bool) -> None:
    """Say that this process answers for the run."""
    pid = os.getpid()
    state = {"id": run_id, "pid": pid, "start": kernel.start_time_ticks(pid), "kept": kept, "nodes": dict(nodes)}
    new = run_directory(run_id) / "state.new"
    new.write_text(json.dumps(state), encoding="utf-8")
    new.replace(run_directory(run_id) / "state.json")


def read_states() -> Dict[str, RunState]:
    """The runs on this host, by id."""
    states: Dict[str, RunState] = {}
    for directory in RUN_PARENT.glob(f"{RUN_PREFIX}*"):
        run_id = directory.name[len(RUN_PREFIX) :]
        with contextlib.suppress(FileNotFoundError):
            try:
                state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
            except FileNotFoundError:
                if time.time() - directory.stat().st_mtime > STATELESS_AGE_S:
                    states[run_id] = RunState(run_id, None, False, {})
                continue
            alive = kernel.start_time_ticks(state["pid"]) == state["start"]
            pid = state["pid"] if alive else None
            states[run_id] = RunState(run_id, pid, state["kept"], state.get("nodes", {}))
    return states


def remove_nodes(run_id: str) -> None:
    """Kill what is in a run's cgroups, remove them and its directory. Missing is fine, and so is twice."""
    group_of_run(run_id).remove()
    cpu = cpu_group_of_run(run_id)
    if cpu is not None:
        cpu.remove()
    remove_slurm_cgroups(f"*-{run_id}")
    shutil.rmtree(run_directory(run_id), ignore_errors=True)


def remove_run(run_id: str) -> None:
    """remove_nodes(), and end the run's supervisor too if there is one."""
    supervisor_group(run_id).remove()
    remove_nodes(run_id)


def remove_dead_runs() -> None:
    """Clear up after runs whose supervisor was killed before it could."""
    for run_id, state in read_states().items():
        if state.supervisor is None:
            remove_run(run_id)
