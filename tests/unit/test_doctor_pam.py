"""What doctor says of PAM files that are broken in the ways administrators break them, and of those that are not."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import List, Tuple

import pytest

from adoptd.config import Config
from adoptd.doctor.findings import Finding, Grade, Scene, worst
from adoptd.doctor.module import ModuleFile, judge_module
from adoptd.doctor.pam import judge_sockets, judge_stack, judge_time, look_at_stack
from adoptd.doctor.services import look_at_services
from adoptd.pam_lines import PamLine, lines_of

SOUND = "account required pam_adopt.so\nsession required pam_adopt.so\n"
RECOMMENDED = "[success=ok new_authtok_reqd=ok ignore=ignore module_unknown=ignore default=bad]"
# Debian 12's, without the comments.
COMMON_ACCOUNT = (
    "account [success=1 new_authtok_reqd=done default=ignore] pam_unix.so\n"
    "account requisite pam_deny.so\naccount required pam_permit.so\n"
)


def findings(directory: Path, stack: str, service: str = "sshd") -> List[Finding]:
    (directory / service).write_text(stack)
    return list(judge_stack(service, directory / service, lines_of(service, directory)))


def worst_of(found: List[Finding]) -> Tuple[Grade, str]:
    bad = max(found, key=lambda finding: finding.grade.value)
    return bad.grade, bad.seen


def said(directory: Path, stack: str) -> Tuple[Grade, str]:
    return worst_of(findings(directory, stack))


# ---- broken


@pytest.mark.parametrize("kind", ["auth", "password", "acount"])
def test_a_line_in_a_stack_the_module_is_not_for(tmp_path: Path, kind: str) -> None:
    """In auth it lets nobody in but root, so doctor must not call it right."""
    assert said(tmp_path, SOUND + f"{kind} required pam_adopt.so\n") == (
        Grade.FAILURE,
        f"{tmp_path}/sshd:3: pam_adopt.so belongs in the account and session stacks, not in {kind}",
    )


def test_an_option_that_is_none(tmp_path: Path) -> None:
    """It closes the line to all but root."""
    grade, seen = said(tmp_path, SOUND.replace("adopt.so\nsession", "adopt.so action_unknow=deny\nsession"))
    assert grade is Grade.FAILURE
    assert "'action_unknow=deny' is no option" in seen


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        (SOUND.replace("\n", "\r\n"), "line ends of DOS"),
        ("account required\n" + SOUND, "names no module"),
        ("account\n" + SOUND, "names no module"),
        ("\ufeffauth required pam_unix.so\n" + SOUND, "is no stack"),
        ("acount required pam_unix.so\n" + SOUND, "'acount' is no stack"),
    ],
)
def test_what_is_no_line_to_libpam(tmp_path: Path, stack: str, words: str) -> None:
    """One is enough to shut the service (pam_handlers.c adds a line that always fails in its place)."""
    (tmp_path / "sshd").write_bytes(stack.encode())
    found = list(judge_stack("sshd", tmp_path / "sshd", lines_of("sshd", tmp_path)))
    assert any(words in each.seen for each in found if each.grade is Grade.FAILURE), found


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        # What pam_adopt.so says of root, and of everybody in observe mode, is PAM_IGNORE.
        ("account [success=ok default=bad] pam_adopt.so\n", "add ignore=ignore to that control"),
        ("account [success=ok ignore=die] pam_adopt.so\n", "add ignore=ignore to that control"),
        ("account required pam_adopt.so\naccount [success=ok default=reset] pam_unix.so\n", "take the reset out of"),
    ],
)
def test_what_libpam_makes_of_a_control(tmp_path: Path, stack: str, words: str) -> None:
    """Root refused, or a refusal forgotten: tried with libpam 1.5."""
    (tmp_path / "sshd").write_text("account required pam_unix.so\n" + stack + "session required pam_adopt.so\n")
    found = list(judge_stack("sshd", tmp_path / "sshd", lines_of("sshd", tmp_path)))
    assert any(words in each.remedy for each in found if each.grade is Grade.FAILURE), found


def test_a_name_with_a_zero_in_it(tmp_path: Path) -> None:
    """As in a file that was saved as UTF-16: a finding, and no failed check."""
    (tmp_path / "sshd").write_bytes(b"@include a\0b\n")
    (found,) = look_at_stack(scene(tmp_path))
    assert (found.grade, "a byte of zero" in found.seen) == (Grade.FAILURE, True)


def test_who_can_write_a_stack(tmp_path: Path) -> None:
    """Root alone; an included file counts as well."""
    tmp_path.chmod(0o755)
    (tmp_path / "sshd").write_text("@include other\n" + SOUND)
    (tmp_path / "other").write_text("account required pam_unix.so\n")
    for path in tmp_path.iterdir():
        path.chmod(0o644)
    assert worst(list(look_at_stack(scene(tmp_path)))) is Grade.OK
    (tmp_path / "other").chmod(0o664)
    (bad,) = (each for each in look_at_stack(scene(tmp_path)) if each.grade is not Grade.OK)
    assert f"{tmp_path}/other has mode 0664" in bad.seen


@pytest.mark.parametrize(
    ("above", "grade"),
    [
        # Says yes to everybody it knows, so to all who log in.
        ("account sufficient pam_unix.so", Grade.FAILURE),
        ("account sufficient pam_permit.so", Grade.FAILURE),
        ("account SUFFICIENT pam_sss.so", Grade.FAILURE),
        ("account [default=bad success=done] pam_ldap.so", Grade.FAILURE),
        ("account [success=1 default=ignore] pam_unix.so", Grade.FAILURE),
        ("account [success=2 default=ignore] pam_unix.so\naccount requisite pam_deny.so", Grade.FAILURE),
        # Jumped over itself, so never asked.
        ("account [success=1 default=ignore] pam_unix.so\naccount sufficient pam_permit.so", Grade.OK),
        # Lets those past that it is there for, as sites want it.
        ("account sufficient pam_access.so", Grade.OK),
        ("account [success=1 default=ignore] pam_succeed_if.so user ingroup admins", Grade.OK),
        # Jumps no further than the line before us.
        ("account [success=1 default=ignore] pam_unix.so\naccount requisite pam_deny.so", Grade.OK),
        ("account required pam_unix.so", Grade.OK),
        ("account optional pam_unix.so", Grade.OK),
        # Of another stack.
        ("auth sufficient pam_unix.so\nsession optional pam_unix.so", Grade.OK),
    ],
)
def test_what_is_above_the_account_line(tmp_path: Path, above: str, grade: Grade) -> None:
    """A line that says yes and ends the stack, or jumps over ours, means that ours is never asked."""
    found = findings(tmp_path, f"{above}\n{SOUND}")
    assert worst(found) is grade, found
    if grade is Grade.FAILURE:
        assert "is never asked" in worst_of(found)[1]


def test_who_is_let_past_is_said(tmp_path: Path) -> None:
    """Right as it is, and good to know."""
    found = findings(tmp_path, f"account sufficient pam_access.so\n{SOUND}")
    assert f"not asked for whom pam_access.so ({tmp_path}/sshd:1) lets in" in found[0].seen


def test_debian_as_recommended(tmp_path: Path) -> None:
    """Our lines behind common-account, which jumps over its own pam_deny and no further."""
    (tmp_path / "common-account").write_text(COMMON_ACCOUNT)
    stack = (
        "account required pam_nologin.so\n@include common-account\n"
        f"account {RECOMMENDED} pam_adopt.so\nsession optional pam_systemd.so\nsession {RECOMMENDED} pam_adopt.so\n"
    )
    found = findings(tmp_path, stack)
    assert worst(found) is Grade.OK, found
    assert "a user whose password has expired is not asked about" in found[0].seen


@pytest.mark.parametrize("include", ["include", "substack"])
def test_a_substack_keeps_its_ends_and_jumps(tmp_path: Path, include: str) -> None:
    """What is sufficient in a substack ends that alone (pam.conf(5)); what is included ends all."""
    (tmp_path / "password-auth").write_text("account sufficient pam_unix.so\naccount required pam_permit.so\n")
    grade, seen = said(tmp_path, f"account {include} password-auth\n{SOUND}")
    assert (grade is Grade.FAILURE) == (include == "include"), seen


def test_a_jump_counts_a_substack_once(tmp_path: Path) -> None:
    """Two lines in it are one step."""
    (tmp_path / "sub").write_text("account required pam_unix.so\naccount required pam_permit.so\n")
    jump = "account [success={} default=bad] pam_unix.so\naccount substack sub\n" + SOUND
    assert said(tmp_path, jump.format(1))[0] is Grade.OK
    assert said(tmp_path, jump.format(2))[0] is Grade.FAILURE


@pytest.mark.parametrize("control", ["optional", "sufficient", "[success=ok default=ignore]"])
def test_an_account_line_that_refuses_nobody(tmp_path: Path, control: str) -> None:
    """The module's refusal is not what libpam makes of the stack then."""
    grade, seen = said(tmp_path, SOUND.replace("account required", f"account {control}"))
    assert grade is Grade.WARNING
    assert f"the control is {control.strip('[]')}" in seen


