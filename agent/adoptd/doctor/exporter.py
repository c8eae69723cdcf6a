"""The doctor's look at the metrics: fetched as Prometheus would, or the text file's age.

Called through the table of checks.
"""

from __future__ import annotations

import http.client
import os
import ssl
import stat
import time
from typing import Iterator, Optional, Tuple

from adoptd.config import MetricsConfig
from adoptd.doctor.findings import Finding, Scene, failure, ok, warning
from adoptd.doctor.ports import own_address

_EXPORTER_S = 1.5


def look_at_exporter(scene: Scene) -> Iterator[Finding]:
    """Fetch the metrics as Prometheus would."""
    section = scene.settings.metrics
    if not section.enabled:
        if section.textfile:
            yield from judge_textfile(section.textfile, _age_s(section.textfile))
        else:
            yield warning(
                "metrics", "not exported: [metrics] enabled is false and textfile is empty", "set one of the two"
            )
        return
    for path in filter(None, (section.tls_certificate, section.tls_key, section.tls_client_ca)):
        if not os.path.isfile(path):
            seen = f"{path} is {'no file' if os.path.lexists(path) else 'missing'}: the next start exports nothing"
            yield failure("metrics", seen, "put it there, or take TLS out")
    if section.tls_client_ca:
        yield ok("metrics", "not fetched: that takes a client certificate, which is Prometheus's")
        return
    where = f"{own_address((section.listen,))} port {section.port}"
    try:
        status, body = _fetch(section)
    except (OSError, http.client.HTTPException) as error:
        remedy = "systemctl restart adoptd; look at [metrics] and who has the port"
        yield warning("metrics", f"{where}: {error}", remedy, cause="agent")
        return
    if status == 200 and b"\nadoptd_" in body:
        yield ok("metrics", f"{where}: {body.count(bytes([10]))} lines")
    else:
        seen = f"{where} answers with status {status}, and not with the agent's metrics"
        yield warning("metrics", seen, f"somebody else has the port: ss -ltnp sport = :{section.port}")


def judge_textfile(path: str, age_s: Optional[float]) -> Iterator[Finding]:
    """It is written every few seconds."""
    if age_s is None:
        yield warning("metrics", f"{path} is missing", "make its directory, root's and in ReadWritePaths= of the unit")
    elif age_s > 300:
        yield warning("metrics", f"{path} is {age_s:.0f} s old", "systemctl restart adoptd; is the directory writable?")
    else:
        yield ok("metrics", f"{path} is {age_s:.0f} s old")


def _age_s(path: str) -> Optional[float]:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return time.time() - found.st_mtime if stat.S_ISREG(found.st_mode) else None


def _fetch(section: MetricsConfig) -> Tuple[int, bytes]:
    host = str(own_address((section.listen,)))
    if section.tls_certificate:
        # Of interest is whether it answers; whose certificate it is Prometheus checks.
        context = ssl._create_unverified_context()  # noqa: S323 (as said above)
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, section.port, timeout=_EXPORTER_S, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, section.port, timeout=_EXPORTER_S)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        return answer.status, b"\n" + answer.read(4 << 20)
    finally:
        connection.close()
