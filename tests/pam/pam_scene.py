"""Makes the place a login happens in, then becomes the driver. Started once (python3 -I -S), forks for each login:
a scene as JSON on one line of stdin, the driver's exit status on one line of stdout.

A network namespace with the sockets the test asks for, and a mount namespace with its own /etc/passwd and
/dev/log; both end with the process. The other ends of the sockets are held by a forked child, as a client
and a listening sshd would hold them, until the driver ends.
"""

import ctypes
import fcntl
import json
import os
import socket
import struct
import sys
import traceback
from typing import Dict, List, Tuple, TypedDict

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1

Sockets = List[socket.socket]


class Scene(TypedDict):
    """One line of stdin. ``driver`` is its argv; ``sockets`` are words for build(); the rest are paths."""

    driver: List[str]
    environ: Dict[str, str]
    passwd: str
    log: str
    stdout: str
    stderr: str
    sockets: List[str]


libc = ctypes.CDLL(None, use_errno=True)


def check(rc: int, what: str) -> None:
    if rc != 0:
        raise OSError(ctypes.get_errno(), what)


def mount(source: str, target: str, kind: str, flags: int) -> None:
    check(libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), None), target)


def listener(family: int, address: str, port: int, dual: bool = False, device: str = "") -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
    if device:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    made.bind((address, port))
    made.listen()
    return made


def client(family: int, address: str, port: int, own_port: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    if own_port:
        made.bind(("", own_port))
    made.connect((address, port))
    return made


def build(kind: str, number: int) -> Tuple[Sockets, Sockets]:
    """(what the driver holds, what the child holds) for one word of the scene."""
    port, own_port = 22000 + number, 40000 + number
    if kind in ("inbound4", "closing", "unserved", "duplicate", "high"):
        served = listener(socket.AF_INET, "127.0.0.1", port)
        far = client(socket.AF_INET, "127.0.0.1", port, own_port)
        near = served.accept()[0]
        if kind == "closing":
            far.shutdown(socket.SHUT_WR)
        if kind == "unserved":
            served.close()
            return [near], [far]
        if kind == "duplicate":
            return [near, near.dup()], [served, far]
        if kind == "high":
            high = socket.socket(fileno=fcntl.fcntl(near.fileno(), fcntl.F_DUPFD, 2000))
            near.close()
            near = high
        return [near], [served, far]
    if kind == "inbound6":
        served = listener(socket.AF_INET6, "::1", port)
        far = client(socket.AF_INET6, "::1", port, own_port)
        return [served.accept()[0]], [served, far]
    if kind == "mapped":
        served = listener(socket.AF_INET6, "::", port, dual=True)
        far = client(socket.AF_INET, "127.0.0.1", port, own_port)
        return [served.accept()[0]], [served, far]
    if kind == "device":
        served = listener(socket.AF_INET, "127.0.0.1", port, device="lo")
        far = client(socket.AF_INET, "127.0.0.1", port, own_port)
        return [served.accept()[0]], [served, far]
    if kind in ("outbound4", "spoiled"):
        served = listener(socket.AF_INET, "127.0.0.1", port)
        near = client(socket.AF_INET, "127.0.0.1", port, 0)
        far = served.accept()[0]
        held = [served, far]
        if kind == "spoiled":
            held.append(listener(socket.AF_INET, "127.0.0.2", near.getsockname()[1]))
        return [near], held
    if kind == "self_listener":
        return [listener(socket.AF_INET, "127.0.0.1", port)], []
    if kind == "udp":
        near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        near.connect(("127.0.0.1", port))
        return [near], []
    raise ValueError(kind)


def hold_until_the_end(held: Sockets) -> None:
    """Forks the child that holds the far ends; it goes when the driver, which has the pipe's other end, goes."""
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.close(write_end)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.read(read_end, 1)
        os._exit(0)
    os.close(read_end)
    os.set_inheritable(write_end, True)
    for one in held:
        one.close()


def become_driver(scene: Scene) -> None:
    os.dup2(os.open(scene["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
    os.dup2(os.open(scene["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    check(libc.unshare(CLONE_NEWNS | CLONE_NEWNET), "unshare")
    mount("none", "/", "none", MS_REC | MS_PRIVATE)
    mount(scene["passwd"], "/etc/passwd", "none", MS_BIND)
    mount("tmpfs", "/dev", "tmpfs", 0)
    os.mknod("/dev/null", 0o20666, os.makedev(1, 3))
    os.mknod("/dev/urandom", 0o20666, os.makedev(1, 9))
    os.symlink(scene["log"], "/dev/log")
    if scene["sockets"]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            request = fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0))
            flags = struct.unpack_from("h", request, 16)[0] | IFF_UP
            fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags))
        near: Sockets = []
        far: Sockets = []
        for number, kind in enumerate(scene["sockets"]):
            held_here, held_there = build(kind, number)
            near += held_here
            far += held_there
        hold_until_the_end(far)
        for one in near:
            os.set_inheritable(one.fileno(), True)
    os.execve(scene["driver"][0], scene["driver"], scene["environ"])


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                become_driver(json.loads(line))
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(70)
        print(os.waitpid(pid, 0)[1], flush=True)


main()
