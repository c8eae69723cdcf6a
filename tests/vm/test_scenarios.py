"""The demo's scenarios in the machine: its nodes of namespaces, on pure cgroup v2 and Debian 12's kernel.

The nodes' agents and their PAM module are those that the package installed: the lab takes both from the clone's
directories, which in the machine are links to them.
"""

from __future__ import annotations

import json
from typing import Any, Dict, Iterator

import pytest

from lab.scenarios import SCENARIOS
from vm.cluster import SOURCE, Cluster

TIMEOUT_S = 3600
# The lab's own waits and budgets are for a machine that is not emulated.
PATIENCE = 10


@pytest.fixture(scope="module")
def shown(cluster: Cluster) -> Iterator[Dict[str, Any]]:
    """What ``./dev demo --json`` says there, by scenario."""
    cluster.bring_source(["tests", "pyproject.toml"])
    # One agent at a time answers for a machine's sockets: the package's own makes room.
    cluster.machine.run("systemctl stop adoptd.service adoptd.socket adoptd-user.socket adoptd-callerid.socket")
    environment = f"ADOPTD_LAB_PATIENCE={PATIENCE} PYTHONPATH={SOURCE}/agent:{SOURCE}/tests"
    demo = f"cd {SOURCE} && {environment} python3 -B -m lab.demo --json"
    try:
        done = cluster.machine.execute(demo, timeout_s=TIMEOUT_S)
        assert done.out.startswith("{"), done.err[-4000:]
        yield {scenario["name"]: scenario for scenario in json.loads(done.out)["scenarios"]}
    finally:
        cluster.machine.run("systemctl start adoptd.socket adoptd-user.socket adoptd-callerid.socket adoptd.service")


@pytest.mark.timeout(TIMEOUT_S + 600)
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(shown: Dict[str, Any], name: str) -> None:
    """Each shows there what it shows natively."""
    outcome = shown[name]
    assert outcome["got"] == outcome["expected"], outcome["explanation"]
    assert outcome["ok"], outcome
