"""The PAM record: the Python mirror against the C compiler, then hostile records, then every right one."""

from __future__ import annotations

import ipaddress
import re
import struct
import subprocess
from pathlib import Path
from typing import Dict, List, Tuple

import pytest
from fakes import REQUEST_LAYOUT, connection, pam_record
from hypothesis import given, settings
from hypothesis import strategies as st

from adoptd.model import UID_MAX, Connection, Endpoint, ProtocolError
from adoptd.policy import ALLOWED_ACTIONS, Action, Options
from adoptd.wire import pam
from adoptd.wire.pam import Mode, PamReply, Phase, Verdict

HEADER = Path(__file__).resolve().parents[2] / "pam_hook" / "adopt_wire.h"

_MEMBER = re.compile(r"^\t(?:u?int\d+_t|char) (\w+)(?:\[\d+\])?;", re.MULTILINE)
_ENUMERATOR = re.compile(r"\b(ADOPT_[A-Z_]+) = \d+")
_MACRO = re.compile(r"^#define (ADOPT_WIRE_\w+) +\w", re.MULTILINE)


class Header:
    """What the C compiler makes of adopt_wire.h: ``offset`` and ``size`` of "struct.member", and constants."""

    def __init__(self, directory: Path) -> None:
        text = HEADER.read_text()
        self.members: Dict[str, List[str]] = {}
        lines = []
        for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", text, re.MULTILINE | re.DOTALL):
            self.members[name] = _MEMBER.findall(body)
            lines.append(f'printf("{name} %zu 0\\n", sizeof(struct {name}));')
            for member in self.members[name]:
                of = f"sizeof(((struct {name} *)0)->{member}), offsetof(struct {name}, {member})"
                lines.append(f'printf("{name}.{member} %zu %zu\\n", {of});')
        for constant in (*_ENUMERATOR.findall(text), *_MACRO.findall(text)):
            lines.append(f'printf("{constant} %llu 0\\n", (unsigned long long){constant});')
        source = directory / "layout.c"
        source.write_text(
            f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\nint main(void)\n{{\n'
            + "\n".join(lines)
            + "\nreturn 0;\n}\n"
        )
        program = directory / "layout"
        subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(source)], check=True)
        printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
        self.size: Dict[str, int] = {}
        self.offset: Dict[str, int] = {}
        for line in printed.splitlines():
            name, size, offset = line.split()
            self.size[name], self.offset[name] = int(size), int(offset)

    def place(self, name: str) -> slice:
        return slice(self.offset[name], self.offset[name] + self.size[name])


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    return Header(tmp_path_factory.mktemp("layout"))


# ---- the mirror and the header


def test_sizes_and_constants_are_those_of_the_header(header: Header) -> None:
    """Every macro and every enumerator of the header has its equal here, and the other way round."""
    assert header.size["adopt_request"] == pam.REQUEST_BYTES
    assert header.size["adopt_reply"] == pam.REPLY_BYTES
    assert header.size["adopt_reply.job"] == pam.JOB_BYTES
    assert header.size["adopt_reply.summary"] == pam.SUMMARY_BYTES
    assert header.size["adopt_reply.message"] == pam.MESSAGE_BYTES
    mirrored = {
        "ADOPT_WIRE_MAGIC": pam.MAGIC,
        "ADOPT_WIRE_VERSION": pam.VERSION,
        "ADOPT_WIRE_ENVIRONMENT_MAX": pam.ENVIRONMENT_MAX_BYTES,
        "ADOPT_WIRE_DESCRIPTORS_MAX": pam.DESCRIPTORS_MAX,
        **{f"ADOPT_PHASE_{member.name}": member.value for member in Phase},
        **{f"ADOPT_MODE_{member.name}": member.value for member in Mode},
        **{f"ADOPT_VERDICT_{member.name}": member.value for member in Verdict},
        **{f"ADOPT_ACTION_{action.name}": decoded_action(action) for action in Action},
    }
    assert mirrored == {name: value for name, value in header.size.items() if name.startswith("ADOPT_")}


