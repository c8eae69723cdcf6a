"""The job environment: variables of a running job that a session in it is to have too, where the site says so.

Owns which process of the job is asked, and which names may ever leave here. It must never send a name that
pam_adopt.so refuses, half of what matches, nor hold up or fail a login for it. Called by adoption; the configuration
checks its patterns here. What is taken is the login user's own word, from a process of theirs in that very job: it
gives them nothing in their session that they could not have set there themselves.
"""

from __future__ import annotations

import os
import re
from typing import Dict, Iterator, List, Mapping, Optional, Tuple

from adoptd import log
from adoptd.deadline import Deadline
from adoptd.environment import NAME, environment_of
from adoptd.jobs import JobBackend
from adoptd.model import AdoptionFailed, Job, JobManagerError
from adoptd.process import open_process, started_ns
from adoptd.wire.pam import ENVIRONMENT_MAX_BYTES

# pam_hook/reply.c says why; a test compares the two lists. A name that ends in "*" is a prefix.
FORBIDDEN = (
    *("LD_*", "GCONV_PATH", "GETCONF_DIR", "GLIBC_TUNABLES", "HOSTALIASES", "LOCALDOMAIN", "LOCPATH", "MALLOC_*"),
    *("NIS_PATH", "NLSPATH", "RESOLV_HOST_CONF", "RES_OPTIONS", "TZDIR"),
    *("PATH", "IFS", "ENV", "BASH_*", "BASHOPTS", "SHELLOPTS", "PS4", "CDPATH", "GLOBIGNORE", "ZDOTDIR", "FPATH"),
    *("NULLCMD", "READNULLCMD", "TMPPREFIX"),
    *("PYTHON*", "PERL*", "RUBY*", "GEM_*", "BUNDLE_*", "LUA_*", "TCL*", "PHP*", "NODE_OPTIONS", "NODE_PATH"),
    *("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS", "CLASSPATH"),
    *("HOME", "SHELL", "USER", "LOGNAME", "SSH_*", "SUDO_*", "PAM_*"),
    *("SLURM_CONF*", "SLURM_JWT", "SLURM_SACK_*", "SLURM_CLUSTERS", "SLURM_WORKING_CLUSTER"),
    *("SLURM_PROLOG", "SLURM_EPILOG", "SLURM_TASK_PROLOG", "SLURM_TASK_EPILOG", "SLURM_STD*", "SLURM_BCAST*"),
    *("SLURM_CONTAINER*", "SLURM_EXPORT_ENV", "SLURM_SPANK_*", "_SLURM_SPANK_*", "SRUN_CONTAINER*", "SRUN_EXPORT_ENV"),
    *("SLURM_TIME_FORMAT", "SACCT_*", "SALLOC_*", "SBATCH_*", "SCANCEL_*", "SCONTROL_*", "SINFO_*", "SQUEUE_*"),
    *("MODULE*", "LMOD_*", "_ModuleTable*"),
    *("OPENSSL_*", "SSL_CERT_*", "SSLKEYLOGFILE", "GNUTLS_*", "P11_KIT_*", "KRB5*", "GSS_*", "SASL_*", "LDAP*"),
    *("GIO_*", "DBUS_*", "XDG_*", "TERMINFO*", "TERMCAP", "TERMPATH"),
    *("GIT_*", "SYSTEMD_*", "RSYNC_*", "TAR_OPTIONS", "MAKEFILES", "MAKEFLAGS", "EDITOR", "VISUAL", "PAGER", "LESS*"),
    *("MAILRC", "GNUPGHOME", "CURL_*", "WGETRC", "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"),
    *("HTTPS_PROXY", "ALL_PROXY"),
)

# Of a login's budget of 1 s, all of which an adoption may need.
_SHARE_MS = 100.0
# The oldest is a job's script or its first task; past the first few there is little hope of finding another.
_PROCESSES_MAX = 1024
_TRIES_MAX = 16
_PATTERN = re.compile(NAME.pattern + r"\*?")


