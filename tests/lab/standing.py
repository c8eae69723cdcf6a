"""The command line of the standing lab: a Slurm cluster that stays up to be worked with, ``./dev lab``.

One lab per name; up and down may be said again. Commands in it run in place of this process, so a terminal
stays a terminal. Called by ``./dev lab``.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Mapping, Optional, Sequence

from lab import kept
from lab.compare import ROUNDS, ROUNDS_MAX, compare
from lab.compare_scenarios import COMPARISONS
from lab.etc_files import PEOPLE, ROOT, User
from lab.lab import Lab
from lab.node import Node, environment_of
from lab.nodes import LOGIN, NODES_MAX, Cluster
from lab.runs import RunState, group_of_run, read_states, remove_dead_runs, run_directory
from lab.supervisor import Supervisor, run_supervised

USERS: Mapping[str, User] = {user.name: user for user in (*PEOPLE, ROOT)}
NAME = "lab"
EXIT_NOT_UP = 3  # as LSB has it for a service that is not running


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./dev lab",
        description="A real Slurm cluster on this machine, in namespaces: a login node and compute nodes.",
    )
    parser.add_argument("--name", default=NAME, help="which lab, if there are to be several (default lab)")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="bring it up, unless it is")
    up.add_argument("--nodes", type=int, default=2, metavar="N", help="how many compute nodes (default 2)")
    commands.add_parser("down", help="end and remove it, if it is up")
    side = commands.add_parser("compare", help="pam_slurm_adopt and pam_adopt in the same logins, on a lab of its own")
    side.add_argument("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")
    side.add_argument("--nodes", type=int, default=2, metavar="N", help="how many compute nodes (default 2)")
    side.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"of each login (default {ROUNDS})")
    side.add_argument("--only", action="append", metavar="NAME", choices=list(COMPARISONS), help="only this scenario")
    side.add_argument("--extra", default="", metavar="OPTIONS", help="more options for pam_adopt.so, not for the other")
    commands.add_parser("status", help="nodes, jobs and agents; exit status 3 if it is not up")
    run = commands.add_parser("run", help="run a command on a node; a single word is for the shell")
    run.add_argument("node", metavar="NODE", help="login, node1, node2...")
    run.add_argument("argv", metavar="[-u USER] CMD", nargs=argparse.REMAINDER, help="as root, unless told")
    options = parser.parse_args(arguments)
    options.user = "root"
    if options.command == "run" and options.argv[:1] in (["-u"], ["--user"]):
        options.user, options.argv = "".join(options.argv[1:2]), options.argv[2:]
        if options.user not in USERS:
            parser.error(f"run: no user {options.user!r}; there are: {', '.join(USERS)}")
    # It is part of socket paths, of cgroups' and of Slurm's node names.
    if not re.fullmatch(r"[a-z][a-z0-9]{0,15}", options.name):
        parser.error(f"--name {options.name}: expected up to 16 small letters and digits, a letter first")
    if options.command in ("up", "compare") and not 2 <= options.nodes <= NODES_MAX:
        parser.error(f"--nodes {options.nodes}: expected 2 to {NODES_MAX}")
    if options.command == "compare" and not 1 <= options.rounds <= ROUNDS_MAX:
        parser.error(f"--rounds {options.rounds}: expected 1 to {ROUNDS_MAX}")
    if options.command == "run" and not options.argv:
        parser.error("run: what?")
    return options


def _bring_up(name: str, nodes: int, supervisor: Supervisor) -> int:
    started = time.monotonic()
    with Cluster(nodes, run_id=name, slurm=True) as cluster:
        lab = Lab(cluster)
        kept.prepare(lab)
        seconds = time.monotonic() - started
        names = ", ".join(node.name for node in cluster.hosts)
        sys.stdout.write(f"the lab is up after {seconds:.1f} s: {names}; users {', '.join(u.name for u in PEOPLE)}\n")
        which = "" if name == NAME else f" --name {name}"
        for example in ("sinfo", "-u alice salloc ssh node1 cat /proc/self/cgroup"):
            sys.stdout.write(f"  ./dev lab{which} run {LOGIN} {example}\n")
        sys.stdout.flush()
        return supervisor.stay(0)


def _up(options: argparse.Namespace, state: Optional[RunState]) -> int:
    if state is not None and state.alive:
        there = len(state.nodes) - 1
        sys.stdout.write(f"the lab is up, with {there} compute nodes\n")
        if there == options.nodes:
            return 0
        sys.stderr.write(f"lab: not with {options.nodes}: ./dev lab down first\n")
        return 1
    remove_dead_runs()
    return run_supervised(options.name, lambda supervisor: _bring_up(options.name, options.nodes, supervisor))


def _node(name: str, state: RunState) -> Node:
    directory: Path = run_directory(state.run_id) / name
    return Node(name, "", "", state.nodes[name], group_of_run(state.run_id).child(name), directory)


def _run(node: Node, user: User, argv: Sequence[str]) -> int:
    words = list(argv) if len(argv) > 1 else ["/bin/sh", "-c", argv[0]]
    node.entering(user)()
    os.chdir(user.home)
    environment = {**environment_of(user), "TERM": os.environ.get("TERM", "dumb")}
    sys.stdout.flush()
    try:
        os.execvpe(words[0], words, environment)
    except OSError as error:
        sys.stderr.write(f"lab: {words[0]}: {error.strerror}\n")
        return 127


def _status(state: RunState) -> int:
    login = _node(LOGIN, state)
    for argv in (["sinfo", "-N", "-o", "%12N %.10T %.8e %E"], ["squeue", "-o", "%8i %8u %10T %10M %N"]):
        sys.stdout.write(login.run(argv) + "\n")
    for name in sorted(state.nodes):
        sys.stdout.write(f"{name}'s agent:\n")
        sys.stdout.flush()
        node = login if name == LOGIN else _node(name, state)
        with node.popen(["/run/adoptctl-demo", "status"], stdout=sys.stdout.fileno(), stderr=subprocess.STDOUT):
            pass
    return 0


def main() -> int:
    """Run the command line and return the exit status; run's is the command's own."""
    options = _parse(sys.argv[1:])
    if os.geteuid() != 0:
        sys.stderr.write("lab: namespaces, cgroups and BPF need root: sudo ./dev lab\n")
        return 1
    if options.command == "compare":
        return compare(options.nodes, options.rounds, options.only or (), options.json, options.extra)
    state = read_states().get(options.name)
    if options.command == "up":
        return _up(options, state)
    if options.command == "down":
        if state is None:
            sys.stdout.write("the lab is not up\n")
            return 0
        return kept.take_down(options.name, sys.stdout)
    if state is None or not state.alive:
        sys.stderr.write("lab: it is not up: sudo ./dev lab up\n")
        return EXIT_NOT_UP
    if options.command == "status":
        return _status(state)
    if options.node not in state.nodes:
        sys.stderr.write(f"lab: no node {options.node}; there are: {' '.join(sorted(state.nodes))}\n")
        return 2
    return _run(_node(options.node, state), USERS[options.user], options.argv)


if __name__ == "__main__":
    sys.exit(main())
