"""The short-lived process that compiles, attaches and pins the probe, or takes it away.

The only file that imports bcc, which keeps 70 to 120 MB and changes the working directory: it is run as
``python -m adoptd.probe.loader`` by adoptd.probe and never imported by the agent. Everything or nothing:
a new probe is built beside the old one, put in place by one rename, and only then is the old one removed.
On failure the last line on stderr says why.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Mapping, Optional, Protocol, Sequence, Tuple, cast

from adoptd.deadline import Deadline
from adoptd.model import ProbeError
from adoptd.probe import btf, mounts, pins, store, syscalls, watching
from adoptd.probe.accounting import leave_memory_cgroup
from adoptd.probe.sources import PROGRAM, WATCH_PROGRAM, schema_of

# Another loader compiles for half a second, 13 times that in an emulated machine.
_LOCK_BUDGET_MS = 30_000
_READ_BYTES = 4096
_SEED = b"bpf_iter__task_file"
# include/uapi/linux/capability.h, since 5.8; CAP_SYS_ADMIN stands for the first and the third. Without the third the
# verifier refuses what the programs do with pointers, and says EINVAL.
_CAPABILITIES = {"CAP_BPF": 39, "CAP_NET_ADMIN": 12, "CAP_PERFMON": 38}
_CAP_SYS_ADMIN = 21


class _Function(Protocol):
    fd: int


class _Module(Protocol):
    """What we use of bcc.BPF, which has no type stubs."""

    module: int

    def load_func(self, func_name: bytes, prog_type: int, device: None = None, attach_type: int = -1) -> _Function: ...


def load(pin_dir: Path, source_dir: Path) -> str:
    """Load the probe and pin it under ``pin_dir``; one line saying what was done. Raises ProbeError, OSError."""
    schema = schema_of(source_dir)
    store.make(pin_dir)
    with store.locked(pin_dir, Deadline.after_ms(_LOCK_BUDGET_MS)) as directory:
        found = store.schemas(directory)
        if schema in found and _is_healthy(pin_dir, source_dir):
            store.sweep(directory, keep=(schema,))
            return f"already loaded, schema {schema}"
        store.sweep(directory, keep=found)
        # Before any map is made: each is paid for by where its maker is.
        charged = leave_memory_cgroup()
        seed, no_seed = _offsets(btf.SEED_MEMBERS)
        watch, no_watch = _offsets(btf.WATCH_MEMBERS)
        twins, no_twins = _offsets(btf.TWIN_MEMBERS)
        module = _compile(source_dir, seed, watch, twins)
        if twins:
            try:
                _load(module, pins.QUERY.name.encode(), pins.QUERY.type, -1)
            except ProbeError as error:
                # A kernel under lockdown lets no program read its memory: then without that one part.
                no_twins, module = str(error), _compile(source_dir, seed, watch, {})
        name = store.begin(directory)
        try:
            _pin(module, f"/proc/self/fd/{directory}/{name}")
            if no_watch is None:
                no_watch = _pin_watch(module, f"/proc/self/fd/{directory}/{name}")
            _check(directory, name, schema, f"{pin_dir}/{name}")
            if no_watch is None:
                watching.inherit(directory, name, found)
            store.finish(directory, name, schema)
        except BaseException:
            # Without its pins the new probe detaches as this process ends; the old one was not touched.
            with contextlib.suppress(FileNotFoundError):
                store.remove(directory, name)
            raise
        if no_seed is None:
            no_seed = _seed(module)
        store.sweep(directory, keep=(schema,))
    done = f"loaded, schema {schema}"
    if found:
        done += f", in place of {', '.join(found)}"
    if charged is not None:
        done += f"; labels are charged to the loader's memory cgroup: {charged}"
    if no_seed is not None:
        done += f"; sockets already open are not labelled: {no_seed}"
    if no_twins is not None:
        done += f"; connections are not looked for twins: {no_twins}"
    if no_watch is not None:
        done += f"; moves of sessions are not told: {no_watch}"
    return done


def unload(pin_dir: Path) -> str:
    """Detach and remove the probe; one line saying what was done. Raises ProbeError, OSError."""
    try:
        with store.locked(pin_dir, Deadline.after_ms(_LOCK_BUDGET_MS)) as directory:
            removed = store.schemas(directory)
            store.sweep(directory, keep=())
            store.remove_store(pin_dir)
    except store.MissingProbe:
        return "was not loaded"
    return f"unloaded, schema {', '.join(removed)}" if removed else "was not loaded"


def _is_healthy(pin_dir: Path, source_dir: Path) -> bool:
    try:
        pins.open_probe(pin_dir, source_dir).close()
        # Not there where the kernel did not take it; in pieces it is replaced.
        with contextlib.suppress(store.MissingProbe):
            watching.open_watch(pin_dir, source_dir).close()
    except ProbeError:
        return False
    return True


def _offsets(members: Mapping[str, Tuple[str, ...]]) -> Tuple[Mapping[str, int], Optional[str]]:
    """The offsets of ``members``, or none and why. A kernel without BTF can be probed, only not seeded or watched."""
    try:
        return btf.offsets(btf.read_vmlinux(), members), None
    except ProbeError as error:
        return {}, str(error)


def _compile(source_dir: Path, seed: Mapping[str, int], watch: Mapping[str, int], twins: Mapping[str, int]) -> _Module:
    # Without it older bcc compiles against /tmp/kheaders-*, which anyone can make.
    os.environ["BCC_KERNEL_SOURCE"] = str(source_dir)
    try:
        import bcc
    except ImportError as error:
        raise ProbeError(
            f"{sys.executable} cannot import bcc ({error}): install the distribution's python3-bpfcc or python3-bcc"
        ) from None
    if not hasattr(bcc, "BPF"):
        raise ProbeError(
            f"{getattr(bcc, '__file__', 'bcc')} is another project of that name: use the distribution's bcc, not PyPI's"
        )
    offsets = {**seed, **watch, **twins}
    flags = [f"-I{source_dir}", *(f"-DADOPT_OFFSET_{name}={offset}" for name, offset in offsets.items())]
    flags += [f"-DADOPT_{part}" for part, needed in (("SEED", seed), ("WATCH", watch), ("TWINS", twins)) if needed]
    # One unit, since bcc rewrites what is in the main file only.
    text = b"\n".join((source_dir / name).read_bytes() for name in (PROGRAM, WATCH_PROGRAM))
    try:
        return cast(_Module, bcc.BPF(text=text, cflags=flags))
    # bcc raises plain Exception for everything; what went wrong is on stderr already.
    except Exception as error:
        _refuse_if_forbidden()
        raise ProbeError(f"{source_dir / PROGRAM}: bcc does not compile it or create its maps: {error}") from None


def _load(module: _Module, name: bytes, prog_type: int, attach_type: int) -> int:
    try:
        return module.load_func(name, prog_type, attach_type=attach_type).fd
    except TypeError:
        raise ProbeError("bcc is too old: 0.25 or later is needed") from None
    except Exception as error:
        _refuse_if_forbidden()
        # bcc's words for EPERM, which root too is given under lockdown or in a container.
        why = "EPERM, BPF is not permitted here" if "super-user" in str(error) else str(error)
        raise ProbeError(f"the kernel refuses program {name.decode()}: {why}") from None


def _map_fd(module: _Module, name: str) -> int:
    # Not module[name]: bcc has no table class for socket storage (0.26).
    from bcc.libbcc import lib

    fd = int(lib.bpf_table_fd(module.module, name.encode()))
    if fd < 0:
        raise ProbeError(f"bcc made no map {name}")
    return fd


def _refuse_if_forbidden() -> None:
    status = Path("/proc/self/status").read_text("ascii", "replace")
    effective = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")), 0)
    missing = [name for name, number in _CAPABILITIES.items() if not effective >> number & 1]
    if missing and not effective >> _CAP_SYS_ADMIN & 1:
        without = " and no ".join(missing)
        raise ProbeError(f"BPF is not permitted: needs {', '.join(_CAPABILITIES)}, and has no {without}")


def _pin(module: _Module, into: str) -> None:
    programs = {
        pins.QUERY.name: _load(module, b"adopt_query", pins.QUERY.type, -1),
        pins.CONNECT4.name: _load(module, b"adopt_connect4", pins.CONNECT4.type, syscalls.ATTACH_CGROUP_INET4_CONNECT),
        pins.CONNECT6.name: _load(module, b"adopt_connect6", pins.CONNECT6.type, syscalls.ATTACH_CGROUP_INET6_CONNECT),
    }
    for name, fd in programs.items():
        syscalls.obj_pin(fd, f"{into}/{name}")
    for wanted in pins.MAPS:
        syscalls.obj_pin(_map_fd(module, wanted.name), f"{into}/{wanted.name}")
    with contextlib.ExitStack() as opened:
        root = mounts.open_cgroup_root()
        opened.callback(os.close, root)
        for link in pins.LINKS:
            try:
                fd = syscalls.link_create(programs[link.program], root, link.attach_type)
            except PermissionError:
                raise ProbeError(
                    f"{link.program}: the kernel refuses to attach it to the cgroup root (EPERM): not permitted here, "
                    "or another program is attached there for itself alone (see bpftool cgroup tree)"
                ) from None
            opened.callback(os.close, fd)
            syscalls.obj_pin(fd, f"{into}/{link.name}")


def _pin_watch(module: _Module, into: str) -> Optional[str]:
    """Load, pin and attach the watch: all of it, or nothing and why not. Looking takes its place."""
    with contextlib.ExitStack() as undo:
        try:
            for wanted in watching.MAPS:
                syscalls.obj_pin(_map_fd(module, wanted.name), f"{into}/{wanted.name}")
                undo.callback(os.unlink, f"{into}/{wanted.name}")
            for program in watching.PROGRAMS:
                fd = _load(module, program.name.encode(), program.type, -1)
                syscalls.obj_pin(fd, f"{into}/{program.name}")
                undo.callback(os.unlink, f"{into}/{program.name}")
                link = syscalls.raw_tracepoint_open(fd, program.tracepoint)
                try:
                    syscalls.obj_pin(link, f"{into}/{program.link}")
                finally:
                    os.close(link)
                undo.callback(os.unlink, f"{into}/{program.link}")
        except (ProbeError, OSError) as error:
            return str(error)
        undo.pop_all()
    return None


def _check(directory: int, name: str, schema: str, shown: str) -> None:
    made = store.open_trusted(name, shown, directory)
    try:
        pins.open_pinned(made, schema, shown).close()
    finally:
        os.close(made)


def _seed(module: _Module) -> Optional[str]:
    """Label the sockets that are open already, once; why that failed, if it did."""
    try:
        with contextlib.ExitStack() as opened:
            program = _load(module, _SEED, syscalls.PROG_TYPE_TRACING, syscalls.ATTACH_TRACE_ITER)
            link = syscalls.link_create(program, 0, syscalls.ATTACH_TRACE_ITER)
            opened.callback(os.close, link)
            walk = syscalls.iter_create(link)
            opened.callback(os.close, walk)
            while True:
                try:
                    if not os.read(walk, _READ_BYTES):
                        return None
                # The kernel pauses after a million files (kernel/bpf/bpf_iter.c, MAX_ITER_OBJECTS): go on.
                except BlockingIOError:
                    continue
    except (ProbeError, OSError) as error:
        return str(error)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """0 if done, with one line on stdout; 1 with the reason as the last line on stderr."""
    parser = argparse.ArgumentParser(prog="adoptd.probe.loader")
    parser.add_argument("action", choices=("load", "unload"))
    parser.add_argument("--pin-dir", type=Path, required=True)
    parser.add_argument("--source-dir", type=Path)
    chosen = parser.parse_args(arguments)
    try:
        if os.geteuid() != 0:
            raise ProbeError("BPF is not permitted: must be root")
        if chosen.action == "unload":
            done = unload(chosen.pin_dir)
        elif chosen.source_dir is None:
            raise ProbeError("load: --source-dir is missing")
        else:
            done = load(chosen.pin_dir, chosen.source_dir.resolve())
    except (ProbeError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    print(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
