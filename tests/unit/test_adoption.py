"""Adoptions through both phases: what is denied, what is never used, what is said, and what is done."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import threading
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, Dict, FrozenSet, List, Optional, Tuple

import pytest
from fakes import ALICE, BOB, FakeAsker, FakeBackend, connection, job, longer, soon

from adoptd.adoption import Adoptions
from adoptd.callerid import Asker, AskFault, Told
from adoptd.deadline import Deadline
from adoptd.decision import Decision, Login
from adoptd.jobs import JobSession, JobsHere
from adoptd.metrics import Metrics
from adoptd.model import AdoptionFailed, Connection, IPAddress, Job, JobFault, Witness
from adoptd.policy import Action, Options, Situation, Step
from adoptd.process import ProcessHandle, open_process
from adoptd.sessions import PendingLogins, Sessions
from adoptd.wire.callerid import Outcome
from adoptd.wire.pam import MESSAGE_BYTES, Mode, PamReply, PamRequest, Phase, Verdict, encode_reply
from adoptd.workers import Workers

ENDS = connection()
OLD = job("17", created=1)
NEW = job("18", created=2, identity=(2,))
ALLOW, DENY, IGNORE, NEWEST = Action.ALLOW, Action.DENY, Action.IGNORE, Action.NEWEST

UNKNOWN = Told(Outcome.UNKNOWN, "not_found")
NAMES_OLD = Told(Outcome.JOB, "owner", "17", Witness.BPF)


@dataclass
class Served:
    reply: PamReply
    decision: Decision

    @property
    def verdict(self) -> Verdict:
        return self.reply.verdict

    @property
    def job(self) -> Optional[str]:
        return None if self.decision.job is None else self.decision.job.id

    @property
    def summary(self) -> str:
        return self.reply.summary.partition(" request=")[0]


class SlowAsker(FakeAsker):
    """A source that answers late: ``meanwhile`` happens first."""

    def __init__(self, told: Told, meanwhile: Callable[[], object]) -> None:
        super().__init__(told)
        self._meanwhile = meanwhile

    async def ask(
        self,
        connection: Connection,
        login_uid: Optional[int],
        deadline: Deadline,
        at: Optional[IPAddress] = None,
        theirs: FrozenSet[str] = frozenset(),
    ) -> Told:
        self._meanwhile()
        return await super().ask(connection, login_uid, deadline, at, theirs)


class Node:
    """A destination node whose sshd is this test process."""

    def __init__(self, *jobs: Job, told: Optional[Told] = UNKNOWN, name: str = "n1") -> None:
        self.backend = FakeBackend(*sorted(jobs, key=lambda j: -j.created))
        self.asker = None if told is None else FakeAsker(told)
        self.now = 1000.0
        self.pending = PendingLogins(lambda: self.now)
        self.workers = Workers("jobs", 2, 8)
        self.metrics = Metrics()
        asker: Optional[Asker] = self.asker  # type: ignore[assignment]
        self.sessions = Sessions(lambda: self.now)
        self.adoptions = Adoptions(
            name, self.backend, asker, self.pending, self.workers, self.metrics, sessions=self.sessions
        )

    def while_asking(self, told: Told, meanwhile: Callable[[], object]) -> Node:
        """From now on ``meanwhile`` happens while the source is asked."""
        self.asker = SlowAsker(told, meanwhile)
        asker: Optional[Asker] = self.asker  # type: ignore[assignment]
        self.adoptions = Adoptions(
            "n1", self.backend, asker, self.pending, self.workers, self.metrics, sessions=self.sessions
        )
        return self

    def serve(
        self,
        phase: Phase,
        options: Options = Options(),  # noqa: B008 - frozen
        uid: int = ALICE,
        over: Optional[Connection] = ENDS,
        mode: Mode = Mode.ENFORCE,
        ms: float = 30_000.0,
    ) -> Served:
        request = PamRequest(phase, mode, options, uid, 1000, over, "sshd", "alice", "", True, False)

        async def story() -> Tuple[PamReply, Decision]:
            with open_process(os.getpid()) as process:
                reply, decision = await self.adoptions.serve(request, process, Deadline.after_ms(ms))
            self.adoptions.after_reply(request, decision)
            return reply, decision

        reply, decision = asyncio.run(story())
        encode_reply(reply)  # whatever is decided fits the record
        assert re.fullmatch("[0-9a-f]{8}", decision.story.request_id)
        assert reply.summary.endswith(f" request={decision.story.request_id}")
        assert reply.adopted == decision.adopted
        assert not (reply.adopted and reply.verdict is not Verdict.SUCCESS)
        return Served(reply, decision)

    def account(self, options: Options = Options(), **more: object) -> Served:  # noqa: B008
        return self.serve(Phase.ACCOUNT, options, **more)  # type: ignore[arg-type]

    def session(self, options: Options = Options(), **more: object) -> Served:  # noqa: B008
        return self.serve(Phase.SESSION, options, **more)  # type: ignore[arg-type]

    @property
    def moved_to(self) -> Optional[str]:
        found = self.backend.adopted.pop(os.getpid(), None)
        return None if found is None else found.id

    def counted(self, phase: str, outcome: str, reason: str, mode: str = "enforce") -> float:
        """Whoever named the job."""
        wanted = {"phase": phase, "mode": mode, "outcome": outcome, "reason": reason}
        return sum(
            found.value
            for family in self.metrics.registry.collect()
            for found in family.samples
            if found.name == "adoptd_adoptions_total" and wanted.items() <= found.labels.items()
        )


# ---- the account phase: who is not let in, and why


def test_no_job_is_denied_with_a_sentence() -> None:
    """PAM_PERM_DENIED, the node's name, and what to do."""
    node = Node(job("7", BOB))
    served = node.account()
    assert served.verdict is Verdict.DENY
    assert served.reply.message == (
        "Access to n1 refused: you have no job running on n1. Log in to a node on which one of your jobs is running. "
        f"[request {served.decision.story.request_id}]"
    )
    assert served.summary == "reason=no_jobs witness=none"
    assert (served.reply.job_id, served.reply.environment, node.moved_to) == ("", {}, None)
    assert node.counted("account", "denied", "no_jobs") == 1


