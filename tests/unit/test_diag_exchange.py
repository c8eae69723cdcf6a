"""The sock_diag witness over a channel that misbehaves: what it believes, and what it leaves behind."""

from __future__ import annotations

import errno
import struct
from typing import Callable, Dict, List, Tuple

import pytest

from adoptd.connections.diag import Channel, DiagWitness, open_channel
from adoptd.deadline import Deadline
from adoptd.model import Connection, Endpoint, WitnessUnavailable

CONNECTION = Connection(Endpoint.parse("192.0.2.1:1"), Endpoint.parse("192.0.2.2:2"))
Answer = Callable[[bytes], List[Tuple[bytes, Tuple[int, int]]]]


def refusal(number: int) -> Answer:
    def answer(question: bytes) -> List[Tuple[bytes, Tuple[int, int]]]:
        (sequence,) = struct.unpack_from("=I", question, 8)
        return [(struct.pack("=IHHIIi", 36, 2, 0, sequence, 0, -number) + question[:16], (0, 0))]

    return answer


def found(uid: int, inode: int = 5, sequence_off_by: int = 0, sender: int = 0) -> Answer:
    """A reply about an established socket with the addresses that were asked for."""

    def answer(question: bytes) -> List[Tuple[bytes, Tuple[int, int]]]:
        (sequence,) = struct.unpack_from("=I", question, 8)
        header = struct.pack("=IHHII", 88, 20, 0, sequence + sequence_off_by, 0)
        body = bytes([question[16], 1, 0, 0]) + question[24:72] + struct.pack("=5I", 0, 0, 0, uid, inode)
        return [(header + body, (sender, 0))]

    return answer


class Kernel:
    """Opens channels: real ones for the self-test, then fakes that answer from a script, one per question."""

    def __init__(self) -> None:
        self.script: List[Answer] = []
        self.opened: List[FakeChannel] = []
        self.real = True

    def open(self) -> Channel:
        if self.real:
            return open_channel()
        self.opened.append(FakeChannel(self))
        return self.opened[-1]


class FakeChannel:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._inbox: List[Tuple[bytes, Tuple[int, int]]] = []
        self.closed = False

    def send(self, data: bytes, /) -> int:
        self._inbox += self._kernel.script.pop(0)(data)
        return len(data)

    def recvfrom(self, bufsize: int, /) -> Tuple[bytes, Tuple[int, int]]:
        if not self._inbox:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return self._inbox.pop(0)

    def close(self) -> None:
        self.closed = True


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def diag(kernel: Kernel, clock: Clock) -> DiagWitness:
    witness = DiagWitness(kernel.open, clock, devices=tuple)
    witness.close()
    kernel.real = False
    return witness


def ask(witness: DiagWitness) -> Dict[str, int]:
    owner = witness.owner_of(CONNECTION, Deadline.after_ms(20_000))
    return {} if owner is None else {"uid": owner.uid}


def test_no_module_is_not_no_such_socket(clock: Clock) -> None:
    """ENOENT for a connection that is known to exist: every question is refused, none answered with None."""
    kernel = Kernel()
    kernel.real = False
    kernel.script = [refusal(errno.ENOENT)]
    witness = DiagWitness(kernel.open, clock, devices=tuple)
    with pytest.raises(WitnessUnavailable, match="tcp_diag"):
        ask(witness)


def test_a_wrong_inode_in_the_self_test_is_a_fault(clock: Clock) -> None:
    """A kernel that answers about another socket is not believed about any."""
    kernel = Kernel()
    kernel.real = False
    kernel.script = [found(0, inode=1)]
    with pytest.raises(WitnessUnavailable, match="inode 1 of a socket whose inode is"):
        ask(DiagWitness(kernel.open, clock, devices=tuple))


