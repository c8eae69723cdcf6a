"""The callerid codec: hostile payloads first, then that both sides mean the same."""

from __future__ import annotations

import ipaddress
import json
from typing import Callable, Dict, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adoptd.model import UID_MAX, Connection, Endpoint, IPAddress, ProtocolError, Witness
from adoptd.wire import callerid as wire
from adoptd.wire.callerid import Answer, Outcome, Question, Reason

NONCE = "0123456789abcdef" * 2

QUESTION: Dict[str, object] = {
    "v": 1,
    "type": "question",
    "nonce": NONCE,
    "to": "10.0.0.1",
    "src": "10.0.0.1",
    "sport": 40000,
    "dst": "10.0.0.2",
    "dport": 22,
    "uid": 1001,
}
ANSWER: Dict[str, object] = {
    "v": 1,
    "type": "answer",
    "nonce": NONCE,
    "host": "10.0.0.1",
    "src": "10.0.0.1",
    "sport": 40000,
    "dst": "10.0.0.2",
    "dport": 22,
    "outcome": "job",
    "reason": "owner",
    "job": "17",
    "witness": "bpf",
    "moved": False,
    "hint": None,
    "cluster": "one",
    "release": "1.2.3~rc1",
}

NO_JOB: Dict[str, object] = {**ANSWER, "outcome": "no_job", "job": None, "witness": None, "cluster": None}

Message = Union[Question, Answer]

# Values no field of either message may have.
NEVER = (True, [], {}, 1.5, "", "\n", "x" * 5000, -1, 10**30, "\u00e9")

HEAD = {
    "v": (0, 2, 1.0, "1", None, *NEVER),
    "nonce": (None, 0, NONCE.upper(), NONCE[:-1], NONCE + "0", NONCE[:-1] + "g", NONCE[:-1] + "\n", *NEVER),
    "src": (None, 1, "localhost", "10.0.0.1/32", "10.0.0.1:22", "10.0.0.01", "fd00::1", "fe80::1%eth0", *NEVER),
    "dst": (None, 1, "10.0.0.256", "fd00::2", "::", *NEVER),
    "sport": (0, 65536, "40000", 40000.0, None, *NEVER),
    "dport": (0, 65536, "22", None, *NEVER),
}
BAD_QUESTION = {
    **HEAD,
    "type": ("answer", "QUESTION", None, 1),
    "to": HEAD["src"][: -len(NEVER) - 2],
    "uid": ("1001", UID_MAX + 1, 1001.0, *(value for value in NEVER)),
}
BAD_ANSWER = {
    **HEAD,
    "type": ("question", None, 1),
    "host": (None, 1, "n1", "fe80::1%lo", *NEVER),
    "outcome": ("JOB", "unknown", "no_job", "jobs", None, *NEVER),
    "reason": ("Owner", "because", None, *NEVER),
    "job": (None, "-17", ".", "..", "../x", "a/b", "17 18", "x" * 64, 17, *NEVER),
    "witness": ("BPF", "nobody", "slurmd", "hint", None, *NEVER),
    "moved": (0, 1, None, "false", 1.5, [], {}, ""),
    "hint": ("17", 17, "../x", *NEVER),
    "cluster": (17, "../x", "a b", "x" * 64, *NEVER),
    "release": (None, 1, "a b", "-1", "1.0\n", "1/2", "1" * 33, *NEVER),
}


def cases(valid: Dict[str, object], bad: Dict[str, object]) -> list[object]:
    found = []
    for key, values in bad.items():
        for value in values:  # type: ignore[attr-defined]
            found.append(pytest.param({**valid, key: value}, id=f"{key}={value!r:.20}"))
    for key in valid:
        found.append(pytest.param({k: v for k, v in valid.items() if k != key}, id=f"no {key}"))
    found.append(pytest.param({**valid, "extra": 1}, id="extra"))
    return found


@pytest.mark.parametrize("message", cases(QUESTION, BAD_QUESTION))
def test_a_question_with_one_wrong_field_is_refused(message: Dict[str, object]) -> None:
    """Each field out of range, of another type, missing, or one too many."""
    with pytest.raises(ProtocolError):
        wire.decode_question(json.dumps(message).encode())


@pytest.mark.parametrize("message", cases(ANSWER, BAD_ANSWER))
def test_an_answer_with_one_wrong_field_is_refused(message: Dict[str, object]) -> None:
    """Also a job without its outcome, an outcome without its job, and a job id that is a path."""
    with pytest.raises(ProtocolError):
        wire.decode_answer(json.dumps(message).encode())


