"""The faults that the alerts are for, made on the fleet of provoked.py as somebody on call would meet them, and mended.

Each is a context: made on entering, mended on leaving. Logins that meet it go on when it is mended, so that it is the
mending that ends the alert. Two are simulated in part, and say so: a leak, and an agent that is stuck.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, ContextManager, Iterator, List, Optional, Tuple

from dashboards.fleet import impostor
from dashboards.provoked import CLUSTER, EVERYBODY, LOST_CLUSTER, Scene, end, patiently
from lab.etc_files import ALICE, BOB, ROOT, User
from lab.node import PYTHON, Node
from lab.node_runner import SOURCE_IN_NODE
from lab.nodes import SOURCE_DIR
from lab.waiting import until

# ptrace(2), wait(2)
PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH, WALL = 0x4206, 0x4207, 17, 0x40000000

# More connections than the agent lets one address have, none of which says a word, again and again.
_FLOOD = """
import socket, sys, time
while True:
    held = [socket.create_connection((sys.argv[1], 6830), 10) for _ in range(300)]
    time.sleep(0.7)
    for each in held:
        each.close()
"""

# What a scanner sends to find out what listens: an empty connection, a browser's, TLS, SMB, and Kerberos' first words.
_SCAN = """
import socket, sys
words = (b"", b"GET / HTTP/1.0\\r\\n\\r\\n", b"\\x16\\x03\\x01\\x02\\x00\\x01\\x00\\x01\\xfc\\x03\\x03",
         b"\\x00\\x00\\x00\\xa4\\xffSMBr" + bytes(156), b"\\x00\\x00\\x00\\x71\\x6a\\x81\\x6e" + bytes(110))
for port in (6830, 9830):
    for said in words:
        with socket.create_connection((sys.argv[1], port), 10) as asked:
            try:
                asked.sendall(said)
                asked.shutdown(socket.SHUT_WR)
                asked.recv(1)
            except OSError:
                pass
"""

# A leak, in the agent's own process: Python runs this before the agent's first line.
_LEAK = "leaked = bytearray(b'x') * (200 << 20)\n"


@contextlib.contextmanager
def agent_killed(up: Scene, role: str) -> Iterator[None]:
    """The agent crashes and is not started again; mended, it is."""
    up.node(role).kill("agent")
    try:
        yield
    finally:
        up.node(role).start_agent()


@contextlib.contextmanager
def job_broken(up: Scene) -> Iterator[None]:
    """A job that takes no process, on a node whose PAM line lets users in all the same. Mended: she has another."""
    node = up.node("broken")
    with up.lab.broken_job(node):
        up.begin_logins("broken", options="action_adopt_failure=allow", every_s=0.7)
        yield
    up.lasting.enter_context(up.lab.jobs(1, on=[node]))


@contextlib.contextmanager
def jobs_not_found(up: Scene) -> Iterator[None]:
    """The jobs are elsewhere than the agent's configuration says, on all nodes of a cluster."""
    up.configure("lost", '[jobs]\npath = "/elsewhere/uid_{uid}/job_{job}"\n')
    _reload(up, "lost")
    up.begin_logins("lost", every_s=0.3)
    try:
        yield
    finally:
        up.configure("lost", "")
        _reload(up, "lost")


def _reload(up: Scene, role: str) -> None:
    node = up.node(role)
    tail = node.agent_log()
    os.kill(up.agent_pid(role), signal.SIGHUP)
    until(lambda: any("reload" in line for line in tail.lines()), f"{role}: the agent has read its configuration")


@contextlib.contextmanager
def module_of_another_release(up: Scene) -> Iterator[None]:
    """An update stopped half-way: pam_adopt.so is of a release whose record the agent does not understand."""
    directory = up.lab.cluster.directory / "other-release"
    shutil.copytree(SOURCE_DIR / "pam_hook", directory, ignore=shutil.ignore_patterns("build"))
    header = directory / "adopt_wire.h"
    ours, theirs = "#define ADOPT_WIRE_VERSION 1u", "#define ADOPT_WIRE_VERSION 2u"
    text = header.read_text(encoding="utf-8")
    assert ours in text
    header.write_text(text.replace(ours, theirs), encoding="utf-8")
    subprocess.run(["make", "-s", "-C", directory], check=True, stdout=subprocess.DEVNULL)
    module = "/run/pam_adopt_other.so"
    shutil.copy(directory / "build" / "pam_adopt.so", up.node("mismatched").path(module))
    up.begin_logins("mismatched")
    up.set_stack("mismatched", module=module)
    try:
        yield
    finally:
        up.set_stack("mismatched")


