"""What the tests of doctor's judgements share: the grades, a scene, and the worst of what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence, Tuple

from adoptd.config import Config
from adoptd.doctor.findings import Finding, Grade, Scene

OK, WARNING, FAILURE = Grade.OK, Grade.WARNING, Grade.FAILURE
SCENE = Scene(Path("/etc/adoptd/adoptd.toml"), Config(), Path("/etc/pam.d"), "sshd")


def judged(found: Sequence[Finding]) -> Tuple[Grade, str]:
    """The worst of them; all that is not right must have a remedy."""
    assert all(bool(each.remedy) == (each.grade is not OK) for each in found), found
    bad = max(found, key=lambda each: each.grade.value, default=None)
    return (OK, "") if bad is None else (bad.grade, bad.seen)
