"""mode=observe beside pam_slurm_adopt, in real logins: made to agree and to disagree, in either order of the lines.

What becomes of a login is pam_slurm_adopt's alone; the agent counts where it was put beside what it would have done.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from dataclasses import dataclass
from typing import Any, Dict, Iterator, Mapping, Sequence, Tuple

import pytest

from lab.compare_scenarios import JOBS_APART_S
from lab.etc_files import ALICE, PAM_TIMEOUT_MS, ROOT, User
from lab.lab import NOBODY_IN, Lab
from lab.nodes import Cluster
from lab.scenarios_journey import ANSWERS
from lab.waiting import until

pytestmark = pytest.mark.timeout(180)

Counted = Tuple[str, str, str]
_SERIES = re.compile(r'adoptd_observed_total\{agreement="(\w+)",found="(\w+)",would="(\w+)"\} (\S+)')
HASTY_S = 10.0
AGREES: Counted = ("agree", "that_job", "adopt")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two compute nodes and a login node with a real Slurm."""
    with Cluster(slurm=True) as cluster:
        yield Lab(cluster)


def _counts(lab: Lab) -> Dict[Counted, int]:
    found = [match for line in lab.second.metrics() if (match := _SERIES.match(line))]
    return {(match[1], match[2], match[3]): int(float(match[4])) for match in found}


def _since(lab: Lab, before: Mapping[Counted, int]) -> Dict[Counted, int]:
    return {key: count - before[key] for key, count in _counts(lab).items() if count != before[key]}


def _counts_in_the_end(lab: Lab, before: Mapping[Counted, int], wanted: Dict[Counted, int], what: str) -> None:
    """A login is counted after it was answered; and with no session, when none can be expected any more."""
    with contextlib.suppress(TimeoutError):
        until(lambda: sum(_since(lab, before).values()) >= sum(wanted.values()), what)
    assert _since(lab, before) == wanted, what


@dataclass(frozen=True)
class Stack:
    """pam_slurm_adopt's account line and our two, with the options of each."""

    theirs: str = ""
    ours: str = ""
    theirs_control: str = "required"
    ours_first: bool = False
    session: bool = True

    def text(self, module: str, node_name: str) -> str:
        """The sshd service."""
        theirs = f"account {self.theirs_control} pam_slurm_adopt.so nodename={node_name} {self.theirs}"
        observing = f"{module} mode=observe timeout_ms={PAM_TIMEOUT_MS} nodename={node_name} {self.ours}"
        account = [theirs, f"-account optional {observing}"]
        lines = [
            "auth required pam_unix.so",
            "account required pam_unix.so",
            *(reversed(account) if self.ours_first else account),
            "session required pam_unix.so",
            *([f"-session optional {observing}"] if self.session else []),
            "password required pam_deny.so",
        ]
        return "\n".join(lines) + "\n"


def _set(lab: Lab, stack: Stack, module: str = "") -> None:
    slurm = lab.cluster.slurm
    assert slurm is not None
    text = stack.text(module or lab.cluster.pam_module, slurm.name_of(lab.second))
    lab.second.write("/etc/pam.d/sshd", text)


def _login(lab: Lab, *, user: User = ALICE, env: Mapping[str, str] = {}, by_password: bool = False) -> str:
    slurm = lab.cluster.slurm
    assert slurm is not None
    options = ANSWERS if by_password else ("-o", "BatchMode=yes")
    return lab.login(source=slurm.login, user=user, env=env, options=options).landed


ONE_JOB = [
    # (what is tried, the stack, whether a password is typed, where the session is, what is counted)
    ("after", Stack(), False, "job {0} on node2", AGREES),
    ("before", Stack(ours_first=True), False, "job {0} on node2", AGREES),
    ("sufficient", Stack(theirs_control="sufficient"), False, "job {0} on node2", AGREES),
    ("requisite", Stack(theirs_control="requisite"), False, "job {0} on node2", AGREES),
    # sshd asks PAM in a child for those, and that is what was adopted.
    ("password", Stack(), True, "no job on node2", ("disagree", "no_job", "adopt")),
    (
        "left out",
        Stack(theirs="nodename=elsewhere action_no_jobs=ignore"),
        False,
        "no job on node2",
        ("disagree", "no_job", "adopt"),
    ),
    (
        "both leave out",
        Stack(theirs="nodename=elsewhere action_no_jobs=ignore", ours="nodename=elsewhere action_no_jobs=ignore"),
        False,
        "no job on node2",
        ("agree", "no_job", "leave_out"),
    ),
    (
        "let in",
        Stack(theirs="nodename=elsewhere action_no_jobs=ignore", ours="nodename=elsewhere"),
        False,
        "no job on node2",
        ("disagree", "no_job", "deny"),
    ),
]


