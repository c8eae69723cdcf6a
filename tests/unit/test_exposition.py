"""How the metrics leave the agent: TLS that asks for the client's certificate, and a file that is never half there."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import urllib.request
from pathlib import Path
from typing import Optional

import pytest

from adoptd import exposition
from adoptd.exposition import Tls, serve, write_textfile
from adoptd.metrics import Metrics


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def certificate(directory: Path, name: str) -> Path:
    """A self-signed certificate NAME.crt for 127.0.0.1 with its key NAME.key."""
    made = directory / f"{name}.crt"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(made.with_suffix(".key")), "-out", str(made)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return made


def fetch(port: int, trusted: Optional[Path], client: Optional[Path] = None) -> str:
    """The exposition over HTTPS. Raises OSError."""
    context = ssl.create_default_context(cafile=None if trusted is None else str(trusted))
    if client is not None:
        context.load_cert_chain(client, client.with_suffix(".key"))
    with urllib.request.urlopen(f"https://127.0.0.1:{port}/metrics", timeout=10, context=context) as reply:
        return str(reply.read().decode())


def test_without_the_client_s_certificate_nothing_is_told(tmp_path: Path) -> None:
    """Nobody, somebody with another certificate, and plain HTTP are turned away; who is named is served."""
    server, prometheus, other = (certificate(tmp_path, name) for name in ("server", "prometheus", "other"))
    port = free_port()
    tls = Tls(str(server), str(server.with_suffix(".key")), str(prometheus))
    serve(Metrics().registry, "127.0.0.1", port, tls)
    for client in (None, other):
        with pytest.raises(OSError, match=r"certificate|alert|reset|closed|EOF|Broken pipe"):
            fetch(port, server, client)
    with pytest.raises(OSError, match=r"reset|closed|Remote|status"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)
    assert "adoptd_build_info" in fetch(port, server, prometheus)


def test_one_who_never_shakes_hands_holds_nobody_up(tmp_path: Path) -> None:
    """The handshake is in the connection's own thread: while one says nothing another is served."""
    server = certificate(tmp_path, "server")
    port = free_port()
    serve(Metrics().registry, "127.0.0.1", port, Tls(str(server), str(server.with_suffix(".key"))))
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * exposition.SCRAPES_MAX)]
    try:
        assert "adoptd_build_info" in fetch(port, server)
    finally:
        for each in silent:
            each.close()


def test_a_renewed_certificate_is_taken_up(tmp_path: Path) -> None:
    server = certificate(tmp_path, "server")
    port = free_port()
    serve(Metrics().registry, "127.0.0.1", port, Tls(str(server), str(server.with_suffix(".key"))))
    assert "adoptd_build_info" in fetch(port, server)
    old = tmp_path / "old.crt"
    old.write_bytes(server.read_bytes())
    certificate(tmp_path, "server")
    os.utime(server, ns=(1, 1))
    assert "adoptd_build_info" in fetch(port, server)
    with pytest.raises(OSError, match="certificate"):
        fetch(port, old)


def test_a_half_written_certificate_leaves_the_one_before_in_force(tmp_path: Path) -> None:
    server = certificate(tmp_path, "server")
    port = free_port()
    serve(Metrics().registry, "127.0.0.1", port, Tls(str(server), str(server.with_suffix(".key"))))
    kept = tmp_path / "kept.crt"
    kept.write_bytes(server.read_bytes())
    server.write_text("-----BEGIN CERT")
    assert "adoptd_build_info" in fetch(port, kept)


@pytest.mark.parametrize("missing", ["certificate", "key", "client_ca"])
def test_a_file_of_tls_that_cannot_be_read_is_named(tmp_path: Path, missing: str) -> None:
    """Never plain HTTP instead: the port stays shut."""
    server = certificate(tmp_path, "server")
    files = {"certificate": str(server), "key": str(server.with_suffix(".key")), "client_ca": str(server)}
    files[missing] = str(tmp_path / "absent.pem")
    port = free_port()
    with pytest.raises(OSError, match=r"absent\.pem"):
        serve(Metrics().registry, "127.0.0.1", port, Tls(**files))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root's directories are written to, and this is not root"
)


@needs_root
def test_the_file_is_written_whole_and_replaced(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    file = tmp_path / "adoptd.prom"
    file.write_text("old")
    held = file.open()
    before = os.umask(0o077)
    try:
        write_textfile(Metrics().registry, str(file))
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o644, "its reader is node_exporter's user"
    assert held.read() == "old", "a reader that had it open reads what it had opened"
    held.close()
    assert "adoptd_build_info" in file.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["adoptd.prom"]


@needs_root
@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_the_file_is_not_written_where_others_can_put_links(tmp_path: Path, mode: int) -> None:
    """The name of the temporary file can be guessed; root would write through a link of that name."""
    directory = tmp_path / "shared"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(
        PermissionError, match=rf"shared is of uid 0, mode {mode:04o}; expected a directory that is root's"
    ):
        write_textfile(Metrics().registry, str(directory / "adoptd.prom"))
    assert list(directory.iterdir()) == []


@needs_root
def test_the_file_is_not_written_into_another_user_s_directory(tmp_path: Path) -> None:
    directory = tmp_path / "theirs"
    directory.mkdir(mode=0o755)
    os.chown(directory, 12345, -1)
    with pytest.raises(PermissionError, match="is of uid 12345"):
        write_textfile(Metrics().registry, str(directory / "adoptd.prom"))
