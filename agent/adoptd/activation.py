"""Sockets that the service manager opened and hands to the agent: sd_listen_fds(3), in Python.

Owns the protocol and the checks: what is handed over is used only if it is exactly what the agent would have bound
itself. Must never let a descriptor or the variables on to a child. Called by the doors; the units are in
packaging/systemd/.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from dataclasses import dataclass, field
from typing import Dict, List, MutableMapping, Optional, Sequence, Tuple

from adoptd.model import ConfigError

# SD_LISTEN_FDS_START in sd-daemon.h.
FIRST_FD = 3
# Three names, and one socket of callerid per address.
FDS_MAX = 64
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")

PAM, USER, CALLERID = "pam", "user", "callerid"
NAMES = (PAM, USER, CALLERID)


class ActivationError(ConfigError):
    """What was handed over is not what the agent needs; the text says what was found, and which setting is wrong.

    A matter of configuration: another start comes to the same.
    """


@dataclass(frozen=True)
class Passed:
    """The sockets handed over, by name."""

    sockets: Dict[str, Tuple[socket.socket, ...]] = field(default_factory=dict)

    def unix(self, name: str, path: str, mode: int) -> Optional[socket.socket]:
        """The socket ``name``, None if there is none: at ``path``, ours, and of ``mode``. Raises ActivationError."""
        passed = self.sockets.get(name, ())
        if not passed:
            return None
        if len(passed) > 1:
            raise _wrong(name, "ListenStream", f"{len(passed)} sockets", "one")
        sock = passed[0]
        if sock.family != socket.AF_UNIX:
            raise _wrong(name, "ListenStream", f"a socket of family {_word(sock.family)}", "AF_UNIX")
        bound = sock.getsockname()
        if bound != path:
            raise _wrong(name, "ListenStream", f"at {bound!r}", f"{path} as in adoptd.toml")
        try:
            found = os.lstat(path)
        except OSError as error:
            raise _wrong(name, "ListenStream", f"{path}: {error.strerror}", "its socket there") from None
        # The directory was checked by whoever configured it; the name may have been taken since.
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
            raise _wrong(name, "SocketUser", f"{path} of owner {found.st_uid}", f"a socket of owner {os.geteuid()}")
        if stat.S_IMODE(found.st_mode) != mode:
            raise _wrong(name, "SocketMode", f"mode {stat.S_IMODE(found.st_mode):04o}", f"mode {mode:04o}")
        return sock

    def tcp(self, name: str, addresses: Sequence[str], port: int) -> Optional[List[socket.socket]]:
        """The sockets ``name``, one for each of ``addresses``; None if there are none. Raises ActivationError."""
        passed = self.sockets.get(name, ())
        if not passed:
            return None
        for sock in passed:
            if sock.family not in (socket.AF_INET, socket.AF_INET6):
                raise _wrong(name, "ListenStream", f"a socket of family {_word(sock.family)}", "AF_INET or AF_INET6")
            # One for both families would show IPv4 peers, and our own address, as mapped ones.
            if sock.family == socket.AF_INET6 and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
                raise _wrong(name, "BindIPv6Only", "an IPv6 socket that takes IPv4 too", "ipv6-only")
        found = sorted((str(ipaddress.ip_address(s.getsockname()[0])), int(s.getsockname()[1])) for s in passed)
        expected = sorted((str(ipaddress.ip_address(address)), port) for address in addresses)
        if found != expected:
            raise _wrong(name, "ListenStream", _places(found), f"{_places(expected)} as in adoptd.toml")
        return list(passed)


def take_passed(environ: MutableMapping[str, str]) -> Passed:
    """The sockets meant for this process, none if there are none; the variables are removed. Raises ActivationError.

    They are non-blocking and closed on exec from here on. To be called once.
    """
    values = {name: environ.pop(name, None) for name in _VARIABLES}
    if values["LISTEN_PID"] is None or values["LISTEN_FDS"] is None:
        return Passed()
    # A parent's, which we inherited: not ours to touch (sd_listen_fds(3)).
    if values["LISTEN_PID"] != str(os.getpid()):
        return Passed()
    count = _count(values["LISTEN_FDS"])
    for fd in range(FIRST_FD, FIRST_FD + count):
        _seal_off(fd)
    names = (values["LISTEN_FDNAMES"] or "").split(":")
    if len(names) != count:
        raise ActivationError(
            f"LISTEN_FDNAMES={values['LISTEN_FDNAMES']!r} for {count} sockets: expected a name for each "
            "(FileDescriptorName= in the .socket units)"
        )
    taken: Dict[str, Tuple[socket.socket, ...]] = {}
    for fd, name in enumerate(names, FIRST_FD):
        if name not in NAMES:
            raise ActivationError(f"a socket named {name!r} was handed over, expected one of {', '.join(NAMES)}")
        taken[name] = (*taken.get(name, ()), _listening(fd, name))
    return Passed(taken)


def _count(word: str) -> int:
    if not word.isascii() or not word.isdigit() or len(word) > 3 or int(word) > FDS_MAX:
        raise ActivationError(f"LISTEN_FDS={word!r}: expected a number of at most {FDS_MAX}")
    return int(word)


def _seal_off(fd: int) -> None:
    try:
        os.set_inheritable(fd, False)
    except OSError as error:
        raise ActivationError(f"descriptor {fd} was announced by LISTEN_FDS: {error.strerror}") from None


def _listening(fd: int, name: str) -> socket.socket:
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise ActivationError(f"descriptor {fd} ({name}) is no socket")
    sock = socket.socket(fileno=fd)
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise _wrong(name, "Accept", "a socket that is not a listening stream", "Accept=no with ListenStream=")
    sock.setblocking(False)
    return sock


def _wrong(name: str, setting: str, found: str, expected: str) -> ActivationError:
    return ActivationError(
        f"the socket {name} of the service manager: found {found}, expected {expected} ({setting}= in its .socket unit)"
    )


def _word(family: int) -> str:
    try:
        return socket.AddressFamily(family).name
    except ValueError:
        return str(family)


def _places(found: Sequence[Tuple[str, int]]) -> str:
    return ", ".join(f"{address} port {port}" for address, port in found)
