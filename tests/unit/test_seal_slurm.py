"""The slurm scheme: Slurm's own tokens open nothing here, ours open nothing there; then what is opened."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import socket
from pathlib import Path
from typing import Dict, FrozenSet, List, Optional, Tuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adoptd.config import Config, JobsConfig, SealConfig
from adoptd.seal import PAYLOAD_MAX_BYTES, SEALED_MAX_BYTES, Opened, SealError, SealFault, SlurmSite, open_seal
from adoptd.seal.key import KeySeal
from adoptd.seal.slurm import SlurmSeal
from adoptd.slurm_site import configured_seal

KEY = bytes(range(64))
OTHER = bytes(range(64, 128))
NOW = 1_800_000_000.25
TTL_S = 10
SLURM = 64030


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Node:
    """A seal with a clock of its own."""

    def __init__(self, path: Path, cluster: str = "big", owners: FrozenSet[int] = frozenset()) -> None:
        self.clock, self.monotonic = Clock(NOW), Clock(50.0)
        self.seal = SlurmSeal(path, TTL_S, cluster, owners, self.clock, self.monotonic, 1000)

    def fault(self, sealed: bytes) -> Tuple[SealFault, str]:
        with pytest.raises(SealError) as refusal:
            self.seal.open(sealed)
        return refusal.value.fault, str(refusal.value)


def write(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return write(tmp_path / "slurm.key", KEY)


def jwk(name: str, key: bytes, **more: object) -> Dict[str, object]:
    return {"alg": "HS256", "kty": "oct", "kid": name, "k": base64.urlsafe_b64encode(key).decode(), **more}


def write_set(path: Path, *keys: object) -> Path:
    return write(path, json.dumps({"keys": list(keys)}).encode())


def forge(claims: Dict[str, object], key: bytes = KEY, **header: object) -> bytes:
    """A token made by hand, so that the tests share no code with what they test."""
    parts = ({"alg": "HS256", "typ": "JWT", **header}, claims)
    signed = b".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts)
    signature = hmac.new(key, signed, hashlib.sha256).digest()
    return signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")


def claims(**changes: object) -> Dict[str, object]:
    good: Dict[str, object] = {
        "iat": NOW,
        "exp": NOW + TTL_S,
        "jti": os.urandom(16).hex(),
        "ver": 1,
        "ruid": os.geteuid(),
        "context": "adoptd",
        "cluster": "big",
        "uid": 0,
        "gid": 0,
        "host": "n1",
        "payload": base64.b64encode(b"question").decode(),
    }
    good.update(changes)
    return {name: value for name, value in good.items() if value is not Ellipsis}


# ---- refused: not a token of ours


def slurm_s_own(context: str, **more: object) -> Dict[str, object]:
    """What create_internal() of auth/slurm writes: whole seconds, no jti, its own contexts and protocol version."""
    return claims(iat=int(NOW), exp=int(NOW) + 60, jti=..., ver=9984, context=context, **more)


@pytest.mark.parametrize("context", ["auth", "sack", "sbcast", "launch", "net_aliases", "external", "adoptd"])
def test_slurm_s_own_tokens_are_refused(key_file: Path, context: str) -> None:
    """Under the very key, fresh, of root: in any context, and for want of a jti even in ours."""
    assert Node(key_file).fault(forge(slurm_s_own(context)))[0] is SealFault.BAD_SEAL
    with_jti = {**slurm_s_own(context), "jti": os.urandom(16).hex()}
    if context != "adoptd":
        assert Node(key_file).fault(forge(with_jti)) == (SealFault.FOREIGN, "token is for another context")


def test_slurm_refuses_ours(key_file: Path) -> None:
    """verify_internal() takes the contexts "auth" and "sack" alone: ours is neither, and is signed."""
    body = Node(key_file).seal.seal(b"question").split(b".")[1]
    assert json.loads(base64.urlsafe_b64decode(body + b"=="))["context"] not in ("auth", "sack")


def test_tokens_of_the_key_scheme_are_refused_and_the_other_way_round(key_file: Path) -> None:
    """One key file for both schemes: a site that changes over sees refusals, not mistakes."""
    clock = Clock(NOW)
    other = KeySeal(key_file, TTL_S, clock, Clock(50.0))
    node = Node(key_file)
    assert node.fault(other.seal(b"question"))[0] is SealFault.BAD_SEAL
    with pytest.raises(SealError) as refusal:
        other.open(node.seal.seal(b"question"))
    assert refusal.value.fault is SealFault.BAD_SEAL


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"context": ""}, SealFault.BAD_SEAL),
        ({"context": "Adoptd"}, SealFault.FOREIGN),
        ({"context": ...}, SealFault.BAD_SEAL),
        ({"cluster": "other"}, SealFault.FOREIGN),
        ({"cluster": ...}, SealFault.BAD_SEAL),
        ({"ruid": 1001}, SealFault.FOREIGN),
        ({"ruid": 0xFFFFFFFF}, SealFault.BAD_SEAL),
        ({"ruid": "0"}, SealFault.BAD_SEAL),
        ({"ruid": False}, SealFault.BAD_SEAL),
        ({"uid": 1001}, SealFault.FOREIGN),
        ({"uid": -1}, SealFault.BAD_SEAL),
        ({"uid": ...}, SealFault.BAD_SEAL),
        ({"gid": None}, SealFault.BAD_SEAL),
        ({"host": "n\n1"}, SealFault.BAD_SEAL),
        ({"ver": 2}, SealFault.BAD_SEAL),
        ({"jti": "x" * 32}, SealFault.BAD_SEAL),
        ({"payload": "a"}, SealFault.BAD_SEAL),
        ({"payload": "cXVl c3Rpb24="}, SealFault.BAD_SEAL),
        ({"payload": ""}, SealFault.BAD_SEAL),
        ({"payload": base64.b64encode(b"x" * (PAYLOAD_MAX_BYTES + 1)).decode()}, SealFault.TOO_LARGE),
        ({"aud": "adoptd"}, SealFault.BAD_SEAL),
        ({"id": {"name": "root"}}, SealFault.BAD_SEAL),
        ({"exp": NOW}, SealFault.EXPIRED),
        ({"iat": NOW - 3600, "exp": NOW + 3600}, SealFault.EXPIRED),
        ({"iat": NOW + 11, "exp": NOW + 21}, SealFault.REWOUND),
        ({"iat": NOW - 1}, SealFault.REPLAYED),
        ({"exp": "never"}, SealFault.BAD_SEAL),
    ],
)
def test_a_claim_that_is_not_as_it_must_be(key_file: Path, change: Dict[str, object], fault: SealFault) -> None:
    """Genuine signature, one claim wrong, missing or too many; the life of a token is ours to bound, not Slurm's."""
    assert Node(key_file).fault(forge(claims(**change)))[0] is fault


