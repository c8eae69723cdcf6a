"""Removing, purging and upgrading the package while PAM still asks for its module: nobody is locked out.

sshd and libpam are Debian's own. Of the two ways to lose, falling open is chosen over locking root out, and only for
a line whose administrator wrote that; a line that would lock everybody out keeps the package where it is.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest

from package.installed import LOGIN_TIMEOUT_S, MODULE, RECOMMENDED, Installed

pytestmark = pytest.mark.timeout(900)

# include/uapi/linux/inotify.h
IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x40, 0x80, 0x100, 0x200
PROFILE = f"{RECOMMENDED}\tpam_adopt.so"


@pytest.fixture(autouse=True)
def _clean(installed: Installed) -> Iterator[None]:
    installed.ensure()
    installed.pam()
    yield
    installed.pam()


def _is_installed(installed: Installed) -> bool:
    state = installed.system.run(["dpkg-query", "-W", "-f", "${db:Status-Status}", "adoptd"], check=False).stdout
    return state == "installed" and installed.system.path(MODULE).exists()


@pytest.mark.parametrize(
    "line",
    [
        "account required",
        "-account required",
        "session requisite",
        "account [success=ok ignore=ignore default=bad]",
        "account [success=1 ignore=1 default=ignore]",
    ],
)
def test_a_line_that_would_lock_everybody_out_keeps_the_package(installed: Installed, line: str) -> None:
    """The removal says which line it is, and everything is as before: root gets in."""
    # Behind the last of them, which by itself jumps over it: who is sent there is refused.
    deny = ["account required pam_deny.so"] if "=1" in line else []
    installed.pam(f"{line} pam_adopt.so mode=observe", *deny)
    for purge in (False, True):
        done = installed.remove(purge=purge)
        assert done.returncode != 0
        assert "without pam_adopt.so these lines would refuse every" in done.stderr
        assert f"{line} pam_adopt.so mode=observe" in done.stderr
        assert "/etc/pam.d/sshd:" in done.stderr
        assert _is_installed(installed)
    assert installed.logs_in("root")
    assert installed.system.run(["dpkg", "--audit"]).stdout == ""


def test_what_that_prevents(installed: Installed) -> None:
    """Were the module away all the same, such a line would let nobody in: with a dash before it, too."""
    for line in ("account required", "-account required", "session required"):
        installed.pam(f"{line} pam_adopt.so mode=observe")
        module = installed.system.path(MODULE)
        away = module.with_name("away")
        module.rename(away)
        try:
            assert not installed.logs_in("root")
            assert not installed.logs_in("alice")
        finally:
            away.rename(module)
    assert installed.logs_in("root")


@pytest.mark.parametrize("control", ["sufficient", "[success=1 default=ignore]"])
def test_what_only_the_module_lets_in_keeps_it(installed: Installed, control: str) -> None:
    """Root by another line, users by the module, and behind it nobody: a removal would leave root alone."""
    installed.pam(
        "account [success=3 default=ignore] pam_succeed_if.so quiet uid = 0",
        # No agent is here.
        f"account {control} pam_adopt.so action_generic_failure=allow",
        "account required pam_deny.so",
        "account required pam_permit.so",
    )
    assert installed.logs_in("alice")
    done = installed.remove()
    assert done.returncode != 0
    assert f"account {control} pam_adopt.so" in done.stderr
    assert _is_installed(installed)
    assert installed.logs_in("alice")


def test_the_recommended_lines_let_it_go(installed: Installed) -> None:
    """With them a missing module is passed over: the lines below and above decide, root and users get in."""
    installed.pam(f"account {RECOMMENDED} pam_adopt.so", f"session {RECOMMENDED} pam_adopt.so")
    done = installed.remove()
    assert done.returncode == 0, done.stderr
    assert not installed.system.path(MODULE).exists()
    # Not in silence: who had nobody in without a job has that no longer.
    assert "nobody is refused for want of a job" in done.stderr
    assert f"account {RECOMMENDED} pam_adopt.so\n" in done.stderr
    assert installed.logs_in("root")
    assert installed.logs_in("alice")


def test_they_still_refuse_what_the_module_refuses(installed: Installed) -> None:
    """Passing over a missing module is all that they pass over: what the module denies, they deny."""
    installed.pam(f"account {RECOMMENDED} pam_adopt.so action_generic_failure=deny socket=/run/nobody-is-here")
    assert not installed.logs_in("alice")
    assert installed.logs_in("root")
    installed.pam(f"account {RECOMMENDED} pam_adopt.so no_such_option=1")
    assert not installed.logs_in("alice")
    assert installed.logs_in("root")


def test_sufficient_before_pam_access_closes(installed: Installed) -> None:
    """Where pam_access decides about those without a job, without the module it decides about all."""
    access = "account required pam_access.so accessfile=/etc/security/test.conf"
    installed.system.write("/etc/security/test.conf", "+:root:ALL\n-:ALL:ALL\n")
    installed.pam("account sufficient pam_adopt.so", access)
    done = installed.remove()
    assert done.returncode == 0, done.stderr
    assert installed.logs_in("root")
    assert not installed.logs_in("alice")


def test_the_profile_is_off_until_asked_for_and_goes_with_the_package(installed: Installed) -> None:
    """pam-auth-update puts both lines into the common stacks, after pam_unix; a removal takes them out again."""
    common = {kind: installed.system.path(f"/etc/pam.d/common-{kind}") for kind in ("account", "session")}
    before = {kind: path.read_text() for kind, path in common.items()}
    assert not any("pam_adopt" in text for text in before.values())
    # As another package's installation would run it: still off.
    installed.system.run(["pam-auth-update", "--package"])
    assert {kind: path.read_text() for kind, path in common.items()} == before
    installed.system.run(["pam-auth-update", "--enable", "adoptd"])
    for kind, path in common.items():
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert lines[-1] == f"{kind}\t{PROFILE} "
    assert "pam_adopt" not in installed.system.path("/etc/pam.d/common-session-noninteractive").read_text()
    # No agent answers, and by default that is left to the other lines.
    assert installed.logs_in("alice")
    done = installed.remove(purge=True)
    assert done.returncode == 0, done.stderr
    assert {kind: path.read_text() for kind, path in common.items()} == before
    assert installed.logs_in("root")
    assert installed.logs_in("alice")


def test_a_profile_in_files_edited_by_hand_locks_nobody_out(installed: Installed) -> None:
    """pam-auth-update leaves such files alone, lines and all; these say what to do without the module."""
    file = installed.system.path("/etc/pam.d/common-account")
    before = file.read_text()
    installed.system.run(["pam-auth-update", "--enable", "adoptd"])
    file.write_text(file.read_text().replace("pam_permit.so", "pam_permit.so # ours"))
    try:
        done = installed.remove()
        assert done.returncode == 0, done.stderr
        assert not installed.system.path(MODULE).exists()
        assert installed.logs_in("root")
    finally:
        file.write_text(before)
        installed.ensure()
        installed.system.run(["pam-auth-update", "--package", "--force"])


def test_purge_leaves_what_the_administrator_made(installed: Installed) -> None:
    """The conffile goes, a key and a file of conf.d stay; nothing of the package's own is left."""
    installed.system.write("/etc/adoptd/adoptd.key", "secret\n", mode=0o600)
    installed.system.write("/etc/adoptd/conf.d/10-site.toml", "[agent]\n")
    done = installed.remove(purge=True)
    assert done.returncode == 0, done.stderr
    left = sorted(path.name for path in installed.system.path("/etc/adoptd").rglob("*") if path.is_file())
    assert left == ["10-site.toml", "adoptd.key"]
    shutil.rmtree(installed.system.path("/etc/adoptd"))
    installed.ensure()
    installed.system.write("/run/adoptd/sessions/42-7", "{}\n")
    done = installed.remove(purge=True)
    # Nothing of a directory that could not be removed, as where a path is not what Debian's own packages call it.
    assert (done.returncode, done.stderr) == (0, "probe: was not loaded\n")
    assert not installed.system.path("/run/adoptd").exists()
    for top in ("/etc", "/usr", "/var/lib"):
        found = installed.system.path(top).rglob("*adopt*")
        assert [str(path) for path in found if "/dpkg/" not in str(path) and "/systemd/" not in str(path)] == []


