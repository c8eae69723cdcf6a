"""What Slurm's own configuration says in the clusters of the tests and of the lab. Text only; nothing is written here.

Called by slurm_daemons, for the lab's nodes, and by the tests' cluster of one node.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Sequence, Tuple

# The extern step of a job, as in the names of the steps' sockets (src/common/slurm_protocol_defs.h, SLURM_EXTERN_CONT).
EXTERN_STEP = 4294967292


@dataclass(frozen=True)
class DaemonFiles:
    """Where the daemons keep what they write. ``spool`` may have %n and %h in it."""

    spool: str
    state: str
    run: str
    log: str


@dataclass(frozen=True)
class ComputeNode:
    """A node as Slurm has it; ``host`` is its short host name, which may be another than ``name``."""

    name: str
    host: str
    address: str


SLURM_CONF = """\
ClusterName=adoptd
SlurmctldHost={controller}({controller_address})
SlurmUser=slurm
AuthType=auth/munge
AuthInfo=socket={munge}
CredType=cred/munge
include {paths_file}
ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup,task/affinity
JobAcctGatherType=jobacct_gather/cgroup
{prolog_flags}
{extra}SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerNode={job_mb}
PropagateResourceLimits=NONE
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1
KillWait=2
MinJobAge=30
JobRequeue=1
MpiDefault=none
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:1000
"""

# Many jobs on few cores: every one may have this part of a node's memory.
JOBS_PER_NODE = 40
# What the kernel and the daemons take, and what slurmd rounds off.
MEMORY_SHARE = 0.9


def slurm_conf(
    controller: Tuple[str, str],
    nodes: Sequence[ComputeNode],
    *,
    paths_file: str,
    munge_socket: str,
    cpus: int,
    memory_mb: int,
    prolog_flags: str = "contain",
    extra: Sequence[str] = (),
) -> str:
    """slurm.conf; ``controller`` is host name and address, ``memory_mb`` what a node has, ``extra`` whole lines."""
    node_mb = int(memory_mb * MEMORY_SHARE)
    lines = [
        f"NodeName={node.name} NodeHostname={node.host} NodeAddr={node.address} "
        f"CPUs={cpus} RealMemory={node_mb} State=UNKNOWN"
        for node in nodes
    ]
    return SLURM_CONF.format(
        controller=controller[0],
        controller_address=controller[1],
        munge=munge_socket,
        paths_file=paths_file,
        prolog_flags=f"PrologFlags={prolog_flags}",
        extra="".join(f"{line}\n" for line in extra),
        job_mb=node_mb // JOBS_PER_NODE,
        nodes="\n".join(lines),
    )


def paths_conf(paths: DaemonFiles) -> str:
    """What slurm.conf includes, so that reading an include is part of every test."""
    return f"""\
StateSaveLocation={paths.state}
SlurmdSpoolDir={paths.spool}
SlurmctldPidFile={paths.run}/slurmctld.pid
SlurmdPidFile={paths.run}/slurmd.pid
SlurmctldLogFile={paths.log}/slurmctld.log
SlurmdLogFile={paths.log}/slurmd.log
"""


# Controllers cannot be moved from v1 to v2 on a hybrid host, and slurmd's plugin for v2 refuses those.
CGROUP_CONF = """\
CgroupPlugin=cgroup/v1
ConstrainCores=yes
ConstrainRAMSpace=yes
"""


def memory_mb() -> int:
    """The memory of this host."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (1024 * 1024)


def batch_job(*options: str, script: str = "exec sleep 1000") -> Sequence[str]:
    """The sbatch command for a job that runs ``script`` and leaves no output; it prints the job's id alone."""
    return ["sbatch", "--parsable", "--output=/dev/null", "--chdir=/", *options, f"--wrap={script}"]
