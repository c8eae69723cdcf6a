"""Two PAM modules beside each other: the same stack with one line swapped, the same login, what came of it.

Owns the stack both are judged in, the clock around the module's line, and the record of what was seen. Where a
session landed is read inside the session and never asked of either module. Knows nothing of what is compared; called
by the scenarios of compare_scenarios and by compare.
"""

from __future__ import annotations

import re
import statistics
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from lab.lab import Lab, Login
from lab.node import LogTail, Node
from lab.nodes import Cluster
from lab.outcome import tally
from lab.slurm_daemons import SlurmDaemons

THEIRS = "pam_slurm_adopt"
OURS = "pam_adopt"
CLOCK_SOURCE = Path(__file__).with_name("compare_clock.c")

_CFLAGS = ("-shared", "-fPIC", "-O2", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror")
_TOOK = re.compile(r"pam_clock\(sshd:account\): took_ns=(\d+)")
_JOB = re.compile(r"\bjob (\d+)\b")


@dataclass(frozen=True)
class Side:
    """One of the two. ``extra`` is added to every line of it: options of its own that are no part of the comparison."""

    name: str
    module: str
    extra: str = ""


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing in milliseconds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Optional[Spread]:
        """None of nothing."""
        if not values:
            return None
        return cls(round(statistics.median(values), 2), round(min(values), 2), round(max(values), 2))


@dataclass(frozen=True)
class Seen:
    """What one side did with one kind of login, over all rounds."""

    landed: str
    told: str  # what the user read, of the last round
    account_ms: Optional[Spread]  # the module's line in sshd; None where no line was reached
    login_ms: Optional[Spread]  # the whole of ssh, from its start to its end


@dataclass(frozen=True)
class Row:
    """One kind of login under both sides. ``differs`` says why they need not be equal, "" where they must."""

    scenario: str
    what: str
    options: str
    expected: str  # where pam_adopt.so has to put it
    differs: str
    seen: Mapping[str, Seen]

    @property
    def same(self) -> bool:
        """Whether both did the same."""
        return self.seen[THEIRS].landed == self.seen[OURS].landed

    @property
    def ok(self) -> bool:
        """Whether ours did what it has to, and theirs the same where it must be so."""
        return self.seen[OURS].landed == self.expected and (self.same or bool(self.differs))


def stack(side: Side, clock: str, options: str, *, session: str = "") -> str:
    """The sshd service: what a login needs, and the account line that pam_slurm_adopt's documentation shows."""
    line = " ".join(f"account required {side.module} {options} {side.extra}".split())
    lines = [
        "auth required pam_unix.so",
        "account required pam_unix.so",
        f"account optional {clock} begin",
        line,
        f"account optional {clock} end",
        "session required pam_unix.so",
    ]
    return "\n".join([*lines, *([session] if session else []), "password required pam_deny.so"]) + "\n"


def build_clock(directory: Path) -> Path:
    """The module that takes the time. Raises RuntimeError with the compiler's words."""
    built = directory / "pam_clock.so"
    command = ["cc", *_CFLAGS, "-o", str(built), str(CLOCK_SOURCE), "-lpam"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{CLOCK_SOURCE.name}: {done.stderr.strip()[-400:]}")
    return built


@dataclass
class _Notes:
    landed: List[str] = field(default_factory=list)
    account_ms: List[float] = field(default_factory=list)
    login_ms: List[float] = field(default_factory=list)
    told: str = ""

    def seen(self) -> Seen:
        places = self.landed[0] if len(set(self.landed)) == 1 else tally(self.landed)
        return Seen(places, self.told, Spread.of(self.account_ms), Spread.of(self.login_ms))


class Stage:
    """The cluster, both sides, and the rows so far. ``slurm`` is the cluster's."""

    def __init__(self, cluster: Cluster, rounds: int, *, extra: str = "") -> None:
        """``extra``: options for pam_adopt.so alone, such as a longer timeout_ms= on a machine short of time."""
        if cluster.slurm is None:
            raise RuntimeError("the comparison is about Slurm's jobs, and there is no Slurm in these nodes")
        self.lab = Lab(cluster)
        self.slurm: SlurmDaemons = cluster.slurm
        self.rounds = rounds
        self.rows: List[Row] = []
        self.scenario = ""
        self._sides = (Side(THEIRS, f"{THEIRS}.so"), Side(OURS, cluster.pam_module, extra))
        self._clock = str(build_clock(cluster.directory))

    def compare(
        self,
        what: str,
        expected: str,
        login: Callable[[], Login],
        *,
        options: str = "",
        jobs: Sequence[str] = (),
        differs: str = "",
        rounds: Optional[int] = None,
        node: Optional[Node] = None,
    ) -> Row:
        """Try ``login`` under both, in turns, so that what the machine does besides is the same for both.

        ``jobs`` are the ids there are, oldest first; they are told of as A, B... ``node`` is where sshd is, ``rounds``
        at most so many.
        """
        notes: Dict[str, _Notes] = {side.name: _Notes() for side in self._sides}
        where = node or self.lab.second
        for _ in range(min(rounds or self.rounds, self.rounds)):
            for side in self._sides:
                self.set_stack(side, options, node=where)
                tail = where.syslog()
                done = login()
                note = notes[side.name]
                note.landed.append(named(done.landed, jobs))
                note.told = " ".join(done.errors.split())
                note.account_ms += _account_ms(where, tail)
                note.login_ms.append(done.seconds * 1000.0)
        seen = {name: note.seen() for name, note in notes.items()}
        row = Row(self.scenario, what, options, expected, differs, seen)
        self.rows.append(row)
        return row

    def set_stack(self, side: Side, options: str, *, node: Optional[Node] = None) -> None:
        """The stack with this side's line. Both are told the NodeName, which is not the host's name here."""
        where = node or self.lab.second
        words = f"nodename={self.slurm.name_of(where)} {options}"
        where.write("/etc/pam.d/sshd", stack(side, self._clock, words))

    @property
    def sides(self) -> Tuple[Side, Side]:
        """pam_slurm_adopt and pam_adopt."""
        return self._sides


def named(landed: str, jobs: Sequence[str]) -> str:
    """``landed`` with the jobs as A, B...: the same words in every run."""
    letters = {job: chr(ord("A") + index) for index, job in enumerate(jobs)}
    return _JOB.sub(lambda match: f"job {letters.get(match[1], match[1])}", landed)


def _account_ms(node: Node, tail: LogTail) -> List[float]:
    node.flush_syslog()
    matches = [_TOOK.search(line) for line in tail.lines()]
    return [int(match[1]) / 1e6 for match in matches if match]
