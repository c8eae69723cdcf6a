"""Nodes that stay up: what is put into them for trying things by hand, and how they are removed."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Sequence, TextIO

from lab.etc_files import ALICE
from lab.lab import Lab
from lab.node import PATH, PYTHON, Node
from lab.node_runner import SOURCE_IN_NODE
from lab.runs import read_states, remove_run, run_directory
from lab.waiting import until

IN_JOB = "/run/in-job"
DOWN_TIMEOUT_S = 20.0


def _in_job_script(lab: Lab, node: Node) -> str:
    """A shell script: its process enters the job in every hierarchy, becomes alice, and runs a command."""
    files = " ".join(f'"{name}"' for name in lab.kind.place(node, ALICE, "$job").procs_files())
    return f"""\
#!/bin/sh
# Run a command as alice inside one of her jobs: {IN_JOB} JOB COMMAND...
set -eu
job=$1
shift
for procs in {files}; do
    echo $$ > "$procs"
done
cd {ALICE.home}
exec env -i HOME={ALICE.home} USER={ALICE.name} LOGNAME={ALICE.name} TERM="${{TERM:-dumb}}" PATH={PATH} \\
    setpriv --reuid={ALICE.uid} --regid={ALICE.gid} --clear-groups "$@"
"""


def _tool_script(name: str) -> str:
    program = f"import sys; from adoptd.cli import {name}_main as main; sys.exit(main())"
    return f"#!/bin/sh\nPYTHONPATH={SOURCE_IN_NODE}/agent exec {PYTHON} -B -c '{program}' \"$@\"\n"


def prepare(lab: Lab) -> None:
    """Put the scripts that print_how_to_try() speaks of into every node."""
    for node in lab.cluster.hosts:
        lab.pam("action_unknown=newest", node=node)
        node.write(IN_JOB, _in_job_script(lab, node), mode=0o755)
        for name in ("adoptd", "adoptctl"):
            node.write(f"/run/{name}-demo", _tool_script(name), mode=0o755)


def print_how_to_try(lab: Lab, jobs: Sequence[str], out: TextIO) -> None:
    """What a newcomer can type now."""
    first, second = lab.first, lab.second
    job = jobs[0]
    out.write(f"\nrun {lab.cluster.run_id} stays up; {ALICE.name} has the jobs {' and '.join(jobs)} on every node.\n")
    for node in lab.cluster.nodes:
        out.write(f"  enter {node.name}:  nsenter -t {node.runner_pid} -m -n -u -r\n")
    inside = f"nsenter -t {first.runner_pid} -m -n -u -r"
    out.write(f"  from inside a job:  {inside} {IN_JOB} {job} ssh {second.name} cat /proc/self/cgroup\n")
    out.write(f"  from no job:        {inside} su - {ALICE.name} -c 'ssh {second.name} cat /proc/self/cgroup'\n")
    out.write(f"  ask the agent:      {inside} /run/adoptctl-demo status\n")
    out.write(f"  logs:               {inside} tail /var/log/agent.log /var/log/syslog\n")
    out.write(f"  remove:             ./dev demo --down {lab.cluster.run_id}\n")


def _take_down_one(run_id: str, pid: int) -> None:
    directory = run_directory(run_id)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    try:
        until(lambda: not directory.exists() and read_states().get(run_id) is None, "its end", DOWN_TIMEOUT_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    remove_run(run_id)


def take_down(wanted: str, out: TextIO) -> int:
    """Remove the run of this id, or with "" all that were kept or whose supervisor is dead. Returns an exit status."""
    states = read_states()
    if wanted and wanted not in states:
        out.write(f"no run {wanted} here; there are: {' '.join(sorted(states)) or 'none'}\n")
        return 1
    removed = 0
    for run_id, state in states.items():
        pid, kept = state.supervisor, state.kept
        if wanted not in ("", run_id) or (not wanted and pid is not None and not kept):
            continue
        if pid is None:
            remove_run(run_id)
        else:
            _take_down_one(run_id, pid)
        out.write(f"run {run_id} is removed\n")
        removed += 1
    if not removed:
        out.write("there is nothing to remove\n")
    return 0
