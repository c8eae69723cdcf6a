"""One login through the real libpam and the module under test: runs the driver in its scene, collects what came of it.

Owns the PAM configuration, the user database and the log of the scene. Used by every test of the module; asserts
by itself only what must hold for all of them: a clean exit, nothing on stderr, no descriptor left.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Dict, List, Mapping, Optional, Sequence, Tuple, Type

# security/_pam_types.h; the ones that can come out of these stacks.
RETURN_VALUES = {
    0: "PAM_SUCCESS",
    3: "PAM_SERVICE_ERR",
    4: "PAM_SYSTEM_ERR",
    5: "PAM_BUF_ERR",
    6: "PAM_PERM_DENIED",
    8: "PAM_IGNORE",  # see IGNORED_LINE
    14: "PAM_SESSION_ERR",
    26: "PAM_ABORT",
    28: "PAM_MODULE_UNKNOWN",
}

# "toor" is root by uid and not by name, the uid of "none" is no uid to the kernel, and the last one tries to write a
# log line of its own.
USERS = {"root": 0, "toor": 0, "alice": 1001, "none": 0xFFFFFFFF, 'ev=il" uid=0\x1b': 1002}
SOCKET_NAME = "pam.sock"
# The module's own second is enough for a login, and not for one on a machine that is busy with something else.
PATIENT = "timeout_ms=20000"
# Longer than the longest deadline in a test, on a busy machine.
HUNG_S = 120
# Every value of the module becomes libpam's, but for PAM_IGNORE, which libpam never returns: that one goes on to the
# next line, where pam_debug answers with a value that our module does not have (PAM_CRED_INSUFFICIENT).
CONTROL = "[success=done ignore=ignore default=die]"
IGNORED_LINE = "[default=die] pam_debug.so auth=cred_insufficient cred=cred_insufficient acct=cred_insufficient "
IGNORED_LINE += "open_session=cred_insufficient close_session=cred_insufficient"


@dataclass(frozen=True)
class Build:
    """One build of the module and of the driver that loads it."""

    module: Path
    driver: Path


@dataclass
class Outcome:
    """What a login came to. ``steps``: (step, return value by name, microseconds)."""

    steps: List[Tuple[str, str, int]] = field(default_factory=list)
    errors: List[str] = field(default_factory=list)
    infos: List[str] = field(default_factory=list)
    prompts: List[str] = field(default_factory=list)
    environment: List[str] = field(default_factory=list)
    namespaces: Dict[str, str] = field(default_factory=dict)
    descriptors: Tuple[int, int] = (0, 0)
    log: List[str] = field(default_factory=list)
    priorities: List[int] = field(default_factory=list)

    @property
    def rc(self) -> str:
        """The return value of the only step."""
        assert len(self.steps) == 1
        return self.steps[0][1]

    @property
    def rcs(self) -> List[str]:
        """The return values of all steps."""
        return [name for _, name, _ in self.steps]

    @property
    def took_s(self) -> float:
        """Seconds spent in all steps."""
        return sum(us for _, _, us in self.steps) / 1e6


class _Log:
    """A /dev/log: collects datagrams in a thread, because syslog(3) waits for a reader when the queue is full."""

    def __init__(self, path: Path) -> None:
        self.lines: List[str] = []
        self.priorities: List[int] = []
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._path)
        self._thread = threading.Thread(target=self._collect)

    def __enter__(self) -> _Log:
        self._thread.start()
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], where: Optional[TracebackType]
    ) -> None:
        # Datagrams keep their order, so everything the driver sent comes before the empty one.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", self._path)
        self._thread.join()
        self._socket.close()

    def _collect(self) -> None:
        while True:
            datagram = self._socket.recv(65536)
            if not datagram:
                return
            text = datagram.rstrip(b"\0\n").decode("latin-1")
            match = re.fullmatch(r"<(\d+)>.*? driver: pam_adopt\([^)]*\): (.*)", text, re.DOTALL)
            if match:
                self.priorities.append(int(match.group(1)))
                self.lines.append(match.group(2))


class Stage:
    """The process that makes scenes and becomes drivers; one for all logins, as starting Python is the slow part."""

    def __init__(self) -> None:
        script = str(Path(__file__).with_name("pam_scene.py"))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )

    def close(self) -> None:
        """Ends the process, and with it everything it started and did not wait for."""
        self._process.communicate(timeout=60)

    def play(self, scene: Dict[str, object]) -> int:
        """The exit status of one driver, as waitpid() gives it. A driver that hangs is killed, with the stage."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(scene).encode() + b"\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], HUNG_S)[0]:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise AssertionError(f"the driver hung for {HUNG_S} s")
        return int(self._process.stdout.readline())


