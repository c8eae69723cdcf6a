"""Fresh Debian 12 systems to install into: made once by debootstrap, kept as a tar, unpacked for whoever wants one.

Owns the cache directory (``ADOPTD_CACHE``, else /var/cache/adoptd-dev): the base systems and the archives that apt
has fetched, so that a second run needs little of the network. What runs in a system runs under chroot in a mount
namespace of its own: whatever happens to it, the host keeps no mount. Called by the package's tests and by the
virtual machine's image; both need root.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Mapping, Optional, Sequence

SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
SECURITY = "http://deb.debian.org/debian-security"
SOURCES = f"""\
deb {MIRROR} {SUITE} main
deb {MIRROR} {SUITE}-updates main
deb {SECURITY} {SUITE}-security main
"""
# Nothing that is made here has to survive a power failure; no manual is read in it either, but ours may be looked for.
DPKG_CONF = "force-unsafe-io\n"
# No daemon is to start in a chroot: policy-rc.d(8) of invoke-rc.d.
POLICY = "#!/bin/sh\nexit 101\n"
APT = ("apt-get", "--quiet", "--quiet", "--yes", "--option", "Dpkg::Use-Pty=0", "--no-install-recommends")
# Archives of the cache are shared by all systems; apt's own lock there is waited for.
APT_WAIT = ("--option", "DPkg::Lock::Timeout=300")
BASE_TIMEOUT_S = 600.0
COMMAND_TIMEOUT_S = 600.0

_LOOPBACK = "ip link set lo up\n"
_ENTER = """\
set -e
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount -t sysfs -o ro sysfs "$1/sys"
mount --rbind /sys/fs/cgroup "$1/sys/fs/cgroup"
mount -t bpf -o mode=0700 bpf "$1/sys/fs/bpf"
mount --bind "$2" "$1/var/cache/apt/archives"
shift 2
exec "$@"
"""


def cache_directory() -> Path:
    """Where what takes long to make is kept."""
    directory = Path(os.environ.get("ADOPTD_CACHE") or "/var/cache/adoptd-dev")
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    return directory


@contextlib.contextmanager
def only_one(name: str) -> Iterator[Path]:
    """The cache directory, while nobody else makes what is called ``name``."""
    cache = cache_directory()
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield cache


@dataclass(frozen=True)
class System:
    """A Debian 12 that is unpacked at ``root``."""

    root: Path

    def path(self, inside: str) -> Path:
        """A path in the system, as this process reaches it."""
        return self.root / inside.lstrip("/")

    def write(self, inside: str, text: str, mode: int = 0o644) -> None:
        """Make or replace a file."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        text: str = "",
        env: Optional[Mapping[str, str]] = None,
        offline: bool = False,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in it as root. Raises RuntimeError with all it said if it fails and ``check`` is asked for.

        ``offline``: in a network namespace of its own, with nothing but a loopback device in it.
        """
        archives = cache_directory() / "archives"
        (archives / "partial").mkdir(parents=True, exist_ok=True)
        enter = ["unshare", "--mount", "--propagation", "private", *(["--net"] if offline else [])]
        enter += ["--", "sh", "-c", (_LOOPBACK if offline else "") + _ENTER, "sh"]
        inside = ["chroot", str(self.root), "/usr/bin/env", "-i", *_environment(env), *argv]
        with subprocess.Popen(
            [*enter, str(self.root), str(archives), *inside],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(text, timeout=timeout_s)
            except BaseException as error:
                # With all that it has started.
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate()
                if isinstance(error, subprocess.TimeoutExpired):
                    raise RuntimeError(f"{' '.join(argv)}: not done in {timeout_s:.0f} s:\n{out}{err}") from None
                raise
        done = subprocess.CompletedProcess(argv, process.returncode, out, err)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def install(self, *packages: str) -> str:
        """apt-get install, by name or by path inside; what it said."""
        with only_one("archives"):
            done = self.run([*APT, *APT_WAIT, "install", *packages])
        return done.stdout + done.stderr


def _environment(more: Optional[Mapping[str, str]]) -> Sequence[str]:
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
        **(more or {}),
    }
    return [f"{name}={value}" for name, value in environment.items()]


def base_archive() -> Path:
    """The tar of a minimal system with the lists of packages, made if it is not in the cache."""
    recipe = hashlib.sha256("\0".join((SUITE, SOURCES, DPKG_CONF, POLICY)).encode()).hexdigest()[:12]
    with only_one("base") as cache:
        archive = cache / f"base-{recipe}.tar"
        if archive.exists():
            return archive
        for old in cache.glob("base-*.tar"):
            old.unlink()
        with tempfile.TemporaryDirectory(dir=cache, prefix="base.") as directory:
            root = Path(directory) / "root"
            _run(["debootstrap", "--variant=minbase", SUITE, str(root), MIRROR])
            system = System(root)
            system.write("/etc/apt/sources.list", SOURCES)
            system.write("/etc/dpkg/dpkg.cfg.d/fast", DPKG_CONF)
            system.write("/usr/sbin/policy-rc.d", POLICY, mode=0o755)
            system.write("/etc/resolv.conf", Path("/etc/resolv.conf").read_text(encoding="utf-8"))
            system.run([*APT, "update"])
            system.run([*APT, *APT_WAIT, "dist-upgrade"])
            for fetched in system.path("/var/cache/apt/archives").glob("*.deb"):
                fetched.unlink()
            new = Path(directory) / "base.tar"
            _run(["tar", "--numeric-owner", "--xattrs", "-C", str(root), "-cf", str(new), "."])
            new.replace(archive)
        return archive


@contextlib.contextmanager
def fresh_system(within: Path) -> Iterator[System]:
    """A new minimal system below ``within``, removed on leaving."""
    root = Path(tempfile.mkdtemp(dir=within, prefix="system."))
    try:
        _run(["tar", "--numeric-owner", "--xattrs", "-C", str(root), "-xf", str(base_archive())])
        system = System(root)
        # Of the machine we are on now, not of the one that made the archive.
        system.write("/etc/resolv.conf", Path("/etc/resolv.conf").read_text(encoding="utf-8"))
        yield system
    finally:
        # --one-file-system: nothing of the host can be mounted in there, and if it were, it stays.
        subprocess.run(["rm", "-rf", "--one-file-system", "--", str(root)], check=True)


def _run(argv: Sequence[str]) -> None:
    missing = shutil.which(argv[0]) is None
    if missing:
        raise RuntimeError(f"{argv[0]} is not installed; ./dev setup installs it")
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=BASE_TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
