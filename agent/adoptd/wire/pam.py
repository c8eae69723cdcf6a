"""The record between pam_adopt.so and the agent, mirrored from pam_hook/adopt_wire.h.

The header is the definition; a test compiles it and compares every size and offset with this file.
Called by the PAM server. Must never fill a field that was out of range with a default.
"""

from __future__ import annotations

import enum
import ipaddress
import re
import struct
from dataclasses import dataclass
from typing import Mapping, Optional

from adoptd.model import UID_MAX, Connection, Endpoint, ProtocolError
from adoptd.policy import Action, Options

MAGIC = 0x54504441
VERSION = 1
ENVIRONMENT_MAX_BYTES = 65536
DESCRIPTORS_MAX = 8
JOB_BYTES = 64
SUMMARY_BYTES = 128
MESSAGE_BYTES = 512

_REQUEST = struct.Struct("=IHH 8B BBHHH II 16s16s 64s256s64s")
_REPLY = struct.Struct("=IHH BBBB I 64s128s512s")

REQUEST_BYTES = _REQUEST.size
REPLY_BYTES = _REPLY.size

# The module's own bounds on timeout_ms=; a request outside them was not made by it.
TIMEOUT_MIN_MS = 1
TIMEOUT_MAX_MS = 30_000

_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Phase(enum.Enum):
    """Which PAM function is asking."""

    ACCOUNT = 1
    SESSION = 2


class Mode(enum.Enum):
    """Whether the decision is carried out or only told."""

    ENFORCE = 1
    OBSERVE = 2


class Verdict(enum.Enum):
    """What the module returns to libpam."""

    SUCCESS = 1
    DENY = 2
    IGNORE = 3


_ACTIONS = {1: Action.IGNORE, 2: Action.ALLOW, 3: Action.DENY, 4: Action.NEWEST}


@dataclass(frozen=True)
class PamRequest:
    """What sshd's PAM phase asks. ``connection`` runs from the ssh client to sshd; None: not known."""

    phase: Phase
    mode: Mode
    options: Options
    uid: int
    timeout_ms: int
    connection: Optional[Connection]
    service: str
    user: str
    nodename: str
    join_container: bool
    disable_x11: bool


@dataclass(frozen=True)
class PamReply:
    """What the module is to do. ``adopted`` is true only after the process was read back in the job."""

    verdict: Verdict
    adopted: bool
    job_id: str
    summary: str
    message: str
    environment: Mapping[str, str]


def decode_request(record: bytes) -> PamRequest:
    """The request in exactly REQUEST_BYTES bytes. Raises ProtocolError naming the field."""
    if len(record) != REQUEST_BYTES:
        raise ProtocolError(f"request of {len(record)} bytes, expected {REQUEST_BYTES}")
    (
        magic,
        version,
        size,
        phase,
        mode,
        action_no_jobs,
        action_unknown,
        action_adopt_failure,
        action_generic_failure,
        single_job_skip_rpc,
        join_container,
        disable_x11,
        family,
        remote_port,
        local_port,
        reserved,
        uid,
        timeout_ms,
        remote_address,
        local_address,
        service,
        user,
        nodename,
    ) = _REQUEST.unpack(record)
    for name, found, expected in (
        ("magic", magic, MAGIC),
        ("version", version, VERSION),
        ("size", size, REQUEST_BYTES),
        ("reserved", reserved, 0),
    ):
        if found != expected:
            raise ProtocolError(f"request {name} is {found}, expected {expected}")
    if uid > UID_MAX:
        raise ProtocolError(f"request uid {uid} is no uid")
    if not TIMEOUT_MIN_MS <= timeout_ms <= TIMEOUT_MAX_MS:
        raise ProtocolError(f"request timeout_ms {timeout_ms} is not in {TIMEOUT_MIN_MS}..{TIMEOUT_MAX_MS}")
    try:
        options = Options(
            action_no_jobs=_action("action_no_jobs", action_no_jobs),
            action_unknown=_action("action_unknown", action_unknown),
            action_adopt_failure=_action("action_adopt_failure", action_adopt_failure),
            action_generic_failure=_action("action_generic_failure", action_generic_failure),
            single_job_skip_rpc=_flag("single_job_skip_rpc", single_job_skip_rpc),
        )
        return PamRequest(
            phase=Phase(phase),
            mode=Mode(mode),
            options=options,
            uid=uid,
            timeout_ms=timeout_ms,
            connection=_connection(family, remote_address, remote_port, local_address, local_port),
            service=_text("service", service),
            user=_text("user", user),
            nodename=_text("nodename", nodename),
            join_container=_flag("join_container", join_container),
            disable_x11=_flag("disable_x11", disable_x11),
        )
    except ValueError as error:
        raise ProtocolError(f"request: {error}") from None


