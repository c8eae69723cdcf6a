"""Connections by what becomes of the process that made them, and by whose it is. Rows of owner_cases."""

from __future__ import annotations

import array
import ctypes
import os
import signal
import socket
import threading
from pathlib import Path

from kernel.actors import (
    ALICE,
    BOB,
    CLONE_FILES,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    LIBC,
    Line,
    become,
    bound,
    fork,
    join,
    receive_socket,
    send_socket,
)
from kernel.owner_scene import connect_to, ordinary
from lab.waiting import until

PR_SET_DUMPABLE = 4
_SYS_CLONE = 56


def in_a_thread(line: Line, server: socket.socket) -> None:
    client, ports = bound(), []
    thread = threading.Thread(target=lambda: ports.append(connect_to(client, server)))
    thread.start()
    thread.join()
    line.say(client, *ports)
    line.wait()


def parent_gone(line: Line, server: socket.socket) -> None:
    client = bound()
    port, ours = connect_to(client, server), os.getpid()

    def hold() -> None:
        until(lambda: os.getppid() != ours, "the parent is gone")
        line.say(client, port, pid=ours)
        line.wait()

    fork(hold)


def child_connected(line: Line, server: socket.socket) -> None:
    client = bound()
    port = client.getsockname()[1]
    pid = join(fork(lambda: client.connect(server.getsockname())))
    line.say(client, port, pid=pid)
    line.wait()


def passed_on(line: Line, server: socket.socket) -> None:
    ours, theirs = socket.socketpair()

    def take() -> None:
        become(BOB)
        ours.close()
        client = receive_socket(theirs)
        assert ours.fileno() == -1
        assert theirs.recv(1) == b""  # whoever sent it is gone
        line.say(client, client.getsockname()[1], pid=giver)
        line.wait()

    giver = os.getpid()
    taker = os.fork()
    if taker == 0:
        giver = os.getppid()
        take()
    theirs.close()
    become(ALICE)
    client = bound()
    connect_to(client, server)
    send_socket(ours, client)


def executed(line: Line, server: socket.socket) -> None:
    client = bound()
    line.say(client, connect_to(client, server))
    os.set_inheritable(client.fileno(), True)
    os.execv("/bin/sleep", ["sleep", "600"])


def shared_files(line: Line, server: socket.socket) -> None:
    client = bound()
    port = client.getsockname()[1]
    # A child with the same table of descriptors: what one connects, the other has.
    pid = LIBC.syscall(_SYS_CLONE, CLONE_FILES | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(client.connect_ex(server.getsockname()))
    line.say(client, port, pid=join(pid))
    line.wait()


def taken_by_pidfd(line: Line, server: socket.socket) -> None:
    """Another process of the user's takes the descriptor (pidfd_getfd), and the one that connected ends."""
    ready, told = os.pipe()

    def connect() -> None:
        client = bound()
        connect_to(client, server)
        os.write(told, array.array("i", [client.fileno()]).tobytes())
        signal.pause()

    LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    pid = fork(connect)
    (number,) = array.array("i", os.read(ready, 4))
    pidfd = os.pidfd_open(pid)
    taken = LIBC.syscall(438, pidfd, number, 0)
    assert taken >= 0, os.strerror(ctypes.get_errno())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    client = socket.socket(fileno=taken)
    line.say(client, client.getsockname()[1], pid=pid)
    line.wait()


def duplicated(line: Line, server: socket.socket) -> None:
    client = bound()
    port = connect_to(client, server)
    other = client.dup()
    client.close()
    line.say(other, port)
    line.wait()


def user_namespace(line: Line, server: socket.socket) -> None:
    # Who has just changed users is not dumpable, and then may not write its own map.
    LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    assert LIBC.unshare(CLONE_NEWUSER) == 0, os.strerror(ctypes.get_errno())
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {ALICE} 1")
    assert os.getuid() == 0
    ordinary(line, server)


def pid_namespace(line: Line, server: socket.socket) -> None:
    assert LIBC.unshare(CLONE_NEWPID) == 0
    become(ALICE)
    client = bound()
    port = client.getsockname()[1]

    def connect() -> None:
        assert os.getpid() == 1
        client.connect(server.getsockname())

    line.say(client, port, pid=join(fork(connect)))
    line.wait()


def for_two_users(line: Line, server: socket.socket) -> None:
    """As a set-user-ID program of BOB's that ALICE runs."""
    become(ALICE, effective=BOB)
    ordinary(line, server)


def another_users_socket(line: Line, server: socket.socket) -> None:
    os.seteuid(BOB)
    client = bound()
    os.seteuid(0)
    become(ALICE)
    line.say(client, connect_to(client, server))
    line.wait()


def held_by_two(line: Line, server: socket.socket) -> None:
    client = bound()
    port = connect_to(client, server)

    def hold() -> None:
        line.say(client, port, pid=os.getppid())
        signal.pause()

    fork(hold)
    line.wait()
