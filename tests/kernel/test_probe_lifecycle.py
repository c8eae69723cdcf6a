"""Loading, refusing, replacing and unloading the probe, on the real kernel."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Callable, List, Mapping, Union

import pytest

from adoptd import probe
from adoptd.deadline import Deadline
from adoptd.model import Connection, Endpoint, ProbeError
from adoptd.probe import store, syscalls
from adoptd.probe.record import Outcome
from adoptd.probe.sources import find_sources
from adoptd.probe.syscalls import LinkInfo, MapInfo, ProgInfo
from lab.waiting import until

PACKAGE_ROOT = str(Path(probe.__file__).resolve().parents[2])


def _connection(client: socket.socket) -> Connection:
    (source, source_port), (destination, destination_port) = client.getsockname()[:2], client.getpeername()[:2]
    return Connection(Endpoint.parse(f"{source}:{source_port}"), Endpoint.parse(f"{destination}:{destination_port}"))


def _listener() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(512)
    return listener


def _schema_dir(pin_dir: Path) -> Path:
    (only,) = [entry for entry in pin_dir.iterdir() if entry.is_dir()]
    return only


def _exists(kind: str, number: int) -> bool:
    return (
        subprocess.run(["bpftool", kind, "show", "id", str(number)], capture_output=True, check=False).returncode == 0
    )


def _in_child(code: str, *arguments: Union[str, Path], prefix: List[str]) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": PACKAGE_ROOT}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_a_missing_probe_is_said_to_be_missing(pin_dir: Path) -> None:
    """Nothing loaded is told apart from something broken."""
    with pytest.raises(probe.MissingProbe, match="not loaded"):
        probe.open_probe(pin_dir)
    status = probe.status(pin_dir)
    assert (status.loaded, status.pinned, status.problem is None) == (False, (), False)


def test_a_directory_that_is_not_on_bpffs_is_refused(tmp_path: Path) -> None:
    """Root's own directory on a disk is no place for pins, and none is mounted over what is in use."""
    directory = tmp_path / "adoptd"
    directory.mkdir(mode=0o700)
    with pytest.raises(ProbeError, match="expected bpf"):
        probe.open_probe(directory)
    (tmp_path / "in use").touch()
    with pytest.raises(ProbeError, match="nor an empty directory"):
        probe.load(directory)


def test_a_directory_open_to_others_is_refused(pin_dir: Path) -> None:
    """Mode 0755, another owner, or a symbolic link: neither opened, nor loaded into, nor unloaded."""
    probe.load(pin_dir)
    pin_dir.chmod(0o755)
    refusals: List[Callable[[Path], object]] = [probe.open_probe, probe.load, probe.unload]
    for refused in refusals:
        with pytest.raises(ProbeError, match="mode 0755"):
            refused(pin_dir)
    pin_dir.chmod(0o700)
    os.chown(pin_dir, 65534, 0)
    for refused in refusals:
        with pytest.raises(ProbeError, match="owner 65534"):
            refused(pin_dir)
    os.chown(pin_dir, 0, 0)
    link = pin_dir.parent / "link"
    link.symlink_to(pin_dir)
    for refused in refusals:
        with pytest.raises(ProbeError, match="symbolic link"):
            refused(link)
    link.unlink()
    probe.open_probe(pin_dir).close()


def test_a_schema_directory_open_to_others_is_refused(pin_dir: Path) -> None:
    """The check is of both levels."""
    probe.load(pin_dir)
    _schema_dir(pin_dir).chmod(0o755)
    with pytest.raises(ProbeError, match="mode 0755"):
        probe.open_probe(pin_dir)


def test_another_object_in_a_pins_place_is_refused(pin_dir: Path) -> None:
    """A map for another, a program for a map, a map of the same name and shape of another probe: all refused."""
    probe.load(pin_dir)
    other = pin_dir.parent / "other"
    probe.load(other)
    ours, theirs = _schema_dir(pin_dir), _schema_dir(other)

    def swapped(name: str, source: Path) -> None:
        fd = syscalls.obj_get(str(source))
        (ours / name).rename(ours / "aside")
        syscalls.obj_pin(fd, str(ours / name))
        os.close(fd)
        with pytest.raises(ProbeError, match=f"{name}.* is .*expected|adopt_query.* is .*expected"):
            probe.open_probe(pin_dir)
        (ours / name).unlink()
        (ours / "aside").rename(ours / name)
        probe.open_probe(pin_dir).close()

    try:
        swapped("adopt_counters", ours / "adopt_owners")
        swapped("adopt_owners", ours / "adopt_query")
        swapped("adopt_query", ours / "adopt_connect4")
        swapped("link_connect4", ours / "link_connect6")
        swapped("link_connect6", ours / "adopt_counters")
        for name in ("adopt_owners", "adopt_counters", "adopt_query", "adopt_connect4", "link_connect4"):
            swapped(name, theirs / name)
    finally:
        probe.unload(other)


