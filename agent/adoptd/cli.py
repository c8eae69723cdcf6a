"""The two commands: ``adoptd`` for the service and its node, ``adoptctl`` for people.

Owns arguments, output and exit statuses: 0 done, whatever whois or explain answered; 1 it failed (join: also for
some of the processes only; watch: the agent has gone), or the probe is not sound; 2 the command line or the
configuration is wrong; 130 interrupted. doctor's is its worst finding's: 1 a warning, 2 a failure. With ``--json``
one JSON document, watch's one per line, goes to standard output and nothing else; what failed is said on standard
error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Callable, Mapping, Optional, Sequence

from adoptd import __version__, config, log, probe
from adoptd.client import AgentError, ask_agent, follow_agent
from adoptd.config import DEFAULT_FILE
from adoptd.events import EventKind
from adoptd.model import AdoptdError, ConfigError, Endpoint, ProbeError
from adoptd.pam_lines import MODULE, PAM_DIRECTORY, PamLine, adopt_lines, wrong_options
from adoptd.printing import (
    event_line,
    print_explained,
    print_fields,
    print_jobs,
    print_joined,
    print_sessions,
    print_status,
    print_whereami,
    with_counted,
)
from adoptd.wire.control import Command, Result

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

# Two rounds of checks, one after the other: under 10 s in all.
DOCTOR_S = 4.5


def adoptd_main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run ``adoptd``; the exit status."""
    return _carry_out(adoptd_parser().parse_args(arguments))


