"""A process whose memory cannot be read: its user's own FUSE server holds it locked. Run as a program.

Argument: a directory of the user's to mount on, in a user namespace of its own. Says READY and its pid when its
memory is held, then waits for the end of its input. Only the server has the FUSE device open, and ends with this
process's input: then all is free.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
import threading
import time
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWUSER, _CLONE_NEWNS = 0x10000000, 0x20000
_MS_NOSUID, _MS_NODEV = 0x2, 0x4
# include/uapi/linux/fuse.h: FUSE_LOOKUP and so on, FOPEN_DIRECT_IO, and one reply header.
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _WRITE, _INIT, _INTERRUPT, _BATCH_FORGET = 1, 2, 3, 14, 15, 16, 26, 36, 42
_DIRECT_IO = 1
_REPLY = struct.Struct("=IiQ")
_ENOSYS = 38
_FILE, _FILE_BYTES = 2, 4096
# Of struct fuse_write_in, behind the header.
_WRITE_SIZE_AT = 40 + 16
_DIRTYING, _MAPPING = 1, 2
_LOOKS = 20


def main(where: str) -> None:
    uid, gid = os.geteuid(), os.getegid()
    _called(_LIBC.unshare(_CLONE_NEWUSER | _CLONE_NEWNS))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id={uid},group_id={gid}".encode()
    _called(_LIBC.mount(b"held", where.encode(), b"fuse", _MS_NOSUID | _MS_NODEV, options))
    # What this process is at, for its server.
    doing = mmap.mmap(-1, mmap.PAGESIZE)
    if os.fork() == 0:
        threading.Thread(target=_serve, args=(device, uid, gid, doing), daemon=True).start()
        sys.stdin.buffer.read()
        os._exit(0)
    os.close(device)
    shared_file = os.open(f"{where}/file", os.O_RDWR)
    direct_file = os.open(f"{where}/file", os.O_RDONLY)
    shared = mmap.mmap(shared_file, _FILE_BYTES, mmap.MAP_SHARED)
    _LIBC.mmap.restype = ctypes.c_void_p
    _LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    # The second has a dirty page written first, which the server never says was done, with the memory's lock held.
    # Where the kernel has written the page by itself in between, it returns at once. The end of the server is ours.
    while True:
        doing[0] = _DIRTYING
        shared[0] = 1
        doing[0] = _MAPPING
        _LIBC.mmap(None, _FILE_BYTES, mmap.PROT_READ, mmap.MAP_PRIVATE, direct_file, 0)


def _called(result: int) -> None:
    if result != 0:
        sys.exit(f"hung_memory: {os.strerror(ctypes.get_errno())}")


def _holds(pid: int, doing: mmap.mmap) -> bool:
    """Whether the process waits for a write in mmap(), with the lock. Otherwise it does in a page fault.

    In mmap() it may also wait for a moment for something else.
    """
    seen = 0
    while seen < _LOOKS:
        at = doing[0]
        waits = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"
        if waits and at == _DIRTYING:
            return False
        seen = seen + 1 if waits and at == doing[0] else 0
        time.sleep(0.001)
    return True


def _serve(device: int, uid: int, gid: int, doing: mmap.mmap) -> None:
    opened = 0
    while True:
        request = os.read(device, 1 << 18)
        _, operation, unique, node = struct.unpack_from("=IIQQ", request)
        mode, size = (0o040755, 0) if operation == _GETATTR and node == 1 else (0o100644, _FILE_BYTES)
        attributes = struct.pack("=6Q10I", _FILE, size, 1, 0, 0, 0, 0, 0, 0, mode, 1, uid, gid, 0, 4096, 0)
        body, error = b"", 0
        if operation == _INIT:
            body = struct.pack("=IIIIHHIIHHII28x", 7, 31, 65536, 0, 12, 10, 65536, 1, 16, 0, 0, 0)[:64]
        elif operation == _LOOKUP:
            body = struct.pack("=QQQQII", _FILE, 0, 3600, 3600, 0, 0) + attributes
        elif operation == _GETATTR:
            body = struct.pack("=QII", 3600, 0, 0) + attributes
        elif operation == _OPEN:
            opened += 1
            body = struct.pack("=QII", opened, _DIRECT_IO if opened > 1 else 0, 0)
        elif operation == _READ:
            body = bytes(_FILE_BYTES)
        elif operation == _WRITE:
            if _holds(os.getppid(), doing):
                os.write(1, b"READY %d\n" % os.getppid())
                continue
            (written,) = struct.unpack_from("=I", request, _WRITE_SIZE_AT)
            body = struct.pack("=II", written, 0)
        elif operation in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            continue
        else:
            error = -_ENOSYS
        os.write(device, _REPLY.pack(_REPLY.size + len(body), error, unique) + body)


if __name__ == "__main__":
    main(sys.argv[1])
