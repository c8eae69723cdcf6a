"""The Debian package as a file: what it says of itself, what is in it, that Debian's own checker finds nothing."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Dict, List, Mapping, Tuple

import pytest

from documents import links, read
from package.conftest import ROOT
from package.installed import MODULE

pytestmark = pytest.mark.timeout(900)

# The import's name where it is not the distribution's package's.
PACKAGE_OF = {"jwt": "python3-jwt", "bcc": "python3-bpfcc", "prometheus_client": "python3-prometheus-client"}


def _field(deb: Path, name: str) -> str:
    return subprocess.run(["dpkg-deb", "-f", deb, name], capture_output=True, text=True, check=True).stdout.strip()


def _files(deb: Path) -> Mapping[str, tarfile.TarInfo]:
    data = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(data)) as archive:
        return {member.name.lstrip("."): member for member in archive.getmembers()}


def test_it_depends_on_the_distributions_packages(deb: Path) -> None:
    """All that the agent needs, by Debian's names; what pyproject.toml asks of others, and bcc, which is in none."""
    depends = {part.split("|")[0].split()[0] for part in _field(deb, "Depends").split(",")}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert listed
    asked = {name.lower() for name in re.findall(r'"([A-Za-z0-9_-]+)', listed[1])} - {"tomli"}
    names = {{"pyjwt": "python3-jwt"}.get(name, f"python3-{name}") for name in asked}
    assert names | {"python3-bpfcc"} <= depends
    assert "python3-tomli" in _field(deb, "Depends")


def needed_packages() -> List[Tuple[str, str, str]]:
    """What docs/admin.md says that a node needs: package, at least which version, which one Debian 12 has."""
    rows = re.findall(r"^\| `(python3[\w-]*)`[^|]*\| *([\d.]*) *\| *([\d.]*) *\|", read("docs/admin.md"), re.MULTILINE)
    return [(name, least, there) for name, least, there in rows]


def test_the_guide_says_what_it_depends_on(deb: Path) -> None:
    """The same packages, and the same least versions."""
    found: Dict[str, str] = {}
    for each in re.split(r", | \| ", _field(deb, "Depends")):
        name, _, version = each.partition(" (>= ")
        if name.startswith("python3"):
            found.setdefault(name.partition(":")[0], version.rstrip("~)"))
    assert {name: least for name, least, _ in needed_packages()} == found


def test_every_file_is_where_it_belongs(deb: Path) -> None:
    """And root's, and writable by nobody else."""
    files = _files(deb)
    expected = (
        MODULE,
        "/usr/sbin/adoptd",
        "/usr/bin/adoptctl",
        "/usr/share/adoptd/agent/adoptd/cli.py",
        "/usr/share/adoptd/bpf/probe.c",
        "/usr/share/adoptd/bpf/include/linux/kconfig.h",
        "/etc/adoptd/adoptd.toml",
        "/usr/share/pam-configs/adoptd",
        "/usr/share/bash-completion/completions/adoptd",
        "/usr/share/bash-completion/completions/adoptctl",
        "/usr/share/zsh/vendor-completions/_adoptd",
        "/usr/share/zsh/vendor-completions/_adoptctl",
        "/usr/share/man/man1/adoptctl.1.gz",
        "/usr/share/man/man5/adoptd.toml.5.gz",
        "/usr/share/man/man8/adoptd.8.gz",
        "/usr/share/man/man8/pam_adopt.8.gz",
    )
    assert [name for name in expected if name not in files] == []
    assert [name for name, member in files.items() if (member.uid, member.gid) != (0, 0) or member.mode & 0o022] == []
    strays = [name for name in files if "__pycache__" in name or name.endswith((".pyc", ".o")) or "/tests/" in name]
    assert strays == []


def test_the_clones_files_that_nodes_need_are_in_it(deb: Path) -> None:
    """Nothing is listed by hand that could be forgotten: modules, the probe's sources, units, dashboards, documents."""
    files = _files(deb)
    packed = {
        "agent": ("agent/**/*.py", "/usr/share/adoptd/agent"),
        "bpf": ("bpf/**/*.[ch]", "/usr/share/adoptd/bpf"),
        "packaging/systemd": ("packaging/systemd/*.*", "/lib/systemd/system"),
        "dashboards": ("dashboards/*.[jy]*", "/usr/share/adoptd/dashboards"),
    }
    for top, (pattern, place) in packed.items():
        known = subprocess.run(
            ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-co", "--exclude-standard", "--", f":(glob){pattern}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")
        wanted = [f"{place}/{Path(name).relative_to(top)}" for name in known if name and (ROOT / name).exists()]
        assert [name for name in wanted if name not in files] == []


def test_its_pages_lead_to_each_other(deb: Path, tmp_path: Path) -> None:
    """Laid out as in the clone and not compressed: a link is to what is there. The picture alone is not on a node."""
    subprocess.run(["dpkg-deb", "-x", deb, tmp_path], check=True)
    top = tmp_path / "usr/share/doc/adoptd"
    pages = [*top.glob("*.md"), *top.glob("docs/*.md")]
    assert {path.name for path in (ROOT / "docs").glob("*.md")} | {"README.md"} <= {page.name for page in pages}
    for page in pages:
        for link in links(page.read_text(encoding="utf-8")):
            target = page.parent / link.partition("#")[0]
            assert re.match(r"https?:", link) or target.suffix == ".png" or target.exists(), f"{page.name}: {link}"


def test_nothing_is_brought_along(deb: Path) -> None:
    """No copy of another project's Python: every package in it is ours."""
    tops = {name.split("/")[5] for name in _files(deb) if name.startswith("/usr/share/adoptd/agent/")}
    assert tops - {""} == {"adoptd"}


def test_lintian_finds_nothing(deb: Path) -> None:
    """No error and no warning, and no override that would hide one."""
    done = subprocess.run(
        ["lintian", "--fail-on", "error,warning", "--allow-root", deb], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    assert not [name for name in _files(deb) if "lintian/overrides" in name]


def test_the_same_sources_give_the_same_bytes(deb: Path, tmp_path: Path) -> None:
    """Built again, from another directory at another time."""
    subprocess.run([ROOT / "packaging/build-packages", tmp_path, "deb"], check=True, capture_output=True)
    again = tmp_path / deb.name
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(deb.read_bytes()).digest()
