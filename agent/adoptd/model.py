"""The values every other module speaks in, and the one family of errors.

Owns the nouns (Connection, Owner, Job, Witness) and nothing else: no I/O, no clock, no
configuration. Everything imports this module; it imports nothing of ours.

A fact that may be unknown is Optional here, never 0 or -1: uid 0 is root and pid 0 is the
idle task, so a zero that means "unknown" would one day be believed.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from dataclasses import dataclass, field
from typing import Optional, Tuple, Union

IPAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]

# Largest uid the kernel hands out; (uid_t)-1 is "no uid" (setreuid(2), overflow in user namespaces).
UID_MAX = 0xFFFFFFFE
# PID_MAX_LIMIT on 64-bit kernels, include/linux/threads.h.
PID_MAX = 4 * 1024 * 1024
# Longest job id: the PAM record's job field is 64 bytes with its NUL.
JOB_ID_MAX = 63
# The first character keeps ".", ".." and what looks like an option out.
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def is_job_id(text: str) -> bool:
    """Whether ``text`` can be a job id, here and on the wire: [A-Za-z0-9][A-Za-z0-9_.-]{0,62}."""
    return _JOB_ID.fullmatch(text) is not None


class AdoptdError(Exception):
    """Base of every error this project raises on purpose. The text names the object concerned."""


class ConfigError(AdoptdError):
    """The configuration is wrong: names the file, the key, what was found and what was expected."""


class ProtocolError(AdoptdError):
    """A message from outside breaks its format. Says which field and why; the sender gets no more."""


class ProbeError(AdoptdError):
    """The BPF probe cannot be loaded, opened or trusted."""


class WitnessUnavailable(AdoptdError):
    """A witness cannot be asked at all on this host (not: it does not know this connection)."""


class Ambiguous(AdoptdError):
    """More than one answer fits the question, so there is none: never pick one of them."""


class JobFault(enum.Enum):
    """What is wrong where jobs cannot be told, or a session could not be put into one.

    A closed set: the values are a metric's label and words of the log. docs/faults.md has a row for each.
    """

    CONFIGURATION = "configuration"
    SPOOL_UNREADABLE = "spool_unreadable"
    SPOOL_UNTRUSTED = "spool_untrusted"
    OTHER_NODE = "other_node"
    MANAGER_STOPPED = "manager_stopped"
    STALE_SOCKET = "stale_socket"
    FOREIGN_SOCKET = "foreign_socket"
    STEP_SILENT = "step_silent"
    STEP_CLOSED = "step_closed"
    STEP_PROTOCOL = "step_protocol"
    STEP_REFUSES = "step_refuses"
    NOT_MOVED = "not_moved"
    NO_CGROUP = "no_cgroup"
    JOB_ENDED = "job_ended"
    PROCESS_GONE = "process_gone"
    NO_TURN = "no_turn"
    OTHER_CLUSTER = "other_cluster"
    OUT_OF_TIME = "out_of_time"
    OTHER = "other"


class JobManagerError(AdoptdError):
    """The job manager cannot be asked which jobs there are. This is not the same as "no jobs"."""

    def __init__(self, text: str, fault: JobFault = JobFault.OTHER) -> None:
        super().__init__(text)
        self.fault = fault


class AdoptionFailed(AdoptdError):
    """The process is not in the job, or could not be shown to be. Nothing half-done is left."""

    def __init__(self, text: str, fault: JobFault = JobFault.OTHER) -> None:
        super().__init__(text)
        self.fault = fault


class OutOfDescriptors(AdoptionFailed):
    """The process cannot be held: this agent, or this host, has no descriptor or memory left for it."""


class Witness(enum.Enum):
    """Who named the owner of a connection, most trusted first."""

    BPF = "bpf"
    DIAG = "diag"
    CONNTRACK = "conntrack"
    PROC = "proc"
    # Not of our own making: the source node's slurmd, and the environment of a process that is in no job.
    SLURMD = "slurmd"
    HINT = "hint"


@dataclass(frozen=True)
class Endpoint:
    """One end of a TCP connection. IPv4-mapped IPv6 addresses are held as IPv4.

    The two spellings name one endpoint (RFC 4291, 2.5.5.2): a dual-stack sshd reports
    ``::ffff:10.0.0.1`` for what the client's socket calls ``10.0.0.1``.

    Raises ValueError if the port is not in 1..65535 or the address has a zone (RFC 4007, 11).
    """

    address: IPAddress
    port: int

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 0xFFFF:
            raise ValueError(f"port {self.port} is not in 1..65535")
        if isinstance(self.address, ipaddress.IPv6Address):
            if self.address.scope_id is not None:
                raise ValueError(f"{self.address} has a zone, which means something on one host only")
            mapped = self.address.ipv4_mapped
            if mapped is not None:
                object.__setattr__(self, "address", mapped)

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read ``10.0.0.1:22`` or ``[fd00::1]:22``. Raises ValueError naming the text."""
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if bracketed:
            host = host[1:-1]
        try:
            if not colon or not port.isascii() or not port.isdigit():
                raise ValueError("no port")
            address = ipaddress.ip_address(host)
            if (address.version == 6) != bracketed:
                raise ValueError("brackets go with IPv6 and only with it")
            return cls(address, int(port))
        except ValueError as error:
            raise ValueError(f"{text!r} is not IPV4:PORT or [IPV6]:PORT ({error})") from None

    def __str__(self) -> str:
        if self.address.version == 6:
            return f"[{self.address}]:{self.port}"
        return f"{self.address}:{self.port}"


@dataclass(frozen=True)
class Connection:
    """A TCP connection: ``source`` is the end that called connect(), ``destination`` the end that accepted.

    Raises ValueError if the two ends are of different IP versions.
    """

    source: Endpoint
    destination: Endpoint

    def __post_init__(self) -> None:
        if self.source.address.version != self.destination.address.version:
            raise ValueError(f"{self.source} and {self.destination} are of different IP versions")

    @property
    def version(self) -> int:
        """IP version, 4 or 6."""
        return self.source.address.version

    def __str__(self) -> str:
        return f"{self.source} > {self.destination}"


@dataclass(frozen=True)
class Owner:
    """Who made a connection, in the words of one witness.

    ``uid`` and ``cgroup_id`` are as they were when the witness noted them (BPF: in connect();
    diag: in socket(); proc: now). ``cgroup_id`` is the 64-bit id in the cgroup-v2 hierarchy.
    ``connected_at_ns`` is CLOCK_BOOTTIME. ``pid`` is a thread group id in the initial pid namespace.
    """

    witness: Witness
    uid: int
    pid: Optional[int] = None
    cgroup_id: Optional[int] = None
    connected_at_ns: Optional[int] = None
    comm: Optional[str] = None


@dataclass(frozen=True)
class Job:
    """A job on this node.

    ``id`` is the job manager's name for it, the same on every node. ``identity`` cannot be reused
    (for cgroups: inode numbers, which the kernel counts up): two jobs of one id at different times
    have different identities. ``created`` orders the jobs of one
    answer by creation; it is no time, and no part of what makes two jobs the same. ``cluster`` is the
    manager's name for the cluster that ``id`` counts in, "" where it has none.
    """

    id: str
    uid: int
    created: int = field(compare=False)
    identity: Tuple[int, ...]
    cluster: str = field(default="", compare=False)
