"""The key scheme: what is not exactly a fresh token of ours, under our key, opens nothing."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import threading
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adoptd.seal import PAYLOAD_MAX_BYTES, SEALED_MAX_BYTES, Opened, SealError, SealFault
from adoptd.seal.key import KEY_MAX_BYTES, KeySeal

KEY = bytes(range(64))
HEADER = {"alg": "HS256", "typ": "JWT"}
NOW = 1_800_000_000.25
TTL_S = 10


class Clock:
    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Node:
    """A seal with a clock of its own; two nodes share a key file and nothing else."""

    def __init__(self, path: Path, now: float = NOW, ttl_s: int = TTL_S, replay_capacity: int = 1000) -> None:
        self.clock = Clock(now)
        self.monotonic = Clock(50.0)
        self.seal = KeySeal(path, ttl_s, self.clock, self.monotonic, replay_capacity)

    def advance(self, seconds: float) -> None:
        self.clock.now += seconds
        self.monotonic.now += seconds


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return write_key(tmp_path / "key", KEY)


def write_key(path: Path, key: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(key)
    path.chmod(mode)
    return path


def fault_of(seal: KeySeal, sealed: bytes) -> SealFault:
    with pytest.raises(SealError) as refusal:
        seal.open(sealed)
    return refusal.value.fault


def base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def forge(
    claims: object,
    header: object = HEADER,
    key: bytes = KEY,
    digest: str = "sha256",
    raw_claims: Optional[bytes] = None,
) -> bytes:
    """A token made by hand, so that the tests share no code with what they test."""
    body = json.dumps(claims).encode() if raw_claims is None else raw_claims
    signed = base64url(json.dumps(header).encode()) + b"." + base64url(body)
    return signed + b"." + base64url(hmac.new(key, signed, getattr(hashlib, digest)).digest())


def good_claims(**changes: object) -> Dict[str, object]:
    claims: Dict[str, object] = {
        "aud": "adoptd",
        "iat": NOW,
        "exp": NOW + TTL_S,
        "jti": os.urandom(16).hex(),
        "body": base64url(b"question").decode(),
    }
    claims.update(changes)
    return {name: value for name, value in claims.items() if value is not Ellipsis}


# --- refused: not our seal ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "sealed",
    [
        b"",
        b".",
        b"..",
        b"a.b.c",
        b"\0" * 100,
        b"\xff\xfe\xfd.\xff.\xff",
        b"MUNGE:AwQFAAA=:",
        b"eyJhbGciOiJub25lIn0.e30.",
        b"a" * SEALED_MAX_BYTES,
        "ё".encode() * 50,
    ],
)
def test_bytes_that_are_no_token_are_refused(key_file: Path, sealed: bytes) -> None:
    """Nothing but HEADER.CLAIMS.SIGNATURE reaches the signature check."""
    assert fault_of(Node(key_file).seal, sealed) is SealFault.BAD_SEAL


def test_more_bytes_than_a_frame_holds_are_refused_unread(key_file: Path) -> None:
    """The bound is checked before anything else looks at the bytes."""
    assert fault_of(Node(key_file).seal, b"a" * (SEALED_MAX_BYTES + 1)) is SealFault.TOO_LARGE


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_are_refused(key_file: Path, sealed: bytes) -> None:
    """Any bytes at all end in a SealError and in no other exception."""
    assert fault_of(Node(key_file).seal, sealed) is SealFault.BAD_SEAL


@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_anywhere_is_refused(key_file: Path, data: st.DataObject) -> None:
    """Header, claims and signature, each byte to each other value; what is left intact still opens."""
    node = Node(key_file)
    sealed = node.seal.seal(b"question")
    position = data.draw(st.integers(0, len(sealed) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != sealed[position]))
    changed = sealed[:position] + bytes([other]) + sealed[position + 1 :]
    assert fault_of(node.seal, changed) is SealFault.BAD_SEAL
    assert node.seal.open(sealed).payload == b"question"


def test_the_last_character_has_one_spelling(key_file: Path) -> None:
    """The two unused bits at the signature's end, which base64 decoders ignore, may not vary."""
    node = Node(key_file)
    sealed = node.seal.seal(b"question")
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for character in alphabet:
        if character != sealed[-1]:
            assert fault_of(node.seal, sealed[:-1] + bytes([character])) is SealFault.BAD_SEAL


