"""What lies between the two phases of a login: once, not for ever, not without bound."""

from __future__ import annotations

from fakes import ALICE, BOB, connection, job

from adoptd.model import Witness
from adoptd.policy import Situation, Step
from adoptd.sessions import PendingLogins, Settlement

ADOPTED = Settlement(Step.SUCCEED, Situation.NAMED, job("17"), Witness.BPF)
DENIED = Settlement(Step.DENY, Situation.NO_JOBS, None, None)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_another_user_or_another_connection_gets_nothing() -> None:
    """The key is both: bob's session on alice's connection, or alice's on another, is not the same login."""
    pending = PendingLogins(Clock())
    pending.remember(ALICE, connection(1), ADOPTED)
    assert pending.take(BOB, connection(1)) is None
    assert pending.take(ALICE, connection(2)) is None
    assert pending.take(ALICE, connection(1)) is ADOPTED


def test_taken_once() -> None:
    """The port is used again by later connections, so what was taken is gone."""
    pending = PendingLogins(Clock())
    pending.remember(ALICE, connection(1), ADOPTED)
    assert pending.take(ALICE, connection(1)) is ADOPTED
    assert pending.take(ALICE, connection(1)) is None
    assert len(pending) == 0


def test_too_old_is_not_believed() -> None:
    """At the very end of its time an entry is gone; a moment before it is not."""
    clock = Clock()
    pending = PendingLogins(clock, keep_s=600.0)
    pending.remember(ALICE, connection(1), ADOPTED)
    pending.remember(ALICE, connection(2), ADOPTED)
    clock.now += 599.9
    assert pending.take(ALICE, connection(1)) is ADOPTED
    clock.now += 0.1
    assert pending.take(ALICE, connection(2)) is None


def test_the_oldest_go_first_and_the_number_is_bounded() -> None:
    """A flood of logins costs the oldest entries, never memory without bound."""
    pending = PendingLogins(Clock(), capacity=3)
    for port in range(1, 11):
        pending.remember(ALICE, connection(port), ADOPTED)
        assert len(pending) <= 3
    assert [port for port in range(1, 11) if pending.take(ALICE, connection(port))] == [8, 9, 10]


def test_a_later_account_phase_replaces_the_earlier() -> None:
    """A second attempt on one connection counts as new: in what it says, in its age and in its place."""
    clock = Clock()
    pending = PendingLogins(clock, keep_s=10.0, capacity=2)
    pending.remember(ALICE, connection(1), DENIED)
    pending.remember(ALICE, connection(2), DENIED)
    clock.now += 9.0
    pending.remember(ALICE, connection(1), ADOPTED)
    pending.remember(ALICE, connection(3), ADOPTED)
    assert pending.take(ALICE, connection(2)) is None
    clock.now += 9.0
    assert pending.take(ALICE, connection(1)) is ADOPTED


def test_old_entries_are_dropped_when_new_ones_come() -> None:
    """Logins that never reach their session phase do not stay."""
    clock = Clock()
    pending = PendingLogins(clock, keep_s=10.0)
    for port in range(1, 6):
        pending.remember(ALICE, connection(port), DENIED)
    clock.now += 10.0
    pending.remember(BOB, connection(9), ADOPTED)
    assert len(pending) == 1


def test_a_login_is_awaited_between_its_phases() -> None:
    """From its account phase to its session phase or its end, and no other login's."""
    clock = Clock()
    pending = PendingLogins(clock, keep_s=10.0)
    assert not pending.awaits(ALICE, connection(1))
    pending.remember(ALICE, connection(1), ADOPTED)
    assert pending.awaits(ALICE, connection(1))
    assert not pending.awaits(BOB, connection(1))
    assert not pending.awaits(ALICE, connection(2))
    pending.take(ALICE, connection(1))
    assert not pending.awaits(ALICE, connection(1))
    pending.remember(ALICE, connection(1), ADOPTED)
    clock.now += 10.0
    assert not pending.awaits(ALICE, connection(1))
