"""The first witness: the label the probe left on the socket when it was connected.

Owns the translation from the probe's answer to an Owner, and the judgement of which labels name one. Must
never wait and never answer from a label that could be of another process. Called by the chain of
witnesses, in the event loop.
"""

from __future__ import annotations

from typing import Optional

from adoptd.deadline import Deadline
from adoptd.model import Connection, Owner, ProbeError, Witness, WitnessUnavailable
from adoptd.probe.pins import OpenProbe
from adoptd.probe.record import TCP_SYN_SENT, Answer


class BpfWitness:
    """Asks the probe. Needs no lock, no thread and no time worth a deadline: some 10 us per question."""

    name = Witness.BPF
    may_block = False

    def __init__(self, probe: OpenProbe) -> None:
        self._probe = probe

    def owner_of(self, connection: Connection, deadline: Deadline) -> Optional[Owner]:
        """Who called connect(), or None if the probe does not know. Raises WitnessUnavailable.

        For a connection older than the probe: who held it when the probe was loaded, if that was one
        process; its ``connected_at_ns`` is None.
        """
        try:
            return _owner(self._probe.ask(connection))
        except ProbeError as error:
            raise WitnessUnavailable(f"bpf: {error}") from None


def _owner(answer: Answer) -> Optional[Owner]:
    record = answer.record
    # Nobody accepts a connection before the client has left SYN_SENT: this socket is not the one asked about, but
    # one that imitates its addresses, for example bound to another device.
    if record is None or answer.state == TCP_SYN_SENT:
        return None
    # Which of several holders connected it cannot be told, and the witnesses below do know who made the socket.
    if record.shared:
        return None
    return Owner(
        witness=Witness.BPF,
        uid=record.uid,
        pid=record.pid,
        cgroup_id=record.cgroup_id,
        connected_at_ns=record.connected_at_ns,
        comm=record.comm,
    )