@pytest.mark.parametrize("extra", [b"\n", b" ", b"=", b"\0", b".", b"A"])
def test_bytes_around_a_token_are_refused(key_file: Path, extra: bytes) -> None:
    """A genuine token with anything before or after it is not one."""
    node = Node(key_file)
    sealed = node.seal.seal(b"question")
    assert fault_of(node.seal, sealed + extra) is SealFault.BAD_SEAL
    assert fault_of(node.seal, extra + sealed) is SealFault.BAD_SEAL


def test_another_key_opens_nothing(key_file: Path, tmp_path: Path) -> None:
    """Not even one that differs in its last bit."""
    other = Node(write_key(tmp_path / "other", KEY[:-1] + bytes([KEY[-1] ^ 1])))
    assert fault_of(other.seal, Node(key_file).seal.seal(b"question")) is SealFault.BAD_SEAL


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "none", "typ": "JWT"},
        {"alg": "None"},
        {"alg": "HS512", "typ": "JWT"},
        {"alg": "hs256"},
        {"alg": "RS256", "typ": "JWT"},
        {"typ": "JWT"},
        {},
        {"alg": "HS256", "typ": "JWE"},
        {"alg": "HS256", "kid": "1"},
        {"alg": "HS256", "typ": "JWT", "b64": True},
        {"alg": "HS256", "b64": False, "crit": ["b64"]},
        {"alg": "HS256", "jwk": {"kty": "oct", "k": "AA"}},
        {"alg": ["HS256"]},
        {"alg": None},
        ["HS256"],
        "HS256",
        None,
    ],
)
def test_another_header_is_refused_though_rightly_signed(key_file: Path, header: object) -> None:
    """The algorithm is ours to name, not the token's; no field that changes what is signed is honoured."""
    assert fault_of(Node(key_file).seal, forge(good_claims(), header)) is SealFault.BAD_SEAL


def test_no_signature_and_a_longer_one_are_refused(key_file: Path) -> None:
    """alg none without a signature; HS512 with the right key and a 64-byte signature."""
    node = Node(key_file)
    unsigned = forge(good_claims(), {"alg": "none"}).rpartition(b".")[0] + b"."
    assert fault_of(node.seal, unsigned) is SealFault.BAD_SEAL
    assert fault_of(node.seal, forge(good_claims(), {"alg": "HS512"}, digest="sha512")) is SealFault.BAD_SEAL
    assert fault_of(node.seal, forge(good_claims(), digest="sha512")) is SealFault.BAD_SEAL


# --- refused: rightly signed, wrongly filled ---------------------------------------------------


@pytest.mark.parametrize("name", ["aud", "iat", "exp", "jti", "body"])
def test_a_missing_claim_is_refused(key_file: Path, name: str) -> None:
    """No claim has a default."""
    assert fault_of(Node(key_file).seal, forge(good_claims(**{name: ...}))) is SealFault.BAD_SEAL


@pytest.mark.parametrize("name", ["nbf", "sub", "iss", "uid", "Aud", ""])
def test_a_claim_more_is_refused(key_file: Path, name: str) -> None:
    """A claim that we would not obey is not ignored either."""
    assert fault_of(Node(key_file).seal, forge(good_claims(**{name: 1}))) is SealFault.BAD_SEAL


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iat", None),
        ("iat", True),
        ("iat", str(NOW)),
        ("iat", [NOW]),
        ("iat", -1),
        ("iat", 0),
        ("iat", 10**400),
        ("iat", 1e300),
        ("exp", None),
        ("exp", "never"),
        ("exp", 2**33),
        ("jti", 7),
        ("jti", None),
        ("jti", ""),
        ("jti", "0" * 31),
        ("jti", "0" * 33),
        ("jti", "G" * 32),
        ("jti", "A" * 32),
        ("jti", "0" * 31 + "\n"),
        ("body", None),
        ("body", 1),
        ("body", ""),
        ("body", "!!!!"),
        ("body", "a"),
        ("body", "ё"),
        ("body", {"a": 1}),
        ("aud", None),
        ("aud", ["adoptd"]),
        ("aud", ""),
    ],
)
def test_a_claim_of_the_wrong_type_or_range_is_refused(key_file: Path, name: str, value: object) -> None:
    """Each claim is exactly what this scheme writes: true is not 1, and a list of one is not the one."""
    assert fault_of(Node(key_file).seal, forge(good_claims(**{name: value}))) is SealFault.BAD_SEAL


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"aud":"adoptd","iat":NaN,"exp":1,"jti":"","body":""}',
        b'{"aud":"adoptd","iat":Infinity,"exp":1,"jti":"","body":""}',
        b'{"aud":"adoptd","aud":"adoptd"}',
        b"[" * 2000,
    ],
)
def test_claims_that_are_no_object_are_refused(key_file: Path, raw: bytes) -> None:
    """A right signature over nonsense is nonsense."""
    assert fault_of(Node(key_file).seal, forge(None, raw_claims=raw)) is SealFault.BAD_SEAL