# bpffs is each run's own here, so all of it is one. With $1 in the configuration; what is left is the last thing said.
_WITH_A_PROBE = """\
adoptd probe load >&2
[ -n "$(find /sys/fs/bpf/adoptd -mindepth 2 -print -quit)" ] || exit 1
printf '%s\n' "$1" >/etc/adoptd/conf.d/10-site.toml
dpkg --remove adoptd >&2 || exit 1
if [ -e /sys/fs/bpf/adoptd ]; then find /sys/fs/bpf/adoptd; else echo gone; fi
"""


@pytest.mark.parametrize("configuration", ["", "this is not TOML", '[no_such_table]\nkey = "value"'])
def test_no_probe_is_left(installed: Installed, configuration: str) -> None:
    """Neither where the configuration is wrong: nobody would be left to unload it."""
    file = installed.system.path("/etc/adoptd/conf.d/10-site.toml")
    try:
        done = installed.system.run(["sh", "-c", _WITH_A_PROBE, "sh", configuration], check=False, timeout_s=120)
        assert (done.returncode, done.stdout) == (0, "gone\n"), done.stderr
        assert "probe: unloaded" in done.stderr
        assert "may still be loaded" not in done.stderr
    finally:
        file.unlink()


def test_it_is_installed_again(installed: Installed) -> None:
    """After a removal with the lines in place, with what the administrator wrote: as it was before."""
    lines = [f"account {RECOMMENDED} pam_adopt.so", f"session {RECOMMENDED} pam_adopt.so"]
    installed.pam(*lines)
    conffile = installed.system.path("/etc/adoptd/adoptd.toml")
    before = conffile.read_text(encoding="utf-8")
    edited = before.replace("[session]\n", '[session]\ncontact = "us"\n')
    try:
        conffile.write_text(edited, encoding="utf-8")
        assert installed.remove().returncode == 0
        assert conffile.read_text(encoding="utf-8") == edited
        installed.system.run(["dpkg", "--install", "/root/adoptd.deb"])
        assert conffile.read_text(encoding="utf-8") == edited
        assert 'contact = "us"' in installed.system.run(["adoptd", "config", "show"]).stdout
        assert installed.logs_in("root")
    finally:
        installed.ensure()
        conffile.write_text(before, encoding="utf-8")
    installed.pam(lines[0] + " action_generic_failure=deny")
    assert not installed.logs_in("alice")


