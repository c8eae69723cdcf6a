"""The PAM stacks of docs/admin.md, logged in through: the real sshd, libpam, agent and jobs, denials first.

Each stack is taken from the page as it stands, but for the module's path and its time on a busy machine; Debian's
common files are this host's own. What is expected of a stack is here, and a stack without an expectation fails.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Dict, Iterator, List, Mapping, Sequence, Tuple

import pytest

from documents import blocks, files, read
from lab.etc_files import ALICE, BOB, MAPPED_PORT, PAM_TIMEOUT_MS, ROOT, User
from lab.lab import NOBODY_IN, Lab

pytestmark = pytest.mark.timeout(300)

BLOCKS = blocks(read("docs/admin.md"), "pam", "access", "sshd_config")
STACKS = tuple(dict.fromkeys(block.heading for block in BLOCKS if block.kind == "pam"))
OUT = "no job on node2"
IN = "job"
KEY, PASSWORD = "key", "password"
PASSWORD_ONLY = ("-o", "PreferredAuthentications=keyboard-interactive", "-o", "NumberOfPasswordPrompts=1")


@dataclass(frozen=True)
class Try:
    """A login, and where it must land: ``IN`` is the user's only job. bob is in the group admins."""

    user: User
    has_job: bool
    expected: str
    how: str = KEY


DENIED = Try(ALICE, False, NOBODY_IN)
ADOPTED = Try(ALICE, True, IN)
BY_PASSWORD = (Try(ALICE, False, NOBODY_IN, PASSWORD), Try(ALICE, True, IN, PASSWORD))
ROOT_IN = Try(ROOT, False, OUT)
USUAL = (DENIED, ADOPTED, *BY_PASSWORD, Try(BOB, False, NOBODY_IN), ROOT_IN)

EXPECTED: Mapping[str, Tuple[Try, ...]] = {
    "Begin by observing": (Try(ALICE, False, OUT), Try(ALICE, True, OUT), Try(ALICE, True, OUT, PASSWORD), ROOT_IN),
    "Debian": USUAL,
    "Debian with passwords that expire": USUAL,
    "RHEL, Rocky, Alma": USUAL,
    "Administrators without a job": (
        DENIED,
        ADOPTED,
        *BY_PASSWORD,
        Try(BOB, False, OUT),
        Try(BOB, True, IN),
        ROOT_IN,
    ),
    "Administrators who are never adopted": (
        DENIED,
        ADOPTED,
        *BY_PASSWORD,
        Try(BOB, False, OUT),
        Try(BOB, True, OUT),
        Try(BOB, True, OUT, PASSWORD),
        ROOT_IN,
    ),
    "The account line alone": (
        DENIED,
        ADOPTED,
        Try(ALICE, False, NOBODY_IN, PASSWORD),
        Try(ALICE, True, OUT, PASSWORD),
        ROOT_IN,
    ),
}


def place(lab: Lab, texts: Mapping[str, str]) -> None:
    """Write files of the page into node2, with the module that is tested in its place."""
    ours = f"{lab.cluster.pam_module} timeout_ms={PAM_TIMEOUT_MS}"
    for name, text in texts.items():
        lab.second.write(name, text.replace("pam_adopt.so", ours))


@contextlib.contextmanager
def stack(lab: Lab, heading: str, change: Tuple[str, str] = ("", "")) -> Iterator[None]:
    """The stack under a heading, in force on node2; what was there before on leaving."""
    made: Dict[str, str] = files(
        [block for block in BLOCKS if block.heading == heading and block.kind != "sshd_config"]
    )
    assert made["/etc/pam.d/sshd"].count(change[0]) >= 1
    made["/etc/pam.d/sshd"] = made["/etc/pam.d/sshd"].replace(*change)
    made["/etc/group"] = lab.second.path("/etc/group").read_text("utf-8") + f"admins:x:60100:{BOB.name}\n"
    before = {name: path.read_text("utf-8") for name in made if (path := lab.second.path(name)).exists()}
    place(lab, made)
    try:
        yield
    finally:
        for name in made:
            if name in before:
                lab.second.write(name, before[name])
            else:
                lab.second.path(name).unlink()


