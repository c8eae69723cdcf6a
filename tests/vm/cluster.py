"""A cluster of one node in the machine, as an administrator would set it up: Debian's packages, systemd's services.

Slurm's controller and daemon, munged and sshd are the machine's own services, and so is the agent, installed from its
package. Users log in with the real ssh client over a network device of the machine's own. Called by the tests.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Mapping, Optional, Sequence, Tuple

from package.installed import RECOMMENDED
from vm.machine import Done, Machine

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "/opt/adoptd"
ADDRESS = "10.99.0.1"
# Everything takes about 13 times as long here as on the machine it is emulated by, and more when that is busy.
BUDGETS = "[callerid]\ntimeout_ms = 5000\n"
PAM_OPTIONS = "timeout_ms=20000"
JOB_IN = re.compile(r"^0::/system\.slice/[\w-]*slurmstepd\.scope/job_(\d+)/step_extern/", re.MULTILINE)

SLURM_CONF = f"""\
ClusterName=vm
SlurmctldHost=vm({ADDRESS})
SlurmUser=slurm
AuthType=auth/munge
ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup,task/affinity
JobAcctGatherType=jobacct_gather/cgroup
PrologFlags=contain
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PropagateResourceLimits=NONE
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1
KillWait=2
MpiDefault=none
StateSaveLocation=/var/lib/slurm/slurmctld
SlurmdSpoolDir=/var/lib/slurm/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
NodeName=vm NodeAddr={ADDRESS} CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:100
"""

_PREPARE = f"""\
set -e
# Not a loopback address: libc would not look names up for a machine that has nothing else.
ip link add node0 type dummy
ip address add {ADDRESS}/24 dev node0
ip link set node0 up
sed -i 's/^127.0.1.1 vm$/{ADDRESS} vm/' /etc/hosts
useradd --create-home --shell /bin/bash alice
useradd --create-home --shell /bin/bash bob
for user in root alice bob; do
    home=$(getent passwd $user | cut -d: -f6)
    install -d -m 0700 -o $user $home/.ssh
    [ -e /root/.ssh/id_ed25519 ] || ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519
    [ $user = root ] || install -m 0600 -o $user /root/.ssh/id_ed25519 $home/.ssh/id_ed25519
    install -m 0600 -o $user /root/.ssh/id_ed25519.pub $home/.ssh/authorized_keys
done
printf '%s\\n' 'StrictHostKeyChecking no' 'UserKnownHostsFile /dev/null' 'LogLevel INFO' 'BatchMode yes' \\
    >/etc/ssh/ssh_config.d/vm.conf