def _older(installed: Installed, directory: Path) -> str:
    """The same package with a lower version and a module of other bytes, put into the system; its path there."""
    tree = directory / "older"
    subprocess.run(["dpkg-deb", "-R", installed.deb, tree], check=True)
    control = tree / "DEBIAN/control"
    lines = control.read_text().splitlines()
    control.write_text("".join("Version: 0.0.1\n" if line.startswith("Version:") else f"{line}\n" for line in lines))
    with (tree / MODULE.lstrip("/")).open("ab") as module:
        module.write(b"older")
    (tree / "DEBIAN/md5sums").unlink()
    target = installed.system.path("/root/older.deb")
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, target], check=True, capture_output=True)
    return "/root/older.deb"


# $1: a directory. dpkg is killed once a file in it is new, which it may be by the name that is only dpkg's own.
_KILLED = """\
touch /root/begun
dpkg --unpack /root/adoptd.deb &
dpkg=$!
while kill -0 $dpkg 2>/dev/null; do
    [ -z "$(find "$1" -cnewer /root/begun -type f -print -quit 2>/dev/null)" ] || kill -KILL $dpkg 2>/dev/null || :
done
wait $dpkg
case $? in 0 | 137) ;; *) exit 1 ;; esac
"""


def _of_dpkg(installed: Installed, top: str) -> List[Path]:
    """What dpkg leaves where it was killed, until it is asked again."""
    return list(installed.system.path(top).rglob("*.dpkg-*"))


