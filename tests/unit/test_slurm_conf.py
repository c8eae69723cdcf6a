"""What slurmd goes by, found as slurmd finds it: files that are refused first. Needs root, to give files away."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import pytest

from adoptd.jobs import slurm_conf
from adoptd.jobs.slurm_conf import HostView, SlurmConf, SlurmOverrides, SlurmSettings
from adoptd.jobs.slurm_hosts import RunningSlurmd, aliases_of, expand, find_slurmd
from adoptd.jobs.slurm_paths import DEFAULT_SLICE
from adoptd.model import JobFault, JobManagerError

BASE = "SlurmUser=root\nSlurmdSpoolDir=/var/spool/x\nNodeName=node[1-3] CPUs=2\n"


@pytest.fixture(autouse=True)
def _looks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change is seen at the next question, not the first one a hundredth of a second later."""
    monkeypatch.setattr(slurm_conf, "LOOK_S", 0.0)


class Host:
    """A host with its own /proc, /etc/hosts and place for slurm.conf."""

    def __init__(self, base: Path, name: str = "node1.example.org") -> None:
        self.base = base
        self.proc = base / "proc"
        (self.proc / "self" / "ns").mkdir(parents=True)
        (self.proc / "self" / "ns" / "mnt").symlink_to("mnt:[1]")
        self.file = base / "etc" / "slurm.conf"
        self.file.parent.mkdir()
        (base / "hosts").write_text("127.0.0.1 localhost\n")
        self.view = HostView(str(self.proc), str(base / "hosts"), (str(self.file),), "/var/spool/slurmd", name)

    def write(self, text: str, name: str = "slurm.conf") -> Path:
        path = self.file.parent / name
        path.write_text(text)
        path.chmod(0o644)
        return path

    def conf(
        self,
        environment: Optional[Mapping[str, str]] = None,
        noted: Callable[[JobFault], None] = lambda _: None,
        **overrides: str,
    ) -> SlurmConf:
        return SlurmConf(SlurmOverrides(**overrides), environment or {}, self.view, noted)

    def settings(self, environment: Optional[Mapping[str, str]] = None, **overrides: str) -> SlurmSettings:
        return self.conf(environment, **overrides).settings()

    def process(
        self,
        pid: int,
        arguments: Sequence[str],
        comm: str = "slurmd",
        uids: str = "0\t0\t0\t0",
        exe: str = "/usr/sbin/slurmd",
        mounts: str = "mnt:[1]",
    ) -> None:
        directory = self.proc / str(pid)
        (directory / "ns").mkdir(parents=True)
        (directory / "comm").write_text(f"{comm}\n")
        # The start time, field 22, is the pid: an older process has a lower one.
        (directory / "stat").write_text(f"{pid} ({comm}) S {' '.join('0' * 18)} {pid} 0\n")
        (directory / "status").write_text(f"Name:\t{comm}\nUid:\t{uids}\nGid:\t0\n")
        (directory / "cmdline").write_bytes(b"\0".join(a.encode() for a in ("slurmd", *arguments)) + b"\0")
        (directory / "exe").symlink_to(exe)
        (directory / "ns" / "mnt").symlink_to(mounts)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_file_that_cannot_be_looked_at_is_not_a_file_that_is_not_there(
    host: Host, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A file server's bad moment must not make a node without Slurm of this one, where nobody would have a job."""
    host.write(BASE)
    look = os.stat

    def fail(path: Any, **more: Any) -> os.stat_result:
        if str(path) == str(host.file):
            raise OSError(number, os.strerror(number))
        return look(path, **more)

    monkeypatch.setattr(os, "stat", fail)
    assert host.conf().is_there()
    with pytest.raises(JobManagerError, match=os.strerror(number)):
        host.settings()


def test_no_file_is_an_error_that_says_where_it_was_looked_for(host: Host) -> None:
    """Not a default: another spool directory has other jobs."""
    with pytest.raises(JobManagerError, match=str(host.file)):
        host.settings()
    assert not host.conf().is_there()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BASE.replace("root", "nosuchuser"), "'nosuchuser' is no user"),
        (BASE + "Include gone.conf\n", "gone.conf: No such file"),
        (BASE + "include slurm.conf\n", "include each other"),
        (BASE.replace("/var/spool/x", "spool"), "'spool' is not an absolute path"),
        (BASE + "NodeName=node[3-1]\n", "range of hosts"),
        (BASE + "NodeName=node[a]\n", "no host list"),
    ],
)
def test_a_file_that_slurmd_would_not_start_with(host: Host, text: str, words: str) -> None:
    """Named, with the file or the word in it."""
    host.write(text.replace("NodeName=node[1-3] CPUs=2\n", "") if "range" in words or "list" in words else text)
    with pytest.raises(JobManagerError, match=words):
        host.settings()


