"""connect() by io_uring, spoken to the kernel directly: there is no wrapper in Python or in every C library.

Only what one request takes: set up, one submission, one completion (include/uapi/linux/io_uring.h).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct
import time

_SETUP, _ENTER = 425, 426
_OP_CONNECT = 16
IOSQE_ASYNC = 1 << 4
SETUP_SQPOLL = 1 << 1
_ENTER_GETEVENTS, _ENTER_SQ_WAKEUP = 1, 2
_OFF_SQ_RING, _OFF_CQ_RING, _OFF_SQES = 0, 0x8000000, 0x10000000
_PARAMS_BYTES = 120
_WAIT_S = 20.0

_libc = ctypes.CDLL(None, use_errno=True)


def connect(client: socket.socket, server: socket.socket, setup_flags: int = 0, request_flags: int = 0) -> None:
    """Connect ``client`` to where ``server`` listens (IPv4), in one io_uring request. Raises OSError."""
    params = ctypes.create_string_buffer(_PARAMS_BYTES)
    # Entries, sizes and the poller's idle time are the third to fifth words.
    struct.pack_into("=IIIII", params, 0, 0, 0, setup_flags, 0, 2000)
    ring = _check(_libc.syscall(_SETUP, 4, params))
    try:
        sq_entries, cq_entries = struct.unpack_from("=II", params, 0)
        # struct io_sqring_offsets at byte 40: head, tail, ring_mask, ring_entries, flags, dropped, array.
        _, sq_tail, _, _, _, _, sq_array = struct.unpack_from("=7I", params, 40)
        # struct io_cqring_offsets at byte 80: head, tail, ring_mask, ring_entries, overflow, cqes.
        cq_head, cq_tail, _, _, _, cqes = struct.unpack_from("=6I", params, 80)
        with (
            mmap.mmap(ring, sq_array + sq_entries * 4, offset=_OFF_SQ_RING) as submission,
            mmap.mmap(ring, cqes + cq_entries * 16, offset=_OFF_CQ_RING) as completion,
            mmap.mmap(ring, sq_entries * 64, offset=_OFF_SQES) as entries,
        ):
            host, port = server.getsockname()
            name = ctypes.create_string_buffer(
                struct.pack("=H", socket.AF_INET) + port.to_bytes(2, "big") + socket.inet_aton(host) + bytes(8), 16
            )
            # opcode, flags, ioprio, fd, off (the name's length), addr, len, op flags, user data
            entry = (_OP_CONNECT, request_flags, 0, client.fileno(), 16, ctypes.addressof(name), 0, 0, 1)
            struct.pack_into("=BBHiQQIIQ", entries, 0, *entry)
            struct.pack_into("=I", submission, sq_array, 0)
            struct.pack_into("=I", submission, sq_tail, 1)
            flags = _ENTER_GETEVENTS | (_ENTER_SQ_WAKEUP if setup_flags & SETUP_SQPOLL else 0)
            _check(_libc.syscall(_ENTER, ring, 1, 1, flags, None, 0))
            end = time.monotonic() + _WAIT_S
            while struct.unpack_from("=I", completion, cq_tail) == struct.unpack_from("=I", completion, cq_head):
                assert time.monotonic() < end, f"io_uring did not complete connect() in {_WAIT_S} s"
            _, result = struct.unpack_from("=Qi", completion, cqes)
    finally:
        os.close(ring)
    if result < 0:
        raise OSError(-result, f"io_uring connect: {os.strerror(-result)}")


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        if number == errno.EPERM:
            raise PermissionError(number, "io_uring is not permitted here (kernel.io_uring_disabled, seccomp)")
        raise OSError(number, os.strerror(number))
    return result
