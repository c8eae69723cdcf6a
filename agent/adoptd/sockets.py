"""Sockets as the agent binds them, and who is at the other end of one, by the kernel's word.

Owns what has to be right from a socket's first moment: its mode, its name, that nobody else serves there. Must never
remove a name that is another's. Called by the doors, and by adoptctl for who serves it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from dataclasses import dataclass
from typing import List, Sequence

from adoptd.model import AdoptdError

BACKLOG = 1024
# On this host a connect() waits only where the backlog is full.
_CONNECT_S = 0.5

# struct ucred, unix(7).
_UCRED = struct.Struct("=iII")


@dataclass(frozen=True)
class Caller:
    """Who is at the other end of a unix socket, as the kernel recorded it when they connected."""

    pid: int
    uid: int

    @classmethod
    def of(cls, sock: socket.socket) -> Caller:
        """The caller at the other end of ``sock``."""
        pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return cls(pid, uid)


@dataclass(frozen=True)
class SocketName:
    """The name of a unix socket that we bound, by its inode: another's socket of the same name is never removed."""

    path: str
    device: int
    inode: int

    @classmethod
    def of(cls, sock: socket.socket) -> SocketName:
        """The name that ``sock`` was just bound to. Raises OSError."""
        path = str(sock.getsockname())
        found = os.lstat(path)
        return cls(path, found.st_dev, found.st_ino)

    def remove(self) -> None:
        """Remove the name, while its socket still listens: until then nobody takes it for a stale one."""
        with contextlib.suppress(OSError):
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == (self.device, self.inode):
                os.unlink(self.path)


def bind_unix(path: str, mode: int) -> socket.socket:
    """A listening unix socket at ``path`` that has ``mode`` from its first moment.

    The mode is set on the socket before bind(), which makes the inode with it (unix_bind_bsd() in
    net/unix/af_unix.c); a chmod afterwards would leave a moment for others. A stale socket is replaced.
    Raises AdoptdError if somebody listens there or the path is no socket, OSError otherwise.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        os.fchmod(sock.fileno(), mode)
        umask = os.umask(0)
        try:
            sock.bind(path)
        except OSError as error:
            raise OSError(error.errno, f"{path}: {error.strerror}") from None
        finally:
            os.umask(umask)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def bind_tcp(addresses: Sequence[str], port: int) -> List[socket.socket]:
    """Listening TCP sockets, one per address. Raises OSError; then none is left open.

    On a kernel without IPv6 (ipv6.disable=1) there is none for "::" beside others: nobody connects by it.
    """
    with contextlib.ExitStack() as undo:
        sockets: List[socket.socket] = []
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            try:
                sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT and address == "::" and len(addresses) > 1:
                    continue
                raise OSError(error.errno, f"{address} port {port}: {error.strerror}") from None
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # One socket per address as configured, whatever net.ipv6.bindv6only says.
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind((address, port))
                sock.listen(BACKLOG)
            except OSError as error:
                raise OSError(error.errno, f"{address} port {port}: {error.strerror}") from None
            sock.setblocking(False)
        undo.pop_all()
    return sockets


def _remove_stale(path: str) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise AdoptdError(f"{path} is there and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_S)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except OSError as error:
            raise AdoptdError(f"{path} is in use: {error.strerror}") from None
    raise AdoptdError(f"{path} is served by another process; is an agent running already?")
