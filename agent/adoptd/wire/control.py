"""What ``adoptctl`` and the agent say to each other over the users' socket.

One frame each way: a command with its arguments, and a result or an error in words. Arguments are
strings, so that the agent parses and refuses everything itself, whoever wrote the client.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Dict, Mapping, Union

from adoptd.model import ProtocolError
from adoptd.wire.strict_json import Fields, decode_object, encode_object

VERSION = 1

# The longest command is `explain` with every option of a PAM line.
COMMAND_MAX_BYTES = 8192
_ARGUMENT_MAX = 512
_ARGUMENTS_MAX = 8

Result = Dict[str, object]


@dataclass(frozen=True)
class Command:
    """What is asked for, by name, and its arguments."""

    name: str
    arguments: Mapping[str, str]


def encode_command(command: Command) -> bytes:
    """The frame body of ``command``."""
    return encode_object({"v": VERSION, "command": command.name, "arguments": dict(command.arguments)})


def decode_command(body: bytes) -> Command:
    """The command in a frame body. Raises ProtocolError."""
    value = decode_object(body, "command")
    fields = Fields(value, frozenset({"v", "command", "arguments"}), "command")
    fields.integer("v", VERSION, VERSION)
    found = value["arguments"]
    if not isinstance(found, dict) or len(found) > _ARGUMENTS_MAX:
        raise ProtocolError(f"command: arguments are not an object of at most {_ARGUMENTS_MAX} strings")
    given = Fields(found, frozenset(found), "arguments")
    return Command(fields.text("command", 32), {key: given.text(key, _ARGUMENT_MAX) for key in found})


def encode_result(result: Result) -> bytes:
    """The frame body of a command that was carried out."""
    return encode_object({"v": VERSION, "ok": True, "result": result})


def encode_error(text: str) -> bytes:
    """The frame body of a command that was not."""
    return encode_object({"v": VERSION, "ok": False, "error": text})


def decode_reply(body: bytes) -> Union[Result, str]:
    """The result, or the error's text, in a frame body from the agent. Raises ProtocolError."""
    try:
        value = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the agent's reply is not JSON: {error}") from None
    if isinstance(value, dict) and value.get("v") == VERSION:
        result, text = value.get("result"), value.get("error")
        if value.get("ok") is True and isinstance(result, dict):
            return result
        if value.get("ok") is False and isinstance(text, str):
            return text
    raise ProtocolError("the agent's reply is not of this version")
