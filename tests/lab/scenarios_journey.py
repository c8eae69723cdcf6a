"""Scenarios about the way there: the source node, the network, other users, other ways to log in, the end of a job."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Optional, Tuple

from lab.etc_files import ACCESS_CONF, ALICE, BOB, CALLERID_TIMEOUT_MS, MAPPED_PORT, User, access_conf
from lab.lab import NOBODY_IN, REPORT, Lab, Login
from lab.outcome import Findings, Outcome, describe_ms
from lab.waiting import PATIENCE, has_ended, until

# A refused connection is answered in microseconds: half of what callerid may take here shows that nobody waited for it.
REFUSED_FAST_MS = CALLERID_TIMEOUT_MS / 2
# Dropped packets cost the 300 ms that callerid may take by default. Less would mean that nothing was dropped; more,
# that the agent waited for longer than its budget. The upper figure has room for a busy machine: it is what
# pam_slurm_adopt waits for. All three are longer in an emulated machine.
BUDGET_MS = 300 * PATIENCE
DROPPED_MS = (250.0 * PATIENCE, 2000.0 * PATIENCE)
ANSWERS = ("-o", "PreferredAuthentications=keyboard-interactive")
# The job's end must reach the client at once; the rest is room for a busy machine.
SESSION_END_S = 20.0


def source_without_agent_refused(lab: Lab) -> Outcome:
    """No agent on node1, where alice comes from: the connection to it is refused, and the login goes on at once."""
    seen = Findings()
    lab.pam("action_unknown=newest")
    tail = lab.second.syslog()
    with lab.jobs(2) as (older, newest), lab.agent_down(lab.first):
        seen.check("", f"job {newest} on node2", lab.login(job=older).landed)
    seen.record(lab.pam_records(tail))
    fast = seen.slowest_ms is not None and seen.slowest_ms < REFUSED_FAST_MS
    seen.check_true("PAM", f"under {REFUSED_FAST_MS:.0f} ms", fast, describe_ms(seen.slowest_ms))
    return seen.outcome("unknown, so action_unknown=newest")


def source_drops_packets(lab: Lab) -> Outcome:
    """node1 drops packets to its agent: callerid gives up within its budget, and the login goes on."""
    seen = Findings()
    lab.pam("action_unknown=newest")
    tail = lab.second.syslog()
    budget = lab.agent_settings(lab.second, f"[callerid]\ntimeout_ms = {BUDGET_MS}\n")
    with budget, lab.jobs(2) as (older, newest), lab.packets_dropped(lab.first):
        seen.check("", f"job {newest} on node2", lab.login(job=older).landed)
    seen.record(lab.pam_records(tail))
    least, most = DROPPED_MS
    within = seen.slowest_ms is not None and least < seen.slowest_ms < most
    seen.check_true("PAM", f"between {least:.0f} and {most:.0f} ms", within, describe_ms(seen.slowest_ms))
    return seen.outcome("unknown, so action_unknown=newest")


def _from_each_job(lab: Lab, seen: Findings, to: str = "", options: Tuple[str, ...] = ()) -> None:
    """Two jobs on both nodes; a login from inside each must land in it."""
    lab.pam("action_unknown=deny")
    tail = lab.second.syslog()
    with lab.jobs(2) as jobs:
        for job in jobs:
            login = lab.login(job=job, to=to, options=("-o", "BatchMode=yes", *options))
            seen.check(f"from {job}", f"job {job} on node2", login.landed)
    seen.record(lab.pam_records(tail))


def ipv6(lab: Lab) -> Outcome:
    """alice logs in over IPv6, from inside either of two jobs: the source node is asked over IPv6 too."""
    seen = Findings()
    _from_each_job(lab, seen, to=lab.second.ipv6)
    return seen.outcome(f"{lab.first.ipv6} to {lab.second.ipv6}")


def ipv4_mapped(lab: Lab) -> Outcome:
    """sshd listens dual-stack, so alice's IPv4 connection reaches it as ::ffff:10.66.0.1: named all the same."""
    seen = Findings()
    _from_each_job(lab, seen, options=("-p", str(MAPPED_PORT)))
    return seen.outcome("client and server spell one address in two ways")


