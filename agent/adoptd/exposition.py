"""How the metrics leave the agent: over HTTP or HTTPS, or as a file for a site that opens no port.

Owns the bounds around prometheus-client's own HTTP handler, TLS, and the writing of the file. Must never let a
scraper cost a login anything, nor write where somebody else could have put a link. Called by the service's doors.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import stat
import threading
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Dict, Optional, Tuple, Union

from prometheus_client import CollectorRegistry, MetricsHandler, write_to_textfile

# Prometheus has one connection; some more for a second server and a person. A request is sent with the connection.
SCRAPES_MAX = 16
SCRAPE_READ_S = 2.0
# As often as a usual scrape; whoever reads the file looks at its time.
TEXTFILE_INTERVAL_S = 15.0

_Request = Union[socket.socket, Tuple[bytes, socket.socket]]


@dataclass(frozen=True)
class Tls:
    """Paths of PEM files. ``client_ca``: who may ask; None: everybody who reaches the port."""

    certificate: str
    key: str
    client_ca: Optional[str] = None

    def context(self) -> ssl.SSLContext:
        """As it is on disk now. Raises OSError naming the file that cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate, self.key)
        except OSError as error:
            files = f"tls_certificate {self.certificate}, tls_key {self.key}"
            raise OSError(error.errno, f"[metrics] {files}: {error.strerror or error}") from None
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except OSError as error:
                raise OSError(
                    error.errno, f"[metrics] tls_client_ca {self.client_ca}: {error.strerror or error}"
                ) from None
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def times(self) -> Tuple[int, ...]:
        """What changes when a file does. Raises OSError."""
        return tuple(Path(path).stat().st_mtime_ns for path in (self.certificate, self.key, self.client_ca) if path)


def serve(registry: CollectorRegistry, address: str, port: int, tls: Optional[Tls] = None) -> None:
    """Serve /metrics from a thread. Raises OSError if the port cannot be had or a file of ``tls`` not be used."""
    try:
        server = _ScrapeServer(address, port, registry, tls)
    except OSError as error:
        raise OSError(error.errno, f"/metrics on {address} port {port}: {error.strerror}") from None
    # A daemon: it ends with the process.
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def write_textfile(registry: CollectorRegistry, path: str) -> None:
    """Write the metrics to ``path``, whole or not at all (for node_exporter's textfile collector).

    Raises OSError, also if anybody but root could put a link in the way of the file.
    """
    directory = Path(path).parent
    found = directory.stat()
    if found.st_uid != 0 or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"[metrics] textfile: {directory} is of uid {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}; "
            "expected a directory that is root's and that nobody else can write to"
        )
    # Its reader is another user, whatever our umask; and must not find it before it may read it.
    new = f"{path}.new"
    write_to_textfile(new, registry)
    os.chmod(new, 0o644)
    os.replace(new, path)


class _ScrapeHandler(MetricsHandler):
    timeout = SCRAPE_READ_S

    def do_GET(self) -> None:
        # One at a time: threads that render all at once would fight the event loop for the interpreter.
        if isinstance(self.server, _ScrapeServer):
            self.server.heard(self.connection)
            with self.server.rendering:
                super().do_GET()


class _ScrapeServer(ThreadingHTTPServer):
    """prometheus-client's handler behind bounds, which its own server lacks: any user of the node reaches it.

    As at the other doors, over the bound who was silent longest goes.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: str, port: int, registry: CollectorRegistry, tls: Optional[Tls]) -> None:
        if ":" in address:
            self.address_family = socket.AF_INET6
        self.rendering = threading.Lock()
        self._lock = threading.Lock()
        # Who is served, oldest first; True: has sent a request.
        self._served: Dict[object, bool] = {}
        self._tls = tls
        self._context: Optional[ssl.SSLContext] = None if tls is None else tls.context()
        self._read: Tuple[int, ...] = () if tls is None else tls.times()
        super().__init__((address, port), _ScrapeHandler.factory(registry))

    def get_request(self) -> Tuple[socket.socket, object]:
        """Accept; with TLS, the handshake is left to the connection's own thread, which has a timeout."""
        connection, address = super().get_request()
        if self._tls is None or self._context is None:
            return connection, address
        # A renewed certificate is taken up; one that is only half there yet is not.
        with contextlib.suppress(OSError):
            times = self._tls.times()
            if times != self._read:
                self._context, self._read = self._tls.context(), times
        wrapped = self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return wrapped, address

    def heard(self, connection: socket.socket) -> None:
        """The request has come: this connection is no longer one that may be dropped for its silence."""
        with self._lock:
            if connection in self._served:
                self._served[connection] = True

    def process_request(self, request: _Request, client_address: object) -> None:
        with self._lock:
            self._served[request] = False
            if len(self._served) > SCRAPES_MAX:
                silent = next(each for each, heard in self._served.items() if not heard)
                # Its thread reads the end and closes it. Forgotten now: the next one must not choose it again.
                del self._served[silent]
                if isinstance(silent, socket.socket):
                    with contextlib.suppress(OSError):
                        # The plain socket's: an SSLSocket that is shut down forgets its TLS, for its thread too.
                        socket.socket.shutdown(silent, socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: _Request) -> None:
        with self._lock:
            self._served.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: who went away, or failed the handshake, is no event, and standard error is the log's."""
