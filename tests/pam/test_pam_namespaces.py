"""Descriptors in a reply: only namespaces, one of a kind, joined all of them or none."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Dict, Iterator, List, Mapping, Sequence, Tuple

import pytest

from pam.pam_double import DENIAL, Agent, Reply, say
from pam.pam_login import Login, Outcome

CONTAINER = ("uts", "ipc", "net", "cgroup", "mnt")


@contextmanager
def namespaces(*kinds: str) -> Iterator[Dict[str, int]]:
    """New namespaces, each held by nothing but a descriptor of ours."""
    words = {"mnt": "--mount", "user": "--user", "pid": "--pid", "time": "--time"}
    command = ["unshare", *(words.get(kind, f"--{kind}") for kind in kinds)]
    if "pid" in kinds or "time" in kinds:
        command.append("--fork")
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen([*command, "sh", "-c", "echo up; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        pid = process.pid
        if "--fork" in command:
            with open(f"/proc/{pid}/task/{pid}/children") as children:
                pid = int(children.read().split()[0])
        opened = {kind: os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in kinds}
        for fd in opened.values():
            stack.callback(os.close, fd)
        process.stdin.close()
        process.wait(timeout=60)
        yield opened


def name_of(kind: str, fd: int) -> str:
    """As /proc/PID/ns shows it."""
    return f"{kind}:[{os.fstat(fd).st_ino}]"


ADOPTED = Reply()


def run(
    login: Login,
    fds: Sequence[int],
    *options: str,
    reply: Reply = ADOPTED,
    step: str = "session",
    flags: Sequence[str] = (),
    detect_leaks: bool = True,
    environ: Mapping[str, str] = MappingProxyType({}),
) -> Outcome:
    """One login whose agent sends these descriptors, as many as it announces."""
    with Agent(login.socket_path, (say(replace(reply, descriptors=len(fds)).pack(), fds),)):
        return login(*options, steps=(step,), flags=flags, detect_leaks=detect_leaks, environ=environ)


REFUSED: List[Tuple[str, str]] = [
    ("a file", "reply descriptor 0 is not a namespace"),
    ("a directory of /proc", "reply descriptor 0 is not a namespace"),
    ("a socket", "reply descriptor 0 is not a namespace"),
    ("a device that answers as a namespace does", "reply descriptor 0 is not a namespace"),
    ("one kind twice", "reply has two descriptors for /proc/self/ns/uts"),
]


@pytest.mark.parametrize(("kind", "fault"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_descriptor_that_is_no_namespace_is_refused(login: Login, forged_kernel: Path, kind: str, fault: str) -> None:
    """Anything but a namespace, or two of a kind, is no valid reply; every descriptor is closed."""
    with ExitStack() as stack:
        environ: Dict[str, str] = {}
        if kind == "a file" or "answers" in kind:
            fds = [stack.enter_context(tempfile.TemporaryFile()).fileno()]
        elif kind == "a socket":
            fds = [stack.enter_context(socket.socket()).fileno()]
        elif kind == "one kind twice":
            fd = stack.enter_context(namespaces("uts"))["uts"]
            fds = [fd, fd]
        else:
            fds = [os.open("/proc/self/ns", os.O_RDONLY)]
            stack.callback(os.close, fds[0])
        if "answers" in kind:
            environ = {"LD_PRELOAD": str(forged_kernel), "FORGED": "ioctl"}
        outcome = run(login, fds, "action_generic_failure=deny", environ=environ)
    assert outcome.rc == "PAM_PERM_DENIED"
    assert fault in outcome.log[-1]


@pytest.mark.parametrize("came", [7, 9, 60, 253])
def test_another_number_of_descriptors_than_announced_is_refused(login: Login, came: int) -> None:
    """Fewer or more than the record says, up to the most the kernel carries; none stays open."""
    with namespaces("uts") as opened:
        packed = Reply(descriptors=8).pack()
        with Agent(login.socket_path, (say(packed, [opened["uts"]] * came),)):
            outcome = login("action_generic_failure=deny", steps=("session",))
    assert outcome.rc == "PAM_PERM_DENIED"
    assert ("announces 8 descriptors, 7 came" if came == 7 else "more than can be taken") in outcome.log[-1]


@pytest.mark.parametrize("at", [1, 719, 720])
def test_descriptors_after_the_first_byte_are_refused(login: Login, at: int) -> None:
    """Descriptors in the middle of the record or with the environment are not even taken into the process.

    Announced and all: only their place is wrong. Many times, as the kernel joins the two messages or does not.
    """
    packed = Reply(descriptors=1, environment=b"A=1\0").pack()
    times = 40
    with namespaces("uts") as opened:

        def script(connection: socket.socket) -> None:
            connection.sendall(packed[:at])
            say(packed[at:], [opened["uts"]])(connection)

        with Agent(login.socket_path, (script,)):
            outcome = login("action_generic_failure=deny", steps=("session",), flags=("--repeat", str(times)))
    assert outcome.rcs == ["PAM_PERM_DENIED"] * times


def test_descriptors_without_an_adoption_are_refused(login: Login) -> None:
    """A denial that brings a namespace is nonsense: no valid reply."""
    with namespaces("uts") as opened:
        outcome = run(login, [opened["uts"]], "action_generic_failure=deny", reply=DENIAL)
    assert outcome.rc == "PAM_PERM_DENIED"
    assert "reply has an environment or descriptors without an adoption" in outcome.log[-1]


FAILURES = [
    ("action_adopt_failure=deny", "PAM_PERM_DENIED", "deny", 1),
    ("action_adopt_failure=allow", "PAM_SUCCESS", "success", 0),
    ("log_level=info", "PAM_SUCCESS", "success", 0),
]


@pytest.mark.parametrize(("option", "rc", "word", "messages"), FAILURES)
def test_a_failed_join_is_a_failed_adoption_and_undone(
    login: Login, option: str, rc: str, word: str, messages: int
) -> None:
    """With a second thread the mount namespace cannot be entered: the four joined before it are left again."""
    with namespaces(*CONTAINER) as opened:
        reply = Reply(environment=b"SLURM_JOB_ID=17\0")
        alone = login(steps=("close",), flags=("--thread",)).namespaces
        outcome = run(login, list(opened.values()), option, reply=reply, flags=("--thread",))
        ours = {name_of(kind, fd) for kind, fd in opened.items()}
    assert (outcome.rc, len(outcome.errors), outcome.environment) == (rc, messages, [])
    assert f" verdict={word} adopted=1 job=17 " in outcome.log[-1]
    assert 'join=failed fault="join /proc/self/ns/mnt: Invalid argument"' in outcome.log[-1]
    assert not ours & set(outcome.namespaces.values())
    for kind in ("uts", "ipc", "cgroup", "user"):
        assert outcome.namespaces[kind] == alone[kind]


@pytest.mark.parametrize("step", ["session", "account"])
def test_every_namespace_that_is_sent_is_joined(login: Login, step: str) -> None:
    """The process that becomes the session's parent is in each of them afterwards. Which phase that is the agent
    knows: it sends them in the account phase only where no session line follows."""
    with namespaces(*CONTAINER) as opened:
        outcome = run(login, list(opened.values()), reply=Reply(environment=b"A=1\0"), step=step)
        expected = {kind: name_of(kind, fd) for kind, fd in opened.items()}
    assert (outcome.rc, outcome.environment) == ("PAM_SUCCESS", ["A=1"])
    assert {kind: outcome.namespaces[kind] for kind in CONTAINER} == expected
    assert " verdict=success adopted=1 job=17 reason=callerid witness=bpf ms=" in outcome.log[-1]


def test_pid_and_time_namespaces_are_joined_for_the_children(login: Login) -> None:
    """setns() moves the caller's children, and the login's processes are those."""
    with namespaces("pid", "time") as opened:
        # The leak detector stops the process from a thread, and a process whose children are elsewhere can have none.
        outcome = run(login, list(opened.values()), detect_leaks=False)
        expected = name_of("pid", opened["pid"])
    assert (outcome.rc, outcome.namespaces["pid_for_children"]) == ("PAM_SUCCESS", expected)


def test_a_user_namespace_is_joined_last(login: Login) -> None:
    """Sent first, joined last: behind it the process could not enter the others."""
    with namespaces("user", "uts", "mnt") as opened:
        outcome = run(login, list(opened.values()))
        expected = {kind: name_of(kind, fd) for kind, fd in opened.items()}
    assert outcome.rc == "PAM_SUCCESS"
    assert {kind: outcome.namespaces[kind] for kind in expected} == expected


def test_a_namespace_one_is_in_already_is_no_failure(login: Login) -> None:
    """A job without a user namespace of its own sends the node's, which setns() would refuse."""
    fd = os.open("/proc/self/ns/user", os.O_RDONLY)
    try:
        outcome = run(login, [fd], "action_adopt_failure=deny")
    finally:
        os.close(fd)
    assert outcome.rc == "PAM_SUCCESS"


@pytest.mark.parametrize(
    ("options", "step", "adopted", "rc"),
    [
        (("join_container=false",), "account", 1, "PAM_SUCCESS"),
        (("join_container=false",), "session", 1, "PAM_SUCCESS"),
        (("mode=observe",), "account", 1, "PAM_IGNORE"),
        (("mode=observe",), "session", 1, "PAM_IGNORE"),
    ],
)
def test_nothing_is_joined_elsewhere(login: Login, options: Tuple[str, ...], step: str, adopted: int, rc: str) -> None:
    """Not with join_container=false, never in observe mode; descriptors are closed."""
    with namespaces("uts", "mnt") as opened:
        outcome = run(login, list(opened.values()), *options, reply=Reply(adopted=adopted), step=step)
        ours = {name_of(kind, fd) for kind, fd in opened.items()}
    assert outcome.rc == rc
    assert not ours & set(outcome.namespaces.values())