def test_a_file_that_others_could_have_written(host: Host) -> None:
    """It says whose sockets are believed."""
    host.write(BASE).chmod(0o666)
    with pytest.raises(JobManagerError, match="everybody can write"):
        host.settings()
    host.file.chmod(0o644)
    os.chown(host.file, 1001, 1001)
    with pytest.raises(JobManagerError, match="owned by uid 1001"):
        host.settings()
    host.write(BASE.replace("=root", "=1001"))
    assert host.settings().trusted_uids == {0, 1001}


def test_an_included_file_that_others_could_have_written(host: Host) -> None:
    """As good as the file that includes it, or not at all."""
    host.write(BASE + "Include more.conf\n")
    os.chown(host.write("SlurmUser=1001\n", "more.conf"), 1001, 1001)
    with pytest.raises(JobManagerError, match=r"more\.conf: its owner"):
        host.settings()


def test_values(host: Host) -> None:
    """Keys in any case, comments, quotes, spaces around the sign, lines that go on, the last of two wins."""
    host.write(
        "# SlurmUser=nobody\n"
        "SLURMUSER=1001 # not 1002\n"
        "slurmdUser = 1003\n"
        "AuthType=auth/munge\n"
        'AuthType="auth/slurm"\n'
        'AuthInfo="socket=/run/m,ttl=60"\n'
        "SlurmdSpoolDir=\\\n/srv/%h/\\#1/%n\n"
        "PartitionName=p Nodes=ALL SlurmUser=7\n"
        "NodeName=n1 \\\n  NodeHostname=node1 \\\n  SlurmUser=9\n"
    )
    settings = host.settings()
    assert settings.trusted_uids == {0, 1001, 1003}
    assert (settings.auth_type, settings.auth_info) == ("auth/slurm", "socket=/run/m,ttl=60")
    assert settings.spool_dir == "/srv/node1/#1/n1"
    assert (settings.node_name, settings.node_name_certain) == ("n1", True)
    assert settings.conf_file == str(host.file)


def test_defaults(host: Host) -> None:
    """What slurmd does without a word of the administrator's."""
    host.write("ClusterName=c\n")
    settings = host.settings()
    assert settings.spool_dir == "/var/spool/slurmd"
    assert settings.trusted_uids == {0}
    assert settings.auth_type == "auth/munge"
    assert (settings.paths.slice, settings.paths.prepend) == ("system.slice", "/slurm")


def test_includes(host: Host) -> None:
    """Beside slurm.conf, by absolute path, by cluster name, and from within another."""
    (host.file.parent / "d").mkdir()
    host.write(f"ClusterName=hpc\ninclude\tnodes.%c\nInclude {host.file.parent}/d/users\n")
    host.write("NodeName=a NodeHostname=node1\nInclude d/auth\n", "nodes.hpc")
    host.write("SlurmUser=1001\n", "d/users")
    host.write("AuthType=auth/slurm\n", "d/auth")
    settings = host.settings()
    assert (settings.node_name, settings.auth_type) == ("a", "auth/slurm")
    assert settings.trusted_uids == {0, 1001}


def test_cgroup_settings_come_from_the_file_beside(host: Host) -> None:
    """Wherever slurm.conf is."""
    host.write(BASE)
    host.write("CgroupPlugin=cgroup/v2\nCgroupSlice=hpc.slice\nCgroupPrepend=/hpc\n", "cgroup.conf")
    paths = host.settings().paths
    assert (paths.node_name, paths.slice, paths.prepend) == ("node1", "hpc.slice", "/hpc")


