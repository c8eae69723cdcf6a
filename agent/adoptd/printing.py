"""What ``adoptctl`` shows to people: one function per result, and one line per event.

Owns the layout and nothing else. Every text that came from the agent is scrubbed before it reaches a terminal:
user names, jobs and addresses are whatever others chose. Called by :mod:`adoptd.cli`.
"""

from __future__ import annotations

import pwd
import time
from typing import Dict, List, Optional

from adoptd.log import scrub
from adoptd.wire.control import Result

# Fields of an event's line that have a place of their own in it.
_PLACED = frozenset({"kind", "at", "uid", "user", "decision", "outcome", "job"})
# What a line about many leaves out; --json has it.
_LONG = frozenset({"stages", "service", "pid", "by_uid", "connection", "detail"})


def print_fields(result: Result, indent: str = "") -> None:
    """Name and value, one a line, nested objects indented; what is not known, or is empty, is left out."""
    for name, value in result.items():
        if isinstance(value, dict) and value:
            print(f"{indent}{scrub(name)}:")
            print_fields(value, indent + "  ")
        elif isinstance(value, (bool, int, float)) or value:
            print(f"{indent}{scrub(name) + ':':24} {_text(value)}")


def print_status(result: Result) -> None:
    """The fields, and of the probe's counters those that have counted: most never do."""
    probe = result.get("probe")
    if isinstance(probe, dict):
        result = {**result, "probe": with_counted(probe, "events")}
    print_fields(result)


def with_counted(result: Result, name: str) -> Result:
    """``result``, its table of counters ``name`` without those at 0."""
    counters = result.get(name)
    return {**result, name: {each: n for each, n in counters.items() if n}} if isinstance(counters, dict) else result


def print_jobs(result: Result) -> None:
    """The jobs of a node, and whose they are."""
    print(f"{'JOB':20} USER")
    for row in _rows(result, "jobs"):
        print(f"{_text(row['job']):20} {_user_name(row['uid'])}")


def print_sessions(result: Result) -> None:
    """The table of sessions."""
    print(f"{'SESSION':20} {'USER':12} {'JOB':12} {'SINCE':19} {'REASON':10} {'WITNESS':9} FROM")
    for row in _rows(result, "sessions"):
        since = _local_time(row.get("since"), "%Y-%m-%d %H:%M:%S")
        witness, source = _witness(row) or "-", row.get("from") or "-"
        words = (f"{_text(row[name]):{width}}" for name, width in (("session", 20), ("user", 12), ("job", 12)))
        print(*words, f"{since:19}", f"{_text(row['reason']):10}", f"{_text(witness):9}", _text(source))
        if row.get("ended"):
            print("  has ended, and left what is outside behind")
        why = "its job has ended" if row.get("job_ended") else "not in its job"
        for stray in _rows(row, "outside"):
            print(f"  outside: process {_text(stray['pid'])} in {_text(stray['cgroup'])}, {why}")
        more = int(_number(row.get("outside_count", 0))) - len(_rows(row, "outside"))
        if more > 0:
            print(f"  outside: {more} more, {why}")


def print_explained(result: Result) -> None:
    """The stages, then what came of them."""
    for stage in _rows(result, "stages"):
        print(f"{_number(stage['at_ms']):8.2f} ms  {_text(stage['stage']):14} {_text(stage['found'])}")
    shown = {name: value for name, value in result.items() if name not in ("stages", "since")}
    if "since" in result:
        shown["since"] = _local_time(result["since"], "%Y-%m-%d %H:%M:%S")
    print_fields(shown)


def print_whereami(result: Result) -> None:
    """Sentences for the user of a session."""
    job = result.get("job")
    print(f"job:     {_text(job) if job is not None else 'none ' + _text(result.get('why') or '')}".rstrip())
    limits = result.get("limits")
    if isinstance(limits, dict):
        used, most = limits.get("memory_used"), limits.get("memory_max")
        if used is not None or most is not None:
            print(f"memory:  {_bytes(used)} used by the job, limit {_bytes(most)}")
        if limits.get("cpus") is not None:
            print(f"cpus:    {_number(limits['cpus']):g} (of processors {_text(limits.get('cpu_list'))})")
        if limits.get("pids_max") is not None:
            running = "" if limits.get("pids_used") is None else f"{_text(limits['pids_used'])} running, "
            print(f"tasks:   {running}limit {_text(limits['pids_max'])}")
    session = result.get("session")
    if isinstance(session, dict):
        witness = _witness(session)
        why = _text(session.get("reason")) + (f" by {_text(witness)}" if witness else "")
        print(f"session: {_text(session.get('session'))}, put into job {_text(session.get('job'))} ({why})")
    others = result.get("other_jobs")
    if isinstance(others, list) and others:
        print(f"others:  {', '.join(_text(each) for each in others)}")
    if result.get("advice"):
        print(_text(result["advice"]))


def print_joined(result: Result) -> None:
    """What was moved, and what was not."""
    print(f"{_text(result['message'])}.")
    for row in _rows(result, "left"):
        print(f"  left behind: process {_text(row['pid'])}: {_text(row['why'])}")
    print("Variables such as SLURM_JOB_ID are in this shell as they were.")


def event_line(event: Result) -> str:
    """One event, or what the stream says of itself, in one line."""
    if "dropped" in event:
        return f"-- {_text(event['dropped'])} events were too many to be shown"
    if "kind" not in event:
        return ""
    who = event.get("user") or ("-" if event.get("uid") is None else _user_name(event["uid"]))
    what = event.get("decision") or event.get("outcome") or ""
    job = "" if event.get("job") is None else f" job {_text(event['job'])}"
    rest = {name: value for name, value in event.items() if name not in _PLACED | _LONG}
    more = " ".join(f"{scrub(name)}={_text(value)}" for name, value in rest.items())
    at = _local_time(event.get("at"), "%H:%M:%S")
    return f"{at} {_text(event['kind']):9} {_text(who):12} {_text(what)}{job} {more}".rstrip()


def _rows(result: Result, name: str) -> List[Dict[str, object]]:
    rows = result.get(name)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _witness(session: Result) -> object:
    """Who knew the job that the session is in: nobody, where its user chose it."""
    return None if session.get("reason") == "join" else session.get("witness")


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(each) for each in value)
    return scrub(f"{value:.2f}" if isinstance(value, float) else str(value))


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _local_time(value: object, pattern: str) -> str:
    return time.strftime(pattern, time.localtime(value)) if isinstance(value, (int, float)) else "-"


def _bytes(value: Optional[object]) -> str:
    """Bytes in the largest binary unit that leaves a figure before the point."""
    if not isinstance(value, int):
        return "none"
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1 << (10 * power):
            return f"{value / (1 << (10 * power)):.1f} {unit}"
    return f"{value} bytes"


def _user_name(uid: object) -> str:
    try:
        return scrub(pwd.getpwuid(int(str(uid))).pw_name)
    except (KeyError, ValueError, OverflowError):
        return _text(uid)
