"""What doctor says of PAM files that are broken in the ways administrators break them, and of those that are not."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List, Tuple

import pytest

from adoptd.config import Config
from adoptd.doctor.findings import Finding, Grade, Scene, worst
from adoptd.doctor.lines import judge_sockets, judge_time
from adoptd.doctor.pam import judge_others, judge_stack, look_at_stack
from adoptd.doctor.services import look_at_services
from adoptd.pam_lines import lines_of

SOUND = "account required pam_adopt.so\nsession required pam_adopt.so\n"
# What says yes of root: our module leaves root to others, and libpam takes that alone for a no.
YES = "account required pam_permit.so\nsession required pam_permit.so\n"
RECOMMENDED = "[success=ok new_authtok_reqd=ok ignore=ignore module_unknown=ignore default=bad]"
# Debian 12's, without the comments.
COMMON_ACCOUNT = (
    "account [success=1 new_authtok_reqd=done default=ignore] pam_unix.so\n"
    "account requisite pam_deny.so\naccount required pam_permit.so\n"
)
# RHEL 8's and 9's, as authselect writes it.
RHEL_ACCOUNT = (
    "account required pam_unix.so\naccount sufficient pam_localuser.so\n"
    "account sufficient pam_usertype.so issystem\n"
    "account [default=bad success=ok user_unknown=ignore] pam_sss.so\naccount required pam_permit.so"
)


def findings(directory: Path, stack: str, service: str = "sshd") -> List[Finding]:
    (directory / service).write_text(stack + YES)
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
    (tmp_path / "sshd").write_text("@include other\n" + SOUND + YES)
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
        (RHEL_ACCOUNT, Grade.OK),
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
    for word in ("service=*", "service=SSHD", "SERVICE=sshd"):
        assert said(tmp_path, SOUND.replace("adopt.so", f"adopt.so {word}"))[0] is Grade.OK
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
        f"{tmp_path}/sshd:1: asks at /x, the agent's [agent] pam_socket is /run/adoptd/pam.sock",
    )
    assert asked(SOUND) == []
    assert len(asked(SOUND, "/y")) == 2
    assert asked(SOUND.replace("pam_adopt.so", "pam_adopt.so socket=/x socket=/y"), "/y") == []
    (tmp_path / "link").symlink_to(tmp_path)
    assert asked(SOUND.replace(".so", f".so socket={tmp_path}/link/s"), f"{tmp_path}/s") == []
    assert asked(SOUND.replace(".so", f".so socket={tmp_path}//s"), f"{tmp_path}/s") == []


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
    ],
)
def test_what_a_stack_comes_to(tmp_path: Path, stack: str, grade: Grade, words: str) -> None:
    """Who is let in or kept out by all of it together."""
    found = findings(tmp_path, stack)
    assert worst(found) is grade, found
    assert any(words in each.seen for each in found if each.grade is grade)


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        (SOUND + "session required pam_permit.so\n", "no account line but ours says yes"),
        (SOUND + "account required pam_permit.so\n", "no session line but ours says yes"),
        (SOUND + "account required pam_nologin.so\nsession required pam_permit.so\n", "no account line"),
        (SOUND + "account sufficient pam_slurm_adopt.so\nsession required pam_permit.so\n", "no account line"),
        ("account [success=1 default=ignore] pam_unix.so\naccount requisite pam_deny.so\n" + SOUND, "no account line"),
        (SOUND + "account [success=ignore] pam_unix.so\nsession required pam_permit.so\n", "no account line"),
        (SOUND + YES, ""),
        (YES + SOUND, ""),
        (COMMON_ACCOUNT + SOUND + "session optional pam_unix.so\n", ""),
        (SOUND + "account sufficient pam_localuser.so\nsession required pam_unix.so\n", ""),
    ],
)
def test_where_no_other_line_says_yes(tmp_path: Path, stack: str, words: str) -> None:
    """libpam takes "ignore" alone for a no, which is what the module says of root: tried with libpam beside this."""
    (tmp_path / "sshd").write_text(stack)
    found = list(judge_stack("sshd", tmp_path / "sshd", lines_of("sshd", tmp_path)))
    said = [each.seen for each in found if each.grade is Grade.FAILURE and "refuses root" in each.seen]
    assert bool(said) == bool(words), found
    assert not words or words in said[0]


@pytest.mark.parametrize(
    ("stack", "other", "words"),
    [
        ("session required pam_permit.so\n", "account required pam_deny.so\n", "pam_deny.so refuses everybody"),
        ("session required pam_permit.so\n", "", "there is none either"),
        ("session required pam_permit.so\n", "account required pam_permit.so\n", ""),
        ("account required pam_permit.so\n", "session required pam_deny.so\n", "no session line"),
        (YES, "account required pam_deny.so\n", ""),
    ],
)
def test_where_libpam_takes_the_lines_of_other(tmp_path: Path, stack: str, other: str, words: str) -> None:
    """For want of lines of a kind: those may refuse everybody."""
    (tmp_path / "sshd").write_text(stack)
    (tmp_path / "other").write_text(other)
    found = list(judge_others(tmp_path / "sshd", lines_of("sshd", tmp_path), lines_of("other", tmp_path)))
    assert [(each.grade, words in each.seen) for each in found] == ([(Grade.FAILURE, True)] if words else [])


def test_lines_for_another_service(tmp_path: Path) -> None:
    """In a file that both include: each goes by its own, and no other is told that it has too many."""
    mine = "account required pam_adopt.so service=su\n"
    (tmp_path / "shared").write_text(mine)
    found = findings(tmp_path, "@include shared\n" + SOUND)
    assert worst(found) is Grade.OK, found
    (bad,) = (each for each in findings(tmp_path, "@include shared\n") if each.grade is Grade.FAILURE)
    assert f"add lines with service=sshd to {tmp_path}/sshd" in bad.remedy
    (bad,) = (each for each in findings(tmp_path, mine) if each.grade is Grade.FAILURE)
    assert "add to that line" in bad.remedy
    for name in ("su", "cron"):
        (tmp_path / name).write_text("@include shared\n")
    (tmp_path / "sshd").write_text(SOUND)
    found = list(look_at_services(scene(tmp_path)))
    assert worst(found) is Grade.OK, found
    assert f"also asked by su ({tmp_path}/shared:1)" in found[0].seen


@pytest.mark.parametrize(
    ("stack", "effect"),
    [("session required pam_adopt.so\n", "want of a job"), ("", "want of a job, or adopted")],
)
def test_without_an_account_line(tmp_path: Path, stack: str, effect: str) -> None:
    """A session line adopts all the same: tried in the lab."""
    (bad,) = (each for each in findings(tmp_path, stack) if each.grade is Grade.WARNING)
    assert bad.seen.endswith(f"loads pam_adopt.so: nobody is refused for {effect}")


@pytest.mark.parametrize("service", ["", "../passwd", "a/b", "."])
def test_what_is_no_service(tmp_path: Path, service: str) -> None:
    """Nothing is read by such a name."""
    (found,) = look_at_stack(dataclasses.replace(scene(tmp_path), service=service))
    assert (found.grade, "is no service's name" in found.seen) == (Grade.FAILURE, True)


def test_what_is_no_pam_file_at_all(tmp_path: Path) -> None:
    """As what a web server said in place of one: a few of its lines are told."""
    found = findings(tmp_path, "<p>404</p>\n" * 60)
    assert sum("is no stack" in each.seen for each in found) == 8
    (bad,) = (each for each in found if "more lines" in each.seen)
    assert (bad.grade, "52 more lines are wrong" in bad.seen) == (Grade.FAILURE, True)


def test_a_stack_that_only_root_can_read(tmp_path: Path) -> None:
    """To anybody else it is not known what is in it; to root it is wrong that it cannot be read."""
    program = (
        # The clone may be where only root can read.
        "from pathlib import Path; from adoptd.config import Config; from adoptd.doctor.findings import Scene\n"
        "from adoptd.doctor.pam import look_at_stack; from adoptd.doctor.services import look_at_services\n"
        "import os, sys; os.setgroups([]); os.setgid(60001); os.setuid(60001)\n"
        "d = Path(sys.argv[1]); scene = Scene(d / 'a', Config(), d, 'sshd', root=False)\n"
        "print([(each.grade.name, each.seen) for each in (*look_at_stack(scene), *look_at_services(scene))])\n"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        (Path(name) / "sshd").write_text(SOUND + YES)
        (Path(name) / "sshd").chmod(0o600)
        command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{program}", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout == f"[('WARNING', '{name}/sshd: only root can read it')]\n"


def test_no_directory_of_services(tmp_path: Path) -> None:
    """Then libpam goes by the one file for all; beside a directory that file counts for nothing."""
    (tmp_path / "pam.conf").write_text("# pam_adopt.so\nsshd account required pam_adopt.so\n")
    there = scene(tmp_path / "pam.d")
    (found,) = look_at_stack(there)
    assert (found.grade, f"goes by {tmp_path}/pam.conf alone" in found.seen) == (Grade.FAILURE, True)
    assert list(look_at_services(there)) == []
    there.pam_directory.mkdir()
    (there.pam_directory / "sshd").write_text(SOUND + YES)
    for path in (there.pam_directory, there.pam_directory / "sshd"):
        path.chmod(0o755)
    (bad,) = (each for each in look_at_stack(there) if each.grade is not Grade.OK)
    assert (bad.grade, "libpam does not read it" in bad.seen) == (Grade.WARNING, True)
    (tmp_path / "pam.conf").write_text("# sshd account required pam_adopt.so\n")
    assert worst(list(look_at_stack(there))) is Grade.OK


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