@contextlib.contextmanager
def packets_dropped(up: Scene) -> Iterator[None]:
    """A firewall drops what nodes ask a source of logins. Where callerid may take two seconds, logins do."""
    with up.lab.packets_dropped(up.node("dropping")):
        up.begin_logins("asking", "dropping", every_s=0.2)
        # Two seconds each: one after the other they were too few to say anything of nodes that do not answer.
        for number in range(3):
            up.begin_logins("waiting", "dropping", number=number)
        yield


@contextlib.contextmanager
def impostor_answers(up: Scene) -> Iterator[None]:
    """Where the agent is down a user listens on its port, and answers."""
    with impostor(up.node("killed")):
        up.begin_logins("disbelieving", "killed")
        yield


@contextlib.contextmanager
def another_key(up: Scene) -> Iterator[None]:
    """A node has another munge key: nobody believes it, and it believes nobody."""
    node, key = up.node("rekeyed"), up.node("rekeyed").path("/etc/munge/munge.key").read_text(encoding="ascii")
    _new_munged(node, key[::-1])
    up.begin_logins("asking", "rekeyed")
    try:
        yield
    finally:
        _new_munged(node, key)


def _new_munged(node: Node, key: str) -> None:
    account = pwd.getpwnam("munge")
    munge = User("munge", account.pw_uid, account.pw_gid, "/", "")
    node.stop("munged")
    node.write("/etc/munge/munge.key", key, mode=0o400, owner=munge.uid)
    node.start_munged(munge)
    node.wait_munged()


@contextlib.contextmanager
def munged_stopped(up: Scene) -> Iterator[None]:
    """munged is not running on a node."""
    node = up.node("unsealed")
    key = node.path("/etc/munge/munge.key").read_text(encoding="ascii")
    node.stop("munged")
    up.begin_logins("unsealed")
    try:
        yield
    finally:
        _new_munged(node, key)


