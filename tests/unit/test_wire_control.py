"""The codec between adoptctl and the agent: a user's bytes on one side, root's on the other."""

from __future__ import annotations

import json
from typing import Dict, Union

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adoptd.model import ProtocolError
from adoptd.wire import control as wire
from adoptd.wire.control import Command

VALID: Dict[str, object] = {"v": 1, "command": "whois", "arguments": {"source": "10.0.0.1:1"}}


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"v": True},
        {"v": "1"},
        {"v": None},
        {"command": ""},
        {"command": None},
        {"command": "x" * 33},
        {"command": "whois\n"},
        {"command": ["whois"]},
        {"arguments": None},
        {"arguments": []},
        {"arguments": "source"},
        {"arguments": {"source": 1}},
        {"arguments": {"source": None}},
        {"arguments": {"source": ""}},
        {"arguments": {"source": "x" * 513}},
        {"arguments": {"source": "a\x1b[2J"}},
        {"arguments": {"source": {"a": "b"}}},
        {"arguments": {str(n): "x" for n in range(9)}},
        {"extra": 1},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_command_with_one_fault_is_refused(changes: Dict[str, object]) -> None:
    """Before any command is looked up."""
    with pytest.raises(ProtocolError):
        wire.decode_command(json.dumps({**VALID, **changes}).encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"null",
        b"[]",
        b"{}",
        b'{"v":1}',
        b'{"v":2,"ok":true,"result":{}}',
        b'{"v":1,"ok":1,"result":{}}',
        b'{"v":1,"ok":true,"result":[]}',
        b'{"v":1,"ok":true}',
        b'{"v":1,"ok":false}',
        b'{"v":1,"ok":false,"error":1}',
        b'{"v":1,"ok":false,"result":{}}',
        b"[" * 200_000,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_a_reply_that_is_none_is_refused(body: bytes) -> None:
    """ProtocolError, which adoptctl turns into a sentence, and not a traceback."""
    with pytest.raises(ProtocolError, match="the agent's reply"):
        wire.decode_reply(body)


TEXTS = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=32)


@given(TEXTS, st.dictionaries(TEXTS, TEXTS, max_size=8))
def test_command_round_trip(name: str, arguments: Dict[str, str]) -> None:
    """Every command that a terminal can spell in ASCII."""
    assert wire.decode_command(wire.encode_command(Command(name, arguments))) == Command(name, arguments)


@given(st.binary(max_size=100))
def test_any_bytes(body: bytes) -> None:
    """Decoded or refused, on both sides."""
    for decode in (wire.decode_command, wire.decode_reply):
        try:
            decode(body)
        except ProtocolError:
            continue


RESULTS = st.dictionaries(
    st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.text(max_size=20), max_size=5
)


@given(RESULTS | st.text(max_size=50))
def test_reply_round_trip(reply: Union[Dict[str, object], str]) -> None:
    """A result is an object, an error is a text, and neither passes for the other."""
    body = wire.encode_error(reply) if isinstance(reply, str) else wire.encode_result(reply)
    assert wire.decode_reply(body) == reply
