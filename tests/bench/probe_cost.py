"""Times connect() with and without the probe's connect4 program, taking turns within seconds; prints JSON.

    python3 -m bench.probe_cost PIN_DIR LOAD_PROGRAM CGROUP TURNS CONNECTS

Takes the program of the loaded probe and attaches it to CGROUP, which this process and its children are in, for
every other turn: what it costs there it costs at the root, and a turn is short beside the moods of the machine. The
probe itself must be unloaded while this runs; told to do so by a line on stdin, it answers with JSON:
``without`` and ``with``: one list per turn of [connect, cycle] nanoseconds; ``runs``, ``run_ns``: the kernel's count.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Iterator, List, Sequence, Tuple

from adoptd.probe import syscalls

# include/uapi/linux/bpf.h: two commands, the only kind of statistics, and two u64 of struct bpf_prog_info.
_INFO_BY_FD = 15
_LINK_CREATE = 28
_ENABLE_STATS = 32
_RUN_TIME = 0
_INFO_BYTES = 232
_RUN_TIME_NS_AT = 192


def main() -> int:
    """The statistics are on for the last turn only: to read the clock twice costs about as much as the program."""
    pin_dir, load, cgroup, turns, connects = sys.argv[1:]
    pinned = next(path for path in Path(pin_dir).rglob("adopt_connect4"))
    # One processor for both ends: the scheduler's choice between two is worth more than the program.
    os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    without: List[List[List[int]]] = []
    with_it: List[List[List[int]]] = []
    with contextlib.ExitStack() as stack:
        program = syscalls.obj_get(str(pinned))
        stack.callback(os.close, program)
        group = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, group)
        cycles = _Cycles([load, "cycles", "127.0.0.1", connects])
        stack.callback(cycles.close)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        cycles.turn()
        for _ in range(int(turns)):
            without.append(cycles.turn())
            with _attached(program, group):
                with_it.append(cycles.turn())
        with _attached(program, group):
            statistics = _bpf(_ENABLE_STATS, struct.pack("=I", _RUN_TIME))
            before = _run_time(program)
            for _ in range(max(1, int(turns) // 10)):
                cycles.turn()
            after = _run_time(program)
            os.close(statistics)
    found = {"without": without, "with": with_it, "run_ns": after[0] - before[0], "runs": after[1] - before[1]}
    json.dump(found, sys.stdout)
    return 0


@contextlib.contextmanager
def _attached(program: int, group: int) -> Iterator[None]:
    link = _bpf(_LINK_CREATE, struct.pack("=IIII", program, group, syscalls.ATTACH_CGROUP_INET4_CONNECT, 0))
    try:
        yield
    finally:
        os.close(link)


class _Cycles:
    """One process that makes connections for every turn."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def turn(self) -> List[List[int]]:
        """[connect, cycle] nanoseconds of each."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()
        words = [int(word) for word in self._process.stdout.readline().split()]
        if not words:
            raise RuntimeError("the connecting process has ended")
        return [[words[at], words[at + 1]] for at in range(0, len(words), 2)]

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


def _run_time(program: int) -> Tuple[int, int]:
    info = ctypes.create_string_buffer(_INFO_BYTES)
    _bpf(_INFO_BY_FD, struct.pack("=IIQ", program, _INFO_BYTES, ctypes.addressof(info)))
    nanoseconds, runs = struct.unpack_from("=QQ", info.raw, _RUN_TIME_NS_AT)
    return nanoseconds, runs


def _bpf(command: int, attributes: bytes) -> int:
    return syscalls._bpf(command, ctypes.create_string_buffer(attributes.ljust(128, b"\0"), 128))


if __name__ == "__main__":
    sys.exit(main())
