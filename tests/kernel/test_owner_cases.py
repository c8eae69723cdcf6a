"""Who owns a connection, however it came about: every case of owner_cases, asked of every witness."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
from pathlib import Path
from typing import Tuple

import pytest

from adoptd import probe
from adoptd.connections import ConnectionWitness, Witnesses
from adoptd.connections.bpf import BpfWitness
from adoptd.connections.diag import DiagWitness
from adoptd.connections.proc import ProcWitness
from adoptd.deadline import Deadline
from adoptd.model import Ambiguous
from adoptd.probe.pins import OpenProbe
from adoptd.probe.record import Outcome
from kernel.actors import (
    ALICE,
    BOB,
    CLONE_NEWUSER,
    LIBC,
    Line,
    actor,
    become,
    bound,
    connection,
    connection_of,
    disconnect,
    fork,
    join,
    listener,
)
from kernel.owner_cases import CASES
from kernel.owner_scene import Case, Made, Says

BUDGET_MS = 20_000.0
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "owners.md"
_TCP_REPAIR = 19
_MSG_FASTOPEN = 0x20000000


def said(witness: ConnectionWitness, made: Made) -> Says:
    """What one witness says, compared with who connected in everything that the witness names."""
    try:
        owner = witness.owner_of(made.connection, Deadline.after_ms(BUDGET_MS))
    except Ambiguous:
        return Says.DOUBT
    if owner is None:
        return Says.NOBODY
    if owner.uid != made.uid:
        return Says.OTHER
    if owner.witness.value == "bpf":
        assert owner.pid == made.pid
    return Says.OWNER


def together(witnesses: Tuple[ConnectionWitness, ...], made: Made) -> Tuple[str, str]:
    """The answer of all, and the witness that it is from (for unknown: "")."""
    hearing = Witnesses(witnesses)
    try:
        testimony = asyncio.run(hearing.testimony(made.connection, Deadline.after_ms(BUDGET_MS)))
        owner = testimony.agreed_owner()
    except Ambiguous:
        return "unknown", ""
    finally:
        hearing.close()
    if owner is None:
        return "unknown", ""
    assert owner.uid == made.uid
    return "owner", owner.witness.value


def check(case: Case, made: Made, opened: OpenProbe) -> None:
    with contextlib.ExitStack() as entered:
        if made.network is not None:
            entered.enter_context(made.network.entered())
        diag = DiagWitness()
        entered.callback(diag.close)
        assert diag.self_test() is None
        bpf, proc = BpfWitness(opened), ProcWitness()
        heard = {each.name.value: said(each, made) for each in (bpf, diag, proc)}
        assert heard == {"bpf": case.bpf, "diag": case.diag, "proc": case.proc}
        expected = (case.answer, case.witness if case.answer == "owner" else "")
        assert together((bpf, diag, proc), made) == expected


@pytest.mark.parametrize("case", [case for case in CASES if not case.older], ids=lambda case: case.name)
def test_the_owner(case: Case, shared_pin_dir: Path, stack: contextlib.ExitStack) -> None:
    """Each witness says what the table says, and together they name the one that connected, or nobody.

    The agent opens the probe after the connection was made: what it knows is in the kernel, not in the agent.
    """
    made = case.make(stack)
    with probe.open_probe(shared_pin_dir) as opened:
        check(case, made, opened)


@pytest.mark.parametrize("case", [case for case in CASES if case.older], ids=lambda case: case.name)
def test_the_owner_of_what_is_older_than_the_probe(case: Case, pin_dir: Path, stack: contextlib.ExitStack) -> None:
    """The same of connections that were there before the probe."""
    made = case.make(stack)
    probe.load(pin_dir)
    with probe.open_probe(pin_dir) as opened:
        check(case, made, opened)


def test_an_accepted_connection_does_not_inherit_a_label(opened: OpenProbe, stack: contextlib.ExitStack) -> None:
    """A socket that connected, was disconnected and listens: what it accepts, somebody else connected."""
    first, socket_of_both = listener(stack), stack.enter_context(bound())
    socket_of_both.connect(first.getsockname())
    assert opened.ask(connection(socket_of_both)).record is not None
    disconnect(socket_of_both)
    socket_of_both.listen(1)
    client = stack.enter_context(bound())
    client.connect(socket_of_both.getsockname())
    accepted = stack.enter_context(socket_of_both.accept()[0])
    assert opened.ask(connection(accepted)).outcome is Outcome.UNLABELLED
    record = opened.ask(connection(client)).record
    assert record is not None
    assert record.pid == os.getpid()


def test_who_is_handed_a_socket_on_its_way_does_not_become_its_owner(
    opened: OpenProbe, stack: contextlib.ExitStack
) -> None:
    """connect() and MSG_FASTOPEN by BOB, while ALICE's connect() is under way and when it is done: all refused."""
    full = listener(stack, backlog=0)
    filler = stack.enter_context(bound())
    filler.connect(full.getsockname())
    client = stack.enter_context(bound())
    client.setblocking(False)

    def connect() -> None:
        become(ALICE)
        assert client.connect_ex(full.getsockname()) == errno.EINPROGRESS

    def interfere() -> None:
        become(BOB)
        # 0 is what the first to ask is told when ALICE's has come through: it says nothing of who connected.
        assert client.connect_ex(full.getsockname()) in (0, errno.EALREADY, errno.EISCONN)
        with pytest.raises(OSError):  # noqa: PT011 (of several kinds, by the moment)
            client.sendto(b"x", _MSG_FASTOPEN, full.getsockname())

    alice = join(fork(connect))
    asked = connection_of({"source": client.getsockname(), "destination": full.getsockname()})
    seen = []
    for _ in range(2):
        join(fork(interfere))
        record = opened.ask(asked).record
        assert record is not None
        seen.append((record.pid, record.uid))
        accepted = stack.enter_context(full.accept()[0])
        assert accepted.fileno() >= 0
        assert select.select([], [client], [], 10)[1]
    assert seen == [(alice, ALICE)] * 2


@pytest.mark.parametrize("as_root_of_a_namespace", [False, True], ids=["ordinary", "root of a user namespace"])
def test_a_user_makes_no_connection_without_a_handshake(
    as_root_of_a_namespace: bool, stack: contextlib.ExitStack
) -> None:
    """TCP_REPAIR would make any 4-tuple look established: it takes CAP_NET_ADMIN over the network namespace."""

    def live(line: Line) -> None:
        become(ALICE)
        if as_root_of_a_namespace:
            assert LIBC.unshare(CLONE_NEWUSER) == 0
        client = bound()
        try:
            client.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
        except PermissionError:
            line.tell({"refused": True})

    assert actor(stack, live).hear() == {"refused": True}


def test_the_table_for_users_is_this_one() -> None:
    """docs/owners.md has a row for each case, in this order, with the same answer and witness."""
    rows = []
    for line in DOCUMENT.read_text().partition("## Connections")[2].partition("\n## ")[0].splitlines():
        columns = [column.strip() for column in line.strip("|").split("|")]
        if line.startswith("|") and columns[0] != "case" and not columns[0].startswith("---"):
            rows.append(tuple(columns[:3]))
            assert len(columns) == 4
            assert columns[3]
    assert rows == [(case.name, case.answer, case.witness) for case in CASES]
