"""What this node's slurmd goes by: its node name, spool directory, users and cgroup settings.

Owns what the values of slurm.conf and cgroup.conf come to, the files being found as slurmd finds them. It must never
take another node's name, nor believe a file of anybody's but root's or SlurmUser's; the last settings that could be
read stay in force, as they do in slurmd. Built by the service, asked by the slurm backend at every question.
"""

from __future__ import annotations

import os
import pwd
import socket
import stat
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, FrozenSet, Mapping, Optional, Tuple

from adoptd import log
from adoptd.jobs.slurm_hosts import RunningSlurmd, aliases_of, expand, find_slurmd
from adoptd.jobs.slurm_paths import DEFAULT_PREPEND, DEFAULT_SLICE, SlurmPaths
from adoptd.jobs.slurm_text import ConfText, Signature, read, read_if_there, signature_of
from adoptd.model import JobFault, JobManagerError
from adoptd.process import started_ns

# Where packages and builds of Slurm have it, and where a slurmd without a file of its own keeps the
# controller's (configless, 20.02 on). src/common/read_config.c asks in this order: a file of the node's first.
CONF_FILES = (
    "/etc/slurm/slurm.conf",
    "/run/slurm/conf/slurm.conf",
    "/etc/slurm-llnl/slurm.conf",
    "/usr/local/etc/slurm.conf",
    "/opt/slurm/etc/slurm.conf",
)
DEFAULT_SPOOL_DIR = "/var/spool/slurmd"  # DEFAULT_SPOOLDIR of read_config.h
# A slurmd started later with another -N leaves every file as it is, so the settings are made anew now and then.
_FRESH_S = 60.0
# While slurmd is away, or seems to keep its old directory: it may be back, or in the new one, at any time.
_UNSETTLED_S = 2.0
# A file that is younger than this when it is read may change again with the same time: the kernel's clock for files
# ticks at least 100 times a second (CONFIG_HZ). It is read again when it is older.
_SETTLING_S = 0.1
# One answer or adoption asks a dozen times for what is in force, and is done within this time.
LOOK_S = 0.01


@dataclass(frozen=True)
class SlurmOverrides:
    """What the administrator said instead of having it found; "" where nothing was."""

    conf_file: str = ""
    node_name: str = ""
    spool_dir: str = ""


@dataclass(frozen=True)
class SlurmSettings:
    """What is in force on this node. ``node_name_certain`` is False where only the host name spoke for it.

    ``trusted_uids`` are root, SlurmUser and SlurmdUser: who may own a step's socket and listen on it.
    ``auth_type``, ``auth_info`` and ``cluster_name`` are for a seal that is to be the site's own.
    """

    conf_file: Optional[str]
    node_name: str
    node_name_certain: bool
    spool_dir: str
    trusted_uids: FrozenSet[int]
    auth_type: str
    auth_info: str
    cluster_name: str
    paths: SlurmPaths


@dataclass(frozen=True)
class HostView:
    """Where facts about the host are read from; tests make their own."""

    proc_root: str = "/proc"
    hosts_file: str = "/etc/hosts"
    conf_files: Tuple[str, ...] = CONF_FILES
    default_spool_dir: str = DEFAULT_SPOOL_DIR
    host_name: str = ""

    def short_name(self) -> str:
        """The host's name without its domain, as slurmd has it."""
        return (self.host_name or socket.gethostname()).partition(".")[0]