@pytest.mark.parametrize("outcome", ["no_job", "unknown"])
@pytest.mark.parametrize(("job", "witness"), [("17", None), (None, "bpf"), ("17", "bpf")])
def test_no_job_is_named_without_the_outcome_job(outcome: str, job: object, witness: object) -> None:
    """An answer that says both "unknown" and "job 17" says nothing."""
    with pytest.raises(ProtocolError, match="does not go with its job and witness"):
        wire.decode_answer(json.dumps({**ANSWER, "outcome": outcome, "job": job, "witness": witness}).encode())


@pytest.mark.parametrize("hint", ["-17", ".", "..", "../x", "a/b", "17 18", "17\n", "", "x" * 64, 17, True, ["17"]])
def test_a_hint_is_a_job_id(hint: object) -> None:
    """It comes from an environment that its user wrote."""
    with pytest.raises(ProtocolError):
        wire.decode_answer(json.dumps({**NO_JOB, "hint": hint}).encode())


def test_a_hint_goes_with_no_job_alone() -> None:
    """Whose owner is in a job, or not known, is given no other."""
    with pytest.raises(ProtocolError, match="does not go with a hint"):
        wire.decode_answer(json.dumps({**ANSWER, "hint": "17"}).encode())
    with pytest.raises(ProtocolError, match="does not go with a hint"):
        wire.decode_answer(json.dumps({**NO_JOB, "outcome": "unknown", "hint": "17"}).encode())
    assert wire.decode_answer(json.dumps({**NO_JOB, "hint": "17"}).encode()).hint == "17"


@pytest.mark.parametrize("witness", ["slurmd", "hint"])
def test_what_the_asking_side_calls_its_sources_is_no_agent_s_witness(witness: str) -> None:
    """An agent that named a job "by hint" would have it pass for evidence."""
    with pytest.raises(ProtocolError, match=f"witness {witness} is not one of an agent's"):
        wire.decode_answer(json.dumps({**ANSWER, "witness": witness}).encode())


def test_a_question_is_no_answer_and_an_answer_no_question() -> None:
    """Our own question sent back to us does not pass for its answer."""
    with pytest.raises(ProtocolError):
        wire.decode_answer(json.dumps(QUESTION).encode())
    with pytest.raises(ProtocolError):
        wire.decode_question(json.dumps(ANSWER).encode())


@pytest.mark.parametrize("version", [2, 3, 65535])
def test_another_version_is_told_from_a_malformed_message(version: int) -> None:
    """Whatever its keys are; so that a cluster half-way through an upgrade is not taken for an attack."""
    with pytest.raises(wire.OtherVersion, match=f"question: version {version} of the protocol, expected 1"):
        wire.decode_question(json.dumps({"v": version, "kind": "question"}).encode())
    with pytest.raises(wire.OtherVersion, match=f"answer: version {version} of the protocol, expected 1"):
        wire.decode_answer(json.dumps({**ANSWER, "v": version}).encode())


@pytest.mark.parametrize("version", [0, -1, 65536, 10**4000, True, 2.0, "2", None])
def test_what_is_no_version_is_malformed(version: object) -> None:
    """And not quoted back at any length."""
    with pytest.raises(ProtocolError) as caught:
        wire.decode_question(json.dumps({**QUESTION, "v": version}).encode())
    assert not isinstance(caught.value, wire.OtherVersion)
    assert len(str(caught.value)) < 200


def test_duplicate_keys_are_refused_in_both() -> None:
    """Two readers could take different ones."""
    for decode, message in ((wire.decode_question, QUESTION), (wire.decode_answer, ANSWER)):
        twice = json.dumps(message).encode()[:-1] + b',"sport":40001}'
        with pytest.raises(ProtocolError):
            decode(twice)


def test_mapped_addresses_are_the_ipv4_ones() -> None:
    """A question in the mapped spelling is the same question."""
    mapped = {**QUESTION, "to": "::ffff:10.0.0.1", "src": "::ffff:10.0.0.1", "dst": "::ffff:10.0.0.2"}
    assert wire.decode_question(json.dumps(mapped).encode()) == wire.decode_question(json.dumps(QUESTION).encode())
    half = {**QUESTION, "src": "::ffff:10.0.0.1"}
    assert wire.decode_question(json.dumps(half).encode()).connection.version == 4


def test_the_layout_of_both() -> None:
    """Exactly these keys and spellings, so that a second implementation can be written from them."""
    ends = Connection(Endpoint.parse("10.0.0.1:40000"), Endpoint.parse("10.0.0.2:22"))
    here = ipaddress.ip_address("10.0.0.1")
    assert json.loads(wire.encode_question(Question(NONCE, here, ends, 1001))) == QUESTION
    told = Answer(NONCE, here, ends, Outcome.JOB, Reason.OWNER, "17", Witness.BPF, cluster="one", release="1.2.3~rc1")
    assert json.loads(wire.encode_answer(told)) == ANSWER


