"""What the configuration and the site's own Slurm say together: which slurm.conf counts, and which way to seal.

Owns no choice of its own: the configuration's keys win, slurm.conf fills what they leave open, and "auto" is decided
in :mod:`adoptd.seal`. Called by the service and by the doctor, so that both mean the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Optional

from adoptd import log
from adoptd.config import Config
from adoptd.jobs.slurm_conf import SlurmConf, SlurmOverrides
from adoptd.model import JobFault, JobManagerError
from adoptd.seal import Seal, SlurmSite, open_seal

# A slurmd that has its configuration from the controller has its key all the same, where others have both.
_USUAL_DIR = Path("/etc/slurm")


def slurm_conf(settings: Config, noted: Callable[[JobFault], None] = lambda _: None) -> SlurmConf:
    """The slurm.conf that this node goes by; nothing is read before it is asked. ``noted``: see SlurmConf."""
    section = settings.jobs
    overrides = SlurmOverrides(section.slurm_conf, section.slurm_node_name, section.slurm_spool_dir)
    return SlurmConf(overrides, noted=noted)


def configured_seal(settings: Config) -> Seal:
    """The seal that [seal] and slurm.conf ask for. Raises SealError. Blocks where munged does."""
    section = settings.seal
    slurm_key = Path(section.slurm_key_file) if section.slurm_key_file else None
    site = slurm_site(slurm_conf(settings))
    return open_seal(section.scheme, Path(section.key_file), section.munge_socket, section.ttl_s, site, slurm_key)


def slurm_site(conf: SlurmConf) -> Optional[SlurmSite]:
    """How Slurm's own messages are sealed here; None without a slurm.conf that can be read."""
    if not conf.is_there():
        return None
    try:
        found = conf.settings()
    except JobManagerError as error:
        log.warning("slurm_conf_unread", error=str(error), effect="Slurm's own way to seal is not known")
        return None
    if found.conf_file is None:
        return None
    directories = tuple(dict.fromkeys((Path(found.conf_file).parent, _USUAL_DIR)))
    return SlurmSite(found.auth_type, found.auth_info, directories, found.cluster_name, found.trusted_uids)
