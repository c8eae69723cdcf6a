"""What the doctor says of a line of ours in a PAM stack, and of what only several of them together tell.

Owns no look at anything: functions of the stack's lines. Called by the look at PAM.
"""

from __future__ import annotations

import os
from typing import Iterator, List, Sequence

from adoptd.config import AgentConfig
from adoptd.doctor.findings import Finding, failure, ok, warning
from adoptd.doctor.stack import REFUSING, Reach, action_for, forgets_all, is_silent, name_of, reached, refuses
from adoptd.pam_lines import MODULE, PamLine, is_for, options_of

# Options that each line has for itself.
_OF_ONE_LINE = frozenset({"timeout_ms", "log_level"})


def judge_line(service: str, line: PamLine, stack: Sequence[PamLine]) -> Iterator[Finding]:
    """Whether a line whose words are right is also where it can do its work."""
    found = list(_faults(service, line, stack))
    yield from found
    if not found:
        yield ok("pam", f"{line}: {line.kind} {line.control} {' '.join(line.options)}".rstrip() + _notes(line, stack))


def _faults(service: str, line: PamLine, stack: Sequence[PamLine]) -> Iterator[Finding]:
    options = options_of(line)
    if not is_for(line, service):
        seen = f"{line}: service={options.get('service', 'sshd')}, so it does nothing for {service}"
        own = f"add lines with service={service} to {line.file.parent / service}"
        yield failure("pam", seen, f"add to that line: service={service}" if line.file.name == service else own)
        return
    place = reached(line, stack)
    if place.by is not None and place.reach is Reach.NONE:
        seen = f"{line}: is never asked: {name_of(place.by)} ({place.by}, {place.by.control}) skips the lines below"
        yield failure("pam", seen, f"put the line of {MODULE} above {place.by}")
    elif place.by is not None and line.kind == "session":
        seen = f"{line}: is not asked for those of whom {name_of(place.by)} ({place.by}, {place.by.control}) says yes"
        yield warning("pam", seen, f"put the line of {MODULE} above {place.by}, if they are to be adopted")
    if action_for(line, "ignore") in ("bad", "die"):
        seen = f"{line}: {line.control}: refuses all whom the module leaves to others: root, and all under mode=observe"
        yield failure("pam", seen, "add ignore=ignore to that control")
    if line.kind == "account":
        yield from _refusing(line, stack)
    for later in stack[stack.index(line) :] if line.kind == "session" else ():
        if later.kind == "session" and later.loads("pam_systemd.so"):
            seen = f"{line}: pam_systemd.so comes after it ({later}) and takes the session out of its job again"
            yield warning("pam", seen, f"move the session line of {MODULE} to the end")
    names = [word.partition("=")[0] for word in line.words]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        said = ", ".join(f"{name}={options[name]}" for name in twice)
        yield warning("pam", f"{line}: {', '.join(twice)} is there more than once: {said} counts", "leave one of each")
    if options.get("mode", "").lower() == "observe":
        seen = f"{line}: mode=observe: it decides, logs and counts, and lets everybody in, into no job"
        yield warning("pam", seen, "when the log shows what you expect, take mode=observe out of that line")


def _refusing(line: PamLine, stack: Sequence[PamLine]) -> Iterator[Finding]:
    below = stack[stack.index(line) + 1 :]
    forgets = next((each for each in below if each.kind == "account" and forgets_all(each)), None)
    if forgets is not None and refuses(line):
        seen = f"{line}: {forgets} ({name_of(forgets)}, {forgets.control}) has libpam forget what was refused above it"
        yield failure("pam", seen, f"take the reset out of {forgets}")
    judge = next(
        (each for each in below if each.kind == "account" and name_of(each) in REFUSING and refuses(each)), None
    )
    if judge is None and refuses(line) and options_of(line).get("action_no_jobs", "").lower() == "ignore":
        seen = f"{line}: action_no_jobs=ignore, and no line below refuses anybody: users without a job come in"
        yield warning("pam", seen, "action_no_jobs=deny, or pam_access.so below to say who may come in without a job")
    elif judge is None and not refuses(line):
        seen = f"{line}: the control is {line.control}, so nobody is refused by it"
        yield warning("pam", seen, f"make it: account required {MODULE} ...")