def test_an_account_line_with_a_judge_below(tmp_path: Path) -> None:
    """The arrangement with pam_access, as pam_slurm_adopt documents it."""
    stack = "account sufficient pam_adopt.so\naccount required pam_access.so\nsession required pam_adopt.so\n"
    found = findings(tmp_path, stack)
    assert worst(found) is Grade.OK, found
    assert "whom it refuses pam_access.so decides on" in found[0].seen
    assert said(tmp_path, stack.replace("required pam_access", "optional pam_access"))[0] is Grade.WARNING


@pytest.mark.parametrize("control", ["requird", "[success=okay default=bad]", "[nonsense]", "[success=0]"])
def test_a_control_that_libpam_does_not_know(tmp_path: Path, control: str) -> None:
    """Whatever line it is on: all of its answers count as failures."""
    grade, seen = said(tmp_path, f"account {control} pam_nologin.so\n{SOUND}")
    assert grade is Grade.FAILURE
    assert "is no control" in seen


def test_pam_systemd_behind_the_session_line(tmp_path: Path) -> None:
    """It moves the session's process into a scope of its own, out of the job."""
    grade, seen = said(tmp_path, SOUND + "session optional pam_systemd.so\n")
    assert grade is Grade.WARNING
    assert f"pam_systemd.so comes after it ({tmp_path}/sshd:3)" in seen
    assert said(tmp_path, "session optional pam_systemd.so\n" + SOUND)[0] is Grade.OK


