"""The step protocol as bytes: what is refused first, then what is understood. No sockets."""

from __future__ import annotations

import struct
from typing import Callable, List, Optional, TypeVar

import pytest

from adoptd.jobs import slurm_wire as wire
from adoptd.jobs.slurm_wire import Got, Namespace, Op, Reply, StepState, X11Display
from adoptd.model import ProtocolError

T = TypeVar("T")
MINUS_ONE = struct.pack("=i", -1)


class Reader:
    """Feeds a reply's bytes to its reader, exactly as many as it wants, and says what is left."""

    def __init__(self, data: bytes, descriptors: Optional[List[int]] = None) -> None:
        self.left = data
        self.descriptors = descriptors or []

    def read(self, reply: Reply[T]) -> T:
        try:
            want = next(reply)
            while True:
                assert want.size > 0
                assert len(self.left) >= want.size, "wants more than the reply has"
                data, self.left = self.left[: want.size], self.left[want.size :]
                descriptor = self.descriptors.pop(0) if want.descriptor and self.descriptors else None
                want = reply.send(Got(data, descriptor))
        except StopIteration as stop:
            value: T = stop.value
            return value


def i32(value: int) -> bytes:
    return struct.pack("=i", value)


def u32(value: int) -> bytes:
    return struct.pack("=I", value)


@pytest.mark.parametrize(
    ("reply", "data", "words"),
    [
        (wire.read_hello, MINUS_ONE, "refuses protocol version 46"),
        (wire.read_hello, i32(0), "protocol version 0"),
        (wire.read_hello, i32(33 << 8), "protocol version"),
        (wire.read_hello, i32(0x7FFFFFFF), "protocol version"),
        (wire.read_state, u32(5), "step state 5"),
        (wire.read_state, MINUS_ONE, "step state 4294967295"),
        (wire.read_uid, MINUS_ONE, "nobody"),
        (wire.read_contains, b"\2", "truth value"),
        (wire.read_contains, b"\xff", "truth value"),
        (wire.read_x11, i32(-1) + i32(0), "display number -1"),
        (wire.read_x11, i32(65536) + i32(0), "display number 65536"),
        (wire.read_x11, i32(10) + i32(-1), "-1 bytes"),
        (wire.read_x11, i32(10) + i32(1 << 30), "1073741824 bytes"),
        (wire.read_x11, i32(10) + i32(4) + b"/tmp", "NUL"),
        (wire.read_x11, i32(10) + i32(4) + b"/\0a\0", "NUL"),
        (wire.read_namespace, i32(7) + b"x", "no descriptor"),
        (wire.read_namespace_kind_count, u32(17), "17 namespaces"),
        (wire.read_namespace_kind_count, MINUS_ONE, "4294967295 namespaces"),
        (wire.read_one_namespace, i32(1), "0x1 is no CLONE_NEW"),
        (wire.read_one_namespace, i32(wire.CLONE_NEWNS) + b"x", "no descriptor"),
    ],
)
def test_an_answer_that_no_step_gives_is_refused(reply: Callable[[], Reply[object]], data: bytes, words: str) -> None:
    """Each is named, and nothing is read beyond what shows it to be wrong."""
    with pytest.raises(ProtocolError, match=words):
        Reader(data).read(reply())


@pytest.mark.parametrize("pid", [0, -1, -1000, 1 << 23])
def test_what_is_no_pid_is_not_sent(pid: int) -> None:
    """0 and negative numbers are process groups to kill(2), which the step uses."""
    with pytest.raises(ValueError, match="pid"):
        wire.request_about(Op.ADD_EXTERN_PID, pid)


def test_requests_are_native_integers_without_a_frame() -> None:
    """26.11 is version 46; ops are four bytes and their argument four more."""
    assert wire.hello() == i32(46 << 8)
    assert wire.request(Op.STATE) == i32(5)
    assert wire.request_about(Op.ADD_EXTERN_PID, 1234) == i32(22) + i32(1234)
    numbers = {op.name: int(op) for op in Op}
    assert numbers == {
        "SLUID": 1,
        "STATE": 5,
        "PID_IN_CONTAINER": 8,
        "UID": 20,
        "ADD_EXTERN_PID": 22,
        "X11_DISPLAY": 23,
        "GET_NS_FD": 26,
        "GET_NS_FDS": 28,
    }


@pytest.mark.parametrize(
    ("number", "state"),
    [
        (0, StepState.NOT_RUNNING),
        (1, StepState.STARTING),
        (2, StepState.RUNNING),
        (3, StepState.ENDING),
        (4, StepState.ENDING),
    ],
)
def test_states_mean_the_same_in_every_release(number: int, state: StepState) -> None:
    """3 is "ending" up to 23.02 and "cancelled" from 23.11, where "ending" is 4: none of them takes a process."""
    assert Reader(u32(number)).read(wire.read_state()) is state


@pytest.mark.parametrize(
    ("data", "display"),
    [
        (i32(0) + i32(0), None),
        (i32(0) + i32(5) + b"/tmp\0", None),
        (i32(53) + i32(0), X11Display(53, None)),
        (i32(53) + i32(1) + b"\0", X11Display(53, None)),
        (i32(53) + i32(11) + b"/tmp/x/auth"[:10] + b"\0", X11Display(53, "/tmp/x/aut")),
        (i32(53) + i32(3) + b"/\xff\0", X11Display(53, "/\udcff")),
    ],
)
def test_x11(data: bytes, display: Optional[X11Display]) -> None:
    """No display number is no tunnel; a path may hold any bytes, as file names may."""
    reader = Reader(data + b"next")
    assert reader.read(wire.read_x11()) == display
    assert reader.left == b"next"


def test_namespaces_before_25_11() -> None:
    """The number sent is the step's own descriptor: only whether it is above zero means anything."""
    assert Reader(i32(0)).read(wire.read_namespace()) == ()
    assert Reader(i32(-1)).read(wire.read_namespace()) == ()
    assert Reader(i32(9) + b"x", [77]).read(wire.read_namespace()) == (Namespace(wire.CLONE_NEWNS, 77),)


def test_namespaces_from_25_11() -> None:
    """A count, then for each its kind and one byte that carries the descriptor."""
    reader = Reader(u32(2) + i32(0x20000) + b"x" + i32(0x20000000) + b"x", [5, 6])
    assert reader.read(wire.read_namespace_kind_count()) == 2
    assert reader.read(wire.read_one_namespace()) == Namespace(0x20000, 5)
    assert reader.read(wire.read_one_namespace()) == Namespace(0x20000000, 6)


def test_the_other_answers() -> None:
    """A reply ends where it ends: what follows belongs to the next."""
    reader = Reader(i32(38 << 8) + u32(1001) + i32(-1) + b"\0" + b"\1" + struct.pack("=Q", 1 << 60))
    assert reader.read(wire.read_hello()) == 38 << 8
    assert reader.read(wire.read_uid()) == 1001
    assert reader.read(wire.read_added()) == -1
    assert reader.read(wire.read_contains()) is False
    assert reader.read(wire.read_contains()) is True
    assert reader.read(wire.read_sluid()) == 1 << 60
    assert reader.left == b""
