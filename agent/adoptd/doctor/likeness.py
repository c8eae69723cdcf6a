"""What the agent may, for trials of the doctor's: a process of our own with the agent's view of files and capabilities.

Owns entering the agent's mount namespace and giving up what it has not. What its system calls are filtered by cannot be
had by anybody else: that alone is not tried. Called by the looks that --deep allows, and by the child they start.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import FrozenSet, Mapping, Optional, Sequence, Union

from adoptd.doctor.findings import Scene
from adoptd.doctor.processes import PROC, agent_pid, capabilities_of, link

# linux/sched.h, linux/prctl.h, linux/capability.h
_CLONE_NEWNS = 0x00020000
_PR_CAPBSET_DROP = 24
_CAPABILITY_VERSION_3 = 0x20080522


def ask_child(scene: Scene, what: str, words: Sequence[str], within_s: float) -> Optional[Mapping[str, object]]:
    """What a child with the agent's rights says of a trial; None: nothing in time. It ends and clears up by itself.

    Where no agent runs it has ours.
    """
    pid = agent_pid(scene.settings.agent.pam_socket)
    command = [sys.executable, "-m", "adoptd.doctor.trial", str(pid or 0), what, *words]
    package = str(Path(__file__).resolve().parents[2])
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": package, "PYTHONDONTWRITEBYTECODE": "1"}
    child = subprocess.Popen(
        command,
        # With -m Python imports from its directory first, and the administrator may stand in a user's.
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        said, _ = child.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        return None
    try:
        result = json.loads(said)
    except ValueError:
        return {"error": f"the trial ended with {child.returncode}"}
    return result if isinstance(result, dict) else {"error": f"the trial said {result!r}"}


def become_like(pid: int) -> None:
    """Have no more rights than process ``pid``, nor see other files. Raises OSError.

    For a process of one thread (setns(2)), all of whose modules are imported.
    """
    bounding, effective = _set_of(pid, "CapBnd"), _set_of(pid, "CapEff")
    libc = ctypes.CDLL(None, use_errno=True)
    if link(PROC / str(pid) / "ns/mnt") != link(PROC / "self/ns/mnt"):
        descriptor = os.open(PROC / str(pid) / "ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(libc.setns(descriptor, _CLONE_NEWNS))
        finally:
            os.close(descriptor)
    ours = _set_of("self", "CapBnd")
    for number in sorted(ours - bounding):
        _check(libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0))
    permitted = _set_of("self", "CapPrm") & effective
    low, high = _bits(permitted) & 0xFFFFFFFF, _bits(permitted) >> 32
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _check(libc.capset(header, struct.pack("=6I", low, low, 0, high, high, 0)))


def _set_of(pid: Union[int, str], which: str) -> FrozenSet[int]:
    """The capabilities of one line of /proc/PID/status. Raises OSError if there is no such line."""
    found = capabilities_of(pid, which)
    if found is None:
        raise ProcessLookupError(f"no {which} in its status")
    return found


def _bits(numbers: FrozenSet[int]) -> int:
    return sum(1 << number for number in numbers)


def _check(returned: int) -> None:
    if returned != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
