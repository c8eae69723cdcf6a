"""The journal's native protocol, spoken to a real socket: fields that can be told apart, and a log that never waits."""

from __future__ import annotations

import array
import contextlib
import logging
import os
import socket
import struct
from pathlib import Path
from typing import Dict, Iterator, List

import pytest
from test_log import HOSTILE

from adoptd import log
from adoptd.journal import Journal, encode


def decode(data: bytes) -> Dict[str, bytes]:
    """The reader's side, as https://systemd.io/JOURNAL_NATIVE_PROTOCOL/ has it."""
    fields: Dict[str, bytes] = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if equals:
            data = rest
        else:
            (length,) = struct.unpack("<Q", rest[:8])
            value, data = rest[8 : 8 + length], rest[8 + length + 1 :]
            assert rest[8 + length : 8 + length + 1] == b"\n"
        assert name.decode("ascii").replace("_", "").isalnum()
        assert name.decode("ascii") not in fields
        fields[name.decode("ascii")] = value
    return fields


class Journald:
    """Listens where journald would."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.settimeout(5.0)

    def entry(self) -> Dict[str, bytes]:
        data, ancillary, _, _ = self.socket.recvmsg(1 << 20, socket.CMSG_SPACE(4))
        for _, _, raw in ancillary:
            (descriptor,) = array.array("i", raw)
            with open(descriptor, "rb") as file:
                file.seek(0)
                data = file.read()
                # It cannot be changed any more by whoever sent it.
                with pytest.raises(OSError, match="not permitted"):
                    os.pwrite(descriptor, b"x", 0)
        return decode(data)


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    served = Journald(tmp_path / "socket")
    with served.socket:
        yield served


@contextlib.contextmanager
def logging_to(path: str) -> Iterator[None]:
    logger = logging.getLogger("adoptd")
    before = (list(logger.handlers), logger.propagate, logger.level)
    try:
        log.configure("info", for_journal=True, journal_socket=path)
        yield
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers[:], logger.propagate = before[0], before[1]
        logger.setLevel(before[2])


def test_a_decision_has_the_fields_it_is_looked_up_by(journald: Journald) -> None:
    """The names an administrator filters by, the priority, and the same line as elsewhere."""
    with logging_to(journald.path):
        log.info("adoption", job="17", remote="10.0.0.1", decision="adopted", reason="callerid", witness="bpf",
                 latency_ms=1.5, request="ab12cd34", uid=1001, faults=None)  # fmt: skip
    entry = journald.entry()
    assert entry == {
        "MESSAGE": b"adoption job=17 remote=10.0.0.1 decision=adopted reason=callerid witness=bpf latency_ms=1.50 "
        b"request=ab12cd34 uid=1001",
        "PRIORITY": b"6",
        "SYSLOG_IDENTIFIER": b"adoptd",
        "CODE_MODULE": b"adoptd",
        "ADOPTD_EVENT": b"adoption",
        "JOB_ID": b"17",
        "REMOTE_ADDR": b"10.0.0.1",
        "DECISION": b"adopted",
        "REASON": b"callerid",
        "WITNESS": b"bpf",
        "LATENCY_MS": b"1.50",
        "REQUEST_ID": b"ab12cd34",
        "ADOPTD_UID": b"1001",
    }


def test_an_event_without_fields_is_one_all_the_same(journald: Journald) -> None:
    """And so is a sentence of a module with a logger of its own."""
    with logging_to(journald.path):
        log.error("stopping")
        logging.getLogger("adoptd.jobs.slurm").warning("job %d says", 7)
    assert journald.entry()["ADOPTD_EVENT"] == b"stopping"
    entry = journald.entry()
    assert (entry["MESSAGE"], entry["PRIORITY"]) == (b'slurm text="job 7 says"', b"4")
    assert entry["CODE_MODULE"] == b"adoptd.jobs.slurm"


@pytest.mark.parametrize(
    ("event", "given", "expected"),
    [
        (
            "callerid_answered",
            {"peer": "fd00::1", "outcome": "job", "reason": "owner", "job": "17", "latency_ms": 1.5},
            {"REMOTE_ADDR": b"fd00::1", "DECISION": b"job", "REASON": b"owner", "ADOPTD_OUTCOME": b"job"},
        ),
        ("join", {"outcome": "joined", "job": "18"}, {"DECISION": b"joined", "JOB_ID": b"18"}),
        (
            "escape",
            {"outcome": "failed", "mover": "root", "job": "17", "remote": "10.0.0.1"},
            {"DECISION": b"failed", "REASON": b"root", "JOB_ID": b"17", "REMOTE_ADDR": b"10.0.0.1"},
        ),
        (
            "observed_disagreement",
            {"would": "adopt", "would_be_job": "17", "in_job": "18", "reason": "newest"},
            {"DECISION": b"adopt", "JOB_ID": b"17", "REASON": b"newest", "ADOPTD_IN_JOB": b"18"},
        ),
        # Who sent it may be a uid here.
        ("refused", {"peer": "uid 1001", "reason": "too_many"}, {"ADOPTD_PEER": b"uid 1001", "REASON": b"too_many"}),
    ],
)
def test_every_decision_is_found_by_the_same_fields(
    journald: Journald, event: str, given: Dict[str, log.Field], expected: Dict[str, bytes]
) -> None:
    """Whatever its line calls them, which it keeps under its own name."""
    with logging_to(journald.path):
        log.info(event, **given)
    entry = journald.entry()
    assert {name: entry.get(name) for name in expected} == expected
    assert ("REMOTE_ADDR" in entry) == ("REMOTE_ADDR" in expected)


@pytest.mark.parametrize("value", HOSTILE)
def test_a_value_cannot_become_another_field(journald: Journald, value: str) -> None:
    """A user's name with a newline is one value, printable."""
    with logging_to(journald.path):
        log.info("adoption", user=value, job="17")
    entry = journald.entry()
    assert set(entry) == {"MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "CODE_MODULE", "ADOPTD_EVENT", "ADOPTD_USER",
                          "JOB_ID"}  # fmt: skip
    assert entry["ADOPTD_USER"].decode("utf-8").isprintable()


