"""Which memory cgroup pays for the probe's maps, and so for the label of every socket on the host.

The kernel charges what a map allocates to the memory cgroup of the process that made it (bpf_map_save_memcg): the
agent's own service would pay for everybody's sockets, with labels refused where it has a limit, and every connect()
for the charging. The root is charged nothing. Moves the calling process and nothing else; called by the loader.
"""

from __future__ import annotations

import os
from typing import Optional

from adoptd.hierarchy import HierarchyKind, read_hierarchies
from adoptd.model import JobManagerError


def leave_memory_cgroup(proc_root: str = "/proc") -> Optional[str]:
    """Move this process to the root of the memory controller's hierarchy; None, or why it stays where it is."""
    try:
        hierarchies = read_hierarchies(proc_root)
    except JobManagerError as error:
        return str(error)
    legacy = [each for each in hierarchies if "memory" in each.controllers]
    # Where v1 does not have the controller, v2 may.
    homes = legacy or [each for each in hierarchies if each.kind is HierarchyKind.V2]
    if not homes:
        return "no cgroup hierarchy with the memory controller is mounted"
    path = f"{homes[0].mount_point}/cgroup.procs"
    try:
        with open(path, "w") as procs:
            procs.write(str(os.getpid()))
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None