def test_a_token_is_opened_once(key_file: Path) -> None:
    """Slurm's verification would take it again and again until it expires."""
    node = Node(key_file)
    sealed = forge(claims())
    assert node.seal.open(sealed) == Opened(b"question", 0, None)
    assert node.fault(sealed)[0] is SealFault.REPLAYED


@pytest.mark.parametrize(
    "header", [{"alg": "none"}, {"alg": "HS512"}, {"b64": False, "crit": ["b64"]}, {"kid": 7}, {"kid": ""}]
)
def test_a_header_that_is_not_as_it_must_be(key_file: Path, header: Dict[str, object]) -> None:
    """Before the signature is looked at."""
    assert Node(key_file).fault(forge(claims(), **header))[0] is SealFault.BAD_SEAL


@given(st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_anywhere_is_refused(key_file: Path, data: st.DataObject) -> None:
    """Header, claims and signature; what is left intact still opens."""
    node = Node(key_file)
    sealed = node.seal.seal(b"question")
    position = data.draw(st.integers(0, len(sealed) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != sealed[position]))
    assert node.fault(sealed[:position] + bytes([other]) + sealed[position + 1 :])[0] is SealFault.BAD_SEAL
    assert node.seal.open(sealed).payload == b"question"


def test_a_reader_without_the_key_is_not_sealed_for(key_file: Path) -> None:
    """A user's question could not be answered to that user."""
    with pytest.raises(SealError) as refusal:
        Node(key_file).seal.seal(b"question", 1001)
    assert refusal.value.fault is SealFault.FOREIGN


def test_a_closed_seal_does_nothing(key_file: Path) -> None:
    """Neither way; closing twice is no error."""
    node = Node(key_file)
    sealed = node.seal.seal(b"question")
    node.seal.close()
    node.seal.close()
    assert node.fault(sealed)[0] is SealFault.UNAVAILABLE
    with pytest.raises(SealError):
        node.seal.seal(b"question")


# ---- refused: key files


def refused(path: Path, words: str, owners: FrozenSet[int] = frozenset()) -> None:
    with pytest.raises(SealError, match=words) as refusal:
        SlurmSeal(path, TTL_S, "big", owners)
    assert refusal.value.fault is SealFault.UNAVAILABLE
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("name", ["slurm.key", "slurm.jwks"])
def test_a_key_that_others_could_read_or_write(tmp_path: Path, name: str) -> None:
    """Whatever its format; a link, a directory, another user's file."""
    for mode in (0o644, 0o604, 0o601, 0o602, 0o620, 0o660):
        refused(write(tmp_path / name, KEY, mode), f"of mode {mode:04o}")
    os.chown(write(tmp_path / name, KEY), SLURM, 0)
    refused(tmp_path / name, f"owned by uid {SLURM}")
    refused(tmp_path / name, f"owned by uid {SLURM}", frozenset({SLURM + 1}))
    (tmp_path / name).rename(tmp_path / "real")
    (tmp_path / name).symlink_to(tmp_path / "real")
    refused(tmp_path / name, "a symbolic link")
    (tmp_path / name).unlink()
    refused(tmp_path / name, "No such file")
    (tmp_path / name).mkdir()
    refused(tmp_path / name, "not a regular file")


@pytest.mark.parametrize("size", [0, 31, 4097])
def test_a_slurm_key_too_short_or_too_long(tmp_path: Path, size: int) -> None:
    """RFC 7518 asks for 32 bytes; the message says what was found."""
    refused(write(tmp_path / "slurm.key", b"k" * size), "bytes long; expected")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (b"", "bytes long"),
        (b"[]", "expected an object"),
        (b"{}", '"keys" is not a list'),
        (b'{"keys":{}}', '"keys" is not a list'),
        (b'{"keys":[]}', '"keys" is not a list'),
        (b'{"keys":[1]}', "a key is not an object"),
        (b'{"keys":[],"keys":[]}', "not a JSON object"),
        ([jwk("a", KEY, kid=None)], "kid is not a string"),
        ([jwk("", KEY)], "kid is not a string"),
        ([jwk("a\n", KEY)], "kid is not a string"),
        ([jwk("x" * 129, KEY)], "kid is not a string"),
        ([jwk("a", KEY), jwk("a", OTHER)], "kid 'a' is there twice"),
        ([jwk("a", KEY, kty="RSA")], "kty of key 'a' is not oct"),
        ([jwk("a", KEY, alg="HS512")], "alg of key 'a' is not HS256"),
        ([jwk("a", KEY, alg=None)], "alg of key 'a' is not HS256"),
        ([jwk("a", b"short")], "key 'a' has 5 bytes, not 32 to 4096"),
        ([jwk("a", KEY, k="!!!!")], "k of key 'a' is not base64"),
        ([jwk("a", KEY, k=None)], "k of key 'a' is not base64"),
        ([jwk("a", KEY, exp="soon")], "exp of key 'a' is not a number"),
        ([jwk("a", KEY, exp=True)], "exp of key 'a' is not a number"),
        ([jwk("a", KEY, use="default"), jwk("b", OTHER, use="default")], "more than one key is the default"),
        ([jwk(str(number), KEY) for number in range(65)], '"keys" is not a list of 1 to 64'),
        ([jwk("a", b"-----BEGIN PUBLIC KEY-----\n" + b"A" * 64 + b"\n-----END PUBLIC KEY-----\n")], "PyJWT refuses"),
    ],
)
def test_a_key_set_that_is_none(tmp_path: Path, keys: object, words: str) -> None:
    """Found at the start and named, not at the first login."""
    path = tmp_path / "slurm.jwks"
    refused(write(path, keys) if isinstance(keys, bytes) else write_set(path, *keys), words)  # type: ignore[misc]