def agent_restarted_between(lab: Lab) -> Outcome:
    """alice connects while node1's agent is down and logs in once it is back: her connection is still known."""
    seen = Findings()
    lab.pam("action_unknown=deny")
    tail = lab.second.syslog()
    gate = "/run/gates/restart"
    env = {"SSH_ASKPASS": "/run/askpass", "SSH_ASKPASS_REQUIRE": "force"}
    env.update({"ADOPTD_GATE": gate, "ADOPTD_ANSWER": ALICE.password})
    options = ("-i", f"{ALICE.home}/.ssh/locked", "-o", "IdentitiesOnly=yes")
    asked, opened = lab.first.path(f"{gate}.asked"), lab.first.path(f"{gate}.open")
    with lab.jobs(2) as (job, _):
        try:
            with lab.agent_down(lab.first):
                session = lab.start_login(job=job, options=options, env=env)
                until(asked.exists, "ssh asked for the key's passphrase")
                lab.second.flush_syslog()
                connected = [line for line in tail.lines() if f"Connection from {lab.first.ipv4} " in line]
                seen.check_true("connection", "made while it was down", bool(connected), "not made yet")
            opened.touch()
            seen.check("", f"job {job} on node2", session.end().landed)
        finally:
            for path in (asked, opened):
                path.unlink(missing_ok=True)
    seen.record(lab.pam_records(tail))
    return seen.outcome("what connect() noted is kept with the socket, not in the agent")


def other_users_job(lab: Lab) -> Outcome:
    """bob's process inside alice's job, and hers inside his: neither lands in the other's job, nor names one."""
    seen = Findings()
    tail = lab.second.syslog()
    with lab.jobs(2) as alices, lab.jobs(2, user=BOB) as bobs:
        for who, own, owner, foreign in ((BOB, bobs, ALICE, alices), (ALICE, alices, BOB, bobs)):
            lab.pam("action_unknown=deny")
            login = lab.login(user=who, job=foreign[0], job_of=owner)
            seen.check(f"{who.name} from {owner.name}'s {foreign[0]}, deny", NOBODY_IN, login.landed)
            lab.pam("action_unknown=newest")
            login = lab.login(user=who, job=foreign[0], job_of=owner)
            seen.check(f"{who.name} from {owner.name}'s {foreign[0]}, newest", f"job {own[1]} on node2", login.landed)
        # bob has alice's key: he may log in as her, but his process speaks for none of her jobs.
        lab.pam("action_unknown=deny")
        login = _login_with_key_of(lab, ALICE, process_user=BOB, job=alices[0])
        seen.check(f"alice's login by bob from her {alices[0]}, deny", NOBODY_IN, login.landed)
    seen.record(lab.pam_records(tail))
    return seen.outcome("the uid that called connect(), the job's owner and the login user must be one")


def _login_with_key_of(lab: Lab, user: User, *, process_user: User, job: str) -> Login:
    """A login as ``user`` by a process of another user's in the job, with a copy of the user's key."""
    copy = f"{process_user.home}/.ssh/copied"
    text = lab.first.path(f"{user.home}/.ssh/id_ed25519").read_text(encoding="ascii")
    lab.first.write(copy, text, mode=0o600, owner=process_user.uid)
    try:
        options = ("-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-i", copy)
        return lab.start_login(user=user, process_user=process_user, job=job, options=options).end()
    finally:
        lab.first.path(copy).unlink()


def multi_hop(lab: Lab) -> Outcome:
    """alice goes on from node2 back to node1: the job follows her, one question per hop."""
    seen = Findings()
    tails = [(node, node.syslog()) for node in (lab.first, lab.second)]
    for node, _ in tails:
        lab.pam("action_unknown=deny", node=node)
    with lab.jobs(2) as jobs:
        for job in jobs:
            login = lab.login(job=job, command=f"ssh -o BatchMode=yes {lab.first.name} '{REPORT}'")
            seen.check(f"from {job}", f"job {job} on node1", login.landed)
    for node, tail in tails:
        seen.record(lab.pam_records(tail, node=node))
    return seen.outcome("node1 to node2 to node1: the sessions in between are in the job as well")


def same_node(lab: Lab) -> Outcome:
    """alice logs in from node1 to node1: the agent asks itself, over the same network path."""
    seen = Findings()
    lab.pam("action_unknown=deny", node=lab.first)
    tail = lab.first.syslog()
    with lab.jobs(2, on=[lab.first]) as jobs:
        for job in jobs:
            seen.check(f"from {job}", f"job {job} on node1", lab.login(job=job, to=lab.first.name).landed)
    seen.record(lab.pam_records(tail, node=lab.first))
    return seen.outcome("both ends of the connection are sockets of one host")