def test_the_account_line_alone(tmp_path: Path) -> None:
    """As with pam_slurm_adopt; what it costs depends on pam_systemd."""
    grade, seen = said(tmp_path, "account required pam_adopt.so\n")
    assert (grade, "keyboard-interactive" in seen, "pam_systemd" in seen) == (Grade.WARNING, True, False)
    assert "pam_systemd" in said(tmp_path, "account required pam_adopt.so\nsession optional pam_systemd.so\n")[1]


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        (SOUND.replace("adopt.so\n", "adopt.so mode=observe\n"), "mode=observe"),
        (SOUND.replace("adopt.so\nsession", "adopt.so ACTION_UNKNOWN=deny\nsession"), "differ in action_unknown"),
        ("account required pam_adopt.so\n" + SOUND, "in the account stack 2 times"),
        ("account required pam_slurm_adopt.so\n" + SOUND, "pam_slurm_adopt.so is there too"),
        (SOUND.replace("account", "-account"), "the dash before account"),
    ],
)
def test_what_is_odd(tmp_path: Path, stack: str, words: str) -> None:
    """A warning each, of those words."""
    found = findings(tmp_path, stack)
    assert worst(found) is Grade.WARNING
    assert any(words in each.seen for each in found), found


def test_lines_that_may_differ(tmp_path: Path) -> None:
    """Each phase has its own patience and its own noise."""
    stack = "account required pam_adopt.so timeout_ms=900 log_level=debug\nsession required pam_adopt.so\n"
    assert said(tmp_path, stack)[0] is Grade.OK


def test_a_service_that_the_line_is_not_for(tmp_path: Path) -> None:
    """service= names sshd unless it says otherwise."""
    assert said(tmp_path, SOUND)[0] is Grade.OK
    for word in ("service=login", "service=ssh"):
        grade, seen = said(tmp_path, SOUND.replace("adopt.so", f"adopt.so {word}"))
        assert (grade, "does nothing for sshd" in seen) == (Grade.FAILURE, True)
    assert said(tmp_path, SOUND.replace("adopt.so", "adopt.so service=*"))[0] is Grade.OK
    assert worst(findings(tmp_path, SOUND, "cockpit")) is Grade.FAILURE


