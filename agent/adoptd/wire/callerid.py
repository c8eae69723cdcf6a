"""The callerid question and its answer: what the agents of two nodes say to each other.

Owns the payload inside the seal, nothing of the seal itself. Both are JSON objects with exactly the
keys below; ARCHITECTURE.md gives the layout with widths, so that a second implementation can be
written from it. Called by :mod:`adoptd.callerid` on both sides.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from dataclasses import dataclass
from typing import FrozenSet, Optional

from adoptd import __version__
from adoptd.model import (
    JOB_ID_MAX,
    UID_MAX,
    Connection,
    Endpoint,
    IPAddress,
    ProtocolError,
    Witness,
    is_job_id,
)
from adoptd.wire.strict_json import Fields, decode_object, encode_object

VERSION = 1
# What a later release may say; anything else is nobody's version.
_OTHER_VERSIONS = range(VERSION + 1, 1 << 16)

# Of an agent: what __version__ may be (PEP 440), with room for a packager's suffix.
_RELEASE = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+~-]{0,31}")

# 128 random bits in hex: a nonce that repeats by chance would let one answer pass for another's.
_NONCE = re.compile(r"[0-9a-f]{32}")

_QUESTION_KEYS = frozenset({"v", "type", "nonce", "to", "src", "sport", "dst", "dport", "uid"})
_ANSWER_KEYS = frozenset(
    {
        "v",
        "type",
        "nonce",
        "host",
        "src",
        "sport",
        "dst",
        "dport",
        "outcome",
        "reason",
        "job",
        "witness",
        "moved",
        "hint",
        "cluster",
        "release",
    }
)


# The others are what the asking node says of an answer, and no agent's word.
WITNESSES = frozenset({Witness.BPF, Witness.DIAG, Witness.CONNTRACK, Witness.PROC})


class OtherVersion(ProtocolError):
    """A message of an agent that speaks another version of this protocol."""


class Outcome(enum.Enum):
    """What the source node can say about the connection."""

    JOB = "job"
    NO_JOB = "no_job"
    UNKNOWN = "unknown"


class Reason(enum.Enum):
    """Why the outcome is what it is; the label of a metric, so a closed set."""

    OWNER = "owner"
    NOT_FOUND = "not_found"
    DISAGREEMENT = "disagreement"
    AMBIGUOUS = "ambiguous"
    OTHER_USER = "other_user"
    NOT_ALLOWED = "not_allowed"
    NO_WITNESS = "no_witness"
    JOB_NOT_TOLD = "job_not_told"
    JOB_MANAGER = "job_manager"
    OUT_OF_TIME = "out_of_time"


@dataclass(frozen=True)
class Question:
    """Which job owns ``connection``, of which ``responder`` is the source node?

    ``login_uid`` is the user who logs in at the destination; the answer is about that user's jobs
    only. None asks about any user's, which only root may.
    """

    nonce: str
    responder: IPAddress
    connection: Connection
    login_uid: Optional[int]


@dataclass(frozen=True)
class Answer:
    """The source node's word on a :class:`Question`, repeating its nonce and connection.

    ``responder`` is the address at which the answering node was reached. ``job_id`` and ``witness``
    go with Outcome.JOB. ``moved``: the owner has left the job's cgroup since it connected. ``hint`` goes with
    Outcome.NO_JOB: a job that the environment of the owner, a process of the login user's, names. ``cluster`` goes
    with Outcome.JOB: the cluster that the job's id is of, None where the job manager has no name for it. ``release`` is
    the answering agent's: told to people, and nothing goes by it.
    """

    nonce: str
    responder: IPAddress
    connection: Connection
    outcome: Outcome
    reason: Reason
    job_id: Optional[str] = None
    witness: Optional[Witness] = None
    moved: bool = False
    hint: Optional[str] = None
    cluster: Optional[str] = None
    release: str = __version__


def encode_question(question: Question) -> bytes:
    """The payload to be sealed."""
    return encode_object(
        {
            "v": VERSION,
            "type": "question",
            "nonce": question.nonce,
            "to": str(question.responder),
            **_connection_fields(question.connection),
            "uid": question.login_uid,
        }
    )


def decode_question(payload: bytes) -> Question:
    """The question in an opened seal. Raises ProtocolError, OtherVersion where that is all that can be told."""
    fields = _fields(payload, _QUESTION_KEYS, "question")
    return Question(
        nonce=_nonce(fields),
        responder=_address(fields, "to"),
        connection=_connection(fields),
        login_uid=fields.optional_integer("uid", 0, UID_MAX),
    )


def encode_answer(answer: Answer) -> bytes:
    """The payload to be sealed."""
    return encode_object(
        {
            "v": VERSION,
            "type": "answer",
            "nonce": answer.nonce,
            "host": str(answer.responder),
            **_connection_fields(answer.connection),
            "outcome": answer.outcome.value,
            "reason": answer.reason.value,
            "job": answer.job_id,
            "witness": None if answer.witness is None else answer.witness.value,
            "moved": answer.moved,
            "hint": answer.hint,
            "cluster": answer.cluster,
            "release": answer.release,
        }
    )


def decode_answer(payload: bytes) -> Answer:
    """The answer in an opened seal. Raises ProtocolError, also for a job without JOB or the reverse."""
    fields = _fields(payload, _ANSWER_KEYS, "answer")
    job_id = fields.optional_text("job", JOB_ID_MAX)
    witness = fields.optional_text("witness", 16)
    try:
        answer = Answer(
            nonce=_nonce(fields),
            responder=_address(fields, "host"),
            connection=_connection(fields),
            outcome=Outcome(fields.text("outcome", 16)),
            reason=Reason(fields.text("reason", 32)),
            job_id=job_id,
            witness=None if witness is None else Witness(witness),
            moved=fields.boolean("moved"),
            hint=fields.optional_text("hint", JOB_ID_MAX),
            cluster=fields.optional_text("cluster", JOB_ID_MAX),
            release=fields.text("release", 32),
        )
    except ValueError as error:
        raise ProtocolError(f"answer: {error}") from None
    named = answer.outcome is Outcome.JOB
    if (answer.job_id is not None) != named or (answer.witness is not None) != named:
        raise ProtocolError(f"answer: outcome {answer.outcome.value} does not go with its job and witness")
    if answer.hint is not None and answer.outcome is not Outcome.NO_JOB:
        raise ProtocolError(f"answer: outcome {answer.outcome.value} does not go with a hint")
    if answer.cluster is not None and not (named and is_job_id(answer.cluster)):
        raise ProtocolError(f"answer: cluster {answer.cluster!r} is no name of one, or goes with no job")
    if not _RELEASE.fullmatch(answer.release):
        raise ProtocolError(f"answer: release {answer.release!r} is no version number")
    for job in (answer.job_id, answer.hint):
        if job is not None and not is_job_id(job):
            raise ProtocolError(f"answer: job {job!r} is not a job id")
    if answer.witness is not None and answer.witness not in WITNESSES:
        raise ProtocolError(f"answer: witness {answer.witness.value} is not one of an agent's")
    return answer


def _fields(payload: bytes, keys: FrozenSet[str], kind: str) -> Fields:
    value = decode_object(payload, kind)
    version = value.get("v")
    # Before the keys: another version has others, and that is what there is to say of it.
    if type(version) is int and version in _OTHER_VERSIONS:
        raise OtherVersion(f"{kind}: version {version} of the protocol, expected {VERSION}")
    fields = Fields(value, keys, kind)
    fields.integer("v", VERSION, VERSION)
    if fields.text("type", 16) != kind:
        # An answer sent back as a question (or the reverse) is sealed by us and fresh: the type refuses it.
        raise ProtocolError(f"{kind}: type is another one")
    return fields


def _nonce(fields: Fields) -> str:
    nonce = fields.text("nonce", 32)
    if not _NONCE.fullmatch(nonce):
        raise ProtocolError("nonce is not 32 lower-case hex digits")
    return nonce


def _connection_fields(connection: Connection) -> dict[str, object]:
    return {
        "src": str(connection.source.address),
        "sport": connection.source.port,
        "dst": str(connection.destination.address),
        "dport": connection.destination.port,
    }


def _connection(fields: Fields) -> Connection:
    try:
        return Connection(
            Endpoint(_address(fields, "src"), fields.integer("sport", 1, 0xFFFF)),
            Endpoint(_address(fields, "dst"), fields.integer("dport", 1, 0xFFFF)),
        )
    except ValueError as error:
        raise ProtocolError(f"connection: {error}") from None


def _address(fields: Fields, key: str) -> IPAddress:
    # 45 characters: the longest text of an IPv6 address (RFC 4291, 2.2, with an embedded IPv4 part).
    text = fields.text(key, 45)
    if "%" in text:
        raise ProtocolError(f"{key} has a zone, which is an interface of one host and means nothing to another")
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ProtocolError(f"{key} is not an IP address") from None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
