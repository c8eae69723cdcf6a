"""Names of hosts as Slurm means them: its host list expressions, aliases, and what the running slurmd was told.

Owns their reading. It must never ask the network (a name server that is down would hold up a login), nor
believe a process that merely calls itself slurmd. Called by slurm_conf.
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence

from adoptd.model import JobFault, JobManagerError
from adoptd.process import started_ns

# MAX_RANGE of src/common/hostlist.h.
_RANGE_MAX = 64 * 1024
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
# Debian's is the second, behind a link of the first name.
_EXECUTABLES = frozenset({"slurmd", "slurmd-wlm"})
# Options of slurmd that take a word, and -F that may have one attached: src/slurmd/slurmd/slurmd.c, 20.11 to 26.05.
_SHORT_WITH_VALUE = "dfLnN"


@dataclass(frozen=True)
class RunningSlurmd:
    """What the slurmd that runs on this host was started with: -N and -f; None where not given or none runs.

    ``pid`` and ``started_ns`` (since boot) are of its oldest process; 0 where none runs.
    """

    node_name: Optional[str] = None
    conf_file: Optional[str] = None
    pid: int = field(default=0, compare=False)
    started_ns: int = field(default=0, compare=False)


def expand(expression: str) -> Iterator[str]:
    """The hosts of ``n[1-3,07],x`` in order. Raises JobManagerError for what is no host list."""
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", expression):
        pieces = re.split(r"\[([^\]]*)\]", part)
        # Odd pieces were in brackets. Products run fastest in the last, as Slurm's do.
        choices = [_numbers(piece, part) if index % 2 else [piece] for index, piece in enumerate(pieces)]
        for combination in itertools.product(*choices):
            yield "".join(combination)


def aliases_of(host: str, hosts_file: str) -> Sequence[str]:
    """The other names of this host in /etc/hosts; none if it cannot be read. Name servers are not asked."""
    found: List[str] = []
    try:
        text = Path(hosts_file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    for line in text.splitlines():
        names = line.partition("#")[0].split()[1:]
        if any(name == host or name.partition(".")[0] == host for name in names):
            found.extend(name for name in names if name != host and name not in found)
    return found


def find_slurmd(proc_root: str = "/proc") -> RunningSlurmd:
    """What the slurmd of this host was started with. Raises JobManagerError if several disagree, or it cannot be seen.

    Only one that root started, from a file of that name, in our mount namespace: a user can start a
    set-uid program under the name slurmd with any arguments, and a container's slurmd sees other files.
    """
    found: Dict[RunningSlurmd, RunningSlurmd] = {}
    try:
        entries = os.listdir(proc_root)
    except OSError as error:
        raise JobManagerError(f"{proc_root}: {error.strerror}") from None
    for entry in entries:
        if not (entry.isascii() and entry.isdigit()):
            continue
        directory = Path(proc_root) / entry
        try:
            if (directory / "comm").read_bytes() != b"slurmd\n" or not _is_ours(directory, Path(proc_root)):
                continue
            arguments = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        started = started_ns(int(entry), proc_root)
        if started is None:
            continue
        options = _options([os.fsdecode(argument) for argument in arguments[1:]])
        running = replace(options, pid=int(entry), started_ns=started)
        # It forks, and its children are called slurmd too for a moment.
        if options not in found or started < found[options].started_ns:
            found[options] = running
    if len(found) > 1:
        names = ", ".join(sorted(str(each.node_name) for each in found))
        text = f"several slurmds run here ({names}): set which of them this agent is for"
        raise JobManagerError(text, JobFault.OTHER_NODE)
    return next(iter(found.values()), RunningSlurmd())


def _is_ours(directory: Path, proc: Path) -> bool:
    status = (directory / "status").read_text(encoding="utf-8", errors="replace")
    uids = re.search(r"^Uid:\t(.*)$", status, re.MULTILINE)
    if uids is None or set(uids[1].split()) != {"0"}:
        return False
    # After an upgrade of the package the running one's file is "slurmd (deleted)".
    if os.path.basename(os.readlink(directory / "exe")).partition(" ")[0] not in _EXECUTABLES:
        return False
    return os.readlink(directory / "ns" / "mnt") == os.readlink(proc / "self" / "ns" / "mnt")


def _options(arguments: Sequence[str]) -> RunningSlurmd:
    """-N and -f in what getopt(3) would take them from: ``-N x``, ``-Nx``, ``-DN x``."""
    found = {"N": "", "f": ""}
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("--") or not argument.startswith("-"):
            continue
        for position, letter in enumerate(argument[1:], 2):
            if letter in _SHORT_WITH_VALUE:
                value = argument[position:] or next(rest, "")
                if letter in found:
                    found[letter] = value
            if letter in _SHORT_WITH_VALUE + "F":
                break
    return RunningSlurmd(found["N"] or None, found["f"] or None)


def _numbers(inside: str, part: str) -> Sequence[str]:
    numbers: List[str] = []
    for each in inside.split(","):
        match = _RANGE.fullmatch(each)
        if match is None:
            raise JobManagerError(f"{part!r} is no host list")
        low, high = match[1], match[2] or match[1]
        if not 0 <= int(high) - int(low) < _RANGE_MAX:
            raise JobManagerError(f"{part!r}: a range of hosts has 1 to {_RANGE_MAX}")
        numbers.extend(f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1))
    return numbers
