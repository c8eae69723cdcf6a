"""Sockets handed over by a service manager: taken over if they are what we would have bound, refused with words if not.

Each case is a real child process with descriptors from 3 on, as sd_listen_fds(3) has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import pytest
from nobody import environment

import activator

# What a child says of itself: the sockets it took over, or why not; what is left in its environment; what a child of
# its own would inherit.
_CODE = """
import json, os, subprocess, sys
from adoptd.activation import take_passed, ActivationError
path, port, addresses = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(",")
said = {}
try:
    passed = take_passed(os.environ)
    said["again"] = len(take_passed(os.environ).sockets)
    said["names"] = sorted(passed.sockets)
    pam, tcp = passed.unix("pam", path, 0o600), passed.tcp("callerid", addresses, port)
    said["pam"] = None if pam is None else [pam.fileno(), pam.getblocking()]
    said["tcp"] = None if tcp is None else len(tcp)
except ActivationError as error:
    said["error"] = str(error)
said["left"] = sorted(name for name in os.environ if name.startswith("LISTEN_"))
look = "import os; print(*[os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if int(n) > 2])"
said["inherited"] = subprocess.run([sys.executable, "-c", look], close_fds=False, capture_output=True).stdout.decode()
print(json.dumps(said))
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A short path for sockets; 107 bytes are all there are."""
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir("/")


def child(
    sockets: Sequence[socket.socket],
    names: Sequence[str],
    path: Path,
    port: int = 1,
    addresses: str = "127.0.0.1",
    env: Optional[Dict[str, str]] = None,
) -> Dict[str, Any]:
    """What a child that is handed ``sockets`` says. ``env`` is set after the protocol's own variables."""
    report, low = os.pipe()
    # Beyond the numbers that the sockets get.
    out = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 64)
    os.close(low)
    code = f"import os; os.dup2({out}, 1)\n" + _CODE
    if env is not None:
        code = f"import os; os.environ.update({env!r})\n" + code
    os.set_inheritable(out, True)
    command = [sys.executable, "-c", code, str(path), str(port), addresses]
    pid = activator.start(command, sockets, names, environment())
    os.close(out)
    with os.fdopen(report) as lines:
        said = lines.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said
    found: Dict[str, Any] = json.loads(said)
    assert found["left"] == []
    return found


def unix(path: Path, mode: int = 0o600) -> socket.socket:
    return activator.listening(("pam", str(path), 0, mode))


def tcp(address: str = "127.0.0.1", v6only: bool = True) -> socket.socket:
    sock = activator.listening(("callerid", address, 0, 0)) if v6only else socket.socket(socket.AF_INET6)
    if not v6only:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((address, 0))
        sock.listen()
    return sock


def test_what_is_right_is_taken_over_once_and_kept_from_children(place: Path) -> None:
    """Descriptors 3 and 4, non-blocking; no child of the agent's can answer in its place."""
    with unix(place / "pam") as pam, tcp() as peers:
        said = child([pam, peers], ["pam", "callerid"], place / "pam", peers.getsockname()[1])
    assert said["names"] == ["callerid", "pam"]
    assert said["pam"] == [3, False]
    assert said["tcp"] == 1
    assert said["again"] == 0
    assert "socket:" not in said["inherited"]


@pytest.mark.parametrize("pid", ["1", "", "x"])
def test_what_is_meant_for_another_process_is_not_touched(place: Path, pid: str) -> None:
    """A parent's variables: nothing is taken over, and the descriptors may be anything."""
    with unix(place / "pam") as pam:
        said = child([pam], ["pam"], place / "pam", env={"LISTEN_PID": pid})
    assert said["names"] == []
    assert said["pam"] is None


WRONG_WORDS = [
    ({"LISTEN_FDS": "-1"}, "LISTEN_FDS='-1': expected a number"),
    ({"LISTEN_FDS": "65"}, "LISTEN_FDS='65': expected a number of at most 64"),
    ({"LISTEN_FDS": "1x"}, "LISTEN_FDS='1x'"),
    ({"LISTEN_FDS": "٣"}, "LISTEN_FDS="),
    ({"LISTEN_FDS": "60", "LISTEN_FDNAMES": ":".join(["pam"] * 60)}, "was announced by LISTEN_FDS"),
    ({"LISTEN_FDNAMES": ""}, "a socket named '' was handed over, expected one of pam, user, callerid"),
    ({"LISTEN_FDNAMES": "pam:user"}, "LISTEN_FDNAMES='pam:user' for 1 sockets"),
    ({"LISTEN_FDNAMES": "adoptd.socket"}, "a socket named 'adoptd.socket'"),
]


@pytest.mark.parametrize(("env", "words"), WRONG_WORDS, ids=[words[:30] for _, words in WRONG_WORDS])
def test_variables_that_make_no_sense_stop_the_start(place: Path, env: Dict[str, str], words: str) -> None:
    """Rather than to serve on sockets that are something else."""
    with unix(place / "pam") as pam:
        assert words in child([pam], ["pam"], place / "pam", env=env)["error"]