def test_a_missing_pin_is_refused_and_repaired(pin_dir: Path) -> None:
    """Half a probe is no probe; loading again makes it whole."""
    probe.load(pin_dir)
    (_schema_dir(pin_dir) / "link_connect6").unlink()
    with pytest.raises(ProbeError, match="link_connect6"):
        probe.open_probe(pin_dir)
    assert probe.status(pin_dir).loaded
    assert "in place of" in probe.load(pin_dir)
    with probe.open_probe(pin_dir) as opened:
        probe.self_test(opened)


def test_a_probe_of_other_sources_is_refused(pin_dir: Path, other_sources: Path) -> None:
    """An agent does not talk to another release's probe, and says which it found."""
    probe.load(pin_dir, other_sources)
    with pytest.raises(ProbeError, match=r"has a probe of schema .*expected"):
        probe.open_probe(pin_dir)
    assert "has a probe of schema" in str(probe.status(pin_dir).problem)


def test_a_detached_probe_fails_open_and_self_test(pin_dir: Path) -> None:
    """A probe that hears nothing any more is noticed, by an agent that has it open and by one that opens it."""
    probe.load(pin_dir)
    with probe.open_probe(pin_dir) as opened:
        probe.self_test(opened)
        link = syscalls.obj_get(str(_schema_dir(pin_dir) / "link_connect4"))
        syscalls.link_detach(link)
        os.close(link)
        with pytest.raises(ProbeError, match=rf"unlabelled, expected pid {os.getpid()}"):
            probe.self_test(opened)
    with pytest.raises(ProbeError, match="link_connect4: is detached"):
        probe.open_probe(pin_dir)


def test_self_test_in_a_pid_namespace_fails(pin_dir: Path) -> None:
    """There the probe's pids are not the agent's: said with both numbers, not believed."""
    probe.load(pin_dir)
    code = "import sys; from pathlib import Path; from adoptd import probe; p = Path(sys.argv[1]); "
    code += "probe.self_test(probe.open_probe(p))"
    done = _in_child(code, pin_dir, prefix=["unshare", "--pid", "--fork"])
    assert done.returncode != 0
    assert "expected pid 1 uid 0" in done.stderr.splitlines()[-1]


def test_self_test_without_a_loopback_fails(pin_dir: Path) -> None:
    """A namespace whose loopback is down: the error says what could not be done, in bounded time."""
    probe.load(pin_dir)
    code = "import sys; from pathlib import Path; from adoptd import probe; p = Path(sys.argv[1]); "
    code += "probe.self_test(probe.open_probe(p))"
    done = _in_child(code, pin_dir, prefix=["unshare", "--net"])
    assert "cannot connect to 127.0.0.1" in done.stderr.splitlines()[-1]


def test_where_bpf_is_refused_the_error_says_so(pin_dir: Path) -> None:
    """Root without the capabilities, and not root at all: one line that names what is missing, nothing left."""
    arguments = ["load", "--pin-dir", str(pin_dir), "--source-dir", str(find_sources())]
    code = "import sys; from adoptd.probe import loader; sys.exit(loader.main(sys.argv[1:]))"
    poor = ["setpriv", "--bounding-set=-sys_admin,-bpf", "--inh-caps=-sys_admin,-bpf"]
    done = _in_child(code, *arguments, prefix=poor)
    assert done.returncode == 1
    assert "BPF is not permitted" in done.stderr.splitlines()[-1]
    assert list(pin_dir.iterdir()) == []
    # Imported first: the source tree may lie where only root can read.
    as_nobody = code.replace("; sys.exit", "; import os; os.setgroups([]); os.setuid(65534); sys.exit")
    done = _in_child(as_nobody, *arguments, prefix=[])
    assert done.stderr.splitlines()[-1] == "BPF is not permitted: must be root"


def test_what_is_loaded_does_not_depend_on_kernel_addresses(pin_dir: Path) -> None:
    """Shown to CAP_SYSLOG alone on most hosts, and to nobody in the agent's unit: bcc looks for helpers by them."""
    hidden = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /proc/kallsyms && exec "$@"', "sh"]
    code = "import sys; from pathlib import Path; from adoptd import probe; print(probe.load(Path(sys.argv[1])))"
    done = _in_child(code, pin_dir, prefix=hidden)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"loaded, schema {_schema_dir(pin_dir).name}\n"


