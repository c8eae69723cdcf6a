"""The doctor's look at the exporter's certificates: whether the next start can use them, and when scrapers will.

Owns what is said of the files, as functions of facts, and the reading of a certificate's dates (X.509, DER). Changes
nothing, never prints a key. Called through the table of checks.
"""

from __future__ import annotations

import binascii
import os
import ssl
import stat
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Iterator, List, Optional, Tuple

from adoptd.doctor.findings import FileRule, Finding, Scene, failure, fault_of, ok, status_of, warning

_DAY_S = 86_400
_SOON_DAYS = 14
_KEY = FileRule("a regular file", 0o007, stat.S_ISREG)
_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
_FILE_MAX_BYTES = 1 << 20
# DER: the optional version of a certificate, and the two forms of a time with their years' digits.
_VERSION = 0xA0
_TIMES = {0x17: 2, 0x18: 4}
# The object identifier of subjectAltName (2.5.29.17).
_ALTERNATIVE_NAME = bytes.fromhex("0603551d11")


@dataclass(frozen=True)
class Certificates:
    """What is in a file. ``spans``: from when until when each counts, by the wall clock, at least one. ``named``: the
    first has names in the form in which they are looked for."""

    spans: Tuple[Tuple[float, float], ...]
    named: bool = True

    def all_count(self) -> Tuple[float, float]:
        """From when until when all do, as those of a chain have to."""
        return max(begins_s for begins_s, _ in self.spans), min(ends_s for _, ends_s in self.spans)

    def last(self, now_s: float) -> Tuple[float, float]:
        """Of the one that counts longest, of those that count by now if there are such."""
        return max(self.spans, key=lambda span: (span[0] <= now_s, span[1]))


def look_at_certificates(scene: Scene) -> Iterator[Finding]:
    """Where the exporter speaks TLS."""
    section = scene.settings.metrics
    if not section.enabled or not section.tls_certificate or not scene.root:
        return
    if status_of(section.tls_certificate, follow=True) is None or status_of(section.tls_key, follow=True) is None:
        return  # said by the look at the exporter
    error = load_error(section.tls_certificate, section.tls_key)
    found = read_certificates(section.tls_certificate)
    yield from judge_certificate(section.tls_certificate, error, found, time.time())
    fault = fault_of(status_of(section.tls_key, follow=True), _KEY)
    if fault is not None:
        seen = f"{section.tls_key} {fault}: whoever has it can answer in the exporter's place"
        yield warning("metrics", seen, f"chown root {section.tls_key}; chmod o-rwx {section.tls_key}")
    if os.path.isfile(section.tls_client_ca):
        found = read_certificates(section.tls_client_ca)
        yield from judge_client_ca(section.tls_client_ca, ca_error(section.tls_client_ca), found, time.time())


def judge_certificate(
    path: str, error: Optional[str], found: Optional[Certificates], now_s: float
) -> Iterator[Finding]:
    """``error``: why certificate and key cannot be used together; ``found``: None where it cannot be told."""
    if error is not None:
        seen = f"{path} and its key cannot be used: {error}; the next start exports nothing"
        yield failure(
            "metrics", seen, "put the key that belongs to the certificate there, as PEM, without a passphrase"
        )
        return
    late = None if found is None else _out_of_time(path, found.all_count(), now_s, "Prometheus does not take it")
    if late is not None:
        yield late
    elif found is not None and not found.named:
        seen = f"{path} has no subjectAltName: Prometheus finds no name in it, and does not take it"
        yield warning("metrics", seen, "renew it with one: -addext subjectAltName=DNS:NODE,IP:ADDRESS of openssl req")
    else:
        yield ok("metrics", f"{path} and its key can be used")


