"""Where the probe's C sources are, and the schema: one short name for exactly these sources.

Owns the search order and the hash. The schema names the directory the probe is pinned under, so an agent
never talks to a probe built from other sources than its own. Called by the pins, the loader and status.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import List, Optional, Tuple

from adoptd.model import ProbeError
from adoptd.probe import record

_HERE = Path(__file__).resolve().parent
# A source tree, a wheel, a distribution's package.
_PLACES: Tuple[Path, ...] = (_HERE.parents[2] / "bpf", _HERE / "bpf", Path("/usr/share/adoptd/bpf"))

PROGRAM = "probe.c"
WATCH_PROGRAM = "watch.c"

# Half of a SHA-256: no collision by accident, and bpffs names stay readable.
SCHEMA_DIGITS = 32


def find_sources(source_dir: Optional[Path] = None) -> Path:
    """``source_dir``, or the first place that has the sources. Raises ProbeError naming where it looked."""
    places = (source_dir,) if source_dir is not None else _PLACES
    for place in places:
        if (place / PROGRAM).is_file():
            return place
    raise ProbeError(f"no {PROGRAM} in {' or '.join(str(place) for place in places)}: the probe's sources are missing")


def schema_of(source_dir: Path) -> str:
    """The schema of the sources in ``source_dir`` together with this agent's idea of the layout.

    Raises ProbeError if a file cannot be read.
    """
    digest = hashlib.sha256()
    for part in (*record.RECORD_FIELDS, *record.QUESTION_FIELDS, *record.ANSWER_FIELDS):
        digest.update(f"{part[0]}:{part[1]};".encode())
    for part in (*record.MEMBER_FIELDS, *record.MOVE_FIELDS, *record.CONNECTED_FIELDS):
        digest.update(f"{part[0]}:{part[1]};".encode())
    digest.update(";".join(record.COUNTERS).encode())
    try:
        for path in _files(source_dir):
            data = path.read_bytes()
            # Name and length first: moving bytes from one file to the next is another schema.
            digest.update(f"\n{path.relative_to(source_dir)} {len(data)}\n".encode())
            digest.update(data)
    except OSError as error:
        raise ProbeError(f"{error.filename or source_dir}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:SCHEMA_DIGITS]


def is_schema(name: str) -> bool:
    """Whether a directory's name is some version's schema."""
    return len(name) == SCHEMA_DIGITS and all(digit in "0123456789abcdef" for digit in name)


def _files(source_dir: Path) -> List[Path]:
    return sorted(path for path in source_dir.rglob("*.[ch]") if path.is_file())