def test_without_bcc_the_error_names_the_package(pin_dir: Path) -> None:
    """The distribution's package is named, and PyPI's other bcc is not taken for it."""
    arguments = ["load", "--pin-dir", str(pin_dir), "--source-dir", str(find_sources())]
    code = "import sys; from adoptd.probe import loader; sys.modules['bcc'] = {}; sys.exit(loader.main(sys.argv[1:]))"
    done = _in_child(code.format("None"), *arguments, prefix=[])
    assert "python3-bpfcc" in done.stderr.splitlines()[-1]
    done = _in_child(code.format("type(sys)('bcc')"), *arguments, prefix=[])
    assert "not PyPI's" in done.stderr.splitlines()[-1]


def test_sources_that_do_not_compile_leave_the_old_probe(pin_dir: Path, other_sources: Path) -> None:
    """A failed upgrade changes nothing: the old probe is there, attached, and nothing else is."""
    probe.load(pin_dir)
    (other_sources / "probe.c").write_text("this is not C")
    with pytest.raises(ProbeError, match="does not compile"):
        probe.load(pin_dir, other_sources)
    _schema_dir(pin_dir)
    with probe.open_probe(pin_dir) as opened:
        probe.self_test(opened)


def test_loading_twice_changes_nothing(pin_dir: Path) -> None:
    """The second load finds the first: same schema, same maps, labels kept."""
    assert probe.load(pin_dir).startswith("loaded")
    with (
        probe.open_probe(pin_dir) as opened,
        _listener() as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        assert probe.load(pin_dir).startswith("already loaded")
        with probe.open_probe(pin_dir) as again:
            assert again.ask(_connection(client)).record == opened.ask(_connection(client)).record is not None


def test_racing_loaders_make_one_probe(pin_dir: Path) -> None:
    """Of loaders started at once one loads, the others find it done."""
    said: List[str] = []
    threads = [threading.Thread(target=lambda: said.append(probe.load(pin_dir))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(words.split(",")[0] for words in said) == ["already loaded", "already loaded", "loaded"]
    assert probe.status(pin_dir).problem is None


def test_what_a_killed_loader_left_is_swept(pin_dir: Path) -> None:
    """The next load removes it, pins and all."""
    probe.load(pin_dir)
    left = pin_dir / "unfinished_1"
    left.mkdir(mode=0o700)
    fd = syscalls.obj_get(str(next(pin_dir.glob("*/adopt_counters"))))
    syscalls.obj_pin(fd, str(left / "adopt_counters"))
    os.close(fd)
    assert probe.load(pin_dir).startswith("already loaded")
    assert not left.exists()


def test_upgrade_leaves_no_gap(pin_dir: Path, other_sources: Path) -> None:
    """Connections made before, during and after an upgrade are all known to the new probe, and the old one is gone."""
    probe.load(pin_dir)
    old_links = [entry.name for entry in pin_dir.iterdir()]
    clients: List[socket.socket] = []
    # However long the loader takes, some are left for afterwards.
    most = [400]
    stop = threading.Event()
    with _listener() as listener:

        def connect_on() -> None:
            while not stop.is_set():
                if len(clients) < most[0]:
                    clients.append(socket.create_connection(listener.getsockname()))
                stop.wait(0.005)

        connecting = threading.Thread(target=connect_on)
        connecting.start()
        try:
            until(lambda: len(clients) >= 3, "connections before the upgrade")
            assert "in place of" in probe.load(pin_dir, other_sources)
            so_far = len(clients)
            most[0] = so_far + 10
            until(lambda: len(clients) >= so_far + 3, "connections after the upgrade")
        finally:
            stop.set()
            connecting.join()
        with probe.open_probe(pin_dir, other_sources) as opened:
            records = [opened.ask(_connection(client)).record for client in clients]
    for client in clients:
        client.close()
    assert {None if record is None else record.pid for record in records} == {os.getpid()}
    assert {record.seeded for record in records if record is not None} == {True, False}
    assert [entry.name for entry in pin_dir.iterdir()] != old_links
    _schema_dir(pin_dir)


def test_unload_leaves_nothing(pin_dir: Path) -> None:
    """Detached at once, and soon no map, program or link of ours is in the kernel; a second unload is no error."""
    probe.load(pin_dir)
    schema_dir = _schema_dir(pin_dir)
    ids = []
    for pin in schema_dir.iterdir():
        fd = syscalls.obj_get(str(pin))
        kind = syscalls.kind_of(fd)
        describe: Mapping[str, Callable[[int], Union[MapInfo, ProgInfo, LinkInfo]]] = {
            "bpf-map": syscalls.map_info,
            "bpf-prog": syscalls.prog_info,
            "bpf-link": syscalls.link_info,
        }
        ids.append((kind[4:], describe[kind](fd).id))
        os.close(fd)
    # The probe's and, with four programs more, the watch's.
    assert Counter(kind for kind, _ in ids) == {"link": 2 + 4, "map": 5 + 3, "prog": 3 + 4}
    assert all(_exists(kind, number) for kind, number in ids)
    assert probe.unload(pin_dir).startswith("unloaded")
    assert not pin_dir.exists()
    until(lambda: not any(_exists(kind, number) for kind, number in ids), f"{ids} are gone")
    assert probe.unload(pin_dir) == "was not loaded"


def test_several_probes_do_not_disturb_each_other(pin_dir: Path) -> None:
    """Two copies, as for two nodes on one kernel: both hear every connect, and one's end is not the other's."""
    other = pin_dir.parent / "other"
    probe.load(pin_dir)
    probe.load(other)
    try:
        with (
            probe.open_probe(pin_dir) as ours,
            _listener() as listener,
            socket.create_connection(listener.getsockname()) as client,
        ):
            with probe.open_probe(other) as theirs:
                for opened in (ours, theirs):
                    record = opened.ask(_connection(client)).record
                    assert record is not None
                    assert record.pid == os.getpid()
            probe.unload(other)
            probe.self_test(ours)
            assert ours.ask(_connection(client)).record is not None
    finally:
        probe.unload(other)


def test_bpffs_is_mounted_where_it_is_missing(tmp_path: Path) -> None:
    """In a mount namespace of its own: an empty parent gets a bpffs, once, and the probe works from there."""
    parent = tmp_path / "bpf"
    parent.mkdir()
    code = """
import sys
from pathlib import Path
from adoptd import probe
from adoptd.probe import mounts
pin_dir = Path(sys.argv[1])
probe.load(pin_dir)
probe.load(pin_dir)
found = [mount.fstype for mount in mounts.mounts() if mount.point == str(pin_dir.parent)]
probe.self_test(probe.open_probe(pin_dir))
probe.unload(pin_dir)
print(found)
"""
    done = _in_child(code, parent / "adoptd", prefix=["unshare", "--mount", "--propagation", "private"])
    assert (done.stderr, done.stdout) == ("", "['bpf']\n")


def test_a_private_cgroup2_serves_where_none_is_mounted(pin_dir: Path) -> None:
    """Hosts with version 1 only: the probe attaches all the same, and the mount table is as before."""
    code = """
import subprocess, sys
from pathlib import Path
from adoptd import probe
from adoptd.probe import mounts
pin_dir = Path(sys.argv[1])
for mount in list(mounts.mounts()):
    if mount.fstype == "cgroup2":
        subprocess.run(["umount", mount.point], check=True)
probe.load(pin_dir)
assert "cgroup2" not in [mount.fstype for mount in mounts.mounts()]
probe.self_test(probe.open_probe(pin_dir))
"""
    done = _in_child(code, pin_dir, prefix=["unshare", "--mount", "--propagation", "private"])
    assert (done.returncode, done.stderr) == (0, "")


def test_a_lock_held_too_long_is_an_error(pin_dir: Path) -> None:
    """A stuck loader does not make the next one wait for ever."""
    probe.load(pin_dir)
    held, wanted = store.locked(pin_dir, Deadline.after_ms(1000)), store.locked(pin_dir, Deadline.after_ms(50))
    with held, pytest.raises(ProbeError, match="locked by another loader"), wanted:
        pass


def test_descriptors_are_closed_and_not_inherited(pin_dir: Path) -> None:
    """Opening and refusing leak nothing, and no child of the agent gets the probe."""
    probe.load(pin_dir)
    before = set(os.listdir("/proc/self/fd"))
    opened = probe.open_probe(pin_dir)
    ours = set(os.listdir("/proc/self/fd")) - before
    assert len(ours) == 2
    assert not any(os.get_inheritable(int(fd)) for fd in ours)
    opened.close()
    opened.close()
    (_schema_dir(pin_dir) / "link_connect6").unlink()
    with pytest.raises(ProbeError):
        probe.open_probe(pin_dir)
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ProbeError, match="after it was closed"):
        opened.counters()


def test_seeding_skips_what_is_not_connected(pin_dir: Path) -> None:
    """Listeners and sockets that were never connected get no label while seeding: a later connect() labels them."""
    with _listener() as listener, socket.socket() as idle:
        probe.load(pin_dir)
        with probe.open_probe(pin_dir) as opened:
            idle.connect(listener.getsockname())
            answer = opened.ask(_connection(idle))
            assert answer.outcome is Outcome.LABELLED
            assert answer.record is not None
            assert not answer.record.seeded
            assert opened.counters()["seed_passes"] == 1
