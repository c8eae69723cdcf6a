"""The rpm as a file, and unpacked into an empty root: there is no distribution of its own to install it in here."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import List

import pytest

from package.conftest import ROOT
from package.installed import RECOMMENDED, Installed

pytestmark = pytest.mark.timeout(900)

MODULE = "/usr/lib64/security/pam_adopt.so"


def _rpm(*arguments: object) -> str:
    done = subprocess.run(["rpm", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _listed(rpm: Path) -> List[str]:
    return _rpm("-qlp", rpm).splitlines()


def test_its_files(rpm: Path) -> None:
    """Those of a distribution with /usr/lib64; nothing of Debian's."""
    files = _listed(rpm)
    for name in (
        MODULE,
        "/usr/sbin/adoptd",
        "/usr/bin/adoptctl",
        "/usr/share/adoptd/agent/adoptd/cli.py",
        "/usr/share/adoptd/bpf/probe.c",
        "/etc/adoptd/adoptd.toml",
        "/usr/share/man/man8/pam_adopt.8.gz",
        "/usr/share/zsh/site-functions/_adoptctl",
    ):
        assert name in files
    assert not [name for name in files if "pam-configs" in name or "x86_64-linux-gnu" in name]
    assert _rpm("-qcp", rpm).split() == ["/etc/adoptd/adoptd.toml"]
    units = [path.name for path in (ROOT / "packaging/systemd").glob("*.*")]
    assert [name for name in units if f"/usr/lib/systemd/system/{name}" not in files] == []


def test_it_is_whole_and_says_what_it_needs(rpm: Path) -> None:
    """The digests are right, and the dependencies are the distribution's packages."""
    assert "digests OK" in _rpm("--checksig", "--nosignature", rpm)
    needs = _rpm("-qpR", rpm)
    for name in ("bcc", "jwt", "prometheus_client", "psutil"):
        assert f"python3-{name} >= " in needs
    assert "(python3-tomli if python3 < 3.11)" in needs
    assert "security/pam_adopt.so" not in _rpm("-qp", "--provides", rpm)


def test_it_unpacks_into_an_empty_root(rpm: Path, tmp_path: Path) -> None:
    """Every file is there, with its bytes and its mode, and rpm itself finds nothing changed."""
    root = tmp_path / "root"
    root.mkdir()
    common = ("--root", root, "--dbpath", "/var/lib/rpm")
    _rpm(*common, "--initdb")
    _rpm(*common, "-i", "--nodeps", "--noscripts", "--ignorearch", "--ignoreos", rpm)
    assert (root / MODULE.lstrip("/")).read_bytes()[:4] == b"\x7fELF"
    for name in ("usr/sbin/adoptd", "usr/bin/adoptctl", "usr/share/adoptd/needed-by-pam"):
        assert (root / name).stat().st_mode & 0o777 == 0o755
    assert _rpm(*common, "-V", "--nodeps", "--noscripts", "adoptd") == ""


def test_a_line_that_needs_the_module_keeps_it(rpm: Path) -> None:
    """Its scriptlet asks as the Debian package's does, before anything else, and only when it is removed for good."""
    scripts = _rpm("-qp", "--scripts", rpm)
    removal = scripts.partition("preuninstall scriptlet")[2].partition("postuninstall")[0]
    assert removal.index('[ "$1" -eq 0 ]') < removal.index("needed-by-pam") < removal.index("exit 1")
    assert removal.index("exit 1") < removal.index("systemctl")


def test_it_is_removed_as_the_debian_package_is(rpm: Path, installed: Installed) -> None:
    """Its scriptlets are run, in a system of their own: kept while a line needs the module, else gone; and named."""
    installed.ensure()
    assert installed.remove(purge=True).returncode == 0
    common = ("--root", installed.system.root, "--dbpath", "/var/lib/rpm")
    module = installed.system.path(MODULE)
    erase = ["rpm", *map(str, common), "-e", "adoptd"]
    try:
        _rpm(*common, "--initdb")
        _rpm(*common, "-i", "--nodeps", "--ignorearch", "--ignoreos", rpm)
        for lines in (
            ["account required pam_adopt.so"],
            ["account sufficient pam_adopt.so", "account required pam_deny.so"],
        ):
            installed.pam(*lines)
            kept = subprocess.run(erase, capture_output=True, text=True, check=False)
            assert kept.returncode != 0
            assert f": {lines[0]}\n" in kept.stderr
            assert module.exists()
            assert "adoptd" in _rpm(*common, "-q", "adoptd")
        installed.pam(f"account {RECOMMENDED} pam_adopt.so")
        gone = subprocess.run(erase, capture_output=True, text=True, check=False)
        assert gone.returncode == 0, gone.stderr
        assert "nobody is refused for want of a job" in gone.stderr
        assert f"account {RECOMMENDED} pam_adopt.so\n" in gone.stderr
        assert not module.exists()
        assert installed.logs_in("root")
    finally:
        subprocess.run([*erase, "--noscripts"], capture_output=True, check=False)
        installed.pam()


def test_its_sources_can_be_built_elsewhere(rpm: Path, tmp_path: Path) -> None:
    """The source package has the spec and the sources, which name what they are built with; rebuilt, as docs/admin.md
    says, with nothing defined but where, it is the same package, whatever the release."""
    source = next(rpm.parent.glob("*.src.rpm"))
    assert sorted(name.partition("-")[0] for name in _listed(source)) == ["adoptd", "adoptd.spec"]
    assert "pam-devel" in _rpm("-qpR", source)
    # Debian's rpm knows of no package that is installed, and has other directories.
    here = ("--nodeps", "--define", "_libdir /usr/lib64", "--define", f"_topdir {tmp_path}")
    subprocess.run(["rpmbuild", "--rebuild", *here, source], check=True, capture_output=True)
    (again,) = tmp_path.glob("RPMS/*/*.rpm")
    assert again.name == rpm.name
    assert _listed(again) == _listed(rpm)


def test_the_same_sources_give_the_same_bytes(rpm: Path, tmp_path: Path) -> None:
    """Built again, from another directory at another time."""
    subprocess.run([ROOT / "packaging/build-packages", tmp_path, "rpm"], check=True, capture_output=True)
    source = next(rpm.parent.glob("*.src.rpm")).name
    for name in (rpm.name, source):
        assert (tmp_path / name).read_bytes() == (rpm.parent / name).read_bytes(), name