@pytest.mark.parametrize(
    ("lines", "hosts", "expected"),
    [
        ("NodeName=node1", "", ("node1", True)),
        ("NodeName=c[01-20] NodeHostname=node[1-20]", "", ("c01", True)),
        ("NodeName=x[0-9]y[0-9] NodeHostname=h[0-98],node1", "", ("x9y9", True)),
        ("NodeName=DEFAULT CPUs=4\nNodeName=n9 NodeHostname=node9\nNodeName=n1 NodeHostName=node1", "", ("n1", True)),
        ("NodeName=batch7", "10.0.0.7 node1.example.org node1 batch7", ("batch7", True)),
        ("NodeName=localhost", "", ("localhost", True)),
        ("NodeName=node10,node[11-19]", "", ("node1", False)),
        ("", "", ("node1", False)),
    ],
)
def test_the_node_name_by_the_hosts_name(host: Host, lines: str, hosts: str, expected: Tuple[str, bool]) -> None:
    """NodeHostname, an alias in /etc/hosts, localhost; the bare host name is a guess and marked so."""
    host.write(f"SlurmUser=root\n{lines}\n")
    (host.base / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}\n")
    settings = host.settings()
    assert (settings.node_name, settings.node_name_certain) == expected


def test_who_is_asked_for_the_node_name_first(host: Host) -> None:
    """Our own setting, the slurmd that runs, the environment, the file."""
    host.write(BASE)
    assert host.settings().node_name == "node1"
    environment = {"SLURMD_NODENAME": "from_env"}
    assert host.settings(environment).node_name == "from_env"
    host.process(100, ["-D", "-N", "from_slurmd"])
    assert host.settings(environment).node_name == "from_slurmd"
    assert host.settings(environment, node_name="set").node_name == "set"


def test_who_is_asked_for_the_file_first(host: Host) -> None:
    """Our own setting, the slurmd that runs, SLURM_CONF, the usual places."""
    host.write(BASE)
    others: Dict[str, str] = {}
    for name in ("env", "slurmd", "set"):
        others[name] = str(host.write(f"{BASE}AuthType=auth/{name}\n", f"{name}.conf"))
    assert host.settings().conf_file == str(host.file)
    environment = {"SLURM_CONF": others["env"]}
    assert host.settings(environment).auth_type == "auth/env"
    host.process(100, ["-f", others["slurmd"]])
    assert host.settings(environment).auth_type == "auth/slurmd"
    assert host.settings(environment, conf_file=others["set"]).auth_type == "auth/set"


def test_everything_can_be_set_without_a_file(host: Host) -> None:
    """Then only root's sockets are believed."""
    settings = host.settings(node_name="n7", spool_dir="/spool/%n")
    assert (settings.spool_dir, settings.conf_file) == ("/spool/n7", None)
    assert settings.trusted_uids == {0}


@pytest.mark.parametrize(
    "facts",
    [
        {"uids": "1001\t0\t0\t0"},
        {"uids": "1001\t1001\t1001\t1001"},
        {"exe": "/usr/bin/sudo"},
        {"mounts": "mnt:[2]"},
        {"comm": "slurmd2"},
        {"comm": "slurmstepd"},
    ],
)
def test_a_process_that_merely_calls_itself_slurmd(host: Host, facts: Dict[str, str]) -> None:
    """A user's, a set-uid program that a user started, one of a container: none of them says who we are."""
    host.process(100, ["-N", "evil", "-f", "/tmp/evil.conf"], **facts)
    assert find_slurmd(str(host.proc)) == RunningSlurmd()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], RunningSlurmd()),
        (["-D", "-s"], RunningSlurmd()),
        (["-N", "n1"], RunningSlurmd("n1")),
        (["-Nn1"], RunningSlurmd("n1")),
        (["-DNn1", "-f/etc/x"], RunningSlurmd("n1", "/etc/x")),
        (["-DvvvN", "n1"], RunningSlurmd("n1")),
        (["-L", "-N", "-N", "n1"], RunningSlurmd("n1")),
        (["--conf-server", "c:6817", "-N", "n1"], RunningSlurmd("n1")),
        (["-N"], RunningSlurmd()),
    ],
)
@pytest.mark.parametrize("exe", ["/usr/sbin/slurmd", "/usr/sbin/slurmd-wlm", "/usr/sbin/slurmd (deleted)"])
def test_what_slurmd_was_started_with(host: Host, arguments: Sequence[str], expected: RunningSlurmd, exe: str) -> None:
    """As getopt reads it. Debian's file has another name; after an upgrade it is gone, and it is still slurmd."""
    host.process(100, arguments, exe=exe)
    host.process(101, [], comm="bash", exe="/bin/bash")
    assert find_slurmd(str(host.proc)) == expected