def test_a_token_of_another_user_of_the_key_is_foreign(key_file: Path) -> None:
    """A site that shares Slurm's key: neither Slurm's claims nor another audience pass for ours."""
    node = Node(key_file)
    assert fault_of(node.seal, forge(good_claims(aud="slurm"))) is SealFault.FOREIGN
    slurm = {"iat": int(NOW), "exp": int(NOW) + 60, "ver": 1, "ruid": 0, "context": "cred", "cluster": "c", "uid": 0}
    assert fault_of(node.seal, forge(slurm)) is SealFault.BAD_SEAL


def test_a_payload_over_the_bound_is_refused_in_both_directions(key_file: Path) -> None:
    """Sealing and opening have one bound, and an empty payload is none."""
    node = Node(key_file)
    for payload, fault in ((b"x" * (PAYLOAD_MAX_BYTES + 1), SealFault.TOO_LARGE), (b"", SealFault.BAD_SEAL)):
        with pytest.raises(SealError) as refusal:
            node.seal.seal(payload)
        assert refusal.value.fault is fault
    long = base64url(b"x" * (PAYLOAD_MAX_BYTES + 1)).decode()
    assert fault_of(node.seal, forge(good_claims(body=long))) is SealFault.TOO_LARGE


def test_a_reader_who_cannot_read_the_key_is_refused(key_file: Path) -> None:
    """The scheme has one kind of reader; it does not pretend to another."""
    with pytest.raises(SealError, match="uid 4242 cannot read the key") as refusal:
        Node(key_file).seal.seal(b"answer", reader_uid=4242)
    assert refusal.value.fault is SealFault.FOREIGN


# --- refused: not now --------------------------------------------------------------------------


@pytest.mark.parametrize(("age_s", "fault"), [(9.999, None), (10.0, SealFault.EXPIRED), (1e6, SealFault.EXPIRED)])
def test_a_token_opens_until_its_ttl(key_file: Path, age_s: float, fault: Optional[SealFault]) -> None:
    """ttl_s after it was sealed it is dead."""
    node = Node(key_file)
    sealed = node.seal.seal(b"question")
    node.advance(age_s)
    if fault is None:
        assert node.seal.open(sealed).payload == b"question"
    else:
        assert fault_of(node.seal, sealed) is fault


def test_the_sealers_exp_can_shorten_the_life_and_not_lengthen_it(key_file: Path) -> None:
    """The reader's ttl_s rules, whatever the sealer wrote."""
    long, short = forge(good_claims(exp=NOW + 3000)), forge(good_claims(exp=NOW + 1))
    node = Node(key_file)
    node.advance(1)
    assert fault_of(node.seal, short) is SealFault.EXPIRED
    node.advance(9)
    assert fault_of(node.seal, long) is SealFault.EXPIRED
    assert fault_of(node.seal, forge(good_claims(iat=node.clock.now, exp=NOW))) is SealFault.EXPIRED


@pytest.mark.parametrize(("ahead_s", "fault"), [(10.0, None), (10.001, SealFault.REWOUND), (1e6, SealFault.REWOUND)])
def test_a_token_from_the_future_opens_within_the_skew(
    key_file: Path, ahead_s: float, fault: Optional[SealFault]
) -> None:
    """A sealer's clock may be ahead by ttl_s, as under MUNGE, and no more."""
    sealed = Node(key_file, NOW + ahead_s).seal.seal(b"question")
    node = Node(key_file)
    if fault is None:
        assert node.seal.open(sealed).payload == b"question"
    else:
        assert fault_of(node.seal, sealed) is fault


def test_a_token_opens_once(key_file: Path) -> None:
    """Opened before is REPLAYED for as long as the token lives, and EXPIRED after."""
    node = Node(key_file)
    sealed = node.seal.seal(b"question")
    assert node.seal.open(sealed).payload == b"question"
    assert fault_of(node.seal, sealed) is SealFault.REPLAYED
    node.advance(9.9)
    assert fault_of(node.seal, sealed) is SealFault.REPLAYED
    node.advance(0.1)
    assert fault_of(node.seal, sealed) is SealFault.EXPIRED


