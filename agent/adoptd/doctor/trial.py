"""A probe loaded beside the one in use, tested and removed: whether this kernel takes it.

Run as a program of its own by the doctor, which may be interrupted: this clears up all the same. Must leave nothing:
pins are in a directory of its own, named after this process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Optional

from adoptd import probe
from adoptd.model import ProbeError

TRIAL_PREFIX = "adoptd-doctor-"


def try_probe(bpffs: Path, source_dir: Optional[Path]) -> str:
    """What went wrong; "" if nothing did. Blocks for a second or two."""
    place = bpffs / f"{TRIAL_PREFIX}{os.getpid()}"
    try:
        probe.load(place, source_dir)
        with probe.open_probe(place, source_dir) as opened:
            probe.self_test(opened)
        said = ""
    except ProbeError as error:
        said = str(error)
    try:
        if place.exists():
            probe.unload(place)
            place.rmdir()
    except FileNotFoundError:
        pass
    except (OSError, ProbeError) as error:
        return said or f"it cannot be removed again: {error}"
    return said


def _main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    source_dir = Path(sys.argv[2]) if sys.argv[2] else None
    print(json.dumps({"error": try_probe(Path(sys.argv[1]), source_dir)}))


if __name__ == "__main__":
    _main()