def test_no_job_ignored() -> None:
    """action_no_jobs=ignore: the rest of the stack decides, without a message."""
    node = Node()
    served = node.account(Options(action_no_jobs=IGNORE))
    assert (served.verdict, served.reply.message) == (Verdict.IGNORE, "")
    assert node.counted("account", "ignored", "no_jobs") == 1


@pytest.mark.parametrize(
    ("action", "verdict", "outcome"),
    [(DENY, Verdict.DENY, "denied"), (ALLOW, Verdict.SUCCESS, "allowed"), (IGNORE, Verdict.IGNORE, "ignored")],
)
def test_the_job_manager_cannot_be_asked(action: Action, verdict: Verdict, outcome: str) -> None:
    """Not "no jobs": the option for it decides, and nobody is adopted."""
    node = Node(OLD)
    node.backend.down = "no cgroup mount"
    served = node.account(Options(action_generic_failure=action))
    assert (served.verdict, served.decision.situation) == (verdict, Situation.GENERIC_FAILURE)
    assert ("cannot be looked up" in served.reply.message) == (action is DENY)
    assert node.moved_to is None
    assert node.counted("account", outcome, "generic_failure") == 1
    assert served.decision.stages[0].found == "cannot be asked: no cgroup mount"


def test_the_job_manager_hangs(gate: threading.Event) -> None:
    """Its silence is a generic failure at the deadline, not a login that hangs."""
    node = Node(OLD)
    node.backend.hang = gate
    served = node.account(Options(action_generic_failure=DENY), ms=50)
    assert served.verdict is Verdict.DENY
    assert served.decision.situation is Situation.GENERIC_FAILURE


@pytest.mark.parametrize("told", [UNKNOWN, Told(Outcome.NO_JOB, "owner"), Told(Outcome.UNKNOWN, "timeout"), None])
def test_unknown_denied(told: Optional[Told]) -> None:
    """Several jobs and no answer, whichever way: the message names the jobs."""
    node = Node(OLD, NEW, told=told)
    served = node.account(Options(action_unknown=DENY))
    assert served.verdict is Verdict.DENY
    assert "you have several jobs on n1 (18, 17) and it could not be found out" in served.reply.message
    assert node.moved_to is None
    assert node.counted("account", "denied", "unknown") == 1


def test_no_connection_is_not_asked_about() -> None:
    """A login without a TCP connection is unknown; nobody is asked, nothing is remembered."""
    node = Node(OLD, NEW, told=NAMES_OLD)
    served = node.account(Options(action_unknown=DENY), over=None)
    assert served.verdict is Verdict.DENY
    assert node.asker is not None
    assert node.asker.asked == []
    assert len(node.pending) == 0
    assert AskFault.NO_CONNECTION.value in served.decision.stages[1].found


@pytest.mark.parametrize(
    "told_id",
    [
        pytest.param("7", id="bob's job here"),
        pytest.param("99", id="a job that is not here"),
        pytest.param("017", id="an id that merely looks alike"),
        pytest.param("17\n", id="an id with a newline"),
    ],
)
@pytest.mark.parametrize("action", [DENY, NEWEST, ALLOW])
def test_a_job_that_is_not_here_or_not_the_user_s_is_never_used(told_id: str, action: Action) -> None:
    """Whatever the source node says, the job must be one of the user's on this node."""
    node = Node(OLD, NEW, job("7", BOB), told=Told(Outcome.JOB, "owner", told_id, Witness.BPF))
    served = node.account(Options(action_unknown=action))
    expected: Dict[Action, Tuple[Verdict, Optional[str]]] = {
        DENY: (Verdict.DENY, None),
        NEWEST: (Verdict.SUCCESS, "18"),
        ALLOW: (Verdict.SUCCESS, None),
    }
    assert (served.verdict, served.job) == expected[action]
    assert node.moved_to == expected[action][1]
    assert served.decision.witness is None
    assert set(node.backend.tried) <= {"18"}


@pytest.mark.parametrize("hint", ["7", "99", "017", "17\n", "", None])
def test_a_hint_of_a_job_that_is_not_here_or_not_the_user_s_is_not_used(hint: Optional[str]) -> None:
    """An environment can name any job: bob's here, none, or what only looks like one."""
    node = Node(OLD, NEW, job("7", BOB), told=Told(Outcome.NO_JOB, "owner", witness=Witness.HINT, hint=hint))
    served = node.account(Options(action_unknown=DENY))
    assert (served.verdict, served.decision.witness, node.moved_to) == (Verdict.DENY, None, None)


@pytest.mark.parametrize("outcome", [Outcome.UNKNOWN, Outcome.JOB])
def test_a_hint_beside_another_outcome_is_not_used(outcome: Outcome) -> None:
    """Evidence that the connection comes from a job, or none at all, is not overruled by an environment."""
    node = Node(OLD, NEW, told=Told(outcome, "owner", None, Witness.HINT, hint="17"))
    assert node.account(Options(action_unknown=DENY)).verdict is Verdict.DENY


def test_a_hint_of_the_user_s_job_here() -> None:
    """ssh typed in an salloc shell on a login node: into that job, by a witness of its own."""
    node = Node(OLD, NEW, told=Told(Outcome.NO_JOB, "owner", witness=Witness.HINT, hint="17"))
    served = node.account(Options(action_unknown=DENY))
    assert (served.verdict, node.moved_to) == (Verdict.SUCCESS, "17")
    assert served.summary == "reason=callerid witness=hint"
    assert served.decision.stages[1].found == "job 17 by hint"


