"""The doctor's look at the seal: whether messages are sealed and opened here, with what, and by which clock.

Owns the round trip and the files behind it. Never prints a key, nor reads one but through the seal itself. Called
through the table of checks.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import re
import stat
from typing import Collection, Iterator, Optional, Tuple

from adoptd.doctor.findings import FileRule, Finding, Scene, failure, fault_of, ok, status_of, warning
from adoptd.doctor.processes import running
from adoptd.seal import SealError
from adoptd.slurm_site import configured_seal, slurm_conf, slurm_site

_WORD = b"doctor"
_KEY = FileRule("a regular file", 0o077, stat.S_ISREG)
_DIRECTORY = FileRule("a directory", 0o022, stat.S_ISDIR)
_MUNGE_KEY = "/etc/munge/munge.key"
_MUNGE_SOCKET = "/run/munge/munge.socket.2"
# TIME_ERROR of adjtimex(2): nothing has set the clock right.
_TIME_ERROR = 5
_TIMEX_BYTES = 512
_MOMENT_S = 1.0
_MUNGE_KEY_MIN_BYTES = 32

_REMEDIES = {
    "munge": "systemctl restart munge, and look at journalctl -u munge",
    "key": "put the site's key there: install -m 0600 -o root adoptd.key /etc/adoptd/adoptd.key",
    "slurm": "give slurm.key the mode and owner that Slurm asks for (chmod 0600, chown to SlurmUser)",
    # Never over one that is there (set -C): it may be the site's.
    "auto": "start munged, or, where no node has a key yet, make one for all: "
    "(umask 077; set -C; head -c 64 /dev/urandom >/etc/adoptd/adoptd.key)",
}
# A key file that is there, and not as it has to be.
_UNFIT = re.compile(r"key file (/.*?) is (?!not to be opened)([^;]*); expected a regular file of root")


def look_at_seal(scene: Scene) -> Iterator[Finding]:
    """Seal and open once."""
    if not scene.settings.callerid.enabled:
        yield ok("seal", "not needed: [callerid] enabled is false")
        return
    if not scene.root:
        yield warning("seal", "only root can try it", "sudo adoptd doctor")
        return
    asked = scene.settings.seal.scheme
    try:
        seal = configured_seal(scene.settings)
        try:
            opened = seal.open(seal.seal(_WORD, os.geteuid()))
        finally:
            seal.close()
    except SealError as error:
        yield failure("seal", f"nodes cannot ask each other: {error}", remedy_for(asked, str(error)))
        return
    if asked == "auto" and seal.scheme == "key" and status_of(_MUNGE_KEY) is not None:
        seen = "[seal] scheme auto takes the key file, as munged does not answer: nodes where it does seal otherwise"
        yield warning("seal", seen, "systemctl restart munge adoptd, or the same [seal] scheme on all nodes")
    why = f"{asked} takes it" if asked == "auto" else "as configured"
    if opened.payload == _WORD and opened.uid == 0:
        yield ok("seal", f"{seal.scheme} ({why}): sealed and opened as uid 0")
    else:
        seen = f"{seal.scheme}: sealed by root, and opened as of uid {opened.uid}: agents would not believe it"
        yield failure("seal", seen, _REMEDIES[seal.scheme])


# What the error has in it, and what to do. Where nothing fits, what goes for the scheme.
_FAULTS: Tuple[Tuple[str, str], ...] = (
    ("no scheme to seal with", _REMEDIES["auto"]),
    ("cannot be loaded", "apt install libmunge2 (again)"),
    (
        "Permission denied",
        "munged's socket is shut: chmod 0755 /run/munge; chmod 0777 its socket; systemctl restart munge",
    ),
    (
        "neither slurm.jwks nor slurm.key",
        'put Slurm\'s key there, if AuthType is auth/slurm; else [seal] scheme = "auto"',
    ),
    ("symbolic link", "put the file itself in the link's place: install -m 0600 -o root KEY /etc/adoptd/adoptd.key"),
)


def remedy_for(scheme: str, error: str) -> str:
    """What to do about an error of the seal that ``scheme`` asks for."""
    for words, remedy in _FAULTS:
        if words in error:
            return remedy
    unfit = _UNFIT.search(error)
    if unfit is not None and not os.path.basename(unfit[1]).startswith("slurm.") and scheme != "slurm":
        key = unfit[1]
        if unfit[2].endswith("bytes long"):
            return f"put the site's key there: install -m 0600 -o root adoptd.key {key}"
        owned = f"give the key its mode and owner: chown root {key}; chmod 0600 {key}"
        return f"{owned}; if it is damaged, copy another node's"
    if unfit is not None:
        return _REMEDIES["slurm"]
    socket = re.search(r'"(/[^"]+)"', error)
    if socket is not None and socket[1] != _MUNGE_SOCKET:
        named = f"{socket[1]} is where slurm.conf (AuthInfo) or [seal] munge_socket has munged's socket"
        return f"{named}: put that right, or have munged listen there (--socket)"
    return _REMEDIES[scheme]


def look_at_keys(scene: Scene) -> Iterator[Finding]:
    """The files that whoever can read or change is an agent of every node."""
    if not scene.root:
        yield warning("key", "only root can look at the keys", "sudo adoptd doctor")
        return
    site = slurm_site(slurm_conf(scene.settings))
    key_file = None if site is None else site.key_file()
    munge = _uid_of("munge")
    own = scene.settings.seal.key_file
    yield from judge_key(own, status_of(own), (0,), needed=scene.settings.seal.scheme == "key")
    if munge is not None:
        yield from judge_key(
            _MUNGE_KEY, status_of(_MUNGE_KEY), (0, munge), needed=scene.settings.seal.scheme == "munge"
        )
        daemons = list(running("munged", (0, munge)))
        started_s = max((daemon.started_s for daemon in daemons), default=None)
        unfit = unfit_for_munged(_stat(_MUNGE_KEY), {daemon.uid for daemon in daemons} or {0, munge})
        yield from judge_munged(_MUNGE_KEY, _changed_s(_MUNGE_KEY), started_s, unfit)
    if key_file is not None and site is not None:
        yield from judge_key(str(key_file), status_of(str(key_file)), (0, *site.owners), needed=False, group=True)


def judge_key(
    path: str, status: Optional[Tuple[int, int]], owners: Tuple[int, ...], *, needed: bool, group: bool = False
) -> Iterator[Finding]:
    """``needed``: the configuration asks for it. ``group``: its group may read it, as Slurm allows."""
    if status is None:
        if needed:
            yield failure("key", f"{path} is missing", _REMEDIES["key"] if "adoptd" in path else _REMEDIES["munge"])
        return
    rule = FileRule(_KEY.expected, 0o037 if group else _KEY.refused_mode, _KEY.kind)
    fault = fault_of(status, rule, owners)
    if fault is None:
        yield ok("key", f"{path} is not for others")
    elif not rule.kind(status[0]):
        # It is not read: nobody has it.
        if needed:
            yield failure("key", f"{path} {fault}: it is not read", f"install -m 0600 -o root KEY {path} (no link)")
    else:
        owner = next((uid for uid in owners if uid != 0), 0)
        seen = f"{path} {fault}: whoever can read it can be an agent of any node"
        yield failure(
            "key", seen, f"chown {owner} {path} && chmod 0400 {path}, and a new key if others may have read it"
        )


def unfit_for_munged(found: Optional[os.stat_result], owners: Collection[int]) -> Optional[str]:
    """Why munged, which runs as one of ``owners``, would not start with this key; None if it would, or there is none.

    It takes none that is root's unless it is root's itself, and none that is short (seen with munge 0.5.15).
    """
    if found is None or not stat.S_ISREG(found.st_mode):
        return None
    if found.st_size < _MUNGE_KEY_MIN_BYTES:
        return f"is {found.st_size} bytes long, expected at least {_MUNGE_KEY_MIN_BYTES}"
    if found.st_uid not in owners:
        return f"is owned by uid {found.st_uid}, and munged runs as {min(owners)}"
    return None


def judge_munged(
    path: str, changed_s: Optional[float], started_s: Optional[float], unfit: Optional[str] = None
) -> Iterator[Finding]:
    """A daemon that has read another key than is there now; times by the wall clock, None where not known. ``unfit``:
    why it would not start with it."""
    if unfit is not None:
        seen = f"{path} {unfit}: munged does not start again with it"
        yield warning("key", seen, f"put the cluster's key there: install -m 0400 -o munge -g munge KEY {path}")
    # When a process began is known to a hundredth of a second, and it reads its key a moment later.
    elif changed_s is not None and started_s is not None and changed_s > started_s + _MOMENT_S:
        seen = f"{path} was changed after munged started, which goes by the one before: after a restart it is another"
        yield warning("key", seen, "systemctl restart munge on all nodes that have the new key")


def _stat(path: str) -> Optional[os.stat_result]:
    try:
        return os.stat(path)
    except OSError:
        return None


def _changed_s(path: str) -> Optional[float]:
    # Not the time of its inode, which a chown sets as well.
    found = _stat(path)
    return None if found is None else found.st_mtime


def look_at_clock(scene: Scene) -> Iterator[Finding]:
    """Whether anything sets the clock. How far it is off only a peer can tell."""
    yield from judge_clock(_adjtimex(), scene.settings.seal.ttl_s)


def judge_clock(state: Optional[int], ttl_s: int) -> Iterator[Finding]:
    """``state`` is what adjtimex() returned, None where it cannot be called."""
    if state is None:
        yield ok("clock", "whether it is set by anything cannot be told here")
    elif state == _TIME_ERROR:
        seen = f"nothing keeps the clock right; nodes whose clocks differ by {ttl_s} s do not believe each other"
        yield warning("clock", seen, "run chrony or systemd-timesyncd on all nodes (--peer NODE compares two)")
    else:
        yield ok("clock", "kept right")


def _adjtimex() -> Optional[int]:
    libc = ctypes.CDLL(None, use_errno=True)
    # modes = 0: read only. The structure is 208 bytes on 64-bit kernels.
    state = int(libc.adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)))
    return None if state < 0 else state


def _uid_of(name: str) -> Optional[int]:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def look_at_munge_directories(scene: Scene) -> Iterator[Finding]:
    """munged refuses some of these, and libmunge believes whoever serves the socket."""
    munge = _uid_of("munge")
    for path, what in (("/run/munge", "munged"), ("/etc/munge", "key")) if munge is not None and scene.root else ():
        status = status_of(path)
        fault = None if status is None else fault_of(status, _DIRECTORY, (0, munge or 0))
        if fault is not None:
            yield failure(
                "key",
                f"{path} {fault}: others can put a {what} of theirs there",
                f"chown munge {path}; chmod go-w {path}",
            )
