"""A directory in which sessions or logins outlive the agent: one small file each, root's alone.

Owns the checks of the directory and of each file, and the writing that leaves a whole file or none. Everything
goes through the directory's descriptor, so it cannot be swapped after the check. Must never read a file that
others could have written. Called by the registry of
sessions and by the pending logins.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Iterator, Tuple, Union

from adoptd.model import AdoptdError
from adoptd.sessions.fields import FILE_MAX_BYTES

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Not blocking: whatever is found there may be a fifo.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# Being written: the writer was killed if it is there at a start.
_UNFINISHED = ".unfinished"


class StoreError(AdoptdError):
    """The directory cannot be used, or a file in it not written."""


def boot_id(proc_root: str = "/proc") -> str:
    """What no other boot of this host has: files of another are of processes that are gone."""
    return (Path(proc_root) / "sys/kernel/random/boot_id").read_text("ascii").strip()


class SessionStore:
    """Files by name in one directory."""

    def __init__(self, directory: Path) -> None:
        """Open ``directory``, made if it is not there. Raises StoreError if it is not ours alone."""
        self._shown = str(directory)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory, 0o700)
            self._fd = os.open(directory, _DIRECTORY_FLAGS)
        except OSError as error:
            raise StoreError(f"{directory}: cannot be opened as a directory: {error.strerror}") from None
        status = os.fstat(self._fd)
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid != os.geteuid() or mode != 0o700:
            os.close(self._fd)
            expected = f"owner {os.geteuid()} and mode 0700"
            raise StoreError(f"{directory}: has owner {status.st_uid} and mode {mode:04o}, expected {expected}")

    def write(self, name: str, data: bytes) -> None:
        """Have ``data`` under ``name``, in place of what was there, or leave that. Raises StoreError."""
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(_UNFINISHED, dir_fd=self._fd)
            fd = os.open(_UNFINISHED, _WRITE_FLAGS, 0o600, dir_fd=self._fd)
            with open(fd, "wb", buffering=0) as stream:
                written = stream.write(data)
            if written != len(data):
                raise StoreError(f"{self._shown}/{name}: {written} bytes of {len(data)} could be written")
            # Not flushed to a disk: the directory is in memory, and no session outlives the host.
            os.rename(_UNFINISHED, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except OSError as error:
            raise StoreError(f"{self._shown}/{name}: cannot be written: {error.strerror}") from None

    def remove(self, name: str) -> None:
        """Have nothing under ``name``. Raises StoreError."""
        try:
            os.unlink(name, dir_fd=self._fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StoreError(f"{self._shown}/{name}: cannot be removed: {error.strerror}") from None

    def files(self) -> Iterator[Tuple[str, Union[bytes, str]]]:
        """Every name with its bytes, or in words why they are not to be read. Raises StoreError."""
        try:
            names = os.listdir(self._fd)
        except OSError as error:
            raise StoreError(f"{self._shown}: cannot be listed: {error.strerror}") from None
        for name in sorted(names):
            yield name, self._read(name)

    def close(self) -> None:
        """Let go of the directory; what is in it stays."""
        os.close(self._fd)

    def _read(self, name: str) -> Union[bytes, str]:
        try:
            fd = os.open(name, _READ_FLAGS, dir_fd=self._fd)
        except OSError as error:
            return f"cannot be opened: {error.strerror}"
        try:
            status = os.fstat(fd)
            mode = stat.S_IMODE(status.st_mode)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                return "is no regular file of one name"
            if status.st_uid != os.geteuid() or mode != 0o600:
                return f"has owner {status.st_uid} and mode {mode:04o}, expected owner {os.geteuid()} and mode 0600"
            if status.st_size > FILE_MAX_BYTES:
                return f"has {status.st_size} bytes, expected at most {FILE_MAX_BYTES}"
            return os.read(fd, FILE_MAX_BYTES + 1)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        finally:
            os.close(fd)