@pytest.mark.parametrize("outcome", [Outcome.UNKNOWN, Outcome.NO_JOB])
def test_a_job_beside_another_outcome_is_not_used(outcome: Outcome) -> None:
    """Only the outcome "job" names one."""
    node = Node(OLD, NEW, told=Told(outcome, "owner", "17", Witness.BPF))
    assert node.account().job == "18"


@pytest.mark.parametrize(("action", "verdict"), [(DENY, Verdict.DENY), (ALLOW, Verdict.SUCCESS)])
def test_the_only_job_cannot_be_had(action: Action, verdict: Verdict) -> None:
    """action_adopt_failure decides; let in means not adopted, and says so."""
    node = Node(OLD)
    node.backend.cannot_adopt["17"] = "frozen"
    served = node.account(Options(action_adopt_failure=action))
    assert (served.verdict, served.reply.adopted, served.reply.job_id) == (verdict, False, "")
    assert served.summary == "reason=adopt_failure witness=none"
    assert ("could not be put into your job" in served.reply.message) == (action is DENY)
    assert [s.found for s in served.decision.stages if s.name == "adopt"] == ["job 17 failed: frozen"]
    assert node.counted("account", {DENY: "denied", ALLOW: "allowed"}[action], "adopt_failure") == 1


@pytest.mark.parametrize("action", [NEWEST, ALLOW, DENY])
def test_the_named_job_cannot_be_had(action: Action) -> None:
    """action_unknown decides again; newest goes on to the newest."""
    node = Node(OLD, NEW, told=NAMES_OLD)
    node.backend.cannot_adopt["17"] = "ending"
    served = node.account(Options(action_unknown=action))
    expected: Dict[Action, Tuple[Verdict, Optional[str]]] = {
        DENY: (Verdict.DENY, None),
        NEWEST: (Verdict.SUCCESS, "18"),
        ALLOW: (Verdict.SUCCESS, None),
    }
    assert (served.verdict, node.moved_to) == expected[action]
    assert served.decision.witness is None, "the witness named another job than the one adopted into"
    assert node.backend.tried == (["17", "18"] if action is NEWEST else ["17"])


def test_neither_the_named_nor_the_newest_can_be_had() -> None:
    """Then it is action_adopt_failure's."""
    node = Node(OLD, NEW, told=NAMES_OLD)
    node.backend.cannot_adopt.update({"17": "ending", "18": "frozen"})
    served = node.account(Options(action_adopt_failure=DENY))
    assert (served.verdict, served.decision.situation) == (Verdict.DENY, Situation.ADOPT_FAILURE)
    assert node.backend.tried == ["17", "18"]


def test_the_newest_is_tried_once_when_it_was_the_named_one() -> None:
    """The named job is the newest: tried again, as the rules say, and then it ends."""
    node = Node(OLD, NEW, told=Told(Outcome.JOB, "owner", "18", Witness.BPF))
    node.backend.cannot_adopt["18"] = "frozen"
    assert node.account(Options(action_adopt_failure=DENY)).verdict is Verdict.DENY
    assert node.backend.tried == ["18", "18"]


# ---- jobs that end while their login is decided


@pytest.mark.parametrize("told", [UNKNOWN, NAMES_OLD], ids=["silent", "names one"])
@pytest.mark.parametrize("later", [(), (job("19", created=3, identity=(3,)), job("20", created=4, identity=(4,)))])
def test_who_ends_their_jobs_while_the_source_is_asked_is_not_let_in(told: Told, later: Tuple[Job, ...]) -> None:
    """By default a failed adoption lets in, into no job: a job that has ended is none; nor is one begun since asked."""
    node = Node(OLD, NEW)
    node.while_asking(told, lambda: node.backend.jobs.__setitem__(slice(None), later))
    served = node.account()
    assert (served.verdict, served.decision.situation) == (Verdict.DENY, Situation.NO_JOBS)
    assert node.moved_to is None
    assert set(node.backend.tried) <= {"17", "18"}
    found = [(stage.name, stage.found) for stage in served.decision.stages]
    assert found[0] == ("jobs_here", "18, 17")
    assert found[-2:] == [("jobs_here", "none"), ("decide", "no_jobs: deny")]
    assert served.decision.story.choices == ()
    assert node.account(Options(action_no_jobs=IGNORE)).verdict is (Verdict.IGNORE if not later else Verdict.SUCCESS)


@pytest.mark.parametrize("told", [UNKNOWN, Told(Outcome.JOB, "owner", "18", Witness.BPF)])
def test_the_one_that_is_left_is_taken(told: Told) -> None:
    """As the user's only job, which it is now; and the trail says so."""
    node = Node(OLD, NEW)
    served = node.while_asking(told, lambda: node.backend.jobs.remove(NEW)).account(Options(action_unknown=NEWEST))
    assert (served.verdict, node.moved_to, served.summary) == (Verdict.SUCCESS, "17", "reason=only_job witness=none")
    assert node.backend.tried == ["18", "17"]
    assert served.decision.story.choices == ("17",)
    assert [stage.name for stage in served.decision.stages].count("jobs_here") == 2


def test_of_several_that_are_left_the_named_one_is_taken() -> None:
    """What the source said is still so; it is not asked a second time, which would be the user's way to use up time."""
    other = job("16", created=0, identity=(3,))
    node = Node(OLD, NEW, other)
    node.backend.cannot_adopt["17"] = "broken"
    node.while_asking(NAMES_OLD, lambda: node.backend.jobs.remove(NEW))
    served = node.account(Options(action_adopt_failure=DENY))
    assert served.verdict is Verdict.DENY
    # Named, newest, and after the end of that one the same rules again: named, newest.
    assert node.backend.tried == ["17", "18", "17", "17"]
    assert node.asker is not None
    assert len(node.asker.asked) == 1


