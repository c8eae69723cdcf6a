"""The path template: what is no job's path is refused before what is one is accepted."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adoptd.jobs.template import JobLocation, JobPath, parse_leaf
from adoptd.model import UID_MAX

USUAL = JobPath.parse_template("/jobs/uid_{uid}/job_{job}")
TEMPLATES = [
    USUAL,
    JobPath.parse_template("/{uid}/{job}"),
    JobPath.parse_template("/job_{job}"),
    JobPath.parse_template("/batch.slice/user-{uid}.slice/jobs/j{job}.scope"),
]
ID_CHARACTERS = string.ascii_letters + string.digits
job_ids = st.builds(str.__add__, st.sampled_from(ID_CHARACTERS), st.text(ID_CHARACTERS + "_.-", max_size=62))
uids = st.integers(0, UID_MAX)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "jobs/job_{job}",
        "/jobs/",
        "/jobs/job_{job}/",
        "/jobs//job_{job}",
        "/jobs/../job_{job}",
        "/jobs/./job_{job}",
        "/jobs/uid_{uid}",
        "/jobs/job_{job}/tasks",
        "/jobs/job_{job}/uid_{uid}",
        "/jobs/{job}/{job}",
        "/jobs/{uid}/{uid}/{job}",
        "/jobs/{uid}{job}",
        "/jobs/{uid}_{job}",
        "/jobs/{user}/job_{job}",
        "/jobs/{}/job_{job}",
        "/jobs/{uid/job_{job}",
        "/jobs/job_{job}}",
        "/jobs/job _{job}",
        "/jöbs/job_{job}",
        "/jobs\n/job_{job}",
        "/jobs\0/job_{job}",
        "/" + "a" * 256 + "/job_{job}",
        "/jobs/" + "a" * 193 + "{job}",
        "/a" * 2040 + "/{job}",
    ],
)
def test_a_bad_template_is_refused_with_the_template_in_the_message(text: str) -> None:
    """Every way to write it wrong is a ValueError that quotes what was written."""
    with pytest.raises(ValueError, match="job path") as caught:
        JobPath.parse_template(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "",
        "jobs/uid_1001/job_5",
        "/jobs",
        "/jobs/uid_1001",
        "/jobs/uid_1001/job_",
        "/jobs/uid_/job_5",
        "/jobs/uid_1001/xjob_5",
        "/jobs/uid_1001/job_5 ",
        "/jobs/uid_1001/job_5\n",
        "/jobs/uid_1001/job_5 (deleted)",
        "/jobs/uid_1001/job_-5",
        "/jobs/uid_1001/job_.5",
        "/jobs/uid_1001/job_é",
        "/jobs/uid_1001/job_\udcff",
        "/jobs/uid_1001/job_\u0665",
        "/jobs/uid_\u0661\u0660\u0660\u0661/job_5",
        "/jobs/uid_01001/job_5",
        "/jobs/uid_00/job_5",
        "/jobs/uid_+1/job_5",
        "/jobs/uid_-1/job_5",
        "/jobs/uid_1_0/job_5",
        "/jobs/uid_ 1/job_5",
        "/jobs/uid_4294967295/job_5",
        "/jobs/uid_99999999999999999999/job_5",
        "/jobs/uid_alice/job_5",
        "/jobs2/uid_1001/job_5",
        "/x/jobs/uid_1001/job_5",
        "/jobs/x/uid_1001/job_5",
        "/jobs/uid_1001/x/job_5",
        "/Jobs/uid_1001/job_5",
        "//jobs/uid_1001/job_5",
        "/jobs//uid_1001/job_5",
        "/jobs/uid_1001/job_5/",
        "/jobs/uid_1001/job_5/../job_6",
        "/jobs/uid_1001/job_5/..",
        "/jobs/uid_1001/../uid_1001/job_5",
        "/../jobs/uid_1001/job_5",
        "/jobs/./uid_1001/job_5",
        "/jobs/uid_1001/job_" + "5" * 64,
        "/jobs/uid_{uid}/job_{job}",
        "/jobs/uid_1001\0/job_5",
    ],
)
def test_what_merely_looks_like_a_job_is_none(path: str) -> None:
    """Whole components from the root, or nothing."""
    assert USUAL.parse(path) is None


def test_before_and_after_may_not_share_characters() -> None:
    """With job.{job}.job the name "job.job" has no room for an id."""
    template = JobPath.parse_template("/job.{job}.job")
    assert template.parse("/job.job") is None
    assert template.parse("/job..job") is None
    assert template.parse("/job.1.job") == JobLocation("1", None, ())


@pytest.mark.parametrize("job_id", ["", "-1", ".", "..", "a/b", "a b", "a\n", "5" * 64, "{job}"])
def test_a_bad_job_id_is_not_rendered(job_id: str) -> None:
    """No path is ever built from an id that could lead elsewhere."""
    with pytest.raises(ValueError, match="job id"):
        USUAL.render(1001, job_id)


@pytest.mark.parametrize("uid", [None, -1, UID_MAX + 1])
def test_a_bad_uid_is_not_rendered(uid: int) -> None:
    """A template with {uid} needs one that a user can have."""
    with pytest.raises(ValueError, match="uid"):
        USUAL.render(uid, "5")


@pytest.mark.parametrize("leaf", ["/a", "a/", "a//b", "..", "a/../b", ".", "a b", "a\n", "ä", "a" * 256])
def test_a_bad_leaf_is_refused(leaf: str) -> None:
    """A leaf cannot lead out of the job."""
    with pytest.raises(ValueError, match="leaf"):
        parse_leaf(leaf)


def test_a_leaf_is_relative_components() -> None:
    """Empty is the job's cgroup itself."""
    assert parse_leaf("") == ()
    assert parse_leaf("step_extern/user") == ("step_extern", "user")


