"""The Python mirror of bpf/adopt_record.h: labels, questions, answers, counters.

Owns the layouts and their decoding, and nothing that touches the kernel. A test compiles the header and
compares every size, offset and number with what stands here; where the two differ, the header is right.
Called by the probe's other modules and by the bpf witness.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Mapping, Optional, Tuple

from adoptd.model import Connection, ProbeError

COMM_BYTES = 16
# BPF_PROG_TEST_RUN wants an Ethernet header in front of the query (ETH_HLEN).
QUERY_OFFSET = 14

# TCP states as the kernel numbers them (include/net/tcp_states.h, fixed by the ABI of sock_diag and BPF).
TCP_SYN_SENT = 2

# (field, struct code): no padding, which the layout test holds against the compiler's own idea.
RECORD_FIELDS: Tuple[Tuple[str, str], ...] = (
    ("labelled_ns", "Q"),
    ("cgroup_id", "Q"),
    ("tgid", "I"),
    ("uid", "I"),
    ("flags", "I"),
    ("reserved", "I"),
    ("comm", f"{COMM_BYTES}s"),
)
QUESTION_FIELDS: Tuple[Tuple[str, str], ...] = (
    ("family", "I"),
    ("source_port_be", "H"),
    ("destination_port_be", "H"),
    ("source", "16s"),
    ("destination", "16s"),
)
ANSWER_FIELDS: Tuple[Tuple[str, str], ...] = (
    ("outcome", "I"),
    ("state", "I"),
)


def _layout(order: str, fields: Tuple[Tuple[str, str], ...]) -> struct.Struct:
    return struct.Struct(order + "".join(code for _, code in fields))


RECORD = _layout("=", RECORD_FIELDS)
QUESTION = _layout("=", QUESTION_FIELDS)
_ANSWER = _layout("=", ANSWER_FIELDS + RECORD_FIELDS)
# The same bytes as QUESTION with the ports as two bytes each, since they are big-endian on every host.
_QUESTION_PACK = struct.Struct("=I2s2s16s16s")

QUERY_BYTES = QUESTION.size + _ANSWER.size
PACKET_BYTES = QUERY_OFFSET + QUERY_BYTES
_ANSWER_OFFSET = QUERY_OFFSET + QUESTION.size


class Label(enum.IntFlag):
    """ADOPT_LABEL_*: where a label comes from. Exactly one of CONNECT and SEEDED is set."""

    CONNECT = 1
    SEEDED = 2
    SHARED = 4


class Outcome(enum.IntEnum):
    """ADOPT_OUTCOME_*: what came of a question."""

    NOT_FOUND = 1
    LISTENER = 2
    MISMATCH = 3
    UNLABELLED = 4
    CHANGED = 5
    LABELLED = 6
    MALFORMED = 7


# ADOPT_WORK_COUNTERS and ADOPT_FAILURE_COUNTERS, in order: the position in COUNTERS is the key in the map.
WORK: Tuple[str, ...] = ("labelled", "seeded", "seed_passes")
FAILURES: Tuple[str, ...] = (
    "no_socket",
    "storage_refused",
    "seed_storage_refused",
    "seed_disagreed",
    "seed_shared",
    "query_malformed",
    "query_listener",
    "query_mismatch",
    "query_unlabelled",
    "query_changed",
)
COUNTERS: Tuple[str, ...] = WORK + FAILURES


@dataclass(frozen=True)
class SocketRecord:
    """The label of a socket: who connected it or, if ``seeded``, who held it when the probe was loaded.

    ``labelled_at_ns`` is CLOCK_BOOTTIME; ``pid`` a thread group id in the initial pid namespace; ``uid``
    the real uid in the initial user namespace; ``cgroup_id`` in the cgroup-v2 hierarchy. ``shared``: more
    than one process held the seeded socket, so ``pid`` and ``comm`` are one of several.
    """

    pid: int
    uid: int
    cgroup_id: int
    labelled_at_ns: int
    comm: str
    seeded: bool
    shared: bool

    @property
    def connected_at_ns(self) -> Optional[int]:
        """When connect() was called, in ns of CLOCK_BOOTTIME. None for a seeded socket: not known."""
        return None if self.seeded else self.labelled_at_ns


@dataclass(frozen=True)
class Answer:
    """What the probe says of a connection. ``state``: TCP_* of the socket found, None if none was."""

    outcome: Outcome
    state: Optional[int]
    record: Optional[SocketRecord]


_OUTCOMES: Mapping[int, Outcome] = {outcome.value: outcome for outcome in Outcome}
_NO_ANSWER = bytes(_ANSWER.size)
_NOT_FOUND = Answer(Outcome.NOT_FOUND, None, None)


def encode_question(packet: bytearray, connection: Connection) -> None:
    """Write the question about ``connection`` into ``packet`` (PACKET_BYTES long) and blank the answer."""
    source, destination = connection.source, connection.destination
    _QUESTION_PACK.pack_into(
        packet,
        QUERY_OFFSET,
        source.address.version,
        source.port.to_bytes(2, "big"),
        destination.port.to_bytes(2, "big"),
        source.address.packed,
        destination.address.packed,
    )
    packet[_ANSWER_OFFSET:] = _NO_ANSWER


def decode_answer(packet: bytearray, returned: int) -> Answer:
    """The answer in ``packet``, for which the program returned ``returned``.

    Raises ProbeError if the two do not agree or a field has a value the header does not allow: then it
    was not our program that ran.
    """
    outcome, state, labelled_ns, cgroup_id, tgid, uid, flags, _, comm = _ANSWER.unpack_from(packet, _ANSWER_OFFSET)
    if outcome != returned or outcome not in _OUTCOMES or outcome == Outcome.MALFORMED:
        raise ProbeError(f"probe answered outcome {outcome} and returned {returned}, expected one of 1..6 in both")
    if outcome == Outcome.NOT_FOUND:
        return _NOT_FOUND
    if outcome != Outcome.LABELLED:
        return Answer(_OUTCOMES[outcome], state, None)
    if flags not in (Label.CONNECT, Label.SEEDED, Label.SEEDED | Label.SHARED):
        raise ProbeError(f"probe answered with label flags {flags:#x}, expected 0x1, 0x2 or 0x6")
    return Answer(
        Outcome.LABELLED,
        state,
        SocketRecord(
            pid=tgid,
            uid=uid,
            cgroup_id=cgroup_id,
            labelled_at_ns=labelled_ns,
            comm=comm.partition(b"\0")[0].decode("utf-8", "backslashreplace"),
            seeded=flags != Label.CONNECT,
            shared=bool(flags & Label.SHARED),
        ),
    )
