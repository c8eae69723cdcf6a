"""Which PAM lines refuse everybody when the module is not there: what the package says, and what libpam does."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from random import Random
from typing import Tuple

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
    return _judged(directory, "without")


def _judged(directory: Path, service: str) -> bool:
    """What libpam says to root of both stacks of this service."""
    pam = ctypes.CDLL("libpam.so.0")
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    function = kind(lambda *_: PAM_CONV_ERR)
    conversation = _Conversation(ctypes.cast(function, ctypes.c_void_p), None)
    handle = ctypes.c_void_p()
    started = pam.pam_start_confdir(
        service.encode(), b"root", ctypes.byref(conversation), str(directory).encode(), ctypes.byref(handle)
    )
    assert started == PAM_SUCCESS
    try:
        return bool(pam.pam_acct_mgmt(handle, 0) == PAM_SUCCESS and pam.pam_open_session(handle, 0) == PAM_SUCCESS)
    finally:
        pam.pam_end(handle, 0)


def _says(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, str(root)], capture_output=True, text=True, check=False, timeout=60)


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


PERMIT = "account required pam_permit.so"
# Before the line and behind it; {} is the line.
STACKS = (
    "{}\naccount required pam_deny.so",
    f"{PERMIT}\n{{}}\naccount required pam_deny.so\n{PERMIT}",
    f"{PERMIT}\n{{}}\naccount requisite pam_deny.so\n{PERMIT}",
    f"{PERMIT}\n{{}}\naccount [success=1 default=ignore] pam_permit.so\naccount requisite pam_deny.so",
    f"{PERMIT}\n{{}}\naccount sufficient pam_permit.so\naccount required pam_deny.so",
    f"{PERMIT}\n{{}}\naccount optional pam_deny.so\n{PERMIT}",
    f"{{}}\n{PERMIT}",
    f"{PERMIT}\n{{}}",
    "{}",
    "account substack DIR/inner\naccount required pam_deny.so\n#{}",
    f"{PERMIT}\naccount include DIR/inner\naccount required pam_deny.so\n{PERMIT}\n#{{}}",
    f"{PERMIT}\n@include DIR/inner\n{PERMIT}\n#{{}}",
    f"{PERMIT}\naccount SUBSTACK \\\n DIR/inner\n{PERMIT}\n#{{}}",
)
ACTIONS = ("ok", "done", "bad", "die", "ignore", "reset", "1", "2")
ANSWERING = (
    *CONTROLS,
    "[success=done ignore=ignore module_unknown=ignore default=bad]",
    "[success=1 ignore=1 default=ignore]",
    "[success=2 default=ignore]",
    "[success=ok ignore=reset module_unknown=ignore default=bad]",
    "[success = done  default = ignore]",
    "Sufficient",
)


def _both(root: Path, stack: str, inner: str) -> Tuple[bool, bool]:
    """Whether libpam lets in root, or whom the module lets in, with the module and not without; whether it is named.

    In both DIR is the directory, with ``inner`` in it. pam_debug.so stands for the module, and answers as it is told.
    """
    directory = root / "etc/pam.d"
    directory.mkdir(parents=True)
    tail = "\nsession required pam_permit.so\n"
    let_in = {}
    for name, module in (
        ("without", "pam_nowhere.so"),
        ("success", "pam_debug.so acct=success"),
        ("ignore", "pam_debug.so acct=ignore"),
    ):
        (directory / name).mkdir()
        (directory / name / "inner").write_text(inner.replace("pam_adopt.so", module) + "\n", encoding="ascii")
        text = stack.replace("DIR", str(directory / name)).replace("pam_adopt.so", module)
        (directory / f"{name}-stack").write_text(text + tail, encoding="ascii")
        let_in[name] = _judged(directory, f"{name}-stack")
        (directory / f"{name}-stack").unlink()
    (directory / "inner").write_text(inner + "\n", encoding="ascii")
    (directory / "sshd").write_text(stack.replace("DIR", "/etc/pam.d") + tail, encoding="ascii")
    said = _says(root)
    assert said.stderr == ""
    return (let_in["success"] or let_in["ignore"]) and not let_in["without"], said.returncode == 1


@pytest.mark.parametrize("stack", STACKS)
def test_who_gets_in_by_the_module_keeps_it(tmp_path: Path, stack: str) -> None:
    """Where libpam lets in whom the module lets in, or root, and nobody without it, the line is named."""
    found = {}
    for number, control in enumerate(ANSWERING):
        line = f"account {control} pam_adopt.so"
        found[control] = _both(tmp_path / str(number), stack.format(line), line)
    assert [control for control, (changes, named) in found.items() if changes and not named] == []
    # Of most of these stacks it is so: "required" lets in, and without the module does not.
    assert any(changes for changes, _ in found.values()) or "pam_deny.so" in stack


def _random_stack(random: Random, *, inner: bool) -> str:
    lines = []
    for _ in range(random.randint(1, 3 if inner else 6)):
        values = random.sample(["success", "ignore", "module_unknown", "auth_err"], random.randint(0, 3))
        parts = [f"{value}={random.choice(ACTIONS)}" for value in [*values, "default"]]
        control = random.choice([*CONTROLS[:4], f"[{' '.join(random.sample(parts, len(parts)))}]"])
        module = random.choice(["pam_adopt.so", "pam_adopt.so", "pam_permit.so", "pam_deny.so"])
        lines.append(f"account {control} {module}")
    if not inner:
        lines[random.randrange(len(lines))] = f"account {random.choice(['include', 'substack'])} DIR/inner"
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(6))
def test_no_stack_by_chance_is_missed(tmp_path: Path, seed: int) -> None:
    """Stacks of lines at random: no other module is asked here, so what libpam does is all that there is."""
    random = Random(seed)
    changed = 0
    for number in range(40):
        stack, inner = _random_stack(random, inner=False), _random_stack(random, inner=True)
        changes, named = _both(tmp_path / str(number), stack, inner)
        assert named or not changes, f"{stack}\n-- inner:\n{inner}"
        changed += changes
    assert changed


# As on the page for administrators, and Debian's common-account.
ADMINS = "account [success=1 default=ignore] pam_succeed_if.so user ingroup admins"
COMMON = f"account [success=1 default=ignore] pam_unix.so\naccount requisite pam_deny.so\n{PERMIT}"


@pytest.mark.parametrize(
    "stack",
    [
        "account required pam_unix.so\naccount sufficient pam_adopt.so\naccount required pam_access.so",
        "account sufficient pam_adopt.so\naccount sufficient pam_access.so\naccount required pam_deny.so",
        "account required pam_unix.so\naccount [success=1 default=ignore] pam_adopt.so\naccount required pam_access.so",
        f"{ADMINS}\naccount {RECOMMENDED} pam_adopt.so\naccount required pam_unix.so",
        f"account {RECOMMENDED} pam_adopt.so\n{COMMON}",
        "@include common-account\naccount sufficient pam_adopt.so",
        "account include password-auth\nAccount Optional /lib/x86_64-linux-gnu/security/pam_adopt.so",
        "auth required pam_exec.so quiet /usr/local/sbin/look-at pam_adopt.so",
    ],
)
def test_what_others_can_decide_is_let_go(tmp_path: Path, stack: str) -> None:
    """Another line can say yes to root, and to whom the site lets in: no removal is held up for it."""
    (tmp_path / "etc/pam.d").mkdir(parents=True)
    (tmp_path / "etc/pam.d/common-account").write_text("account required pam_unix.so\n", encoding="ascii")
    (tmp_path / "etc/pam.d/password-auth").write_text("account required pam_unix.so\n", encoding="ascii")
    (tmp_path / "etc/pam.d/sshd").write_text(stack + "\n", encoding="ascii")
    said = _says(tmp_path)
    assert (said.returncode, said.stdout) == (0, "")


def test_a_line_by_another_way_of_writing_is_found(tmp_path: Path) -> None:
    """Through two files, in a vendor's directory, over several lines, in capitals, with brackets that escape."""
    for place, text in (
        ("etc/pam.conf", "sshd \\\n account INCLUDE /etc/outer\n"),
        ("etc/outer", "account \\\n Include /etc/inner\n"),
        ("etc/inner", "account required pam_adopt.so\n"),
        ("etc/pam.d/sshd", "account include vendor\n"),
        ("usr/lib/pam.d/vendor", "session [default=ignore \\] module_unknown=bad] pam_adopt.so\n"),
        ("etc/pam.d/other", "ACCOUNT [ REQUISITE ] pam_adopt.so\nacount optional pam_adopt.so\n"),
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text, encoding="ascii")
    said = _says(tmp_path)
    assert said.returncode == 1
    assert sorted(line.partition(": ")[0] for line in said.stdout.splitlines()) == [
        "/etc/inner:1",
        "/etc/pam.d/other:1",
        "/etc/pam.d/other:2",
        "/usr/lib/pam.d/vendor:1",
    ]


