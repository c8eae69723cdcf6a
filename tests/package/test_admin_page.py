"""docs/admin.md followed by a new administrator: the package in a minimal Debian 12, the page's own configuration, key
and PAM stack, and real ssh logins that are refused, adopted, and let in again after the removal.

systemd is not there, so the agent is started as its unit would; the jobs are cgroups (version 2) that the test makes,
under a name of its own in place of the page's.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any, Dict, Iterator, Set

import pytest

from documents import Block, blocks, files, read
from package.installed import Installed

pytestmark = pytest.mark.timeout(300)

PAGE = read("docs/admin.md")

# What a user asks in a session, one after the other; $$ is the session's own shell.
DOCUMENTS = (
    "status",
    "jobs",
    "whois 127.0.0.1:1 127.0.0.1:22",
    "whois 127.0.0.1:1 127.0.0.1:22 --at 127.0.0.1",
    "explain --user alice",
    "sessions",
    "whereami",
    "explain $$",
    "join 12",
)

# $1: the top of the jobs' path in the hierarchy. Documents of one line each go to standard output, the rest to standard
# error. The agent is root's sole child besides sshd, and both end with the script.
FOLLOWED = """\
set -e
top=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)$1
uid=$(id -u alice)
agent= sshd= holder=
leave() {
    for pid in $holder $sshd $agent; do kill $pid 2>/dev/null || :; done
    wait
    adoptd probe unload >&2 || :
    for i in $(seq 50); do
        [ ! -d "$top" ] || find "$top" -depth -type d -exec rmdir {} ';' 2>/dev/null || :
        [ -d "$top" ] || break
        sleep 0.1
    done
    rm -f /etc/adoptd/adoptd.key /etc/adoptd/conf.d/page.toml /root/agent
}
trap leave EXIT
sh -ec "$KEY_COMMAND"
adoptd config check >&2
adoptd run >&2 &
agent=$!
for i in $(seq 300); do ! adoptctl status >/dev/null 2>&1 || break; sleep 0.1; done
for i in $(seq 100); do ! adoptctl status --json | grep -q '"attached": true' || break; sleep 0.1; done
/usr/sbin/sshd -D -e -o ListenAddress=127.0.0.1 2>/root/sshd.log &
sshd=$!
for i in $(seq 100); do ! grep -q 'listening on' /root/sshd.log || break; sleep 0.1; done
ssh="ssh -o BatchMode=yes -o StrictHostKeyChecking=no alice@127.0.0.1"
say() { python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@"; }
if said=$(su alice -c "$ssh true" 2>&1); then say no_job in "$said"; else say no_job refused "$said"; fi
mkdir -p "$top/$uid/11"
sleep 0.05
mkdir -p "$top/$uid/12"
say jobs "$(adoptctl jobs --json)"
cat >/root/from_11 <<END
echo \\$\\$ >"$top/$uid/11/cgroup.procs"
exec su alice -c '$ssh "grep ^0: /proc/self/cgroup; adoptctl whereami --json"'
END
say from_11 "$(sh /root/from_11 2>&1)"
cat >/root/documents <<END
echo \\$\\$ >"$top/$uid/11/cgroup.procs"
exec su alice -c '$ssh "$DOCUMENTS"'
END
say documents "$(sh /root/documents)"
say outside "$(su alice -c "$ssh 'grep ^0: /proc/self/cgroup'" 2>&1)"
say doctor "$(adoptd doctor --json || :)"
"""


def _documents(text: str) -> Iterator[Dict[str, Any]]:
    """One after the other."""
    while text.strip():
        document, end = json.JSONDecoder().raw_decode(text.lstrip())
        yield document
        text = text.lstrip()[end:]


def described(command: str) -> Set[str]:
    """The keys that adoptctl(1) names for a command; a session's explanation has those of the list of sessions."""
    text = read("docs/man/adoptctl.1.in").partition(".Sh JSON")[2].partition(".Sh FILES")[0]
    entries = {name.split()[0]: entry for name, _, entry in (e.partition("\n") for e in text.split(".It Cm ")[1:])}
    found = entries[command] + (entries["sessions"] if command == "explain" else "")
    return set(re.findall(r"\b[a-z_]+\b", found))


def keys_of(value: object, within: str = "") -> Set[str]:
    """All keys of a document, but not those of its tables, whose names are what they are about."""
    if isinstance(value, list):
        return {key for each in value for key in keys_of(each)}
    if not isinstance(value, dict) or within in ("witnesses", "events", "unheard", "releases"):
        return set()
    return set(value) | {key for name, each in value.items() for key in keys_of(each, name)}


def block(heading: str, kind: str) -> Block:
    """The only block of this kind under a heading."""
    (found,) = [each for each in blocks(PAGE, kind) if each.heading == heading]
    return found


def of_agents(number: int) -> str:
    """A block of the section about how agents know each other, counted from 0: MUNGE, then the key file."""
    return [each for each in blocks(PAGE, "toml") if each.heading == "How agents know each other"][number].text


def test_as_a_new_administrator(installed: Installed) -> None:
    """Only what the page says: refused without a job, adopted into the one it came from, removed without harm."""
    installed.ensure()
    top = f"/adoptd-page-{os.getpid()}"
    jobs = next(each.text for each in blocks(PAGE, "toml") if 'backend = "cgroup"' in each.text)
    assert '"/batch.slice/{uid}/{job}"' in jobs
    settings = jobs.replace("/batch.slice", top) + of_agents(1)
    installed.system.write("/etc/adoptd/conf.d/page.toml", settings)
    stack = files([block("Debian", "pam")])
    before = installed.system.path("/etc/pam.d/sshd").read_text(encoding="utf-8")
    for name, text in stack.items():
        installed.system.write(name, text)
    key = next(each.text for each in blocks(PAGE, "sh") if "/dev/urandom" in each.text)
    _give_alice_a_key(installed)
    try:
        done = installed.system.run(
            ["sh", "-c", FOLLOWED, "sh", top],
            env={
                "KEY_COMMAND": key,
                "DOCUMENTS": "; ".join(f"adoptctl {each} --json" for each in DOCUMENTS).replace("$", "\\$"),
            },
            offline=True,
            timeout_s=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        seen: Dict[str, Any] = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
        assert seen["no_job"][0] == "refused"
        assert "you have no job running on" in seen["no_job"][1]
        assert {job["job"] for job in json.loads(seen["jobs"][0])["jobs"]} == {"11", "12"}
        where, _, told = seen["from_11"][0].partition("\n")
        assert where.endswith(f"{top}/{_uid(installed)}/11"), (seen, done.stderr)
        assert json.loads(told)["job"] == "11"
        assert seen["outside"][0].endswith(f"{top}/{_uid(installed)}/12"), seen
        documents = dict(zip(DOCUMENTS, _documents(seen["documents"][0])))
        for command in DOCUMENTS:
            assert keys_of(documents[command]) - described(command.split()[0]) == set(), (command, documents[command])
        assert (documents["explain $$"]["job"], documents["join 12"]["outcome"]) == ("11", "joined")
        findings = json.loads(seen["doctor"][0])["findings"]
        assert [each for each in findings if each["check"] == "pam" and each["grade"] != "ok"] == [], findings
        # What is left of it: the lines of the page, and no agent.
        assert installed.logs_in("root")
        removed = installed.remove()
        assert removed.returncode == 0, removed.stderr
        assert installed.logs_in("root")
        assert installed.logs_in("alice")
    finally:
        installed.system.write("/etc/pam.d/sshd", before)


def test_the_lines_are_added_and_taken_out(installed: Installed) -> None:
    """By the page's commands, to Debian's own file: what is shown there, then that without observing, then nothing."""
    installed.ensure()
    before = installed.system.path("/etc/pam.d/sshd").read_text(encoding="utf-8")
    add, enforce, back = [each.text for each in blocks(PAGE, "sh") if each.heading == "Begin by observing"]
    shown = [line for line in block("Begin by observing", "pam").text.splitlines() if "pam_adopt" in line]
    try:
        for commands, expected in (
            (add, shown),
            (enforce, [line.replace(" mode=observe", "") for line in shown]),
            (back, []),
        ):
            # Its last words are the doctor's, who finds no agent here.
            installed.system.run(["sh", "-ec", commands.replace("adoptd doctor", ":")])
            lines = installed.system.path("/etc/pam.d/sshd").read_text(encoding="utf-8").splitlines()
            assert [line for line in lines if line not in before.splitlines()] == expected
            if expected:
                assert lines[lines.index("@include common-account") + 1] == expected[0]
                assert lines[-1] == expected[1]
            # No agent answers, and by default that is left to the other lines.
            assert installed.logs_in("root")
            assert installed.logs_in("alice")
        assert installed.system.path("/etc/pam.d/sshd").read_text(encoding="utf-8") == before
        assert installed.system.path("/root/sshd.before-adoptd").read_text(encoding="utf-8") == before
    finally:
        installed.system.write("/etc/pam.d/sshd", before)


def _uid(installed: Installed) -> str:
    return installed.system.run(["id", "-u", "alice"]).stdout.strip()


def _give_alice_a_key(installed: Installed) -> None:
    script = "[ -e ~/.ssh/id_ed25519 ] || ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519; "
    script += (
        "grep -qxFf ~/.ssh/id_ed25519.pub ~/.ssh/authorized_keys || cat ~/.ssh/id_ed25519.pub >>~/.ssh/authorized_keys"
    )
    installed.system.run(["su", "alice", "-c", script])
