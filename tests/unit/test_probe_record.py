"""The header is the only definition of what passes between the probe and the agent; record.py mirrors it."""

from __future__ import annotations

import dataclasses
import errno
import ipaddress
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import pytest

from adoptd.model import Connection, Endpoint, ProbeError
from adoptd.probe import pins, record, store, syscalls
from adoptd.probe.btf import Btf
from adoptd.probe.sources import find_sources, is_schema, schema_of

_QUERY = "adopt_query"
_RECORD = "adopt_record"
_OTHERS = {
    "adopt_member": record.MEMBER_FIELDS,
    "adopt_move": record.MOVE_FIELDS,
    "adopt_connected": record.CONNECTED_FIELDS,
}


def _facts_of_the_header(directory: Path) -> Dict[str, int]:
    """Compile the header alone and let the compiler say every size, offset and number."""
    wanted: List[Tuple[str, str]] = [
        ("sizeof query", f"sizeof(struct {_QUERY})"),
        ("sizeof record", f"sizeof(struct {_RECORD})"),
        ("query offset", "ADOPT_QUERY_OFFSET"),
        ("comm bytes", "ADOPT_COMM_BYTES"),
        ("counters", "ADOPT_COUNTERS_TOTAL"),
        ("offset record", f"offsetof(struct {_QUERY}, record)"),
    ]
    for name, _ in record.RECORD_FIELDS:
        wanted += [(f"offset {name}", f"offsetof(struct {_RECORD}, {name})")]
        wanted += [(f"sizeof {name}", f"sizeof(((struct {_RECORD} *)0)->{name})")]
    for name, _ in record.QUESTION_FIELDS + record.ANSWER_FIELDS:
        wanted += [(f"offset {name}", f"offsetof(struct {_QUERY}, {name})")]
        wanted += [(f"sizeof {name}", f"sizeof(((struct {_QUERY} *)0)->{name})")]
    for struct_name, fields in _OTHERS.items():
        wanted += [(f"sizeof {struct_name}", f"sizeof(struct {struct_name})")]
        for name, _ in fields:
            wanted += [(f"offset {struct_name}.{name}", f"offsetof(struct {struct_name}, {name})")]
            wanted += [(f"sizeof {struct_name}.{name}", f"sizeof(((struct {struct_name} *)0)->{name})")]
    wanted += [("sizeof share", "sizeof(struct adopt_share)"), ("path bytes", "ADOPT_PATH_BYTES")]
    wanted += [("sizeof watched", "sizeof(struct adopt_watched)"), ("sizeof pace", "sizeof(struct adopt_pace)")]
    wanted += [("connected bytes", "ADOPT_CONNECTED_BUFFER_BYTES"), ("connects", "ADOPT_CONNECTED_OF_USER_MAX")]
    wanted += [("own netns", "ADOPT_NETNS_OWN"), ("twins unknown", "ADOPT_TWINS_UNKNOWN")]
    wanted += [("members max", "ADOPT_MEMBERS_MAX"), ("shares", "ADOPT_SHARES")]
    wanted += [("event bytes", "ADOPT_EVENT_BUFFER_BYTES"), ("window ns", "ADOPT_EVENT_WINDOW_NS")]
    wanted += [(f"event {event.name}", f"ADOPT_EVENT_{event.name}") for event in record.EventType]
    wanted += [(f"label {label.name}", f"ADOPT_LABEL_{label.name}") for label in record.Label]
    wanted += [(f"outcome {outcome.name}", f"ADOPT_OUTCOME_{outcome.name}") for outcome in record.Outcome]
    wanted += [(f"counter {name}", f"ADOPT_COUNT_{name.upper()}") for name in record.COUNTERS]
    prints = "".join(f'printf("{name}=%llu\\n", (unsigned long long)({value}));' for name, value in wanted)
    source = directory / "facts.c"
    # The header first: it must stand on its own.
    source.write_text(
        f'#include "adopt_record.h"\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {{ {prints} return 0; }}\n'
    )
    program = directory / "facts"
    flags = ["-Wall", "-Wextra", "-Wpadded", "-Werror", "-I", str(find_sources())]
    subprocess.run(["gcc", *flags, "-o", str(program), str(source)], check=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, _, value in (line.partition("=") for line in printed.splitlines())}


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, int]:
    return _facts_of_the_header(tmp_path_factory.mktemp("header"))


def _expected_fields(fields: Tuple[Tuple[str, str], ...], start: int) -> Dict[str, int]:
    facts = {}
    for index, (name, code) in enumerate(fields):
        before = "=" + "".join(earlier for _, earlier in fields[:index])
        facts[f"offset {name}"] = start + struct.calcsize(before)
        facts[f"sizeof {name}"] = struct.calcsize("=" + code)
    return facts


