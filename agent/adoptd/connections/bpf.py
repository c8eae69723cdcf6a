"""The first witness: the label the probe left on the socket when it was connected.

Owns the translation from the probe's answer to an Owner, and the judgement of which labels name one. Must
never wait and never answer from a label that could be of another process. Called by the chain of
witnesses, in the event loop.
"""

from __future__ import annotations

from typing import Optional

from adoptd.connections.candidates import CONNECTED_STATES, all_devices, search
from adoptd.deadline import Deadline
from adoptd.model import Ambiguous, Connection, Owner, ProbeError, Witness, WitnessUnavailable
from adoptd.probe.pins import OpenProbe
from adoptd.probe.record import Answer, Outcome


class BpfWitness:
    """Asks the probe. Needs no lock, no thread and no time worth a deadline: some 10 us per question."""

    name = Witness.BPF
    may_block = False

    def __init__(self, probe: OpenProbe) -> None:
        self._probe = probe

    def owner_of(self, connection: Connection, deadline: Deadline) -> Optional[Owner]:
        """Who called connect(), or None if the probe does not know. Raises WitnessUnavailable, Ambiguous.

        For a connection older than the probe: who held it when the probe was loaded, if that was one
        process; its ``connected_at_ns`` is None.
        """
        try:
            found = search(connection, lambda device: _socket(self._probe.ask(connection, device)), all_devices)
        except ProbeError as error:
            raise WitnessUnavailable(f"bpf: {error}") from None
        if found is None:
            return None
        if found.twins:
            raise Ambiguous(f"{found.twins + 1} sockets are {connection}, in one network namespace")
        return owner_by_label(found)

    def look_in(self, connection: Connection, netns: int) -> Optional[Answer]:
        """The connection's socket in another network namespace, if it is bound to no device and its peer answered.

        ``netns``: the id that ours has for it. Raises WitnessUnavailable.
        """
        try:
            found = _socket(self._probe.ask(connection, netns=netns))
        except ProbeError as error:
            raise WitnessUnavailable(f"bpf: {error}") from None
        return found if found is not None and found.state in CONNECTED_STATES else None


def _socket(answer: Answer) -> Optional[Answer]:
    """The answer if it is about a socket of the connection's 4-tuple, whether or not that has a label."""
    return answer if answer.outcome in (Outcome.LABELLED, Outcome.UNLABELLED) else None


def owner_by_label(answer: Answer) -> Optional[Owner]:
    """Whom the socket's label names, if it names one process."""
    record = answer.record
    # Which of several holders connected it cannot be told, and the witnesses below do know who made the socket.
    if record is None or record.shared:
        return None
    return Owner(
        witness=Witness.BPF,
        uid=record.uid,
        pid=record.pid,
        cgroup_id=record.cgroup_id,
        connected_at_ns=record.connected_at_ns,
        comm=record.comm,
    )