def test_jobs_that_end_one_by_one_come_to_an_end() -> None:
    """Each of twenty is gone when it is tried, and another has begun: tried once each, asked about once, not let in."""
    jobs = [job(str(n), created=n, identity=(n,)) for n in range(1, 21)]
    node = Node(*jobs)

    def ending(process: ProcessHandle, wanted: Job, deadline: Deadline) -> None:
        node.backend.tried.append(wanted.id)
        node.backend.jobs.remove(wanted)
        new = 100 + len(node.backend.tried)
        node.backend.jobs.insert(0, job(str(new), created=new, identity=(new,)))
        raise AdoptionFailed("no cgroup")

    node.backend.adopt = ending  # type: ignore[method-assign]
    served = node.account()
    assert (served.verdict, served.decision.situation) == (Verdict.DENY, Situation.NO_JOBS)
    assert node.backend.tried == [str(n) for n in range(20, 0, -1)]
    assert node.asker is not None
    assert len(node.asker.asked) == 1


def test_the_only_job_ends_as_it_is_tried() -> None:
    """Listed and tried in one trip to a thread, in which it can end too."""
    node = Node(OLD)

    def ending(process: ProcessHandle, wanted: Job, deadline: Deadline) -> None:
        node.backend.jobs.clear()
        raise AdoptionFailed("no cgroup")

    node.backend.adopt = ending  # type: ignore[method-assign]
    assert node.account().decision.situation is Situation.NO_JOBS


@pytest.mark.parametrize(
    ("fault", "situation"), [(JobFault.OTHER, Situation.ADOPT_FAILURE), (JobFault.JOB_ENDED, Situation.NO_JOBS)]
)
def test_the_jobs_cannot_be_asked_for_again(fault: JobFault, situation: Situation) -> None:
    """Then the failure stands; but not where the backend itself has said of the job that it ended."""
    node = Node(OLD)

    def failing(process: ProcessHandle, wanted: Job, deadline: Deadline) -> None:
        node.backend.down = "no mount"
        raise AdoptionFailed("broken", fault)

    node.backend.adopt = failing  # type: ignore[method-assign]
    served = node.account(Options(action_adopt_failure=DENY))
    assert (served.verdict, served.decision.situation) == (Verdict.DENY, situation)


def test_a_manager_that_hangs_when_it_is_asked_again_leaves_time_to_say_so(gate: threading.Event) -> None:
    """Else pam_adopt.so would hear nothing in its time, and go by the rule for an agent that does not answer."""
    node = Node(OLD)
    here = node.backend.here
    given: List[float] = []

    def noting(uid: int, deadline: Deadline) -> ContextManager[JobsHere]:
        given.append(deadline.at_s)
        return here(uid, deadline)

    def failing(process: ProcessHandle, wanted: Job, deadline: Deadline) -> None:
        node.backend.hang = gate
        raise AdoptionFailed("broken")

    node.backend.here = noting  # type: ignore[method-assign]
    node.backend.adopt = failing  # type: ignore[method-assign]
    served = node.account(Options(action_adopt_failure=DENY, action_generic_failure=ALLOW), ms=1000.0)
    assert (served.verdict, served.decision.situation) == (Verdict.DENY, Situation.ADOPT_FAILURE)
    first, again = given
    assert again < first


def test_a_session_decided_anew_whose_jobs_end_meanwhile_is_none() -> None:
    """The account phase's job has ended, and the others end while the session phase asks: no session in no job."""
    node = Node(OLD, told=NAMES_OLD)
    assert node.account().reply.adopted
    node.backend.jobs[:] = [NEW, job("19", created=3, identity=(3,))]
    node.while_asking(UNKNOWN, node.backend.jobs.clear)
    served = node.session()
    assert (served.verdict, served.decision.reason) == (Verdict.DENY, "no_jobs")


# ---- jobs that stand still


SUSPENDED = (
    "Access to n1 refused: your job 17 on n1 is suspended, and a session in it would stand still. Log in when it runs "
    "again. [request "
)


def test_a_suspended_job_is_no_job_to_log_in_to() -> None:
    """sshd would stand still in it; the user hears why, the trail too."""
    node = Node(OLD)
    node.backend.suspended.add("17")
    served = node.account()
    assert (served.verdict, served.decision.situation) == (Verdict.DENY, Situation.NO_JOBS)
    assert served.reply.message.startswith(SUSPENDED)
    assert served.decision.stages[0].found == "none; suspended: 17"
    assert node.backend.tried == []
    assert node.account(Options(action_no_jobs=IGNORE)).verdict is Verdict.IGNORE
    node.backend.suspended.clear()
    assert node.account().job == "17"


def test_explaining_says_that_a_job_is_suspended() -> None:
    """The operator's view: the sentence, and the stage that names the job."""
    node = Node(OLD)
    node.backend.suspended.add("17")
    decision = asyncio.run(node.adoptions.explain(Login(ALICE, "alice", ENDS, Options()), soon()))
    assert decision.message + " [request " == SUSPENDED
    assert decision.stages[0].found == "none; suspended: 17"


@pytest.mark.parametrize("told", [UNKNOWN, Told(Outcome.JOB, "owner", "18", Witness.BPF)])
def test_the_job_that_runs_is_taken(told: Told) -> None:
    """Whichever the source names; with one that runs there is nothing to ask."""
    node = Node(OLD, NEW, told=told)
    node.backend.suspended.add("18")
    served = node.account()
    assert (served.job, served.decision.stages[0].found) == ("17", "17; suspended: 18")
    assert node.asker is not None
    assert node.asker.asked == []
    assert served.decision.story.choices == ("17",)