def test_the_longest_messages_fit_a_seal() -> None:
    """Spelled-out IPv6 and a 63-byte job id stay under the payload's bound."""
    long = ipaddress.ip_address("fd00:1111:2222:3333:4444:5555:6666:7777")
    ends = Connection(Endpoint(long, 65535), Endpoint(long, 65535))
    most = {"job_id": "x" * 63, "cluster": "x" * 63, "release": "1" * 32}
    told = Answer(NONCE, long, ends, Outcome.JOB, Reason.JOB_NOT_TOLD, witness=Witness.CONNTRACK, moved=True, **most)
    assert len(wire.encode_answer(told)) < 600
    assert len(wire.encode_question(Question(NONCE, long, ends, UID_MAX))) < 512


ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6).filter(lambda address: not address.ipv4_mapped))
PORTS = st.integers(1, 65535)
NONCES = st.text("0123456789abcdef", min_size=32, max_size=32)


@st.composite
def connections(draw: Callable[..., IPAddress]) -> Connection:
    one = draw(ADDRESSES)
    other = draw(st.ip_addresses(v=one.version))
    try:
        return Connection(Endpoint(one, draw(PORTS)), Endpoint(other, draw(PORTS)))  # type: ignore[arg-type]
    except ValueError:  # the other one happened to be a mapped address
        return Connection(Endpoint(one, 1), Endpoint(one, 2))


QUESTIONS = st.builds(Question, NONCES, ADDRESSES, connections(), st.none() | st.integers(0, UID_MAX))
JOB_IDS = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_.\-]{0,62}\Z")
ANSWERS = st.one_of(
    st.builds(
        Answer,
        NONCES,
        ADDRESSES,
        connections(),
        st.just(Outcome.JOB),
        st.sampled_from(Reason),
        JOB_IDS,
        st.sampled_from(sorted(wire.WITNESSES, key=lambda witness: witness.value)),
        st.booleans(),
        release=st.from_regex(r"\A[0-9][0-9a-z.+~\-]{0,31}\Z"),
    ),
    st.builds(
        Answer,
        NONCES,
        ADDRESSES,
        connections(),
        st.sampled_from([Outcome.NO_JOB, Outcome.UNKNOWN]),
        st.sampled_from(Reason),
        moved=st.booleans(),
    ),
    st.builds(
        Answer,
        NONCES,
        ADDRESSES,
        connections(),
        st.just(Outcome.NO_JOB),
        st.sampled_from(Reason),
        hint=JOB_IDS,
    ),
)


@given(QUESTIONS)
def test_question_round_trip(question: Question) -> None:
    """Every question there can be."""
    assert wire.decode_question(wire.encode_question(question)) == question


@given(ANSWERS)
def test_answer_round_trip(answer: Answer) -> None:
    """Every answer there can be."""
    assert wire.decode_answer(wire.encode_answer(answer)) == answer


def same_or_refused(payload: bytes) -> None:
    """Whatever is decoded means the same after it was encoded again; nothing but ProtocolError is raised."""
    try:
        question = wire.decode_question(payload)
    except ProtocolError:
        pass
    else:
        assert wire.decode_question(wire.encode_question(question)) == question
    try:
        answer = wire.decode_answer(payload)
    except ProtocolError:
        pass
    else:
        assert wire.decode_answer(wire.encode_answer(answer)) == answer


@given(st.binary(max_size=200))
def test_any_bytes(payload: bytes) -> None:
    """Bytes that nobody thought of."""
    same_or_refused(payload)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["job", "unknown", "::ffff:1.2.3.4", "fe80::1%1", "::", "0.0.0.0", "bpf", "owner", NONCE]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300)
@given(st.sampled_from([QUESTION, ANSWER]), st.data())
def test_any_mutation_of_a_valid_message(valid: Dict[str, object], data: st.DataObject) -> None:
    """Fields replaced, dropped and added, and the bytes cut, changed and repeated."""
    message = dict(valid)
    for key in data.draw(st.lists(st.sampled_from([*valid, "x"]), max_size=2)):
        if data.draw(st.booleans()):
            message[key] = data.draw(VALUES)
        else:
            message.pop(key, None)
    payload = bytearray(json.dumps(message).encode("utf-8", "surrogatepass"))
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(payload)))
        end = data.draw(st.integers(at, min(len(payload), at + 8)))
        payload[at:end] = data.draw(st.binary(max_size=4))
    same_or_refused(bytes(payload))
