"""Netlink's framing and conntrack's messages: any bytes are read or refused, and only exact answers are believed."""

from __future__ import annotations

import contextlib
import errno
import struct
from typing import Dict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adoptd.connections import netlink
from adoptd.connections.conntrack_codec import CT_NEW, decode_answer, encode_question
from adoptd.connections.netlink import attribute, attributes, decode, nested, number
from adoptd.model import Connection, Endpoint, ProtocolError

SEEN = {
    4: Connection(Endpoint.parse("10.95.2.1:33779"), Endpoint.parse("10.95.2.2:36067")),
    6: Connection(Endpoint.parse("[fd95:2::1]:43079"), Endpoint.parse("[fd95:2::2]:45847")),
}
BEFORE = {
    4: Connection(Endpoint.parse("10.95.1.2:33779"), Endpoint.parse("10.95.2.2:36067")),
    6: Connection(Endpoint.parse("[fd95:1::2]:43079"), Endpoint.parse("[fd95:2::2]:45847")),
}
# Recorded on Linux 6.18 (x86_64) behind nftables' masquerade: the answers about SEEN.
RECORDED = {
    4: bytes.fromhex(
        "020000003400018014000180080001000a5f0102080002000a5f02021c00028005000100060000000600020083f30000060003008ce30000"
        "3400028014000180080001000a5f0202080002000a5f02011c0002800500010006000000060002008ce300000600030083f30000"
        "080003000000019e080008000000000008000c0061992f4b08000b0000000002080007000006977f300004802c000180"
        "0500010003000000050002000a000000050003000a00000006000400230000000600050023000000"
    ),
    6: bytes.fromhex(
        "0a0000004c0001802c00018014000300fd95000100000000000000000000000214000400fd950002000000000000000000000002"
        "1c000280050001000600000006000200a847000006000300b3170000"
        "4c0002802c00018014000300fd95000200000000000000000000000214000400fd950002000000000000000000000001"
        "1c000280050001000600000006000200b317000006000300a8470000"
        "080003000000019e080008000000000008000c006ff6296908000b00000000020800070000069780300004802c000180"
        "0500010003000000050002000a000000050003000a00000006000400230000000600050023000000"
    ),
}
VERSIONS = pytest.mark.parametrize("version", [4, 6])


def message(body: bytes, kind: int = CT_NEW, sequence: int = 1, flags: int = 0) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


@VERSIONS
def test_the_recorded_answers(version: int) -> None:
    """What was made in a container, of what another node sees."""
    assert decode_answer(RECORDED[version], SEEN[version]) == BEFORE[version]


@VERSIONS
def test_an_answer_about_another_connection_is_none(version: int) -> None:
    """The other way round, another port, and what the connection was before: the kernel may find an entry by those."""
    seen = SEEN[version]
    for other in (
        Connection(seen.destination, seen.source),
        Connection(Endpoint(seen.source.address, 1), seen.destination),
        Connection(seen.source, Endpoint(seen.destination.address, 1)),
        BEFORE[version],
        SEEN[10 - version],
    ):
        assert decode_answer(RECORDED[version], other) is None


def test_a_connection_that_is_not_translated_is_none() -> None:
    """Conntrack has an entry for each connection; the two tuples of one that is not translated are mirror images."""
    body = RECORDED[4]
    same = body[:4] + body[4:56].replace(bytes([10, 95, 1, 2]), bytes([10, 95, 2, 1])) + body[56:]
    assert decode_answer(same, SEEN[4]) is None


@VERSIONS
def test_the_question_is_the_tuple_of_the_answers(version: int) -> None:
    """Byte by byte the second tuple of the recorded entry, in its family."""
    body = encode_question(SEEN[version])
    size = {4: 52, 6: 76}[version]
    assert body[:4] == bytes([{4: 2, 6: 10}[version], 0, 0, 0])
    assert body[4:] == RECORDED[version][4 + size : 4 + 2 * size]


