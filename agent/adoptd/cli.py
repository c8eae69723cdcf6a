"""The two commands: ``adoptd`` for the service and its node, ``adoptctl`` for people.

Owns arguments, output and exit statuses: 0 done, whatever whois or explain answered; 1 it failed, or the
probe is not sound; 2 the command line or the configuration is wrong. doctor's is its worst finding's: 1 a
warning, 2 a failure. With ``--json`` one JSON document goes to standard output and nothing else; what
failed is said on standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pwd
import sys
from pathlib import Path
from typing import Callable, List, Mapping, Optional, Sequence

from adoptd import __version__, config, doctor, probe
from adoptd.client import AgentError, ask_agent
from adoptd.config import DEFAULT_FILE
from adoptd.model import AdoptdError, ConfigError, Endpoint, ProbeError
from adoptd.pam_lines import MODULE, PAM_DIRECTORY, PamLine, adopt_lines, wrong_options
from adoptd.wire.control import Command, Result

EXIT_FAILED = 1
EXIT_USAGE = 2


def adoptd_main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run ``adoptd``; the exit status."""
    parser = argparse.ArgumentParser(prog="adoptd", description="Puts ssh sessions into the batch job they came from.")
    parser.add_argument("--version", action="version", version=f"adoptd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the agent in the foreground")
    run.set_defaults(carry_out=_run)

    loaded = commands.add_parser("probe", help="load, unload or look at the BPF probe")
    loaded.add_argument("action", choices=("load", "unload", "status"))
    loaded.add_argument("--json", action="store_true", help="print one JSON document")
    loaded.set_defaults(carry_out=_probe)

    settings = commands.add_parser("config", help="check the configuration, or show the one in force")
    settings.add_argument("action", choices=("check", "show"))
    settings.set_defaults(carry_out=_config)

    examine = commands.add_parser("doctor", help="say whether logins on this node will do what is expected")
    examine.add_argument("--json", action="store_true", help="print one JSON document")
    examine.add_argument("--service", default="sshd", help="the PAM service to look at (default: %(default)s)")
    examine.set_defaults(carry_out=_doctor)

    for command in (run, loaded, settings, examine):
        command.add_argument("--config", type=Path, default=DEFAULT_FILE, help="default: %(default)s")
    return _carry_out(parser.parse_args(arguments))


def adoptctl_main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run ``adoptctl``; the exit status."""
    parser = argparse.ArgumentParser(prog="adoptctl", description="Asks the adoptd agent of this node.")
    parser.add_argument("--version", action="version", version=f"adoptctl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    status = commands.add_parser("status", help="how the agent is")
    status.set_defaults(carry_out=_ask(lambda given: Command("status", {}), _print_fields))

    jobs = commands.add_parser("jobs", help="the jobs on this node (root: everybody's)")
    jobs.set_defaults(carry_out=_ask(lambda given: Command("jobs", {}), _print_jobs))

    whois = commands.add_parser("whois", help="which job owns a TCP connection")
    whois.add_argument("source", type=_endpoint, help="the end that called connect(): IP:PORT or [IPV6]:PORT")
    whois.add_argument("destination", type=_endpoint, help="the other end")
    whois.add_argument("--at", metavar="NODE", help="ask the agent of this node (default: this one)")
    whois.set_defaults(carry_out=_ask(_whois_command, _print_fields))

    explain = commands.add_parser("explain", help="the decision a login would get now, stage by stage")
    explain.add_argument("--user", required=True)
    explain.add_argument("--from", dest="source", type=_endpoint, metavar="IP:PORT", help="the ssh client's end")
    explain.add_argument("--to", type=_endpoint, metavar="IP:PORT", help="sshd's end (default: port 22 here)")
    explain.add_argument(
        "--option", action="append", metavar="NAME=VALUE", help="a PAM option (default: those of the PAM service sshd)"
    )
    explain.set_defaults(carry_out=_ask(_explain_command, _print_explained))

    for command in (status, jobs, whois, explain):
        command.add_argument("--json", action="store_true", help="print one JSON document")
        command.add_argument("--socket", help="the agent's socket for users (default: that of the configuration)")
        command.add_argument("--config", type=Path, default=DEFAULT_FILE, help="default: %(default)s")
    return _carry_out(parser.parse_args(arguments))


def _carry_out(given: argparse.Namespace) -> int:
    try:
        status: int = given.carry_out(given)
        sys.stdout.flush()
    except ConfigError as error:
        print(f"{given.command}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except AdoptdError as error:
        print(f"{given.command}: {error}", file=sys.stderr)
        return EXIT_FAILED
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
        print(probe.unload(pin_dir), file=sys.stderr)
        if given.json:
            _print_json(dataclasses.asdict(probe.status(pin_dir, source_dir)))
        return 0
    if given.action == "load":
        print(probe.load(pin_dir, source_dir), file=sys.stderr)
    status = probe.status(pin_dir, source_dir)
    self_test = _self_test(pin_dir, source_dir) if status.problem is None else "not tried"
    shown: Result = {**dataclasses.asdict(status), "self_test": self_test}
    if given.json:
        _print_json(shown)
    else:
        _print_fields(shown)
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
        print(f"{given.config}: right")
    return 0


def _doctor(given: argparse.Namespace) -> int:
    findings = doctor.examine(given.config, PAM_DIRECTORY, given.service)
    if given.json:
        _print_json(
            {
                "findings": [
                    {"check": f.check, "grade": f.grade.name.lower(), "seen": f.seen, "remedy": f.remedy}
                    for f in findings
                ],
                "worst": doctor.worst(findings).name.lower(),
            }
        )
    else:
        for finding in findings:
            print(f"{finding.grade.name.lower():8} {finding.check:14} {finding.seen}")
            if finding.remedy:
                print(f"{'':23} -> {finding.remedy}")
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
        arguments["at"] = given.at
    return Command("whois", arguments)


def _explain_command(given: argparse.Namespace) -> Command:
    arguments = {"user": given.user, "from": given.source, "to": given.to, "options": " ".join(_pam_options(given))}
    return Command("explain", {name: value for name, value in arguments.items() if value})


def _pam_options(given: argparse.Namespace) -> Sequence[str]:
    if given.option is not None:
        typed = PamLine(Path("--option"), 1, "account", "required", MODULE, tuple(given.option))
        for fault in wrong_options(typed):
            raise ConfigError(f"--option: {fault}")
        return typed.options
    try:
        lines = [line for line in adopt_lines("sshd") if line.kind == "account"]
    except OSError:
        return ()
    for line in lines:
        faults = wrong_options(line)
        if faults:
            raise AgentError(f"{line}: {faults[0]}; until it is right, only root can log in")
        return line.options
    return ()


def _endpoint(text: str) -> str:
    try:
        return str(Endpoint.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _print_json(value: Mapping[str, object]) -> None:
    print(json.dumps(value, indent=2))


def _print_fields(result: Result, indent: str = "") -> None:
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print_fields(value, indent + "  ")
        elif value not in (None, ""):
            print(f"{indent}{name + ':':24} {value}")


def _print_jobs(result: Result) -> None:
    rows: List[object] = result["jobs"] if isinstance(result["jobs"], list) else []
    print(f"{'JOB':20} USER")
    for row in rows:
        if isinstance(row, dict):
            print(f"{row['job']:20} {_user_name(row['uid'])}")


def _print_explained(result: Result) -> None:
    stages = result.pop("stages")
    for stage in stages if isinstance(stages, list) else []:
        print(f"{stage['at_ms']:8.2f} ms  {stage['stage']:14} {stage['found']}")
    _print_fields(result)


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
