"""The MUNGE scheme, against real munged daemons: what is not a fresh credential for us opens nothing."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import gc
import os
import subprocess
import threading
import time
from ipaddress import IPv4Address
from pathlib import Path
from typing import Callable, Iterator, List, Tuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adoptd.seal import PAYLOAD_MAX_BYTES, SEALED_MAX_BYTES, Opened, SealError, SealFault
from adoptd.seal import munge as munge_module
from adoptd.seal.munge import LIBRARY, MungeSeal
from munged import Munged, running_munged

NOBODY = 65534
CLOCK_REALTIME_COARSE = 5  # linux/time.h; the time module has no name for it
TTL_S = 60


@pytest.fixture(scope="module")
def munged() -> Iterator[Munged]:
    with running_munged() as running:
        yield running


@pytest.fixture
def seal(munged: Munged) -> Iterator[MungeSeal]:
    with contextlib.closing(MungeSeal(munged.socket, TTL_S)) as opened:
        yield opened


def fault_of(seal: MungeSeal, sealed: bytes) -> SealFault:
    with pytest.raises(SealError) as refusal:
        seal.open(sealed)
    return refusal.value.fault


def as_user(uid: int, action: Callable[[], bytes]) -> bytes:
    """What ``action`` returns in a child process of ``uid``. Needs root, as the agent does."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.write(writing, action())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        result = answer.read()
    os.waitpid(child, 0)
    return result


# --- refused before munged is asked ------------------------------------------------------------


@pytest.mark.parametrize(
    "sealed",
    [
        b"",
        b"\0",
        b"MUNGE:",
        b"MUNGE::",
        b"MUNGE:AwQFAAA=",
        b"munge:AwQFAAA=:",
        b"MUNGE:AwQF\0AAA=:",
        b"MUNGE:AwQF AAA=:",
        b"MUNGE:AwQF-_A=:",
        b"MUNGE:AwQFAAB=:",
        b"MUNGE:A:",
        b"MUNGE:A===:",
        b"\xff" * 100,
        b"A" * SEALED_MAX_BYTES,
        b"eyJhbGciOiJIUzI1NiJ9.e30." + b"A" * 43,
    ],
)
def test_bytes_that_are_no_credential_never_reach_the_library(sealed: bytes, tmp_path: Path) -> None:
    """BAD_SEAL although there is no munged at all: the library takes C strings, and is not given these."""
    assert fault_of(MungeSeal(str(tmp_path / "absent"), TTL_S), sealed) is SealFault.BAD_SEAL


def test_more_bytes_than_a_frame_holds_never_reach_the_library(tmp_path: Path) -> None:
    """The bound comes first."""
    huge = b"MUNGE:" + b"A" * SEALED_MAX_BYTES + b":"
    assert fault_of(MungeSeal(str(tmp_path / "absent"), TTL_S), huge) is SealFault.TOO_LARGE


@pytest.mark.parametrize("extra", [b"\0", b"\n", b" ", b":", b"\0MUNGE:AAAA:", b"A"])
def test_bytes_around_a_credential_are_refused(seal: MungeSeal, extra: bytes) -> None:
    """munged would skip blanks and the library stop at a NUL; the credential itself still opens after."""
    sealed = seal.seal(b"question")
    assert fault_of(seal, sealed + extra) is SealFault.BAD_SEAL
    assert fault_of(seal, extra + sealed) is SealFault.BAD_SEAL
    assert seal.open(sealed).payload == b"question"


def test_a_payload_over_the_bound_is_refused_in_both_directions(munged: Munged, seal: MungeSeal) -> None:
    """Also when another program of root's made the credential, and when it holds nothing."""
    for size, fault in ((PAYLOAD_MAX_BYTES + 1, SealFault.TOO_LARGE), (0, SealFault.BAD_SEAL)):
        with pytest.raises(SealError) as refusal:
            seal.seal(b"x" * size)
        assert refusal.value.fault is fault
        assert fault_of(seal, credential_by_command(munged, b"x" * size)) is fault