def test_a_failed_self_test_is_tried_again_later(clock: Clock) -> None:
    """A module loaded after the agent started is noticed, without a test on every question."""
    kernel = Kernel()
    kernel.real = False
    kernel.script = [refusal(errno.ENOENT)]
    witness = DiagWitness(kernel.open, clock, devices=tuple)
    witness.close()
    kernel.real = True
    with pytest.raises(WitnessUnavailable):
        ask(witness)
    clock.now_s += 11
    assert ask(witness) == {}
    witness.close()


def test_no_netlink_at_all_is_unavailable(clock: Clock) -> None:
    """A host that refuses the socket (a seccomp filter, say) does not stop the agent from starting."""

    def refuse() -> Channel:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with pytest.raises(WitnessUnavailable, match="not permitted"):
        ask(DiagWitness(refuse, clock, devices=tuple))


def test_an_expired_deadline_asks_nothing(diag: DiagWitness, kernel: Kernel) -> None:
    """No time, no question."""
    with pytest.raises(WitnessUnavailable, match="no time"):
        diag.owner_of(CONNECTION, Deadline.after_ms(-1))
    assert kernel.opened == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP])
def test_other_errors_are_not_no_such_socket(diag: DiagWitness, kernel: Kernel, number: int) -> None:
    """Only ENOENT means that the connection is not known."""
    kernel.script = [refusal(number)]
    with pytest.raises(WitnessUnavailable, match="refused"):
        ask(diag)


def test_silence_is_given_up_after_a_second_try(diag: DiagWitness, kernel: Kernel) -> None:
    """A receive timeout drops the socket, and with it the reply that may still come."""
    kernel.script = [lambda _: [], lambda _: []]
    with pytest.raises(WitnessUnavailable, match="does not answer"):
        ask(diag)
    assert [channel.closed for channel in kernel.opened] == [True, True]


def test_another_questions_reply_is_not_believed(diag: DiagWitness, kernel: Kernel) -> None:
    """The socket is reopened, so that the stale reply cannot answer a later question either."""
    kernel.script = [found(1, sequence_off_by=-1), found(2)]
    assert ask(diag) == {"uid": 2}
    assert [channel.closed for channel in kernel.opened] == [True, False]


@pytest.mark.parametrize("at", [17, 20, 22, 24, 40])
def test_a_reply_about_another_socket_is_nobody(diag: DiagWitness, kernel: Kernel, at: int) -> None:
    """A listener in its place (state, byte 17), or another port or address (20 to 55), as the kernel may answer."""

    def other(question: bytes) -> List[Tuple[bytes, Tuple[int, int]]]:
        [(reply, sender)] = found(1001)(question)
        return [(reply[:at] + b"\x0a" + reply[at + 1 :], sender)]

    kernel.script = [other]
    assert ask(diag) == {}


def test_only_the_kernel_is_believed(diag: DiagWitness, kernel: Kernel) -> None:
    """A well-formed reply from another process's port id is skipped, the kernel's own taken."""
    kernel.script = [lambda question: found(1, sender=4242)(question) + found(2)(question)]
    assert ask(diag) == {"uid": 2}
    assert [channel.closed for channel in kernel.opened] == [False]


def test_a_flood_of_strangers_ends(diag: DiagWitness, kernel: Kernel) -> None:
    """However many forged messages wait, the witness gives up."""
    kernel.script = [lambda question: found(1, sender=4242)(question) * 100] * 2
    with pytest.raises(WitnessUnavailable, match="none of them from the kernel"):
        ask(diag)


def test_the_owner_carries_no_pid(diag: DiagWitness, kernel: Kernel) -> None:
    """sock_diag knows no process; the socket is kept open between questions."""
    kernel.script = [found(1001), refusal(errno.ENOENT)]
    owner = diag.owner_of(CONNECTION, Deadline.after_ms(20_000))
    assert owner is not None
    assert (owner.uid, owner.pid, owner.cgroup_id) == (1001, None, None)
    assert ask(diag) == {}
    assert len(kernel.opened) == 1
