"""Times each witness alone on one connection. Run in the node's network; prints JSON: witness -> microseconds.

python3 -m bench.lookup PIN_DIR SOURCE DESTINATION UID FAST_ROUNDS SLOW_ROUNDS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from adoptd import probe
from adoptd.connections import ConnectionWitness
from adoptd.connections.bpf import BpfWitness
from adoptd.connections.diag import DiagWitness
from adoptd.connections.proc import ProcWitness
from adoptd.deadline import Deadline
from adoptd.model import Connection, Endpoint


def main() -> int:
    """Every round's answer is checked: a fast wrong one is no figure."""
    pin_dir, source, destination, uid, fast, slow = sys.argv[1:]
    connection = Connection(Endpoint.parse(source), Endpoint.parse(destination))
    with probe.open_probe(Path(pin_dir)) as opened:
        witnesses: Sequence[Tuple[ConnectionWitness, int]] = (
            (BpfWitness(opened), int(fast)),
            (DiagWitness(), int(fast)),
            (ProcWitness(), int(slow)),
        )
        found: Dict[str, List[float]] = {}
        for witness, rounds in witnesses:
            samples = found[witness.name.value] = []
            for _ in range(rounds):
                deadline = Deadline.after_ms(30_000)
                began = time.perf_counter_ns()
                owner = witness.owner_of(connection, deadline)
                samples.append((time.perf_counter_ns() - began) / 1000)
                if owner is None or owner.uid != int(uid):
                    raise SystemExit(f"{witness.name.value}: expected an owner of uid {uid}, found {owner}")
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