def parse_pattern(text: str) -> str:
    """``text``, if it is NAME or NAME_PREFIX* and can match a name that may be sent. Raises ValueError."""
    if not _PATTERN.fullmatch(text):
        raise ValueError(f"{text!r} is not NAME or NAME_PREFIX*")
    if is_forbidden(text):
        raise ValueError(f"{text!r} is refused by pam_adopt.so")
    return text


def is_forbidden(name: str) -> bool:
    """Whether pam_adopt.so refuses ``name``; for a prefix with its "*", whatever follows it."""
    return any(_matches(pattern, name) for pattern in FORBIDDEN)


class JobEnvironment:
    """Takes from a job what matches ``patterns``, as :func:`parse_pattern` accepts them."""

    def __init__(self, patterns: Tuple[str, ...], proc_root: str = "/proc") -> None:
        self._patterns = patterns
        self._proc_root = proc_root

    def added_to(
        self, environment: Mapping[str, str], backend: JobBackend, job: Job, deadline: Deadline
    ) -> Mapping[str, str]:
        """``environment``, whose values win, and the job's variables. Blocks, for a share of ``deadline``.

        They come from the oldest process of the job, other than its sessions, that has any that match. If there
        is none they are left out, and so they are, with a warning, if the reply has no room for all of them: tools
        that find one of a set of variables take it that they have the others.
        """
        try:
            found = self._found(backend, job, deadline.earlier(_SHARE_MS))
        except JobManagerError as error:
            log.warning("session_without_environment", job=job.id, error=str(error))
            return environment
        merged = {**found, **environment}
        size = sum(len(f"{name}={value}".encode("utf-8", "surrogateescape")) + 1 for name, value in merged.items())
        if size > ENVIRONMENT_MAX_BYTES:
            words = f"its variables have {size} bytes, expected at most {ENVIRONMENT_MAX_BYTES}"
            log.warning("session_without_environment", job=job.id, error=words)
            return environment
        return merged

    def _found(self, backend: JobBackend, job: Job, deadline: Deadline) -> Dict[str, str]:
        for pid in self._oldest_first(backend.processes(job, deadline))[:_TRIES_MAX]:
            if deadline.expired:
                raise JobManagerError("its processes could not be read in time")
            try:
                process = open_process(pid, self._proc_root)
            except AdoptionFailed:
                continue
            with process:
                values = environment_of(process, job.uid, self._proc_root)
                # Asked while the process is held: it, and not a later one of that pid, is in this very job.
                if values is None or not backend.contains(job, pid):
                    continue
            matching = {name: value for name, value in values.items() if self._wanted(name)}
            if matching:
                return matching
        return {}

    def _oldest_first(self, pids: Tuple[int, ...]) -> List[int]:
        ages = [(started_ns(pid, self._proc_root), pid) for pid in pids[:_PROCESSES_MAX]]
        return [pid for _, pid in sorted((started, pid) for started, pid in ages if started is not None)]

    def _wanted(self, name: str) -> bool:
        return any(_matches(pattern, name) for pattern in self._patterns) and not is_forbidden(name)


def processes_below(directory: str, deadline: Optional[Deadline] = None) -> Tuple[int, ...]:
    """The pids in a cgroup and those below it, as far as they can be read in time; some 1000 of them are enough.

    A user to whom it was given can make as many cgroups below it as they like.
    """
    found: List[int] = []
    for pids in _listed(directory):
        found += pids
        if len(found) >= _PROCESSES_MAX or (deadline is not None and deadline.expired):
            break
    return tuple(found)


def _listed(directory: str) -> Iterator[List[int]]:
    for path, _, _ in os.walk(directory):
        try:
            with open(f"{path}/cgroup.procs", encoding="ascii") as file:
                # 0 is a process outside our pid namespace.
                yield [int(line) for line in file if line.strip().isdigit() and int(line) > 0]
        except OSError:
            continue


def _matches(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