@pytest.mark.parametrize("cluster", ["", "x" * 256])
def test_without_a_cluster_s_name(key_file: Path, cluster: str) -> None:
    """A key may be shared by clusters: without the name a job id would mean any of theirs."""
    with pytest.raises(SealError, match="ClusterName"):
        SlurmSeal(key_file, TTL_S, cluster)


@pytest.mark.parametrize("ttl_s", [0, 3601])
def test_a_ttl_out_of_range_is_refused(key_file: Path, ttl_s: int) -> None:
    """As under every scheme."""
    with pytest.raises(ValueError, match="ttl_s"):
        SlurmSeal(key_file, ttl_s, "big")


# ---- refused: keys of a set


def test_a_key_that_is_not_in_the_set_opens_nothing(tmp_path: Path) -> None:
    """Neither an unknown kid, nor a known one with another key of the same set."""
    node = Node(write_set(tmp_path / "slurm.jwks", jwk("a", KEY), jwk("b", OTHER)))
    assert "names a key that is not in slurm.jwks" in node.fault(forge(claims(), kid="c"))[1]
    assert node.fault(forge(claims(), KEY, kid="b"))[0] is SealFault.BAD_SEAL
    assert node.fault(forge(claims(), OTHER))[0] is SealFault.BAD_SEAL


