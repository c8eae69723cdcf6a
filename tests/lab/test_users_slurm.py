"""A session that its user moves between two jobs of a real Slurm: which job's end is its own, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.etc_files import ALICE
from lab.lab import Lab
from lab.test_users import ADOPTCTL, document, field, held, install_adoptctl, job_of
from lab.waiting import has_ended


@pytest.fixture(scope="module")
def slurm_lab(slurm_lab: Lab) -> Lab:
    """With adoptctl on its nodes."""
    install_adoptctl(slurm_lab)
    return slurm_lab


@pytest.mark.timeout(150)
def test_the_session_ends_with_the_job_it_has_joined_and_not_with_the_one_it_left(slurm_lab: Lab) -> None:
    """Its processes are in the extern step of the one, and the end of the other's step leaves them alone."""
    lab = slurm_lab
    lab.pam("action_unknown=newest join_container=false")
    nodes = (lab.first, lab.second)
    with lab.jobs(2) as (older, newest), held(lab) as session:
        leader = field(field(session.pid, 4), 4)
        everybody = (leader, field(session.pid, 4), session.pid)
        told = document(session.run(f"{ADOPTCTL} whereami --json")[1])
        assert (told["job"], told["other_jobs"]) == (newest, [older])
        assert told["limits"]["memory_max"] is not None
        assert told["limits"]["memory_used"] > 0
        status, out = session.run(f"{ADOPTCTL} join {older} --json")
        assert (status, document(out)["left"]) == (0, [])
        for pid in everybody:
            assert job_of(lab, pid) == older
            assert f"job_{newest}/" not in Path(f"/proc/{pid}/cgroup").read_text("ascii")
        lab.kind.end([newest], ALICE, nodes)
        assert session.run("echo still here") == (0, "still here\n")
        assert job_of(lab, session.pid) == older
        lab.kind.end([older], ALICE, nodes)
        for pid in everybody:
            assert has_ended(pid, 20.0)


@pytest.mark.timeout(150)
def test_a_job_s_container_is_neither_entered_nor_left(slurm_lab: Lab) -> None:
    """With join_container (the default) sessions are in their job's /tmp: moved by cgroups alone they would be torn."""
    lab = slurm_lab
    lab.pam("action_unknown=newest")
    with lab.jobs(2) as (older, newest), held(lab) as session:
        status, out = session.run(f"{ADOPTCTL} join {older}")
        assert (status, "container" in out) == (1, True), out
        assert job_of(lab, session.pid) == newest


@pytest.mark.timeout(150)
def test_an_ended_job_cannot_be_joined(slurm_lab: Lab) -> None:
    """Refused as one that never was; the session stays."""
    lab = slurm_lab
    lab.pam("action_unknown=newest join_container=false")
    with lab.jobs(2) as (older, newest), held(lab) as session:
        lab.kind.end([older], ALICE, (lab.first, lab.second))
        status, out = session.run(f"{ADOPTCTL} join {older}")
        assert (status, f"alice has no job '{older}' running" in out) == (1, True), out
        assert job_of(lab, session.pid) == newest


@pytest.mark.timeout(60)
def test_a_denial_says_where_to_look(slurm_lab: Lab) -> None:
    """The node knows its own jobs only; the manager's own command knows the others."""
    login = slurm_lab.login()
    assert "squeue --me lists them" in login.errors
