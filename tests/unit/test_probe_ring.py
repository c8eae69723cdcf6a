"""Reading a ring buffer: never past what is complete, never more than asked for, never anything twice."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import struct
from typing import Callable, Iterator, Mapping, Union

import pytest

from adoptd.model import ProbeError
from adoptd.probe import record, syscalls
from adoptd.probe.connects import OpenConnects
from adoptd.probe.pins import OpenProbe
from adoptd.probe.ring import Ring
from adoptd.probe.watching import OpenWatch

DATA = mmap.PAGESIZE
BUSY, DISCARDED = 1 << 31, 1 << 30


class Kernel:
    """What the kernel shows of a ring buffer, in a file: two pages of positions and the data, twice over."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ring", os.MFD_CLOEXEC)
        os.truncate(self.fd, 2 * mmap.PAGESIZE + 2 * DATA)
        self.at = 0

    def _put(self, position: int, data: bytes) -> None:
        for number, byte in enumerate(data):
            for copy in (0, DATA):
                os.pwrite(self.fd, bytes([byte]), 2 * mmap.PAGESIZE + copy + (position + number) % DATA)

    def add(self, data: bytes, flags: int = 0) -> int:
        """Write a record. Returns where, for :meth:`finish`."""
        where = self.at
        self._put(where, struct.pack("=II", len(data) | flags, 0) + data)
        self.at += (len(data) + 8 + 7) & ~7
        os.pwrite(self.fd, struct.pack("=Q", self.at), mmap.PAGESIZE)
        return where

    def finish(self, where: int, length: int) -> None:
        self._put(where, struct.pack("=I", length))

    @property
    def consumed(self) -> int:
        (position,) = struct.unpack("=Q", os.pread(self.fd, 8, 0))
        return int(position)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    yield made
    os.close(made.fd)


@pytest.fixture
def ring(kernel: Kernel) -> Iterator[Ring]:
    with contextlib.closing(Ring(os.dup(kernel.fd), DATA)) as made:
        yield made


def test_nothing_is_read_past_a_record_that_is_being_written(kernel: Kernel, ring: Ring) -> None:
    kernel.add(b"first")
    where = kernel.add(b"second", BUSY)
    kernel.add(b"third")
    assert ring.read(10) == [b"first"]
    assert ring.read(10) == []
    kernel.finish(where, 6)
    assert ring.read(10) == [b"second", b"third"]


def test_what_was_taken_back_is_passed_over(kernel: Kernel, ring: Ring) -> None:
    kernel.add(b"never", DISCARDED)
    kernel.add(b"second")
    assert ring.read(10) == [b"second"]
    assert kernel.consumed == kernel.at


def test_no_more_than_asked_for(kernel: Kernel, ring: Ring) -> None:
    for number in range(5):
        kernel.add(bytes([number]), DISCARDED if number == 1 else 0)
    assert [ring.read(2), ring.read(2), ring.read(2), ring.read(2)] == [[b"\0"], [b"\2", b"\3"], [b"\4"], []]


def test_round_and_round(kernel: Kernel, ring: Ring) -> None:
    """Records lie across the end of the data in every way."""
    for number in range(500):
        data = bytes([number % 251]) * (number % 97)
        kernel.add(data)
        assert ring.read(3) == [data]
    assert kernel.at > 5 * DATA


def test_the_next_reader_goes_on(kernel: Kernel) -> None:
    for word in (b"one", b"two"):
        kernel.add(word)
    for word in (b"one", b"two"):
        with contextlib.closing(Ring(os.dup(kernel.fd), DATA)) as ring:
            assert ring.read(1) == [word]


def test_what_is_no_ring_buffer_is_refused_and_not_leaked() -> None:
    read, write = os.pipe()
    try:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="ring buffer cannot be mapped"):
            Ring(os.dup(read), DATA)
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("kind", ["ring", "connects", "watch", "probe"])
def test_what_nobody_closes_is_closed(kernel: Kernel, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What is opened too late for who asked for it goes with the last reference. A second close() does nothing."""
    monkeypatch.setattr(syscalls, "map_info", lambda fd: syscalls.MapInfo(0, 1, 0, 0, 0, ""))

    def fd() -> int:
        return os.dup(kernel.fd)

    made: Mapping[str, Callable[[], Union[Ring, OpenConnects, OpenWatch, OpenProbe]]] = {
        "ring": lambda: Ring(fd(), DATA),
        "connects": lambda: OpenConnects(fd(), Ring(fd(), DATA)),
        "watch": lambda: OpenWatch("0" * 32, fd(), Ring(fd(), DATA)),
        "probe": lambda: OpenProbe("0" * 32, fd(), fd()),
    }
    before = len(os.listdir("/proc/self/fd"))
    dropped = [made[kind]()]
    assert len(os.listdir("/proc/self/fd")) > before
    dropped.clear()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    closed = made[kind]()
    closed.close()
    assert len(os.listdir("/proc/self/fd")) == before
    taken = fd()
    closed.close()
    os.close(taken)


@pytest.mark.parametrize(
    "data",
    [b"", b"\1\0\0\0", bytes(record.MOVE.size), struct.pack("=I", 3) + bytes(record.MOVE.size - 4)],
    ids=["empty", "short", "zeroes", "another_type"],
)
def test_an_event_that_is_not_ours_is_refused(data: bytes) -> None:
    with pytest.raises(ProbeError):
        record.decode_move(data)


def test_text_from_the_kernel_is_cut_at_its_end() -> None:
    data = record.MOVE.pack(1, 5, 10, 7, 99, 4, 1001, 2, 6, 0, 0, b"s\xffh\0left", b"/a\n\0over")
    move = record.decode_move(data)
    assert (move.told, move.pid, move.leader, move.start_ticks, move.uid) == (True, 5, 4, 7, 1001)
    assert (move.actor_pid, move.actor_uid, move.actor_comm, move.path) == (6, 0, "s\\xffh", "/a\n")
    assert (move.cgroup_id, move.hierarchy, move.moved_at_ns) == (99, 2, 10)
