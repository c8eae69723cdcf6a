"""The doctor's look at sshd: whether it asks PAM, as what service, and what else keeps a login from what is expected.

Owns what is said of sshd's settings in force (``sshd -T``), per sshd that listens. Changes nothing; sshd is started to
print and ends. Called through the table of checks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from adoptd.doctor.findings import Finding, Scene, failure, ok, warning
from adoptd.doctor.listeners import (
    ConfigFile,
    Listener,
    Started,
    changed_since,
    files_of,
    is_kept_by_init,
    listeners,
    read_at_s,
    says,
)
from adoptd.doctor.processes import names_of, read, running
from adoptd.pam_lines import adopt_lines

_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_SERVICE = "sshd"
_DELETED = " (deleted)"
# An sshd that has stopped on a signal, or is being traced.
_STOPPED = "Tt"
# Other programs that let users in, and do not ask PAM as distributions build them.
_OTHER_DOORS = ("dropbear",)


@dataclass(frozen=True)
class SshdFacts:
    """One sshd. ``values`` are its settings in force, by lower-case key; ``fault``: why they are not known.

    ``started``: what it was told. ``asks_as``: the PAM service of one too old to be told another. ``listener`` is
    None where none runs. ``socket``: the service manager listens for it.
    """

    started: Started
    values: Mapping[str, str]
    fault: Optional[str] = None
    asks_as: str = "sshd"
    listener: Optional[Listener] = None
    socket: bool = False


def look_at_sshd(scene: Scene) -> Iterator[Finding]:
    """Each sshd that listens here, or the one that would."""
    program = shutil.which("sshd", path=_PATH)
    found = listeners()
    if program is None and not found:
        yield warning("sshd", f"there is no sshd in {_PATH}", "install openssh-server, if users are to log in by it")
        return
    if not scene.root:
        yield warning("sshd", "only root can have sshd say its settings", "sudo adoptd doctor")
        return
    try:
        kinds = {line.kind for line in adopt_lines(scene.service, scene.pam_directory)}
    except OSError:
        kinds = set()  # said by the look at PAM
    if not found:
        values, fault = _settings_in_force(program or "", Started(), 0.9 * scene.timeout_s)
        port = values.get("port", "22")
        facts = SshdFacts(Started(), values, fault, socket=port.isdigit() and is_kept_by_init(int(port)))
        yield from judge_sshd(facts, scene.service, kinds == {"account"})
    for listener in found:
        yield from judge_listener(listener)
        theirs = listener.process.program
        values, fault = _settings_in_force(
            theirs if os.path.isfile(theirs) else program or theirs, listener.started, 0.9 * scene.timeout_s
        )
        facts = SshdFacts(listener.started, values, fault, listener.process.name, listener)
        yield from judge_sshd(facts, scene.service, kinds == {"account"})
        read_s = read_at_s(listener, values.get("pidfile", "none"))
        if read_s is not None:
            yield from judge_age(changed_since(files_of(listener.started.file), read_s))
    for name in _OTHER_DOORS:
        others = [process.pid for process in running(name) if process.uid == 0]
        if others:
            seen = f"{names_of(others[:2])} lets users in as well, and does not ask pam_adopt.so"
            yield warning("sshd", seen, f"end it, or shut it to users: systemctl disable --now {name}")
    yield from judge_confinement(_word(Path("/sys/fs/selinux/enforce")), _profile())


def judge_listener(listener: Listener) -> Iterator[Finding]:
    """Whether it can do its work as it runs now."""
    process = listener.process
    if process.state in _STOPPED:
        seen = f"sshd (pid {process.pid}) is stopped: whoever connects waits for ever"
        yield failure("sshd", seen, f"kill -CONT {process.pid}, or systemctl restart ssh")
    if process.program.endswith(_DELETED):
        seen = f"sshd (pid {process.pid}) still runs the program that was there before an upgrade"
        yield warning("sshd", seen, "systemctl restart ssh (sessions that are open stay)")


def judge_age(changed: Sequence[str]) -> Iterator[Finding]:
    """``changed``: files that are newer than sshd's reading of them."""
    if changed:
        seen = f"{', '.join(changed[:3])}: changed after sshd read it; what is said here is what it will be"
        yield warning("sshd", seen, "sshd -t && systemctl reload ssh")


