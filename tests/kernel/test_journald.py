"""The log as systemd's own journald takes it: what was sent by field is found by field.

journald runs in a mount namespace of its own, with nothing of this host's to write to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Dict

import pytest

JOURNALD = "/lib/systemd/systemd-journald"

# Everything it writes is in /run and /var/log, and of this machine's id it needs none but a valid one.
SCRIPT = f"""
set -eu
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/log
mkdir -p /run/systemd/journal /run/log/journal
echo 0123456789abcdef0123456789abcdef > /run/machine-id
mount --bind /run/machine-id /etc/machine-id
{JOURNALD} 2> /run/journald.log &
journald=$!
trap 'kill $journald; wait $journald || true' EXIT
for _ in $(seq 1000); do [ -S /run/systemd/journal/socket ] && break; sleep 0.05; done
"$1" -c "$2"
for _ in $(seq 500); do
    kill -s RTMIN+1 $journald
    journalctl --quiet --directory /run/log/journal --output json --all REQUEST_ID="$3" > /run/found
    [ -s /run/found ] && break
    sleep 0.05
done
cat /run/found
"""

SENDER = """
from adoptd import log
log.configure("info", True)
log.info("adoption", job="17", remote="fd00::1", decision="denied", reason="unknown", witness=None, latency_ms=1.5,
         request="ab12cd34", user="eve\\nJOB_ID=1", stages="first", uid=1001)
log.info("adoption", job="18", request="big", stages="s" * 700_000)
"""


def found(request: str) -> Dict[str, object]:
    if not Path(JOURNALD).exists():
        assert not os.environ.get("CI"), f"not installed: {JOURNALD}"
        pytest.skip(f"not installed: {JOURNALD}")
    ended = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", SCRIPT, "-", sys.executable, SENDER, request],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(Path(__file__).parents[2] / "agent")},
    )
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert len(lines) == 1, (ended.stdout, ended.stderr)
    entry = json.loads(lines[0])
    assert isinstance(entry, dict)
    return entry


def test_a_decision_is_found_by_its_request() -> None:
    """With each of its fields, and with none that a user's name has made."""
    entry = found("ab12cd34")
    expected = {
        "JOB_ID": "17",
        "REMOTE_ADDR": "fd00::1",
        "DECISION": "denied",
        "REASON": "unknown",
        "LATENCY_MS": "1.50",
        "REQUEST_ID": "ab12cd34",
        "ADOPTD_EVENT": "adoption",
        "ADOPTD_USER": "eve\\nJOB_ID=1",
        "ADOPTD_UID": "1001",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "adoptd",
    }
    assert {name: entry.get(name) for name in expected} == expected
    assert "WITNESS" not in entry


def test_a_long_entry_arrives_whole() -> None:
    """Longer than a datagram can be."""
    entry = found("big")
    assert entry["ADOPTD_STAGES"] == "s" * 700_000
