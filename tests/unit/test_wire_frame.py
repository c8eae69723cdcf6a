"""Frames: a length that is out of bounds is refused on its four bytes alone."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adoptd.model import ProtocolError
from adoptd.wire import frame

BOUNDS = (frame.CALLERID_MAX_BYTES, frame.CONTROL_MAX_BYTES)


@pytest.mark.parametrize("prefix", [b"", b"\0", b"\0\0\0", b"\0\0\0\1\0"])
def test_a_prefix_is_four_bytes(prefix: bytes) -> None:
    """No more and no fewer."""
    with pytest.raises(ProtocolError, match=f"prefix is {len(prefix)} bytes, expected 4"):
        frame.decode_length(prefix, 4096)


@pytest.mark.parametrize("length", [0, 4097, 1 << 20, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_hostile_length_is_refused(length: int) -> None:
    """Zero, one over the bound, and what would be negative in a signed reading."""
    with pytest.raises(ProtocolError, match=f"frame of {length} bytes, expected 1 to 4096"):
        frame.decode_length(struct.pack("!I", length), 4096)


@pytest.mark.parametrize("body", [b"", b"x" * 4097])
def test_what_could_not_be_read_is_not_written(body: bytes) -> None:
    """The bound holds for the sender as well."""
    with pytest.raises(ProtocolError, match="expected 1 to 4096"):
        frame.encode_frame(body, 4096)


def test_the_layout_is_four_bytes_in_network_order() -> None:
    """Byte for byte, so that a second implementation can be written from it."""
    assert frame.encode_frame(b"ab", 4096) == b"\0\0\0\2ab"
    assert frame.PREFIX_BYTES == 4


@given(st.binary(min_size=1, max_size=300), st.sampled_from(BOUNDS))
def test_round_trip(body: bytes, bound: int) -> None:
    """What is framed is read back whole."""
    framed = frame.encode_frame(body, bound)
    assert framed[4 : 4 + frame.decode_length(framed[:4], bound)] == body
    assert len(framed) == 4 + len(body)


@given(st.binary(max_size=8), st.integers(1, 1 << 32))
def test_any_prefix_is_a_length_in_bounds_or_refused(prefix: bytes, bound: int) -> None:
    """Never another exception, never a length out of bounds."""
    try:
        length = frame.decode_length(prefix, bound)
    except ProtocolError:
        return
    assert 1 <= length <= bound
