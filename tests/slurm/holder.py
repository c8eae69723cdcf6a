"""Holds the namespaces of one small Slurm cluster: network, mounts and host name. No PID namespace: the
agent's pids are the initial namespace's.

Run as ``python -m slurm.holder HOSTNAME RUN_DIR``, prints ``ready`` and stays until it is killed. Every mount is
made private first, so nothing of it is visible outside.
"""

from __future__ import annotations

import signal
import subprocess
import sys

from lab import kernel

ADDRESS = "10.67.0.1"


def main() -> int:
    """Make them, say so, stay."""
    host_name, run_dir = sys.argv[1:]
    kernel.die_with_parent(signal.SIGKILL)
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS | kernel.CLONE_NEWNET)
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.set_hostname(host_name)
    for name in ("passwd", "group", "hosts"):
        kernel.mount(f"{run_dir}/etc/{name}", f"/etc/{name}", flags=kernel.MS_BIND)
    # Slurm listens on nothing where loopback has the only address (AI_ADDRCONFIG), so the node gets a wire of its own.
    commands = ["link set lo up", "link add eth0 type veth peer name eth1", f"addr add {ADDRESS}/24 dev eth0"]
    commands += ["link set eth0 up", "link set eth1 up"]
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands) + "\n", text=True, check=True)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
