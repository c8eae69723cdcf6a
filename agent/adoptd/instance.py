"""One agent at a time: the lock that a running agent holds for its life.

Owns the file ``<PAM socket>.lock``, which the kernel unlocks however its holder ends. Must never be passed to a child,
nor be a file that others may open: whoever can open it could hold it. Claimed by the service before it opens anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from pathlib import Path

from adoptd.model import AdoptdError

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MODE = 0o600
# A pid, and a file that is no lock of ours is not read whole.
_READ_BYTES = 32


class Instance:
    """The right to be the agent behind ``pam_socket``, until :meth:`release` or the end of the process."""

    def __init__(self, pam_socket: Path) -> None:
        """Raises AdoptdError if another agent has it, naming that one, or if the file is not ours alone."""
        self._path = Path(f"{pam_socket}.lock")
        while True:
            fd = self._open()
            try:
                self._check(fd)
                self._lock(fd)
                if self._is_there(fd):
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, f"{os.getpid()}\n".encode("ascii"), 0)
                    self._fd = fd
                    return
            except BaseException:
                os.close(fd)
                raise
            # Its holder ended between our open() and our lock, and took the name along.
            os.close(fd)

    def release(self) -> None:
        """Let another agent start."""
        with contextlib.suppress(OSError):
            if self._is_there(self._fd):
                os.unlink(self._path)
        os.close(self._fd)

    def _open(self) -> int:
        try:
            return os.open(self._path, _FLAGS, _MODE)
        except OSError as error:
            raise AdoptdError(f"{self._path}: cannot be opened: {error.strerror}") from None

    def _check(self, fd: int) -> None:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise AdoptdError(f"{self._path}: is no regular file, expected the agent's lock")
        mode = stat.S_IMODE(found.st_mode)
        # A umask may take more away; that is no matter.
        if found.st_uid != os.geteuid() or mode & ~_MODE:
            expected = f"owner {os.geteuid()} and mode {_MODE:04o}"
            raise AdoptdError(f"{self._path}: has owner {found.st_uid} and mode {mode:04o}, expected {expected}")

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            word = os.pread(fd, _READ_BYTES, 0).decode("ascii", "replace").strip()
            holder = f"pid {word}" if word.isdigit() else "another process"
            raise AdoptdError(f"an agent is running already: {holder} holds {self._path}") from None

    def _is_there(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.lstat(self._path))
        except FileNotFoundError:
            return False