def _notes(line: PamLine, stack: Sequence[PamLine]) -> str:
    """What is right as it is and good to know."""
    notes: List[str] = []
    options = options_of(line)
    if line.kind == "session" and not refuses(line):
        notes.append("a session that cannot be put into its job goes on outside of it")
    below = [each for each in stack[stack.index(line) + 1 :] if each.kind == line.kind]
    if line.kind == "account":
        place = reached(line, stack)
        if place.by is not None:
            notes.append(f"not asked for whom {name_of(place.by)} ({place.by}) lets in")
        if not refuses(line):
            judge = next((name_of(each) for each in below if name_of(each) in REFUSING and refuses(each)), "")
            notes.append(f"whom it refuses {judge} decides on")
        said = options.get("action_generic_failure", "ignore").lower()
        if said == "allow" or (said == "ignore" and not any(name_of(each) in REFUSING for each in below)):
            notes.append(f"action_generic_failure={said}: while the agent is down users come in without a job")
        if options.get("action_unknown", "newest").lower() == "allow":
            notes.append("action_unknown=allow: whose job is not known comes in without one")
        above = stack[: stack.index(line)]
        if any(each.kind == "account" and _lets_expired_past(each, line) for each in above):
            notes.append("a user whose password has expired is not asked about")
    return f" ({'; '.join(notes)})" if notes else ""


def _lets_expired_past(each: PamLine, line: PamLine) -> bool:
    # Debian's common-account has it: new_authtok_reqd=done ends the stack, unless it is one of its own.
    inside = line.within[: len(each.within)] == each.within
    return inside and name_of(each) == "pam_unix.so" and action_for(each, "new_authtok_reqd") == "done"


def judge_together(ours: Sequence[PamLine], stack: Sequence[PamLine]) -> Iterator[Finding]:
    """What only several lines together tell; ``ours`` are for this service."""
    by_kind = {kind: [line for line in ours if line.kind == kind] for kind in ("account", "session")}
    for kind, lines in by_kind.items():
        if lines and is_silent(kind, stack):
            seen = (
                f"{lines[-1]}: no {kind} line but ours says yes: its ignore alone is a no to libpam, which refuses root"
            )
            yield failure("pam", seen, f"add what knows your users, such as: {kind} required pam_unix.so")
        if len(lines) > 1:
            seen = f"{MODULE} is in the {kind} stack {len(lines)} times: {', '.join(map(str, lines))}"
            yield warning("pam", seen, "each asks the agent again: leave one")
    if by_kind["account"] and by_kind["session"]:
        account, session = by_kind["account"][-1], by_kind["session"][-1]
        first, second = options_of(account), options_of(session)
        differ = sorted(
            name
            for name in {*first, *second} - _OF_ONE_LINE
            if first.get(name, "").lower() != second.get(name, "").lower()
        )
        if differ:
            seen = f"{account} and {session} differ in {', '.join(differ)}: the phases of a login go by different rules"
            yield warning("pam", seen, "give both lines the same options")
    rivals = [line for line in stack if line.kind == "account" and line.loads("pam_slurm_adopt.so")]
    enforcing = [line for line in by_kind["account"] if options_of(line).get("mode", "").lower() != "observe"]
    if rivals and enforcing:
        seen = (
            f"{rivals[0]}: pam_slurm_adopt.so is there too, and enforces: a session lands where the later one puts it"
        )
        yield warning("pam", seen, "comment that line out, or add mode=observe to ours")
    for line in ours:
        if line.quiet:
            seen = f"{line}: where the module is missing, the dash before {line.kind} only keeps that out of the log"
            yield warning("pam", seen, "take the dash away; module_unknown=ignore is what passes over a missing module")


def judge_sockets(stack: Sequence[PamLine], answers_at: str) -> Iterator[Finding]:
    """Whether each line asks where the agent answers."""
    for line in stack:
        if line.loads(MODULE):
            asked = options_of(line).get("socket", AgentConfig().pam_socket)
            # /var/run is a link to /run.
            if asked != answers_at and os.path.realpath(asked) != os.path.realpath(answers_at):
                seen = f"{line}: asks at {asked}, the agent's [agent] pam_socket is {answers_at}"
                yield failure("pam", seen, f"put socket={answers_at} on that line, or change [agent] pam_socket")


def judge_time(stack: Sequence[PamLine], callerid_ms: int) -> Iterator[Finding]:
    """Whether a login's time, where a line says it, is longer than a source that does not answer is waited for."""
    for line in stack:
        given = options_of(line).get("timeout_ms", "") if line.loads(MODULE) else ""
        if given.isdigit() and int(given) <= callerid_ms:
            seen = (
                f"{line}: timeout_ms={given}, and a source that does not answer may take {callerid_ms}: no time is left"
            )
            yield warning(
                "pam", seen, "take timeout_ms out of that line (it is 1000 then), or lower [callerid] timeout_ms"
            )