def test_a_token_from_ahead_is_remembered_for_its_longer_life(key_file: Path) -> None:
    """A sealer that is ahead by d makes tokens that live for ttl_s + d here: so does the memory of them."""
    sealed = Node(key_file, NOW + 9).seal.seal(b"question")
    node = Node(key_file)
    node.seal.open(sealed)
    node.advance(18.9)
    assert fault_of(node.seal, sealed) is SealFault.REPLAYED


def test_a_refused_token_leaves_no_mark(key_file: Path) -> None:
    """Forging a token with the nonce of a genuine one does not use that up."""
    node = Node(key_file)
    claims = good_claims()
    assert fault_of(node.seal, forge(claims, key=b"x" * 64)) is SealFault.BAD_SEAL
    assert fault_of(node.seal, forge({**claims, "aud": "other"})) is SealFault.FOREIGN
    assert node.seal.open(forge(claims)).payload == b"question"


def test_when_the_memory_is_full_new_tokens_wait_for_room(key_file: Path) -> None:
    """Nothing live is forgotten to make room: a replay is still seen, a new token is refused as UNAVAILABLE."""
    node = Node(key_file, replay_capacity=3)
    opened = [node.seal.seal(b"question") for _ in range(3)]
    for sealed in opened:
        node.seal.open(sealed)
    assert fault_of(node.seal, node.seal.seal(b"question")) is SealFault.UNAVAILABLE
    assert {fault_of(node.seal, sealed) for sealed in opened} == {SealFault.REPLAYED}
    node.advance(11)
    assert node.seal.open(node.seal.seal(b"question")).payload == b"question"


def test_a_token_opened_before_a_restart_is_not_opened_after_it(key_file: Path) -> None:
    """The new process has no memory, so it takes nothing sealed before its own start."""
    before = Node(key_file)
    sealed = before.seal.seal(b"question")
    before.seal.open(sealed)
    after = Node(key_file, NOW + 0.000002)
    assert fault_of(after.seal, sealed) is SealFault.REPLAYED
    assert after.seal.open(after.seal.seal(b"question")).payload == b"question"


def test_a_clock_set_right_after_the_start_refuses_nobody_for_long(key_file: Path) -> None:
    """Started an hour ahead, then set right: peers are refused for 2 * ttl_s, not for an hour."""
    node = Node(key_file, NOW + 3600)
    node.clock.now = NOW
    peer = Node(key_file)
    assert fault_of(node.seal, peer.seal.seal(b"question")) is SealFault.REPLAYED
    node.advance(20.001)
    peer.advance(20.001)
    assert node.seal.open(peer.seal.seal(b"question")).payload == b"question"


def test_a_closed_seal_does_nothing(key_file: Path) -> None:
    """Neither direction works after close(), which may be called twice."""
    node = Node(key_file)
    sealed = node.seal.seal(b"question")
    node.seal.close()
    node.seal.close()
    assert fault_of(node.seal, sealed) is SealFault.UNAVAILABLE
    with pytest.raises(SealError, match="closed"):
        node.seal.seal(b"question")


# --- refused: the key file ---------------------------------------------------------------------


def expect_refused(path: Path, found: str) -> None:
    with pytest.raises(SealError) as refusal:
        KeySeal(path, TTL_S)
    assert refusal.value.fault is SealFault.UNAVAILABLE
    text = str(refusal.value)
    assert str(path) in text
    assert found in text
    assert "expected a regular file of root" in text


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o601, 0o610, 0o602])
def test_a_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    """Any permission at all for group or others."""
    expect_refused(write_key(tmp_path / "key", KEY, mode), f"of mode {mode:04o}")


@pytest.mark.parametrize("size", [0, 1, 31, KEY_MAX_BYTES + 1, 1 << 20])
def test_a_key_too_short_or_too_long_is_refused(tmp_path: Path, size: int) -> None:
    """HS256 takes 32 bytes at least (RFC 7518, 3.2)."""
    expect_refused(write_key(tmp_path / "key", b"k" * size), "bytes long")


def test_no_key_file_is_refused(tmp_path: Path) -> None:
    """Absent, or under a directory that is none."""
    expect_refused(tmp_path / "absent", "No such file")
    expect_refused(write_key(tmp_path / "file", KEY) / "key", "Not a directory")


def test_a_symbolic_link_to_a_good_key_is_refused(tmp_path: Path, key_file: Path) -> None:
    """Who may write the link chooses the key."""
    (tmp_path / "link").symlink_to(key_file)
    expect_refused(tmp_path / "link", "a symbolic link")


def test_a_directory_a_socket_and_a_device_are_refused(tmp_path: Path) -> None:
    """Only a regular file has the size and the mode that are checked."""
    (tmp_path / "directory").mkdir(mode=0o700)
    expect_refused(tmp_path / "directory", "not a regular file")
    expect_refused(Path("/dev/zero"), "not a regular file")


