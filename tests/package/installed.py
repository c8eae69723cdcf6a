"""A system with the package in it: installing, removing, and logins by its own sshd and libpam.

Logins come through a pipe, sshd started by the client for the one connection (sshd -i): so there is no network to
be had, and PAM is asked as in any other login. Called by the tests of this directory.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Dict

from bookworm import APT, System

MODULE = "/lib/x86_64-linux-gnu/security/pam_adopt.so"
# "required", but that libpam goes on where the module is missing: the words that the package recommends.
RECOMMENDED = "[success=ok new_authtok_reqd=ok ignore=ignore module_unknown=ignore default=bad]"
LOGIN_TIMEOUT_S = 60

_PREPARE = """\
set -e
useradd --create-home --shell /bin/sh alice
ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519
mkdir -p /home/alice/.ssh
cp /root/.ssh/id_ed25519.pub /root/.ssh/authorized_keys
cp /root/.ssh/id_ed25519.pub /home/alice/.ssh/authorized_keys
chown -R alice: /home/alice/.ssh
mkdir -p /run/sshd
"""
# The pipe is a socket pair, whose other end has no address: the module takes the connection for one it cannot know.
_LOGIN = (
    "ssh -q -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    " -o 'ProxyCommand=/usr/sbin/sshd -i' {user}@localhost id -un"
)


@dataclass
class Installed:
    """The system, the package that is in it, and what apt said as it was installed."""

    system: System
    deb: Path
    said: str
    pam_before: Dict[str, str]
    pam_after: Dict[str, str]
    sshd: str  # Debian's own /etc/pam.d/sshd

    @classmethod
    def make(cls, system: System, deb: Path) -> Installed:
        """Install the package with apt, dependencies and all; sshd afterwards, which it does not depend on."""
        shutil.copy(deb, system.path("/root/adoptd.deb"))
        system.run([*APT, "update"])
        before = _pam_files(system)
        said = system.install("/root/adoptd.deb")
        after = _pam_files(system)
        system.install("openssh-server", "openssh-client")
        system.path("/root/.ssh").mkdir(mode=0o700, exist_ok=True)
        system.run(["sh", "-c", _PREPARE])
        return cls(system, deb, said, before, after, system.path("/etc/pam.d/sshd").read_text(encoding="utf-8"))

    def ensure(self) -> None:
        """The package is there, and configured, whatever the test before did."""
        state = self.system.run(["dpkg-query", "-W", "-f", "${db:Status-Status}", "adoptd"], check=False).stdout
        if state != "installed" or not self.system.path(MODULE).exists():
            self.system.run(["dpkg", "--install", "/root/adoptd.deb"])

    def pam(self, *lines: str) -> None:
        """Debian's stack of sshd with these lines behind it."""
        self.system.write("/etc/pam.d/sshd", "\n".join([self.sshd.rstrip("\n"), *lines]) + "\n")

    def remove(self, *, purge: bool = False) -> subprocess.CompletedProcess[str]:
        """dpkg's own removal."""
        return self.system.run(["dpkg", "--purge" if purge else "--remove", "adoptd"], check=False)

    def logs_in(self, user: str) -> bool:
        """Whether a login gets as far as a command. Raises RuntimeError if it is neither let in nor refused."""
        done = self.system.run(
            ["sh", "-c", _LOGIN.format(user=user)], check=False, offline=True, timeout_s=LOGIN_TIMEOUT_S
        )
        # What pam_motd says may come before it.
        let_in = done.stdout.splitlines()[-1:] == [user]
        if let_in and done.returncode == 0:
            return True
        # 255 is the client's: the connection was closed on it. 254 is sshd's, for a session that PAM did not open.
        if let_in or done.returncode not in (254, 255):
            raise RuntimeError(f"login of {user}: status {done.returncode}: {done.stdout}{done.stderr}")
        return False


def _pam_files(system: System) -> Dict[str, str]:
    """Everything that says how PAM is set up, by a digest of its bytes and its times."""
    found: Dict[str, str] = {}
    for top in ("/etc/pam.conf", "/etc/pam.d", "/etc/security", "/var/lib/pam"):
        path = system.path(top)
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                found[str(file.relative_to(system.root))] = f"{digest} {file.stat().st_mtime_ns}"
    return found
