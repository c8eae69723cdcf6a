"""Scenarios about the decision: how many jobs there are, what the options say, what is down or broken."""

from __future__ import annotations

from lab.etc_files import ROOT
from lab.lab import NOBODY_IN, Lab
from lab.outcome import Findings, Outcome, tally

ROUNDS = 10


def no_job_denied(lab: Lab) -> Outcome:
    """alice has no job on node2: she is refused, and told why."""
    seen = Findings()
    lab.pam("action_no_jobs=deny")
    tail = lab.second.syslog()
    login = lab.login()
    seen.record(lab.pam_records(tail))
    told = " ".join(line.strip() for line in login.errors.splitlines() if "job" in line.lower())
    seen.check("", NOBODY_IN, login.landed)
    seen.check_true("message", "names the reason", bool(told), f"says nothing of a job: {login.errors!r}")
    return seen.outcome(f"alice reads: {told}")


def no_job_ignored(lab: Lab) -> Outcome:
    """alice has no job on node2, and the administrator chose action_no_jobs=ignore: she is let in, into no job."""
    seen = Findings()
    lab.pam("action_no_jobs=ignore")
    tail = lab.second.syslog()
    seen.check("", "no job on node2", lab.login().landed)
    seen.record(lab.pam_records(tail))
    return seen.outcome("the rest of the PAM stack decided")


def one_job(lab: Lab) -> Outcome:
    """alice has one job on node2 and comes from outside any job: there is one place to land in."""
    seen = Findings()
    lab.pam("action_unknown=deny")
    tail = lab.second.syslog()
    with lab.jobs(1, on=[lab.second]) as (job,):
        seen.check("", f"job {job} on node2", lab.login().landed)
    seen.record(lab.pam_records(tail))
    return seen.outcome("the source node need not be asked")


def two_jobs_same_source(lab: Lab) -> Outcome:
    """alice has two jobs on both nodes: ssh from inside a job lands in that job, in turn and all at once."""
    seen = Findings()
    lab.pam("action_unknown=deny")
    tail = lab.second.syslog()
    with lab.jobs(2) as jobs:
        in_turn = [(job, lab.login(job=job).landed) for _ in range(ROUNDS) for job in jobs]
        sessions = [(job, lab.start_login(job=job)) for _ in range(ROUNDS) for job in jobs]
        at_once = [(job, session.end().landed) for job, session in sessions]
        for how, logins in (("in turn", in_turn), ("at once", at_once)):
            for job in jobs:
                places = [landed for source, landed in logins if source == job]
                seen.check(f"from {job} {how}", tally([f"job {job} on node2"] * ROUNDS), tally(places))
    seen.record(lab.pam_records(tail))
    return seen.outcome(f"{4 * ROUNDS} logins; node1 named the job of each connection")


def two_jobs_unknown_newest(lab: Lab) -> Outcome:
    """alice has two jobs on node2 and comes from outside any job, with action_unknown=newest: the newer one it is."""
    seen = Findings()
    lab.pam("action_unknown=newest")
    tail = lab.second.syslog()
    with lab.jobs(2, on=[lab.second]) as (_, newest):
        seen.check("", f"job {newest} on node2", lab.login().landed)
    seen.record(lab.pam_records(tail))
    return seen.outcome("node1 answered that the connection is in no job")


def unknown_deny(lab: Lab) -> Outcome:
    """The same with action_unknown=deny: alice is refused, and told why."""
    seen = Findings()
    lab.pam("action_unknown=deny")
    tail = lab.second.syslog()
    with lab.jobs(2, on=[lab.second]):
        login = lab.login()
        seen.check("", NOBODY_IN, login.landed)
    seen.record(lab.pam_records(tail))
    told = " ".join(line.strip() for line in login.errors.splitlines() if "job" in line.lower())
    seen.check_true("message", "names the reason", bool(told), f"says nothing of a job: {login.errors!r}")
    return seen.outcome(f"alice reads: {told}")


def unknown_allow(lab: Lab) -> Outcome:
    """The same with action_unknown=allow: alice is let in, into no job."""
    seen = Findings()
    lab.pam("action_unknown=allow")
    tail = lab.second.syslog()
    with lab.jobs(2, on=[lab.second]):
        seen.check("", "no job on node2", lab.login().landed)
    seen.record(lab.pam_records(tail))
    return seen.outcome("allowed, unadopted")


def root_ignored(lab: Lab) -> Outcome:
    """root logs in, with every option at deny: let through before anything is asked."""
    seen = Findings()
    lab.pam("action_no_jobs=deny action_unknown=deny action_adopt_failure=deny action_generic_failure=deny")
    decisions = lab.second.agent_log()
    seen.check("", "no job on node2", lab.login(user=ROOT).landed)
    asked = [line for line in decisions.lines() if "phase=" in line]
    seen.check_true("agent", "not asked", not asked, f"asked: {asked}")
    return seen.outcome("decided inside the PAM module")


def root_with_agent_down(lab: Lab) -> Outcome:
    """root logs in while the agent of node2 is down, with every option at deny: nobody can lock out root."""
    seen = Findings()
    lab.pam("action_no_jobs=deny action_unknown=deny action_adopt_failure=deny action_generic_failure=deny")
    with lab.agent_down(lab.second):
        seen.check("", "no job on node2", lab.login(user=ROOT).landed)
    return seen.outcome("decided inside the PAM module")


def agent_down_generic_failure(lab: Lab) -> Outcome:
    """The agent of node2 is down: action_generic_failure says what happens to alice, whatever it says."""
    seen = Findings()
    tail = lab.second.syslog()
    with lab.jobs(1, on=[lab.second]), lab.agent_down(lab.second):
        for action, expected in (("ignore", "no job on node2"), ("allow", "no job on node2"), ("deny", NOBODY_IN)):
            lab.pam(f"action_generic_failure={action}")
            seen.check(action, expected, lab.login().landed)
    records = seen.record(lab.pam_records(tail))
    verdicts = " ".join(record.fields.get("verdict", "?") for record in records)
    seen.check("verdicts", "ignore success deny", verdicts)
    return seen.outcome("the PAM module applies the option by itself")


def adopt_failure_allow(lab: Lab) -> Outcome:
    """alice's one job cannot take a process, with action_adopt_failure=allow: she is let in, into no job."""
    seen = Findings()
    lab.pam("action_adopt_failure=allow")
    tail = lab.second.syslog()
    with lab.broken_job(lab.second):
        seen.check("", "no job on node2", lab.login().landed)
    seen.record(lab.pam_records(tail))
    return seen.outcome(f"{lab.kind.why_broken}; no hierarchy is left half done")


def adopt_failure_deny(lab: Lab) -> Outcome:
    """The same with action_adopt_failure=deny: alice is refused."""
    seen = Findings()
    lab.pam("action_adopt_failure=deny")
    tail = lab.second.syslog()
    with lab.broken_job(lab.second):
        seen.check("", NOBODY_IN, lab.login().landed)
    seen.record(lab.pam_records(tail))
    return seen.outcome(lab.kind.why_broken)


DECISION_SCENARIOS = (
    no_job_denied,
    no_job_ignored,
    one_job,
    two_jobs_same_source,
    two_jobs_unknown_newest,
    unknown_deny,
    unknown_allow,
    root_ignored,
    root_with_agent_down,
    agent_down_generic_failure,
    adopt_failure_allow,
    adopt_failure_deny,
)