@dataclass
class Login:
    """Runs logins with one build, in a directory of its own."""

    build: Build
    directory: Path
    stage: Stage

    @property
    def socket_path(self) -> str:
        """Where the module will look for the agent, unless a test gives another socket=."""
        return str(self.directory / SOCKET_NAME)

    def __call__(
        self,
        *options: str,
        user: str = "alice",
        steps: Sequence[str] = ("account",),
        flags: Sequence[str] = (),
        service: str = "sshd",
        sockets: Sequence[str] = (),
        default_socket: bool = False,
        detect_leaks: bool = True,
        patient: bool = True,
        environ: Mapping[str, str] = MappingProxyType({}),
    ) -> Outcome:
        """One driver process. ``options`` go behind the module in the stack, ``socket=`` and PATIENT first.

        ``patient``: False for the module's own default. ``environ``: of the driver, besides what the sanitizers need.
        """
        # Of an option that is there twice the last counts, so the test's own timeout_ms= does.
        given = (() if default_socket else (f"socket={self.socket_path}",)) + ((PATIENT,) if patient else ())
        with tempfile.TemporaryDirectory(dir=self.directory, prefix="login-") as name:
            place = Path(name)
            words = " ".join(f"[{word}]" if " " in word else word for word in (*given, *options))
            lines = [
                f"{kind} {CONTROL} {self.build.module} {words}\n{kind} {IGNORED_LINE}\n"
                for kind in ("auth", "account", "session")
            ]
            (place / service).write_text("".join(lines))
            passwd = place / "passwd"
            passwd.write_text("".join(f"{user}:x:{uid}:{uid}::/:/bin/sh\n" for user, uid in USERS.items()))
            scene: Dict[str, object] = {
                "driver": [str(self.build.driver), name, service, user, *flags, *steps],
                "environ": {
                    # What is loaded before the sanitizer, which it would not start behind, is the test's.
                    "ASAN_OPTIONS": f"exitcode=99:detect_leaks={int(detect_leaks)}:verify_asan_link_order=0",
                    "UBSAN_OPTIONS": "print_stacktrace=1",
                    **environ,
                },
                "passwd": str(passwd),
                "log": str(place / "log"),
                "stdout": str(place / "stdout"),
                "stderr": str(place / "stderr"),
                "sockets": list(sockets),
            }
            with _Log(place / "log") as log:
                status = self.stage.play(scene)
            assert (status, (place / "stderr").read_text()) == (0, "")
            outcome = _read((place / "stdout").read_text())
        outcome.log, outcome.priorities = log.lines, log.priorities
        assert outcome.descriptors[0] == outcome.descriptors[1] > 0, "the module left a descriptor open"
        return outcome


def _read(output: str) -> Outcome:
    outcome = Outcome()
    for line in output.splitlines():
        word, *rest = line.split("\t")
        if word == "rc":
            outcome.steps.append((rest[0], RETURN_VALUES.get(int(rest[1]), rest[1]), int(rest[2])))
        elif word == "ns":
            outcome.namespaces[rest[0]] = rest[1]
        elif word == "fds":
            outcome.descriptors = (int(rest[0]), int(rest[1]))
        else:
            text = re.sub(r"\\x([0-9a-f]{2})", lambda match: chr(int(match.group(1), 16)), rest[0])
            lists = {
                "error": outcome.errors,
                "info": outcome.infos,
                "prompt": outcome.prompts,
                "env": outcome.environment,
            }
            # pam_debug tells the user what it returns.
            if not text.endswith("=cred_insufficient"):
                lists[word].append(text)
    return outcome