def test_a_key_that_has_expired_seals_and_opens_nothing(tmp_path: Path) -> None:
    """To the second of its exp; the other keys of the set are not harmed."""
    node = Node(write_set(tmp_path / "slurm.jwks", jwk("a", KEY, exp=int(NOW) + 5, use="default"), jwk("b", OTHER)))
    assert node.seal.open(forge(claims(), KEY, kid="a")).payload == b"question"
    node.clock.now += 5
    late = claims(iat=node.clock.now, exp=node.clock.now + TTL_S)
    assert node.fault(forge(late, KEY, kid="a"))[0] is SealFault.EXPIRED
    assert node.fault(forge(late, KEY))[0] is SealFault.EXPIRED, "no kid is the default key"
    with pytest.raises(SealError, match="key a has expired") as refusal:
        node.seal.seal(b"question")
    assert refusal.value.fault is SealFault.UNAVAILABLE
    assert node.seal.open(forge(late, OTHER, kid="b")).payload == b"question"


# ---- opened


@given(st.binary(min_size=1, max_size=PAYLOAD_MAX_BYTES))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_sealed_is_opened(key_file: Path, payload: bytes) -> None:
    """Any bytes in, the same bytes out, in a frame's room."""
    sealed = Node(key_file).seal.seal(payload)
    assert len(sealed) <= SEALED_MAX_BYTES
    assert Node(key_file).seal.open(sealed) == Opened(payload, os.geteuid(), None)


