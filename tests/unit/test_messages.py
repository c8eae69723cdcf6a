"""What users are told: a table of sentences, what fits, and that nobody's jobs but their own are in it."""

from __future__ import annotations

import itertools
from typing import Tuple

import pytest
from fakes import job

from adoptd.messages import CONTACT_MAX, Notice, Texts, is_contact
from adoptd.model import Job
from adoptd.policy import RULES, Situation, Step
from adoptd.wire.pam import MESSAGE_BYTES

TWO: Tuple[Job, ...] = (job("18"), job("17"))

DENIALS = {
    Situation.NO_JOBS: "you have no job running on n1. Log in to a node on which one of your jobs is running.",
    Situation.GENERIC_FAILURE: "the jobs on n1 cannot be looked up at the moment. Try again in a moment.",
    Situation.ADOPT_FAILURE: "the session could not be put into your job on n1. Try again in a moment.",
    Situation.UNKNOWN: "you have several jobs on n1 (18, 17) and it could not be found out which of them this "
    "connection comes from. Connect from inside the job.",
    Situation.NAMED_FAILED: "the session could not be put into the job it comes from, and you have several on n1 "
    "(18, 17). Try again in a moment.",
}
_ADMIN = " Tell your administrator if it goes on."


def test_every_situation_that_can_deny_has_its_own_sentence() -> None:
    """The policy's table says which can."""
    can_deny = {s for s, rule in RULES.items() if not isinstance(rule, Step) and Step.DENY in rule[1].values()}
    assert can_deny == set(DENIALS)


@pytest.mark.parametrize("situation", list(DENIALS))
def test_a_denial_says_why_and_what_to_do(situation: Situation) -> None:
    """Whole, with the request to quote; without a contact the administrator is named where something is broken."""
    whom = "" if situation is Situation.NO_JOBS else _ADMIN
    expected = f"Access to n1 refused: {DENIALS[situation]}{whom} [request ab12cd34]"
    assert Texts("n1", "cgroup").denial(situation, TWO, "ab12cd34") == expected
    contact = Texts("n1", "cgroup", "Write to hpc@example.org.").denial(situation, TWO, "ab12cd34")
    assert contact == f"Access to n1 refused: {DENIALS[situation]} Write to hpc@example.org. [request ab12cd34]"


@pytest.mark.parametrize(
    ("suspended", "told"),
    [
        (TWO[:1], "your job 18 on n1 is suspended, and a session in it would stand still. Log in when it runs again."),
        (
            TWO,
            (
                "your jobs on n1 (18, 17) are suspended, and a session in one of them would stand still. Log in when "
                "one of them runs again."
            ),
        ),
    ],
)
def test_a_user_whose_jobs_are_suspended_is_told_so(suspended: Tuple[Job, ...], told: str) -> None:
    """Instead of that there are none; where there is another reason, that is said."""
    texts = Texts("n1", "slurm", "Write to hpc@example.org.")
    denial = texts.denial(Situation.NO_JOBS, (), "1", suspended)
    assert denial == f"Access to n1 refused: {told} Write to hpc@example.org. [request 1]"
    for situation in set(DENIALS) - {Situation.NO_JOBS}:
        assert texts.denial(situation, TWO, "1", suspended) == texts.denial(situation, TWO, "1")


def test_an_explained_denial_has_no_request_to_quote() -> None:
    """There is none in any log."""
    assert "request" not in Texts("n1").denial(Situation.NO_JOBS, (), "")


def test_with_slurm_the_user_is_told_where_to_look() -> None:
    """This node knows its own jobs only, and does not pretend to more."""
    told = Texts("n1", "slurm").denial(Situation.NO_JOBS, (), "1")
    assert "is running (squeue --me lists them)." in told


@pytest.mark.parametrize(
    ("because", "choices", "told"),
    [
        (
            "callerid",
            ("18", "17"),
            (
                "This session is in job 17 on n1: your connection came from it. Also yours here: 18; "
                "adoptctl join JOB moves this session."
            ),
        ),
        (
            "newest",
            ("17", "16", "15"),
            (
                "This session is in job 17 on n1: the newest of your 3 jobs here; which of them you came from could "
                "not be found out. Also yours here: 16, 15; adoptctl join JOB moves this session."
            ),
        ),
        ("only_job", ("17",), "This session is in job 17 on n1: your only job here."),
    ],
)
def test_a_notice_says_which_job_and_why(because: str, choices: Tuple[str, ...], told: str) -> None:
    """One line; the other jobs and the way to them only where there are any."""
    assert Texts("n1", notice=Notice.ALWAYS).welcome("17", because, choices) == told
    assert Texts("n1", notice=Notice.NEVER).welcome("17", because, choices) == ""
    assert Texts("n1").welcome("17", because, choices) == (told if len(choices) > 1 else "")


@pytest.mark.parametrize("situation", list(Situation))
def test_a_session_outside_any_job_is_told_so(situation: Situation) -> None:
    """Always if that is wanted; by default only where there were jobs to choose from."""
    assert Texts("n1", notice=Notice.ALWAYS).outside(situation).startswith("This session is in no job on n1: ")
    assert Texts("n1", notice=Notice.NEVER).outside(situation) == ""
    had_choice = situation in (Situation.UNKNOWN, Situation.NAMED_FAILED)
    assert bool(Texts("n1").outside(situation)) == had_choice


def test_whatever_the_names_it_fits_and_the_end_is_whole() -> None:
    """With the longest node, jobs and contact there can be, the request and the contact are not cut."""
    jobs = tuple(job(str(n) * 63) for n in range(1, 9))
    contact = "C" * CONTACT_MAX
    for node, situation in itertools.product(("n", "N" * 63), DENIALS):
        told = Texts(node, "slurm", contact).denial(situation, jobs, "ab12cd34")
        assert len(told.encode()) < MESSAGE_BYTES
        assert told.endswith(f"{contact} [request ab12cd34]")
        assert "and 3 more" in told or "..." in told or "several" not in told
        told = Texts(node, "slurm", contact).denial(situation, jobs, "ab12cd34", jobs)
        assert len(told.encode()) < MESSAGE_BYTES
        assert told.endswith(f"{contact} [request ab12cd34]")
    for node in ("n", "N" * 63):
        told = Texts(node, notice=Notice.ALWAYS).welcome("1" * 63, "newest", [each.id for each in jobs])
        assert len(told.encode()) < MESSAGE_BYTES


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("", True),
        ("Write to hpc@example.org, room 101.", True),
        ("x" * CONTACT_MAX, True),
        ("x" * (CONTACT_MAX + 1), False),
        ("two\nlines", False),
        ("\x1b[31mred", False),
        ("\u00fcber", False),
        ("\u202eright to left", False),
        (7, False),
    ],
)
def test_what_a_contact_may_be(text: object, fits: bool) -> None:
    """What pam_adopt.so shows as it is: printable ASCII, one line, so long."""
    assert is_contact(text) is fits
