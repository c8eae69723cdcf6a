"""The doctor's reading of stacks beside libpam's own: the same lines are asked, and the same lines shut the service.

Real libpam runs each stack out of a directory of the test's; what was asked is what was run by pam_exec.so.
"""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from typing import List

import pytest

from adoptd.config import Config
from adoptd.doctor.findings import Grade, Scene
from adoptd.doctor.module import look_at_module
from adoptd.doctor.pam import judge_stack
from adoptd.doctor.stack import Reach, is_silent, overshoots, reached
from adoptd.pam_lines import lines_of

_CONVERSATION = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)
# PAM_CONV_ERR: nobody is there to be told.
_NOBODY = _CONVERSATION(lambda *_: 19)


class _Conversation(ctypes.Structure):
    _fields_ = (("conv", _CONVERSATION), ("data", ctypes.c_void_p))


def account(directory: Path, function: str = "pam_acct_mgmt") -> int:
    """What libpam says to a phase of root's by the service sshd of ``directory``; 0 is success."""
    pam = ctypes.CDLL("libpam.so.0")
    handle = ctypes.c_void_p()
    conversation = _Conversation(_NOBODY, None)
    started = pam.pam_start_confdir(
        b"sshd", b"root", ctypes.byref(conversation), bytes(directory), ctypes.byref(handle)
    )
    assert started == 0, started
    try:
        return int(getattr(pam, function)(handle, 0))
    finally:
        pam.pam_end(handle, 0)


def asked(directory: Path) -> bool:
    """Whether the line of pam_exec.so was asked."""
    mark = directory / "mark"
    mark.unlink(missing_ok=True)
    account(directory)
    return mark.exists()


def target(directory: Path) -> str:
    return f"account required pam_exec.so quiet /usr/bin/touch {directory}/mark\n"


CONTROLS = (
    "required",
    "requisite",
    "sufficient",
    "optional",
    "[success=done default=bad]",
    "[default=ok]",
    "[success=1 default=bad]",
    "[success=2 default=bad]",
    "[success=3 default=ignore]",
    "[success=ignore default=bad]",
    "[perm_denied=done default=ok]",
)


@pytest.mark.parametrize("seed", range(12))
def test_the_same_lines_are_asked(tmp_path: Path, seed: int) -> None:
    """Of stacks made up from permits of every control, in includes and substacks; our line is somewhere among them."""
    choose = random.Random(seed)

    def permits(count: int) -> List[str]:
        return [f"account {choose.choice(CONTROLS)} pam_permit.so\n" for _ in range(count)]

    compared = 0
    while compared < 20:
        for name in ("inner", "outer"):
            (tmp_path / name).write_text("".join(permits(choose.randint(1, 3))))
        if choose.random() < 0.5:
            (tmp_path / "outer").write_text(
                "".join(permits(1)) + f"account {choose.choice(['include', 'substack'])} {tmp_path}/inner\n"
            )
        lines = permits(choose.randint(0, 3))
        lines.insert(
            choose.randint(0, len(lines)), f"account {choose.choice(['include', 'substack'])} {tmp_path}/outer\n"
        )
        own = target(tmp_path)
        if choose.random() < 0.3:
            lines = [*lines, f"account substack {tmp_path}/last\n"]
            (tmp_path / "last").write_text("".join(permits(1)) + own)
        else:
            lines.append(own)
        text = "".join(lines)
        (tmp_path / "sshd").write_text(text)
        stack = lines_of("sshd", tmp_path)
        line = next(each for each in stack if each.loads("pam_exec.so"))
        if any(overshoots(each, stack) for each in stack):
            # Then libpam has refused, and goes on in other ways.
            continue
        compared += 1
        shown = [text, *((tmp_path / name).read_text() for name in ("outer", "inner"))]
        assert asked(tmp_path) == (reached(line, stack).reach is not Reach.NONE), shown


@pytest.mark.parametrize(
    ("line", "shut"),
    [
        ("account required pam_permit.so", False),
        ("-account optional pam_permit.so", False),
        ("account REQUIRED pam_permit.so", False),
        ("account requird pam_permit.so", True),
        ("account [success=okay default=ignore] pam_permit.so", True),
        ("account required", True),
        ("account required pam_permit.so\r", True),
        ("account include nowhere", True),
        ("account [success=1 default=ignore] pam_permit.so\naccount required pam_deny.so", False),
        ("account [success=3 default=ignore] pam_permit.so\naccount required pam_permit.so", True),
        ("account required pam_deny.so", True),
        ("account requisite pam_deny.so", True),
        ("account optional pam_deny.so", False),
        ("account sufficient pam_deny.so", False),
        ("account [default=ignore] pam_deny.so", False),
        ("account [auth_err=ignore default=bad] pam_deny.so", False),
        ("account sufficient pam_permit.so\naccount required pam_deny.so", False),
        ("account required\0 pam_permit.so", True),
    ],
)
def test_the_same_lines_shut_the_service(tmp_path: Path, line: str, shut: bool) -> None:
    """What the doctor calls a failure is one to libpam, and the other way round."""
    (tmp_path / "sshd").write_text(f"{line}\n" + "account required pam_permit.so\n", newline="")
    try:
        refused = account(tmp_path) != 0
    except AssertionError:
        refused = True
    try:
        found = list(judge_stack("sshd", tmp_path / "sshd", lines_of("sshd", tmp_path)))
        said = any(each.grade is Grade.FAILURE for each in found)
    except OSError:
        said = True
    assert (refused, said) == (shut, shut)


