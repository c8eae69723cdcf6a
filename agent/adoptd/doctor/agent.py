"""The doctor's look at the agent: running, of this version, with this configuration, and kept running.

Owns what is said of its status and of its service. Asks the agent as adoptctl does, and systemd for properties; changes
nothing. Called through the table of checks.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Mapping, Optional

from adoptd import __version__
from adoptd.client import AgentError, ask_agent
from adoptd.config import Config
from adoptd.connections.conntrack import NOTHING_TRANSLATED
from adoptd.doctor.callerid import judge_peers_asked
from adoptd.doctor.findings import Finding, Scene, failure, ok, warning
from adoptd.doctor.processes import PROC, agent_pid, read
from adoptd.wire.control import Command, Result

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What the client says where nobody serves the socket.
_NONE_RUNS = "no agent is running: "
_USERS_ANEW = "systemctl restart adoptd adoptd-user.socket (whose ListenStream= is the same)"
_DESCRIPTORS_ENOUGH = 4096
_SYSTEMCTL_S = 3.0
_SERVICE = "adoptd.service"
_SOCKETS = ("adoptd.socket", "adoptd-user.socket", "adoptd-callerid.socket")
# What systemd says of a unit that has a file it cannot make sense of, and of one that it does not start at a boot.
_BROKEN = ("bad-setting", "error")
_UNTIL_BOOT = ("disabled", "enabled-runtime")
_PROPERTIES = "Id,LoadState,ActiveState,SubState,Result,UnitFileState,NRestarts,NeedDaemonReload"


def look_at_agent(scene: Scene) -> Iterator[Finding]:
    """What it says of itself."""
    path = scene.settings.agent.user_socket
    try:
        status = ask_agent(path, Command("status", {}))
    except AgentError as error:
        if not scene.root and os.strerror(errno.EACCES) in str(error):
            yield warning("agent", f"{error}: only root can ask it", "sudo adoptd doctor")
            return
        yield from judge_silence(str(error), agent_pid(scene.settings.agent.pam_socket))
        return
    yield from judge_status(status, path, scene.settings)
    if not scene.root:
        return
    if scene.settings.callerid.enabled:
        yield from judge_peers_asked(status)
    try:
        inside = ask_agent(path, Command("configuration", {}))
    except AgentError:
        yield warning(
            "agent", "an agent of another release, which does not say its configuration", "systemctl restart adoptd"
        )
        return
    yield from judge_configuration(str(inside.get("config")), scene.settings)
    pid = inside.get("pid")
    if isinstance(pid, int):
        yield from judge_process(_limits(pid), read(PROC / str(pid) / "autogroup"))


def judge_silence(error: str, holder: Optional[int]) -> Iterator[Finding]:
    """It cannot be asked. ``holder``: the process that is the agent all the same, by its lock."""
    if holder is None:
        yield failure("agent", error, "systemctl start adoptd; journalctl -u adoptd says why it does not")
    else:
        seen = f"an agent runs (pid {holder}) and cannot be asked: {error.replace(_NONE_RUNS, '')}"
        remedy = "its socket was removed or replaced, or [agent] user_socket changed: " + _USERS_ANEW
        yield failure("agent", seen, remedy)


def judge_status(status: Result, path: str, settings: Config) -> Iterator[Finding]:
    """``path`` is where it answered."""
    version = status.get("version")
    if version == __version__:
        yield ok("agent", f"version {version} answers on {path}, up {_duration(status.get('uptime_s'))}")
    else:
        seen = f"version {version} runs, {__version__} is installed"
        yield warning("agent", seen, "systemctl restart adoptd (logins wait for it, and none is lost)")
    if settings.callerid.enabled and status.get("seal") is None:
        seen = "it has nothing to seal with: other nodes are neither asked nor answered"
        yield failure("agent", seen, "put right what is said of the seal; the agent looks again every 10 s")
    witnesses = status.get("witnesses")
    working: List[str] = []
    for name, state in witnesses.items() if isinstance(witnesses, dict) else ():
        if state == "ok":
            working.append(str(name))
        elif state == NOTHING_TRANSLATED:
            yield ok("witness", f"{name}: {state}")
        else:
            yield warning("witness", f"{name}: {state}", "the other witnesses are asked in its place")
    if working:
        yield ok("witness", f"{', '.join(working)} can be asked")
    probe = status.get("probe")
    if isinstance(probe, dict) and probe.get("self_test") not in (None, "ok"):
        yield warning(
            "witness", f"the agent's last self-test of the probe: {probe['self_test']}", "adoptctl status shows more"
        )


def judge_configuration(in_force: str, settings: Config) -> Iterator[Finding]:
    """Whether what is on disk is what the agent goes by. Which keys differ is told, never their values."""
    try:
        tables = tomllib.loads(in_force)
    except ValueError as error:
        yield warning("agent", f"its configuration cannot be read: {error}", "systemctl restart adoptd")
        return
    changed: List[str] = []
    restart = False
    for table in dataclasses.fields(settings):
        section, running = getattr(settings, table.name), tables.get(table.name, {})
        for item in dataclasses.fields(section):
            value = getattr(section, item.name)
            if (list(value) if isinstance(value, tuple) else value) != running.get(item.name):
                changed.append(f"{table.name}.{item.name}")
                restart = restart or item.metadata["rule"].restart
    if changed:
        seen = f"the files say something else than the agent goes by: {', '.join(changed)}"
        yield warning("agent", seen, f"systemctl {'restart' if restart else 'reload'} adoptd")
    else:
        yield ok("agent", "goes by the files as they are")


def judge_process(descriptors: Optional[int], autogroup: str) -> Iterator[Finding]:
    """``descriptors`` is the limit; ``autogroup`` as in /proc/PID/autogroup, "" where there is none."""
    if descriptors is not None and descriptors < _DESCRIPTORS_ENOUGH:
        seen = f"may have {descriptors} files open, expected {_DESCRIPTORS_ENOUGH}: a flood may keep logins waiting"
        yield warning("agent", seen, "LimitNOFILE=65536 in adoptd.service (systemctl edit adoptd)")
    nice = re.search(r"nice (-?\d+)", autogroup)
    if nice is not None and int(nice[1]) >= 0:
        seen = f"its session has nice {nice[1]}: a busy node makes logins wait for it"
        yield warning("agent", seen, "start it under systemd, or in a session of its own (setsid), as root")


def look_at_service(scene: Scene) -> Iterator[Finding]:
    """The units, where systemd is there."""
    if not Path("/run/systemd/system").is_dir():
        yield ok("service", "no systemd here: what starts the agent at boot is not known")
        return
    try:
        done = subprocess.run(
            ["systemctl", "show", "--no-pager", f"--property={_PROPERTIES}", _SERVICE, *_SOCKETS],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SYSTEMCTL_S,
            check=False,
            text=True,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield warning("service", f"systemctl cannot be asked: {type(error).__name__}", "systemctl status adoptd")
        return
    yield from judge_units(units_of(done.stdout), scene.settings.callerid.enabled)


@dataclass(frozen=True)
class Unit:
    """What systemd says of one unit."""

    name: str
    values: Mapping[str, str]

    def says(self, key: str) -> str:
        """A property, "" where it has none."""
        return self.values.get(key, "")


def units_of(shown: str) -> List[Unit]:
    """The blocks of ``systemctl show``."""
    units: List[Unit] = []
    for block in shown.split("\n\n"):
        values = dict(line.partition("=")[::2] for line in block.splitlines() if "=" in line)
        if "Id" in values:
            units.append(Unit(values["Id"], values))
    return units


def judge_units(units: List[Unit], callerid: bool) -> Iterator[Finding]:
    """Active, enabled, not failing again and again; its sockets held by systemd while it is away."""
    for unit in units:
        name = unit.name
        if unit.says("LoadState") == "not-found":
            yield warning(
                "service", f"{name} is not installed", "install the package adoptd, or copy packaging/systemd/"
            )
            continue
        if unit.says("LoadState") == "masked":
            yield failure("service", f"{name} is masked", f"systemctl unmask {name}")
            continue
        if unit.says("LoadState") in _BROKEN:
            seen = f"{name} cannot be read by systemd ({unit.says('LoadState')}): it is not started again"
            yield failure(
                "service", seen, f"systemd-analyze verify {name}; a drop-in may be wrong: systemctl cat {name}"
            )
        if name == _SERVICE:
            yield from _judge_service(unit)
        elif name in _SOCKETS[:1] or callerid or "callerid" not in name:
            if unit.says("ActiveState") != "active":
                what = "another can take the port" if "callerid" in name else "logins do not wait for it"
                seen = f"{name} is {unit.says('ActiveState')}: while the agent is started again {what}"
                remedy = f"systemctl stop adoptd; systemctl enable --now {name}; systemctl start adoptd"
                yield warning("service", seen, remedy)
            elif unit.says("UnitFileState") in _UNTIL_BOOT:
                yield warning(
                    "service", f"{name} is not enabled: it is gone after a reboot", f"systemctl enable {name}"
                )
        if unit.says("NeedDaemonReload") == "yes":
            yield warning(
                "service", f"{name} was changed on disk", "systemctl daemon-reload && systemctl restart adoptd"
            )


def _judge_service(unit: Unit) -> Iterator[Finding]:
    state = unit.says("ActiveState")
    if state != "active":
        seen = f"{unit.name} is {state} ({unit.says('SubState')}, {unit.says('Result')})"
        yield failure("service", seen, "systemctl reset-failed adoptd; systemctl start adoptd; journalctl -u adoptd")
    if unit.says("UnitFileState") in _UNTIL_BOOT:
        yield warning("service", f"{unit.name} is not enabled: it is gone after a reboot", "systemctl enable adoptd")
    elif state == "active":
        yield ok("service", f"{unit.name} is active, {unit.says('UnitFileState')}")
    restarts = unit.says("NRestarts")
    if restarts.isdigit() and int(restarts) > 0:
        yield warning("service", f"it ended and was started again {restarts} times", "journalctl -u adoptd -p warning")


def _limits(pid: int) -> Optional[int]:
    found = re.search(r"^Max open files\s+(\d+)", read(PROC / str(pid) / "limits"), re.MULTILINE)
    return None if found is None else int(found[1])


def _duration(seconds: object) -> str:
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        return "for an unknown time"
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