def keyboard_interactive(lab: Lab) -> Outcome:
    """alice types a password: sshd asks PAM in a child that ends, so the session phase adopts the right process."""
    seen = Findings()
    lab.pam("action_unknown=deny")
    tail = lab.second.syslog()
    env = {"SSH_ASKPASS": "/run/askpass", "SSH_ASKPASS_REQUIRE": "force", "ADOPTD_ANSWER": ALICE.password}
    with lab.jobs(2) as jobs:
        for job in jobs:
            login = lab.login(job=job, options=ANSWERS, env=env)
            seen.check(f"from {job}", f"job {job} on node2", login.landed)
    account = seen.record(lab.pam_records(tail))
    session = lab.pam_records(tail, phase="session")
    apart = bool(account and session) and {r.pid for r in account}.isdisjoint({r.pid for r in session})
    phases = f"account in {[r.pid for r in account]}, session in {[r.pid for r in session]}"
    seen.check_true("phases", "account and session in different processes", apart, phases)
    return seen.outcome("adopting in the account phase alone would have moved a process that is about to end")


def pam_access_stack(lab: Lab) -> Outcome:
    """bob has no job, but pam_access below us lets him in: the session phase does not refuse him. alice it does not."""
    seen = Findings()
    lab.pam("action_no_jobs=deny", with_access=True)
    lab.second.write(ACCESS_CONF, access_conf(BOB))
    tail = lab.second.syslog()
    seen.check("bob", "no job on node2", lab.login(user=BOB).landed)
    seen.check("alice", NOBODY_IN, lab.login(user=ALICE).landed)
    with lab.jobs(1, on=[lab.second]) as (job,):
        seen.check("alice with a job", f"job {job} on node2", lab.login(user=ALICE).landed)
    seen.record(lab.pam_records(tail))
    return seen.outcome("account sufficient pam_adopt.so, then account required pam_access.so")


def _number_in(file: Path) -> Optional[int]:
    return int(file.read_text(encoding="ascii").strip() or 0) or None if file.exists() else None


def job_end_kills_session(lab: Lab) -> Outcome:
    """The job ends while alice's session is in it: the job manager kills the job's cgroup, and the session with it."""
    seen = Findings()
    lab.pam("action_unknown=deny")
    tail = lab.second.syslog()
    with lab.jobs(1, on=[lab.second]) as (job,):
        session = lab.start_login(command=f"{REPORT}; echo $$ > /run/gates/session; exec sleep 600")
        pid_file = lab.second.path("/run/gates/session")
        try:
            pid = until(lambda: _number_in(pid_file), "the session's pid")
        finally:
            pid_file.unlink(missing_ok=True)
        started = time.monotonic()
        lab.kind.end([job], ALICE, [lab.second])
        login = session.end()
        seconds = time.monotonic() - started
        seen.check("", f"job {job} on node2", login.landed)
        seen.check_true("session", "ended with it", has_ended(pid, SESSION_END_S), f"process {pid} is alive")
        seen.check_true("client", "told at once", seconds < SESSION_END_S, f"after {seconds:.1f} s")
    seen.record(lab.pam_records(tail))
    return seen.outcome(f"the client was gone {seconds * 1000:.0f} ms after the job's end")


def wrong_service_ignored(lab: Lab) -> Outcome:
    """The module is set up for another PAM service: sshd's logins are none of its business."""
    seen = Findings()
    lab.pam("service=login action_no_jobs=deny")
    decisions = lab.second.agent_log()
    seen.check("", "no job on node2", lab.login().landed)
    asked = [line for line in decisions.lines() if "phase=" in line]
    seen.check_true("agent", "not asked", not asked, f"asked: {asked}")
    return seen.outcome("service=login in the stack of sshd")


JOURNEY_SCENARIOS = (
    source_without_agent_refused,
    source_drops_packets,
    ipv6,
    ipv4_mapped,
    agent_restarted_between,
    other_users_job,
    multi_hop,
    same_node,
    keyboard_interactive,
    pam_access_stack,
    job_end_kills_session,
    wrong_service_ignored,
)