def test_the_mirror_is_the_header(header: Dict[str, int]) -> None:
    """Every size, offset, flag, outcome and counter is the same on both sides, and there is none besides."""
    expected = {
        "sizeof query": record.QUERY_BYTES,
        "sizeof record": record.RECORD.size,
        "query offset": record.QUERY_OFFSET,
        "comm bytes": record.COMM_BYTES,
        "counters": len(record.COUNTERS),
        "offset record": record.QUERY_BYTES - record.RECORD.size,
        **_expected_fields(record.RECORD_FIELDS, 0),
        **_expected_fields(record.QUESTION_FIELDS + record.ANSWER_FIELDS, 0),
        **{
            f"{fact.split()[0]} {struct_name}.{fact.split()[1]}": number
            for struct_name, fields in _OTHERS.items()
            for fact, number in _expected_fields(fields, 0).items()
        },
        "sizeof adopt_member": record.MEMBER.size,
        "sizeof adopt_move": record.MOVE.size,
        "sizeof share": record.SHARE_BYTES,
        "path bytes": record.PATH_BYTES,
        "sizeof adopt_connected": record.CONNECTED.size,
        "sizeof watched": record.WATCHED_BYTES,
        "sizeof pace": record.PACE_BYTES,
        "connected bytes": record.CONNECTED_BUFFER_BYTES,
        "connects": record.CONNECTED_OF_USER_MAX,
        "own netns": record.NETNS_OWN,
        "twins unknown": record.TWINS_UNKNOWN,
        "members max": record.MEMBERS_MAX,
        "shares": record.SHARES,
        "event bytes": record.EVENT_BUFFER_BYTES,
        "window ns": round(record.EVENT_WINDOW_S * 1e9),
        **{f"event {event.name}": event.value for event in record.EventType},
        **{f"label {label.name}": label.value for label in record.Label},
        **{f"outcome {outcome.name}": outcome.value for outcome in record.Outcome},
        **{f"counter {name}": index for index, name in enumerate(record.COUNTERS)},
    }
    assert header == expected


def _packet(returned: int, outcome: int, flags: int, state: int = 1) -> bytearray:
    packet = bytearray(record.PACKET_BYTES)
    offset = record.QUERY_OFFSET + record.QUESTION.size
    struct.pack_into("=IIII", packet, offset, outcome, state, 3, record.TWINS_UNKNOWN)
    record.RECORD.pack_into(packet, offset + 16, 12345, 678, 42, 1001, flags, 0, b"ssh\xff\0left over")
    return packet


@pytest.mark.parametrize(
    ("returned", "outcome", "flags"),
    [
        (0, 0, 1),  # nothing ran: zeroes are never an answer
        (6, 0, 1),
        (0, 6, 1),
        (5, 6, 1),  # the program's two words differ
        (7, 7, 1),  # our question was not understood
        (8, 8, 1),  # an outcome of another release
        (6, 6, 0),  # a label of no origin
        (6, 6, 3),  # of both origins
        (6, 6, 5),  # shared is for seeded ones
        (6, 6, 9),  # a flag of another release
    ],
)
def test_an_answer_that_is_not_ours_is_refused(returned: int, outcome: int, flags: int) -> None:
    """An answer that the header does not allow raises: it is not read as "not found"."""
    with pytest.raises(ProbeError):
        record.decode_answer(_packet(returned, outcome, flags), returned)


@pytest.mark.parametrize("outcome", [o for o in record.Outcome if o.name not in ("MALFORMED", "LABELLED")])
def test_no_record_but_with_a_label(outcome: record.Outcome) -> None:
    """Whatever bytes are where the record would be, only LABELLED makes them a record."""
    answer = record.decode_answer(_packet(outcome, outcome, 1), outcome)
    assert (answer.outcome, answer.record) == (outcome, None)


def test_a_label_is_read_whole() -> None:
    """Every field of a label arrives under its own name; comm may hold any bytes."""
    answer = record.decode_answer(_packet(6, 6, 1), 6)
    assert answer.record is not None
    assert dataclasses.asdict(answer.record) == {
        "pid": 42,
        "uid": 1001,
        "cgroup_id": 678,
        "labelled_at_ns": 12345,
        "comm": "ssh\\xff",
        "seeded": False,
        "shared": False,
    }
    assert answer.record.connected_at_ns == 12345