def test_several_slurmds_are_not_chosen_from(host: Host) -> None:
    """Two on one host: the administrator says which."""
    host.write(BASE)
    host.process(100, ["-N", "a"])
    host.process(101, ["-N", "b"])
    with pytest.raises(JobManagerError, match=r"several slurmds run here \(a, b\)"):
        host.settings()


def test_they_do_not_matter_where_everything_is_said(host: Host) -> None:
    """Then nobody is asked, and it costs nothing on a host with thousands of processes."""
    host.write(BASE)
    host.process(100, ["-N", "a"])
    host.process(101, ["-N", "b"])
    assert host.settings(node_name="n1", conf_file=str(host.file)).node_name == "n1"


def test_a_changed_file_is_read_again(host: Host) -> None:
    """At the next question, whichever of the files it is."""
    host.write(BASE + "Include more\n")
    host.write("AuthType=auth/one\n", "more")
    conf = host.conf()
    assert conf.settings().auth_type == "auth/one"
    assert conf.settings() is conf.settings()
    host.write("AuthType=auth/another\n", "more")
    assert conf.settings().auth_type == "auth/another"
    host.write("CgroupSlice=x.slice\n", "cgroup.conf")
    assert conf.settings().paths.slice == "x.slice"


def test_a_slurmd_started_later_is_seen_in_time(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every file as it was."""
    host.write(BASE)
    conf = host.conf()
    assert conf.settings().node_name == "node1"
    host.process(100, ["-N", "other"])
    assert conf.settings().node_name == "node1"
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert conf.settings().node_name == "other"


def test_a_slurmd_started_again_under_another_name_is_seen_at_once(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """While none runs its name stays: its steps do. What is noted and logged is noted once."""
    host.write(BASE)
    host.process(100, ["-N", "first"])
    noted: List[JobFault] = []
    conf = host.conf(noted=noted.append)
    assert conf.settings().node_name == "first"
    shutil.rmtree(host.proc / "100")
    assert [conf.settings().node_name for _ in range(3)] == ["first"] * 3
    assert noted == [JobFault.MANAGER_STOPPED]
    host.process(200, ["-N", "second"])
    host.write(BASE + "# touched\n")
    assert conf.settings().node_name == "second"
    host.process(300, ["-N", "third"])
    shutil.rmtree(host.proc / "200")
    assert conf.settings().node_name == "third"
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "fault=manager_stopped" in line
    assert "slurmd, process 100, is not running any more" in line


def test_a_slurmd_that_cannot_be_seen_is_not_taken_for_gone(host: Host) -> None:
    """For want of a descriptor, say: what was read stays in force, and no login fails of it."""
    host.write(BASE)
    host.process(100, ["-N", "first"])
    noted: List[JobFault] = []
    conf = host.conf(noted=noted.append)
    assert conf.settings().node_name == "first"
    (host.proc / "100" / "stat").unlink()
    (host.proc / "100" / "stat").mkdir()
    assert conf.settings().node_name == "first"
    assert noted == []


def test_half_a_file_is_not_taken(host: Host) -> None:
    """A slurm.conf that is being written has lost its controller."""
    host.write(BASE + "SlurmctldHost=c\n")
    noted: List[JobFault] = []
    conf = host.conf(noted=noted.append)
    before = conf.settings()
    host.write("AuthType=auth/half\n")
    assert [conf.settings() for _ in range(2)] == [before] * 2
    assert noted == [JobFault.CONFIGURATION]


def test_a_directory_with_no_steps_does_not_replace_one_with_some(host: Host, tmp_path: Path) -> None:
    """slurm.conf is changed before slurmd is restarted; once there are steps in the new one it counts."""
    old, new = tmp_path / "old", tmp_path / "new"
    for directory in (old, new):
        directory.mkdir()
    host.write(BASE + f"SlurmdSpoolDir={old}\n")
    conf = host.conf()
    name = conf.settings().node_name
    with socket.socket(socket.AF_UNIX) as step:
        step.bind(str(old / f"{name}_5.4294967292"))
    host.write(BASE + f"SlurmdSpoolDir={new}\n")
    assert conf.settings().spool_dir == str(old)
    with socket.socket(socket.AF_UNIX) as step:
        step.bind(str(new / f"{name}_6.4294967292"))
    host.write(BASE + f"SlurmdSpoolDir={new}\n# touched\n")
    assert conf.settings().spool_dir == str(new)


def test_what_was_read_stays_in_force_when_the_file_breaks(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """A slurm.conf that is being replaced costs no login; it is logged once, and what is right again is taken."""
    host.write(BASE)
    conf = host.conf()
    before = conf.settings()
    host.write("Include nothing\n")
    assert [conf.settings() for _ in range(3)] == [before] * 3
    host.file.unlink()
    assert conf.settings() == before
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    host.write(BASE + "AuthType=auth/new\n")
    assert conf.settings().auth_type == "auth/new"


@pytest.mark.parametrize(
    ("expression", "hosts"),
    [
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,7],x", ["n08", "n09", "n10", "n7", "x"]),
        ("r[1-2]n[1-2]s", ["r1n1s", "r1n2s", "r2n1s", "r2n2s"]),
    ],
)
def test_host_lists(expression: str, hosts: Sequence[str]) -> None:
    """In Slurm's order."""
    assert list(expand(expression)) == hosts


def test_a_host_list_without_end_is_refused() -> None:
    """Sixteen times what any cluster has."""
    with pytest.raises(JobManagerError, match="range"):
        list(expand("n[1-99999999]"))


def test_aliases(tmp_path: Path) -> None:
    """All other names on the lines that have this host's; no file is no alias."""
    file = tmp_path / "hosts"
    assert aliases_of("n1", str(file)) == []
    file.write_text("10.0.0.1 n1.example.org n1 batch1 # n9\n10.0.0.2 n2\n#10.0.0.3 n1 x\n")
    assert list(aliases_of("n1", str(file))) == ["n1.example.org", "batch1"]


def test_a_file_written_twice_within_one_tick_of_the_clock(tmp_path: Path) -> None:
    """It has the same size and the same time afterwards, and is read again all the same."""
    host = Host(tmp_path)
    conf = host.conf()
    for turn in range(20):
        host.write(BASE.replace("/var/spool/x", f"/var/spool/a{turn % 10}"))
        conf.settings()
        wanted = f"/var/spool/b{turn % 10}"
        host.write(BASE.replace("/var/spool/x", wanted))
        ends = time.monotonic() + 20.0
        while conf.settings().spool_dir != wanted:
            assert time.monotonic() < ends, f"turn {turn}: {conf.settings().spool_dir} is in force, not {wanted}"
            time.sleep(0.01)


def test_a_cgroup_conf_that_cannot_be_read_is_not_one_that_is_not_there(host: Host, tmp_path: Path) -> None:
    """By default names no job would be found in the site's own slice: everybody would be turned away."""
    host.write(BASE)
    conf = host.conf()
    host.write("CgroupSlice=jobs.slice\n", "cgroup.conf")
    assert conf.settings().paths.slice == "jobs.slice"
    beside = host.file.with_name("cgroup.conf")
    beside.unlink()
    beside.symlink_to(beside)
    assert conf.settings().paths.slice == "jobs.slice"
    with pytest.raises(JobManagerError, match=r"cgroup.conf: Too many levels of symbolic links"):
        host.settings()
    beside.unlink()
    assert host.settings().paths.slice == DEFAULT_SLICE


def test_a_proc_that_cannot_be_listed_leaves_in_force_what_was(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For want of a descriptor, say: no file says which slurmd runs, and the one before may be it still."""
    host.write(BASE)
    conf = host.conf()
    conf.settings()
    listed = os.listdir

    def list_or_fail(path: str) -> List[str]:
        if path == str(host.proc):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return listed(path)

    monkeypatch.setattr(os, "listdir", list_or_fail)
    host.write(BASE.replace("/var/spool/x", "/var/spool/y"))
    assert conf.settings().spool_dir == "/var/spool/x"
    assert "Too many open files" in caplog.text
