"""What every sealing scheme shares: its faults, its result, its bounds and its interface.

Owns no cryptography, and no I/O but to see which of Slurm's keys there is. Apart from :mod:`adoptd.seal`
itself so that a scheme imports this and never the package that chooses between schemes.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import FrozenSet, Optional, Protocol, Tuple

from adoptd.model import AdoptdError
from adoptd.wire.frame import CALLERID_MAX_BYTES

# The longest callerid question or answer is about 400 bytes (IPv6 spelled out, a 63-byte job id).
# 1 KiB leaves room for new fields, and is under 2.3 KiB when sealed, whichever the scheme.
PAYLOAD_MAX_BYTES = 1024

# What is sealed travels as one frame, so more than a frame holds cannot have come from an agent.
SEALED_MAX_BYTES = CALLERID_MAX_BYTES

# munged's ceiling (MUNGE_MAXIMUM_TTL in munge_defs.h), kept under every scheme.
TTL_MAX_S = 3600


class SealFault(enum.Enum):
    """Why nothing was sealed or opened; the label of a metric, so a closed set.

    BAD_SEAL: not a seal, tampered with, or made with another key (which cannot be told apart).
    EXPIRED, REWOUND: sealed too long ago, or too far in the future. REPLAYED: opened before.
    FOREIGN: genuine, but meant for another reader or another purpose. TOO_LARGE: over a bound here.
    UNAVAILABLE: this host cannot seal or open at the moment; says nothing about the message.
    """

    BAD_SEAL = "bad_seal"
    EXPIRED = "expired"
    REWOUND = "rewound"
    REPLAYED = "replayed"
    FOREIGN = "foreign"
    UNAVAILABLE = "unavailable"
    TOO_LARGE = "too_large"


class SealError(AdoptdError):
    """A seal was refused or could not be made. ``fault`` is for counting, the text for the log."""

    def __init__(self, fault: SealFault, detail: str) -> None:
        super().__init__(detail)
        self.fault = fault


@dataclass(frozen=True)
class Opened:
    """The content of a seal, and who sealed it where, as far as the scheme attests it.

    ``uid`` is only as good as what it is compared with: under MUNGE any local user can seal, so the
    caller must decide whose word it takes. ``address`` is None where the scheme does not say. ``sealed_at_s`` is by
    the sealer's clock, since 1970, and in whole seconds under MUNGE.
    """

    payload: bytes
    uid: int
    address: Optional[IPv4Address]
    sealed_at_s: Optional[float] = field(default=None, compare=False)


@dataclass(frozen=True)
class SlurmSite:
    """What the site's slurm.conf says of how Slurm's own messages are sealed.

    ``conf_dirs``: where the key may be, first looked at first. ``owners``: SlurmUser and SlurmdUser, who may own it.
    """

    auth_type: str
    auth_info: str
    conf_dirs: Tuple[Path, ...]
    cluster: str
    owners: FrozenSet[int]

    def key_file(self) -> Optional[Path]:
        """slurm.jwks where there is one, before slurm.key, as auth/slurm has it; None if there is neither."""
        for directory in self.conf_dirs:
            for name in ("slurm.jwks", "slurm.key"):
                if os.path.lexists(directory / name):
                    return directory / name
        return None

    def munge_socket(self) -> Optional[str]:
        """The socket of AuthInfo (slurm.conf(5)), where it names one."""
        for option in self.auth_info.split(","):
            name, _, value = option.strip().partition("=")
            if name.lower() == "socket" and value.startswith("/"):
                return value
        return None


class Seal(Protocol):
    """Makes and opens sealed messages. Every method may be called from any thread."""

    @property
    def scheme(self) -> str:
        """The scheme's name, as in the configuration and in metrics."""

    @property
    def may_block(self) -> bool:
        """Whether seal() and open() wait for another process: then call them in a thread, with a deadline."""

    @property
    def identity(self) -> Tuple[object, ...]:
        """Two seals of one identity open and make the same; it holds no secret, only a digest."""

    def seal(self, payload: bytes, reader_uid: int = 0) -> bytes:
        """Seal 1 to PAYLOAD_MAX_BYTES bytes, to be opened once, by ``reader_uid``. Raises SealError."""

    def open(self, sealed: bytes) -> Opened:
        """The content of a seal never opened before. Raises SealError for anything else."""

    def close(self) -> None:
        """Give everything back; seal() and open() raise SealError from now on. May be called twice."""


def check_payload(payload: bytes) -> None:
    """Raises SealError unless ``payload`` is 1 to PAYLOAD_MAX_BYTES bytes."""
    if len(payload) > PAYLOAD_MAX_BYTES:
        raise SealError(SealFault.TOO_LARGE, f"payload of {len(payload)} bytes, at most {PAYLOAD_MAX_BYTES}")
    if not payload:
        raise SealError(SealFault.BAD_SEAL, f"payload of 0 bytes, expected 1 to {PAYLOAD_MAX_BYTES}")


def check_sealed(sealed: bytes) -> None:
    """Raises SealError if ``sealed`` is longer than anything this project seals."""
    if len(sealed) > SEALED_MAX_BYTES:
        raise SealError(SealFault.TOO_LARGE, f"seal of {len(sealed)} bytes, at most {SEALED_MAX_BYTES}")


def check_ttl(ttl_s: int) -> None:
    """Raises ValueError unless ``ttl_s`` is 1 to TTL_MAX_S seconds."""
    if not 1 <= ttl_s <= TTL_MAX_S:
        raise ValueError(f"ttl_s {ttl_s} is not in 1..{TTL_MAX_S}")