class SlurmConf:
    """The settings, read again when a file has changed. Safe to share between threads."""

    def __init__(
        self,
        overrides: SlurmOverrides = SlurmOverrides(),
        environment: Optional[Mapping[str, str]] = None,
        host: HostView = HostView(),
        noted: Callable[[JobFault], None] = lambda _: None,
    ) -> None:
        """Nothing is read before it is asked for: slurmd may start, and fetch its files, after us.

        ``noted`` is told of each fault that is worked around.
        """
        self._noted = noted
        self._overrides = overrides
        self._environment = dict(os.environ if environment is None else environment)
        self._host = host
        self._lock = threading.Lock()
        self._known: Optional[SlurmSettings] = None
        self._signature: Tuple[Signature, ...] = ()
        self._until_s = 0.0
        self._looked_until_s = 0.0
        self._complaint = ""
        # The slurmd seen last, which may have been stopped since, and whether it has.
        self._slurmd = RunningSlurmd()
        self._stopped = False
        self._has_controller = False

    def for_node(self, node_name: str) -> SlurmConf:
        """The same settings for the slurmd that has this NodeName."""
        return SlurmConf(replace(self._overrides, node_name=node_name), self._environment, self._host, self._noted)

    def is_there(self) -> bool:
        """Whether Slurm looks installed here: a slurm.conf or a spool directory. For ``backend = "auto"``."""
        spool = self._overrides.spool_dir or self._host.default_spool_dir
        try:
            return self._find_file(None) is not None or os.path.isdir(spool)
        except JobManagerError:
            # Not to be seen is not "not there": of another backend nobody here would have a job.
            return True

    def settings(self) -> SlurmSettings:
        """What is in force now. Raises JobManagerError if nothing ever could be read."""
        with self._lock:
            now_s = time.monotonic()
            if self._known is not None and now_s < self._until_s:
                if now_s < self._looked_until_s:
                    return self._known
                if not self._changed():
                    self._looked_until_s = now_s + LOOK_S
                    return self._known
            fresh_s = _FRESH_S
            try:
                read_ns = time.time_ns()
                found, self._signature = self._load()
                kept = self._still_in(found)
                if kept is None:
                    self._complaint = ""
                else:
                    found = replace(found, spool_dir=kept)
                self._known = found
                if self._stopped or kept is not None:
                    fresh_s = _UNSETTLED_S
                if any(abs(read_ns - each.mtime_ns) < _SETTLING_S * 1e9 for each in self._signature):
                    fresh_s = _SETTLING_S
            except JobManagerError as error:
                if self._known is None:
                    raise
                # Steps that run go by what was there before: slurmd does not forget it either.
                self._complain(f"Slurm's configuration cannot be read, the one before stays in force: {error}")
            self._until_s = time.monotonic() + fresh_s
            return self._known

    def _changed(self) -> bool:
        """Whether a file is another, or the slurmd that was running is no more: another may go by other settings."""
        if self._signature != self._sign():
            return True
        slurmd = self._slurmd
        if slurmd.pid == 0 or self._stopped:
            return False
        try:
            return started_ns(slurmd.pid, self._host.proc_root) != slurmd.started_ns
        except JobManagerError:
            # Not to be seen is not gone; what was read stays in force.
            return False

    def _still_in(self, found: SlurmSettings) -> Optional[str]:
        """The directory before, where the file names another and only the one before has steps of this node's.

        The file may have been changed for a slurmd that is yet to be started.
        """
        before = self._known
        if before is None or before.spool_dir == found.spool_dir or self._overrides.spool_dir:
            return None
        if _has_steps(found.spool_dir, found.node_name) or not _has_steps(before.spool_dir, before.node_name):
            return None
        self._complain(
            f"{found.conf_file} names the spool directory {found.spool_dir}, which has no job steps; "
            f"{before.spool_dir} has, and stays in force until that changes"
        )
        return before.spool_dir

    def _complain(self, text: str) -> None:
        if text != self._complaint:
            self._complaint = text
            self._noted(JobFault.CONFIGURATION)
            log.warning("job_fault", fault=JobFault.CONFIGURATION.value, detail=text)

    def _sign(self) -> Tuple[Signature, ...]:
        return tuple(signature_of(each.file) for each in self._signature)

    def _load(self) -> Tuple[SlurmSettings, Tuple[Signature, ...]]:
        said_all = self._overrides.node_name and self._overrides.conf_file
        slurmd = RunningSlurmd() if said_all else self._find_slurmd()
        file = self._find_file(slurmd.conf_file)
        if file is None:
            if not (self._overrides.spool_dir and self._overrides.node_name):
                text_of = f"no slurm.conf: not one of {', '.join(self._host.conf_files)}"
                raise JobManagerError(text_of, JobFault.CONFIGURATION)
            text = ConfText()
        else:
            text = read(file)
            self._check_whole(file, text)
        users = [_uid_of(text.values.get(key, "root"), key) for key in ("slurmuser", "slurmduser")]
        trusted = frozenset((0, *users))
        if text.owner not in trusted:
            raise JobManagerError(
                f"{file}: owned by uid {text.owner}, which is neither root nor SlurmUser", JobFault.CONFIGURATION
            )
        node_name, certain = self._node_name(slurmd.node_name, text)
        spool = self._overrides.spool_dir or text.values.get("slurmdspooldir", self._host.default_spool_dir)
        spool = spool.replace("%h", self._host.short_name()).replace("%n", node_name)
        if not spool.startswith("/"):
            raise JobManagerError(f"{file}: SlurmdSpoolDir {spool!r} is not an absolute path", JobFault.CONFIGURATION)
        cgroup = ConfText() if file is None else read_if_there(str(Path(file).with_name("cgroup.conf")))
        paths = SlurmPaths(
            node_name,
            cgroup.values.get("cgroupslice", DEFAULT_SLICE),
            "/" + cgroup.values.get("cgroupprepend", DEFAULT_PREPEND).strip("/"),
        )
        auth_type, auth_info = text.values.get("authtype", "auth/munge"), text.values.get("authinfo", "")
        cluster = text.values.get("clustername", "")
        settings = SlurmSettings(file, node_name, certain, spool, trusted, auth_type, auth_info, cluster, paths)
        return settings, text.files + cgroup.files

    def _find_slurmd(self) -> RunningSlurmd:
        """The slurmd that runs, or the last one that did: its steps live on, in its directory and by its name."""
        found = find_slurmd(self._host.proc_root)
        stopped = found.pid == 0 and self._slurmd.pid != 0
        if stopped and not self._stopped:
            text = (
                f"slurmd, process {self._slurmd.pid}, is not running any more: jobs that run are served, none can start"
            )
            log.warning("job_fault", fault=JobFault.MANAGER_STOPPED.value, detail=text)
            self._noted(JobFault.MANAGER_STOPPED)
        elif self._stopped and not stopped:
            log.info("slurmd_running", pid=found.pid)
        self._stopped = stopped
        if not stopped:
            self._slurmd = found
        return self._slurmd

    def _check_whole(self, file: str, text: ConfText) -> None:
        """Raise JobManagerError for half a file, read while it is being written: every cluster has a controller."""
        has_controller = bool(text.values.keys() & {"slurmctldhost", "controlmachine"})
        if self._has_controller and not has_controller:
            raise JobManagerError(f"{file}: no SlurmctldHost in it any more", JobFault.CONFIGURATION)
        self._has_controller = has_controller

    def _find_file(self, of_slurmd: Optional[str]) -> Optional[str]:
        for named in (self._overrides.conf_file, of_slurmd, self._environment.get("SLURM_CONF")):
            if named:
                return named
        return next((file for file in self._host.conf_files if _is_file(file)), None)

    def _node_name(self, of_slurmd: Optional[str], text: ConfText) -> Tuple[str, bool]:
        """The NodeName, and whether anything but the host name says so."""
        for named in (self._overrides.node_name, of_slurmd, self._environment.get("SLURMD_NODENAME")):
            if named:
                return named, True
        short = self._host.short_name()
        for host in (short, *aliases_of(short, self._host.hosts_file), "localhost"):
            for names, hosts in text.nodes:
                name = _name_at(names, hosts, host)
                if name is not None:
                    return name, True
        return short, False


