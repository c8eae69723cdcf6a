"""The reading of a key file: only one that nobody but its keepers could have read or written.

Owns the checks, which are the same for every scheme that has its key in a file. It must never follow a link, wait for
a writer, or check one file and read another. Called by the key and slurm schemes.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import FrozenSet, Tuple

from adoptd.seal.values import SealError, SealFault

# RFC 7518, 3.2: a key is at least as long as the hash. The upper bound is what a key file can sensibly be.
KEY_MIN_BYTES = 32
KEY_MAX_BYTES = 4096


@dataclass(frozen=True)
class KeyFileRules:
    """What a scheme asks of its file; ``expected`` says it in words. ``refused_mode``: bits that may not be set.

    ``owners`` are the uids that may own it beside root and our own.
    """

    expected: str
    owners: FrozenSet[int] = frozenset()
    refused_mode: int = 0o077
    min_bytes: int = KEY_MIN_BYTES
    max_bytes: int = KEY_MAX_BYTES


OWN_KEY = KeyFileRules(f"mode 0600 or 0400, of {KEY_MIN_BYTES} to {KEY_MAX_BYTES} bytes")


def read_key_file(path: Path, rules: KeyFileRules = OWN_KEY) -> Tuple[bytes, int]:
    """The content and the uid of the file's owner. Raises SealError(UNAVAILABLE): what was found and expected."""
    try:
        # O_NONBLOCK: opening a FIFO would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        found = "a symbolic link" if error.errno == errno.ELOOP else f"not to be opened ({error.strerror})"
        raise key_file_error(path, found, rules) from None
    try:
        # The checks are on what was opened, not on what the path names by then.
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise key_file_error(path, "not a regular file", rules)
        if status.st_uid not in (0, os.geteuid(), *rules.owners):
            raise key_file_error(path, f"owned by uid {status.st_uid}", rules)
        if status.st_mode & rules.refused_mode:
            raise key_file_error(path, f"of mode {stat.S_IMODE(status.st_mode):04o}", rules)
        key = os.read(descriptor, rules.max_bytes + 1)
    except OSError as error:
        raise key_file_error(path, f"not to be read ({error.strerror})", rules) from None
    finally:
        os.close(descriptor)
    if not rules.min_bytes <= len(key) <= rules.max_bytes:
        size = f"more than {rules.max_bytes}" if len(key) > rules.max_bytes else str(len(key))
        raise key_file_error(path, f"{size} bytes long", rules)
    return key, status.st_uid


def key_file_error(path: Path, found: str, rules: KeyFileRules = OWN_KEY) -> SealError:
    """The error for a file that is ``found`` to be something else than ``rules`` ask for."""
    owners = " or ".join(f"uid {uid}" for uid in sorted({os.geteuid(), *rules.owners} - {0}))
    owner = f"root or {owners}" if owners else f"root or uid {os.geteuid()}"
    expected = f"a regular file of {owner}, {rules.expected}"
    return SealError(SealFault.UNAVAILABLE, f"key file {path} is {found}; expected {expected}")