def test_a_jobs_path_is_read() -> None:
    """The job, its owner, and what is below."""
    assert USUAL.parse("/jobs/uid_0/job_5") == JobLocation("5", 0, ())
    assert USUAL.parse(f"/jobs/uid_{UID_MAX}/job_a.b-c_d") == JobLocation("a.b-c_d", UID_MAX, ())
    assert USUAL.parse("/jobs/uid_1001/job_5/job_6/x:y") == JobLocation("5", 1001, ("job_6", "x:y"))
    assert USUAL.fixed == ("jobs",)
    assert USUAL.parents(1001) == ("jobs", "uid_1001")
    assert USUAL.has_uid
    assert not TEMPLATES[2].has_uid
    assert TEMPLATES[2].fixed == ()


@given(st.sampled_from(TEMPLATES), uids, job_ids, st.lists(st.text("ab.:_ ", min_size=1, max_size=4), max_size=3))
def test_parse_undoes_render(template: JobPath, uid: int, job_id: str, below: list[str]) -> None:
    """Whatever is rendered reads back as itself, with anything below it."""
    rest = tuple(name for name in below if name not in (".", ".."))
    owner = uid if template.has_uid else None
    path = "/".join((template.render(owner, job_id), *rest))
    assert template.parse(path) == JobLocation(job_id, owner, rest)


@given(st.sampled_from(TEMPLATES), st.text(string.printable + "é\0\udcff", max_size=40))
def test_nothing_else_matches_any_text(template: JobPath, text: str) -> None:
    """A path that parses renders back to itself: there is no second spelling of a job's path."""
    location = template.parse(text)
    if location is not None:
        assert "/".join((template.render(location.uid, location.job_id), *location.rest)) == text


@given(uids, job_ids, st.integers(0, 60), st.sampled_from([*"/_.0 a\0", "", ".."]))
def test_nothing_else_matches_near_misses(uid: int, job_id: str, at: int, change: str) -> None:
    """The same for a real path with one place changed."""
    path = USUAL.render(uid, job_id)
    changed = path[:at] + change + path[at + 1 :]
    location = USUAL.parse(changed)
    if location is not None:
        assert "/".join((USUAL.render(location.uid, location.job_id), *location.rest)) == changed
