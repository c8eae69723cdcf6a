"""What sessions and logins have in common on disk: a job, a connection, a witness, the stages of a decision.

Owns their form and their bounds. What is read back is taken only if it is exactly what was written. Pure. Called by
kept.py and settled.py.
"""

from __future__ import annotations

from typing import Dict, FrozenSet, List, Optional, Tuple

from adoptd.model import JOB_ID_MAX, UID_MAX, Connection, Endpoint, Job, ProtocolError, Witness, is_job_id
from adoptd.wire.strict_json import Fields, decode_object

VERSION = 1

# Name, what was found, milliseconds from the start of the login's first decision.
Stages = Tuple[Tuple[str, str, float], ...]

NAME_MAX = 256
# A login has ten stages at most; what they found is a line each. Larger ones are cut when they are written.
_STAGES_MAX = 32
_FOUND_MAX = 1024
# A Slurm job has two numbers, a plain cgroup one inode for each hierarchy.
_IDENTITY_MAX = 64
# cgroup inode numbers and field 22 of /proc/PID/stat are 64 bits wide.
U64_MAX = (1 << 64) - 1

# Twice what a session with all of it at its bounds comes to, escaped.
FILE_MAX_BYTES = 1 << 18

_JOB_KEYS = frozenset({"id", "uid", "created", "identity"})


def encode_job(job: Job) -> Dict[str, object]:
    """``job`` for a file."""
    return {"id": job.id, "uid": job.uid, "created": job.created, "identity": list(job.identity)}


def encode_connection(connection: Connection) -> List[str]:
    """Its two ends for a file."""
    return [str(connection.source), str(connection.destination)]


def encode_stages(stages: Stages) -> List[object]:
    """The last ones for a file, each cut to what is read back."""
    return [[name[:NAME_MAX], found[:_FOUND_MAX], at_ms] for name, found, at_ms in stages[-_STAGES_MAX:]]


def opened(data: bytes, keys: FrozenSet[str], what: str, boot_id: str) -> Tuple[Dict[str, object], Fields]:
    """The object in a file, with exactly these keys: version and boot are as they should be. Raises ProtocolError."""
    value = decode_object(data, what)
    fields = Fields(value, keys, what)
    fields.integer("v", VERSION, VERSION)
    if fields.text("boot_id", 64) != boot_id:
        raise ProtocolError(f"{what}: is of another boot")
    return value, fields


def job_of(value: object) -> Job:
    """The job in a file. Raises ProtocolError, as all of these do."""
    if not isinstance(value, dict):
        raise ProtocolError("job is not an object")
    fields = Fields(value, _JOB_KEYS, "job")
    job_id = fields.text("id", JOB_ID_MAX)
    if not is_job_id(job_id):
        raise ProtocolError("job: id is no job id")
    identity = value["identity"]
    if not isinstance(identity, list) or not 1 <= len(identity) <= _IDENTITY_MAX:
        raise ProtocolError(f"job: identity is not a list of 1 to {_IDENTITY_MAX} numbers")
    numbers = [each for each in identity if isinstance(each, int) and not isinstance(each, bool)]
    if len(numbers) != len(identity):
        raise ProtocolError("job: identity has what is no whole number")
    return Job(job_id, fields.integer("uid", 0, UID_MAX), fields.integer("created", 0, U64_MAX), tuple(numbers))


def witness_of(word: Optional[str]) -> Optional[Witness]:
    """The witness of that word, None for none."""
    try:
        return None if word is None else Witness(word)
    except ValueError:
        raise ProtocolError("witness is none that there is") from None


def connection_of(value: object) -> Optional[Connection]:
    """The connection between two ends, None for none."""
    if value is None:
        return None
    try:
        if isinstance(value, list) and len(value) == 2 and all(isinstance(end, str) and len(end) < 64 for end in value):
            return Connection(Endpoint.parse(value[0]), Endpoint.parse(value[1]))
    except ValueError as error:
        raise ProtocolError(f"connection: {error}") from None
    raise ProtocolError("connection is not a list of two ends")


def stages_of(value: object) -> Stages:
    """The stages of a decision."""
    if not isinstance(value, list) or len(value) > _STAGES_MAX:
        raise ProtocolError(f"stages are not a list of at most {_STAGES_MAX}")
    return tuple(_stage(each) for each in value)


def _stage(value: object) -> Tuple[str, str, float]:
    if not isinstance(value, list) or len(value) != 3:
        raise ProtocolError("a stage is not a list of three")
    named = {"name": value[0], "found": value[1]}
    return text_of(named, "name", NAME_MAX), text_of(named, "found", _FOUND_MAX), number_of(value[2], "a stage's time")


def text_of(value: Dict[str, object], key: str, most: int) -> str:
    """Any text: it is shown to people only where control characters are escaped."""
    text = value[key]
    if not isinstance(text, str) or len(text) > most:
        raise ProtocolError(f"{key} is not a string of at most {most} characters")
    return text


def number_of(value: object, what: str) -> float:
    """A number that is not negative: a time in s or ms."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e12:
        raise ProtocolError(f"{what} is not a number in 0..1e12")
    return float(value)
