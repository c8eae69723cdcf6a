"""Sealing: a message that only its reader can open, once, soon, and whose sealer is known.

Owns the choice of the scheme; each scheme is a module of its own. Must never fall back from a scheme
the administrator named to another one: two nodes that seal differently understand nothing of each
other, and a weaker seal nobody asked for is worse than none. Called by the composition root, which
hands the one Seal to :mod:`adoptd.callerid`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional, Tuple

from adoptd.seal.values import (
    PAYLOAD_MAX_BYTES,
    SEALED_MAX_BYTES,
    TTL_MAX_S,
    Opened,
    Seal,
    SealError,
    SealFault,
    SlurmSite,
)

__all__ = [
    "PAYLOAD_MAX_BYTES",
    "SCHEMES",
    "SEALED_MAX_BYTES",
    "TTL_MAX_S",
    "Opened",
    "Seal",
    "SealError",
    "SealFault",
    "SlurmSite",
    "open_seal",
]

AUTO = "auto"


@dataclass(frozen=True)
class _Settings:
    key_file: Path
    munge_socket: Optional[str]
    ttl_s: int
    slurm: Optional[SlurmSite]
    slurm_key_file: Optional[Path]


@dataclass(frozen=True)
class _Scheme:
    """``missing`` says in words why the scheme is not set up on this host; None means that it is."""

    name: str
    missing: Callable[[_Settings], Optional[str]]
    make: Callable[[_Settings], Seal]


def open_seal(
    scheme: str,
    key_file: Path,
    munge_socket: Optional[str],
    ttl_s: int,
    slurm: Optional[SlurmSite] = None,
    slurm_key_file: Optional[Path] = None,
) -> Seal:
    """The Seal for ``scheme``: a name in SCHEMES.

    "auto" takes the first scheme that is set up here: Slurm's key if ``slurm`` says AuthType=auth/slurm and there
    is one, MUNGE if its library is installed and munged answers (a stopped munged makes this wait, see MungeSeal),
    else the key file if there is one. A key file that is there but wrong is an error, not a reason to look further.
    An empty or None ``munge_socket`` is the one that ``slurm`` names, else libmunge's own default; None as
    ``slurm_key_file`` is the one found beside slurm.conf. ``ttl_s`` is in 1..TTL_MAX_S seconds.

    Raises SealError naming what was found in every place looked at, ValueError for an unknown scheme
    or a ttl_s out of range. "munge" with munged not running is no error here: it may start later.
    """
    socket = munge_socket or (None if slurm is None else slurm.munge_socket())
    settings = _Settings(key_file, socket, ttl_s, slurm, slurm_key_file)
    if scheme != AUTO:
        for candidate in _SCHEMES:
            if candidate.name == scheme:
                return candidate.make(settings)
        raise ValueError(f"scheme {scheme!r} is not one of {', '.join(SCHEMES)}")
    found = []
    for candidate in _SCHEMES:
        reason = candidate.missing(settings)
        if reason is None:
            return candidate.make(settings)
        found.append(f"{candidate.name}: {reason}")
    raise SealError(SealFault.UNAVAILABLE, f"no scheme to seal with is set up here ({'; '.join(found)})")


def _slurm_missing(settings: _Settings) -> Optional[str]:
    if settings.slurm is None:
        return "there is no slurm.conf here"
    if settings.slurm.auth_type != "auth/slurm":
        return f"AuthType is {settings.slurm.auth_type}"
    return None if _slurm_key_file(settings.slurm, settings) is not None else _no_slurm_key(settings.slurm)


def _slurm_key_file(site: SlurmSite, settings: _Settings) -> Optional[Path]:
    return settings.slurm_key_file or site.key_file()


def _no_slurm_key(site: SlurmSite) -> str:
    return f"neither slurm.jwks nor slurm.key is in {' or '.join(map(str, site.conf_dirs))}"


def _make_slurm(settings: _Settings) -> Seal:
    from adoptd.seal.slurm import SlurmSeal

    site = settings.slurm
    if site is None:
        raise SealError(SealFault.UNAVAILABLE, "there is no slurm.conf here, which names the cluster")
    path = _slurm_key_file(site, settings)
    if path is None:
        raise SealError(SealFault.UNAVAILABLE, _no_slurm_key(site))
    return SlurmSeal(path, settings.ttl_s, site.cluster, site.owners)


def _munge_missing(settings: _Settings) -> Optional[str]:
    try:
        seal = _make_munge(settings)
        try:
            seal.seal(b"adoptd")
        finally:
            seal.close()
    except SealError as error:
        return str(error)
    return None


def _make_munge(settings: _Settings) -> Seal:
    from adoptd.seal.munge import MungeSeal

    return MungeSeal(settings.munge_socket, settings.ttl_s)


def _key_missing(settings: _Settings) -> Optional[str]:
    # lexists: a dangling symbolic link is a mistake to report, not an absent key.
    return None if os.path.lexists(settings.key_file) else f"{settings.key_file} does not exist"


def _make_key(settings: _Settings) -> Seal:
    # Imported only here: PyJWT brings in cryptography and urllib, 6 MB that a node under MUNGE does without.
    from adoptd.seal.key import KeySeal

    return KeySeal(settings.key_file, settings.ttl_s)


# In the order in which "auto" tries them.
_SCHEMES: Tuple[_Scheme, ...] = (
    _Scheme("slurm", _slurm_missing, _make_slurm),
    _Scheme("munge", _munge_missing, _make_munge),
    _Scheme("key", _key_missing, _make_key),
)

SCHEMES: Tuple[str, ...] = (AUTO, *(scheme.name for scheme in _SCHEMES))
