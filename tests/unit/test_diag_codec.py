"""The sock_diag codec: any bytes are a socket, an error, or refused; and only exact answers are believed."""

from __future__ import annotations

import contextlib
import errno
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adoptd.connections.candidates import CONNECTED_STATES
from adoptd.connections.diag_codec import (
    DiagError,
    DiagSocket,
    decode_reply,
    encode_question,
)
from adoptd.model import Connection, Endpoint, ProtocolError

SEQUENCE = 7
CONNECTION = Connection(Endpoint.parse("127.0.0.1:44450"), Endpoint.parse("127.0.0.1:36817"))

# Recorded on Linux 6.18 (x86_64), uid and cgroup id changed from root's: the answer to CONNECTION.
RECORDED = bytes.fromhex(
    "7c00000014000000070000005818000002010000ada28fd17f0000010000000000000000000000007f000001000000000000000000000000"
    "0000000001000000000000000000000000000000000000003ed400005c6b00000500080000000000"
    "08000f00000000000c0015002a000000000000000600160052000000"
)
SOCKET = DiagSocket(2, 1, b"\x7f\0\0\1", 44450, b"\x7f\0\0\1", 36817, 54334, 27484, 42)


def reply(body: bytes, kind: int = 20, sequence: int = SEQUENCE) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, sequence, 0) + body


def with_attributes(attributes: bytes) -> bytes:
    return reply(RECORDED[16:88] + attributes)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """Nothing but ProtocolError comes out of hostile bytes."""
    with contextlib.suppress(ProtocolError):
        assert isinstance(decode_reply(data, SEQUENCE), (DiagSocket, DiagError))


@given(st.binary(max_size=200), st.sampled_from([2, 20]))
def test_any_body_under_a_good_header_is_read_or_refused(body: bytes, kind: int) -> None:
    """The same, past the header's checks."""
    with contextlib.suppress(ProtocolError):
        assert isinstance(decode_reply(reply(body, kind), SEQUENCE), (DiagSocket, DiagError))


@given(st.integers(16, len(RECORDED) - 1), st.integers(0, 255))
def test_a_changed_byte_is_the_same_connection_only_if_the_tuple_is(at: int, value: int) -> None:
    """What is_source_of() compares lies at bytes 20 (ports), 24 and 40 (IPv4 addresses)."""
    changed = bytearray(RECORDED)
    changed[at] = value
    with contextlib.suppress(ProtocolError):
        found = decode_reply(bytes(changed), SEQUENCE)
        assert isinstance(found, DiagSocket)
        if 20 <= at < 24 or 24 <= at < 28 or 40 <= at < 44:
            assert found.is_source_of(CONNECTION) == (changed == RECORDED)


@given(st.integers(0, len(RECORDED) - 1))
def test_a_message_cut_short_is_refused(length: int) -> None:
    """As a buffer that was too small would leave it."""
    with pytest.raises(ProtocolError):
        decode_reply(RECORDED[:length], SEQUENCE)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no header"),
        (RECORDED + b"\0", "says that it has 124"),
        (reply(RECORDED[16:], sequence=SEQUENCE + 1), "question 8"),
        (reply(RECORDED[16:], kind=3), "type 3"),
        (reply(RECORDED[16:87]), "shorter than a socket"),
        (reply(b"\x01" + RECORDED[17:]), "address family 1"),
        (reply(b"\xfe\xff\xff", kind=2), "no number"),
        (reply(struct.pack("=i", 0) + b"\0" * 16, kind=2), "number 0"),
        (reply(struct.pack("=i", 5) + b"\0" * 16, kind=2), "number 5"),
        (with_attributes(b"\x05\x00\x08"), "cut short"),
        (with_attributes(struct.pack("=HH", 3, 21)), "length 3"),
        (with_attributes(struct.pack("=HH", 0, 0)), "length 0"),
        (with_attributes(struct.pack("=HH", 13, 21) + b"\0" * 8), "length 13"),
        (with_attributes(struct.pack("=HHI", 8, 21, 1)), "cgroup id has 4 bytes, expected 8"),
        (with_attributes(struct.pack("=HHQ", 12, 21, 1) * 2), "attribute 21 is there twice"),
    ],
)
def test_garbled_messages_are_refused(data: bytes, why: str) -> None:
    """Each with the field that is wrong."""
    with pytest.raises(ProtocolError, match=why):
        decode_reply(data, SEQUENCE)