def decoded_action(action: Action) -> int:
    """The number that the mirror reads as ``action``, in an option that has it."""
    option = next(name for name, allowed in ALLOWED_ACTIONS.items() if action in allowed)
    for number in range(256):
        try:
            if getattr(pam.decode_request(pam_record(**{option: number})).options, option) is action:
                return number
        except ProtocolError:
            continue
    raise AssertionError(f"no number is {action}")


def test_the_hand_written_layout_of_these_tests_is_the_header_s(header: Header) -> None:
    """So that what the other tests build with it is what the module sends."""
    offset = 0
    assert [name for name, _ in REQUEST_LAYOUT] == header.members["adopt_request"]
    for name, code in REQUEST_LAYOUT:
        size = struct.calcsize("=" + code)
        assert (offset, size) == (header.offset[f"adopt_request.{name}"], header.size[f"adopt_request.{name}"]), name
        offset += size
    assert offset == header.size["adopt_request"]


def test_each_field_of_a_request_is_read_at_the_compiler_s_offset(header: Header) -> None:
    """Only the bytes of one field are changed, at the place C has it, and only that field changes."""
    plain = pam_record(over=connection())
    base = pam.decode_request(plain)
    ends = base.connection
    assert ends is not None
    new_remote = Endpoint(ipaddress.ip_address("10.9.8.7"), ends.source.port)
    new_local = Endpoint(ipaddress.ip_address("10.9.8.6"), ends.destination.port)
    changes: Dict[str, Tuple[bytes, str, object]] = {
        "phase": (b"\2", "phase", Phase.SESSION),
        "mode": (b"\2", "mode", Mode.OBSERVE),
        "action_no_jobs": (b"\1", "options", Options(action_no_jobs=Action.IGNORE)),
        "action_unknown": (b"\2", "options", Options(action_unknown=Action.ALLOW)),
        "action_adopt_failure": (b"\3", "options", Options(action_adopt_failure=Action.DENY)),
        "action_generic_failure": (b"\3", "options", Options(action_generic_failure=Action.DENY)),
        "single_job_skip_rpc": (b"\0", "options", Options(single_job_skip_rpc=False)),
        "join_container": (b"\0", "join_container", False),
        "disable_x11": (b"\1", "disable_x11", True),
        "remote_port": (
            struct.pack("=H", 0x1234),
            "connection",
            Connection(Endpoint(ends.source.address, 0x1234), ends.destination),
        ),
        "local_port": (
            struct.pack("=H", 0x1234),
            "connection",
            Connection(ends.source, Endpoint(ends.destination.address, 0x1234)),
        ),
        "uid": (struct.pack("=I", 0x01020304), "uid", 0x01020304),
        "timeout_ms": (struct.pack("=I", 0x0304), "timeout_ms", 0x0304),
        "remote_address": (bytes([10, 9, 8, 7]) + bytes(12), "connection", Connection(new_remote, ends.destination)),
        "local_address": (bytes([10, 9, 8, 6]) + bytes(12), "connection", Connection(ends.source, new_local)),
        "service": (b"login".ljust(64, b"\0"), "service", "login"),
        "user": (b"u".ljust(255, b"u") + b"\0", "user", "u" * 255),
        "nodename": (b"n7".ljust(64, b"\0"), "nodename", "n7"),
    }
    fixed = {"magic", "version", "size", "reserved", "family"}
    assert set(changes) | fixed == set(header.members["adopt_request"])
    for name, (value, attribute, expected) in changes.items():
        record = bytearray(plain)
        place = header.place(f"adopt_request.{name}")
        assert place.stop - place.start == len(value), name
        record[place] = value
        changed = pam.decode_request(bytes(record))
        assert getattr(changed, attribute) == expected, name
        others = [key for key in vars(base) if key != attribute and getattr(base, key) != getattr(changed, key)]
        assert others == [], name


