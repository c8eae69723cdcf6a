"""What a run may leave behind, looked for where it would be: nothing is the only right answer."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from pathlib import Path
from typing import FrozenSet, List

from lab.cgroups import V2, find_hierarchies
from lab.kernel import start_time_ticks
from lab.runs import RUN_PARENT, RUN_PREFIX

# include/uapi/linux/bpf.h
BPF_PROG_QUERY = 16
CGROUP_CONNECT_TYPES = (10, 11)  # BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET6_CONNECT
PROGRAMS_MAX = 64
# asm/unistd.h of each
BPF_SYSCALL = {"x86_64": 321, "aarch64": 280}


def of_run(run_id: str) -> List[str]:
    """Processes, mounts, cgroups and directories that carry the run's name, each described.

    Namespaces go with their last process, and pins with the mount namespace. A dead process that its parent, which may
    be this machine's init, has not yet waited for is nothing that a run could remove.
    """
    name = f"{RUN_PREFIX}{run_id}"
    found = [f"directory {path}" for path in RUN_PARENT.glob(f"{name}*")]
    for hierarchy in find_hierarchies():
        found += [f"cgroup {path}" for path in hierarchy.mount.glob(f"{name}*")]
    for process in Path("/proc").glob("[0-9]*"):
        for file in ("cgroup", "mountinfo", "cmdline"):
            try:
                text = (process / file).read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if name in text and start_time_ticks(int(process.name)) is not None:
                found.append(f"process {process.name}, by its {file}")
    return found


def connect_programs() -> FrozenSet[int]:
    """Ids of the BPF programs that are attached to connect() at the cgroup-v2 root. Raises OSError."""
    root = next(hierarchy.mount for hierarchy in find_hierarchies() if hierarchy.name == V2)
    libc = ctypes.CDLL(None, use_errno=True)
    ids = (ctypes.c_uint32 * PROGRAMS_MAX)()
    found: List[int] = []
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for attach_type in CGROUP_CONNECT_TYPES:
            # union bpf_attr, query: target_fd, attach_type, query_flags, attach_flags, prog_ids, prog_cnt; 64 bytes.
            layout = struct.pack("=IIIIQI36x", directory, attach_type, 0, 0, ctypes.addressof(ids), PROGRAMS_MAX)
            attributes = ctypes.create_string_buffer(layout, len(layout))
            number = BPF_SYSCALL[platform.machine()]
            if libc.syscall(number, BPF_PROG_QUERY, attributes, len(layout)) != 0:
                code = ctypes.get_errno()
                raise OSError(code, f"BPF_PROG_QUERY: {os.strerror(code)}")
            count = struct.unpack_from("=I", attributes, 24)[0]
            found += ids[:count]
    finally:
        os.close(directory)
    return frozenset(found)
