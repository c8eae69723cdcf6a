"""Recording rules: what the alerts and a fleet's long-range panels read, computed once.

Names are level:metric:operations, as Prometheus' own practice has them. ``cluster`` and ``job`` are kept where a
site has them.
"""

from __future__ import annotations

from typing import Dict, List

from generate.queries import DISBELIEVED, GATE, OUTSIDE, UNHEARD, quantile, total

# Sites that scrape every minute still have five samples in it.
_WINDOW = "5m"
_BY = "cluster, job"


def recording_groups() -> List[Dict[str, object]]:
    """The groups of rules.yml."""
    logins = "adoptd_adoptions_total"
    asked = "adoptd_callerid_asked_total"
    rules = {
        "cluster:adoptd_logins:rate5m": total(logins, GATE, _BY, _WINDOW),
        "cluster_outcome:adoptd_logins:rate5m": total(logins, GATE, f"{_BY}, outcome", _WINDOW),
        "cluster:adoptd_logins_outside_job:rate5m": total(logins, f"{GATE}, {OUTSIDE}", _BY, _WINDOW),
        "cluster:adoptd_callerid_asked:rate5m": total(asked, "", _BY, _WINDOW),
        "cluster:adoptd_callerid_unheard:rate5m": total(asked, f'reason=~"{UNHEARD}|{DISBELIEVED}"', _BY, _WINDOW),
        "instance_phase:adoptd_adoption_duration_seconds:p99_rate5m": quantile(
            0.99, "adoptd_adoption_duration_seconds", "", f"{_BY}, instance, phase", _WINDOW
        ),
        "cluster_phase:adoptd_adoption_duration_seconds:p50_rate5m": quantile(
            0.5, "adoptd_adoption_duration_seconds", "", f"{_BY}, phase", _WINDOW
        ),
        "cluster_phase:adoptd_adoption_duration_seconds:p99_rate5m": quantile(
            0.99, "adoptd_adoption_duration_seconds", "", f"{_BY}, phase", _WINDOW
        ),
    }
    return [
        {
            "name": "adoptd-recording",
            "rules": [{"record": name, "expr": expression} for name, expression in rules.items()],
        }
    ]
