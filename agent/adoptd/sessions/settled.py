"""What an account phase settled, as it is kept on disk until the session phase asks.

Owns the form and its bounds. What is read back was written by this agent or by whoever had root: it is taken only if
every field is what it must be, of this boot and not too old. Pure. Called by pending.py; the files are store.py's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Optional, Tuple

from adoptd.model import JOB_ID_MAX, UID_MAX, Connection, Job, ProtocolError, Witness, is_job_id
from adoptd.policy import Situation, Step
from adoptd.sessions.fields import (
    NAME_MAX,
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
from adoptd.wire.strict_json import Fields, encode_object

# Of a user with more jobs on one node, the newest.
_CHOICES_MAX = 256


@dataclass(frozen=True)
class Story:
    """What led to a login's decision, in both phases. ``request_id`` is the login's name in logs and messages.

    ``because`` is the value of the step that chose its job, "" while none is; ``choices`` are all the user's
    jobs here at that time, newest first. ``stages`` count from ``began_s``, monotonic.
    """

    request_id: str
    began_s: float
    because: str = ""
    choices: Tuple[str, ...] = ()
    stages: Stages = ()


@dataclass(frozen=True)
class Settlement:
    """How the account phase ended. ``job`` is the one adopted into, None if none was."""

    step: Step
    situation: Situation
    job: Optional[Job]
    witness: Optional[Witness]
    story: Optional[Story] = None


@dataclass(frozen=True)
class PendingLogin:
    """A login between its phases. ``expires_at_s`` is monotonic: of no meaning after this boot."""

    uid: int
    connection: Connection
    expires_at_s: float
    settlement: Settlement

    @property
    def name(self) -> str:
        """What its file is called: another login's is another."""
        ends = f"{self.connection.source} {self.connection.destination}"
        return f"{self.uid}-{hashlib.sha256(ends.encode()).hexdigest()[:32]}"


def encode_login(login: PendingLogin, boot_id: str) -> bytes:
    """``login`` as a file of the boot ``boot_id``."""
    settlement, story = login.settlement, login.settlement.story
    return encode_object(
        {
            "v": VERSION,
            "boot_id": boot_id,
            "uid": login.uid,
            "connection": encode_connection(login.connection),
            "expires_at_s": login.expires_at_s,
            "step": settlement.step.value,
            "situation": settlement.situation.value,
            "job": None if settlement.job is None else encode_job(settlement.job),
            "witness": None if settlement.witness is None else settlement.witness.value,
            "story": None
            if story is None
            else {
                "request_id": story.request_id[:NAME_MAX],
                "began_s": story.began_s,
                "because": story.because[:NAME_MAX],
                "choices": list(story.choices[:_CHOICES_MAX]),
                "stages": encode_stages(story.stages),
            },
        }
    )


_KEYS = frozenset({"v", "boot_id", "uid", "connection", "expires_at_s", "step", "situation", "job", "witness", "story"})
_STORY_KEYS = frozenset({"request_id", "began_s", "because", "choices", "stages"})


def decode_login(data: bytes, name: str, boot_id: str) -> PendingLogin:
    """The login in the file ``name``. Raises ProtocolError, also if it is of another boot."""
    value, fields = opened(data, _KEYS, "login", boot_id)
    uid = fields.integer("uid", 0, UID_MAX)
    connection = connection_of(value["connection"])
    if connection is None:
        raise ProtocolError("login: of no connection")
    job = None if value["job"] is None else job_of(value["job"])
    if job is not None and job.uid != uid:
        raise ProtocolError(f"login: of uid {uid} in a job of uid {job.uid}")
    try:
        step, situation = Step(fields.text("step", 64)), Situation(fields.text("situation", 64))
    except ValueError as error:
        raise ProtocolError(f"login: {error}") from None
    witness = witness_of(fields.optional_text("witness", 32))
    story = None if value["story"] is None else _story(value["story"])
    expires_at_s = number_of(value["expires_at_s"], "expires_at_s")
    login = PendingLogin(uid, connection, expires_at_s, Settlement(step, situation, job, witness, story))
    if login.name != name:
        raise ProtocolError(f"login: is {login.name}, expected what its file is called")
    return login


def _story(value: object) -> Story:
    if not isinstance(value, dict):
        raise ProtocolError("login: story is not an object")
    fields = Fields(value, _STORY_KEYS, "login's story")
    choices = value["choices"]
    if not isinstance(choices, list) or len(choices) > _CHOICES_MAX:
        raise ProtocolError(f"login's story: choices are not a list of at most {_CHOICES_MAX}")
    for each in choices:
        if not isinstance(each, str) or len(each) > JOB_ID_MAX or not is_job_id(each):
            raise ProtocolError("login's story: a choice is no job id")
    return Story(
        request_id=fields.text("request_id", NAME_MAX),
        began_s=number_of(value["began_s"], "began_s"),
        because=text_of(value, "because", NAME_MAX),
        choices=tuple(choices),
        stages=stages_of(value["stages"]),
    )
