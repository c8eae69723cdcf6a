"""The command line of the demo: a cluster up, the scenarios run, what was seen printed, nothing left.

Called by ``./dev demo``. In JSON mode stdout gets exactly one document and everything else is stderr's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from typing import Dict, Sequence, TextIO

from lab import kept
from lab.lab import Lab
from lab.nodes import NODES_MAX, Cluster
from lab.outcome import Outcome
from lab.runs import new_run_id, remove_dead_runs
from lab.scenarios import ALL_SCENARIOS, SCENARIOS, claim_of
from lab.show import print_table, run_all, sample_metrics, verdict
from lab.supervisor import Supervisor, run_supervised


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./dev demo",
        description="Nodes on this machine with real sshd, PAM, BPF and cgroups, and where ssh sessions land on them.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")
    parser.add_argument("--keep", action="store_true", help="leave the nodes up, and say how to enter them")
    parser.add_argument("--down", nargs="?", const="", metavar="ID", help="remove what --keep left: all, or one by id")
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help="how many nodes (default 2)")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this scenario; may be given again")
    parser.add_argument("--seal", choices=("munge", "key"), default="munge", help="how agents seal (default munge)")
    parser.add_argument("--slurm", action="store_true", help="jobs of a real Slurm, and the scenarios about it")
    parser.add_argument("--list", action="store_true", help="list the scenarios and what each shows")
    options = parser.parse_args(arguments)
    options.scenarios = ALL_SCENARIOS if options.slurm else SCENARIOS
    for name in options.only or []:
        if name not in options.scenarios:
            parser.error(f"no scenario {name!r}; there are: {', '.join(options.scenarios)}")
    if not 2 <= options.nodes <= NODES_MAX:
        parser.error(f"--nodes {options.nodes}: expected 2 to {NODES_MAX}")
    return options


def _print_document(
    options: argparse.Namespace, outcomes: Dict[str, Outcome], metrics: Sequence[str], facts: Dict[str, object]
) -> None:
    scenarios = [{"name": name, "claim": claim_of(name), **asdict(outcome)} for name, outcome in outcomes.items()]
    document = {"scenarios": scenarios, "ok": all(outcome.ok for outcome in outcomes.values())}
    settings = {"nodes": options.nodes, "seal": options.seal, "metrics": list(metrics)}
    sys.stdout.write(json.dumps({**document, **settings, **facts}, indent=2) + "\n")
    sys.stdout.flush()


def _demonstrate(options: argparse.Namespace, run_id: str, supervisor: Supervisor, out: TextIO) -> int:
    started = time.monotonic()
    remove_dead_runs()
    with Cluster(options.nodes, seal=options.seal, run_id=run_id, slurm=options.slurm) as cluster:
        lab = Lab(cluster)
        out.write(f"run {run_id}: {options.nodes} nodes are up after {time.monotonic() - started:.1f} s; ")
        out.write(f"jobs are {lab.kind.described}, agents seal with {options.seal}\n\n")
        outcomes = run_all(lab, options.only or list(options.scenarios), out)
        metrics = sample_metrics(lab)
        print_table(outcomes, out)
        out.write("\nsome of node2's metrics:\n" + "".join(f"  {line}\n" for line in metrics))
        seconds = time.monotonic() - started
        status = 0 if all(outcome.ok for outcome in outcomes.values()) else 1
        if options.json:
            _print_document(options, outcomes, metrics, {"jobs": lab.kind.described, "seconds": round(seconds, 2)})
        if not options.keep:
            out.write(f"\n{verdict(outcomes)}, in {seconds:.1f} s\n")
            out.flush()
            return status
        with lab.jobs(2, on=cluster.nodes) as jobs:
            kept.prepare(lab)
            kept.print_how_to_try(lab, jobs, out)
            out.write(f"\n{verdict(outcomes)}, in {seconds:.1f} s\n")
            out.flush()
            cluster.write_state(kept=True)
            return supervisor.stay(status)


def main() -> int:
    """Run the command line. Returns the exit status: 0 only if every scenario went as expected."""
    options = _parse(sys.argv[1:])
    out = sys.stderr if options.json else sys.stdout
    if options.list:
        out.write("".join(f"{name}: {claim_of(name)}\n" for name in options.scenarios))
        return 0
    if os.geteuid() != 0:
        sys.stderr.write("demo: namespaces, cgroups and BPF need root: sudo ./dev demo\n")
        return 1
    if options.down is not None:
        return kept.take_down(options.down, out)
    run_id = new_run_id()
    return run_supervised(run_id, lambda supervisor: _demonstrate(options, run_id, supervisor, out))


if __name__ == "__main__":
    sys.exit(main())