@given(st.binary(max_size=300), st.sampled_from([4, 6]))
def test_any_bytes_are_read_or_refused(data: bytes, version: int) -> None:
    """Nothing but ProtocolError comes out of hostile bytes."""
    with contextlib.suppress(ProtocolError):
        decode_answer(data, SEEN[version])
    with contextlib.suppress(ProtocolError, OSError):
        decode(data, CT_NEW)


@given(st.sampled_from([4, 6]), st.data())
def test_a_changed_byte_never_makes_it_another_connection(version: int, data: st.DataObject) -> None:
    """Refused, none, or the same; a changed original tuple is read as it is, since that is what is asked for."""
    body = bytearray(RECORDED[version])
    size = {4: 52, 6: 76}[version]
    at = data.draw(st.integers(4 + size, len(body) - 1))
    body[at] = data.draw(st.integers(0, 255))
    try:
        found = decode_answer(bytes(body), SEEN[version])
    except ProtocolError:
        return
    assert found in (None, BEFORE[version])


@given(st.sampled_from([4, 6]), st.data())
def test_an_answer_cut_short_is_refused(version: int, data: st.DataObject) -> None:
    """Wherever it is cut but between attributes."""
    body = RECORDED[version]
    cut = data.draw(st.integers(0, {4: 107, 6: 155}[version]))
    with pytest.raises(ProtocolError):
        decode_answer(body[:cut], SEEN[version])


@pytest.mark.parametrize("change", ["protocol", "port", "family", "twice"])
def test_what_is_not_a_tcp_connection_is_refused(change: str) -> None:
    """UDP's entry, port 0, another address family, an attribute that is there twice."""
    body = RECORDED[4]
    changed = {
        "protocol": body.replace(bytes([5, 0, 1, 0, 6]), bytes([5, 0, 1, 0, 17])),
        "port": body.replace(bytes([6, 0, 2, 0, 0x83, 0xF3]), bytes([6, 0, 2, 0, 0, 0])),
        "family": b"\x07" + body[1:],
        "twice": body + body[4:56],
    }[change]
    with pytest.raises(ProtocolError):
        decode_answer(changed, SEEN[4])


@given(st.dictionaries(st.integers(0, 0x3FFF), st.binary(max_size=40), max_size=8))
def test_attributes_are_read_as_they_were_written(wanted: Dict[int, bytes]) -> None:
    """Whatever their lengths, and whether or not they are marked as nested."""
    assert attributes(b"".join(attribute(kind, payload) for kind, payload in wanted.items())) == wanted
    assert attributes(nested(7, *(attribute(kind, payload) for kind, payload in wanted.items()))).keys() == {7}


def test_a_number_has_its_width() -> None:
    """A missing one, and one of another width, are refused."""
    assert number({1: b"\0\x16"}, 1, "!H") == 22
    for found in ({}, {1: b"\0"}, {1: bytes(4)}):
        with pytest.raises(ProtocolError):
            number(found, 1, "!H")


def test_answers_come_in_parts() -> None:
    """Several messages of one part, the end of a dump, and what is none of ours."""
    assert decode(message(b"abcd") + message(b"efgh", flags=2), CT_NEW) == (False, [b"abcd", b"efgh"])
    assert decode(message(b"abcd") + message(struct.pack("=i", 0), 3), CT_NEW) == (True, [b"abcd"])
    for kind, wrong in (
        ("sequence", message(b"", sequence=2)),
        ("type", message(b"", 5)),
        ("length", message(b"")[:-1]),
    ):
        with pytest.raises(ProtocolError):
            decode(wrong, CT_NEW)
        assert kind


def test_the_kernels_refusals_are_its_own_numbers() -> None:
    """ENOENT is no such entry, EINTR a dump that changed meanwhile."""
    for number_, kind in ((errno.ENOENT, FileNotFoundError), (errno.EPERM, PermissionError)):
        with pytest.raises(kind):
            decode(message(struct.pack("=i", -number_), 2), CT_NEW)
    with pytest.raises(InterruptedError):
        decode(message(b"abcd", flags=0x12), CT_NEW)
    for body in (b"", struct.pack("=i", 5)):
        with pytest.raises(ProtocolError):
            decode(message(body, 2), CT_NEW)
    assert netlink.NLM_F_DUMP == 0x300
