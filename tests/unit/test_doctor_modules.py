"""What doctor says of PAM's modules: ours, where it is and whether it loads, and those of the other lines."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import List

import pytest

from adoptd.config import Config
from adoptd.doctor import module
from adoptd.doctor.findings import Finding, Grade, Scene
from adoptd.doctor.module import ModuleFile, judge_copy, judge_lacking, judge_module, look_at_module
from adoptd.pam_lines import PamLine, lines_of

RECOMMENDED = "[success=ok new_authtok_reqd=ok ignore=ignore module_unknown=ignore default=bad]"


def scene(directory: Path) -> Scene:
    return Scene(directory / "adoptd.toml", Config(), directory, "sshd")


LINE = PamLine(Path("/etc/pam.d/sshd"), 3, "account", "required", "pam_adopt.so", ())
IGNORED = PamLine(Path("/etc/pam.d/sshd"), 3, "account", RECOMMENDED.strip("[]"), "pam_adopt.so", ())
FILE = (stat.S_IFREG | 0o644, 0)


@pytest.mark.parametrize(
    ("files", "line", "grade", "words"),
    [
        ([ModuleFile("/m", FILE, "")], LINE, Grade.OK, "loads"),
        ([ModuleFile("/m", FILE)], LINE, Grade.OK, "only root"),
        ([ModuleFile("/m", None)], LINE, Grade.FAILURE, "not even root"),
        ([], LINE, Grade.FAILURE, "any directory of PAM modules"),
        ([ModuleFile("/m", None)], IGNORED, Grade.FAILURE, "nobody is refused or adopted"),
        ([ModuleFile("/m", FILE, "wrong ELF class")], LINE, Grade.FAILURE, "wrong ELF class"),
        ([ModuleFile("/m", (stat.S_IFREG | 0o666, 0))], LINE, Grade.FAILURE, "mode 0666"),
        ([ModuleFile("/m", (stat.S_IFREG | 0o644, 1000))], LINE, Grade.FAILURE, "uid 1000"),
        ([ModuleFile("/m", (stat.S_IFDIR | 0o755, 0))], LINE, Grade.FAILURE, "not a regular file: nobody can log in"),
    ],
)
def test_the_module(files: List[ModuleFile], line: PamLine, grade: Grade, words: str) -> None:
    """There, root's, and taken by the linker; what its absence does depends on the control."""
    (found,) = judge_module(files, line)
    assert found.grade is grade
    assert words in found.seen


def test_modules_of_other_lines(tmp_path: Path) -> None:
    """One that is missing, or has nothing for lines of that kind, is a refusal, unless the line says otherwise."""
    lost = {("pam_lost.so", kind): "is nowhere" for kind in ("auth", "account", "session")}
    for line, grade in (
        ("account required pam_lost.so", Grade.FAILURE),
        ("-account required pam_lost.so", Grade.FAILURE),
        ("session requisite pam_lost.so", Grade.FAILURE),
        ("account [success=ok default=bad] pam_lost.so", Grade.FAILURE),
        ("auth required pam_lost.so", Grade.WARNING),
        ("account sufficient pam_permit.so\naccount required pam_lost.so", None),
        ("account optional pam_lost.so", None),
        ("session sufficient pam_lost.so", None),
        ("account [success=ok module_unknown=ignore default=bad] pam_lost.so", None),
        ("account required pam_unix.so", None),
    ):
        (tmp_path / "sshd").write_text(f"{line}\n")
        found = list(judge_lacking(lines_of("sshd", tmp_path), lost))
        assert [each.grade for each in found] == ([] if grade is None else [grade]), line


def test_modules_are_looked_for(tmp_path: Path) -> None:
    """Where libpam does, and by what libpam calls."""
    for line, words in (
        ("account required pam_unix.so", ""),
        ("account required pam_lost.so", "is in no directory"),
        ("account required pam_permit.so\u00a0mode=observe", "is in no directory"),
        ("account required pam_limits.so", "has nothing for account lines (pam_sm_acct_mgmt)"),
        ("session required pam_limits.so", ""),
        ("session required pam_faillock.so", "has nothing for session lines"),
        ("account required /nowhere/pam_unix.so", "is not there"),
        ("account required /lib/security/$ISA/pam_unix.so", ""),
    ):
        (tmp_path / "sshd").write_text(f"{line}\n", encoding="utf-8")
        found = list(look_at_module(scene(tmp_path)))
        assert [words in each.seen for each in found] == ([True] if words else []), found