def landed(lab: Lab, each: Try, options: Sequence[str] = ()) -> str:
    """Where a login lands, its job replaced by a word; with what the user read, where it is not as expected."""
    env = {"SSH_ASKPASS": "/run/askpass", "SSH_ASKPASS_REQUIRE": "force", "ADOPTD_ANSWER": each.user.password}
    way = PASSWORD_ONLY if each.how == PASSWORD else ("-o", "BatchMode=yes")
    with contextlib.ExitStack() as held:
        names = {OUT: OUT, NOBODY_IN: NOBODY_IN}
        if each.has_job:
            (job,) = held.enter_context(lab.jobs(1, user=each.user, on=[lab.second]))
            names[f"job {job} on node2"] = IN
        login = lab.login(user=each.user, options=(*way, *options), env=env)
    return names.get(login.landed, f"{login.landed}: {login.errors}")


def tried(lab: Lab, tries: Sequence[Try]) -> List[str]:
    """What was not as expected."""
    wrong = []
    for each in tries:
        found = landed(lab, each)
        if found != each.expected:
            job = "with a job" if each.has_job else "without a job"
            wrong.append(f"{each.user.name} {job} by {each.how}: {found}, expected {each.expected}")
    return wrong


def test_each_stack_has_an_expectation() -> None:
    """And no expectation is without its stack."""
    assert set(STACKS) == set(EXPECTED)


@pytest.mark.parametrize("heading", EXPECTED)
def test_stack(lab: Lab, heading: str) -> None:
    """Who is refused, who is let in, and into which job."""
    with stack(lab, heading):
        assert tried(lab, EXPECTED[heading]) == []


def test_observing_counts(lab: Lab) -> None:
    """The stack that lets everybody in has decided and counted what it would have done."""

    def denied() -> float:
        lines = [line for line in lab.second.metrics() if line.startswith("adoptd_adoptions_total{")]
        chosen = [line for line in lines if 'mode="observe"' in line and 'reason="no_jobs"' in line]
        return sum(float(line.split()[-1]) for line in chosen)

    before = denied()
    with stack(lab, "Begin by observing"):
        assert landed(lab, Try(ALICE, False, OUT)) == OUT
    assert denied() > before


@contextlib.contextmanager
def expired(lab: Lab, user: User) -> Iterator[None]:
    """The user's password has to be changed at the next login (shadow(5): last change 0)."""
    before = lab.second.path("/etc/shadow").read_text("utf-8")
    rows = [line.split(":") for line in before.splitlines()]
    changed = [[*row[:2], "0", *row[3:]] if row[0] == user.name else row for row in rows]
    lab.second.write("/etc/shadow", "".join(":".join(row) + "\n" for row in changed), mode=0o600)
    try:
        yield
    finally:
        lab.second.write("/etc/shadow", before, mode=0o600)


def test_an_expired_password(lab: Lab) -> None:
    """Behind Debian's common-account the gate is not asked; before it, it is."""
    with expired(lab, BOB):
        with stack(lab, "Debian"):
            login = lab.login(user=BOB)
            assert "no job running" not in login.errors
            assert "password" in login.errors.lower()
            assert login.landed != NOBODY_IN
        with stack(lab, "Debian with passwords that expire"):
            login = lab.login(user=BOB)
            assert login.landed == NOBODY_IN
            assert "no job running" in login.errors


def test_include_in_place_of_substack(lab: Lab) -> None:
    """What the page warns of: password-auth's sufficient lines end an included stack before our line."""
    change = ("account  substack  password-auth", "account  include   password-auth")
    with stack(lab, "RHEL, Rocky, Alma", change):
        assert landed(lab, DENIED) == OUT


