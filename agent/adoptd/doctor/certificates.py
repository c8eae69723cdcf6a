"""The doctor's look at the exporter's certificate: whether the next start can use it, and until when scrapers will.

Owns what is said of the files, as functions of facts. Changes nothing, never prints a key. Called through the table of
checks.
"""

from __future__ import annotations

import ssl
import stat
import time
from typing import Iterator, Optional

from adoptd.doctor.findings import FileRule, Finding, Scene, failure, fault_of, ok, status_of, warning

_DAY_S = 86_400
_SOON_DAYS = 14
_KEY = FileRule("a regular file", 0o007, stat.S_ISREG)


def look_at_certificates(scene: Scene) -> Iterator[Finding]:
    """Where the exporter speaks TLS."""
    section = scene.settings.metrics
    if not section.enabled or not section.tls_certificate or not scene.root:
        return
    if status_of(section.tls_certificate, follow=True) is None or status_of(section.tls_key, follow=True) is None:
        return  # said by the look at the exporter
    error = load_error(section.tls_certificate, section.tls_key)
    yield from judge_certificate(section.tls_certificate, error, ends_s(section.tls_certificate), time.time())
    fault = fault_of(status_of(section.tls_key, follow=True), _KEY)
    if fault is not None:
        seen = f"{section.tls_key} {fault}: whoever has it can answer in the exporter's place"
        yield warning("metrics", seen, f"chown root {section.tls_key}; chmod o-rwx {section.tls_key}")


def judge_certificate(path: str, error: Optional[str], ends_s: Optional[float], now_s: float) -> Iterator[Finding]:
    """``error``: why certificate and key cannot be used together; ``ends_s``: when it does, None where not known."""
    if error is not None:
        seen = f"{path} and its key cannot be used: {error}; the next start exports nothing"
        yield failure(
            "metrics", seen, "put the key that belongs to the certificate there, as PEM, without a passphrase"
        )
    elif ends_s is not None and ends_s < now_s:
        seen = f"{path} ended {(now_s - ends_s) / _DAY_S:.0f} days ago: Prometheus does not take it"
        yield warning("metrics", seen, "renew it, then systemctl restart adoptd")
    elif ends_s is not None and ends_s < now_s + _SOON_DAYS * _DAY_S:
        yield warning("metrics", f"{path} ends in {(ends_s - now_s) / _DAY_S:.0f} days", "renew it in time")
    else:
        yield ok("metrics", f"{path} and its key can be used")


def load_error(certificate: str, key: str) -> Optional[str]:
    """Why the two cannot be used together; None if they can."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password it would ask whoever sits at the terminal.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        return str(error)
    return None


def ends_s(certificate: str) -> Optional[float]:
    """When it ends, by the wall clock; None where that is not known."""
    # A CA as far as this context goes, so that it can be asked what is in it.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(certificate)
        ends = [ssl.cert_time_to_seconds(str(each["notAfter"])) for each in context.get_ca_certs()]
    except (OSError, ValueError, KeyError):
        return None
    return min(ends, default=None)
