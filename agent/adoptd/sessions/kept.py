"""A session as it is kept on disk: a small JSON object, and nothing that has to be believed.

Owns the form and its bounds. What is read back was written by this agent or by whoever had root: it is taken
only if every field is what it must be, and never says by itself that its process still lives. Called by the
registry of sessions; the files are store.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from adoptd.model import PID_MAX, UID_MAX, Connection, Job, ProtocolError, Witness
from adoptd.sessions.fields import (
    NAME_MAX,
    U64_MAX,
    VERSION,
    Stages,
    connection_of,
    encode_connection,
    encode_job,
    encode_stages,
    job_of,
    number_of,
    opened,
    stages_of,
    text_of,
    witness_of,
)
from adoptd.wire.strict_json import encode_object


@dataclass(frozen=True)
class Session:
    """A process that was adopted: the one that asked, as a rule sshd's own process for the session.

    ``id`` is ``<pid>-<start_ticks>``, which no other process has while this host is up. ``start_ticks`` is field
    22 of /proc/PID/stat. ``job`` is the one it was put into, or moved into since at its user's wish. ``reason``
    and ``witness`` are the decision's; ``since_s`` is Unix time; ``nodename`` is the PAM line's option.
    """

    id: str
    pid: int
    start_ticks: int
    uid: int
    user: str
    job: Job
    witness: Optional[Witness]
    reason: str
    since_s: float
    connection: Optional[Connection]
    service: str
    stages: Stages
    nodename: str = ""


def session_id(pid: int, start_ticks: int) -> str:
    """The id of the session whose first process this is."""
    return f"{pid}-{start_ticks}"


def encode_session(session: Session, boot_id: str) -> bytes:
    """``session`` as a file of the boot ``boot_id``."""
    connection = session.connection
    return encode_object(
        {
            "v": VERSION,
            "boot_id": boot_id,
            "pid": session.pid,
            "start_ticks": session.start_ticks,
            "uid": session.uid,
            "user": session.user[:NAME_MAX],
            "job": encode_job(session.job),
            "witness": None if session.witness is None else session.witness.value,
            "reason": session.reason[:NAME_MAX],
            "since_s": session.since_s,
            "connection": None if connection is None else encode_connection(connection),
            "service": session.service[:NAME_MAX],
            "stages": encode_stages(session.stages),
            "nodename": session.nodename[:NAME_MAX],
        }
    )


_KEYS = frozenset(
    {"v", "boot_id", "pid", "start_ticks", "uid", "user", "job", "witness", "reason", "since_s"}
    | {"connection", "service", "stages", "nodename"}
)


def decode_session(data: bytes, name: str, boot_id: str) -> Session:
    """The session in the file ``name``, which is its id. Raises ProtocolError, also if it is of another boot."""
    value, fields = opened(data, _KEYS, "session", boot_id)
    pid, start_ticks = fields.integer("pid", 1, PID_MAX), fields.integer("start_ticks", 0, U64_MAX)
    if name != session_id(pid, start_ticks):
        raise ProtocolError(f"session: is {session_id(pid, start_ticks)}, expected what its file is called")
    job = job_of(value["job"])
    uid = fields.integer("uid", 0, UID_MAX)
    if job.uid != uid:
        raise ProtocolError(f"session: of uid {uid} in a job of uid {job.uid}")
    return Session(
        id=name,
        pid=pid,
        start_ticks=start_ticks,
        uid=uid,
        user=text_of(value, "user", NAME_MAX),
        job=job,
        witness=witness_of(fields.optional_text("witness", 32)),
        reason=text_of(value, "reason", NAME_MAX),
        since_s=number_of(value["since_s"], "since_s"),
        connection=connection_of(value["connection"]),
        service=text_of(value, "service", NAME_MAX),
        stages=stages_of(value["stages"]),
        nodename=text_of(value, "nodename", NAME_MAX),
    )
