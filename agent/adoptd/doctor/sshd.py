"""The doctor's look at sshd: whether it asks PAM, as what service, and what else keeps a login from what is expected.

Owns what is said of sshd's settings in force (``sshd -T``), per sshd that listens. Changes nothing; sshd is started to
print and ends. Called through the table of checks.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Tuple

import psutil

from adoptd.doctor.findings import Finding, Scene, failure, ok, warning
from adoptd.pam_lines import adopt_lines

_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_LISTENERS_MAX = 4
_DEFAULT_FILE = "/etc/ssh/sshd_config"


@dataclass(frozen=True)
class SshdFacts:
    """One sshd. ``values`` are its settings in force, by lower-case key; ``fault``: why they are not known."""

    file: str
    running: bool
    values: Mapping[str, str]
    fault: Optional[str] = None


def look_at_sshd(scene: Scene) -> Iterator[Finding]:
    """Each sshd that listens here, or the one that would."""
    program = shutil.which("sshd", path=_PATH)
    if program is None:
        yield warning("sshd", f"there is no sshd in {_PATH}", "install openssh-server, if users are to log in by it")
        return
    if not scene.root:
        yield warning("sshd", "only root can have sshd say its settings", "sudo adoptd doctor")
        return
    files = _listening()
    try:
        kinds = {line.kind for line in adopt_lines(scene.service, scene.pam_directory)}
    except OSError:
        kinds = set()  # said by the look at PAM
    for file in files or (_DEFAULT_FILE,):
        yield from judge_sshd(
            _settings_of(program, file, bool(files), 0.9 * scene.timeout_s), scene.service, kinds == {"account"}
        )
    yield from judge_confinement(_word(Path("/sys/fs/selinux/enforce")), _profile())


def judge_sshd(facts: SshdFacts, service: str, account_alone: bool) -> Iterator[Finding]:
    """``account_alone``: whether the service has our account line and no session line of ours."""
    file = facts.file
    if facts.fault is not None:
        seen = f"sshd -T -f {file}: {facts.fault}"
        yield warning("sshd", seen, "put it right: an sshd that is started anew would not come up")
        return
    if not facts.running:
        yield warning(
            "sshd", "no sshd listens here", "systemctl start ssh (ssh.socket may start it at the first login)"
        )
    value = facts.values.get
    if value("usepam", "no") != "yes":
        seen = f"{file}: UsePAM is no: sshd never asks pam_adopt.so, and everybody with a key gets in"
        yield failure("sshd", seen, f"UsePAM yes in {file}, then systemctl reload ssh")
        return
    yield ok("sshd", f"UsePAM yes, port {value('port', '22')} ({file})")
    named = value("pamservicename", service)
    if named != service:
        seen = f"{file}: PAMServiceName is {named}: {service} was looked at, which this sshd does not use"
        yield warning("sshd", seen, f"adoptd doctor --service {named}, and service={named} on its lines")
    if value("kbdinteractiveauthentication") == "yes" and account_alone:
        seen = f"{file}: KbdInteractiveAuthentication is yes: sshd adopts a child that ends before the session begins"
        yield warning("sshd", seen, "add a session line of pam_adopt.so, or KbdInteractiveAuthentication no")
    if value("permitrootlogin") == "no":
        yield ok("sshd", "PermitRootLogin no: root, whom pam_adopt.so always lets pass, does not come by ssh")


def judge_confinement(selinux: str, apparmor: Optional[str]) -> Iterator[Finding]:
    """What may keep sshd from the agent's socket."""
    if selinux == "1":
        seen = "SELinux enforces: sshd may be kept from /run/adoptd/pam.sock"
        yield warning("sshd", seen, "log in once, then: ausearch -m avc -ts recent -c sshd; audit2allow makes the rule")
    if apparmor is not None:
        seen = f"AppArmor confines sshd ({apparmor}): it may be kept from /run/adoptd/pam.sock"
        yield warning("sshd", seen, "log in once, then: journalctl -k -g apparmor; allow /run/adoptd/pam.sock rw")


def _listening() -> Tuple[str, ...]:
    """The configuration files of the sshds that listen: one that serves a login has another title."""
    files: Dict[str, None] = {}
    for process in psutil.process_iter(["name", "cmdline"]):
        # One in a container has other files.
        if process.info["name"] != "sshd" or _mounts_of(process.pid) != _mounts_of(os.getpid()):
            continue
        file = file_of(" ".join(process.info["cmdline"] or ()))
        if file is not None and len(files) < _LISTENERS_MAX:
            files[file] = None
    return tuple(files)


def _mounts_of(pid: int) -> Optional[str]:
    """The mount namespace of a process; None if it has ended, or may not be looked into."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return None


def file_of(title: str) -> Optional[str]:
    """The configuration of the listener with this title; None for an sshd that serves a login."""
    listener = "[listener]" in title or not title.startswith("sshd: ")
    if not listener or " -i" in title:
        return None
    named = re.search(r" -f\s*(/\S+)", title)
    return named[1] if named else _DEFAULT_FILE


def _settings_of(program: str, file: str, running: bool, timeout_s: float) -> SshdFacts:
    try:
        done = subprocess.run(
            [program, "-T", "-f", file],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            env={"PATH": _PATH, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return SshdFacts(file, running, {}, f"no answer in {timeout_s:.0f} s")
    except OSError as error:
        return SshdFacts(file, running, {}, error.strerror)
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return SshdFacts(file, running, {}, lines[-1] if lines else f"ended with {done.returncode}")
    values: Dict[str, str] = {}
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        key, _, found = line.partition(" ")
        values.setdefault(key.lower(), found)
    return SshdFacts(file, running, values)


def _word(file: Path) -> str:
    try:
        return file.read_text("ascii", "replace").strip()
    except OSError:
        return ""


def _profile() -> Optional[str]:
    """The enforced AppArmor profile of sshd, if there is one."""
    found: List[str] = []
    for line in _word(Path("/sys/kernel/security/apparmor/profiles")).splitlines():
        name, _, mode = line.rpartition(" ")
        if "sshd" in name and mode == "(enforce)":
            found.append(name)
    return found[0] if found else None
