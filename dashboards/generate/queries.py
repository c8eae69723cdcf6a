"""The pieces that queries are made of: who is selected, what counts as what, and the two kinds of rate.

Owns the label matchers and the names of sets of label values, so that a panel, a rule and an alert that speak of
"sessions outside a job" mean the same sessions.
"""

from __future__ import annotations

# Where Grafana has the dashboard, below its own address.
UID = "adoptd"
PATH = f"/d/{UID}"

# Dashboard variables. ``cluster`` may be a label that a site does not set: its "All" matches what lacks it too.
FLEET = 'cluster=~"$cluster"'
NODE = 'cluster=~"$cluster", instance=~"$node"'

# Grafana's own: at least four scrapes, whatever the zoom.
RATE = "$__rate_interval"

# Decisions that were carried out; in observe mode the login went its own way.
ENFORCED = 'mode="enforce"'
# The account phase is the gate, and there is one of it in every login.
GATE = f'phase="account", {ENFORCED}'

# Sessions let in without being put into a job although there may have been one: what was to be prevented happened.
OUTSIDE = 'outcome=~"allowed|ignored", reason=~"generic_failure|adopt_failure|unknown|named_failed"'

# Why a source node's answer was not heard, apart from an answer that says "unknown".
UNHEARD = "refused|unreachable|timeout|closed"
# What a source node said was not believed: it is no agent of the site's that answers.
DISBELIEVED = "malformed|bad_seal|sealed_by_other|wrong_nonce|wrong_connection|wrong_host"


# Nothing to seal with: nobody was asked.
UNSEALED = "seal_unavailable"

# As many lines as can be told apart, where each node has one.
MOST = 10


def most(expression: str) -> str:
    """Of one line for each node, the highest."""
    return f"topk({MOST}, {expression})"


def rate(metric: str, where: str, window: str = RATE) -> str:
    """Per second, of one counter."""
    return f"rate({metric}{{{where}}}[{window}])"


def total(metric: str, where: str, by: str = "", window: str = RATE) -> str:
    """Per second, summed, by the labels named (separated by commas)."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} ({rate(metric, where, window)})"


def quantile(q: float, histogram: str, where: str, by: str = "", window: str = RATE) -> str:
    """A quantile in the histogram's unit, over all that is selected, by the labels named."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) ({rate(histogram + '_bucket', where, window)}))"


def ratio(part: str, whole: str) -> str:
    """``part`` of ``whole``; nothing, and not 0 by 0, where there was nothing at all."""
    return f"({part}) / ({whole} > 0)"
