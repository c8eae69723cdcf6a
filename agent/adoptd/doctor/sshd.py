"""The doctor's look at sshd: whether it asks PAM, as what service, and what else keeps a login from what is expected.

Owns what is said of sshd's settings in force (``sshd -T``), per sshd that listens. Changes nothing; sshd is started to
print and ends. Called through the table of checks.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from adoptd.doctor.files import judge_above, judge_directory
from adoptd.doctor.findings import FileRule, Finding, Scene, bytes_of, failure, fault_of, ok, status_of, warning
from adoptd.doctor.listeners import (
    ConfigFile,
    Listener,
    Started,
    changed_since,
    files_of,
    hidden_from,
    is_kept_by_init,
    listeners,
    read_at_s,
    says,
)
from adoptd.doctor.processes import names_of, read, running
from adoptd.pam_lines import PamLine, adopt_lines, is_for, options_of

_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_SERVICE = "sshd"
_DELETED = " (deleted)"
# An sshd that has stopped on a signal, or is being traced.
_STOPPED = "Tt"
# What the module gives the agent where its line says nothing of it.
_BUDGET_MS = 1000
# Of the time of the check, so that there is some left to tell what came of it.
_SHARE = 0.7
_FILE = FileRule("a regular file", 0o022, stat.S_ISREG)
# By which sshd itself says who may come in.
_CHOOSING = {each.lower(): each for each in ("AllowUsers", "AllowGroups", "DenyUsers", "DenyGroups")}
_WRAPPED, _PROGRAM_MAX_BYTES = b"libwrap.so", 16 << 20
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
        lines = [line for line in adopt_lines(scene.service, scene.pam_directory) if is_for(line, scene.service)]
    except OSError:
        lines = []  # said by the look at PAM
    kinds = {line.kind for line in lines}
    if not found:
        yield from judge_files(files_of(Started().file))
        values, fault = settings_in_force(program or "", Started(), _SHARE * scene.timeout_s)
        port = values.get("port", "22")
        facts = SshdFacts(Started(), values, fault, socket=port.isdigit() and is_kept_by_init(int(port)))
        yield from judge_sshd(facts, scene.service, kinds == {"account"})
    for listener in found:
        yield from judge_listener(listener)
        yield from judge_view(listener, hidden_from(listener.process, _paths(scene, listener)))
        yield from judge_files(files_of(listener.started.file))
        theirs = listener.process.program
        values, fault = settings_in_force(
            theirs if os.path.isfile(theirs) else program or theirs, listener.started, _SHARE * scene.timeout_s
        )
        facts = SshdFacts(listener.started, values, fault, listener.process.name, listener)
        yield from judge_sshd(facts, scene.service, kinds == {"account"})
        yield from judge_grace(values.get("logingracetime", ""), patience_ms(lines))
        read_s = read_at_s(listener, values.get("pidfile", "none"))
        if read_s is not None:
            yield from judge_age(changed_since(files_of(listener.started.file), read_s))
    if program is not None and _WRAPPED in (bytes_of(program, _PROGRAM_MAX_BYTES) or b""):
        yield from judge_wrappers(*(read(f"/etc/{file}") for file in ("hosts.allow", "hosts.deny")))
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


def _paths(scene: Scene, listener: Listener) -> Tuple[str, ...]:
    """What it has to see as it is here, for what is said here to be so."""
    return (scene.settings.agent.pam_socket, str(scene.pam_directory / scene.service), listener.started.file)


def judge_view(listener: Listener, hidden: Sequence[str]) -> Iterator[Finding]:
    """One with a view of the file system of its own, as units have it."""
    if hidden:
        seen = f"sshd (pid {listener.process.pid}) does not see {', '.join(hidden)} as it is here: its unit hides it"
        remedy = "systemctl cat ssh: InaccessiblePaths=, TemporaryFileSystem= or RootDirectory=; or it is a later mount"
        yield failure("sshd", seen, f"{remedy}: systemctl restart ssh")


def judge_files(files: Sequence[ConfigFile]) -> Iterator[Finding]:
    """Who can change what sshd reads: it runs commands as root that its files name."""
    for file in files:
        status = None if file.status is None else (file.status.st_mode, file.status.st_uid)
        fault = fault_of(status, _FILE) if file.is_regular else None
        if fault is not None:
            seen = f"{file.path} {fault}: whoever can write it is root at sshd's next start"
            yield failure("sshd", seen, f"chown root {file.path}; chmod go-w {file.path}")
    directories = tuple(dict.fromkeys(Path(file.path).parent for file in files))
    for directory in map(str, directories):
        yield from judge_directory("sshd", directory, status_of(directory, follow=True), quiet=True)
    for file in files:
        yield from judge_above("sshd", Path(file.path), directories)


def patience_ms(lines: Sequence[PamLine]) -> int:
    """How long all account lines of ours may take together."""
    given = (options_of(line).get("timeout_ms", "") for line in lines if line.kind == "account")
    return sum(int(each) if each.isascii() and each.isdigit() else _BUDGET_MS for each in given)


def judge_grace(grace: str, patience: int) -> Iterator[Finding]:
    """``grace``: what sshd gives a login, in seconds; 0 or "" is no end. ``patience``: what ours may take of it."""
    if grace.isdigit() and 0 < int(grace) * 1000 <= patience:
        seen = f"LoginGraceTime is {grace} s, and our lines may take {patience} ms of it: sshd ends logins meanwhile"
        yield warning("sshd", seen, "a longer LoginGraceTime (120 by default), or a shorter timeout_ms in the PAM line")


def judge_wrappers(allow: str, deny: str) -> Iterator[Finding]:
    """What tcp_wrappers' files say (hosts_access(5)), which sshd asks first where it is built so, as Debian does."""
    shut = _clients(deny)
    if "ALL" in shut and not _clients(allow):
        seen = "/etc/hosts.deny turns everybody away who comes to sshd, and /etc/hosts.allow excepts nobody"
        yield failure("sshd", seen, "take that line out, or name in /etc/hosts.allow who may come: sshd: 10.0.0.0/8")
    elif shut:
        yield ok("sshd", "/etc/hosts.deny turns away some who come to sshd, unless /etc/hosts.allow names them")