class _Watch:
    """What happens to the names in a directory, from the kernel."""

    def __init__(self, directory: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        mask = IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE
        assert libc.inotify_add_watch(self._fd, os.fsencode(directory), mask) >= 0

    def of(self, name: str) -> List[int]:
        """The events of one name so far."""
        found: List[Tuple[int, str]] = []
        data = os.read(self._fd, 1 << 20)
        while data:
            _, mask, _, length = struct.unpack_from("=iIII", data)
            found.append((mask, data[16 : 16 + length].rstrip(b"\0").decode()))
            data = data[16 + length :]
        return [mask for mask, other in found if other == name]

    def close(self) -> None:
        os.close(self._fd)


def test_an_upgrade_replaces_the_module_without_a_gap(installed: Installed, tmp_path: Path) -> None:
    """From an older version, with "required" in PAM: the name is never without a file, and then has the new one."""
    older = _older(installed, tmp_path)
    installed.pam("account required pam_adopt.so mode=observe", "session required pam_adopt.so mode=observe")
    installed.system.run(["dpkg", "--force-downgrade", "--install", older])
    module = installed.system.path(MODULE)
    assert module.read_bytes().endswith(b"older")
    installed.system.write("/etc/adoptd/conf.d/10-site.toml", '[agent]\nlog_level = "debug"\n')
    watch = _Watch(module.parent)
    try:
        done = installed.system.run(["dpkg", "--install", "/root/adoptd.deb"])
        # One rename over the old file. A deletion or a renaming away would be a moment without it.
        assert watch.of(module.name) == [IN_MOVED_TO], done.stdout
    finally:
        watch.close()
        installed.system.path("/etc/adoptd/conf.d/10-site.toml").unlink()
    assert not module.read_bytes().endswith(b"older")
    assert installed.logs_in("root")
    assert installed.logs_in("alice")


@pytest.mark.parametrize("at", ["the first file", "the module", "the end"])
def test_an_upgrade_that_is_killed_locks_nobody_out(installed: Installed, tmp_path: Path, at: str) -> None:
    """With "required" in PAM, dpkg killed while it unpacks: logins go on, and dpkg is told to go on or do it again."""
    older = _older(installed, tmp_path)
    installed.pam("account required pam_adopt.so mode=observe", "session required pam_adopt.so mode=observe")
    installed.system.run(["dpkg", "--force-downgrade", "--install", older])
    where = {"the first file": "/usr/share/adoptd/agent/adoptd", "the module": str(Path(MODULE).parent)}
    done = installed.system.run(
        ["sh", "-c", _KILLED, "sh", where.get(at, "/nowhere")], check=False, timeout_s=LOGIN_TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    module = installed.system.path(MODULE)
    assert module.read_bytes()[:4] == b"\x7fELF"
    assert installed.logs_in("root")
    assert installed.logs_in("alice")
    installed.system.run(["dpkg", "--configure", "--pending"], check=False)
    assert installed.logs_in("root")
    installed.system.run(["dpkg", "--install", "/root/adoptd.deb"])
    assert _is_installed(installed)
    assert not module.read_bytes().endswith(b"older")
    assert installed.system.run(["dpkg", "--audit"]).stdout == ""
    left = [path for top in ("/usr/share/adoptd", str(Path(MODULE).parent)) for path in _of_dpkg(installed, top)]
    assert left == []


def test_removing_it_is_seen_by_the_same_watch(installed: Installed) -> None:
    """The watch of the test above would have seen a gap: it sees the one that a removal makes."""
    module = installed.system.path(MODULE)
    watch = _Watch(module.parent)
    try:
        assert installed.remove().returncode == 0
        assert IN_DELETE in watch.of(module.name)
    finally:
        watch.close()
