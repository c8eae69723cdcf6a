"""A virtual machine that is up: started from the image on a disk that is thrown away, told what to do, ended.

Owns the emulator's process and the guest agent's socket. There is no network: commands, their output and files go
through a virtio port, whose other end is the guest agent, root in the machine. Emulated on purpose: it works where
there is no hardware virtualisation, and where there is one that Debian's kernel does not come up on.
Called by the tests of this directory.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

from lab import kernel
from lab.started import Started
from vm.image import Image

MEMORY_MB = 3072
# Of the machine that runs the tests; under emulation more of them only wait for each other.
CPUS = 2
BOOT_TIMEOUT_S = 600.0
COMMAND_TIMEOUT_S = 900.0
_POLL_S = 0.1
# The guest agent takes a command's input in one message.
_PUT_BYTES = 1 << 19
_CONSOLE_LINES = 30


@dataclass(frozen=True)
class Done:
    """A command that has ended in the machine."""

    status: int
    out: str
    err: str


class Machine(Started):
    """Use as a context manager: entering starts it and waits until it answers, leaving ends it."""

    def __init__(self, image: Image, within: Path) -> None:
        self._image = image
        self._directory = Path(tempfile.mkdtemp(dir=within, prefix="vm."))
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._socket: Optional[socket.socket] = None
        self._buffer = b""

    def _start(self) -> None:
        port = self._directory / "agent"
        argv = ["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"]
        argv += [
            "-smp",
            str(CPUS),
            "-m",
            str(MEMORY_MB),
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]
        argv += ["-kernel", str(self._image.kernel), "-initrd", str(self._image.initrd)]
        argv += ["-append", "root=/dev/vda rw console=ttyS0 panic=-1 systemd.unified_cgroup_hierarchy=1"]
        # What it writes goes to a file without a name, in our directory, not in the image.
        argv += ["-drive", f"file={self._image.disk},format=raw,if=virtio,snapshot=on"]
        argv += ["-serial", f"file:{self._directory}/console", "-device", "virtio-rng-pci", "-device", "virtio-serial"]
        argv += ["-chardev", f"socket,id=agent,path={port},server=on,wait=off"]
        argv += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
        with (self._directory / "qemu").open("wb") as said:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={**os.environ, "TMPDIR": str(self._directory)},
                preexec_fn=lambda: kernel.die_with_parent(signal.SIGKILL),
            )
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while not port.exists():
            self._check_alive(deadline, "its port")
            time.sleep(_POLL_S)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(port))
        # Until the guest has opened its end, what is sent waits there; so it is sent once.
        self._ask("guest-ping", deadline)

    def _check_alive(self, deadline: float, what: str) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"qemu ended with {self._process.returncode} before {what}:\n{self.last_words()}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the virtual machine: not in time: {what}\n{self.last_words()}")

    def last_words(self) -> str:
        """The end of what qemu and the machine's console said."""
        lines: List[str] = []
        for name in ("qemu", "console"):
            file = self._directory / name
            if file.exists():
                lines += file.read_text(encoding="utf-8", errors="replace").splitlines()[-_CONSOLE_LINES:]
        return "\n".join(lines)

    def _ask(self, command: str, deadline: float, **arguments: object) -> Any:
        assert self._socket is not None
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while b"\n" not in self._buffer:
            self._socket.settimeout(1.0)
            try:
                received = self._socket.recv(1 << 20)
            except socket.timeout:
                self._check_alive(deadline, f"an answer to {command}")
                continue
            if not received:
                raise RuntimeError(f"the virtual machine has gone:\n{self.last_words()}")
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: Dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error'].get('desc')}")
        return answer["return"]

    def execute(self, shell: str, *, data: bytes = b"", timeout_s: float = COMMAND_TIMEOUT_S) -> Done:
        """Run a shell's command line in the machine as root, and wait for its end. Raises RuntimeError in time."""
        deadline = time.monotonic() + timeout_s
        more = {"input-data": base64.b64encode(data).decode()} if data else {}
        begun = self._ask(
            "guest-exec", deadline, **{"path": "/bin/bash", "arg": ["-c", shell], "capture-output": True, **more}
        )
        while True:
            state = self._ask("guest-exec-status", deadline, pid=begun["pid"])
            if state["exited"]:
                texts = [
                    base64.b64decode(state.get(name, "")).decode(errors="replace") for name in ("out-data", "err-data")
                ]
                return Done(int(state.get("exitcode", 128 + int(state.get("signal", 0)))), *texts)
            self._check_alive(deadline, f"the end of {shell!r}")
            time.sleep(_POLL_S)

    def run(self, shell: str, *, data: bytes = b"", timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """execute(), and what it printed. Raises RuntimeError with all it said unless its status is 0."""
        done = self.execute(shell, data=data, timeout_s=timeout_s)
        if done.status != 0:
            raise RuntimeError(f"{shell!r} ended with {done.status}:\n{done.out}{done.err}")
        return done.out

    def put(self, data: bytes, path: str) -> None:
        """Make a file in the machine."""
        self.run(f": >'{path}'")
        for start in range(0, len(data), _PUT_BYTES):
            self.run(f"cat >>'{path}'", data=data[start : start + _PUT_BYTES])

    def close(self) -> None:
        """End it. Can be called twice."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        shutil.rmtree(self._directory, ignore_errors=True)
