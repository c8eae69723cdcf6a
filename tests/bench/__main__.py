"""``./dev bench [--json] [--quick] [--only PART] [--connections N]``: measures, prints, compares with numbers to reach.

Owns the command line and the output: a table, or one JSON document, on stdout, and all else on stderr. A part
that cannot be measured here says why and does not take the others with it. Exit status 1 if one could not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from typing import Callable, Dict, List, Mapping

from bench import figures, goals, rows
from bench.figures import Figure
from bench.place import CONNECTIONS_MAX, Place
from bench.rows import Plan

PARTS: Mapping[str, Callable[[Place, Plan], rows.Figures]] = {
    "connect": rows.connect_cost,
    "agent": rows.agent_itself,
    "callerid": rows.lookup_and_callerid,
    "account": rows.account_phase,
}


def main() -> int:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="under a minute, with fewer cells; otherwise ten minutes")
    parser.add_argument("--only", action="append", choices=sorted(PARTS), help="this part only; may be repeated")
    parser.add_argument(
        "--connections",
        type=int,
        default=0,
        metavar="N",
        help="one more state of the node for callerid: with N connections more (500000 are a million sockets, 5 GB)",
    )
    given = parser.parse_args()
    if not 0 <= given.connections <= CONNECTIONS_MAX:
        parser.error(f"--connections {given.connections}: expected 0 to {CONNECTIONS_MAX}")
    plan = rows.QUICK if given.quick else Plan()
    if given.connections:
        plan = dataclasses.replace(plan, connections=(*plan.connections, given.connections))
    if os.geteuid() != 0:
        parser.error("needs root: namespaces, cgroups and BPF")
    # As an exception, so that everything is taken down on the way out.
    signal.signal(signal.SIGTERM, _interrupted)
    began = time.monotonic()
    machine = figures.machine()
    _say(f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, load {machine['load_average']}")
    found: List[Figure] = []
    failed: Dict[str, str] = {}
    with Place() as place:
        _say(f"the node is up{': ' + place.no_slurm if place.no_slurm else ', with Slurm'}")
        for name in given.only or PARTS:
            try:
                for figure in PARTS[name](place, plan):
                    found.append(figure)
                    value = figure.missing or f"{figure.p50:.4g} {figure.unit}"
                    _say(f"{time.monotonic() - began:5.0f} s  {figure.what}, {figure.node}, {figure.who}: {value}")
            except Exception as error:
                traceback.print_exc()
                failed[name] = f"{type(error).__name__}: {error}"
    reached = goals.judge(found)
    seconds = round(time.monotonic() - began)
    if given.json:
        document = {"machine": machine, "seconds": seconds, "figures": figures.as_json(found)}
        json.dump({**document, "goals": [goal.__dict__ for goal in reached], "failed": failed}, sys.stdout, indent=2)
        print()
    else:
        print("  ".join(f"{key}: {value}" for key, value in machine.items()))
        print(figures.table(found))
        print("\n" + goals.table(reached))
        for name, text in failed.items():
            print(f"\n{name} could not be measured: {text}")
        print(f"\n{seconds} s. Other work on the machine is in these figures: compare within one run.")
    return 1 if failed else 0


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is."""


def _interrupted(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(f"signal {number}")


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
