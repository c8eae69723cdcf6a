"""The doctor's look at the other PAM services: which of them load the module, and whether it does anything there.

Changes nothing. Called through the table of checks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Set, Tuple

from adoptd.doctor.findings import Finding, Scene, failure, ok, warning
from adoptd.pam_lines import MODULE, PamLine, is_for, lines_of, wrong_options

# Of package managers and editors; to libpam they are services all the same, which nobody asks for.
_LEFTOVERS = (".dpkg-old", ".dpkg-new", ".dpkg-dist", ".rpmsave", ".rpmnew", ".orig", ".bak", "~")
_SERVICES_MAX = 256
_NAMED_MAX = 4


def look_at_nologin(scene: Scene) -> Iterator[Finding]:
    """What keeps everybody out before we are asked."""
    for file in ("/etc/nologin", "/run/nologin"):
        if os.path.lexists(file):
            yield warning(
                "pam", f"{file} is there: pam_nologin.so lets nobody in but root", f"rm {file}, once it is time"
            )


def look_at_services(scene: Scene) -> Iterator[Finding]:
    """Which other services load the module, and whether it does anything there."""
    try:
        shared = {line.file for line in lines_of(scene.service, scene.pam_directory)}
    except OSError:
        shared = set()  # said by the look at the stack
    names = _names(scene)
    stacks, unread = _stacks(scene, names[:_SERVICES_MAX])
    yield from judge_services(stacks, shared)
    if unread:
        yield warning("pam", f"services that libpam refuses: {_few(unread)}", "put the named files right")
    if len(names) > _SERVICES_MAX:
        seen = f"{scene.pam_directory} has {len(names)} services: {_few(names[_SERVICES_MAX:])} were not looked at"
        yield warning("pam", seen, "take away what is no service; adoptd doctor --service NAME looks at one")


def judge_services(stacks: Dict[str, Sequence[PamLine]], shared: Set[Path]) -> Iterator[Finding]:
    """``stacks``: all lines by service. ``shared``: files that the service looked at is made of."""
    # Of a line in a file that several include: it is there for the one that it names.
    at_work = {
        str(line) for name, stack in stacks.items() for line in stack if line.loads(MODULE) and is_for(line, name)
    }
    parts = {line.file.name for name, stack in stacks.items() for line in stack if line.file.name != name}
    acting: List[str] = []
    faults: Dict[Tuple[str, str], List[str]] = {}
    idle: Dict[PamLine, List[str]] = {}
    passing: List[str] = []
    for name, stack in stacks.items():
        if name in parts:
            # What others include is no service.
            continue
        lines = [line for line in stack if line.loads(MODULE)]
        wrong = [(str(line), fault) for line in lines for fault in wrong_options(line)]
        for each in wrong:
            faults.setdefault(each, []).append(name)
        ours = [line for line in lines if is_for(line, name)]
        if ours:
            acting.append(f"{name} ({ours[0]})")
        elif lines and all(line.file in shared or str(line) in at_work for line in lines):
            passing.append(name)
        elif lines and not wrong:
            idle.setdefault(lines[0], []).append(name)
    for (place, fault), names in faults.items():
        yield failure(
            "pam", f"{place} (service {_few(names)}): {fault}", f"until it is right, only root passes {_few(names)}"
        )
    if idle:
        names = [name for each in idle.values() for name in each]
        line = next(iter(idle))
        seen = f"{line}: in the stack of {_few(names)} it does nothing, for want of service={names[0]}"
        yield warning("pam", seen, f"add service={names[0]} to it, or take it out if {names[0]} is not to be guarded")
    if acting:
        yield ok("pam", f"also asked by {_few(acting)}")
    if passing:
        yield ok("pam", f"does nothing for {_few(passing)}, which include the same lines")


def _names(scene: Scene) -> List[str]:
    """The services but the one looked at. A copy that somebody keeps beside one is called it and more."""
    try:
        found = sorted(entry.name for entry in scene.pam_directory.iterdir() if entry.is_file())
    except OSError:
        return []  # said by the look at the stack
    known = {scene.service, *found}
    copies = {name for name in found if name.endswith(_LEFTOVERS) or ("." in name and name.partition(".")[0] in known)}
    return [name for name in found if name != scene.service and name not in copies]


def _stacks(scene: Scene, names: Sequence[str]) -> Tuple[Dict[str, Sequence[PamLine]], List[str]]:
    """The lines of these services, and those that cannot be read."""
    stacks: Dict[str, Sequence[PamLine]] = {}
    unread: List[str] = []
    for name in names:
        try:
            stacks[name] = lines_of(name, scene.pam_directory)
        except OSError as error:
            unread.append(f"{name} ({error.filename}: {error.strerror})")
    return stacks, unread


def _few(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_MAX
    return ", ".join(names[:_NAMED_MAX]) + (f" and {more} more" if more > 0 else "")