def adoptctl_main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run ``adoptctl``; the exit status."""
    return _carry_out(adoptctl_parser().parse_args(arguments))


def adoptd_parser() -> argparse.ArgumentParser:
    """All that ``adoptd`` takes; the manual page and the completions are made from it."""
    parser = argparse.ArgumentParser(prog="adoptd", description="Puts ssh sessions into the batch job they came from.")
    parser.add_argument("--version", action="version", version=f"adoptd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the agent in the foreground")
    run.set_defaults(carry_out=_run)

    loaded = commands.add_parser("probe", help="load, unload or look at the BPF probe")
    loaded.add_argument(
        "action",
        choices=("load", "unload", "status"),
        help="compile and pin it where it is not; take it away; say whether it is there and passes its self-test",
    )
    loaded.add_argument("--json", action="store_true", help="print one JSON document")
    loaded.set_defaults(carry_out=_probe)

    settings = commands.add_parser("config", help="check the configuration's files, or show what they say")
    settings.add_argument(
        "action", choices=("check", "show"), help="say what is wrong; print every key as the files have it"
    )
    settings.set_defaults(carry_out=_config)

    examine = commands.add_parser("doctor", help="say whether logins on this node will do what is expected")
    examine.add_argument("--json", action="store_true", help="print one JSON document")
    examine.add_argument("--service", default="sshd", help="the PAM service to look at (default: %(default)s)")
    examine.add_argument(
        "--peer", action="append", metavar="NODE", help="ask the agent of this node, too; may be repeated"
    )
    examine.add_argument(
        "--deep", action="store_true", help="also adopt a process of our own into a job, and load a probe for trial"
    )
    examine.add_argument(
        "--timeout",
        type=_seconds,
        default=DOCTOR_S,
        metavar="SECONDS",
        help="when a check is given up, of this node and then of peers (default: %(default)s)",
    )
    examine.set_defaults(carry_out=_doctor)

    for command in (run, loaded, settings, examine):
        command.add_argument("--config", type=Path, default=DEFAULT_FILE, help="configuration (default: %(default)s)")
    return parser


def adoptctl_parser() -> argparse.ArgumentParser:
    """All that ``adoptctl`` takes; the manual page and the completions are made from it."""
    parser = argparse.ArgumentParser(prog="adoptctl", description="Asks the adoptd agent of this node.")
    parser.add_argument("--version", action="version", version=f"adoptctl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    status = commands.add_parser(
        "status", help="how the agent is: its witnesses, its probe, how many sessions it knows"
    )
    status.set_defaults(carry_out=_ask(lambda given: Command("status", {}), print_status))

    jobs = commands.add_parser("jobs", help="the jobs on this node (root: everybody's)")
    jobs.set_defaults(carry_out=_ask(lambda given: Command("jobs", {}), print_jobs))

    whois = commands.add_parser("whois", help="which job owns a TCP connection")
    whois.add_argument("source", type=_endpoint, help="the end that called connect(): IP:PORT or [IPV6]:PORT")
    whois.add_argument("destination", type=_endpoint, help="the other end")
    whois.add_argument("--at", metavar="NODE", help="ask the agent of this node (default: this one)")
    whois.set_defaults(carry_out=_ask(_whois_command, print_fields))

    sessions = commands.add_parser("sessions", help="the sessions in jobs of this node (root: everybody's)")
    sessions.set_defaults(carry_out=_ask(lambda given: Command("sessions", {}), print_sessions))

    explain = commands.add_parser(
        "explain", help="why a session is in its job, or the decision a login would get now, stage by stage"
    )
    what = explain.add_mutually_exclusive_group(required=True)
    what.add_argument("session", nargs="?", metavar="SESSION_OR_PID", help="a session, or a process of one")
    what.add_argument("--user", help="who would log in")
    explain.add_argument("--from", dest="source", type=_endpoint, metavar="IP:PORT", help="the ssh client's end")
    explain.add_argument("--to", type=_endpoint, metavar="IP:PORT", help="the end of sshd (default: port 22 here)")
    explain.add_argument(
        "--option", action="append", metavar="NAME=VALUE", help="a PAM option (default: those of the PAM service sshd)"
    )
    explain.set_defaults(carry_out=_ask(_explain_command, print_explained))

    whereami = commands.add_parser("whereami", help="the job that this very process is in, its limits and its use")
    whereami.set_defaults(carry_out=_ask(lambda given: Command("whereami", {}), print_whereami))

    join = commands.add_parser("join", help="move this session into another of your jobs on this node")
    join.add_argument("job", metavar="JOB", help="the job to move to")
    join.add_argument("--session", metavar="ID", help="root only: move this session instead of one's own")
    join.set_defaults(carry_out=_join)

    watch = commands.add_parser("watch", help="what happens as it happens, until interrupted (root: everybody's)")
    watch.add_argument(
        "--kind", action="append", choices=[kind.value for kind in EventKind], help="only these; may be repeated"
    )
    watch.add_argument("--user", help="only what is about this user")
    watch.add_argument("--json", action="store_true", help="print one JSON document per line")
    watch.set_defaults(carry_out=_watch)

    for command in (status, jobs, whois, sessions, explain, whereami, join):
        command.add_argument("--json", action="store_true", help="print one JSON document")
    for command in (status, jobs, whois, sessions, explain, whereami, join, watch):
        command.add_argument("--socket", help="the agent's socket for users (default: that of the configuration)")
        command.add_argument("--config", type=Path, default=DEFAULT_FILE, help="configuration (default: %(default)s)")
    return parser


def _carry_out(given: argparse.Namespace) -> int:
    try:
        status: int = given.carry_out(given)
        # There is none where the shell has closed it (>&-).
        if sys.stdout is not None:
            sys.stdout.flush()
    except ConfigError as error:
        print(f"{given.command}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except AdoptdError as error:
        print(f"{given.command}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        # As a shell shows a command that SIGINT ended. watch has no other end.
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (| head): not an error, and nothing to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        print(f"{given.command}: {error}", file=sys.stderr)
        return EXIT_FAILED
    return status


def _run(given: argparse.Namespace) -> int:
    if os.geteuid() != 0:
        raise AdoptdError(f"the agent runs as root, not as uid {os.geteuid()}")
    # Imported here: the other commands need none of what the agent needs.
    from adoptd.service import Service

    Service(given.config).run()
    return 0


def _probe(given: argparse.Namespace) -> int:
    section = config.load(given.config).probe
    pin_dir = Path(section.pin_dir)
    source_dir = Path(section.source_dir) if section.source_dir else None
    if given.action == "unload":
        print(f"probe: {probe.unload(pin_dir)}", file=sys.stderr)
        if given.json:
            _print_json(dataclasses.asdict(probe.status(pin_dir, source_dir)))
        return 0
    if given.action == "load":
        print(f"probe: {probe.load(pin_dir, source_dir)}", file=sys.stderr)
    status = probe.status(pin_dir, source_dir)
    self_test = _self_test(pin_dir, source_dir) if status.problem is None else "not tried"
    shown: Result = {**dataclasses.asdict(status), "self_test": self_test}
    if given.json:
        _print_json(shown)
    else:
        print_fields(with_counted(shown, "counters"))
    return 0 if self_test == "ok" else EXIT_FAILED


def _self_test(pin_dir: Path, source_dir: Optional[Path]) -> str:
    try:
        with probe.open_probe(pin_dir, source_dir) as opened:
            probe.self_test(opened)
    except ProbeError as error:
        return str(error)
    return "ok"


def _config(given: argparse.Namespace) -> int:
    settings = config.load(given.config)
    if given.action == "show":
        print(config.show(settings), end="")
    else:
        # By name: a file of conf.d that is not named *.toml is not read, and nothing would say so.
        beside = sorted(given.config.parent.glob("conf.d/*.toml"))
        print(f"{', '.join(str(path) for path in (given.config, *beside))}: right")
    return 0


def _doctor(given: argparse.Namespace) -> int:
    # Imported here: what looks at everything is not to be in the agent's memory.
    from adoptd import doctor
    from adoptd.doctor.shown import as_json, as_lines

    log.silence()
    findings = doctor.examine(given.config, PAM_DIRECTORY, given.service, given.peer or (), given.deep, given.timeout)
    if given.json:
        _print_json(as_json(findings))
    else:
        print("\n".join(as_lines(findings, shutil.get_terminal_size((120, 50)).columns)))
    return doctor.worst(findings).value


def _ask(
    make: Callable[[argparse.Namespace], Command], show: Callable[[Result], None]
) -> Callable[[argparse.Namespace], int]:
    def carry_out(given: argparse.Namespace) -> int:
        result = ask_agent(_socket(given), make(given))
        if given.json:
            _print_json(result)
        else:
            show(result)
        return 0

    return carry_out


def _join(given: argparse.Namespace) -> int:
    arguments = {"job": given.job, "session": given.session}
    result = ask_agent(_socket(given), Command("join", {name: value for name, value in arguments.items() if value}))
    if given.json:
        _print_json(result)
    else:
        print_joined(result)
    return EXIT_FAILED if result["left"] else 0


def _watch(given: argparse.Namespace) -> int:
    arguments = {"kinds": ",".join(given.kind or ()), "user": given.user}
    command = Command("watch", {name: value for name, value in arguments.items() if value})
    for event in follow_agent(_socket(given), command, sys.stdout.fileno()):
        line = json.dumps(event) if given.json else event_line(event)
        if line and "watching" not in event:
            print(line, flush=True)
        elif "watching" in event and sys.stderr.isatty():
            # Only to somebody at a terminal, who would otherwise wonder at a screen without a line.
            print("-- watching; Ctrl-C ends it", file=sys.stderr)
    return EXIT_FAILED


def _socket(given: argparse.Namespace) -> str:
    if given.socket:
        return str(given.socket)
    try:
        return config.load(given.config).agent.user_socket
    except ConfigError:
        # The configuration is root's to read; an ordinary user finds the agent where it is by default.
        if given.config != DEFAULT_FILE:
            raise
        return config.AgentConfig().user_socket


def _whois_command(given: argparse.Namespace) -> Command:
    arguments = {"source": given.source, "destination": given.destination}
    if given.at:
        arguments["at"] = given.at if os.geteuid() == 0 else _address_of(given.at, given.source.startswith("["))
    return Command("whois", arguments)


def _address_of(host: str, is_version_6: bool) -> str:
    """The agent looks up names for root alone. Raises AdoptdError."""
    family = socket.AF_INET6 if is_version_6 else socket.AF_INET
    try:
        found = socket.getaddrinfo(host, None, family=family, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise AdoptdError(f"{host!r} has no IPv{6 if is_version_6 else 4} address ({error})") from None
    return str(found[0][4][0]).partition("%")[0]


def _explain_command(given: argparse.Namespace) -> Command:
    arguments = {"session": given.session, "user": given.user, "from": given.source, "to": given.to}
    if given.user:
        arguments["options"] = " ".join(_pam_options(given))
    elif given.source or given.to or given.option:
        raise ConfigError("--from, --to and --option go with --user: a session is explained as it was decided")
    return Command("explain", {name: value for name, value in arguments.items() if value})


def _pam_options(given: argparse.Namespace) -> Sequence[str]:
    if given.option is not None:
        typed = PamLine(Path("--option"), 1, "account", "required", MODULE, tuple(given.option))
        for fault in wrong_options(typed):
            raise ConfigError(f"--option: {fault}")
        return typed.words
    try:
        lines = [line for line in adopt_lines("sshd") if line.kind == "account"]
    except OSError:
        return ()
    for line in lines:
        faults = wrong_options(line)
        if faults:
            raise AgentError(f"{line}: {faults[0]}; until it is right, only root can log in")
        return line.words
    return ()


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,3})?", text) or not 1 <= float(text) <= 300:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to 300")
    return float(text)


def _endpoint(text: str) -> str:
    try:
        return str(Endpoint.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _print_json(value: Mapping[str, object]) -> None:
    print(json.dumps(value, indent=2))
