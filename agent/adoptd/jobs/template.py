"""Where a job's cgroup is: an anchored path template such as ``/jobs/uid_{uid}/job_{job}``.

Owns the translation between paths and (job id, uid), both ways, and is pure: no I/O. It must never
accept a path that merely looks like a job's: whoever can make such a path would give themselves a
job. Components match whole, from the root of the hierarchy, and every accepted path renders back to
itself. Called by the configuration (to refuse a bad template) and by the cgroup backend.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import List, Optional, Tuple

from adoptd.model import JOB_ID_MAX, UID_MAX, is_job_id

_UID = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)
_UID_DIGITS_MAX = len(str(UID_MAX))
_LITERAL = re.compile(r"[!-z|~]*", re.ASCII)
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
# NAME_MAX and PATH_MAX of include/uapi/linux/limits.h.
_NAME_MAX = 255
_PATH_MAX = 4096
_EXPECTED = (
    "expected an absolute path whose last component has {job}, such as /jobs/uid_{uid}/job_{job}: {job} once, "
    "{uid} at most once and in an earlier component, no //, . or .., printable ASCII without spaces"
)


def split_path(path: str) -> Optional[Tuple[str, ...]]:
    """The components of an absolute, already normal path; None for any other ("//", ".", "..", a trailing "/")."""
    if path == "/":
        return ()
    if not path.startswith("/"):
        return None
    parts = tuple(path[1:].split("/"))
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        return None
    return parts


def parse_leaf(text: str) -> Tuple[str, ...]:
    """The components of a leaf relative to the job's cgroup; () for the job's cgroup itself.

    Raises ValueError saying what was expected.
    """
    if not text:
        return ()
    parts = split_path("/" + text)
    if parts is None or any(_LITERAL.fullmatch(part) is None or len(part) > _NAME_MAX for part in parts):
        raise ValueError(
            f"leaf {text!r}: expected a path relative to the job's cgroup, such as session or step_0/tasks, "
            "or empty for the job's cgroup itself"
        )
    return parts


@dataclass(frozen=True)
class JobLocation:
    """What a path says: the job, its owner if the template has {uid}, and the components below the job's cgroup."""

    job_id: str
    uid: Optional[int]
    rest: Tuple[str, ...]


@dataclass(frozen=True)
class _Component:
    """One component of the template: ``before`` + placeholder + ``after``; ``placeholder`` None: a literal."""

    before: str
    placeholder: Optional[str] = None
    after: str = ""

    def value(self, name: str) -> Optional[str]:
        """What the placeholder stands for in ``name``; "" for a matching literal; None where it does not match."""
        if self.placeholder is None:
            return "" if name == self.before else None
        if not name.startswith(self.before) or not name.endswith(self.after):
            return None
        end = len(name) - len(self.after)
        # "ab".startswith("ab") and "ab".endswith("b") overlap: the two ends may not share characters.
        return name[len(self.before) : end] if end > len(self.before) else None

    def fill(self, value: str) -> str:
        """The component with the placeholder replaced."""
        return self.before + value + self.after


