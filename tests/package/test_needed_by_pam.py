"""Which PAM lines refuse everybody when the module is not there: what the package says, and what libpam does."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from package.installed import RECOMMENDED

SCRIPT = Path(__file__).resolve().parents[2] / "packaging/needed-by-pam"

PAM_SUCCESS = 0
PAM_CONV_ERR = 19

CONTROLS = (
    "required",
    "requisite",
    "optional",
    "sufficient",
    RECOMMENDED,
    "[success=ok default=ignore]",
    "[default=ignore]",
    "[success=ok default=bad]",
    "[success=ok default=die]",
    "[success=ok module_unknown=bad default=ignore]",
    "[success=ok module_unknown=die default=ignore]",
    "[ success=ok  module_unknown=ignore  default=die ]",
    "[module_unknown=ignore success=ok default=bad]",
    "[success=ok module_unknown=ignore default=bad module_unknown=bad]",
    "[default=ignore default=bad]",
    "[success=1 default=ignore]",
)
WRITTEN = (
    "{kind} {control} pam_adopt.so",
    "-{kind} {control} pam_adopt.so",
    "{kind}\t{control}\tpam_adopt.so mode=observe\taction_unknown=deny",
    "{kind} {control} /lib/security/nowhere/pam_adopt.so",
    "{kind} {control} \\\n pam_adopt.so",
    "{kind} {control} pam_adopt.so nodename=[default=ignore]",
    "{kind} {control} pam_adopt.so action_unknown=x account optional x",
    "  {kind} {control} pam_adopt.so # why",
    "# a comment is not continued \\\n{kind} {control} pam_adopt.so",
    "{kind} {control} \\ \t\n pam_adopt.so",
    "{kind} {control} \\\n# in between\n\n pam_adopt.so",
    "{kind} {control} \\\n \\\n pam_adopt.so # why \\\n{kind} required pam_permit.so",
)


class _Conversation(ctypes.Structure):
    _fields_ = (("function", ctypes.c_void_p), ("data", ctypes.c_void_p))


def _lets_in(directory: Path) -> bool:
    """Whether libpam lets root through both stacks of the service in ``directory``, with the module not there."""
    # By another name, for the module may be installed here.
    (directory / "without").write_text((directory / "service").read_text().replace("pam_adopt.so", "pam_nowhere.so"))
    pam = ctypes.CDLL("libpam.so.0")
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    function = kind(lambda *_: PAM_CONV_ERR)
    conversation = _Conversation(ctypes.cast(function, ctypes.c_void_p), None)
    handle = ctypes.c_void_p()
    started = pam.pam_start_confdir(
        b"without", b"root", ctypes.byref(conversation), str(directory).encode(), ctypes.byref(handle)
    )
    assert started == PAM_SUCCESS
    try:
        return bool(pam.pam_acct_mgmt(handle, 0) == PAM_SUCCESS and pam.pam_open_session(handle, 0) == PAM_SUCCESS)
    finally:
        pam.pam_end(handle, 0)


def _says(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, str(root)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["account", "session"])
@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("control", CONTROLS)
def test_the_script_and_libpam_agree(tmp_path: Path, control: str, written: str, kind: str) -> None:
    """A line is called needed exactly if libpam refuses root without the module; the module is not here."""
    directory = tmp_path / "etc/pam.d"
    directory.mkdir(parents=True)
    line = written.format(kind=kind, control=control)
    stack = ["account required pam_permit.so", "session required pam_permit.so", line]
    (directory / "service").write_text("\n".join(stack) + "\n", encoding="ascii")
    said = _says(tmp_path)
    assert (said.returncode == 0) == _lets_in(directory), said.stdout
    if said.returncode:
        assert said.stdout.startswith("/etc/pam.d/service:")
        assert "pam_adopt.so" in said.stdout


def test_a_dash_does_not_make_a_line_harmless(tmp_path: Path) -> None:
    """pam.d(5): it only silences the log. This is why the package recommends another thing."""
    (tmp_path / "service").write_text("-account required pam_adopt.so\n", encoding="ascii")
    assert not _lets_in(tmp_path)


@pytest.mark.parametrize("name", ["sshd~", "sshd.dpkg-old", "sshd.rpmsave", "sshd.bak"])
def test_what_lies_beside_a_service_is_none(tmp_path: Path, name: str) -> None:
    """A backup does not keep the package from being removed."""
    (tmp_path / "etc/pam.d").mkdir(parents=True)
    (tmp_path / "etc/pam.d" / name).write_text("account required pam_adopt.so\n", encoding="ascii")
    assert _says(tmp_path).returncode == 0


@pytest.mark.parametrize("include", ["@include {}", "account include {}", "account substack {}"])
@pytest.mark.parametrize("name", ["../extra", "/etc/extra", "common.bak"])
def test_what_is_included_counts_wherever_it_is(tmp_path: Path, include: str, name: str) -> None:
    """By a path out of the directory, or by a name that is a backup's otherwise."""
    (tmp_path / "etc/pam.d").mkdir(parents=True)
    (tmp_path / "etc/pam.d/sshd").write_text(include.format(name) + "\n", encoding="ascii")
    place = tmp_path / (name.lstrip("/") if name.startswith("/") else f"etc/pam.d/{name}")
    place.write_text("account required pam_adopt.so\n", encoding="ascii")
    said = _says(tmp_path)
    assert said.returncode == 1
    assert said.stdout.count("account required pam_adopt.so") == 1


def test_every_needed_line_is_named(tmp_path: Path) -> None:
    """In all places that libpam reads, with file and line; comments are none."""
    for place, text in (
        ("etc/pam.d/sshd", "# account required pam_adopt.so\naccount requisite pam_adopt.so mode=observe\n"),
        ("usr/lib/pam.d/login", "session required pam_adopt.so\n"),
        ("etc/pam.conf", "other account required pam_adopt.so\nother session optional pam_adopt.so\n"),
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text, encoding="ascii")
    said = _says(tmp_path)
    assert said.returncode == 1
    assert said.stdout.splitlines() == [
        "/etc/pam.conf:1: other account required pam_adopt.so",
        "/etc/pam.d/sshd:2: account requisite pam_adopt.so mode=observe",
        "/usr/lib/pam.d/login:1: session required pam_adopt.so",
    ]


def test_no_pam_at_all(tmp_path: Path) -> None:
    """A system without PAM needs nothing."""
    assert _says(tmp_path).returncode == 0