def test_the_longest_fits_a_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest kid, cluster and host name that are taken."""
    monkeypatch.setattr("socket.gethostname", lambda: "h" * 64)
    path = write_set(tmp_path / "slurm.jwks", jwk("k" * 128, KEY))
    assert len(Node(path, "c" * 255).seal.seal(b"x" * PAYLOAD_MAX_BYTES)) <= SEALED_MAX_BYTES


def test_a_token_can_be_read_by_hand(key_file: Path) -> None:
    """auth/slurm's claims, its payload in padded base64, and a jti of our own."""
    header, body, signature = Node(key_file).seal.seal(b"question?").split(b".")
    assert signature == base64.urlsafe_b64encode(hmac.new(KEY, header + b"." + body, hashlib.sha256).digest())[:43]
    assert json.loads(base64.urlsafe_b64decode(header + b"==")) == {"alg": "HS256", "typ": "JWT"}
    fields = json.loads(base64.urlsafe_b64decode(body + b"=="))
    assert len(fields.pop("jti")) == 32
    assert fields == {
        "iat": NOW,
        "exp": NOW + TTL_S,
        "ver": 1,
        "ruid": 0,
        "context": "adoptd",
        "cluster": "big",
        "uid": os.geteuid(),
        "gid": os.getegid(),
        "host": socket.gethostname().partition(".")[0],
        "payload": "cXVlc3Rpb24/",
    }


def test_keys_are_changed_one_node_at_a_time(tmp_path: Path) -> None:
    """Old and new in the set, then the new one the default, then the old one gone; and from slurm.key to slurm.jwks."""
    before = Node(write_set(tmp_path / "1.jwks", jwk("old", KEY)))
    during = Node(write_set(tmp_path / "2.jwks", jwk("old", KEY), jwk("new", OTHER, use="default")))
    plain = Node(write(tmp_path / "slurm.key", KEY))
    for sealer, opener in ((before, during), (before, plain), (plain, before)):
        assert opener.seal.open(sealer.seal.seal(b"question")).payload == b"question"
    assert before.fault(during.seal.seal(b"question"))[0] is SealFault.BAD_SEAL
    after = Node(write_set(tmp_path / "3.jwks", jwk("new", OTHER)))
    assert after.seal.open(during.seal.seal(b"question")).payload == b"question"


def test_what_auth_slurm_reads_is_read(tmp_path: Path) -> None:
    """Either alphabet, padded or not, words in any case, unknown fields; the first key where none is the default."""
    key = b"\xff\xfe" * 32
    for text in (base64.b64encode(key).decode(), base64.urlsafe_b64encode(key).decode().rstrip("=")):
        path = write_set(tmp_path / "slurm.jwks", jwk("a", key, k=text, alg="hs256", kty="OCT", x=1), jwk("b", OTHER))
        assert Node(path).seal.open(forge(claims(), key)).payload == b"question"


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_slurm_user_may_own_the_key_and_its_group_read_it(tmp_path: Path, mode: int) -> None:
    """As auth/slurm allows: the agent seals wherever slurmd does. SlurmUser is then one who may have sealed."""
    path = write(tmp_path / "slurm.key", KEY, mode)
    os.chown(path, SLURM, SLURM)
    node = Node(path, owners=frozenset({0, SLURM}))
    assert node.seal.open(forge(claims(uid=SLURM))).uid == SLURM
    assert node.fault(forge(claims(uid=1001)))[0] is SealFault.FOREIGN


# ---- the choice


def site(directory: Path, auth_type: str, auth_info: str = "") -> SlurmSite:
    return SlurmSite(auth_type, auth_info, (directory,), "big", frozenset({0}))


def scheme_of(scheme: str, tmp_path: Path, slurm: Optional[SlurmSite], slurm_key: Optional[Path] = None) -> str:
    with contextlib.closing(
        open_seal(scheme, tmp_path / "adoptd.key", str(tmp_path / "no.socket"), 10, slurm, slurm_key)
    ) as seal:
        assert seal.open(seal.seal(b"question")).payload == b"question"
        return seal.scheme