@pytest.mark.parametrize(
    ("module", "lack", "words"),
    [
        ("pam_sss.so", "is nowhere", "the package that pam_sss.so is of"),
        ("pam_adpot.so", "is nowhere", "pam_adopt.so is what it is called"),
        ("pam_adopt", "is nowhere", "pam_adopt.so is what it is called"),
        ("pam_adopt.so\u00a0mode=observe", "is nowhere", "cat -A shows it"),
        ("pam_slurm_adopt.so", "is nowhere", "the package that pam_slurm_adopt.so is of"),
        ("pam_limits.so", "has nothing for account lines", "is for lines of another kind"),
    ],
)
def test_what_to_do_about_a_module_that_is_not_there(tmp_path: Path, module: str, lack: str, words: str) -> None:
    """A slip of the pen, another kind of line, or a package."""
    (tmp_path / "sshd").write_text(f"account required {module}\n", encoding="utf-8")
    (found,) = judge_lacking(lines_of("sshd", tmp_path), {(module, "account"): lack})
    assert words in found.remedy


def test_modules_in_a_place_that_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That they are missing is not said where none at all is found."""
    (tmp_path / "sshd").write_text("account required pam_unix.so\naccount required pam_lost.so\n")
    assert len(list(look_at_module(scene(tmp_path)))) == 1
    monkeypatch.setattr(module, "_MODULE_DIRECTORIES", (str(tmp_path), str(tmp_path)))
    assert list(look_at_module(scene(tmp_path))) == []


def test_a_copy_of_the_module(tmp_path: Path) -> None:
    """Which no upgrade reaches, once it differs."""
    assert list(judge_copy("/old/pam_adopt.so", [])) == []
    (found,) = judge_copy("/old/pam_adopt.so", ["/lib/security/pam_adopt.so"])
    assert (found.grade, "/lib/security/pam_adopt.so" in found.seen) == (Grade.WARNING, True)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("failed to map segment from shared object", "without noexec (findmnt -T /m)"),
        ("libpam.so.0: cannot open shared object file: No such file or directory", "install what the library"),
        ("wrong ELF class: ELFCLASS32", "install the package adoptd again"),
    ],
)
def test_what_to_do_about_a_module_that_does_not_load(error: str, words: str) -> None:
    """By what the linker says."""
    (found,) = judge_module([ModuleFile("/m", FILE, error)], LINE)
    assert (found.grade, words in found.remedy) == (Grade.FAILURE, True), found


def test_a_module_that_others_could_have_put_there_is_not_loaded(tmp_path: Path) -> None:
    """It would be their code that root runs; of one whose place is root's alone that is tried."""
    root_own, open_to_all = Path("/lib/x86_64-linux-gnu/security/pam_permit.so"), tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    there = open_to_all / "pam_adopt.so"
    # A constructor of its own would leave a mark: bytes that are no module are enough to see that it was tried.
    there.write_bytes(b"no module")
    (found,) = (each for each in _looked_at(tmp_path, there) if str(there) in each.seen)
    assert (found.grade, "others can put a module of theirs" in found.seen) == (Grade.FAILURE, True)
    open_to_all.chmod(0o755)
    (found,) = (each for each in _looked_at(tmp_path, there) if str(there) in each.seen)
    assert "cannot be loaded" in found.seen
    there.unlink()
    there.symlink_to(root_own)
    open_to_all.chmod(0o777)
    (found,) = (each for each in _looked_at(tmp_path, there) if str(there) in each.seen)
    assert "others can put a module of theirs" in found.seen


def _looked_at(directory: Path, module: Path) -> List[Finding]:
    (directory / "sshd").write_text(f"account required {module}\naccount required pam_permit.so\n")
    return list(look_at_module(scene(directory)))