@contextlib.contextmanager
def odd(kind: str, path: Path) -> Iterator[List[Any]]:
    """Something that is no PAM socket, under its name."""
    with contextlib.ExitStack() as opened:
        if kind == "datagram":
            found: Any = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            found.bind(str(path))
        elif kind == "not listening":
            found = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            found.bind(str(path))
        elif kind == "a file":
            found = opened.enter_context(path.open("w"))
        elif kind == "tcp":
            found = opened.enter_context(tcp())
        elif kind == "another path":
            found = opened.enter_context(unix(path.with_name("other")))
        elif kind == "mode":
            found = opened.enter_context(unix(path, 0o666))
        elif kind == "unlinked":
            found = opened.enter_context(unix(path))
            path.unlink()
        elif kind == "replaced":
            found = opened.enter_context(unix(path))
            path.unlink()
            path.touch(0o600)
        else:
            found = opened.enter_context(unix(path))
            os.chown(path, 65534, 0)
        yield [found]


ODD = [
    ("datagram", "a socket that is not a listening stream"),
    ("not listening", "a socket that is not a listening stream"),
    ("a file", "descriptor 3 (pam) is no socket"),
    ("tcp", "a socket of family AF_INET, expected AF_UNIX"),
    ("another path", "other'"),
    ("mode", "found mode 0666, expected mode 0600 (SocketMode= in its .socket unit)"),
    ("unlinked", "No such file or directory"),
    ("replaced", "SocketUser="),
    ("another owner", "of owner 65534, expected a socket of owner 0"),
]


@pytest.mark.parametrize(("kind", "words"), ODD, ids=[kind for kind, _ in ODD])
def test_a_socket_that_is_not_what_we_would_bind_stops_the_start(place: Path, kind: str, words: str) -> None:
    """The words name the socket, what was found, and the setting to change."""
    if kind == "another owner" and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    with odd(kind, place / "pam") as sockets:
        assert words in child(sockets, ["pam"], place / "pam")["error"]


def test_two_sockets_of_one_name_are_one_too_many(place: Path) -> None:
    """Which of them would it be?"""
    with unix(place / "pam") as one, unix(place / "two") as two:
        assert "found 2 sockets, expected one" in child([one, two], ["pam", "pam"], place / "pam")["error"]


def test_ports_must_be_those_of_the_configuration(place: Path) -> None:
    """Another port, another address, one address of two, one socket for both families: each is said."""
    with tcp() as one, tcp("::1") as six, tcp("::", v6only=False) as both, unix(place / "pam") as pam:
        port = one.getsockname()[1]

        def said(*given: tuple[socket.socket, str]) -> str:
            sockets, names = [pam, *(g[0] for g in given)], ["pam", *("callerid" for _ in given)]
            return str(child(sockets, names, place / "pam", port, given[0][1]).get("error", ""))

        assert said((one, "127.0.0.1")) == ""
        assert f"found 127.0.0.1 port {port}, expected 127.0.0.2 port {port} as in adoptd.toml" in said(
            (one, "127.0.0.2")
        )
        assert f"found 127.0.0.1 port {port}, expected 127.0.0.1 port {port}, ::1 port" in said((one, "127.0.0.1,::1"))
        assert f"::1 port {six.getsockname()[1]}, expected" in said((six, "::1"))
        assert "an IPv6 socket that takes IPv4 too, expected ipv6-only (BindIPv6Only=" in said((both, "::"))
        assert "family AF_UNIX, expected AF_INET or AF_INET6" in said((pam, "127.0.0.1"))


def test_the_real_activator_of_systemd(place: Path) -> None:
    """systemd-socket-activate speaks the protocol that we read."""
    program = Path("/usr/bin/systemd-socket-activate")
    assert program.exists(), "install systemd (./dev setup): it brings systemd-socket-activate"
    report = place / "report"
    code = f"import os; os.dup2(os.open({str(report)!r}, os.O_WRONLY | os.O_CREAT, 0o600), 1)\n" + _CODE
    names = ["--listen", str(place / "pam"), "--fdname", "pam"]
    command = [str(program), *names, "-E", "PATH", "-E", "PYTHONPATH", sys.executable, "-c", code]
    umask = os.umask(0o177)
    try:
        started = subprocess.Popen(
            [*command, str(place / "pam"), "1", "127.0.0.1"],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    finally:
        os.umask(umask)
    try:
        assert started.stderr is not None
        # It says so once it listens, and starts the program when somebody comes.
        assert b"Listening on" in started.stderr.readline()
        (place / "pam").chmod(0o600)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(place / "pam"))
            assert started.wait(60) == 0, started.stderr.read()
    finally:
        started.kill()
        started.wait()
        started.stderr.close()
    said = json.loads(report.read_text())
    assert said["pam"] == [3, False]
    assert said["left"] == []
