"""Strict JSON: what the json module would let pass and a security decision must not."""

from __future__ import annotations

import json
from typing import Dict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adoptd.model import ProtocolError
from adoptd.wire.strict_json import Fields, decode_object, encode_object


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"1",
        b'"{}"',
        b"[]",
        b"[{}]",
        b"{",
        b"{}{}",
        b"{} x",
        b'{"a":1,}',
        b"{'a':1}",
        b'{"a":1,"a":1}',
        b'{"a":1,"\\u0061":2}',
        b'{"a":{"b":1,"b":2}}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":01}',
        b'{"a":"\n"}',
        b'{"a":"\x00"}',
        b'{"a":"\xff"}',
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        b'{"a":' * 50_000,
        b"[" * 100_000,
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_not_one_plain_object_is_refused(body: bytes) -> None:
    """ProtocolError and nothing else, with the message's name."""
    with pytest.raises(ProtocolError, match=r"^question is"):
        decode_object(body, "question")


@pytest.mark.parametrize("found", [{}, {"a": 1}, {"a": 1, "b": 2, "c": 3}, {"a": 1, "B": 2}, {"a": 1, "b ": 2}])
def test_the_set_of_keys_is_exact(found: Dict[str, object]) -> None:
    """A missing key has no default, an unknown one is not passed over."""
    with pytest.raises(ProtocolError, match=r"missing keys .* unknown keys"):
        Fields(found, frozenset({"a", "b"}), "question")


def test_a_long_unknown_key_is_not_repeated_whole() -> None:
    """The message goes to the log: the sender does not decide its length."""
    with pytest.raises(ProtocolError) as refusal:
        Fields({"x" * 4000: 1}, frozenset({"a"}), "question")
    assert len(str(refusal.value)) < 120


@pytest.mark.parametrize("value", [True, False, 1.0, 1e999, "1", None, [1], {}, -1, 11, 10**400])
def test_what_is_no_whole_number_in_bounds(value: object) -> None:
    """true is not 1 and 1.0 is not 1."""
    fields = Fields({"n": value}, frozenset({"n"}), "q")
    with pytest.raises(ProtocolError, match=r"n is not a whole number in 0\.\.10"):
        fields.integer("n", 0, 10)


@pytest.mark.parametrize(
    "value", ["", "x" * 11, "a\nb", "\x00", "\x7f", "\u00e9", "\ud800", "\u202e", 1, None, True, []]
)
def test_what_is_no_printable_ascii_text(value: object) -> None:
    """Control characters and other scripts cannot reach a log or a path by way of a message."""
    fields = Fields({"t": value}, frozenset({"t"}), "q")
    with pytest.raises(ProtocolError, match="q: t "):
        fields.text("t", 10)


@pytest.mark.parametrize("value", [0, 1, "true", None, []])
def test_what_is_neither_true_nor_false(value: object) -> None:
    """1 is not true."""
    with pytest.raises(ProtocolError, match="b is not true or false"):
        Fields({"b": value}, frozenset({"b"}), "q").boolean("b")


def test_what_is_taken() -> None:
    """The bounds belong to the values; null is None only where the accessor says so."""
    fields = Fields({"a": 0, "b": 10, "c": None, "d": "x" * 10, "e": True}, frozenset("abcde"), "q")
    assert (fields.integer("a", 0, 10), fields.integer("b", 0, 10)) == (0, 10)
    assert (fields.optional_integer("c", 0, 10), fields.optional_text("c", 10)) == (None, None)
    assert (fields.optional_integer("b", 0, 10), fields.optional_text("d", 10)) == (10, "x" * 10)
    assert fields.text("d", 10) == "x" * 10
    assert fields.boolean("e") is True


PLAIN = st.dictionaries(
    st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.text(max_size=8), max_size=5
)


@given(PLAIN)
def test_round_trip_in_ascii(value: Dict[str, object]) -> None:
    """Any object comes back as it was, and the bytes are ASCII whatever the text."""
    body = encode_object(value)
    assert body.isascii()
    assert decode_object(body, "x") == value


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_decode_or_are_refused(body: bytes) -> None:
    """Never another exception; what is decoded is what json itself makes of it."""
    try:
        value = decode_object(body, "x")
    except ProtocolError:
        return
    assert value == json.loads(body)