def test_a_seeded_label_has_no_connect_time() -> None:
    """When a socket older than the probe was connected is unknown, not the time it was labelled."""
    answer = record.decode_answer(_packet(6, 6, 6), 6)
    assert answer.record is not None
    assert (answer.record.connected_at_ns, answer.record.shared) == (None, True)


def test_a_question_carries_nothing_of_the_last_answer() -> None:
    """A buffer used again is blank where the next answer goes, so an old one cannot be read twice."""
    packet = _packet(6, 6, 1)
    ends = (Endpoint(ipaddress.ip_address("10.1.2.3"), 0x1234), Endpoint(ipaddress.ip_address("10.4.5.6"), 22))
    record.encode_question(packet, Connection(*ends))
    question = packet[record.QUERY_OFFSET :]
    pad = bytes(12)
    assert bytes(question[:8]) == struct.pack("=I", 4) + b"\x12\x34\x00\x16"
    assert bytes(question[8:40]) == bytes([10, 1, 2, 3]) + pad + bytes([10, 4, 5, 6]) + pad
    assert bytes(question[40:48]) == struct.pack("=II", record.NETNS_OWN, 0)
    assert not any(question[48:])


def test_the_schema_is_of_every_source(tmp_path: Path) -> None:
    """One byte changed, moved to another file, or one file more: each is another schema."""
    copy = tmp_path / "bpf"
    shutil.copytree(find_sources(), copy)
    seen = {schema_of(copy)}
    assert seen == {schema_of(find_sources())}
    program, header = copy / "probe.c", copy / "adopt_record.h"
    original = header.read_bytes()
    header.write_bytes(original + b"\n")
    seen.add(schema_of(copy))
    header.write_bytes(original)
    program.write_bytes(b"\n" + program.read_bytes())
    seen.add(schema_of(copy))
    (copy / "include" / "another.h").write_bytes(b"")
    seen.add(schema_of(copy))
    assert len(seen) == 4
    assert all(is_schema(name) for name in seen)


def test_missing_sources_name_the_place(tmp_path: Path) -> None:
    """Without sources the error says where they were looked for."""
    with pytest.raises(ProbeError, match=str(tmp_path)):
        find_sources(tmp_path)


@pytest.mark.parametrize("data", [b"", b"\x9f\xeb\x01\x00", bytes(64), b"\x9f\xeb\x01\x00" + b"\xff" * 60])
def test_what_is_not_type_information_is_refused(data: bytes) -> None:
    """Truncated or foreign bytes are an error, never an offset."""
    with pytest.raises(ProbeError, match="BTF"):
        Btf(data)


def test_an_offset_through_an_unnamed_struct() -> None:
    """Members of unnamed structs count as the parent's, and a missing member is an error naming it."""
    strings = b"\0outer\0first\0inner\0"
    outer, first, inner = (strings.index(name) for name in (b"outer", b"first", b"inner"))
    word = struct.pack("=IIII", 0, 1 << 24, 4, 32)  # type 1: a 4-byte integer
    unnamed = struct.pack("=III", 0, 4 << 24 | 1, 8) + struct.pack("=III", inner, 1, 32)  # type 2
    whole = struct.pack("=III", outer, 4 << 24 | 2, 16)
    whole += struct.pack("=III", first, 1, 0) + struct.pack("=III", 0, 2, 64)
    types = word + unnamed + whole
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    btf = Btf(header + types + strings)
    assert btf.offset_of(("outer", "inner")) == 12
    with pytest.raises(ProbeError, match=r"outer\.absent"):
        btf.offset_of(("outer", "absent"))
    with pytest.raises(ProbeError, match=r"nobody\.inner"):
        btf.offset_of(("nobody", "inner"))


@pytest.mark.parametrize(
    ("machine", "pointer_bytes", "number"),
    [("x86_64", 8, 321), ("aarch64", 8, 280), ("x86_64", 4, None), ("aarch64", 4, None), ("armv7l", 4, None)],
)
def test_the_system_call_is_this_interpreter_s_own(machine: str, pointer_bytes: int, number: Optional[int]) -> None:
    """A 32-bit one on a 64-bit kernel has another table, where our number is another call."""
    assert syscalls.number_on(machine, pointer_bytes) == number


def test_pins_that_cannot_be_listed_are_an_error_of_the_probe_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As all others are: whoever keeps watch over the probe goes on, and tries again."""

    def list_nothing(directory: int) -> List[str]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(store, "open_trusted", lambda name, shown: os.open(name, os.O_RDONLY))
    monkeypatch.setattr(os, "listdir", list_nothing)
    with pytest.raises(ProbeError, match="Too many open files"):
        pins.open_schema(tmp_path, "0" * 32)