def test_the_uid_that_is_no_uid_is_refused() -> None:
    """(uid_t)-1 is nobody's."""
    at = RECORDED.index(struct.pack("=I", 54334))
    with pytest.raises(ProtocolError, match="no valid uid"):
        decode_reply(RECORDED[:at] + b"\xff" * 4 + RECORDED[at + 4 :], SEQUENCE)


def test_a_socket_nobody_holds_has_no_uid() -> None:
    """TIME_WAIT and orphans come with inode 0 and uid 0, which is not root."""
    tail = struct.pack("=5I", 60000, 0, 0, 0, 0)
    found = decode_reply(reply(RECORDED[16:68] + tail), SEQUENCE)
    assert isinstance(found, DiagSocket)
    assert (found.uid, found.inode, found.cgroup_id) == (None, None, None)
    assert not found.is_source_of(CONNECTION)


@pytest.mark.parametrize("state", sorted(set(range(14)) - CONNECTED_STATES))
def test_a_socket_that_is_not_connected_answers_nothing(state: int) -> None:
    """Listeners, half-open ones, requests and TIME_WAIT (include/net/tcp_states.h)."""
    assert not replace(SOCKET, state=state).is_source_of(CONNECTION)


@pytest.mark.parametrize(
    "other",
    [
        replace(SOCKET, local_port=44451),
        replace(SOCKET, remote_port=36818),
        replace(SOCKET, local_address=b"\x7f\0\0\2"),
        replace(SOCKET, remote_address=b"\x7f\0\0\2"),
        replace(SOCKET, local_address=b"\x7f\0\0\1".ljust(16, b"\0")),
        replace(SOCKET, inode=None, uid=None),
    ],
)
def test_an_answer_to_another_question_is_not_believed(other: DiagSocket) -> None:
    """Every address and port is compared with the question."""
    assert not other.is_source_of(CONNECTION)


def test_the_kernels_refusal_is_its_errno() -> None:
    """As the kernel sends it: the negative number, then the header it answers."""
    data = reply(struct.pack("=i", -errno.ENOENT) + encode_question(CONNECTION, SEQUENCE)[:16], kind=2)
    assert decode_reply(data, SEQUENCE) == DiagError(errno.ENOENT)


def test_a_recorded_reply() -> None:
    """Every field, against the numbers that getsockname(), fstat() and the cgroup gave at the time."""
    assert decode_reply(RECORDED, SEQUENCE) == SOCKET
    assert SOCKET.is_source_of(CONNECTION)


def test_a_mapped_socket_answers_the_ipv4_question() -> None:
    """An AF_INET6 socket holding ::ffff:127.0.0.1 is the same end."""
    mapped = bytes(10) + b"\xff\xff\x7f\0\0\1"
    body = b"\x0a" + RECORDED[17:24] + mapped * 2 + RECORDED[56:]
    found = decode_reply(reply(body), SEQUENCE)
    assert found == replace(SOCKET, family=10)
    assert replace(SOCKET, family=10).is_source_of(CONNECTION)


def test_the_question_for_ipv4() -> None:
    """struct nlmsghdr and inet_diag_req_v2, byte for byte: exact, no dump, no acknowledgement, no cookie."""
    assert encode_question(CONNECTION, SEQUENCE) == bytes.fromhex(
        "48000000140001000700000000000000"
        "02060000ffffffff"
        "ada28fd17f0000010000000000000000000000007f00000100000000000000000000000000000000ffffffffffffffff"
    )


def test_the_question_for_ipv6() -> None:
    """All sixteen bytes of both addresses, in the order source, destination."""
    question = encode_question(Connection(Endpoint.parse("[fd00::1]:1"), Endpoint.parse("[fd00::2]:2")), SEQUENCE)
    assert question[16] == 10
    assert question[24:60] == bytes.fromhex("00010002fd" + "00" * 14 + "01fd" + "00" * 14 + "02")