def test_a_job_that_is_suspended_while_the_source_is_asked() -> None:
    """As one that has ended meanwhile: not moved into, and not let in instead."""
    node = Node(OLD, NEW)
    node.while_asking(UNKNOWN, lambda: node.backend.suspended.update(("17", "18")))
    served = node.account()
    assert (served.verdict, node.moved_to) == (Verdict.DENY, None)
    assert "your jobs on n1 (18, 17) are suspended" in served.reply.message


@pytest.mark.parametrize(("jobs", "moved_to"), [((OLD, NEW), "17"), ((OLD,), None)])
def test_who_suspends_and_resumes_a_job_is_not_let_in_by_its_refusal(
    monkeypatch: pytest.MonkeyPatch, jobs: Tuple[Job, ...], moved_to: Optional[str]
) -> None:
    """By the second look it runs again, which does not make a failure of it that could let anybody in."""
    node = Node(*jobs)
    node.while_asking(UNKNOWN, lambda: node.backend.suspended.update(each.id for each in jobs))
    adopt = node.backend.adopt_for_session

    def resumed(*arguments: Any) -> JobSession:
        try:
            return adopt(*arguments)
        finally:
            node.backend.suspended.clear()

    monkeypatch.setattr(node.backend, "adopt_for_session", resumed)
    served = node.account(Options(single_job_skip_rpc=False))
    assert (served.verdict, node.moved_to) == (Verdict.SUCCESS if moved_to else Verdict.DENY, moved_to)


def test_a_job_suspended_between_the_phases() -> None:
    """The session phase does not move its own process into what stands still, nor let it be a session in no job."""
    node = Node(OLD)
    assert (node.account().reply.adopted, node.moved_to) == (True, "17")
    node.backend.suspended.add("17")
    served = node.session()
    assert (served.verdict, node.moved_to) == (Verdict.DENY, None)
    assert served.reply.message.startswith(SUSPENDED)


# ---- the account phase: who is let in


def test_the_only_job_without_asking() -> None:
    """single_job_skip_rpc: adopted, environment and job id in the reply, nobody asked."""
    node = Node(OLD, job("7", BOB), told=NAMES_OLD)
    served = node.account()
    assert (served.verdict, served.reply.adopted, served.reply.job_id) == (Verdict.SUCCESS, True, "17")
    assert served.reply.environment == {"SLURM_JOB_ID": "17"}
    assert served.summary == "reason=only_job witness=none"
    assert node.asker is not None
    assert node.asker.asked == []
    assert node.moved_to == "17"
    assert node.counted("account", "adopted", "only_job") == 1


def test_the_only_job_with_asking() -> None:
    """single_job_skip_rpc=0: the connection may come from a job elsewhere, and then it is unknown."""
    node = Node(OLD, told=Told(Outcome.JOB, "owner", "99", Witness.BPF))
    assert node.account(Options(single_job_skip_rpc=False, action_unknown=DENY)).verdict is Verdict.DENY
    node = Node(OLD, told=NAMES_OLD)
    assert node.account(Options(single_job_skip_rpc=False)).summary == "reason=callerid witness=bpf"


def test_the_job_that_the_source_names() -> None:
    """Not the newest but the one the connection came from; the source is told connection and login uid."""
    node = Node(OLD, NEW, told=NAMES_OLD)
    served = node.account()
    assert (served.verdict, node.moved_to) == (Verdict.SUCCESS, "17")
    assert served.summary == "reason=callerid witness=bpf"
    assert node.asker is not None
    assert node.asker.asked == [(ENDS, ALICE, None)]
    assert node.asker.theirs == {"17", "18"}
    assert node.counted("account", "adopted", "callerid") == 1
    assert [stage.name for stage in served.decision.stages] == ["jobs_here", "ask_source", "adopt"]


def test_the_newest_when_unknown() -> None:
    """The default: the backend's first."""
    node = Node(OLD, NEW)
    served = node.account()
    assert (node.moved_to, served.summary) == ("18", "reason=newest witness=none")


def test_unknown_allowed() -> None:
    """Let in without adoption: no job, no environment."""
    node = Node(OLD, NEW)
    served = node.account(Options(action_unknown=ALLOW))
    assert (served.verdict, served.reply.adopted, served.reply.environment) == (Verdict.SUCCESS, False, {})
    assert node.moved_to is None
    assert node.counted("account", "allowed", "unknown") == 1


# ---- the session phase


def test_the_session_follows_the_account_phase() -> None:
    """Same job, without asking again, although it is not the newest; adopted and counted."""
    node = Node(OLD, NEW, told=NAMES_OLD)
    node.account()
    assert node.moved_to == "17"
    assert node.asker is not None
    node.asker.told = UNKNOWN
    served = node.session()
    assert (served.verdict, served.reply.adopted, node.moved_to) == (Verdict.SUCCESS, True, "17")
    assert served.summary == "reason=account_phase witness=bpf"
    assert len(node.asker.asked) == 1
    assert node.counted("session", "adopted", "account_phase") == 1


def test_the_session_follows_once() -> None:
    """A later login over the same pair of ports is another login."""
    node = Node(OLD, NEW, told=NAMES_OLD)
    node.account()
    node.session()
    assert node.asker is not None
    node.asker.told = UNKNOWN
    assert node.session().job == "18"


@pytest.mark.parametrize("other", [{"uid": BOB}, {"over": connection(40001)}, {"over": None}])
def test_another_login_s_account_phase_is_not_followed(other: Dict[str, object]) -> None:
    """Neither another user's nor another connection's."""
    node = Node(OLD, NEW, job("7", BOB), told=NAMES_OLD)
    node.account()
    assert node.asker is not None
    node.asker.told = UNKNOWN
    assert node.session(**other).job != "17"


