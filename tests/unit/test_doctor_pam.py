"""What doctor says of PAM files that are broken in the ways administrators break them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import List, Tuple

import pytest

from adoptd import doctor
from adoptd.doctor import Grade

SOUND = "account required pam_adopt.so\nsession required pam_adopt.so\n"


def findings(directory: Path, stack: str, config: str = "") -> List[Tuple[Grade, str]]:
    (directory / "sshd").write_text(stack)
    file = directory / "adoptd.toml"
    # An agent of this host must not answer.
    file.write_text(config or f"[agent]\nuser_socket = '{directory}/none'\n")
    return [(f.grade, f.seen) for f in doctor.examine(file, directory) if f.check == "pam"]


def worst(directory: Path, stack: str, config: str = "") -> Tuple[Grade, str]:
    return max(findings(directory, stack, config), key=lambda finding: finding[0].value)


@pytest.mark.parametrize("kind", ["auth", "password", "acount"])
def test_a_line_in_a_stack_the_module_is_not_for(tmp_path: Path, kind: str) -> None:
    """In auth it lets nobody in but root, so doctor must not call it right."""
    assert worst(tmp_path, SOUND + f"{kind} required pam_adopt.so\n") == (
        Grade.FAILURE,
        f"{tmp_path}/sshd:3: pam_adopt.so belongs in the account and session stacks, not in {kind}",
    )


@pytest.mark.parametrize("control", ["optional", "sufficient"])
def test_an_account_line_that_refuses_nobody(tmp_path: Path, control: str) -> None:
    """The module's refusal is not what libpam makes of the stack then."""
    grade, seen = worst(tmp_path, SOUND.replace("account required", f"account {control}"))
    assert grade is Grade.WARNING
    assert f"the control is {control}" in seen


def test_pam_systemd_behind_the_session_line(tmp_path: Path) -> None:
    """It moves the session's process into a scope of its own, out of the job."""
    grade, seen = worst(tmp_path, SOUND + "session optional pam_systemd.so\n")
    assert grade is Grade.WARNING
    assert f"pam_systemd.so comes after it ({tmp_path}/sshd:3)" in seen
    assert worst(tmp_path, "session optional pam_systemd.so\n" + SOUND)[0] is Grade.OK


def test_a_line_that_asks_another_socket(tmp_path: Path) -> None:
    """Every login would be a generic failure, with the agent up and well; the last socket= counts, as in the module."""
    grade, seen = worst(
        tmp_path, SOUND.replace("account required pam_adopt.so", "account required pam_adopt.so socket=/x")
    )
    assert (grade, seen) == (
        Grade.FAILURE,
        f"{tmp_path}/sshd:1: asks at /x, the agent answers at /run/adoptd/pam.sock",
    )
    assert worst(tmp_path, SOUND, "[agent]\npam_socket = '/y'\n")[0] is Grade.FAILURE
    moved = SOUND.replace("pam_adopt.so", "pam_adopt.so socket=/x socket=/y")
    assert worst(tmp_path, moved, "[agent]\npam_socket = '/y'\n")[0] is Grade.OK


def test_a_file_that_includes_itself(tmp_path: Path) -> None:
    """Each line is told once, and twice over would not be told 2^32 times."""
    stack = "@include sshd\n@include sshd\n" + SOUND
    assert [seen for _, seen in findings(tmp_path, stack)] == [
        f"{tmp_path}/sshd:3: account required",
        f"{tmp_path}/sshd:4: session required",
    ]


def test_who_is_not_root_is_told_so_about_the_seal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that the seal is broken: it was not tried."""
    file = tmp_path / "adoptd.toml"
    file.write_text(f"[agent]\nuser_socket = '{tmp_path}/none'\n")
    (tmp_path / "sshd").write_text(SOUND)
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    (found,) = [f for f in doctor.examine(file, tmp_path) if f.check == "seal"]
    assert (found.grade, found.seen) == (Grade.WARNING, "only root can try it")