printf 'LoginGraceTime 600\\nMaxStartups 100\\n' >/etc/ssh/sshd_config.d/vm.conf
cp /etc/pam.d/sshd /root/pam.sshd
printf 'CgroupPlugin=cgroup/v2\\nConstrainCores=yes\\nConstrainRAMSpace=yes\\n' >/etc/slurm/cgroup.conf
install -d -o slurm /var/lib/slurm/slurmctld /var/lib/slurm/slurmd /var/log/slurm
systemctl start munge slurmctld slurmd ssh
"""


@dataclass(frozen=True)
class Login:
    """A login that has ended. ``job`` is the one its session was in, "" for none."""

    let_in: bool
    job: str
    out: str
    err: str


class Cluster:
    """The node, up."""

    def __init__(self, machine: Machine, deb: Path) -> None:
        self.machine = machine
        machine.put(SLURM_CONF.encode(), "/etc/slurm/slurm.conf")
        machine.run(_PREPARE)
        machine.put(deb.read_bytes(), "/root/adoptd.deb")
        self.said = machine.run("apt-get install --quiet --yes /root/adoptd.deb 2>&1")
        machine.put(BUDGETS.encode(), "/etc/adoptd/conf.d/vm.toml")
        machine.run("systemctl restart adoptd.service")
        self.wait("sinfo --noheader --format %T | grep -qx idle", "Slurm's node is idle")

    def wait(self, shell: str, what: str, timeout_s: int = 300) -> None:
        """Until a command's status is 0. Raises RuntimeError naming ``what``."""
        loop = f"for i in $(seq {timeout_s}); do if {shell}; then exit 0; fi; sleep 1; done; exit 1"
        if self.machine.execute(loop, timeout_s=3.0 * timeout_s).status != 0:
            raise RuntimeError(f"not in {timeout_s} s: {what}\n{self.journal()}")

    def journal(self, lines: int = 60) -> str:
        """The machine's log, but for what the guest agent says of itself."""
        return self.machine.run(f"journalctl --no-pager | grep -v qemu-ga | tail -n {lines}")

    def since(self) -> str:
        """A place in the log, for :meth:`logged`."""
        return self.machine.run("journalctl --no-pager --lines 0 --show-cursor").partition("cursor: ")[2].strip()

    def logged(self, cursor: str, unit: str = "adoptd.service") -> str:
        """What a unit logged since then."""
        return self.machine.run(f"journalctl --no-pager --output cat --unit {unit} --after-cursor '{cursor}'")

    def pam(self, *lines: str, before_systemd: bool = False) -> None:
        """Debian's stack of sshd, with these lines at its end, or those of the session stack before pam_systemd."""
        stack = self.machine.run("cat /root/pam.sshd")
        if before_systemd:
            session = "".join(f"{line}\n" for line in lines if line.startswith("session"))
            stack = stack.replace("@include common-session\n", f"{session}@include common-session\n")
            lines = tuple(line for line in lines if not line.startswith("session"))
        text = stack.rstrip("\n") + "\n" + "".join(f"{line}\n" for line in lines)
        self.machine.put(text.encode(), "/etc/pam.d/sshd")

    def pam_adopt(self, options: str = "", *, before_systemd: bool = False) -> None:
        """The two recommended lines, with options."""
        words = f"pam_adopt.so {PAM_OPTIONS} {options}".rstrip()
        lines = (f"account {RECOMMENDED} {words}", f"session {RECOMMENDED} {words}")
        self.pam(*lines, before_systemd=before_systemd)

    @contextlib.contextmanager
    def jobs(self, count: int, user: str = "alice") -> Iterator[Tuple[str, ...]]:
        """New jobs of a user, oldest first, running; ended on leaving."""
        submit = f"cd /tmp && runuser -u {user} -- sbatch --parsable --output=/dev/null --wrap='exec sleep 100000'"
        ids: List[str] = []
        try:
            for _ in range(count):
                # One after the other: the newest is the one whose step was started last.
                ids.append(self.machine.run(submit).strip())
                place = f"/sys/fs/cgroup/system.slice/*slurmstepd.scope/job_{ids[-1]}/step_extern"
                self.wait(f"ls -d {place} >/dev/null 2>&1", f"job {ids[-1]} has started")
            yield tuple(ids)
        finally:
            self.machine.run(f"scancel {' '.join(ids)}")
            self.wait('[ -z "$(squeue --noheader)" ]', "the jobs have ended")

    def login(self, command: str = "true", *, user: str = "alice", from_job: str = "") -> Login:
        """``ssh user@vm`` as that user, from inside a job or from none; the session says where it is."""
        report = f"cat /proc/self/cgroup; {command}"
        argv = f"ssh {user}@vm {_quoted(report)}"
        if from_job:
            argv = f"srun --jobid={from_job} --overlap --chdir=/tmp {argv}"
        done: Done = self.machine.execute(f"cd /tmp && runuser -u {user} -- {argv}")
        found = JOB_IN.search(done.out)
        return Login("0::/" in done.out, found[1] if found else "", done.out, done.err)

    def bring_source(self, names: Sequence[str]) -> None:
        """The clone's tests, beside the agent and the module that the package installed, at :data:`SOURCE`."""
        listed = subprocess.run(
            ["git", "-c", f"safe.directory={ROOT}", "-C", ROOT, "ls-files", "-co", "--exclude-standard", *names],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")
        site = ROOT / ".venv/lib/python3.11/site-packages"
        packages = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "pytest_timeout.py", "py.py")
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:gz", compresslevel=1) as archive:
            for name in sorted({name for name in listed if name and (ROOT / name).exists()}):
                archive.add(ROOT / name, f"adoptd/{name}")
            for package in (*packages, *_metadata_of(site)):
                archive.add(site / package, f"site/{package}", filter=_without_bytecode)
        self.machine.put(data.getvalue(), "/root/source.tar.gz")
        links: Mapping[str, str] = {
            "agent": "/usr/share/adoptd/agent",
            "bpf": "/usr/share/adoptd/bpf",
            "pam_hook/build/pam_adopt.so": "/usr/lib/x86_64-linux-gnu/security/pam_adopt.so",
        }
        made = "; ".join(f"mkdir -p $(dirname adoptd/{name}); ln -sfn {to} adoptd/{name}" for name, to in links.items())
        self.machine.run(f"set -e; cd /opt; tar xzf /root/source.tar.gz --no-same-owner; {made}")


def _metadata_of(site: Path) -> Sequence[str]:
    # pytest finds itself and its plugins by these.
    names = ("pytest", "pluggy", "iniconfig", "packaging", "pytest_timeout")
    return [path.name for name in names for path in site.glob(f"{name}-*.dist-info")]


def _without_bytecode(member: tarfile.TarInfo) -> Optional[tarfile.TarInfo]:
    return None if "__pycache__" in member.name else member


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