@pytest.mark.parametrize(
    ("options", "below", "open_while_down"),
    [
        ("", "", True),
        ("action_generic_failure=allow", "account required pam_access.so", True),
        ("action_generic_failure=deny", "", False),
        ("", "account required pam_access.so", False),
    ],
)
def test_what_is_open_while_the_agent_is_down(tmp_path: Path, options: str, below: str, open_while_down: bool) -> None:
    """Said on the line, as it is the default."""
    stack = f"account required pam_adopt.so {options}\n{below}\nsession required pam_adopt.so {options}\n"
    found = findings(tmp_path, stack)
    assert worst(found) is Grade.OK
    assert ("while the agent is down" in found[0].seen) == open_while_down


def test_a_line_that_asks_another_socket(tmp_path: Path) -> None:
    """Every login would be a generic failure, with the agent up and well; the last socket= counts, as in the module."""

    def asked(stack: str, answers_at: str = "/run/adoptd/pam.sock") -> List[Finding]:
        (tmp_path / "sshd").write_text(stack)
        return list(judge_sockets(lines_of("sshd", tmp_path), answers_at))

    (found,) = asked(SOUND.replace("pam_adopt.so\nsession", "pam_adopt.so socket=/x\nsession"))
    assert (found.grade, found.seen) == (
        Grade.FAILURE,
        f"{tmp_path}/sshd:1: asks at /x, the agent answers at /run/adoptd/pam.sock",
    )
    assert asked(SOUND) == []
    assert len(asked(SOUND, "/y")) == 2
    assert asked(SOUND.replace("pam_adopt.so", "pam_adopt.so socket=/x socket=/y"), "/y") == []


def test_a_file_that_includes_itself(tmp_path: Path) -> None:
    """libpam never comes back from it; and what includes twice over is not read 2^32 times."""
    (tmp_path / "sshd").write_text("@include sshd\n@include sshd\n" + SOUND)
    (found,) = look_at_stack(scene(tmp_path))
    assert (found.grade, "it includes itself" in found.seen) == (Grade.FAILURE, True)
    for number in range(32):
        (tmp_path / f"e{number}").write_text(f"@include e{number + 1}\n" * 2)
    (tmp_path / "e32").write_text(SOUND)
    (tmp_path / "sshd").write_text("@include e0\n")
    (found,) = look_at_stack(scene(tmp_path))
    assert (found.grade, "more than 256 files" in found.seen) == (Grade.FAILURE, True)


def test_what_no_stack_is_read_from(tmp_path: Path) -> None:
    """A pipe is not waited for, and a file that is no page of text is not read."""
    os.mkfifo(tmp_path / "sshd")
    (found,) = look_at_stack(scene(tmp_path))
    assert (found.grade, "no regular file" in found.seen) == (Grade.FAILURE, True)
    (tmp_path / "sshd").unlink()
    with (tmp_path / "sshd").open("wb") as large:
        large.truncate(1 << 30)
    (found,) = look_at_stack(scene(tmp_path))
    assert (found.grade, "larger than" in found.seen) == (Grade.FAILURE, True)


# ---- files


def scene(directory: Path) -> Scene:
    return Scene(directory / "adoptd.toml", Config(), directory, "sshd")


def test_a_stack_that_cannot_be_read(tmp_path: Path) -> None:
    """The file that is missing is named, be it an included one."""
    (found,) = look_at_stack(scene(tmp_path))
    assert (found.grade, found.seen) == (Grade.FAILURE, f"{tmp_path}/sshd is missing: libpam lets nobody in")
    (tmp_path / "sshd").write_text("@include gone\n")
    (found,) = look_at_stack(scene(tmp_path))
    assert f"{tmp_path}/gone cannot be read" in found.seen
    (tmp_path / "sshd").write_bytes(b"\xff\xfeauth required pam_unix.so\n" + SOUND.encode())
    assert "is no stack" in worst_of(list(look_at_stack(scene(tmp_path))))[1]


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
        ([ModuleFile("/m", (stat.S_IFDIR | 0o755, 0))], LINE, Grade.FAILURE, "not a regular file"),
    ],
)
def test_the_module(files: List[ModuleFile], line: PamLine, grade: Grade, words: str) -> None:
    """There, root's, and taken by the linker; what its absence does depends on the control."""
    (found,) = judge_module(files, line)
    assert found.grade is grade
    assert words in found.seen


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


