"""``adoptd doctor``: will a login on this node do what the administrator expects, and if not, why?

Owns the table of checks. Each looks at one thing, changes nothing, and says what it saw and what to do; none stops
another, and none is waited for longer than all are given. Called by the command line.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import List, Sequence, Tuple

from adoptd import config
from adoptd.doctor import (
    agent,
    callerid,
    certificates,
    exporter,
    files,
    jobs,
    kernel,
    module,
    pam,
    ports,
    probing,
    rights,
    seal,
    services,
    slurm,
    sockets,
    sshd,
    steps,
)
from adoptd.doctor.findings import Check, Finding, Grade, Scene, TookTooLong, ok, run_checks, within, worst
from adoptd.model import ConfigError
from adoptd.pam_lines import PAM_DIRECTORY

__all__ = ["CHECKS", "Finding", "Grade", "examine", "worst"]

# In the order in which a login meets what they are about. ``of_settings``: what they look at the configuration names,
# so without one there is nothing to look at; the others look at what it would be by default.
_TABLE: Tuple[Tuple[Check, bool], ...] = (
    (Check("sshd", sshd.look_at_sshd), False),
    (Check("pam", pam.look_at_stack), False),
    (Check("pam", services.look_at_services), False),
    (Check("pam", services.look_at_nologin), False),
    (Check("module", module.look_at_module), False),
    (Check("configuration", files.look_at_configuration), True),
    (Check("sockets", sockets.look_at_sockets), True),
    (Check("agent", agent.look_at_agent), True),
    (Check("service", agent.look_at_service), False),
    (Check("rights", rights.look_at_rights), True),
    (Check("jobs", jobs.look_at_jobs), True),
    (Check("slurm", slurm.look_at_slurm), True),
    (Check("steps", steps.look_at_steps), True),
    (Check("fallback", slurm.look_at_fallback), True),
    (Check("seal", seal.look_at_seal), True),
    (Check("key", seal.look_at_keys), True),
    (Check("key", seal.look_at_munge_directories), True),
    (Check("clock", seal.look_at_clock), False),
    (Check("port", ports.look_at_ports), True),
    (Check("metrics", exporter.look_at_exporter), True),
    (Check("metrics", certificates.look_at_certificates), True),
    (Check("kernel", kernel.look_at_kernel), False),
    (Check("probe", probing.look_at_probe), True),
    (Check("cgroups", kernel.look_at_cgroups), False),
)
# Timed, so not beside the others.
_ASKING: Tuple[Check, ...] = (Check("answer", callerid.look_at_own_answer),)
CHECKS: Tuple[Check, ...] = tuple(check for check, _ in _TABLE)
_OF_THE_HOST: Tuple[Check, ...] = tuple(check for check, of_settings in _TABLE if not of_settings)


def examine(
    file: Path,
    pam_directory: Path = PAM_DIRECTORY,
    service: str = "sshd",
    peers: Sequence[str] = (),
    deep: bool = False,
    timeout_s: float = 4.5,
) -> List[Finding]:
    """All findings, in the order of the table. Returns within twice ``timeout_s``, whatever hangs."""
    root = os.geteuid() == 0
    findings: List[Finding] = []
    checks, asking = CHECKS, _ASKING
    started_s = time.monotonic()
    try:
        settings = within(timeout_s / 2, lambda: config.load(file))
        findings.append(ok("configuration", f"{file} is right"))
    except (ConfigError, TookTooLong, RuntimeError) as error:
        # Of the rest nothing can be told: what the agent would go by is not known.
        findings.append(files.unread(file, error, timeout_s / 2))
        settings, checks, asking, peers = config.Config(), _OF_THE_HOST, (), ()
    # What the file took is taken from both rounds.
    each_s = round(timeout_s - (time.monotonic() - started_s) / 2, 1)
    scene = Scene(file, settings, pam_directory, service, tuple(peers), deep, root, each_s)
    findings += run_checks(checks, scene)
    named = tuple(Check("peer", callerid.look_at_peer(name)) for name in scene.peers)
    return findings + run_checks((*asking, *named), scene)
