"""Reading the probe's ring buffer: what happens in the kernel, in order, without asking for it.

Owns the layout that the kernel shows of a BPF ring buffer (Documentation/bpf/ringbuf.rst; Linux 5.8). Reads
what is there and never waits: the descriptor is for the event loop. What did not fit was counted by the probe
and is lost. One reader, which goes on where the one before it stopped. Called by the watch for escapes.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from typing import List

# include/uapi/linux/bpf.h: BPF_RINGBUF_BUSY_BIT, BPF_RINGBUF_DISCARD_BIT, BPF_RINGBUF_HDR_SZ.
_BUSY = 1 << 31
_DISCARDED = 1 << 30
_HEADER_BYTES = 8
_LENGTH = _DISCARDED - 1


class Ring:
    """One ring buffer, mapped. For one event loop. Closed also when nobody closes it."""

    def __init__(self, fd: int, data_bytes: int) -> None:
        """Take over ``fd``, a ring buffer of ``data_bytes``. Raises OSError if it cannot be mapped."""
        self._closed = True
        self._fd = fd
        self._mask = data_bytes - 1
        page = mmap.PAGESIZE
        try:
            # The consumer's page may be written, the producer's page and the data (mapped twice over, so that no
            # record is in two pieces) may not: kernel/bpf/ringbuf.c.
            self._consumer_map = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._data_map = mmap.mmap(fd, page + 2 * data_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise OSError(getattr(error, "errno", 0) or 0, f"ring buffer cannot be mapped: {error}") from None
        self._consumed = memoryview(self._consumer_map).cast("Q")
        self._produced = memoryview(self._data_map)[:page].cast("Q")
        self._data = memoryview(self._data_map)[page:]
        self._order = threading.Lock()
        self._closed = False

    def __del__(self) -> None:
        self.close()

    def fileno(self) -> int:
        """Readable while there are records."""
        return self._fd

    def read(self, most: int) -> List[bytes]:
        """The next records, at most ``most`` with those that the kernel took back. Never waits."""
        records: List[bytes] = []
        at = self._consumed[0]
        for _ in range(most):
            if at >= self._produced[0]:
                break
            start = at & self._mask
            header = int.from_bytes(self._data[start : start + 4], sys.byteorder)
            if header & _BUSY:
                # Being written: those after it are later, so it is waited for.
                break
            # A record is read after the word that says it is complete: an acquire, which this lock is.
            with self._order:
                length = header & _LENGTH
            if not header & _DISCARDED:
                records.append(bytes(self._data[start + _HEADER_BYTES : start + _HEADER_BYTES + length]))
            at += (length + _HEADER_BYTES + 7) & ~7
            self._consumed[0] = at
        return records

    def close(self) -> None:
        """Let go of it. Records that were not read stay. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for view in (self._consumed, self._produced, self._data):
            view.release()
        self._consumer_map.close()
        self._data_map.close()
        os.close(self._fd)
