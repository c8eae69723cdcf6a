"""The units: what systemd itself says of them, and that they and the agent mean the same sockets, files and times."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Dict, List

import pytest

from adoptd import activation, cli, doors
from adoptd.config import AgentConfig, CalleridConfig
from adoptd.sockets import BACKLOG

UNITS = Path(__file__).resolve().parents[2] / "packaging" / "systemd"
SOCKETS = ("adoptd.socket", "adoptd-user.socket", "adoptd-callerid.socket")


def settings(name: str) -> Dict[str, List[str]]:
    """Every setting of a unit, in all its lines."""
    found: Dict[str, List[str]] = {}
    for line in (UNITS / name).read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """The units with a program that is there: the agent need not be installed where the tests run."""
    for unit in UNITS.iterdir():
        text = unit.read_text()
        (tmp_path / unit.name).write_text(text.replace("ExecStart=/usr/sbin/adoptd run", "ExecStart=/bin/true"))
    assert "ExecStart=/bin/true" in (tmp_path / "adoptd.service").read_text()
    return tmp_path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path("/usr/bin/systemd-analyze")
    assert program.exists(), "install systemd (./dev setup): it brings systemd-analyze"
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=60)


def test_systemd_understands_them(copies: Path) -> None:
    """Not one word of complaint, about a key, a value or a dependency."""
    done = analyze("verify", "--man=no", *(str(copies / name) for name in ("adoptd.service", *SOCKETS)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_exposure_is_what_the_documentation_says(copies: Path) -> None:
    """A setting that is lost shows here."""
    done = analyze("security", "--offline=true", "--no-pager", str(copies / "adoptd.service"))
    found = re.search(r"Overall exposure level for adoptd.service: (\d+\.\d)", done.stdout)
    assert found, done.stdout + done.stderr
    assert f"exposure {found[1]}." in (UNITS.parents[1] / "docs" / "restarts.md").read_text()


def test_each_socket_is_what_the_agent_takes_over() -> None:
    """Names, paths, ports and modes are those that the agent checks, under its default configuration."""
    pam, user, callerid = (settings(name) for name in SOCKETS)
    agent, peers = AgentConfig(), CalleridConfig()
    assert pam["FileDescriptorName"] == [activation.PAM]
    assert pam["ListenStream"] == [agent.pam_socket]
    assert [int(mode, 8) for mode in pam["SocketMode"]] == [doors.PAM_MODE]
    assert user["FileDescriptorName"] == [activation.USER]
    assert user["ListenStream"] == [agent.user_socket]
    assert [int(mode, 8) for mode in user["SocketMode"]] == [doors.USER_MODE]
    assert callerid["FileDescriptorName"] == [activation.CALLERID]
    assert callerid["BindIPv6Only"] == ["ipv6-only"]
    places = [f"[{each}]:{peers.port}" if ":" in each else f"{each}:{peers.port}" for each in peers.listen]
    assert callerid["ListenStream"] == places
    for each in (pam, user, callerid):
        assert each["Backlog"] == [str(BACKLOG)]
        assert each["Service"] == ["adoptd.service"]
        assert "Accept" not in each
    assert settings("adoptd.service")["Sockets"] == [" ".join(SOCKETS)]


def test_what_the_service_says_of_the_agent_is_so() -> None:
    """The directory of its sockets, and the exit status after which it is not started again."""
    service = settings("adoptd.service")
    assert [f"/run/{name}" for name in service["RuntimeDirectory"]] == [str(Path(AgentConfig().pam_socket).parent)]
    # Without it systemd removes the sockets with the service, and whoever waits in them.
    assert service["RuntimeDirectoryPreserve"] == ["yes"]
    assert service["RestartPreventExitStatus"] == [str(cli.EXIT_USAGE)]
    assert service["Type"] == ["notify"]


def test_each_capability_has_its_reason() -> None:
    """In the unit, beside it."""
    text = (UNITS / "adoptd.service").read_text()
    named = " ".join(settings("adoptd.service")["CapabilityBoundingSet"]).split()
    assert sorted(re.findall(r"^#  (CAP_[A-Z_]+) +\w", text, re.MULTILINE)) == sorted(named)


def test_nothing_hides_what_the_agent_must_see_or_change() -> None:
    """Each of these would let it start, and take something away that is missed in production only."""
    service = settings("adoptd.service")
    harmful = {"ProtectProc", "ProcSubset", "PrivateNetwork", "PrivateUsers", "PrivatePIDs", "Delegate", "User"}
    harmful |= {
        "MemoryDenyWriteExecute",
        "PrivateIPC",
        "RootDirectory",
        "DynamicUser",
        "TemporaryFileSystem",
        # It makes /sys/fs/bpf read-only whatever ReadWritePaths= says (systemd 252).
        "ProtectKernelTunables",
    }
    assert harmful.isdisjoint(service)
    assert service["ProtectControlGroups"] == ["no"]
    assert service["ReadWritePaths"] == ["-/sys/fs/bpf /sys/fs/cgroup"]
    (calls,) = service["SystemCallFilter"]
    assert {"bpf", "open_by_handle_at"} <= set(calls.split())
