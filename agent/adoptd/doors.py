"""Which doors the agent has, and how each comes to be: taken over from the service manager, or bound here.

Owns the order (bind, then accept, then close), the TCP ports that are shut and tried again, and the names that are
removed at the end. Must never take over a socket that is not exactly what would have been bound, nor keep logins
waiting for a port. Built by the service; behind the doors are the handlers.
"""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from adoptd import exposition, log
from adoptd.activation import CALLERID, PAM, USER, Passed
from adoptd.config import Config
from adoptd.handlers import Handlers
from adoptd.metrics import Door, Metrics
from adoptd.monitoring import tls_of
from adoptd.server import (
    LOCAL_READ_S,
    PAM_MAX,
    PEER_MAX,
    PEER_MAX_PER_ADDRESS,
    PEER_READ_S,
    USER_KEPT_FOR_ROOT,
    USER_MAX,
    USER_MAX_PER_UID,
    Doorkeeper,
    Handler,
)
from adoptd.sockets import BACKLOG, SocketName, bind_tcp, bind_unix

PAM_MODE = 0o600
USER_MODE = 0o666

# How often a port that is taken is tried again.
_PORT_RETRY_S = 2.0

METRICS_PORT = "metrics"


class Doors:
    """The doors of one agent. ``handlers`` are behind them; ``passed`` is what the service manager handed over."""

    def __init__(self, settings: Config, handlers: Handlers, metrics: Metrics, passed: Passed) -> None:
        self._settings = settings
        self._handlers = handlers
        self._metrics = metrics
        self._passed = passed
        self._doors: List[Doorkeeper] = []
        # Ports that are not open, by name, and what opens them; and what was said of each last.
        self._shut_ports: Dict[str, Callable[[], None]] = {}
        self._port_faults: Dict[str, str] = {}

    @property
    def taken_ports(self) -> Tuple[str, ...]:
        """The ports that somebody else has, by name, so that we do not serve there."""
        return tuple(sorted(self._port_faults))

    def bind(self) -> None:
        """Have the unix sockets: whoever connects from now on waits in their backlog. Raises AdoptdError, OSError."""
        agent, handlers = self._settings.agent, self._handlers
        self._unix(Door.PAM, PAM, agent.pam_socket, PAM_MODE, handlers.pam, (PAM_MAX, None))
        self._unix(Door.USER, USER, agent.user_socket, USER_MODE, handlers.user, (USER_MAX, USER_MAX_PER_UID))
        callerid, metrics = self._settings.callerid, self._settings.metrics
        if callerid.enabled:
            passed = self._passed.tcp(CALLERID, callerid.listen, callerid.port)
            if passed is not None:
                for sock in passed:
                    _take_over(sock)
                self._peers(passed, outlive_us=True)
            else:
                self._shut_ports[CALLERID] = self._open_callerid
        elif self._passed.sockets.get(CALLERID):
            log.warning(
                "socket_unused",
                socket=CALLERID,
                error="[callerid] enabled is false",
                effect="who connects is not served",
            )
        if metrics.enabled:
            self._shut_ports[METRICS_PORT] = lambda: exposition.serve(
                self._metrics.registry, metrics.listen, metrics.port, tls_of(metrics)
            )

    def open(self) -> None:
        """Serve who has come and who will."""
        for door in self._doors:
            door.open()
        self._open_ports()

    async def seek_ports(self) -> None:
        """Try the ports that are taken again, until all are open."""
        while self._shut_ports:
            await asyncio.sleep(_PORT_RETRY_S)
            self._open_ports()

    async def close(self, within_s: float) -> None:
        """Accept no more, and give who is being served ``within_s`` seconds."""
        self._shut_ports.clear()
        await asyncio.gather(*(door.close(within_s) for door in self._doors))

    def _unix(
        self, door: Door, name: str, path: str, mode: int, handler: Handler, bounds: Tuple[int, Optional[int]]
    ) -> None:
        sock = self._passed.unix(name, path, mode)
        names: Sequence[SocketName] = ()
        if sock is None:
            make_directory(Path(path).parent)
            bound = bind_unix(path, mode)
            names = (SocketName.of(bound),)
        else:
            _take_over(sock)
            bound = sock
        self._doors.append(
            Doorkeeper(
                door,
                [bound],
                handler,
                self._metrics,
                LOCAL_READ_S,
                *bounds,
                names=names,
                outlive_us=sock is not None,
                kept_for_root=USER_KEPT_FOR_ROOT if door is Door.USER else 0,
            )
        )

    def _open_callerid(self) -> None:
        section = self._settings.callerid
        self._peers(bind_tcp(section.listen, section.port), outlive_us=False).open()

    def _peers(self, sockets: Sequence[socket.socket], *, outlive_us: bool) -> Doorkeeper:
        door = Doorkeeper(
            Door.PEER,
            sockets,
            self._handlers.peer,
            self._metrics,
            PEER_READ_S,
            PEER_MAX,
            PEER_MAX_PER_ADDRESS,
            outlive_us=outlive_us,
        )
        self._doors.append(door)
        return door

    def _open_ports(self) -> None:
        """Open those of our TCP ports that are shut. One that is taken is said once, and never keeps logins waiting.

        Any user can take a port above 1024 while no agent has it. An agent that would not start then leaves every
        login to action_generic_failure, and so lets the user in who took the port.
        """
        for name, open_port in list(self._shut_ports.items()):
            try:
                open_port()
            except OSError as error:
                fault = error.strerror or str(error)
                if self._port_faults.get(name) != fault:
                    log.error("port_unavailable", port=name, error=fault, effect="tried again until it opens")
                self._port_faults[name] = fault
            else:
                del self._shut_ports[name]
                if self._port_faults.pop(name, None) is not None:
                    log.info("port_opened", port=name)


def _take_over(sock: socket.socket) -> None:
    # Again, with our backlog; and whoever called listen() last is whom SO_PEERCRED names to those who connect.
    sock.listen(BACKLOG)


def make_directory(directory: Path) -> None:
    """Make the directory of a socket, open to all: the umask of whoever starts the agent is about other things."""
    umask = os.umask(0o022)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    finally:
        os.umask(umask)
