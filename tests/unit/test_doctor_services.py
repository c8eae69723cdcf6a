"""What doctor says of the other PAM services: those that ask us, those in vain, and those that libpam refuses."""

from __future__ import annotations

from pathlib import Path

from adoptd.config import Config
from adoptd.doctor.findings import Grade, Scene
from adoptd.doctor.services import look_at_services

SOUND = "account required pam_adopt.so\nsession required pam_adopt.so\n"


def scene(directory: Path) -> Scene:
    return Scene(directory / "adoptd.toml", Config(), directory, "sshd")


def test_other_services(tmp_path: Path) -> None:
    """Those that ask us, those in vain, those that libpam refuses; files that packages left are none."""
    (tmp_path / "sshd").write_text(SOUND)
    assert list(look_at_services(scene(tmp_path))) == []
    (tmp_path / "login").write_text("account required pam_adopt.so service=login\n")
    (tmp_path / "sshd.dpkg-old").write_text("account required pam_adopt.so wrong\n")
    (found,) = look_at_services(scene(tmp_path))
    assert (found.grade, "also asked by login" in found.seen) == (Grade.OK, True)
    (tmp_path / "cockpit").write_text(SOUND)
    (tmp_path / "cron").write_text("account required pam_adopt.so wrong\n")
    (tmp_path / "su").write_text("@include gone\n")
    words = " ".join(each.seen for each in look_at_services(scene(tmp_path)) if each.grade is not Grade.OK)
    assert "in the stack of cockpit it does nothing" in words
    assert "in the stack of cron" not in words, "what is wrong with it is said"
    assert "(service cron): 'wrong' is no option" in words
    assert "libpam refuses: su" in words


def test_a_part_of_other_stacks_is_no_service(tmp_path: Path) -> None:
    """What others include; and a service that has the lines of ours from there is not told of again and again."""
    (tmp_path / "shared").write_text(SOUND)
    for name in ("sshd", "login", "su", "cron"):
        (tmp_path / name).write_text("@include shared\n")
    (found,) = look_at_services(scene(tmp_path))
    assert (found.grade, found.seen) == (
        Grade.OK,
        "does nothing for cron, login, su, which include the same lines",
    )


def test_more_services_than_are_looked_at(tmp_path: Path) -> None:
    """Those that are left out are named; copies that somebody keeps are no services."""
    for number in range(256):
        (tmp_path / f"s{number:03}").write_text("account required pam_unix.so\n")
    for name in ("sshd", "s000.before", "s001.2026.save"):
        (tmp_path / name).write_text(SOUND)
    assert list(look_at_services(scene(tmp_path))) == []
    (tmp_path / "su").write_text(SOUND)
    (found,) = look_at_services(scene(tmp_path))
    assert (found.grade, "has 257 services: su were not looked at" in found.seen) == (Grade.WARNING, True)


def test_many_services_are_one_finding(tmp_path: Path) -> None:
    """One screen, whatever a script has done to a directory."""
    (tmp_path / "sshd").write_text("account required pam_unix.so\n")
    for number in range(40):
        (tmp_path / f"s{number:02}").write_text("account required pam_adopt.so\n")
    (found,) = look_at_services(scene(tmp_path))
    assert "s00, s01, s02, s03 and 36 more" in found.seen
