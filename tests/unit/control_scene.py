"""What is behind the users' door over fakes: every part that a command works with, and the commands themselves."""

from __future__ import annotations

import time
from typing import Callable, Mapping, Optional

from fakes import FakeAsker, FakeBackend, FakeSeal, FakeWitness

from adoptd.adoption import Adoptions
from adoptd.callerid import Asker, Inquiry, SealRoom
from adoptd.config import Config, ProbeConfig
from adoptd.connections import Witnesses
from adoptd.control import Control, Parts, Rates
from adoptd.events import Events
from adoptd.metrics import Metrics
from adoptd.model import Connection, Owner, Witness
from adoptd.sessions import PendingLogins, Sessions
from adoptd.watch import Watch
from adoptd.workers import Workers


class ControlScene:
    """An agent's parts without its doors. Without ``asker`` callerid is switched off."""

    def __init__(
        self,
        backend: FakeBackend,
        owners: Optional[Mapping[Connection, Owner]] = None,
        asker: Optional[FakeAsker] = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = Metrics()
        self.workers = Workers("w", 2, 8)
        self.witnesses = Witnesses([FakeWitness(Witness.BPF, dict(owners or {}))])
        self.pending = PendingLogins(time.monotonic)
        self.sessions = Sessions(time.time)
        self.events = Events()
        self.watch = Watch(ProbeConfig(enabled=False), self.metrics, self.workers)
        asks: Optional[Asker] = asker  # type: ignore[assignment]  # a fake has what is called of it and no more
        self.adoptions = Adoptions("n1", backend, asks, self.pending, self.workers, self.metrics)
        self.parts = Parts(
            config=Config(),
            jobs=backend,
            seals=None if asker is None else SealRoom(FakeSeal(), self.workers),
            inquiry=Inquiry(self.witnesses, backend, self.workers),
            asker=asks,
            adoptions=self.adoptions,
            pending=self.pending,
            watch=self.watch,
            workers=self.workers,
            sessions=self.sessions,
            events=self.events,
            metrics=self.metrics,
            rates=Rates(clock),
        )
        self.control = Control(self.parts)

    def close(self) -> None:
        self.sessions.close()
        self.watch.close()
        self.witnesses.close()
        self.workers.close()