def test_many_services_are_one_finding(tmp_path: Path) -> None:
    """One screen, whatever a script has done to a directory."""
    (tmp_path / "sshd").write_text("account required pam_unix.so\n")
    for number in range(40):
        (tmp_path / f"s{number:02}").write_text("account required pam_adopt.so\n")
    (found,) = look_at_services(scene(tmp_path))
    assert "s00, s01, s02, s03 and 36 more" in found.seen


@pytest.mark.parametrize(
    ("other", "grade", "words"),
    [
        ("account required pam_permit.so\n", Grade.FAILURE, "users come in, into no job"),
        ("account required pam_deny.so\n", Grade.FAILURE, "lets nobody in"),
        ("account required pam_adopt.so service=*\n", Grade.WARNING, "goes by"),
    ],
)
def test_without_a_file_of_its_own(tmp_path: Path, other: str, grade: Grade, words: str) -> None:
    """libpam takes the service "other" then, which may let everybody in."""
    (tmp_path / "other").write_text(other)
    (found,) = look_at_stack(scene(tmp_path))
    assert (found.grade, words in found.seen) == (grade, True), found


@pytest.mark.parametrize(
    ("stack", "grade", "words"),
    [
        (SOUND + "account required pam_deny.so\n", Grade.FAILURE, "sshd:3: pam_deny.so is asked for everybody"),
        (SOUND + "session requisite pam_deny.so\n", Grade.FAILURE, "no session gets past it"),
        (SOUND + "account optional pam_deny.so\n", Grade.OK, ""),
        (SOUND + "password required pam_deny.so\n", Grade.OK, ""),
        (COMMON_ACCOUNT + SOUND, Grade.OK, ""),
        (SOUND.replace("account required", "account sufficient") + "account required pam_deny.so\n", Grade.OK, ""),
        (SOUND.replace(".so", ".so action_no_jobs=ignore"), Grade.WARNING, "users without a job come in"),
        (SOUND.replace(".so", ".so action_no_jobs=ignore") + "account required pam_access.so\n", Grade.OK, ""),
        (SOUND.replace(".so", ".so mode=enforce mode=observe"), Grade.WARNING, "mode=observe counts"),
        (SOUND + "account required pam_permit.so a\0b\n", Grade.FAILURE, "a byte of zero"),
        (SOUND + f"account required pam_permit.so {'x' * 1100}\n", Grade.FAILURE, "longer than 1023"),
        (SOUND + f"account required pam_permit.so {'x' * 900}\n", Grade.OK, ""),
        ("session required pam_adopt.so\n", Grade.WARNING, "those of the service other"),
    ],
)
def test_what_a_stack_comes_to(tmp_path: Path, stack: str, grade: Grade, words: str) -> None:
    """Who is let in or kept out by all of it together."""
    found = findings(tmp_path, stack)
    assert worst(found) is grade, found
    assert any(words in each.seen for each in found if each.grade is grade)


def test_the_time_of_a_line(tmp_path: Path) -> None:
    """Where it says one: longer than a source may take."""
    for options, callerid_ms, grades in (
        ("", 2000, []),
        (" timeout_ms=1000", 300, []),
        (" timeout_ms=300", 300, [Grade.WARNING]),
    ):
        (tmp_path / "sshd").write_text(f"account required pam_adopt.so{options}\n")
        found = list(judge_time(lines_of("sshd", tmp_path), callerid_ms))
        assert [each.grade for each in found] == grades, options


def test_wrong_options_are_one_finding_of_a_line(tmp_path: Path) -> None:
    """What is expected is a long list, and said once."""
    wrong = [
        each for each in findings(tmp_path, SOUND.replace(".so", ".so mode = observe")) if each.grade is Grade.FAILURE
    ]
    assert [each.seen.count("expected one of") for each in wrong] == [1, 0]
    assert all("no blanks around" in each.remedy for each in wrong)