def test_auto_takes_slurm_s_way_only_where_slurm_goes_it(tmp_path: Path) -> None:
    """A slurm.key that is lying about under auth/munge is not used; with nothing else, all places are named."""
    write(tmp_path / "slurm.key", KEY)
    for found, words in (
        (None, "slurm: there is no slurm.conf here"),
        (site(tmp_path, "auth/munge"), "slurm: AuthType is auth/munge"),
        (site(tmp_path / "empty", "auth/slurm"), f"slurm: neither slurm.jwks nor slurm.key is in {tmp_path}/empty"),
    ):
        with pytest.raises(SealError) as refusal:
            scheme_of("auto", tmp_path, found)
        assert words in str(refusal.value)
        assert "key: " in str(refusal.value)
    write(tmp_path / "adoptd.key", OTHER)
    assert scheme_of("auto", tmp_path, site(tmp_path, "auth/munge")) == "key"
    assert scheme_of("auto", tmp_path, site(tmp_path, "auth/slurm")) == "slurm"


def test_auto_does_not_pass_over_a_wrong_slurm_key(tmp_path: Path) -> None:
    """Open to all: an error to be told, although the agent's own key is there."""
    write(tmp_path / "adoptd.key", OTHER)
    write(tmp_path / "slurm.key", KEY, 0o644)
    with pytest.raises(SealError, match=r"slurm\.key is of mode 0644"):
        scheme_of("auto", tmp_path, site(tmp_path, "auth/slurm"))


def test_slurm_named_never_becomes_another(tmp_path: Path) -> None:
    """Whatever AuthType says it is slurm, and without a key or a slurm.conf an error."""
    write(tmp_path / "adoptd.key", OTHER)
    for found, words in ((None, "no slurm.conf"), (site(tmp_path, "auth/slurm"), "neither slurm.jwks nor slurm.key")):
        with pytest.raises(SealError, match=words):
            scheme_of("slurm", tmp_path, found)
    named = write(tmp_path / "elsewhere.key", KEY)
    assert scheme_of("slurm", tmp_path, site(tmp_path, "auth/munge"), named) == "slurm"


def test_slurm_jwks_is_taken_before_slurm_key(tmp_path: Path) -> None:
    """In the first directory that has either, as auth/slurm has it."""
    first, second = tmp_path / "conf", tmp_path / "usual"
    first.mkdir()
    second.mkdir()
    found = SlurmSite("auth/slurm", "", (first, second), "big", frozenset({0}))
    expected: List[Path] = [second / "slurm.key", second / "slurm.jwks", first / "slurm.key", first / "slurm.jwks"]
    assert found.key_file() is None
    for path in expected:
        path.touch()
        assert found.key_file() == path


@pytest.mark.parametrize(
    ("auth_info", "expected"),
    [
        ("", None),
        ("socket=", None),
        ("socket=relative", None),
        ("ttl=60", None),
        ("socket=/run/munge/2", "/run/munge/2"),
        ("ttl=60, Socket=/run/munge/2", "/run/munge/2"),
    ],
)
def test_the_munge_socket_of_auth_info(tmp_path: Path, auth_info: str, expected: Optional[str]) -> None:
    """Where the site's munged listens elsewhere, slurm.conf says so."""
    assert site(tmp_path, "auth/munge", auth_info).munge_socket() == expected


def test_from_the_configuration_and_slurm_conf(tmp_path: Path) -> None:
    """AuthType, ClusterName and the key beside slurm.conf: nothing but slurm_conf has to be set, if that."""
    conf = write(tmp_path / "slurm.conf", b"ClusterName=big\nAuthType=auth/slurm\nNodeName=n1\n", 0o644)
    write(tmp_path / "slurm.key", KEY)
    jobs = JobsConfig(slurm_conf=str(conf), slurm_node_name="n1")
    told = Config(jobs=jobs, seal=SealConfig(key_file=str(tmp_path / "adoptd.key"), munge_socket="/nowhere"))
    with contextlib.closing(configured_seal(told)) as seal:
        assert seal.scheme == "slurm"
        body = seal.seal(b"question").split(b".")[1]
    assert json.loads(base64.urlsafe_b64decode(body + b"=="))["cluster"] == "big"