def test_each_field_of_a_reply_is_written_at_the_compiler_s_offset(header: Header) -> None:
    """Every member of the struct holds what was given for it, NUL-padded."""
    reply = PamReply(Verdict.IGNORE, True, "j" * 63, "s" * 127, "m" * 511, {"A": "1", "B_2": "x y"})
    data = pam.encode_reply(reply, descriptors=8)
    expected = {
        "magic": struct.pack("=I", header.size["ADOPT_WIRE_MAGIC"]),
        "version": struct.pack("=H", header.size["ADOPT_WIRE_VERSION"]),
        "size": struct.pack("=H", header.size["adopt_reply"]),
        "verdict": bytes([header.size["ADOPT_VERDICT_IGNORE"]]),
        "adopted": b"\1",
        "descriptors": b"\x08",
        "reserved": b"\0",
        "environment_bytes": struct.pack("=I", 12),
        "job": b"j" * 63 + b"\0",
        "summary": b"s" * 127 + b"\0",
        "message": b"m" * 511 + b"\0",
    }
    assert set(expected) == set(header.members["adopt_reply"])
    for name, value in expected.items():
        assert data[header.place(f"adopt_reply.{name}")] == value, name
    assert data[header.size["adopt_reply"] :] == b"A=1\0B_2=x y\0"
    empty = pam.encode_reply(PamReply(Verdict.DENY, False, "", "", "", {}))
    assert empty[header.offset["adopt_reply.adopted"] :] == bytes(len(empty) - header.offset["adopt_reply.adopted"])


# ---- what is refused


