"""The doctor's look at the seal: whether messages are sealed and opened here, with what, and by which clock.

Owns the round trip and the files behind it. Never prints a key, nor reads one but through the seal itself. Called
through the table of checks.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import stat
from typing import Iterator, Optional, Tuple

from adoptd.doctor.findings import FileRule, Finding, Scene, failure, fault_of, ok, status_of, warning
from adoptd.seal import SealError
from adoptd.slurm_site import configured_seal, slurm_conf, slurm_site

_WORD = b"doctor"
_KEY = FileRule("a regular file", 0o077, stat.S_ISREG)
_DIRECTORY = FileRule("a directory", 0o022, stat.S_ISDIR)
_MUNGE_KEY = "/etc/munge/munge.key"
# TIME_ERROR of adjtimex(2): nothing has set the clock right.
_TIME_ERROR = 5
_TIMEX_BYTES = 512

_REMEDIES = {
    "munge": "systemctl restart munge, and look at journalctl -u munge",
    "key": "put the site's key there: install -m 0600 -o root adoptd.key /etc/adoptd/adoptd.key",
    "slurm": "give slurm.key the mode and owner that Slurm asks for (chmod 0600, chown to SlurmUser)",
    "auto": "start munged, or make the key file: dd if=/dev/urandom bs=64 count=1 of=/etc/adoptd/adoptd.key",
}


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
        remedy = "apt install libmunge2 (again)" if "cannot be loaded" in str(error) else _REMEDIES[asked]
        yield failure("seal", f"nodes cannot ask each other: {error}", remedy)
        return
    why = f"{asked} takes it" if asked == "auto" else "as configured"
    if opened.payload == _WORD and opened.uid == 0:
        yield ok("seal", f"{seal.scheme} ({why}): sealed and opened as uid 0")
    else:
        seen = f"{seal.scheme}: sealed by root, and opened as of uid {opened.uid}: agents would not believe it"
        yield failure("seal", seen, _REMEDIES[seal.scheme])


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
    else:
        owner = next((uid for uid in owners if uid != 0), 0)
        seen = f"{path} {fault}: whoever can read it can be an agent of any node"
        yield failure(
            "key", seen, f"chown {owner} {path} && chmod 0400 {path}, and a new key if others may have read it"
        )


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
    for path in ("/run/munge", "/etc/munge") if munge is not None and scene.root else ():
        status = status_of(path)
        fault = None if status is None else fault_of(status, _DIRECTORY, (0, munge or 0))
        if fault is not None:
            yield failure(
                "key",
                f"{path} {fault}: others can put a munged of theirs there",
                f"chown munge {path}; chmod go-w {path}",
            )
