"""What is decided of a login, how it came about, and what the PAM module is told of it.

Owns the values that an adoption ends in and the collecting of its stages. Decides nothing and does no I/O. Called
by :mod:`adoptd.adoption`, which decides; read by the handlers and by ``adoptctl explain``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import List, Mapping, Optional, Tuple

from adoptd.jobs import JobSession
from adoptd.model import Connection, Job, JobFault, Witness
from adoptd.policy import Options, Situation, Step
from adoptd.sessions import Story
from adoptd.wire.pam import Mode, PamReply, PamRequest, Verdict

_VERDICTS: Mapping[Step, Verdict] = {
    Step.SUCCEED: Verdict.SUCCESS,
    Step.DENY: Verdict.DENY,
    Step.IGNORE: Verdict.IGNORE,
}

# Metric label of a decision that leaves the session out of any job.
_OUTCOMES: Mapping[Step, str] = {Step.SUCCEED: "allowed", Step.DENY: "denied", Step.IGNORE: "ignored"}


@dataclass(frozen=True)
class Login:
    """What is asked about: a user, a connection if it is known, and the options of the PAM line."""

    uid: int
    user: str
    connection: Optional[Connection]
    options: Options


@dataclass(frozen=True)
class Stage:
    """One step of a decision, for the log and for ``explain``. ``at_ms`` counts from the start.

    ``fault``: what was wrong with the job manager, where something was.
    """

    name: str
    found: str
    at_ms: float
    fault: Optional[JobFault] = None


@dataclass(frozen=True)
class Decision:
    """How a login ended. ``step`` is SUCCEED, DENY or IGNORE; ``reason`` a value of Step or Situation, or
    "account_phase" where the session phase followed what that had settled.

    ``job`` is the job the process was adopted into (with ``adopted``), or would be when only explained.
    ``message`` is for the user. ``story`` is the whole login's, of both phases; ``stages`` are this decision's own.
    ``session`` is what the session is given; whoever takes the decision closes it.
    """

    step: Step
    situation: Situation
    reason: str
    adopted: bool
    job: Optional[Job]
    witness: Optional[Witness]
    message: str
    stages: Tuple[Stage, ...]
    story: Story
    session: Optional[JobSession] = None

    @property
    def verdict(self) -> Verdict:
        """What PAM returns."""
        return _VERDICTS[self.step]

    @property
    def faults(self) -> Tuple[JobFault, ...]:
        """What was wrong with the job manager on the way, in order."""
        return tuple(stage.fault for stage in self.stages if stage.fault is not None)

    @property
    def outcome(self) -> str:
        """adopted, allowed, denied or ignored: what happened or, where only observed or explained, would have."""
        return _OUTCOMES[self.step] if self.job is None else "adopted"


class Trail:
    """Collects the stages of one decision with their times, and what goes on from the phase before."""

    def __init__(self, request_id: str, before: Optional[Story] = None) -> None:
        self._started = time.monotonic()
        self._stages: List[Stage] = []
        self._before = Story(request_id, self._started) if before is None else before
        # All the user's jobs here, newest first, as they were seen last.
        self.choices = self._before.choices

    @property
    def request_id(self) -> str:
        """The login's name in logs and messages."""
        return self._before.request_id

    def story(self, because: str = "") -> Story:
        """The login's so far; ``because``: see Story, "" for what the phase before says."""
        since_ms = (self._started - self._before.began_s) * 1000.0
        own = tuple((stage.name, stage.found, since_ms + stage.at_ms) for stage in self._stages)
        before = self._before
        return replace(before, because=because or before.because, choices=self.choices, stages=before.stages + own)

    def add(self, name: str, found: str, fault: Optional[JobFault] = None, at_s: Optional[float] = None) -> None:
        """Note that a stage has ended, at monotonic ``at_s`` or now."""
        at_s = time.monotonic() if at_s is None else at_s
        self._stages.append(Stage(name, found, (at_s - self._started) * 1000.0, fault))

    @property
    def stages(self) -> Tuple[Stage, ...]:
        """Those of this decision, in order."""
        return tuple(self._stages)


def reply_of(request: PamRequest, decision: Decision) -> PamReply:
    """What pam_adopt.so is told of it."""
    witness = "none" if decision.witness is None else decision.witness.value
    return PamReply(
        verdict=decision.verdict,
        adopted=decision.adopted,
        job_id="" if decision.job is None else decision.job.id,
        summary=f"reason={decision.reason} witness={witness} request={decision.story.request_id}",
        message=decision.message if request.mode is Mode.ENFORCE else "",
        environment={} if decision.session is None else decision.session.environment,
    )
