"""Trials of what the agent does, made and undone: a probe loaded beside the one in use, a process put into a job.

Run as a program of its own by the doctor, which may be interrupted: this clears up all the same. Must leave nothing:
pins are in a directory of its own, named after this process. Has the agent's rights where there is an agent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Dict, Optional

from adoptd import config, log, probe
from adoptd.assembly import make_backend
from adoptd.deadline import Deadline
from adoptd.doctor.adopting import try_adoption
from adoptd.doctor.likeness import become_like
from adoptd.metrics import Metrics
from adoptd.model import AdoptdError, ProbeError

TRIAL_PREFIX = "adoptd-doctor-"
_JOBS_MS = 2_000.0


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


def _adopt(file: Path) -> Dict[str, object]:
    backend = make_backend(config.load(file), Metrics())
    (tried,) = try_adoption(backend, backend.all_jobs(Deadline.after_ms(_JOBS_MS)))
    return {"grade": tried.grade.name, "seen": tried.seen, "remedy": tried.remedy}


def _main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    log.silence()
    agent, what, *words = sys.argv[1:]
    said: Dict[str, object]
    try:
        if agent != "0":
            become_like(int(agent))
        if what == "adopt":
            said = _adopt(Path(words[0]))
        else:
            said = {"error": try_probe(Path(words[0]), Path(words[1]) if words[1] else None)}
    except (AdoptdError, OSError) as error:
        said = {"error": str(error)}
    print(json.dumps(said))


if __name__ == "__main__":
    _main()
