"""The BPF probe: every TCP socket on the node carries who connected it.

Owns loading and unloading (in a short-lived child, since the compiler is large), the state as people and
metrics see it, and the self-test. Must never import bcc, nor raise anything but ProbeError. Called by the
service, by ``adoptd probe`` and by doctor; look-ups go through :mod:`adoptd.probe.pins`.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Mapping, Optional, Tuple

from adoptd.model import ProbeError
from adoptd.probe import store
from adoptd.probe.pins import OpenProbe, open_probe
from adoptd.probe.selftest import self_test
from adoptd.probe.sources import find_sources, schema_of
from adoptd.probe.store import MissingProbe

__all__ = ["MissingProbe", "OpenProbe", "ProbeStatus", "load", "open_probe", "self_test", "status", "unload"]

# Half a second as a rule; 13 times that in an emulated machine, and it may wait 30 s for another loader.
_TIMEOUT_S = 60.0
# The interpreter that sees the distribution's bcc, whatever interpreter runs the agent.
_SYSTEM_PYTHON = "/usr/bin/python3"


@dataclass(frozen=True)
class ProbeStatus:
    """The probe under one directory. ``problem`` is None exactly if it is loaded and sound.

    ``loaded``: something of ours is pinned, sound or not. ``schema``: of this agent's sources, None if
    they are missing. ``pinned``: the schemas found. ``seeded``: whether the sockets that were open when it
    was loaded were labelled, None if not known.
    """

    loaded: bool
    problem: Optional[str]
    schema: Optional[str]
    pinned: Tuple[str, ...] = ()
    seeded: Optional[bool] = None
    counters: Mapping[str, int] = field(default_factory=dict)


def load(pin_dir: Path, source_dir: Optional[Path] = None) -> str:
    """Load the probe unless it is loaded already; one line saying what was done.

    A probe of other sources is replaced without a gap. Blocks for about a second. Raises ProbeError.
    """
    return _run_loader("load", pin_dir, find_sources(source_dir))


def unload(pin_dir: Path) -> str:
    """Detach the probe and remove its pins; one line saying what was done. Raises ProbeError."""
    return _run_loader("unload", pin_dir, None)


def status(pin_dir: Path, source_dir: Optional[Path] = None) -> ProbeStatus:
    """How the probe is. Never raises: what is wrong is in ``problem``."""
    try:
        schema: Optional[str] = schema_of(find_sources(source_dir))
    except ProbeError as error:
        return ProbeStatus(False, str(error), None)
    pinned: Tuple[str, ...] = ()
    try:
        pinned = _pinned(pin_dir)
        with open_probe(pin_dir, source_dir) as probe:
            counters = probe.counters()
    except MissingProbe as error:
        return ProbeStatus(False, str(error), schema, pinned)
    except ProbeError as error:
        return ProbeStatus(bool(pinned), str(error), schema, pinned)
    return ProbeStatus(True, None, schema, pinned, counters["seed_passes"] > 0, counters)


def _pinned(pin_dir: Path) -> Tuple[str, ...]:
    directory = store.open_trusted(str(pin_dir), str(pin_dir))
    try:
        return tuple(store.schemas(directory))
    finally:
        os.close(directory)


def _run_loader(action: str, pin_dir: Path, source_dir: Optional[Path]) -> str:
    command = [_interpreter(), "-m", "adoptd.probe.loader", action, "--pin-dir", str(pin_dir.absolute())]
    if source_dir is not None:
        command += ["--source-dir", str(source_dir.absolute())]
    # Nothing of our environment: neither bcc nor clang is to be steered by it.
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "PYTHONPATH": _package_root()}
    # It may be root's, and its modules a package's, which must find no files of ours when it is removed.
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    try:
        done = subprocess.run(
            command,
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ProbeError(f"probe {action}: not done after {_TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise ProbeError(f"probe {action}: cannot start {command[0]}: {error.strerror}") from None
    if done.returncode == -signal.SIGSEGV:
        # As bcc 0.26 ends over sources with many errors, of which it has said some.
        raise ProbeError(f"probe {action}: bcc does not compile it, but crashes: {_last_line(done.stderr)}")
    if done.returncode != 0:
        raise ProbeError(f"probe {action}: {_last_line(done.stderr) or f'ended with status {done.returncode}'}")
    return _last_line(done.stdout)


def _interpreter() -> str:
    if importlib.util.find_spec("bcc") is None and os.path.exists(_SYSTEM_PYTHON):
        return _SYSTEM_PYTHON
    return sys.executable


def _package_root() -> str:
    return str(Path(__file__).resolve().parents[2])


def _last_line(output: bytes) -> str:
    lines = output.decode("utf-8", "backslashreplace").strip().splitlines()
    return lines[-1].strip() if lines else ""