def judge_client_ca(path: str, error: Optional[str], found: Optional[Certificates], now_s: float) -> Iterator[Finding]:
    """What Prometheus' own certificate is checked by. ``error``: why it cannot be loaded."""
    if error is not None:
        seen = f"{path} cannot be used: {error}; the next start exports nothing"
        yield failure("metrics", seen, "put the certificate there, as PEM, that Prometheus' own is signed by")
    elif found is not None:
        # While one is replaced both are in the file, and one that still counts is enough.
        late = _out_of_time(path, found.last(now_s), now_s, "the exporter does not believe Prometheus")
        if late is not None:
            yield late


def _out_of_time(path: str, span: Tuple[float, float], now_s: float, effect: str) -> Optional[Finding]:
    begins_s, ends_s = span
    left, until = (ends_s - now_s) / _DAY_S, (begins_s - now_s) / _DAY_S
    if left < 0:
        seen = f"{path} ended {-left:.0f} days ago: {effect}"
        return warning("metrics", seen, "renew it (where there are several in it, each), then systemctl restart adoptd")
    if until > 0:
        seen = f"{path} counts from {_date(begins_s)} on, in {until:.1f} days: until then {effect}"
        return warning("metrics", seen, "date: is this node's clock right? Else renew it")
    if left < _SOON_DAYS:
        return warning("metrics", f"{path} ends in {left:.0f} days", "renew it in time")
    return None


def _date(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def load_error(certificate: str, key: str) -> Optional[str]:
    """Why the two cannot be used together; None if they can."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password it would ask whoever sits at the terminal.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        return str(error)
    return None


def ca_error(path: str) -> Optional[str]:
    """Why nobody can be checked by what is in the file; None if they can."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def read_certificates(path: str) -> Optional[Certificates]:
    """Of all that are in a PEM file; None where there is none that can be read."""
    # Python's ssl tells the dates of authorities alone (get_ca_certs), and an exporter's certificate is none.
    try:
        with open(path, "rb") as opened:
            text = opened.read(_FILE_MAX_BYTES).decode("ascii", "replace")
        found = [ssl.PEM_cert_to_DER_cert(each) for each in _encoded(text)]
        spans = tuple(_validity(each) for each in found)
    except (OSError, ValueError, IndexError, binascii.Error):
        return None
    if not spans:
        return None
    return Certificates(spans, _ALTERNATIVE_NAME in found[0])


def _encoded(text: str) -> Iterator[str]:
    """The certificates in ``text``, in one pass however many begin and do not end."""
    for part in text.split(_BEGIN)[1:]:
        body, end, _ = part.partition(_END)
        if end:
            yield f"{_BEGIN}{body}{_END}"


def _validity(certificate: bytes) -> Tuple[float, float]:
    """From when until when it counts. Raises ValueError or IndexError for what is no certificate."""
    _, content = _parts(certificate)[0]
    fields = _parts(_parts(content)[0][1])
    if fields[0][0] == _VERSION:
        del fields[0]
    # serialNumber, signature, issuer, validity (RFC 5280, 4.1)
    begins, ends = _parts(fields[3][1])
    return _time(*begins), _time(*ends)


def _parts(data: bytes) -> List[Tuple[int, bytes]]:
    """The values one after another in ``data``, each with its tag."""
    found: List[Tuple[int, bytes]] = []
    at = 0
    while at < len(data):
        tag, length, at = data[at], data[at + 1], at + 2
        if length & 0x80:
            count = length & 0x7F
            length, at = int.from_bytes(data[at : at + count], "big"), at + count
        found.append((tag, data[at : at + length]))
        at += length
    return found


def _time(tag: int, text: bytes) -> float:
    digits = _TIMES.get(tag)
    if digits is None:
        raise ValueError("no time")
    said = text.decode("ascii")
    # Two digits are of 1950 to 2049.
    century = "" if digits == 4 else "19" if said[:2] >= "50" else "20"
    return datetime.strptime(f"{century}{said}", "%Y%m%d%H%M%SZ").replace(tzinfo=timezone.utc).timestamp()