def encode_reply(reply: PamReply, descriptors: int = 0) -> bytes:
    """The record and its environment. Raises ProtocolError if a part does not fit: nothing is cut."""
    if not 0 <= descriptors <= DESCRIPTORS_MAX:
        raise ProtocolError(f"reply with {descriptors} descriptors, at most {DESCRIPTORS_MAX}")
    environment = b"".join(_pair(name, value) for name, value in reply.environment.items())
    if len(environment) > ENVIRONMENT_MAX_BYTES:
        raise ProtocolError(f"reply environment of {len(environment)} bytes, at most {ENVIRONMENT_MAX_BYTES}")
    record = _REPLY.pack(
        MAGIC,
        VERSION,
        REPLY_BYTES,
        reply.verdict.value,
        int(reply.adopted),
        descriptors,
        0,
        len(environment),
        _padded("job", reply.job_id, JOB_BYTES),
        _padded("summary", reply.summary, SUMMARY_BYTES),
        _padded("message", reply.message, MESSAGE_BYTES),
    )
    return record + environment


def _action(name: str, value: int) -> Action:
    try:
        return _ACTIONS[value]
    except KeyError:
        raise ValueError(f"{name} is {value}, expected 1 to {len(_ACTIONS)}") from None


def _flag(name: str, value: int) -> bool:
    if value not in (0, 1):
        raise ValueError(f"{name} is {value}, expected 0 or 1")
    return value == 1


def _text(name: str, field: bytes) -> str:
    text, nul, rest = field.partition(b"\0")
    if not nul or rest.strip(b"\0"):
        raise ValueError(f"{name} is not NUL-padded text")
    # Login names are bytes to the system; what is not UTF-8 stays visible in the log instead of failing the login.
    return text.decode("utf-8", "backslashreplace")


def _connection(
    family: int, remote_address: bytes, remote_port: int, local_address: bytes, local_port: int
) -> Optional[Connection]:
    if family == 0:
        if any(remote_address) or any(local_address) or remote_port or local_port:
            raise ValueError("family is 0 but there are addresses")
        return None
    if family == 4:
        if any(remote_address[4:]) or any(local_address[4:]):
            raise ValueError("an IPv4 address is longer than 4 bytes")
        return Connection(
            Endpoint(ipaddress.IPv4Address(remote_address[:4]), remote_port),
            Endpoint(ipaddress.IPv4Address(local_address[:4]), local_port),
        )
    if family == 6:
        return Connection(
            Endpoint(ipaddress.IPv6Address(remote_address), remote_port),
            Endpoint(ipaddress.IPv6Address(local_address), local_port),
        )
    raise ValueError(f"family is {family}, expected 0, 4 or 6")


def _padded(name: str, text: str, width: int) -> bytes:
    data = text.encode("utf-8")
    if len(data) >= width or b"\0" in data:
        raise ProtocolError(f"reply {name} of {len(data)} bytes does not fit {width} with its NUL")
    return data


def _pair(name: str, value: str) -> bytes:
    if not _ENVIRONMENT_NAME.fullmatch(name) or "\0" in value:
        raise ProtocolError(f"{name[:32]!r} and its value are no environment entry")
    return f"{name}={value}\0".encode("utf-8", "surrogateescape")