def test_a_value_with_a_newline_is_sent_with_its_length() -> None:
    """Not that one of ours has any: the encoding does not depend on it."""
    assert decode(encode({"A": "x\ny=z\n", "B": "=", "C": ""})) == {"A": b"x\ny=z\n", "B": b"=", "C": b""}


def test_an_entry_too_long_for_a_datagram_goes_as_a_file(journald: Journald) -> None:
    """Sealed: journald takes no other."""
    with logging_to(journald.path):
        log.info("adoption", stages="s" * 600_000)
    assert journald.entry()["ADOPTD_STAGES"] == b"s" * 600_000


def test_a_journal_that_does_not_read_costs_entries_and_no_time(journald: Journald) -> None:
    """Entries beyond its queue are lost; the next one that arrives says how many."""
    journal = Journal(journald.path)
    sent = 5000
    for number in range(sent):
        journal.send({"MESSAGE": str(number)})
    journald.socket.setblocking(False)
    got: List[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while True:
            got.append(journald.entry()["MESSAGE"])
    assert 0 < len(got) < sent
    assert got == [str(number).encode() for number in range(len(got))]
    journal.send({"MESSAGE": "again"})
    assert journald.entry() == {"MESSAGE": b"again", "ADOPTD_ENTRIES_LOST": str(sent - len(got)).encode()}
    journal.send({"MESSAGE": "and again"})
    assert journald.entry() == {"MESSAGE": b"and again"}
    journal.close()
    journal.close()


def test_a_journal_that_is_started_anew_is_found(tmp_path: Path) -> None:
    """What is said meanwhile is lost, and counted."""
    path = tmp_path / "socket"
    first = Journald(path)
    journal = Journal(str(path))
    first.socket.close()
    path.unlink()
    journal.send({"MESSAGE": "lost"})
    second = Journald(path)
    with second.socket:
        journal.send({"MESSAGE": "lost too, and connects"})
        journal.send({"MESSAGE": "here"})
        assert second.entry()["MESSAGE"] == b"here"
    journal.close()


def test_without_the_journal_s_socket_the_line_goes_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As before, with the priority that the journal reads from it."""
    with logging_to(str(tmp_path / "nobody")):
        log.info("event", job="17")
    assert capsys.readouterr().err == "<6>event job=17\n"