def test_what_is_included_is_a_service_too(tmp_path: Path) -> None:
    """sshd's stack counts by itself, whatever another service makes of it; a part of a stack need not stand alone."""
    (tmp_path / "etc/pam.d").mkdir(parents=True)
    line = "account sufficient pam_adopt.so"
    for name, text in (
        ("sshd", f"@include common-account\n{line}\naccount required pam_deny.so\n"),
        ("sshd-of-ours", "account sufficient pam_permit.so\n@include sshd\n"),
        ("part", f"{line}\n"),
        ("login", "account required pam_unix.so\naccount include part\n"),
    ):
        (tmp_path / "etc/pam.d" / name).write_text(text, encoding="ascii")
    assert _says(tmp_path).stdout == f"/etc/pam.d/sshd:2: {line}\n"


def test_files_that_include_each_other_end(tmp_path: Path) -> None:
    """libpam gives up on them; the script says what it has found."""
    (tmp_path / "etc/pam.d").mkdir(parents=True)
    (tmp_path / "etc/pam.d/a").write_text("account include b\naccount required pam_adopt.so\n", encoding="ascii")
    (tmp_path / "etc/pam.d/b").write_text("account include a\n", encoding="ascii")
    assert _says(tmp_path).stdout == "/etc/pam.d/a:2: account required pam_adopt.so\n"