def _is_file(file: str) -> bool:
    """Raises JobManagerError if that cannot be told, as where a file server is away."""
    try:
        return stat.S_ISREG(os.stat(file).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise JobManagerError(f"{file}: {error.strerror}", JobFault.CONFIGURATION) from None


def values_of(file: str) -> Mapping[str, str]:
    """Every single value of a configuration file of Slurm's, by lower-case key. Raises JobManagerError."""
    return read(file).values


def _name_at(names: str, hosts: str, host: str) -> Optional[str]:
    """The NodeName whose NodeHostname is ``host``, of one line's two lists."""
    # Expanding every line of a big cluster's file would take longer than everything else.
    if not any(host.startswith(part.partition("[")[0]) for part in hosts.split(",")):
        return None
    for position, each in enumerate(expand(hosts)):
        if each == host:
            return next((name for index, name in enumerate(expand(names)) if index == position), None)
    return None


def _uid_of(user: str, key: str) -> int:
    if user.isascii() and user.isdigit():
        return int(user)
    # SlurmUser=name(uid) is how scontrol shows it; the files have the name alone.
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise JobManagerError(f"{key} {user!r} is no user of this host", JobFault.CONFIGURATION) from None


def _has_steps(directory: str, node_name: str) -> bool:
    """Whether there is a socket of one of the node's steps in the directory. A hint only; nothing is believed yet."""
    prefix = f"{node_name}_"
    try:
        with os.scandir(directory) as entries:
            return any(
                e.name.startswith(prefix) and stat.S_ISSOCK(e.stat(follow_symlinks=False).st_mode) for e in entries
            )
    except OSError:
        return False
