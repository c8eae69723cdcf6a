"""What a user is told at a login: why it was refused and what to do next, or which job the session is in.

Owns the sentences, one table each, and what fits the PAM record. Must never name anything that the user may
not know: only their own jobs come in here. Called by adoption.

The notice is given by the session phase alone, because of what sshd makes of PAM_TEXT_INFO (seen with OpenSSH
9.2): the account phase's goes out as a banner, on the standard error of every login, scp's and rsync's among
them, and a second time at a shell; the session phase's is shown once, and to shells only.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Mapping, Sequence

from adoptd.model import Job
from adoptd.policy import Situation, Step
from adoptd.wire.pam import MESSAGE_BYTES

# How many job ids a message names before it says "and N more": the record's message is 512 bytes.
_JOBS_NAMED = 5

# What a site may add to a denial. The rest of the record is ours.
CONTACT_MAX = 160

_FAILED = "Try again in a moment."
_DENIALS: Mapping[Situation, str] = {
    Situation.NO_JOBS: "you have no job running on {node}. Log in to a node on which one of your jobs is running"
    "{look}.",
    Situation.GENERIC_FAILURE: "the jobs on {node} cannot be looked up at the moment. " + _FAILED,
    Situation.ADOPT_FAILURE: "the session could not be put into your job on {node}. " + _FAILED,
    Situation.UNKNOWN: "you have several jobs on {node} ({jobs}) and it could not be found out which of them this "
    "connection comes from. Connect from inside the job.",
    Situation.NAMED_FAILED: "the session could not be put into the job it comes from, and you have several on {node} "
    "({jobs}). " + _FAILED,
}

# Instead of NO_JOBS, for a user who has jobs here that stand still: of one, and of several.
_SUSPENDED: Mapping[bool, str] = {
    False: "your job {jobs} on {node} is suspended, and a session in it would stand still. Log in when it runs again.",
    True: "your jobs on {node} ({jobs}) are suspended, and a session in one of them would stand still. Log in when one "
    "of them runs again.",
}

# Where a user sees on which nodes their jobs run, by job manager. The node itself knows its own jobs only.
_LOOK: Mapping[str, str] = {"slurm": " (squeue --me lists them)"}

# Why the session is in this job, by the step that chose it.
_BECAUSE: Mapping[str, str] = {
    Step.ADOPT_NAMED.value: "your connection came from it",
    Step.ADOPT_NEWEST.value: "the newest of your {count} jobs here; which of them you came from could not be found out",
    Step.ADOPT_ONLY.value: "your only job here",
}

# Why a session that was let in is in no job.
_OUTSIDE: Mapping[Situation, str] = {
    Situation.NO_JOBS: "you have none running here",
    Situation.UNKNOWN: "which of yours your connection came from could not be found out",
    Situation.NAMED_FAILED: "it could not be put into the one your connection came from",
    Situation.ADOPT_FAILURE: "it could not be put into it",
    Situation.GENERIC_FAILURE: "your jobs could not be looked up",
}
# Those in which the user had several jobs to choose from.
_CHOICES = frozenset({Situation.UNKNOWN, Situation.NAMED_FAILED})


class Notice(enum.Enum):
    """When a session is told which job it is in."""

    CHOICE = "choice"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True)
class Texts:
    """What is said on this node. ``backend`` is the job manager's word; ``contact`` is the site's own sentence."""

    node: str
    backend: str = ""
    contact: str = ""
    notice: Notice = Notice.CHOICE

    def denial(self, situation: Situation, here: Sequence[Job], request_id: str, suspended: Sequence[Job] = ()) -> str:
        """Why nobody is let in, and what to do: for the user's terminal. ``here`` are the user's own jobs, and
        ``suspended`` those besides that nobody can log in to.

        ``request_id`` is what the user can quote; "" for a decision that is only explained.
        """
        why = _DENIALS.get(situation, "this login does not meet the rules of {node}.")
        if situation is Situation.NO_JOBS and suspended:
            why, here = _SUSPENDED[len(suspended) > 1], suspended
        body = why.format(node=self.node, jobs=_listed([job.id for job in here]), look=_LOOK.get(self.backend, ""))
        whom = self.contact or ("" if situation is Situation.NO_JOBS else "Tell your administrator if it goes on.")
        contact = f" {whom}" if whom else ""
        request = f" [request {request_id}]" if request_id else ""
        return fitting(f"Access to {self.node} refused: {body}", contact + request)

    def welcome(self, job_id: str, because: str, choices: Sequence[str]) -> str:
        """Which job the session is in and why, or "" where that is not wanted.

        ``because`` is the value of the step that chose it, ``choices`` all the user's jobs here at that time.
        """
        if self.notice is Notice.NEVER or (self.notice is Notice.CHOICE and len(choices) < 2):
            return ""
        why = _BECAUSE.get(because, because).format(count=len(choices))
        others = [each for each in choices if each != job_id]
        more = f" Also yours here: {_listed(others)}; adoptctl join JOB moves this session." if others else ""
        return fitting(f"This session is in job {job_id} on {self.node}: {why}.", more)

    def outside(self, situation: Situation) -> str:
        """That the session is in no job though it was let in, or "" where that is not wanted."""
        if self.notice is Notice.NEVER or (self.notice is Notice.CHOICE and situation not in _CHOICES):
            return ""
        return fitting(f"This session is in no job on {self.node}: {_OUTSIDE.get(situation, situation.value)}.", "")


def fitting(body: str, suffix: str) -> str:
    """Both, with ``body`` cut so that they fit the PAM record with its NUL."""
    room = MESSAGE_BYTES - 1 - len(suffix.encode("utf-8"))
    data = body.encode("utf-8")
    if len(data) > room:
        body = data[: room - 3].decode("utf-8", "ignore") + "..."
    return body + suffix


def is_contact(text: object) -> bool:
    """Whether a site's sentence can be shown as it is: pam_adopt.so shows printable ASCII and nothing else."""
    return isinstance(text, str) and len(text) <= CONTACT_MAX and text.isascii() and (text == "" or text.isprintable())


def _listed(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _JOBS_NAMED} more" if len(ids) > _JOBS_NAMED else ""
    return ", ".join(ids[:_JOBS_NAMED]) + more
