"""What libpam does with a stack: whom a line refuses, and who gets past it without its being asked.

Owns the meaning of controls (pam.conf(5)) and of jumps; reads no file. Must never call a line sound because it looks
usual: each is followed as libpam follows it (libpam/pam_dispatch.c, 1.5). Called by the doctor's look at PAM.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from adoptd.pam_lines import MODULE, PamLine

# What the words of a control stand for (pam.conf(5)).
_WORDS: Mapping[str, Mapping[str, str]] = {
    "required": {"success": "ok", "new_authtok_reqd": "ok", "ignore": "ignore", "default": "bad"},
    "requisite": {"success": "ok", "new_authtok_reqd": "ok", "ignore": "ignore", "default": "die"},
    "sufficient": {"success": "done", "new_authtok_reqd": "done", "default": "ignore"},
    "optional": {"success": "ok", "new_authtok_reqd": "ok", "default": "ignore"},
}
_ACTIONS = frozenset({"ignore", "ok", "done", "bad", "die", "reset"})
# Modules that say yes to some only: a line of theirs that ends the stack lets those in whom it is there for.
_GATES = frozenset(
    {"pam_access.so", "pam_succeed_if.so", "pam_listfile.so", "pam_localuser.so", "pam_exec.so", "pam_time.so"}
    | {"pam_group.so", "pam_rootok.so", "pam_wheel.so", "pam_usertype.so", "pam_slurm_adopt.so", "pam_slurm.so"}
    | {"pam_deny.so", MODULE}
)
# Modules that leave it to others where they have nothing against somebody: they say PAM_IGNORE of root.
_SILENT = frozenset(
    {"pam_slurm_adopt.so", "pam_nologin.so", "pam_warn.so", "pam_motd.so", "pam_wheel.so", "pam_sepermit.so", MODULE}
)
# Modules of the account stack that refuse people for who they are, so may stand behind one of ours that does not.
REFUSING = frozenset(
    {"pam_access.so", "pam_deny.so", "pam_listfile.so", "pam_succeed_if.so", "pam_slurm.so", "pam_slurm_adopt.so"}
)


class Reach(enum.Enum):
    """Whether a line is asked: for everybody, for all but those whom another line lets past, or for nobody."""

    ALL = "all"
    SOME = "some"
    NONE = "none"


@dataclass(frozen=True)
class Reached:
    """``by`` is the line that lets people past, where there is one."""

    reach: Reach
    by: Optional[PamLine] = None


def name_of(line: PamLine) -> str:
    """The module's file name."""
    return line.module.rpartition("/")[2]


def actions_of(control: str) -> Optional[Mapping[str, str]]:
    """What a control does for each return value; None for what libpam does not understand, and refuses all for."""
    words = _WORDS.get(control.lower())
    if words is not None:
        return words
    found: Dict[str, str] = {}
    for pair in control.split():
        value, equals, action = pair.partition("=")
        if not equals or not (action in _ACTIONS or (action.isascii() and action.isdigit() and int(action) > 0)):
            return None
        found[value] = action
    return found or None


def action_for(line: PamLine, value: str) -> str:
    """What the line does where its module returns ``value``, such as "success"."""
    actions = actions_of(line.control)
    if actions is None:
        return "bad"
    # What is not named, and has no default, counts as a failure (_pam_set_default_control in pam_handlers.c).
    return actions.get(value, actions.get("default", "bad"))


def refuses(line: PamLine) -> bool:
    """Whether what the module says no to is refused by the stack."""
    return action_for(line, "perm_denied") in ("bad", "die")


def forgets_all(line: PamLine) -> bool:
    """Whether some answer of its module has libpam begin anew, as if nobody had been refused before."""
    return "reset" in (actions_of(line.control) or {}).values()


def reached(line: PamLine, stack: Sequence[PamLine]) -> Reached:
    """Whether ``line`` is asked when all before it say yes, and who may be let past it."""
    kind = [each for each in stack if each.kind == line.kind]
    goal = kind.index(line)
    position = 0
    gate: Optional[PamLine] = None
    while position < goal:
        each = kind[position]
        following = _next(position, kind)
        if name_of(each) in _GATES:
            # For most it says no or nothing: the way on is the next line.
            gate = each if gate is None and following > goal else gate
            following = position + 1
        if following > goal:
            return Reached(Reach.NONE, each)
        position = following
    return Reached(Reach.ALL) if gate is None else Reached(Reach.SOME, gate)


# What pam_deny.so says (modules/pam_deny/pam_deny.c).
_DENIED = {"auth": "auth_err", "account": "auth_err", "session": "session_err", "password": "authtok_err"}


def shut_by(kind: str, stack: Sequence[PamLine]) -> Optional[PamLine]:
    """The line of pam_deny.so that everybody meets, whatever all others say; None if there is none."""
    for line in stack:
        denies = line.kind == kind and name_of(line) == "pam_deny.so"
        if denies and action_for(line, _DENIED[kind]) in ("bad", "die") and reached(line, stack).reach is Reach.ALL:
            return line
    return None


def is_silent(kind: str, stack: Sequence[PamLine]) -> bool:
    """Whether no line of ``kind`` says yes to whom our module leaves to others: libpam takes that for a no."""
    return not any(
        line.kind == kind
        and name_of(line) not in _SILENT
        # A jump says nothing of its own (_pam_dispatch_aux).
        and action_for(line, "success") in ("ok", "done")
        and reached(line, stack).reach is not Reach.NONE
        for line in stack
    )


def overshoots(line: PamLine, stack: Sequence[PamLine]) -> bool:
    """Whether a yes of ``line`` jumps over more lines than there are: libpam refuses everybody then."""
    action = action_for(line, "success")
    if not action.isdigit():
        return False
    kind = [each for each in stack if each.kind == line.kind]
    return len(list(_items(kind[kind.index(line) + 1 :], line.within))) < int(action)


def _next(position: int, kind: Sequence[PamLine]) -> int:
    """The line that is asked once the one at ``position`` has said yes; the number of lines: none."""
    line = kind[position]
    action = action_for(line, "success")
    below = kind[position + 1 :]
    if action == "done":
        # Of a substack that alone is ended.
        return position + 1 + sum(len(item) for item in _items(below, line.within)) if line.within else len(kind)
    if action.isdigit():
        return position + 1 + sum(len(item) for item in list(_items(below, line.within))[: int(action)])
    return position + 1


def _items(lines: Sequence[PamLine], within: Tuple[str, ...]) -> Iterator[List[PamLine]]:
    """What a jump counts: a line, or a substack as a whole; up to the end of the stack that it is in."""
    level = len(within)
    item: List[PamLine] = []
    for line in lines:
        if line.within[:level] != within:
            break
        if item and len(line.within) > level and line.within[: level + 1] == item[-1].within[: level + 1]:
            item.append(line)
            continue
        if item:
            yield item
        item = [line]
    if item:
        yield item
