"""explain says what a login would get: whatever the facts, the same as the account phase then decides."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
from typing import Dict, Iterator, List, Optional, Tuple

import pytest
from control_scene import ControlScene
from fakes import BOB, FakeAsker, FakeBackend, connection, job
from hypothesis import given
from hypothesis import strategies as st

from adoptd.callerid import AskFault, Told
from adoptd.control import Asking, CommandRefused, explaining
from adoptd.control.asking import parse_options
from adoptd.deadline import Deadline
from adoptd.decision import Decision
from adoptd.model import Job, Witness
from adoptd.pam_lines import OPTIONS
from adoptd.policy import ALLOWED_ACTIONS, Action, Options
from adoptd.process import open_process
from adoptd.wire.callerid import Outcome
from adoptd.wire.control import Command, Result
from adoptd.wire.pam import Mode, PamRequest, Phase

UID = 65534
NAME = pwd.getpwuid(UID).pw_name
ENDS = connection()
# Of this node by its own name and by another, newest first; and one of somebody else's.
HERE = [Job("18", UID, 3, (3,), "c1"), Job("17", UID, 2, (2,), "c1"), Job("16", UID, 1, (1,), "")]
THERE = [Job("9", UID, 1, (9,)), Job("8", UID, 0, (8,))]
BOBS = job("7", BOB, identity=(7,))

ANSWERS = st.one_of(
    st.builds(Told, st.just(Outcome.UNKNOWN), st.sampled_from([each.value for each in AskFault])),
    st.builds(
        lambda job_id, witness, cluster: Told(Outcome.JOB, "owner", job_id, witness, cluster=cluster),
        st.sampled_from(["16", "17", "18", "9", "7", "99"]),
        st.sampled_from([Witness.BPF, Witness.PROC, Witness.SLURMD]),
        st.sampled_from([None, "c1", "c2"]),
    ),
    st.builds(
        lambda hint: Told(Outcome.NO_JOB, "owner", witness=None if hint is None else Witness.HINT, hint=hint),
        st.sampled_from([None, "17", "9", "99"]),
    ),
)
CHOSEN = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.sampled_from(sorted(each.value for each in allowed)) for name, allowed in ALLOWED_ACTIONS.items()},
        "single_job_skip_rpc": st.sampled_from("01"),
        "nodename": st.just("other"),
    },
)


class Node(ControlScene):
    def __init__(self) -> None:
        self.backend = FakeBackend()
        self.backend.nodes["other"] = FakeBackend(*THERE)
        self.asker = FakeAsker(Told(Outcome.UNKNOWN, "timeout"))
        super().__init__(self.backend, asker=self.asker)

    def explained(self, words: Dict[str, str], known: bool, uid: int = 0) -> Result:
        arguments = {"user": NAME, "options": " ".join(f"{name}={value}" for name, value in words.items())}
        if known:
            arguments.update({"from": str(ENDS.source), "to": str(ENDS.destination)})
        return asyncio.run(self.control.execute(Command("explain", arguments), Asking(uid)))

    def logged_in(self, options: Options, nodename: str, known: bool) -> Decision:
        over = ENDS if known else None
        request = PamRequest(
            Phase.ACCOUNT, Mode.ENFORCE, options, UID, 1000, over, "sshd", NAME, nodename, False, False
        )

        async def story() -> Decision:
            with open_process(os.getpid()) as process:
                _, decision = await self.adoptions.at(nodename).serve(request, process, Deadline.after_ms(2000.0))
            return decision

        return asyncio.run(story())


@pytest.fixture
def node() -> Iterator[Node]:
    with contextlib.closing(Node()) as made:
        yield made


def test_what_is_explained_is_what_a_login_then_gets(node: Node) -> None:
    """Verdict, job, witness, reason and message, for all that can be found out and every option."""

    @given(st.integers(0, 3), st.booleans(), st.booleans(), ANSWERS, CHOSEN)
    def agrees(jobs: int, down: bool, known: bool, told: Told, words: Dict[str, str]) -> None:
        node.backend.jobs = [*HERE[:jobs], BOBS]
        node.backend.down = "no mount" if down else None
        node.asker.told = told
        said = node.explained(words, known)
        actions = {name: Action(value) for name, value in words.items() if name in ALLOWED_ACTIONS}
        options = Options(single_job_skip_rpc=words.get("single_job_skip_rpc") != "0", **actions)
        decision = node.logged_in(options, words.get("nodename", ""), known)
        found = {
            "verdict": decision.step.value,
            "outcome": decision.outcome,
            "reason": decision.reason,
            "job": None if decision.job is None else decision.job.id,
            "witness": None if decision.witness is None else decision.witness.value,
            "message": decision.message.replace(f" [request {decision.story.request_id}]", ""),
        }
        assert {name: said[name] for name in found} == found
        stages = said["stages"]
        assert isinstance(stages, list)
        before: List[Tuple[object, object]] = [(stage["stage"], stage["found"]) for stage in stages]
        after = [(stage.name, stage.found.replace("in job", "would be job")) for stage in decision.stages]
        assert before == after

    agrees()


def test_the_jobs_of_nodename_are_those_that_are_explained(node: Node) -> None:
    """An ordinary user's too, where a PAM line of sshd's says so: adoptctl sends what it reads there."""
    node.backend.jobs = [HERE[0]]
    assert node.explained({"nodename": "other", "action_unknown": "deny"}, False)["reason"] == "unknown"
    assert node.explained({}, False)["job"] == "18"


@pytest.mark.parametrize("said", [None, "another"])
def test_a_nodename_that_no_pam_line_says_is_root_s(
    node: Node, monkeypatch: pytest.MonkeyPatch, said: Optional[str]
) -> None:
    """Each takes one of a few places, which must not be used up by whoever invents names."""
    monkeypatch.setattr(explaining, "_nodenames", lambda: set() if said is None else {said})
    with pytest.raises(CommandRefused, match="nodename=other; only root may ask"):
        node.explained({"nodename": "other"}, False, UID)
    monkeypatch.setattr(explaining, "_nodenames", lambda: {"other"})
    assert node.explained({"nodename": "other", "action_unknown": "deny"}, False, UID)["reason"] == "unknown"


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("action_unkown=deny", "action_unkown is no option of pam_adopt.so, expected one of action_no_jobs"),
        ("mode=obey", "mode is 'obey', expected enforce or observe"),
        ("nodename=a/b", "nodename is 'a/b', expected a node name"),
        ("ignore_root", "ignore_root is '', expected 0 or 1"),
    ],
)
def test_words_that_the_module_refuses_are_refused(node: Node, words: str, refused: str) -> None:
    """It would let nobody in then: no decision that is explained would be the login's."""
    with pytest.raises(CommandRefused, match=refused):
        parse_options(words)
    every = "Action_Unknown=DENY mode=observe service=* socket=/x timeout_ms=50 log_level=debug disable_x11=1"
    parsed = parse_options(f"{every} join_container=false nodename=n9 ignore_root=0")
    assert (parsed.options.action_unknown.value, parsed.root_passes, parsed.nodename) == ("deny", False, "n9")
    assert set(ALLOWED_ACTIONS) <= set(OPTIONS)
