"""A login node is none to any check of doctor's, and a compute node that is broken is no login node."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Dict, List

import pytest

from adoptd.config import Config, JobsConfig
from adoptd.doctor import jobs, pam, role, slurm
from adoptd.doctor.findings import Finding, Grade, Scene
from adoptd.doctor.role import RoleFacts, is_login_node, judge_login_node
from adoptd.jobs.slurm_hosts import RunningSlurmd

LOGIN = RoleFacts(configured=True, named=False, slurmd=False, spool=False, guarded=False)
CONF = "ClusterName=c\nSlurmctldHost=ctl\nSlurmUser=root\nSlurmdSpoolDir={spool}\nNodeName=cn[01-02]\n"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"configured": False}, False),
        ({"named": True}, False),
        ({"slurmd": True}, False),
        ({"spool": True}, False),
        ({"guarded": True}, False),
    ],
)
def test_one_sign_of_a_compute_node_is_enough(change: Dict[str, bool], expected: bool) -> None:
    """Whatever the rest says: what is broken there is to be said."""
    assert judge_login_node(dataclasses.replace(LOGIN, **change)) is expected


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A host of a cluster, not one of its nodes; without slurmd, whatever runs here."""
    (tmp_path / "slurm.conf").write_text(CONF.format(spool=tmp_path / "spool"), encoding="utf-8")
    (tmp_path / "sshd").write_text("account required pam_unix.so\nsession required pam_unix.so\n", encoding="utf-8")
    monkeypatch.setattr(role, "find_slurmd", lambda: RunningSlurmd())
    section = JobsConfig(backend="slurm", slurm_conf=str(tmp_path / "slurm.conf"))
    return Scene(tmp_path / "adoptd.toml", Config(jobs=section), tmp_path, "sshd")


def _found(scene: Scene) -> List[Finding]:
    return [*slurm.look_at_slurm(scene), *jobs.look_at_jobs(scene), *pam.look_at_stack(scene)]


def test_nothing_is_wrong_with_one(scene: Scene) -> None:
    """No jobs, no slurmd, no line of ours: each of the three checks says so, and none as a fault."""
    assert is_login_node(scene)
    found = [each for each in _found(scene) if "login node" in each.seen]
    assert [each.check for each in found] == ["slurm", "jobs", "pam"]
    assert {each.grade for each in found} == {Grade.OK}
    assert not [each for each in _found(scene) if each.grade is not Grade.OK and each.check != "pam"]


def test_with_a_line_of_ours_it_is_to_be_a_compute_node(scene: Scene) -> None:
    """And then it lacks what one needs."""
    (scene.pam_directory / "sshd").write_text("account required pam_adopt.so\n", encoding="utf-8")
    assert not is_login_node(scene)
    assert {each.check for each in _found(scene) if each.grade is Grade.FAILURE} >= {"slurm"}


def test_who_is_not_root_cannot_tell(scene: Scene) -> None:
    """slurmd may run unseen."""
    assert not is_login_node(dataclasses.replace(scene, root=False))
