"""The kernel tests in the machine: owners of connections, the probe, escapes, cgroups; on Linux 6.1, cgroup v2 alone.

They run beside the installed agent, and beside each other: as many files at a time as the machine has processors.
"""

from __future__ import annotations

import re
from typing import Iterator

import pytest

from vm.cluster import ROOT, SOURCE, Cluster
from vm.machine import CPUS

FILES = sorted(path.name for path in (ROOT / "tests/kernel").glob("test_*.py"))
# All of them take five minutes natively: some 13 times that, and the host's other work beside it.
TIMEOUT_S = 7200
# Of what the tests wait for, not of what they say.
PATIENCE = 10
# cgroup v1 is not there at all; nothing else is left out.
SKIPPED = re.compile(r"this host does not mount (the memory controller of cgroup v1|[a-z]+(, [a-z]+)*)$")

_RESULTS = "/root/kernel"
# Started once, ended with the tests of this module at the latest.
_RUN = f"""\
set -e
rm -rf {_RESULTS}
mkdir {_RESULTS}
cd {SOURCE}
export PYTHONPATH=/opt/site ADOPTD_LAB_PATIENCE={PATIENCE}
one='python3 -B -m pytest -q -p no:cacheprovider -ra --timeout=1800 tests/kernel/$0 >{_RESULTS}/$0.out 2>&1
    echo $? >{_RESULTS}/$0.new && mv {_RESULTS}/$0.new {_RESULTS}/$0.status'
setsid xargs --max-procs={CPUS} -I{{}} bash -c "$one" {{}} </root/kernel.files >/dev/null 2>&1 &
echo $!
"""


@pytest.fixture(scope="module")
def results(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the output and status of each file that is asked for will be in the machine: they are running."""
    calls = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    names = [str(call.params["name"]) for call in calls if call is not None]
    cluster.bring_source(["tests", "pyproject.toml", "docs", "packaging", "README.md"])
    cluster.machine.put("".join(f"{name}\n" for name in names).encode(), "/root/kernel.files")
    group = cluster.machine.run(_RUN).strip()
    try:
        yield _RESULTS
    finally:
        cluster.machine.execute(f"kill -TERM -- -{group}")


@pytest.mark.timeout(TIMEOUT_S + 600)
@pytest.mark.parametrize("name", FILES)
def test_the_kernel_tests_pass_there(cluster: Cluster, results: str, name: str) -> None:
    """Each file of tests/kernel, on this machine's own cgroups, sockets and BPF."""
    cluster.wait(f"[ -e {results}/{name}.status ]", f"the end of {name}", TIMEOUT_S)
    said = cluster.machine.run(f"cat {results}/{name}.out")
    assert cluster.machine.run(f"cat {results}/{name}.status") == "0\n", said[-6000:]
    skipped = [line for line in said.splitlines() if line.startswith("SKIPPED")]
    assert [line for line in skipped if not SKIPPED.search(line)] == []
    print(name, said.strip().splitlines()[-1])
