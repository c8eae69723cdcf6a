"""The Python mirror of bpf/adopt_record.h: labels, questions, answers, events, counters.

Owns the layouts and their decoding, and nothing that touches the kernel. A test compiles the header and
compares every size, offset and number with what stands here; where the two differ, the header is right.
Called by the probe's other modules and by the bpf witness.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Mapping, Optional, Sequence, Tuple

from adoptd.model import Connection, ProbeError

COMM_BYTES = 16
PATH_BYTES = 128
# BPF_PROG_TEST_RUN wants an Ethernet header in front of the query (ETH_HLEN).
QUERY_OFFSET = 14

# ADOPT_TWINS_UNKNOWN.
TWINS_UNKNOWN = 0xFFFFFFFF
# ADOPT_NETNS_OWN
NETNS_OWN = 0xFFFFFFFF

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
    ("netns", "I"),
    ("reserved", "I"),
)
ANSWER_FIELDS: Tuple[Tuple[str, str], ...] = (
    ("outcome", "I"),
    ("state", "I"),
    ("device", "I"),
    ("twins", "I"),
)
MEMBER_FIELDS: Tuple[Tuple[str, str], ...] = (
    ("start_ticks", "Q"),
    ("leader", "I"),
    ("uid", "I"),
    ("inherited", "I"),
    ("reserved", "I"),
)
MOVE_FIELDS: Tuple[Tuple[str, str], ...] = (
    ("type", "I"),
    ("pid", "I"),
    ("moved_ns", "Q"),
    ("start_ticks", "Q"),
    ("cgroup_id", "Q"),
    ("leader", "I"),
    ("uid", "I"),
    ("hierarchy", "I"),
    ("actor_tgid", "I"),
    ("actor_uid", "I"),
    ("reserved", "I"),
    ("actor_comm", f"{COMM_BYTES}s"),
    ("path", f"{PATH_BYTES}s"),
)
CONNECTED_FIELDS: Tuple[Tuple[str, str], ...] = (
    ("type", "I"),
    ("tgid", "I"),
    ("labelled_ns", "Q"),
)


def _layout(order: str, fields: Tuple[Tuple[str, str], ...]) -> struct.Struct:
    return struct.Struct(order + "".join(code for _, code in fields))


RECORD = _layout("=", RECORD_FIELDS)
QUESTION = _layout("=", QUESTION_FIELDS)
MEMBER = _layout("=", MEMBER_FIELDS)
MOVE = _layout("=", MOVE_FIELDS)
CONNECTED = _layout("=", CONNECTED_FIELDS)
_ANSWER = _layout("=", ANSWER_FIELDS + RECORD_FIELDS)
# The same bytes as QUESTION with the ports as two bytes each, since they are big-endian on every host.
_QUESTION_PACK = struct.Struct("=I2s2s16s16sII")

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
WORK: Tuple[str, ...] = ("labelled", "seeded", "seed_passes", "moves", "connects")
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
    "member_refused",
    "move_withheld",
    "event_lost",
    "connect_withheld",
    "connect_lost",
)
COUNTERS: Tuple[str, ...] = WORK + FAILURES


# ADOPT_MEMBERS_MAX, ADOPT_SHARES and ADOPT_EVENT_BUFFER_BYTES.
MEMBERS_MAX = 65536
SHARES = 4096
SHARE_BYTES = 32
EVENT_BUFFER_BYTES = 262144
# ADOPT_EVENT_WINDOW_NS
EVENT_WINDOW_S = 0.1
# ADOPT_WATCHED_PORTS, ADOPT_CONNECTED_BUFFER_BYTES and ADOPT_CONNECTED_OF_USER_MAX.
WATCHED_PORTS = 16
WATCHED_BYTES = 2 * WATCHED_PORTS
CONNECTED_BUFFER_BYTES = 65536
CONNECTED_OF_USER_MAX = 32
PACE_BYTES = 16


class EventType(enum.IntEnum):
    """ADOPT_EVENT_*: what an event is."""

    MOVED = 1
    WITHHELD = 2
    CONNECTED = 3


@dataclass(frozen=True)
class Move:
    """A session's process, or one thread of it, was moved to the cgroup ``path`` of a hierarchy, by the actor.

    ``leader`` and ``start_ticks`` are the session's first process and field 22 of its stat; ``uid`` the session's
    user. ``moved_at_ns`` is CLOCK_BOOTTIME. ``path`` may be cut short. Not ``told``: other moves of this user's
    sessions about this time are not told, whatever they were.
    """

    told: bool
    pid: int
    moved_at_ns: int
    leader: int
    start_ticks: int
    uid: int
    cgroup_id: int
    hierarchy: int
    actor_pid: int
    actor_uid: int
    actor_comm: str
    path: str


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
    """What the probe says of a connection. ``state``: TCP_* of the socket found, None if none was.

    ``device``: index of the network device that it is bound to, None if to none. ``twins``: how many other sockets
    could be this connection in its place; None where that cannot be told.
    """

    outcome: Outcome
    state: Optional[int]
    record: Optional[SocketRecord]
    device: Optional[int] = None
    twins: Optional[int] = None


_OUTCOMES: Mapping[int, Outcome] = {outcome.value: outcome for outcome in Outcome}
_NO_ANSWER = bytes(_ANSWER.size)
# The answer that there is no such socket.
NOT_FOUND = Answer(Outcome.NOT_FOUND, None, None)


def encode_question(packet: bytearray, connection: Connection, netns: int = NETNS_OWN) -> None:
    """Write the question about ``connection`` into ``packet`` (PACKET_BYTES long) and blank the answer.

    ``netns``: the id that the asker's network namespace has for the one to look in.
    """
    source, destination = connection.source, connection.destination
    _QUESTION_PACK.pack_into(
        packet,
        QUERY_OFFSET,
        source.address.version,
        source.port.to_bytes(2, "big"),
        destination.port.to_bytes(2, "big"),
        source.address.packed,
        destination.address.packed,
        netns,
        0,
    )
    packet[_ANSWER_OFFSET:] = _NO_ANSWER


def decode_answer(packet: bytearray, returned: int) -> Answer:
    """The answer in ``packet``, for which the program returned ``returned``.

    Raises ProbeError if the two do not agree or a field has a value the header does not allow: then it
    was not our program that ran.
    """
    outcome, state, bound_to, counted, *label = _ANSWER.unpack_from(packet, _ANSWER_OFFSET)
    if outcome != returned or outcome not in _OUTCOMES or outcome == Outcome.MALFORMED:
        raise ProbeError(f"probe answered outcome {outcome} and returned {returned}, expected one of 1..6 in both")
    if outcome == Outcome.NOT_FOUND:
        return NOT_FOUND
    device, twins = bound_to or None, None if counted == TWINS_UNKNOWN else counted
    if outcome != Outcome.LABELLED:
        return Answer(_OUTCOMES[outcome], state, None, device, twins)
    labelled_ns, cgroup_id, tgid, uid, flags, _, comm = label
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
            comm=_text(comm),
            seeded=flags != Label.CONNECT,
            shared=bool(flags & Label.SHARED),
        ),
        device,
        twins,
    )


def decode_move(data: bytes) -> Move:
    """A MOVED or WITHHELD event. Raises ProbeError if it is none."""
    if len(data) < MOVE.size:
        raise ProbeError(f"probe's event has {len(data)} bytes, expected {MOVE.size}")
    kind, pid, moved_ns, start_ticks, cgroup_id, leader, uid, hierarchy, actor, actor_uid, _, comm, path = (
        MOVE.unpack_from(data)
    )
    if kind not in (EventType.MOVED, EventType.WITHHELD):
        raise ProbeError(f"probe's event is of type {kind}, expected 1 or 2")
    return Move(
        told=kind == EventType.MOVED,
        pid=pid,
        moved_at_ns=moved_ns,
        leader=leader,
        start_ticks=start_ticks,
        uid=uid,
        cgroup_id=cgroup_id,
        hierarchy=hierarchy,
        actor_pid=actor,
        actor_uid=actor_uid,
        actor_comm=_text(comm),
        path=_text(path),
    )


def decode_connected(data: bytes) -> Tuple[int, int]:
    """A CONNECTED event: the pid and the boot time in ns of the label that connect() left. Raises ProbeError."""
    if len(data) < CONNECTED.size:
        raise ProbeError(f"probe's event has {len(data)} bytes, expected {CONNECTED.size}")
    kind, tgid, labelled_ns = CONNECTED.unpack_from(data)
    if kind != EventType.CONNECTED:
        raise ProbeError(f"probe's event is of type {kind}, expected {EventType.CONNECTED.value}")
    return tgid, labelled_ns


def encode_watched(ports: Sequence[int]) -> bytes:
    """The ports whose connections are to be told of, at most WATCHED_PORTS."""
    if len(ports) > WATCHED_PORTS:
        raise ProbeError(f"{len(ports)} ports cannot be watched, expected at most {WATCHED_PORTS}")
    return b"".join(port.to_bytes(2, "big") for port in ports).ljust(WATCHED_BYTES, b"\0")


def encode_member(leader: int, start_ticks: int, uid: int) -> bytes:
    """The entry of a session's own process, as the agent writes it."""
    return MEMBER.pack(start_ticks, leader, uid, 0, 0)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")