def test_a_fifo_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    """The agent's start cannot be held up; if it were, this would hang until its own deadline."""
    os.mkfifo(tmp_path / "fifo", 0o600)
    refused = threading.Thread(target=expect_refused, args=(tmp_path / "fifo", "not a regular file"), daemon=True)
    refused.start()
    refused.join(10)
    assert not refused.is_alive()


def test_another_users_key_is_refused(tmp_path: Path) -> None:
    """Its owner could change it. Needs root, as the agent does."""
    path = write_key(tmp_path / "key", KEY)
    os.chown(path, 4242, -1)
    expect_refused(path, "owned by uid 4242")


@pytest.mark.parametrize("head", [b"-----BEGIN PUBLIC KEY-----\n", b"ssh-rsa "])
def test_a_public_key_is_refused(tmp_path: Path, head: bytes) -> None:
    """What looks like published material is no secret, and is refused at the start, not at the first login."""
    tail = b"\n-----END PUBLIC KEY-----\n" if head.startswith(b"-") else b""
    expect_refused(write_key(tmp_path / "key", head + b"A" * 64 + tail), "PyJWT refuses")


@pytest.mark.parametrize("ttl_s", [0, -1, 3601])
def test_a_ttl_out_of_range_is_refused(key_file: Path, ttl_s: int) -> None:
    """Zero would refuse everything, a day would remember a day of tokens."""
    with pytest.raises(ValueError, match="ttl_s"):
        KeySeal(key_file, ttl_s)


# --- granted -----------------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=PAYLOAD_MAX_BYTES))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_sealed_is_opened(key_file: Path, payload: bytes) -> None:
    """Any bytes in, the same bytes out, in a frame's room, vouched for by the key's owner."""
    sealer, opener = Node(key_file), Node(key_file)
    sealed = sealer.seal.seal(payload)
    assert len(sealed) <= SEALED_MAX_BYTES
    assert opener.seal.open(sealed) == Opened(payload, os.geteuid(), None)


def test_a_token_made_by_hand_opens(key_file: Path) -> None:
    """The layout in the module is enough to write a second implementation, with or without typ."""
    node = Node(key_file)
    for header in ({"alg": "HS256"}, {"typ": "JWT", "alg": "HS256"}):
        assert node.seal.open(forge(good_claims(), header)).payload == b"question"
    assert node.seal.open(forge(good_claims(iat=int(NOW) + 1))).payload == b"question"


def test_a_token_can_be_read_by_hand(key_file: Path) -> None:
    """Byte for byte what ARCHITECTURE says: the signature by hmac, the claims by json."""
    header, claims, signature = Node(key_file).seal.seal(b"question").split(b".")
    assert signature == base64url(hmac.new(KEY, header + b"." + claims, hashlib.sha256).digest())
    fields = json.loads(base64.urlsafe_b64decode(claims + b"=="))
    assert (fields["aud"], fields["iat"], fields["exp"]) == ("adoptd", NOW, NOW + TTL_S)
    assert sorted(fields) == ["aud", "body", "exp", "iat", "jti"]


@pytest.mark.parametrize(("mode", "size"), [(0o600, 32), (0o400, 64), (0o700, KEY_MAX_BYTES)])
def test_a_private_key_file_is_taken(tmp_path: Path, mode: int, size: int) -> None:
    """Every byte of the file is the key, a newline at its end included."""
    key = b"k" * (size - 1) + b"\n"
    node = Node(write_key(tmp_path / "key", key, mode))
    assert node.seal.open(forge(good_claims(), key=key)).payload == b"question"


def test_threads_opening_one_token_open_it_once(key_file: Path) -> None:
    """Eight threads, fifty tokens, all at once: each token is opened by exactly one of them."""
    node = Node(key_file)
    tokens = [node.seal.seal(str(number).encode()) for number in range(50)]
    outcomes: List[Tuple[str, bytes]] = []

    def open_all() -> None:
        for sealed in tokens:
            try:
                outcomes.append(("opened", node.seal.open(sealed).payload))
            except SealError as error:
                outcomes.append((error.fault.value, sealed))

    threads = [threading.Thread(target=open_all) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    opened = [payload for outcome, payload in outcomes if outcome == "opened"]
    assert sorted(opened) == sorted(str(number).encode() for number in range(50))
    assert {outcome for outcome, _ in outcomes} == {"opened", "replayed"}
    assert len(outcomes) == 8 * 50