def test_an_account_phase_too_long_ago_is_not_followed() -> None:
    """After ten minutes everything is open again."""
    node = Node(OLD, NEW, told=NAMES_OLD)
    node.account()
    node.now += 600.0
    assert node.asker is not None
    node.asker.told = UNKNOWN
    assert node.session().job == "18"


def test_the_job_ended_between_the_phases() -> None:
    """Decided anew: into another job, or out if there is none left, as the options say."""
    node = Node(OLD, NEW, told=NAMES_OLD)
    node.account()
    node.backend.jobs.remove(OLD)
    served = node.session()
    assert (served.verdict, served.job) == (Verdict.SUCCESS, "18")
    assert "failed: job 17 is gone" in served.decision.stages[1].found


def test_the_last_job_ended_between_the_phases() -> None:
    """The account phase let the user in for a job that is no more: without one there is no session either."""
    node = Node(OLD)
    node.account()
    assert node.moved_to == "17"
    node.backend.jobs.clear()
    served = node.session()
    assert (served.verdict, served.decision.reason, node.moved_to) == (Verdict.DENY, "no_jobs", None)
    assert "you have no job running on n1" in served.reply.message


def test_a_job_made_again_under_the_same_id_is_another_job() -> None:
    """The same id with another identity is not what the account phase adopted into."""
    again = job("17", created=3, identity=(9,))
    node = Node(OLD, NEW, told=NAMES_OLD)
    node.account()
    node.backend.jobs[:] = [NEW, again]
    served = node.session()
    assert served.decision.stages[1].found == "failed: job 17 is gone"
    assert served.decision.job == again, "named anew by the source, and adopted as the job it is now"


def test_the_job_manager_goes_down_between_the_phases() -> None:
    """The session phase then has its own generic failure."""
    node = Node(OLD)
    node.account()
    node.backend.cannot_adopt["17"] = "no mount"
    node.backend.down = "no mount"
    assert node.session(Options(action_generic_failure=DENY)).verdict is Verdict.DENY


@pytest.mark.parametrize("known", [True, False])
def test_denied_here_but_let_in_by_another_module(known: bool) -> None:
    """pam_access below us let the user in: the session phase ignores, it does not deny a second time."""
    node = Node()
    if known:
        assert node.account().verdict is Verdict.DENY
    served = node.session()
    assert (served.verdict, served.reply.message, served.reply.adopted) == (Verdict.IGNORE, "", False)
    assert node.counted("session", "ignored", "no_jobs") == 1
    assert node.counted("session", "denied", "no_jobs") == 0


def test_allowed_unadopted_stays_unadopted() -> None:
    """action_unknown=allow in the account phase: the session phase does not adopt into a guess."""
    node = Node(OLD, NEW)
    options = Options(action_unknown=ALLOW)
    node.account(options)
    served = node.session(options)
    assert (served.verdict, served.reply.adopted, node.moved_to) == (Verdict.SUCCESS, False, None)


def test_denied_as_unknown_but_let_in_by_another_module() -> None:
    """Ignored as well, and not put into the newest by the session phase."""
    node = Node(OLD, NEW)
    options = Options(action_unknown=DENY)
    assert node.account(options).verdict is Verdict.DENY
    assert (node.session(options).verdict, node.moved_to) == (Verdict.IGNORE, None)


def test_a_session_without_an_account_phase_is_decided_here() -> None:
    """The module is only in the session stack, or the agent was restarted between."""
    node = Node(OLD, NEW, told=NAMES_OLD)
    served = node.session()
    assert (served.verdict, node.moved_to) == (Verdict.SUCCESS, "17")


def test_a_failed_account_adoption_is_tried_again() -> None:
    """Let in by action_adopt_failure=allow: by the session phase the job may be able to take it."""
    node = Node(OLD)
    node.backend.cannot_adopt["17"] = "frozen"
    assert node.account().reply.adopted is False
    node.backend.cannot_adopt.clear()
    assert (node.session().reply.adopted, node.moved_to) == (True, "17")


def test_an_adoption_that_is_given_up_is_no_generic_failure(gate: threading.Event) -> None:
    """Jobs and adoption are one trip to a thread: what is known of it at the deadline says which of the two hangs."""
    node = Node(OLD)
    adopt = node.backend.adopt

    def hanging(process: ProcessHandle, job: Job, deadline: Deadline) -> None:
        begun.set()
        gate.wait(60.0)
        adopt(process, job, deadline)

    begun = threading.Event()
    node.backend.adopt = hanging  # type: ignore[method-assign]
    # On a busy machine the thread may not have come to it by then: nothing hangs yet.
    for ms in longer(100):
        served = node.account(Options(action_adopt_failure=DENY, action_generic_failure=ALLOW), ms=ms)
        if begun.is_set():
            break
    assert (served.verdict, served.decision.situation) == (Verdict.DENY, Situation.ADOPT_FAILURE)
    assert [stage.name for stage in served.decision.stages] == ["jobs_here", "adopt", "decide"]
    assert served.decision.stages[0].found == "17"
    assert served.decision.faults == (JobFault.OUT_OF_TIME,)


def test_what_is_explained_or_observed_moves_nothing_on_the_way() -> None:
    """The thread that finds the only job adopts into it where it is to, and only there."""
    node = Node(OLD)
    assert node.account(mode=Mode.OBSERVE).decision.outcome == "adopted"
    assert asyncio.run(node.adoptions.explain(Login(ALICE, "alice", ENDS, Options()), soon())).job == OLD
    assert node.backend.tried == []
    assert node.account().job == "17"
    assert node.backend.tried == ["17"]


# ---- observing and explaining change nothing