@dataclass(frozen=True)
class JobPath:
    """A parsed template. Build it with :meth:`parse_template`."""

    text: str
    _components: Tuple[_Component, ...]

    @classmethod
    def parse_template(cls, text: str) -> JobPath:
        """Read a template. Raises ValueError saying what is wrong and what was expected."""
        names = split_path(text)
        if not names:
            raise ValueError(f"job path {text!r}: {_EXPECTED}")
        components = tuple(_component(text, name) for name in names)
        kinds = [component.placeholder for component in components]
        if kinds[-1] != "job" or kinds.count("job") != 1 or kinds.count("uid") > 1:
            raise ValueError(f"job path {text!r}: {_EXPECTED}")
        longest = len(text) + JOB_ID_MAX + _UID_DIGITS_MAX
        if longest > _PATH_MAX:
            raise ValueError(f"job path {text!r}: longer than the kernel's {_PATH_MAX} bytes once filled in")
        return cls(text, components)

    @property
    def has_uid(self) -> bool:
        """Whether the path itself names the owner."""
        return any(component.placeholder == "uid" for component in self._components)

    @property
    def fixed(self) -> Tuple[str, ...]:
        """The components above the first placeholder: the directory every job is under. May be ()."""
        names: List[str] = []
        for component in self._components:
            if component.placeholder is not None:
                break
            names.append(component.before)
        return tuple(names)

    def parents(self, uid: Optional[int]) -> Tuple[str, ...]:
        """The components above the job's own. ``uid`` is needed exactly where the template has {uid}.

        Raises ValueError if it is missing or out of range.
        """
        names = [
            component.before if component.placeholder is None else component.fill(_uid_text(uid))
            for component in self._components[:-1]
        ]
        return tuple(names)

    def job_name(self, job_id: str) -> str:
        """The name of the job's directory. Raises ValueError if ``job_id`` cannot be one."""
        if not is_job_id(job_id):
            raise ValueError(f"job id {job_id!r}: expected [A-Za-z0-9][A-Za-z0-9_.-]{{0,62}}")
        return self._components[-1].fill(job_id)

    def job_of_name(self, name: str) -> Optional[str]:
        """The job id in the name of a directory; None if that is no job's name."""
        value = self._components[-1].value(name)
        return value if value is not None and is_job_id(value) else None

    def uid_of_name(self, name: str) -> Optional[int]:
        """The uid in the name of a directory at the {uid} level; None if that is no such name."""
        for component in self._components:
            if component.placeholder == "uid":
                value = component.value(name)
                return None if value is None else _uid_value(value)
        return None

    def render(self, uid: Optional[int], job_id: str) -> str:
        """The path of a job's cgroup. Raises ValueError as :meth:`parents` and :meth:`job_name` do."""
        return "/" + "/".join((*self.parents(uid), self.job_name(job_id)))

    def parse(self, path: str) -> Optional[JobLocation]:
        """Which job a cgroup path is in; None if it is in none, however alike it looks."""
        names = split_path(path)
        if names is None or len(names) < len(self._components):
            return None
        job_id = self.job_of_name(names[len(self._components) - 1])
        if job_id is None:
            return None
        uid: Optional[int] = None
        for component, name in zip(self._components[:-1], names):
            value = component.value(name)
            if value is None:
                return None
            if component.placeholder == "uid":
                uid = _uid_value(value)
                if uid is None:
                    return None
        return JobLocation(job_id, uid, names[len(self._components) :])


def _component(text: str, name: str) -> _Component:
    parts = _PLACEHOLDER.split(name)
    if len(parts) > 3:
        raise ValueError(f"job path {text!r}: {name!r} has two placeholders, expected at most one in a component")
    if any(_LITERAL.fullmatch(literal) is None for literal in parts[::2]):
        raise ValueError(f"job path {text!r}: {_EXPECTED}")
    if len(parts) == 1:
        if len(name) > _NAME_MAX:
            raise ValueError(f"job path {text!r}: {name!r} is longer than the kernel's {_NAME_MAX} bytes")
        return _Component(name)
    before, placeholder, after = parts
    if placeholder not in ("job", "uid"):
        raise ValueError(f"job path {text!r}: {{{placeholder}}} is unknown, expected {{job}} or {{uid}}")
    if len(before) + len(after) + JOB_ID_MAX > _NAME_MAX:
        raise ValueError(f"job path {text!r}: {name!r} is longer than the kernel's {_NAME_MAX} bytes once filled in")
    return _Component(before, placeholder, after)


def _uid_value(text: str) -> Optional[int]:
    if _UID.fullmatch(text) is None:
        return None
    uid = int(text)
    return uid if uid <= UID_MAX else None


def _uid_text(uid: Optional[int]) -> str:
    if uid is None or not 0 <= uid <= UID_MAX:
        raise ValueError(f"uid {uid}: expected 0..{UID_MAX}")
    return str(uid)