def _clients(text: str) -> List[str]:
    """Who is meant by the lines for sshd."""
    found: List[str] = []
    for line in text.replace("\\\n", " ").splitlines():
        daemons, _, rest = line.partition("#")[0].partition(":")
        # "a EXCEPT b EXCEPT c" is a, but for b without c (hosts_access(5)).
        meant = False
        for names in reversed(re.split(r"[\s,]EXCEPT(?=[\s,])", daemons.upper())):
            meant = bool({"ALL", "SSHD"} & set(re.split(r"[\s,]+", names))) and not meant
        if meant:
            found.append(rest.partition(":")[0].strip().upper())
    return found


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
        said = says(file, "usepam")
        place = f"{file} (by default)" if said is None else said.place if said.value.lower() == "no" else file
        place = f"-o {given} on its command line" if given else place
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
    if "*" in value("denyusers", "").split():
        yield failure("sshd", f"{file}: DenyUsers *: nobody gets in", "take the * out, then systemctl reload ssh")
    elif any(key in facts.values for key in _CHOOSING):
        # There may be hundreds.
        first = {key: facts.values[key].partition(" ")[0] for key in _CHOOSING if key in facts.values}
        choice = "; ".join(f"{_CHOOSING[key]} {name} ..." for key, name in first.items())
        yield ok("sshd", f"{choice}: sshd turns the others away, whatever jobs they have")
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
    waited_for = [file.path for file in files if file.is_endless]
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


def settings_in_force(program: str, started: Started, timeout_s: float) -> Tuple[Mapping[str, str], Optional[str]]:
    """By lower-case key; and why they are not known, None if they are. What has no end sshd is not made to read."""
    if any(file.is_endless for file in files_of(started.file)):
        return {}, "not asked"
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
        key = key.lower()
        # Of these there is a line for each name.
        values[key] = f"{values[key]} {found}" if key in _CHOOSING and key in values else values.get(key, found)
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