def judge_sshd(facts: SshdFacts, service: str, account_alone: bool) -> Iterator[Finding]:
    """``account_alone``: whether the service has our account line and no session line of ours."""
    file = facts.started.file
    if facts.fault is not None:
        yield _judge_fault(facts, files_of(file))
        return
    if facts.socket:
        yield ok("sshd", "no sshd runs, the service manager starts it when somebody comes")
    elif facts.listener is None:
        yield warning(
            "sshd", "no sshd listens here", "systemctl start ssh (ssh.socket may start it at the first login)"
        )
    value = facts.values.get
    if value("usepam", "no") != "yes":
        given = next((word for word in facts.started.settings if word.lower().startswith("usepam=")), None)
        place = f"-o {given} on its command line" if given else says(file, "usepam") or f"{file} (by default)"
        seen = f"{place}: UsePAM is no: sshd never asks pam_adopt.so, and everybody with a key gets in"
        remedy = "take it off the command line, then systemctl restart ssh" if given else f"UsePAM yes there ({place})"
        yield failure("sshd", seen, remedy if given else f"{remedy}, then systemctl reload ssh")
        return
    yield ok("sshd", f"UsePAM yes, port {value('port', '22')} ({file})")
    named = value("pamservicename", facts.asks_as)
    # Whoever asks about another service than sshd's knows why.
    if service == _SERVICE and named != service:
        how = "PAMServiceName is" if "pamservicename" in facts.values else "by its program's name its PAM service is"
        seen = f"{file}: {how} {named}: {service} was looked at, which this sshd does not use"
        yield warning("sshd", seen, f"adoptd doctor --service {named}, and service={named} on its lines")
    if value("kbdinteractiveauthentication") == "yes" and account_alone:
        seen = f"{file}: KbdInteractiveAuthentication is yes: sshd adopts a child that ends before the session begins"
        yield warning("sshd", seen, "add a session line of pam_adopt.so, or KbdInteractiveAuthentication no")
    if value("permitrootlogin") == "no":
        yield ok("sshd", "PermitRootLogin no: root, whom pam_adopt.so always lets pass, does not come by ssh")


# What sshd says of itself, what of it keeps those out that connect now, and what to do. The last is for all else.
_FAULTS: Tuple[Tuple[str, bool, str], ...] = (
    ("privilege separation directory", True, "mkdir -m 0755 /run/sshd (RuntimeDirectory=sshd of the service makes it)"),
    ("no hostkeys", False, "ssh-keygen -A; chmod 0600 /etc/ssh/*_key"),
    ("separation user", False, "getent passwd sshd must know that user: install openssh-server again, look at NSS"),
    ("", False, "put it right: an sshd that is started anew would not come up"),
)


def _judge_fault(facts: SshdFacts, files: Sequence[ConfigFile]) -> Finding:
    fault = facts.fault or ""
    seen = f"sshd -T -f {facts.started.file}: {fault}"
    waited_for = [file.path for file in files if file.status is not None and not file.is_regular]
    if waited_for:
        return warning("sshd", f"{seen}: {waited_for[0]} is no regular file", f"take {waited_for[0]} away; sshd -t")
    _, now, remedy = next(row for row in _FAULTS if row[0] in fault)
    if now and facts.listener is not None:
        return failure("sshd", f"{seen}: whoever connects is turned away", remedy)
    return warning("sshd", seen, remedy)


def judge_confinement(selinux: str, apparmor: Optional[str]) -> Iterator[Finding]:
    """What may keep sshd from the agent's socket."""
    if selinux == "1":
        seen = "SELinux enforces: sshd may be kept from /run/adoptd/pam.sock"
        yield warning("sshd", seen, "log in once, then: ausearch -m avc -ts recent -c sshd; audit2allow makes the rule")
    if apparmor is not None:
        seen = f"AppArmor confines sshd ({apparmor}): it may be kept from /run/adoptd/pam.sock"
        yield warning("sshd", seen, "log in once, then: journalctl -k -g apparmor; allow /run/adoptd/pam.sock rw")


def _settings_in_force(program: str, started: Started, timeout_s: float) -> Tuple[Mapping[str, str], Optional[str]]:
    """By lower-case key; and why they are not known, None if they are."""
    options = [word for setting in started.settings for word in ("-o", setting)]
    try:
        done = subprocess.run(
            [program, "-T", "-f", started.file, *options],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            env={"PATH": _PATH, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return {}, f"no answer in {timeout_s:.0f} s"
    except OSError as error:
        return {}, error.strerror or str(error)
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return {}, lines[-1] if lines else f"ended with {done.returncode}"
    values: Dict[str, str] = {}
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        key, _, found = line.partition(" ")
        values.setdefault(key.lower(), found)
    return values, None


def _word(file: Path) -> str:
    return read(file).strip()


def _profile() -> Optional[str]:
    """The enforced AppArmor profile of sshd, if there is one."""
    found: List[str] = []
    for line in _word(Path("/sys/kernel/security/apparmor/profiles")).splitlines():
        name, _, mode = line.rpartition(" ")
        if "sshd" in name and mode == "(enforce)":
            found.append(name)
    return found[0] if found else None