def credential_by_command(munged: Munged, payload: bytes, *options: str) -> bytes:
    """A credential made by munge(1), so that the tests do not rest on the seal they test."""
    command = ["munge", f"--socket={munged.socket}", *options]
    return subprocess.run(command, input=payload, stdout=subprocess.PIPE, check=True, timeout=60).stdout.strip()


# --- refused by munged -------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_anywhere_is_refused(seal: MungeSeal, data: st.DataObject) -> None:
    """Every position to every other value; what is left intact still opens."""
    sealed = seal.seal(b"question")
    position = data.draw(st.integers(0, len(sealed) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != sealed[position]))
    changed = sealed[:position] + bytes([other]) + sealed[position + 1 :]
    assert fault_of(seal, changed) is SealFault.BAD_SEAL
    assert seal.open(sealed).payload == b"question"


@given(st.binary(min_size=1, max_size=200))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_in_the_right_armour_are_refused(seal: MungeSeal, inner: bytes) -> None:
    """What only munged can tell, it tells, and it stays up."""
    assert fault_of(seal, b"MUNGE:" + base64.b64encode(inner) + b":") is SealFault.BAD_SEAL


def test_a_credential_under_another_key_is_refused(seal: MungeSeal) -> None:
    """Another cluster's munged vouches for nobody here."""
    with running_munged() as other, contextlib.closing(MungeSeal(other.socket, TTL_S)) as foreign:
        assert fault_of(seal, foreign.seal(b"question")) is SealFault.BAD_SEAL
        assert fault_of(foreign, seal.seal(b"question")) is SealFault.BAD_SEAL


def test_a_credential_opens_once(seal: MungeSeal) -> None:
    """The second time the library hands out the payload all the same; open() does not."""
    sealed = seal.seal(b"question")
    assert seal.open(sealed).payload == b"question"
    assert fault_of(seal, sealed) is SealFault.REPLAYED


def test_a_credential_for_another_uid_is_foreign(seal: MungeSeal) -> None:
    """Not even root opens what is sealed for somebody else."""
    assert fault_of(seal, seal.seal(b"answer", reader_uid=NOBODY)) is SealFault.FOREIGN


def test_another_user_can_neither_open_nor_use_up_our_credential(munged: Munged, seal: MungeSeal) -> None:
    """A user who took a credential off the wire learns nothing from it and spoils nothing."""
    sealed = seal.seal(b"question")

    def steal() -> bytes:
        try:
            return MungeSeal(munged.socket, TTL_S).open(sealed).payload
        except SealError as error:
            return error.fault.value.encode()

    assert as_user(NOBODY, steal) == b"foreign"
    assert seal.open(sealed).payload == b"question"


def test_the_readers_ttl_rules_whatever_the_sealer_chose(munged: Munged) -> None:
    """A credential made to last an hour is EXPIRED for a reader whose ttl_s is shorter than its age."""
    sealed = credential_by_command(munged, b"question", "--ttl=3600")
    await_seconds_of_the_clock(2)
    with contextlib.closing(MungeSeal(munged.socket, 1)) as seal:
        assert fault_of(seal, sealed) is SealFault.EXPIRED


def test_a_credential_past_its_own_ttl_is_expired(munged: Munged, seal: MungeSeal) -> None:
    """The sealer's ttl counts as well; the library hands out the payload all the same, open() does not."""
    sealed = credential_by_command(munged, b"question", "--ttl=1")
    await_seconds_of_the_clock(2)
    assert fault_of(seal, sealed) is SealFault.EXPIRED


def await_seconds_of_the_clock(count: int) -> None:
    """Until the clock that munged reads, in whole seconds, shows ``count`` more: its time cannot be injected."""

    def now() -> int:
        # time(2) reads the clock of the last tick, which is up to 10 ms behind time.time().
        return int(time.clock_gettime(CLOCK_REALTIME_COARSE))

    born, give_up_at = int(time.time()), time.monotonic() + 30
    while now() < born + count:
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