@pytest.mark.parametrize(
    "broken", ["auth include", "account include /", "account include it's", "account include pipe"]
)
def test_an_include_that_leads_to_no_file(tmp_path: Path, broken: str) -> None:
    """A directory, a pipe that nobody writes to, nothing: the other lines are found all the same, and it ends."""
    (tmp_path / "etc/pam.d").mkdir(parents=True)
    (tmp_path / "etc/pam.d/sshd").write_text(f"{broken}\naccount required pam_adopt.so\n", encoding="ascii")
    os.mkfifo(tmp_path / "etc/pam.d/pipe")
    said = _says(tmp_path)
    assert (said.returncode, said.stdout, said.stderr) == (1, "/etc/pam.d/sshd:2: account required pam_adopt.so\n", "")


def test_a_file_that_includes_itself_twice_ends(tmp_path: Path) -> None:
    """Each time, 32 deep, would be 2 to the 32nd times."""
    (tmp_path / "etc/pam.d").mkdir(parents=True)
    (tmp_path / "etc/pam.d/a").write_text(
        2 * "account include a\n" + "account required pam_adopt.so\n", encoding="ascii"
    )
    assert _says(tmp_path).stdout == "/etc/pam.d/a:3: account required pam_adopt.so\n"


def test_all_that_name_it(tmp_path: Path) -> None:
    """--named: what is passed over without the module, too; not comments, nor what only has it as an option."""
    (tmp_path / "etc/pam.d").mkdir(parents=True)
    lines = (
        "# account required pam_adopt.so",
        f"account {RECOMMENDED} pam_adopt.so",
        "auth optional pam_exec.so pam_adopt.so",
    )
    (tmp_path / "etc/pam.d/sshd").write_text("\n".join(lines) + "\n", encoding="ascii")
    said = subprocess.run([SCRIPT, "--named", str(tmp_path)], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (1, f"/etc/pam.d/sshd:2: {lines[1]}\n")


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
        (
            "etc/pam.conf",
            "other account required pam_adopt.so\nother session required x.so\nOTHER Session Optional pam_adopt.so\n",
        ),
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
