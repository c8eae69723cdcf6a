"""The virtual machine's disk: Debian 12 with systemd, Slurm, munge, sshd and what the package depends on.

Owns the recipe and the cached files made from it: ``vm-<recipe>.ext4``, and the kernel and initial ram disk beside it.
Nothing of the project is on it: that is installed at every start, on a copy that is thrown away. No root is needed to
mount anything: mke2fs fills the file system from a directory. Run as ``python -m vm.image`` it makes the image.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Tuple

import bookworm
from bookworm import System, fresh_system, only_one

DISK_MB = 4096

# What a node of a cluster has, and the tests' own needs. Daemons are enabled by the tests that want them.
PACKAGES: Tuple[str, ...] = (
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "systemd-sysv",
    "dbus",
    "libpam-systemd",
    "qemu-guest-agent",
    "udev",
    "kmod",
    "procps",
    "iproute2",
    "nftables",
    "conntrack",
    "openssh-server",
    "openssh-client",
    "munge",
    "slurmctld",
    "slurmd",
    "slurm-client",
    "slurm-wlm-basic-plugins",
    "xauth",
    "bpftool",
    "gcc",
    "libc6-dev",
)
# The package under test asks for these itself; they are here so that its installation needs no network.
DEPENDENCIES: Tuple[str, ...] = (
    "python3",
    "python3-bpfcc",
    "python3-psutil",
    "python3-prometheus-client",
    "python3-jwt",
    "libpam-runtime",
)

FILES: Mapping[str, str] = {
    "/etc/fstab": "/dev/vda / ext4 noatime,nobarrier 0 1\n",
    "/etc/hostname": "vm\n",
    "/etc/hosts": "127.0.0.1 localhost\n127.0.1.1 vm\n::1 ip6-localhost\n",
    # The cloud kernel with little else: its modules that a virtio machine needs to find its disk.
    "/etc/initramfs-tools/conf.d/small": "MODULES=list\nCOMPRESS=gzip\n",
    "/etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\next4\ncrc32c_generic\n",
    # A machine without a network card: nothing should wait for one.
    "/etc/systemd/system-preset/00-vm.preset": "disable systemd-networkd-wait-online.service\n",
    "/etc/systemd/journald.conf.d/vm.conf": "[Journal]\nStorage=volatile\nRateLimitBurst=0\n",
    "/etc/systemd/system.conf.d/vm.conf": "[Manager]\nDefaultTimeoutStartSec=300s\n",
}
# Masked: they take processor time from the tests, which under emulation is scarce. Slurm's and munge's are the tests'.
MASKED: Tuple[str, ...] = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "man-db.timer",
    "systemd-timesyncd.service",
    "getty@tty1.service",
)
DISABLED: Tuple[str, ...] = ("slurmctld.service", "slurmd.service", "munge.service", "ssh.service")


@dataclass(frozen=True)
class Image:
    """What a virtual machine is started from; all read-only."""

    disk: Path
    kernel: Path
    initrd: Path


def image() -> Image:
    """The image of this recipe, made if it is not in the cache: some minutes then."""
    recipe = hashlib.sha256(Path(__file__).read_bytes() + Path(bookworm.__file__).read_bytes()).hexdigest()[:12]
    with only_one("vm") as cache:
        made = Image(*(cache / f"vm-{recipe}.{suffix}" for suffix in ("ext4", "kernel", "initrd")))
        if all(path.exists() for path in (made.disk, made.kernel, made.initrd)):
            return made
        for old in cache.glob("vm-*.*"):
            old.unlink()
        with tempfile.TemporaryDirectory(dir=cache, prefix="vm.") as directory:
            with fresh_system(Path(directory)) as system:
                _fill(system)
                for name, path in (("vmlinuz", made.kernel), ("initrd.img", made.initrd)):
                    os.link(next(system.path("/boot").glob(f"{name}-*")), path)
                _make_disk(system.root, Path(directory) / "disk")
            (Path(directory) / "disk").replace(made.disk)
        return made


def _fill(system: System) -> None:
    for path, text in FILES.items():
        system.write(path, text)
    system.run([*bookworm.APT, "update"])
    system.install(*PACKAGES, *DEPENDENCIES)
    for unit in MASKED:
        link = system.path(f"/etc/systemd/system/{unit}")
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    system.run(["systemctl", "disable", *DISABLED])
    system.path("/usr/sbin/policy-rc.d").unlink()
    # An empty file has systemd make an id at the first start, without the questions of a first start.
    system.write("/etc/machine-id", "")
    system.run(["apt-get", "clean"])


def _make_disk(root: Path, disk: Path) -> None:
    with disk.open("wb") as file:
        file.truncate(DISK_MB << 20)
    argv = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(root), str(disk)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    sys.stdout.write(f"{image().disk}\n")