@pytest.mark.parametrize("jobs", [(), (OLD,), (OLD, NEW)])
def test_observing_moves_nothing(jobs: Tuple[Job, ...]) -> None:
    """In both phases: decided and counted, never adopted, and no message for the user."""
    node = Node(*jobs, told=NAMES_OLD)
    for phase, word in ((Phase.ACCOUNT, "account"), (Phase.SESSION, "session")):
        served = node.serve(phase, mode=Mode.OBSERVE)
        assert served.reply.adopted is False
        assert (served.reply.environment, served.reply.message) == ({}, "")
        counted = node.counted(word, served.decision.outcome, served.decision.reason, mode="observe")
        assert counted == 1
    assert (node.backend.tried, node.moved_to) == ([], None)


def test_observing_says_what_it_would_have_done() -> None:
    """The job, the reason and the witness, as in earnest."""
    served = Node(OLD, NEW, told=NAMES_OLD).account(mode=Mode.OBSERVE)
    assert (served.decision.outcome, served.reply.job_id) == ("adopted", "17")
    assert served.summary == "reason=callerid witness=bpf"
    assert served.decision.stages[-1].found == "would be job 17"


def test_explaining_remembers_and_counts_nothing() -> None:
    """The next login is decided as if nobody had asked."""
    node = Node(OLD, NEW, told=NAMES_OLD)
    decision = asyncio.run(node.adoptions.explain(Login(ALICE, "alice", ENDS, Options()), soon()))
    assert (decision.step, decision.job, decision.adopted) == (Step.SUCCEED, OLD, False)
    assert (node.backend.tried, len(node.pending)) == ([], 0)
    assert node.counted("account", "adopted", "callerid") == 0


# ---- what fits and what is counted


def test_every_message_fits_the_record() -> None:
    """With the longest node name and job ids there can be, and more jobs than are named."""
    jobs = [job(str(n) * 63, created=n, identity=(n,)) for n in range(1, 9)]
    for count, name in itertools.product((0, 1, 2, 8), ("n", "N" * 63)):
        node = Node(*jobs[:count], name=name)
        for broken in ("", "down", "adopt"):
            node.backend.down = "down" if broken == "down" else None
            node.backend.cannot_adopt = {j.id: "frozen" for j in jobs} if broken == "adopt" else {}
            denials = Options(action_unknown=DENY, action_adopt_failure=DENY, action_generic_failure=DENY)
            served = node.account(denials)
            message = served.reply.message
            assert (message != "") == (served.verdict is Verdict.DENY)
            assert len(message.encode()) < MESSAGE_BYTES
            assert message.isprintable()


def test_five_of_many_jobs_are_named() -> None:
    """A user with a thousand jobs gets a sentence, not a list."""
    node = Node(*(job(str(n), created=n, identity=(n,)) for n in range(100, 1100)))
    message = node.account(Options(action_unknown=DENY)).reply.message
    assert "(1099, 1098, 1097, 1096, 1095 and 995 more)" in message
    assert "Connect from inside the job." in message


def test_every_label_is_of_a_closed_set() -> None:
    """All options, all starts, both phases: no label value that is not a word of this project's enums."""
    reasons = {situation.value for situation in Situation} | {step.value for step in Step} | {"account_phase"}
    outcomes = {"adopted", "allowed", "denied", "ignored"}
    node = Node()
    served = 0
    for jobs, told, broken in itertools.product(((), (OLD,), (OLD, NEW)), (UNKNOWN, NAMES_OLD), (False, True)):
        node.backend.jobs[:] = jobs
        node.backend.cannot_adopt = {"17": "x", "18": "x"} if broken else {}
        assert node.asker is not None
        node.asker.told = told
        for unknown, failure in itertools.product((NEWEST, ALLOW, DENY), (ALLOW, DENY)):
            options = Options(action_unknown=unknown, action_adopt_failure=failure)
            node.account(options)
            node.session(options)
            served += 2
    total = 0.0
    for metric in node.metrics.registry.collect():
        for found in metric.samples:
            if found.name == "adoptd_adoptions_total":
                total += found.value
                assert found.labels["reason"] in reasons
                assert found.labels["outcome"] in outcomes
                assert found.labels["phase"] in {"account", "session"}
    assert total == served == 144


def test_a_session_that_cannot_enter_its_jobs_namespaces_is_not_adopted() -> None:
    """Outside the job's namespaces a session is not in its job; the account phase enters none and does not ask."""
    node = Node(OLD)
    node.backend.namespaces = None
    assert node.account().reply.adopted
    served = node.session()
    assert (served.reply.adopted, served.decision.situation) == (False, Situation.ADOPT_FAILURE)


def test_what_a_session_is_given() -> None:
    """The job's display in both phases; its namespaces in the session phase, closed with the decision."""
    node = Node(OLD)
    node.backend.display, node.backend.namespaces = "localhost:11.0", ["/proc/self/ns/net"]
    account, session = node.account(), node.session()
    assert account.reply.environment["DISPLAY"] == session.reply.environment["DISPLAY"] == "localhost:11.0"
    assert account.decision.session is not None
    assert session.decision.session is not None
    assert account.decision.session.descriptors == ()
    (descriptor,) = session.decision.session.descriptors
    session.decision.session.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_an_account_line_alone_gives_the_namespaces() -> None:
    """Where the service has no session line of ours, the account phase has to; never where the PAM line says no."""
    node = Node(OLD)
    node.backend.namespaces = ["/proc/self/ns/net"]
    asker: Optional[Asker] = node.asker  # type: ignore[assignment]
    services: List[str] = []
    node.adoptions = Adoptions(
        "n1",
        node.backend,
        asker,
        node.pending,
        node.workers,
        node.metrics,
        account_alone=lambda service: bool(services.append(service)) or service == "sshd",
    )
    session = node.account().decision.session
    assert session is not None
    assert len(session.descriptors) == 1
    session.close()
    assert services == ["sshd"]
    # Without them such a session is not in its job.
    node.backend.namespaces = None
    assert not node.account().reply.adopted


