"""The Debian package in a minimal Debian 12: what installing it does, and that the agent of it runs there."""

from __future__ import annotations

import json
import re
from typing import Any, Dict

import pytest

from package.installed import MODULE, RECOMMENDED, Installed
from package.test_deb import needed_packages

pytestmark = pytest.mark.timeout(900)

# The agent, asked by its own commands, on a cgroup v2 or hybrid host; ends with it, whatever happens.
AGENT = """\
set -e
mkdir -p /run/adoptd
printf '[jobs]\\nbackend = "cgroup"\\npath = "/adoptd-package-test/{uid}/{job}"\\n[seal]\\nscheme = "key"\\n' \
    >/etc/adoptd/conf.d/test.toml
trap 'rm -f /etc/adoptd/conf.d/test.toml /etc/adoptd/adoptd.key' EXIT
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n' >/etc/adoptd/adoptd.key
chmod 0600 /etc/adoptd/adoptd.key
adoptd config check >&2
adoptd probe load >&2
probe=$(adoptd probe status --json)
adoptd run >&2 &
agent=$!
trap 'kill $agent; wait $agent; adoptd probe unload >&2; rm -f /etc/adoptd/conf.d/test.toml /etc/adoptd/adoptd.key' EXIT
for i in $(seq 300); do
    ! status=$(adoptctl status --json 2>/dev/null) || break
    sleep 0.1
done
doctor=$(adoptd doctor --json) || true
if [ -n "$1" ]; then said=$(eval "$1" 2>&1) || said="$said [status $?]"; fi
metrics=$(python3 -c 'import urllib.request as u; print(u.urlopen("http://127.0.0.1:9830/metrics").read().decode())')
export probe status doctor said metrics
python3 -c 'import json, os
print(json.dumps({name: os.environ.get(name, "") for name in ("probe", "status", "doctor", "said", "metrics")}))'
"""


def _agent(installed: Installed, command: str = "") -> Dict[str, Any]:
    done = installed.system.run(["sh", "-c", AGENT, "sh", command], offline=True, timeout_s=400)
    found: Dict[str, Any] = json.loads(done.stdout)
    for name in ("probe", "status", "doctor"):
        found[name] = json.loads(found[name])
    return found


def test_no_pam_file_is_touched(installed: Installed) -> None:
    """Neither changed nor written again: bytes and times are what they were."""
    assert installed.pam_before == installed.pam_after
    assert not [name for name in installed.pam_after if "adopt" in name]


def test_it_says_once_what_to_add(installed: Installed) -> None:
    """The lines, at the first installation; not again as it is configured anew or upgraded."""
    installed.ensure()
    for kind in ("account", "session"):
        assert f"{kind} {RECOMMENDED} pam_adopt.so mode=observe" in installed.said
    again = installed.system.run(["dpkg", "--install", "/root/adoptd.deb"])
    assert "pam_adopt.so" not in again.stdout + again.stderr


def test_the_module_is_where_libpam_looks(installed: Installed) -> None:
    """Owned by the package, root's, and beside the distribution's own."""
    installed.ensure()
    module = installed.system.path(MODULE)
    assert (module.stat().st_uid, module.stat().st_mode & 0o777) == (0, 0o644)
    assert (module.parent / "pam_unix.so").exists()
    assert "adoptd" in installed.system.run(["dpkg-query", "--search", MODULE]).stdout


def test_the_configuration_is_right_as_installed(installed: Installed) -> None:
    """Every key in it, none of them set, nothing secret, a conffile."""
    installed.ensure()
    file = installed.system.path("/etc/adoptd/adoptd.toml")
    assert (file.stat().st_uid, file.stat().st_mode & 0o777) == (0, 0o644)
    done = installed.system.run(["adoptd", "config", "check"])
    assert "right" in done.stdout
    listed = installed.system.run(["dpkg-query", "-W", "-f", "${Conffiles}", "adoptd"]).stdout
    assert "/etc/adoptd/adoptd.toml" in listed


def test_the_distributions_own_versions_are_what_it_runs_on(installed: Installed) -> None:
    """Debian 12's Python and libraries, and no other copy of any of them."""
    installed.ensure()
    names = [
        "python3",
        "python3-bpfcc",
        "python3-psutil",
        "python3-prometheus-client",
        "python3-jwt",
    ]
    shown = installed.system.run(
        ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status} ${Version}\n", *names]
    ).stdout
    assert [line.split()[:2] for line in shown.splitlines()] == [[name, "installed"] for name in sorted(names)]
    versions = {name: version for name, _, version in map(str.split, shown.splitlines())}
    for name, _, there in needed_packages():
        # Up to the upstream version; what Debian appends changes with its updates.
        assert not there or re.match(rf"{re.escape(there)}([^\d.]|$)", versions[name]), name
    below = [path.name for path in installed.system.path("/usr/share/adoptd/agent").iterdir()]
    assert below == ["adoptd"]


def test_the_agent_runs(installed: Installed) -> None:
    """The probe compiles from the package's sources, the self-test passes, doctor finds the agent, metrics come."""
    installed.ensure()
    found = _agent(installed)
    assert found["probe"]["problem"] is None
    assert found["probe"]["self_test"] == "ok"
    assert found["status"]["witnesses"]["bpf"] == "ok"
    # Not a whole "ok": it was not started by systemd, and Debian's sshd has no line of ours yet.
    for check in ("configuration", "agent", "probe", "seal"):
        grades = {finding["grade"] for finding in found["doctor"]["findings"] if finding["check"] == check}
        assert "ok" in grades, found["doctor"]
        assert "failure" not in grades, found["doctor"]
    assert "\nadoptd_" in found["metrics"]


def test_a_user_without_a_job_is_refused_by_it(installed: Installed) -> None:
    """The package's module and the package's agent, asked by Debian's sshd: alice has no job, root passes."""
    installed.ensure()
    installed.pam(f"account {RECOMMENDED} pam_adopt.so", f"session {RECOMMENDED} pam_adopt.so")
    login = (
        "ssh -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        " -o 'ProxyCommand=/usr/sbin/sshd -i' {user}@localhost id -un"
    )
    said = _agent(installed, login.format(user="alice"))["said"]
    assert "you have no job running on" in said
    assert "[status 255]" in said
    assert _agent(installed, login.format(user="root"))["said"].splitlines()[-1] == "root"


def test_the_commands_import_nothing_of_the_callers(installed: Installed) -> None:
    """What root runs takes no module from the directory it is run in, nor from PYTHONPATH."""
    installed.ensure()
    trap = "import os\nos._exit(97)\n"
    for place in ("/tmp/trap/json.py", "/tmp/trap/adoptd/__init__.py"):
        installed.system.write(place, trap)
    for command in ("adoptd --version", "adoptctl --version"):
        done = installed.system.run(["sh", "-c", f"cd /tmp/trap && {command}"], env={"PYTHONPATH": "/tmp/trap"})
        assert done.stdout.startswith(command.split()[0])
    done = installed.system.run(["python3", "-c", "import json"], env={"PYTHONPATH": "/tmp/trap"}, check=False)
    assert done.returncode == 97


def test_man_finds_the_pages(installed: Installed) -> None:
    """Under the names that people type."""
    installed.ensure()
    for page in ("man8/adoptd.8", "man1/adoptctl.1", "man5/adoptd.toml.5", "man8/pam_adopt.8"):
        assert installed.system.path(f"/usr/share/man/{page}.gz").exists()
