"""What an ordinary user would see: code run as uid 65534, and a directory that this user can reach."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, Iterator, List

import pytest

NOBODY = 65534

# The imports come first: the package and the interpreter may lie where only root can read.
_PREAMBLE = f"""
import os, socket, sys, time
from pathlib import Path
from adoptd import client, config
from adoptd.wire.control import Command
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
"""


@pytest.fixture
def public_path() -> Iterator[Path]:
    """pytest's own tmp_path lies below a directory of mode 0700."""
    with tempfile.TemporaryDirectory(prefix=f"adoptd-test-{os.getpid()}-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def as_nobody(code: str, *arguments: str) -> str:
    """What ``code`` prints when run as nobody; it must end with status 0."""
    ended = subprocess.run(
        nobody_command(code, *arguments), capture_output=True, text=True, timeout=120, env=environment()
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def nobody_command(code: str, *arguments: str) -> List[str]:
    return [sys.executable, "-c", _PREAMBLE + code, *arguments]


def environment() -> Dict[str, str]:
    return {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