@contextlib.contextmanager
def flood(up: Scene) -> Iterator[None]:
    """A user of another node keeps more connections to the agent's port than one address may have. Mended: she ends."""
    node = up.node("source")
    process = node.popen(
        [PYTHON, "-c", _FLOOD, up.node("flooded").ipv4], user=BOB, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        end(process)


@contextlib.contextmanager
def witnesses_disagree(up: Scene) -> Iterator[None]:
    """Logins over a connection on a socket that root made and alice connected. Mended: over one of her own."""
    odd = up.begin_logins("healthy", "escaping", socket_of=ROOT, every_s=1.0)
    yield
    odd.close()
    up.begin_logins("healthy", "escaping", every_s=1.0)


@contextlib.contextmanager
def _without_bpffs(node: Node, *first: str) -> Iterator[None]:
    """Another file system with something in it at /sys/fs/bpf, which the agent does not mount its own over.

    ``first`` is done the moment before.
    """
    over = "mount -t tmpfs none /sys/fs/bpf && touch /sys/fs/bpf/kept"
    node.run(["sh", "-c", " && ".join((*first, over))])
    try:
        yield
    finally:
        node.run(["umount", "/sys/fs/bpf"])


@contextlib.contextmanager
def no_bpffs(up: Scene) -> Iterator[None]:
    """A node came up without bpffs, and the agent on it without its probe."""
    node = up.node("unprobed")
    node.stop("agent")
    with _without_bpffs(node):
        node.start_agent()
        yield


@contextlib.contextmanager
def probe_detached(up: Scene) -> Iterator[None]:
    """Somebody unloads the probe under the agent, and it cannot be loaded again."""
    node = up.node("untested")
    passes = f'adoptd_probe_self_test_success{{instance="{up.instance("untested")}"}}'
    with contextlib.ExitStack() as made:
        unload = f"PYTHONPATH={SOURCE_IN_NODE}/agent {PYTHON} -B -m adoptd probe unload"
        for _ in range(5):
            made.enter_context(_without_bpffs(node, unload))
            try:
                patiently(lambda: up.value(passes) == 0, "the self-test fails", 10)
                break
            except TimeoutError:
                # The agent had it loaded again between the two.
                made.close()
        yield


@contextlib.contextmanager
def main_thread_stuck(up: Scene) -> Iterator[None]:
    """The agent's event loop stands still while its metrics are served: a tracer holds its first thread.

    Simulated in so far as it is a tracer that holds it, and no lock; and there is no systemd to end it after 30 s.
    """
    served = f"import urllib.request as u; u.urlopen('http://{up.instance('hung')}/metrics', timeout=2).read()"
    with contextlib.ExitStack() as trying:
        for _ in range(20):
            trying.enter_context(held(up.agent_pid("hung")))
            try:
                up.node("hung").run([PYTHON, "-c", served])
                break
            except RuntimeError:
                # It was stopped with the interpreter's lock in its hands, and nobody is served.
                trying.close()
        yield


@contextlib.contextmanager
def held(pid: int) -> Iterator[None]:
    """A process's first thread stopped, and no other: by ptrace(2), from a thread that waits here meanwhile."""
    done, began = threading.Event(), threading.Event()
    fault: List[BaseException] = []

    def hold() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
        try:
            for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
                if libc.ptrace(request, pid, None, None) != 0:
                    raise OSError(ctypes.get_errno(), f"ptrace({request:#x}) of {pid}")
            os.waitpid(pid, WALL)
            began.set()
            done.wait()
            libc.ptrace(PTRACE_DETACH, pid, None, None)
        except BaseException as error:
            fault.append(error)
            began.set()

    thread = threading.Thread(target=hold)
    thread.start()
    began.wait()
    try:
        if fault:
            raise fault[0]
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def moved_again_and_again(up: Scene) -> Iterator[None]:
    """Root moves a session's process out of its job each time that the agent has put it back, until it gives up.

    Mended: root does so no more and, as the runbook says, puts the session back. It goes on.
    """
    node = up.node("escaping")
    pid_file = up.lab.cluster.directory / "home" / ALICE.name / "moved"
    pid_file.unlink(missing_ok=True)
    session = up.lab.start_login(to=node.name, command=f"echo $$ > {ALICE.home}/moved; exec sleep 1000")
    up.lasting.callback(end, session.process)
    pid = until(lambda: _number(pid_file), "the session's pid", 15)
    moves = "; ".join(f"echo {pid} > {file}" for file in node.system_group.procs_files())
    mover = node.popen(
        ["sh", "-c", f"while :; do {moves}; sleep 1; done"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        end(mover)
        put_back(node)


def put_back(node: Node) -> None:
    """By ``adoptctl sessions`` and ``adoptctl join``, as the runbook has it: each session into the job that it had."""
    listed = json.loads(adoptctl(node, "sessions", "--json"))["sessions"]
    assert listed, f"{node.name}: no session to put back"
    for row in listed:
        adoptctl(node, "join", row["job"], "--session", row["session"])


def adoptctl(node: Node, *words: str) -> str:
    """What a command says to root."""
    code = "import sys; from adoptd.cli import adoptctl_main; sys.exit(adoptctl_main())"
    quoted = " ".join(shlex.quote(word) for word in (PYTHON, "-B", "-c", code, *words))
    return node.run(["sh", "-c", f"PYTHONPATH={SOURCE_IN_NODE}/agent exec {quoted}"])


def _number(file: Path) -> Optional[int]:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def bad_configuration(up: Scene) -> Iterator[None]:
    """A typing error in a file, and a reload."""
    up.configure("escaping", '[session]\non_escape = "readmit"\n')
    _reload(up, "escaping")
    try:
        yield
    finally:
        up.configure("escaping", "")
        _reload(up, "escaping")


@contextlib.contextmanager
def restarts(up: Scene) -> Iterator[None]:
    """Killed and started again, five times, each new process scraped. Mended: it is left to run."""
    node = up.node("unprobed")
    started = f'adoptd_process_start_time_seconds{{instance="{up.instance("unprobed")}"}}'
    for _ in range(5):
        before = up.value(started)
        node.kill("agent")
        node.start_agent()
        patiently(lambda: up.value(started) not in (None, before), "the new process is scraped", 20)  # noqa: B023
    yield


@contextlib.contextmanager
def leak(up: Scene) -> Iterator[None]:
    """The agent's process holds 200 MB more than it should.

    Simulated: every buffer of the agent's has a bound, so Python's own start-up file takes the memory, in the agent's
    process and before its first line.
    """
    node = up.node("leaking")
    version = node.run([PYTHON, "-c", "import sys; print('python%d.%d' % sys.version_info[:2])"]).strip()
    file = f"/root/.local/lib/{version}/site-packages/usercustomize.py"
    node.write(file, _LEAK)
    node.stop("agent")
    node.start_agent()
    try:
        yield
    finally:
        node.path(file).unlink()
        node.stop("agent")
        node.start_agent()


@contextlib.contextmanager
def observed_otherwise(up: Scene) -> Iterator[None]:
    """mode=observe, beside a stack that puts nobody into a job. Mended: it is enforced, and users log in."""
    node = up.node("leaking")
    up.lab.pam("mode=observe", node=node)
    up.login("leaking")
    try:
        yield
    finally:
        up.lab.pam("action_unknown=newest", node=node)
        up.login("leaking")


def scan(up: Scene, role: str) -> None:
    """A scanner of the security department's looks at the node's ports."""
    up.node("source").run([PYTHON, "-c", _SCAN, up.node(role).ipv4])


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, and the alerts (by name and whom they are about) that it is to set off."""

    make: Callable[[Scene], ContextManager[None]]
    alerts: Tuple[Tuple[str, str], ...]


def _killed(role: str) -> Callable[[Scene], ContextManager[None]]:
    return lambda up: agent_killed(up, role)


# In the order they are made; they are mended in the opposite one. What takes longest to be alerted on comes first.
FAULTS = (
    Fault(leak, (("AdoptdMemoryGrows", "leaking"),)),
    Fault(_killed("gone"), (("AdoptdDown", "gone"),)),
    Fault(_killed("dropping"), (("AdoptdDown", "dropping"),)),
    Fault(_killed("killed"), (("AdoptdDown", "killed"), ("AdoptdManyDown", CLUSTER))),
    Fault(jobs_not_found, (("AdoptdMostLoginsDenied", LOST_CLUSTER),)),
    Fault(main_thread_stuck, (("AdoptdSelfTestFails", "hung"),)),
    Fault(
        packets_dropped,
        (
            ("AdoptdSourcesDoNotAnswer", "asking"),
            ("AdoptdSourcesDoNotAnswer", "waiting"),
            ("AdoptdLoginsSlow", "waiting"),
        ),
    ),
    Fault(no_bpffs, (("AdoptdProbeNotAttached", "unprobed"),)),
    Fault(probe_detached, (("AdoptdSelfTestFails", "untested"),)),
    Fault(job_broken, (("AdoptdLoginsOutsideJobs", "broken"), ("AdoptdJobManagerFaults", "broken"))),
    Fault(impostor_answers, (("AdoptdAnswersNotBelieved", "disbelieving"),)),
    Fault(another_key, (("AdoptdQuestionsRefused", "rekeyed"),)),
    Fault(munged_stopped, (("AdoptdSealUnavailable", "unsealed"),)),
    Fault(module_of_another_release, (("AdoptdLoginsUnanswered", "mismatched"),)),
    Fault(flood, (("AdoptdTooManyRequests", "flooded"),)),
    Fault(witnesses_disagree, (("AdoptdWitnessesDisagree", "escaping"),)),
    Fault(moved_again_and_again, (("AdoptdSessionsEscape", "escaping"), ("AdoptdSessionsOutside", "escaping"))),
    Fault(bad_configuration, (("AdoptdReloadFailed", "escaping"),)),
    Fault(observed_otherwise, (("AdoptdObservedDisagreement", "leaking"),)),
    Fault(restarts, (("AdoptdRestarts", "unprobed"),)),
)


@contextlib.contextmanager
def nobody_scraped(up: Scene) -> Iterator[None]:
    """Prometheus' targets are lost. Made alone, after all others: no other alert can fire then."""
    up.prometheus.scrape({})
    try:
        yield
    finally:
        up.prometheus.scrape(up.targets)


BLIND = ("AdoptdNotScraped", EVERYBODY)
EXPECTED = tuple(expected for fault in FAULTS for expected in fault.alerts)