def test_with_one_job(lab: Lab) -> None:
    """Every login is counted once, by its session; the lines' order and pam_slurm_adopt's control do not matter."""
    env = {"SSH_ASKPASS": "/run/askpass", "SSH_ASKPASS_REQUIRE": "force", "ADOPTD_ANSWER": ALICE.password}
    with lab.jobs(1, on=[lab.second]) as jobs:
        for what, stack, by_password, landed, counted in ONE_JOB:
            _set(lab, stack)
            before = _counts(lab)
            assert _login(lab, env=env if by_password else {}, by_password=by_password) == landed.format(*jobs), what
            _counts_in_the_end(lab, before, {counted: 1}, what)


def test_with_two_jobs(lab: Lab) -> None:
    """pam_slurm_adopt takes the newest of two; what we would do is our own options' and our own evidence's.

    The shell of the last login names the older. What is logged of a disagreement has both jobs.
    """
    with lab.jobs(1, on=[lab.second]) as (older,):
        time.sleep(JOBS_APART_S)
        with lab.jobs(1, on=[lab.second]) as (newer,):
            for ours, env, counted in (
                ("", {}, AGREES),
                ("action_unknown=deny", {}, ("disagree", "other_job", "deny")),
                ("action_unknown=allow", {}, ("disagree", "other_job", "leave_out")),
                ("", {"SLURM_JOB_ID": older}, ("disagree", "other_job", "adopt")),
            ):
                _set(lab, Stack(ours=ours))
                before, log = _counts(lab), lab.second.agent_log()
                assert _login(lab, env=env) == f"job {newer} on node2", ours
                _counts_in_the_end(lab, before, {counted: 1}, ours)
    (line,) = [line for line in log.lines() if "observed_disagreement" in line]
    for word in ("user=alice", f"uid={ALICE.uid}", f"in_job={newer}", f"would_be_job={older}", "found=other_job"):
        assert word in line.split(), line


@pytest.fixture
def hasty_agent(lab: Lab) -> Iterator[None]:
    """An agent on the second node that expects no session after HASTY_S, instead of half a minute."""
    start = lab.second.start_daemon
    code = (
        "import sys\nfrom adoptd import cli, observed\n"
        f"observed.Observations.__init__.__defaults__ = ({HASTY_S}, observed.CAPACITY)\nsys.exit(cli.adoptd_main())"
    )

    def start_hasty(name: str, argv: Sequence[str], **how: Any) -> subprocess.Popen[bytes]:
        at = list(argv).index("-m")
        return start(name, [*argv[:at], "-c", code, *argv[at + 2 :]], **how)

    def restart() -> None:
        lab.second.stop("agent")
        lab.second.start_agent()

    lab.second.start_daemon = start_hasty  # type: ignore[method-assign]
    try:
        restart()
        yield
    finally:
        lab.second.start_daemon = start  # type: ignore[method-assign]
        restart()


@pytest.mark.usefixtures("hasty_agent")
def test_without_a_session(lab: Lab) -> None:
    """A login that is refused is counted when no session can be expected any more: with us or against us.

    So is one of a stack with our account line alone, which was seen in its job in the account phase already.
    """
    before, log = _counts(lab), lab.second.agent_log()
    _set(lab, Stack())
    assert _login(lab) == NOBODY_IN
    assert _since(lab, before) == {}
    with lab.jobs(1, on=[lab.second]) as (job,):
        _set(lab, Stack(theirs="nodename=elsewhere"))
        assert _login(lab) == NOBODY_IN
        _set(lab, Stack(session=False))
        assert _login(lab) == f"job {job} on node2"
        expected = {("agree", "no_session", "deny"): 1, ("disagree", "no_session", "adopt"): 1, AGREES: 1}
        _counts_in_the_end(lab, before, expected, "none is left out")
    (line,) = [line for line in log.lines() if "observed_disagreement" in line]
    assert f"would_be_job={job}" in line.split()


def test_root_is_not_observed(lab: Lab) -> None:
    """root passes before anything is asked, so there is nothing to compare."""
    _set(lab, Stack())
    before = _counts(lab)
    assert _login(lab, user=ROOT) == "no job on node2"
    assert _since(lab, before) == {}


def test_without_agent_or_module(lab: Lab) -> None:
    """Observing never changes a login: not where the agent is down, nor where the module is not installed yet."""
    with lab.jobs(1, on=[lab.second]) as (job,):
        for module in ("", "/usr/lib/security/pam_adopt_that_is_not_there.so"):
            _set(lab, Stack(ours="action_generic_failure=deny"), module)
            with lab.agent_down(lab.second):
                assert _login(lab) == f"job {job} on node2"
