"""What the files in a node's own /etc say: users, ssh, PAM, munge, the agent. Text only, no I/O.

Called by nodes, which writes them into the node. PAM stacks are plain enough to be read beside an
administrator's: nothing in them but what a login needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Sequence, Tuple

from lab.waiting import PATIENCE


@dataclass(frozen=True)
class User:
    """Somebody who can log in on every node."""

    name: str
    uid: int
    gid: int
    home: str
    password: str


ALICE = User("alice", 60001, 60001, "/home/alice", "correct horse battery staple")
BOB = User("bob", 60002, 60002, "/home/bob", "bob's own password")
ROOT = User("root", 0, 0, "/root", "")
PEOPLE = (ALICE, BOB)

SSHD_PORT = 22
MAPPED_PORT = 2222
ACCESS_CONF = "/etc/security/adoptd-demo-access.conf"


def passwd(host_lines: Iterable[str]) -> str:
    """The host's accounts (daemons' among them) with ours in place of any of the same name or uid."""
    taken = {user.name for user in PEOPLE} | {str(user.uid) for user in PEOPLE}
    kept = [line for line in host_lines if taken.isdisjoint(line.split(":")[0:3:2])]
    ours = [f"{u.name}:x:{u.uid}:{u.gid}:{u.name}:{u.home}:/bin/bash" for u in PEOPLE]
    return "\n".join(kept + ours) + "\n"


def group(host_lines: Iterable[str]) -> str:
    """The host's groups, with one for each of our users."""
    taken = {user.name for user in PEOPLE} | {str(user.uid) for user in PEOPLE}
    kept = [line for line in host_lines if taken.isdisjoint(line.split(":")[0:3:2])]
    return "\n".join(kept + [f"{u.name}:x:{u.gid}:" for u in PEOPLE]) + "\n"


def shadow(hashes: Iterable[Tuple[User, str]]) -> str:
    """Passwords of our users; root has none, so logs in by key only. Nobody else can log in."""
    lines = ["root:*:19000:0:99999:7:::"]
    return "\n".join(lines + [f"{user.name}:{hashed}:19000:0:99999:7:::" for user, hashed in hashes]) + "\n"


def hosts(nodes: Sequence[Tuple[str, str, str]]) -> str:
    """Names of the nodes: ``node2`` is its IPv4 address, ``node2-6`` its IPv6 address."""
    lines = ["127.0.0.1 localhost", "::1 ip6-localhost"]
    for name, ipv4, ipv6 in nodes:
        lines += [f"{ipv4} {name}", f"{ipv6} {name}-6"]
    return "\n".join(lines) + "\n"


NSSWITCH = "passwd: files\ngroup: files\nshadow: files\nhosts: files\n"

SSHD_CONFIG = f"""\
Port {SSHD_PORT}
ListenAddress 0.0.0.0
ListenAddress ::
HostKey /etc/ssh/demo_host_key
PidFile none
UsePAM yes
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication yes
PermitRootLogin prohibit-password
# Scenarios log in many times at once; the default drops connections from the tenth on.
MaxStartups 1000
UseDNS no
PrintMotd no
PrintLastLog no
LogLevel VERBOSE
Subsystem sftp /usr/lib/openssh/sftp-server
"""

# From 9.8 on sshd makes an address wait that has failed several logins, which half of the scenarios do on purpose.
SSHD_NO_PENALTIES = "PerSourcePenalties no\n"

SSH_CONFIG = """\
StrictHostKeyChecking yes
GlobalKnownHostsFile /etc/ssh/ssh_known_hosts
UserKnownHostsFile /dev/null
UpdateHostKeys no
KexAlgorithms curve25519-sha256
ConnectTimeout 10
"""

# Asked by ssh for a passphrase or a password. With a gate it says that it was asked, and answers when it is opened:
# the TCP connection exists by then, and nothing of the login has reached the account phase.
ASKPASS = """\
#!/bin/sh
if [ -n "${ADOPTD_GATE:-}" ]; then
    : > "$ADOPTD_GATE.asked"
    while [ ! -e "$ADOPTD_GATE.open" ]; do sleep 0.02; done
fi
printf '%s\\n' "$ADOPTD_ANSWER"
"""


def pam_sshd(module: str, options: str, *, with_access: bool = False) -> str:
    """The sshd service's stack, ``options`` for both of our lines.

    ``with_access`` is the arrangement pam_slurm_adopt documents for letting some in without a job: pam_access below.
    """
    ours = f"{module} {options}".rstrip()
    lines = ["auth required pam_unix.so", "account required pam_unix.so"]
    if with_access:
        lines += [f"account sufficient {ours}", f"account required pam_access.so accessfile={ACCESS_CONF}"]
    else:
        lines += [f"account required {ours}"]
    lines += ["session required pam_unix.so", f"session required {ours}", "password required pam_deny.so"]
    return "\n".join(lines) + "\n"


def access_conf(allowed: User) -> str:
    """pam_access(8) rules: this user, nobody else."""
    return f"+:{allowed.name}:ALL\n-:ALL:ALL\n"


# The scenarios show where sessions land, on machines that may have no processor time to spare for a second; the one
# about time sets the agent's own default of 300 ms and the module's of 1000 ms, as often longer as all else.
CALLERID_TIMEOUT_MS = min(3000 * PATIENCE, 10_000)
PAM_TIMEOUT_MS = min(10_000 * PATIENCE, 30_000)


def agent_toml(jobs_path: str, seal: str) -> str:
    """The agent's configuration: everything that is not named here is its default. No ``jobs_path``: Slurm's jobs."""
    jobs = f'backend = "cgroup"\npath = "{jobs_path}"' if jobs_path else 'backend = "slurm"'
    return f"""\
[jobs]
{jobs}

[callerid]
timeout_ms = {CALLERID_TIMEOUT_MS}

[seal]
scheme = "{seal}"
key_file = "/etc/adoptd/adoptd.key"
"""
