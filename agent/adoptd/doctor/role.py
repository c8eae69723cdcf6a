"""Whether this host is to adopt anybody at all: a login node of Slurm's has the agent for its ssh clients, and no jobs.

Owns what makes a host one. Says nothing itself: three checks ask, so that what is right on a login node is no fault to
any of them. Changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from adoptd.doctor.findings import Scene, status_of
from adoptd.jobs.slurm_hosts import find_slurmd
from adoptd.model import JobManagerError
from adoptd.pam_lines import adopt_lines
from adoptd.slurm_site import slurm_conf


@dataclass(frozen=True)
class RoleFacts:
    """``configured``: there is a slurm.conf. ``named``: it, or the agent's configuration, has a node of this host's
    name. ``slurmd``: it runs here. ``spool``: its directory is here. ``guarded``: a PAM line of ours is."""

    configured: bool
    named: bool
    slurmd: bool
    spool: bool
    guarded: bool


def judge_login_node(facts: RoleFacts) -> bool:
    """Slurm is used here, and nothing says that a job could be. One sign of a compute node makes it one."""
    return facts.configured and not (facts.named or facts.slurmd or facts.spool or facts.guarded)


def is_login_node(scene: Scene) -> bool:
    """As far as root can see; to others every host is a compute node."""
    if not scene.root or scene.settings.jobs.backend == "cgroup":
        return False
    conf = slurm_conf(scene.settings)
    try:
        if not conf.is_there():
            return False
        found, slurmd = conf.settings(), find_slurmd()
        guarded = bool(adopt_lines(scene.service, scene.pam_directory))
    except (JobManagerError, OSError):
        return False
    spool = status_of(found.spool_dir, follow=True) is not None
    named = found.node_name_certain or bool(scene.settings.jobs.slurm_node_name)
    return judge_login_node(RoleFacts(found.conf_file is not None, named, bool(slurmd.pid), spool, guarded))