@pytest.mark.parametrize(("ahead_s", "fault"), [(59, None), (61, SealFault.REWOUND), (1000, SealFault.REWOUND)])
def test_a_credential_from_the_future_is_rewound(
    seal: MungeSeal, monkeypatch: pytest.MonkeyPatch, ahead_s: int, fault: SealFault
) -> None:
    """The clocks the library reports, as they would be had the sealer's been ahead: the reader's ttl_s bounds it."""
    sealed = seal.seal(b"question")
    times = {munge_module._OPT_ENCODE_TIME: 5000 + ahead_s, munge_module._OPT_DECODE_TIME: 5000}
    monkeypatch.setattr(munge_module._Library, "time", lambda _self, _context, option: times[option])
    if fault is None:
        assert seal.open(sealed).payload == b"question"
    else:
        assert fault_of(seal, sealed) is fault


# --- munged is not there -----------------------------------------------------------------------


def fails_both_ways(seal: MungeSeal) -> Tuple[float, float]:
    """Seconds until seal() and open() gave up, asked at once in two threads."""
    took: List[float] = []

    def timed(action: Callable[[], object]) -> None:
        started_at = time.monotonic()
        with pytest.raises(SealError, match="munge_") as refusal:
            action()
        assert refusal.value.fault is SealFault.UNAVAILABLE
        took.append(time.monotonic() - started_at)

    armoured = b"MUNGE:" + base64.b64encode(b"x" * 100) + b":"
    threads = [
        threading.Thread(target=timed, args=(lambda: seal.seal(b"question"),)),
        threading.Thread(target=timed, args=(lambda: seal.open(armoured),)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(took) == 2
    return took[0], took[1]


def test_without_a_socket_both_fail_at_once(tmp_path: Path) -> None:
    """munged never started: UNAVAILABLE, and no waiting."""
    assert max(fails_both_ways(MungeSeal(str(tmp_path / "absent"), TTL_S))) < 2


def test_with_a_dead_munged_both_fail_within_seconds_and_recover() -> None:
    """The socket is left behind: the library retries for 2.3 s. A new munged on it serves the same seal."""
    with running_munged() as munged:
        seal = MungeSeal(munged.socket, TTL_S)
        seal.open(seal.seal(b"question"))
        munged.kill()
        assert max(fails_both_ways(seal)) < 9
        with running_munged(munged.key) as successor:
            Path(munged.socket).unlink()
            Path(munged.socket).symlink_to(successor.socket)
            assert seal.open(seal.seal(b"question")).payload == b"question"


def test_with_a_hung_munged_both_give_up_and_recover() -> None:
    """Its socket accepts and nobody answers: the library gives up after 10.1 s, and both work once it is back."""
    with running_munged() as munged:
        seal = MungeSeal(munged.socket, TTL_S)
        munged.pause()
        took = fails_both_ways(seal)
        munged.resume()
        assert min(took) > 2
        assert max(took) < 30
        assert seal.open(seal.seal(b"question")).payload == b"question"


def test_without_the_library_making_the_seal_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text names the library."""
    monkeypatch.setattr(munge_module, "LIBRARY", "libmunge-of-nobody.so.2")
    with pytest.raises(SealError, match=r"libmunge-of-nobody\.so\.2 cannot be loaded") as refusal:
        MungeSeal(None, TTL_S)
    assert refusal.value.fault is SealFault.UNAVAILABLE


@pytest.mark.parametrize("ttl_s", [0, -1, 3601])
def test_a_ttl_out_of_range_is_refused(ttl_s: int) -> None:
    """0 and -1 mean munged's default and maximum to the library: five minutes and an hour."""
    with pytest.raises(ValueError, match="ttl_s"):
        MungeSeal(None, ttl_s)


@pytest.mark.parametrize("uid", [-1, 0xFFFFFFFF, 1 << 32])
def test_a_reader_that_is_no_uid_is_refused(seal: MungeSeal, uid: int) -> None:
    """(uid_t)-1 means anybody to the library."""
    with pytest.raises(ValueError, match="no uid"):
        seal.seal(b"answer", reader_uid=uid)


# --- the library is what we take it for --------------------------------------------------------


def test_the_error_numbers_are_the_librarys() -> None:
    """Each number in the table means what the library says it does; the one after the last means nothing to it."""
    library = ctypes.CDLL(LIBRARY)
    library.munge_strerror.restype = ctypes.c_char_p
    texts = {
        0: b"Success",
        1: b"Internal error",
        2: b"Invalid argument",
        3: b"Exceeded maximum message length",
        4: b"Buffer overflow",
        5: b"Out of memory",
        6: b"Socket communication error",
        7: b"Socket timeout",
        8: b"Invalid credential format",
        9: b"Invalid credential version",
        10: b"Invalid cipher type",
        11: b"Invalid MAC type",
        12: b"Invalid compression type",
        13: b"Unrecognized security realm",
        14: b"Invalid credential",
        15: b"Expired credential",
        16: b"Rewound credential",
        17: b"Replayed credential",
        18: b"Unauthorized credential",
    }
    for code, text in texts.items():
        assert library.munge_strerror(code).startswith(text)
    assert set(munge_module._FAULTS) == set(texts) - {0}
    assert library.munge_strerror(19) == library.munge_strerror(250)


def test_an_error_number_nobody_knows_is_a_bad_seal(seal: MungeSeal, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later library's new refusal is still a refusal."""
    sealed = seal.seal(b"question")
    monkeypatch.setattr(seal._library, "decode", lambda *_: 99)
    assert fault_of(seal, sealed) is SealFault.BAD_SEAL


# --- granted -----------------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=PAYLOAD_MAX_BYTES))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_sealed_is_opened(seal: MungeSeal, payload: bytes) -> None:
    """Any bytes in, NULs included, the same bytes out, in a frame's room."""
    sealed = seal.seal(payload)
    assert len(sealed) <= SEALED_MAX_BYTES
    opened = seal.open(sealed)
    assert (opened.payload, opened.uid) == (payload, os.geteuid())


def test_the_sealers_uid_and_address_are_attested(munged: Munged, seal: MungeSeal) -> None:
    """A user's credential says it is that user's: the caller must look. The address is as munged has it."""
    sealed = as_user(NOBODY, lambda: MungeSeal(munged.socket, TTL_S).seal(b"question"))
    opened = seal.open(sealed)
    assert isinstance(opened.address, IPv4Address)
    assert opened == Opened(b"question", NOBODY, opened.address)
    log = munged.log.read_text()
    assert f"Set origin address to {opened.address}" in log


def test_an_answer_for_a_user_opens_for_that_user(munged: Munged, seal: MungeSeal) -> None:
    """The restriction follows each call's reader_uid, also between calls for root."""
    seal.seal(b"for root")
    sealed = seal.seal(b"answer", reader_uid=NOBODY)
    assert seal.open(seal.seal(b"for root")).payload == b"for root"
    assert as_user(NOBODY, lambda: MungeSeal(munged.socket, TTL_S).open(sealed).payload) == b"answer"


def test_a_credential_of_the_munge_command_opens(munged: Munged, seal: MungeSeal) -> None:
    """Any cipher and MAC that the site's munged allows; ours opens in unmunge(1)."""
    options = ("--cipher=aes256", "--mac=sha512", "--restrict-uid=0")
    assert seal.open(credential_by_command(munged, b"question", *options)).payload == b"question"
    command = ["unmunge", f"--socket={munged.socket}"]
    shown = subprocess.run(command, input=seal.seal(b"question"), stdout=subprocess.PIPE, check=True, timeout=60).stdout
    assert b"UID_RESTRICTION: root (0)" in b" ".join(shown.split())
    assert b"TTL: 60" in b" ".join(shown.split())
    assert shown.endswith(b"question")


def test_eight_threads_share_one_seal(seal: MungeSeal) -> None:
    """200 round trips each, all at once, none mixed up: a context is never shared."""
    failures: List[str] = []

    def round_trips(name: int) -> None:
        try:
            for number in range(200):
                payload = f"{name}/{number}".encode()
                opened = seal.open(seal.seal(payload))
                if opened.payload != payload:
                    failures.append(f"{payload!r} came back as {opened.payload!r}")
        except SealError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=round_trips, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_contexts_are_freed_with_their_thread_and_at_close(munged: Munged, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for each thread that is alive, none after close(), which may be called twice; each freed once."""
    seal = MungeSeal(munged.socket, TTL_S)
    create, destroy = seal._library.ctx_create, seal._library.ctx_destroy
    created: List[int] = []
    destroyed: List[int] = []

    def counted_create() -> int:
        pointer: int = create()
        created.append(pointer)
        return pointer

    def counted_destroy(pointer: ctypes.c_void_p) -> None:
        destroyed.append(pointer.value or 0)
        destroy(pointer)

    monkeypatch.setattr(seal._library, "ctx_create", counted_create)
    monkeypatch.setattr(seal._library, "ctx_destroy", counted_destroy)
    for _ in range(5):
        thread = threading.Thread(target=seal.seal, args=(b"question",))
        thread.start()
        thread.join()
    assert len(created) == 10
    assert sorted(destroyed) == sorted(created)
    used, done = threading.Barrier(2, timeout=60), threading.Event()

    def stay() -> None:
        seal.seal(b"question")
        used.wait()
        done.wait(60)

    staying = threading.Thread(target=stay)
    staying.start()
    used.wait()
    sealed = seal.seal(b"question")
    assert (len(created), len(destroyed)) == (14, 10)
    seal.close()
    seal.close()
    assert sorted(destroyed) == sorted(created)
    done.set()
    staying.join()
    assert fault_of(seal, sealed) is SealFault.UNAVAILABLE
    with pytest.raises(SealError, match="closed"):
        seal.seal(b"question")


def test_close_waits_for_nobody_and_frees_nothing_in_use() -> None:
    """A call that hangs in munged while the seal is closed ends by itself, on a context that is still there."""
    with running_munged() as munged:
        seal = MungeSeal(munged.socket, TTL_S)
        sealed = seal.seal(b"question")
        munged.pause()
        opened: List[bytes] = []
        hanging = threading.Thread(target=lambda: opened.append(seal.open(sealed).payload))
        hanging.start()
        await_connection(munged)
        started_at = time.monotonic()
        seal.close()
        assert time.monotonic() - started_at < 5
        munged.resume()
        hanging.join(60)
        assert opened == [b"question"]


def await_connection(munged: Munged) -> None:
    """Until a client waits on the paused daemon's socket: two rows of the path, the listener's and its own."""
    give_up_at = time.monotonic() + 60
    while Path("/proc/net/unix").read_text().split().count(munged.socket) < 2:
        assert time.monotonic() < give_up_at
        time.sleep(0.005)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_memory_does_not_grow(seal: MungeSeal) -> None:
    """Credentials and payloads are freed, those of refused credentials too: 3,000 rounds, each worth 4 KiB."""

    def rounds(count: int) -> None:
        for _ in range(count):
            sealed = seal.seal(b"x" * PAYLOAD_MAX_BYTES)
            seal.open(sealed)
            with contextlib.suppress(SealError):
                seal.open(sealed)

    rounds(500)
    gc.collect()
    before = resident_bytes()
    rounds(3000)
    gc.collect()
    assert resident_bytes() - before < 1 << 20