def test_a_stack_that_there_is_not(tmp_path: Path) -> None:
    """What is misspelt counts as a line of auth that always fails, and the account phase goes on without it."""
    (tmp_path / "sshd").write_text("acount required pam_permit.so\naccount required pam_permit.so\n")
    assert account(tmp_path) == 0
    found = list(judge_stack("sshd", tmp_path / "sshd", lines_of("sshd", tmp_path)))
    assert any("a line of auth that always fails" in each.seen for each in found)


@pytest.mark.parametrize(
    ("line", "passes"),
    [
        ("account required pam_lost.so", False),
        ("-account required pam_lost.so", False),
        ("-account optional pam_lost.so", True),
        ("account [success=ok module_unknown=ignore default=bad] pam_lost.so", True),
    ],
)
def test_a_module_that_is_missing(tmp_path: Path, line: str, passes: bool) -> None:
    """The dash only keeps it out of the log; what lets logins in is the control."""
    (tmp_path / "sshd").write_text(f"{line}\naccount required pam_permit.so\n")
    assert (account(tmp_path) == 0) == passes


@pytest.mark.parametrize(
    "text",
    [
        "# was \\\n{own}",
        "account required \\\n pam_permit.so\n{own}",
        "account required \\ \n pam_deny.so\n{own}",
        "account required pam_permit.so \\\t\n # so\n{own}",
        "account required pam_permit.so # so \\\n{own}",
        "account required \\\n# so\n pam_permit.so\n{own}",
        "account required pam_permit.so \\\n\n{own}",
        "account required pam_permit.so \\\r\n{own}",
    ],
)
def test_the_same_lines_go_on(tmp_path: Path, text: str) -> None:
    """A backslash at the end, with blanks, comments and empty lines about it."""
    (tmp_path / "sshd").write_text(text.format(own=target(tmp_path)) + "account required pam_permit.so\n", newline="")
    ours = [line for line in lines_of("sshd", tmp_path) if line.loads("pam_exec.so")]
    assert asked(tmp_path) == bool(ours)


def test_a_line_that_has_no_end(tmp_path: Path) -> None:
    """It is the last of the file, and shuts the service."""
    (tmp_path / "sshd").write_text("account required pam_permit.so\naccount required pam_permit.so \\")
    with pytest.raises(AssertionError, match="26"):
        account(tmp_path)  # PAM_ABORT, from the start
    with pytest.raises(OSError, match="in the middle of a line"):
        lines_of("sshd", tmp_path)


# Each says PAM_IGNORE of root, as ours does, which is not needed for what libpam makes of that.
SILENT = ("pam_nologin.so", "pam_warn.so", "pam_wheel.so")


@pytest.mark.parametrize("silent", SILENT)
@pytest.mark.parametrize(
    ("more", "passes"),
    [
        ("", False),
        ("account required pam_nologin.so", False),
        ("account [success=1 default=ignore] pam_permit.so\naccount requisite pam_deny.so", False),
        ("account [success=ignore] pam_permit.so", False),
        ("account sufficient pam_permit.so", True),
        ("account optional pam_permit.so", True),
        ("account [success=ok default=ignore] pam_permit.so", True),
        ("account requisite pam_permit.so", True),
        ("account substack {directory}/inner", True),
    ],
)
def test_a_stack_in_which_nobody_says_yes(tmp_path: Path, silent: str, more: str, passes: bool) -> None:
    """To libpam that is a no: so root is refused where ours is the only line that could have said yes."""
    (tmp_path / "inner").write_text("account required pam_permit.so\n")
    (tmp_path / "sshd").write_text(f"account required {silent}\n{more.format(directory=tmp_path)}\n")
    assert (account(tmp_path) == 0) == passes
    (tmp_path / "sshd").write_text(f"account required pam_adopt.so\n{more.format(directory=tmp_path)}\n")
    assert is_silent("account", lines_of("sshd", tmp_path)) == (not passes)


@pytest.mark.parametrize(
    ("line", "function", "passes"),
    [
        ("account required pam_limits.so", "pam_acct_mgmt", False),
        ("account optional pam_limits.so", "pam_acct_mgmt", True),
        ("account required pam_localuser.so", "pam_acct_mgmt", True),
        ("session required pam_faillock.so", "pam_open_session", False),
        ("session required pam_lost.so", "pam_open_session", False),
        ("session optional pam_lost.so", "pam_open_session", True),
        ("session required pam_env.so", "pam_open_session", True),
    ],
)
def test_a_module_that_libpam_cannot_call(tmp_path: Path, line: str, function: str, passes: bool) -> None:
    """For want of what lines of that kind need: as one that is missing."""
    kind = line.split()[0]
    (tmp_path / "sshd").write_text(f"{line}\n{kind} required pam_permit.so\n")
    assert (account(tmp_path, function) == 0) == passes
    found = list(look_at_module(Scene(tmp_path / "adoptd.toml", Config(), tmp_path, "sshd")))
    assert bool(found) != passes, found