def test_the_agent_is_down(lab: Lab) -> None:
    """With "deny" and pam_access nobody gets in but root and administrators; by default everybody does."""
    down = (Try(ALICE, True, NOBODY_IN), Try(BOB, False, OUT), ROOT_IN)
    with lab.agent_down(lab.second):
        with stack(lab, "Administrators without a job"):
            assert tried(lab, down) == []
        closed = ("pam_adopt.so", "pam_adopt.so action_generic_failure=deny")
        with stack(lab, "Administrators who are never adopted", closed):
            assert tried(lab, (*down, Try(BOB, True, OUT), Try(BOB, False, OUT, PASSWORD))) == []
        with stack(lab, "Debian"):
            assert tried(lab, (Try(ALICE, False, OUT), ROOT_IN)) == []
        with stack(lab, "Begin by observing"):
            assert tried(lab, (Try(ALICE, False, OUT), ROOT_IN)) == []


def test_deny_on_the_session_line_refuses_administrators(lab: Lab) -> None:
    """What the page says of that stack: why the two lines differ."""
    change = ("pam_adopt.so action_adopt_failure=deny", "pam_adopt.so action_generic_failure=deny")
    with lab.agent_down(lab.second), stack(lab, "Administrators without a job", change):
        login = lab.login(user=BOB)
        assert "cannot find out about your jobs" in login.errors
        assert login.landed != OUT


def test_the_module_is_missing(lab: Lab) -> None:
    """Nobody is locked out by any stack of the page: root gets in, and so does who gets in without our lines."""
    for heading in STACKS:
        with stack(lab, heading):
            text = lab.second.path("/etc/pam.d/sshd").read_text("utf-8")
            lab.second.write(
                "/etc/pam.d/sshd", text.replace(str(lab.cluster.pam_module), "/no-such-directory/pam_adopt.so")
            )
            closes = heading == "Administrators without a job"
            tries = (Try(ALICE, False, NOBODY_IN if closes else OUT), ROOT_IN)
            assert tried(lab, tries) == [], heading


def test_a_wrong_option(lab: Lab) -> None:
    """Everybody but root is refused."""
    with stack(lab, "Debian", ("pam_adopt.so", "pam_adopt.so no_such_option=1")):
        assert tried(lab, (Try(ALICE, True, NOBODY_IN), ROOT_IN)) == []


def test_a_key_and_a_password(lab: Lab) -> None:
    """Two factors, by the lines of sshd_config on the page."""
    (wanted,) = [block.text for block in BLOCKS if block.kind == "sshd_config"]
    file = "/etc/ssh/sshd_config"
    before = lab.second.path(file).read_text("utf-8")
    # sshd takes the first word it finds; that of this port reads the file at each connection.
    lab.second.write(file, wanted + before)
    env = {"SSH_ASKPASS": "/run/askpass", "SSH_ASKPASS_REQUIRE": "force", "ADOPTD_ANSWER": ALICE.password}
    options = ("-p", str(MAPPED_PORT), "-o", "NumberOfPasswordPrompts=1")
    try:
        with stack(lab, "Debian"):
            one = lab.login(options=(*options, "-o", "PreferredAuthentications=publickey"), env=env)
            assert one.landed == NOBODY_IN
            assert lab.login(options=options, env=env).landed == NOBODY_IN
            with lab.jobs(1, on=[lab.second]) as (job,):
                assert lab.login(options=options, env=env).landed == f"job {job} on node2"
    finally:
        lab.second.write(file, before)


def test_pam_access_without_root(lab: Lab) -> None:
    """What the page says of root: pam_access is asked about it too, as our line only says "ignore"."""
    with stack(lab, "Administrators without a job"):
        rules = lab.second.path("/etc/security/access-nodes.conf")
        lab.second.write("/etc/security/access-nodes.conf", rules.read_text("utf-8").replace("+:root:ALL\n", ""))
        assert landed(lab, ROOT_IN) == NOBODY_IN