def test_nodename_chooses_the_node() -> None:
    """PAM's nodename= asks the jobs of that node, and of no other."""
    node = Node(OLD)
    node.backend.nodes["other"] = FakeBackend()
    node.adoptions = node.adoptions.at("other")
    assert node.account().verdict is Verdict.DENY


def test_the_handle_names_the_caller() -> None:
    """What is moved is the process the kernel named, not a pid out of the message."""
    moved: List[ProcessHandle] = []

    class Noting(FakeBackend):
        def adopt(self, process: ProcessHandle, job: Job, deadline: Deadline) -> None:
            moved.append(process)

    node = Node(OLD)
    node.adoptions = Adoptions("n1", Noting(OLD), None, node.pending, node.workers, node.metrics)
    node.account()
    assert [process.pid for process in moved] == [os.getpid()]


# ---- what the user is told, and what is remembered of the way


NAMES_JOB = "This session is in job 17 on n1: your connection came from it. Also yours here: 18"


def test_the_session_phase_tells_once_which_job_and_why() -> None:
    """Not the account phase: sshd would make a banner of it, for scp and rsync as well."""
    node = Node(OLD, NEW, told=NAMES_OLD)
    assert node.account().reply.message == ""
    told = node.session()
    assert told.reply.message.startswith(NAMES_JOB)
    assert told.verdict is Verdict.SUCCESS


def test_no_choice_no_notice() -> None:
    """One job, or none: nothing is said by default."""
    for jobs in ((OLD,), ()):
        node = Node(*jobs)
        node.account(Options(action_no_jobs=IGNORE))
        assert node.session(Options(action_no_jobs=IGNORE)).reply.message == ""


def test_a_session_let_in_without_a_job_is_told_so() -> None:
    """Where there were several to choose from."""
    node = Node(OLD, NEW)
    node.account(Options(action_unknown=ALLOW))
    message = node.session(Options(action_unknown=ALLOW)).reply.message
    assert message.startswith("This session is in no job on n1: which of yours")


def test_observing_tells_nobody_anything() -> None:
    """Neither a notice nor a denial."""
    node = Node(OLD, NEW, told=NAMES_OLD)
    node.account(mode=Mode.OBSERVE)
    assert node.session(mode=Mode.OBSERVE).reply.message == ""
    assert Node(job("7", BOB)).account(mode=Mode.OBSERVE).reply.message == ""


def test_both_phases_of_a_login_are_one_request_and_one_story() -> None:
    """The session phase goes on where the account phase ended, times included; another login is another request."""
    node = Node(OLD, NEW, told=NAMES_OLD)
    account, session = node.account().decision.story, node.session().decision.story
    assert session.request_id == account.request_id
    assert (account.because, session.because) == ("callerid", "callerid")
    assert set(session.choices) == {"17", "18"}
    names = [name for name, _, _ in session.stages]
    assert names == ["jobs_here", "ask_source", "adopt", "account_phase", "adopt"]
    times = [at_ms for _, _, at_ms in session.stages]
    assert times == sorted(times)
    assert session.stages[:3] == account.stages
    assert node.account().decision.story.request_id != account.request_id


def test_a_session_that_has_to_be_decided_anew_says_the_new_reason() -> None:
    """The job of the account phase has gone: what is told and remembered is why it is in the other."""
    node = Node(OLD, NEW, told=NAMES_OLD)
    node.account()
    node.backend.jobs.remove(OLD)
    served = node.session()
    assert (served.job, served.decision.story.because, served.decision.story.choices) == ("18", "only_job", ("18",))
    assert served.reply.message == ""


def test_an_explained_denial_is_no_request() -> None:
    """There is nothing in the log to quote it for."""
    decision = asyncio.run(Node().adoptions.explain(Login(ALICE, "alice", ENDS, Options()), soon()))
    assert decision.step is Step.DENY
    assert "[request" not in decision.message


# ---- which sessions there are, afterwards


def test_who_was_not_adopted_is_no_session() -> None:
    """Denied, let in without a job, or only observed."""
    for node, mode in (
        (Node(), Mode.ENFORCE),
        (Node(OLD, NEW), Mode.ENFORCE),
        (Node(OLD), Mode.OBSERVE),
    ):
        options = Options(action_unknown=ALLOW)
        assert not node.serve(Phase.ACCOUNT, options, mode=mode).decision.adopted
        node.serve(Phase.SESSION, options, mode=mode)
        assert node.sessions.all() == ()


def test_who_was_adopted_is_a_session() -> None:
    """With all that was known; the session phase in the same process is the same session."""
    node = Node(OLD, NEW, told=NAMES_OLD)
    node.account()
    (first,) = node.sessions.all()
    assert (first.pid, first.uid, first.user, first.job) == (os.getpid(), ALICE, "alice", OLD)
    assert (first.witness, first.reason, first.connection) == (Witness.BPF, "callerid", ENDS)
    assert (first.service, first.since_s) == ("sshd", 1000.0)
    assert "ask_source" in [name for name, _, _ in first.stages]
    node.now = 1001.0
    node.session()
    (second,) = node.sessions.all()
    assert (second.id, second.job, second.since_s) == (first.id, OLD, 1001.0)


def test_a_session_that_cannot_be_kept_is_adopted_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor is left to hold it with."""

    def none_left(fd: int) -> int:
        raise OSError(24, "Too many open files")

    node = Node(OLD)
    monkeypatch.setattr(os, "dup", none_left)
    assert node.account().decision.adopted
    monkeypatch.undo()
    assert node.sessions.all() == ()