@pytest.mark.parametrize("length", [0, 1, pam.REQUEST_BYTES - 1, pam.REQUEST_BYTES + 1, 4096])
def test_a_record_of_another_length(length: int) -> None:
    """Longer is as wrong as shorter."""
    with pytest.raises(ProtocolError, match=f"request of {length} bytes, expected {pam.REQUEST_BYTES}"):
        pam.decode_request(bytes(length))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"magic": 0}, "magic is 0"),
        ({"magic": 0x41445054}, "magic is"),
        ({"version": 0}, "version is 0, expected 1"),
        ({"version": 2}, "version is 2, expected 1"),
        ({"size": 0}, "size is 0"),
        ({"size": pam.REQUEST_BYTES + 4}, "size is"),
        ({"reserved": 1}, "reserved is 1"),
        ({"phase": 0}, "0 is not a valid Phase"),
        ({"phase": 3}, "3 is not a valid Phase"),
        ({"mode": 0}, "0 is not a valid Mode"),
        ({"mode": 255}, "255 is not a valid Mode"),
        ({"action_no_jobs": 0}, "action_no_jobs is 0"),
        ({"action_unknown": 5}, "action_unknown is 5"),
        ({"action_no_jobs": "allow"}, "action_no_jobs is allow"),
        ({"action_no_jobs": "newest"}, "action_no_jobs is newest"),
        ({"action_unknown": "ignore"}, "action_unknown is ignore"),
        ({"action_adopt_failure": "ignore"}, "action_adopt_failure is ignore"),
        ({"action_adopt_failure": "newest"}, "action_adopt_failure is newest"),
        ({"action_generic_failure": "newest"}, "action_generic_failure is newest"),
        ({"single_job_skip_rpc": 2}, "single_job_skip_rpc is 2"),
        ({"join_container": 2}, "join_container is 2"),
        ({"disable_x11": 255}, "disable_x11 is 255"),
        ({"family": 2}, "family is 2"),
        ({"family": 10}, "family is 10"),
        ({"family": 4}, "port 0"),
        ({"family": 6, "remote_port": 1}, "port 0"),
        ({"remote_port": 1}, "family is 0 but"),
        ({"local_port": 22}, "family is 0 but"),
        ({"remote_address": b"\x0a"}, "family is 0 but"),
        ({"local_address": b"\0" * 15 + b"\1"}, "family is 0 but"),
        (
            {"family": 4, "remote_port": 1, "local_port": 22, "remote_address": b"\x0a\0\0\1\0\0\0\0\1"},
            "longer than 4 bytes",
        ),
        (
            {"family": 6, "remote_port": 1, "local_port": 22, "remote_address": b"\0" * 10 + b"\xff\xff\x0a\0\0\1"},
            "different IP versions",
        ),
        ({"uid": UID_MAX + 1}, "uid 4294967295 is no uid"),
        ({"timeout_ms": 0}, "timeout_ms 0 is not in"),
        ({"timeout_ms": 30_001}, "timeout_ms 30001 is not in"),
        ({"timeout_ms": 0xFFFFFFFF}, "timeout_ms 4294967295 is not in"),
        ({"service": b"s" * 64}, "service is not NUL-padded"),
        ({"user": b"u" * 256}, "user is not NUL-padded"),
        ({"nodename": b"n" * 64}, "nodename is not NUL-padded"),
        ({"user": b"alice\0root"}, "user is not NUL-padded"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_one_wrong_field(changes: Dict[str, object], words: str) -> None:
    """The field is named; nothing out of range becomes a default."""
    with pytest.raises(ProtocolError, match=re.escape(words)):
        pam.decode_request(pam_record(**changes))  # type: ignore[arg-type]


def test_a_zeroed_record_is_never_valid() -> None:
    """Enumerations start at 1, so memory that was never filled in is no request."""
    with pytest.raises(ProtocolError):
        pam.decode_request(bytes(pam.REQUEST_BYTES))


@pytest.mark.parametrize(
    ("changes", "descriptors", "words"),
    [
        ({"job_id": "j" * 64}, 0, "job of 64 bytes"),
        ({"job_id": "\u00e9" * 32}, 0, "job of 64 bytes"),
        ({"job_id": "1\0002"}, 0, "job of 3 bytes"),
        ({"summary": "s" * 128}, 0, "summary of 128 bytes"),
        ({"message": "m" * 512}, 0, "message of 512 bytes"),
        ({"environment": {"A B": "1"}}, 0, "no environment entry"),
        ({"environment": {"": "1"}}, 0, "no environment entry"),
        ({"environment": {"1A": "1"}}, 0, "no environment entry"),
        ({"environment": {"A=B": "1"}}, 0, "no environment entry"),
        ({"environment": {"A\n": "1"}}, 0, "no environment entry"),
        ({"environment": {"A": "1\0LD_PRELOAD=x"}}, 0, "no environment entry"),
        ({"environment": {"A": "x" * 65536}}, 0, "environment of 65539 bytes"),
        ({}, 9, "9 descriptors"),
        ({}, -1, "-1 descriptors"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_reply_that_does_not_fit_is_not_cut(changes: Dict[str, object], descriptors: int, words: str) -> None:
    """A job id or an environment that was cut would be another one."""
    fields = {
        "verdict": Verdict.SUCCESS,
        "adopted": True,
        "job_id": "1",
        "summary": "",
        "message": "",
        "environment": {},
    }
    with pytest.raises(ProtocolError, match=words):
        pam.encode_reply(PamReply(**{**fields, **changes}), descriptors)  # type: ignore[arg-type]


# ---- what is taken


def test_no_connection_is_none() -> None:
    """A console login has no connection; that is a fact and not an address of zeros."""
    assert pam.decode_request(pam_record()).connection is None


def test_a_dual_stack_connection_is_ipv4() -> None:
    """Both ends mapped: sshd listening on :: and a client on IPv4."""
    mapped = {
        "family": 6,
        "remote_port": 40000,
        "local_port": 22,
        "remote_address": b"\0" * 10 + b"\xff\xff\x7f\0\0\1",
        "local_address": b"\0" * 10 + b"\xff\xff\x7f\0\0\2",
    }
    assert pam.decode_request(pam_record(**mapped)).connection == connection(40000)  # type: ignore[arg-type]


def test_a_name_that_is_not_utf8_stays_visible() -> None:
    """Login names are bytes; the log shows them and the login goes on."""
    assert pam.decode_request(pam_record(user=b"al\xffce")).user == "al\\xffce"


PORTS = st.integers(1, 65535)
CONNECTIONS = st.sampled_from([4, 6]).flatmap(
    lambda version: st.builds(
        lambda a, p, b, q: (a, p, b, q), st.ip_addresses(v=version), PORTS, st.ip_addresses(v=version), PORTS
    )
)


@given(st.data())
def test_every_right_request_is_read_as_it_was_meant(data: st.DataObject) -> None:
    """Every combination of fields that the module can send."""
    chosen = {name: data.draw(st.sampled_from(sorted(a, key=str))) for name, a in ALLOWED_ACTIONS.items()}
    numbers = {name: action.value for name, action in chosen.items()}
    skip, join, x11 = (data.draw(st.booleans()) for _ in range(3))
    uid, timeout_ms = data.draw(st.integers(0, UID_MAX)), data.draw(st.integers(1, 30_000))
    phase, mode = data.draw(st.sampled_from(Phase)), data.draw(st.sampled_from(Mode))
    user = data.draw(st.text(st.characters(min_codepoint=1, blacklist_categories=("Cs",)), max_size=60))
    a, p, b, q = data.draw(CONNECTIONS)
    try:
        ends = Connection(Endpoint(a, p), Endpoint(b, q))
    except ValueError:
        return
    record = pam_record(
        uid=uid,
        over=ends,
        phase=phase.value,
        mode=mode.value,
        single_job_skip_rpc=int(skip),
        join_container=int(join),
        disable_x11=int(x11),
        timeout_ms=timeout_ms,
        user=user.encode(),
        **numbers,
    )
    request = pam.decode_request(record)
    assert request == pam.PamRequest(
        phase, mode, Options(single_job_skip_rpc=skip, **chosen), uid, timeout_ms, ends, "sshd", user, "", join, x11
    )


@settings(max_examples=300)
@given(st.data())
def test_any_mutation_is_read_or_refused(data: st.DataObject) -> None:
    """Any bytes anywhere in the record: a request whose every field is in range, or ProtocolError."""
    record = bytearray(pam_record(over=connection()))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(record) - 1))
        record[at] = data.draw(st.integers(0, 255))
    check(bytes(record))


@given(st.binary(min_size=pam.REQUEST_BYTES, max_size=pam.REQUEST_BYTES) | st.binary(max_size=600))
def test_any_bytes_are_read_or_refused(record: bytes) -> None:
    """Also with a right head, which random bytes never have."""
    check(record)
    check(pam_record()[:8] + record[8:])


def check(record: bytes) -> None:
    try:
        request = pam.decode_request(record)
    except ProtocolError:
        return
    assert 0 <= request.uid <= UID_MAX
    assert 1 <= request.timeout_ms <= 30_000
    assert "\0" not in request.user + request.service + request.nodename


@given(
    st.sampled_from(Verdict),
    st.booleans(),
    st.dictionaries(
        st.from_regex(r"\A[A-Z_][A-Z0-9_]{0,8}\Z"),
        st.text(st.characters(min_codepoint=1, blacklist_categories=("Cs",)), max_size=9),
    ),
)
def test_a_reply_says_how_much_follows_it(verdict: Verdict, adopted: bool, environment: Dict[str, str]) -> None:
    """The environment is read back pair by pair from exactly the announced bytes."""
    data = pam.encode_reply(PamReply(verdict, adopted, "17", "", "", environment))
    (count,) = struct.unpack_from("=I", data, 12)
    assert len(data) == pam.REPLY_BYTES + count
    pairs = [pair.partition(b"=") for pair in data[pam.REPLY_BYTES :].split(b"\0")[:-1]]
    assert {name.decode(): value.decode() for name, _, value in pairs} == environment
