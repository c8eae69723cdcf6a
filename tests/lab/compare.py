"""The command line of ``./dev lab compare``: pam_slurm_adopt and pam_adopt.so in the same logins, and a table of it.

Brings up a cluster of its own and takes it down. In JSON mode stdout gets exactly one document and everything else
is stderr's. Called by standing, the command line of ``./dev lab``.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import List, Optional, Sequence, TextIO

from lab.compare_scenarios import COMPARISONS, claim_of
from lab.compare_sides import OURS, THEIRS, Row, Seen, Spread, Stage
from lab.nodes import Cluster
from lab.runs import new_run_id, remove_dead_runs
from lab.supervisor import run_supervised

ROUNDS = 5
ROUNDS_MAX = 100
# Where libpam looks for a module that is named without a path, as Debian packages it.
PEER_FILES = (Path("/usr/lib/security/pam_slurm_adopt.so"), Path("/lib/security/pam_slurm_adopt.so"))


def run_comparisons(stage: Stage, names: Sequence[str], out: TextIO) -> List[Row]:
    """The rows of the named scenarios, told as they come. A scenario that raises ends the run: RuntimeError."""
    for number, name in enumerate(names, 1):
        out.write(f"[{number:2}/{len(names)}] {name}: {claim_of(name)}\n")
        stage.scenario = name
        before = len(stage.rows)
        try:
            COMPARISONS[name](stage)
        except (RuntimeError, OSError, TimeoutError) as error:
            raise RuntimeError(f"{name}: {error}") from error
        for row in stage.rows[before:]:
            out.write(f"        {row.what}: {_landed(row)}{'' if row.ok else f'  - EXPECTED {row.expected}'}\n")
        out.flush()
    return stage.rows


def print_table(rows: Sequence[Row], out: TextIO) -> None:
    """All rows, a line each: what both did with the login, and the account line's time in sshd."""
    width = max(len(row.what) for row in rows)
    name_width = max(len(row.scenario) for row in rows)
    out.write(
        f"\n{'scenario':{name_width}}  {'login':{width}}  {'':7}  {THEIRS + ', ms':>22}  {OURS + ', ms':>22}  landed\n"
    )
    shown = ""
    for row in rows:
        name, shown = ("" if row.scenario == shown else row.scenario), row.scenario
        mark = "FAIL" if not row.ok else "same" if row.same else "differs"
        out.write(
            f"{name:{name_width}}  {row.what:{width}}  {mark:7}  "
            f"{_spread(row.seen[THEIRS]):>22}  {_spread(row.seen[OURS]):>22}  {_landed(row)}\n"
        )
    reasons = dict.fromkeys((row.scenario, row.differs) for row in rows if not row.same and row.differs)
    if reasons:
        out.write("\nwhere they differ:\n" + "".join(f"  {name}: {why}\n" for name, why in reasons))
    out.write("\nms: the module's line in sshd's account phase, median (least-most); the whole logins took\n")
    for name in (THEIRS, OURS):
        medians = sorted(seen.login_ms.median for row in rows if (seen := row.seen[name]).login_ms is not None)
        out.write(f"  {name}: {medians[len(medians) // 2]:.0f} ms in the middle one of the rows\n")


def _landed(row: Row) -> str:
    theirs, ours = row.seen[THEIRS].landed, row.seen[OURS].landed
    return ours if row.same else f"{THEIRS}: {theirs}; {OURS}: {ours}"


def _spread(seen: Seen) -> str:
    spread: Optional[Spread] = seen.account_ms
    return "-" if spread is None else f"{spread.median:.1f} ({spread.least:.1f}-{spread.most:.1f})"


def _document(rows: Sequence[Row], nodes: int, rounds: int, seconds: float) -> str:
    listed = [{**asdict(row), "same": row.same, "ok": row.ok} for row in rows]
    document = {"rows": listed, "ok": all(row.ok for row in rows), "nodes": nodes, "rounds": rounds}
    return json.dumps({**document, "seconds": round(seconds, 1)}, indent=2) + "\n"


def compare(nodes: int, rounds: int, only: Sequence[str], as_json: bool, extra: str = "") -> int:
    """Run the comparison. Exit status 0: ours did as it has to in every row, and where they must be equal they are."""
    out = sys.stderr if as_json else sys.stdout
    if not any(file.exists() for file in PEER_FILES):
        sys.stderr.write(f"lab: there is no {PEER_FILES[0].name} here to compare with (Debian: libpam-slurm-adopt)\n")
        return 1
    run_id = new_run_id()

    def work(_supervisor: object) -> int:
        started = time.monotonic()
        remove_dead_runs()
        with Cluster(nodes, run_id=run_id, slurm=True) as cluster:
            out.write(f"run {run_id}: {nodes} compute nodes are up after {time.monotonic() - started:.1f} s\n")
            rows = run_comparisons(Stage(cluster, rounds, extra=extra), only or list(COMPARISONS), out)
        seconds = time.monotonic() - started
        print_table(rows, out)
        good = sum(row.ok for row in rows)
        out.write(
            f"\n{good} of {len(rows)} as expected, {sum(row.same for row in rows)} the same, in {seconds:.0f} s\n"
        )
        out.flush()
        if as_json:
            sys.stdout.write(_document(rows, nodes, rounds, seconds))
            sys.stdout.flush()
        return 0 if good == len(rows) else 1

    return run_supervised(run_id, work)
