"""docs/metrics.md: every metric with its labels and their values, from the agent's code."""

from __future__ import annotations

from typing import List

from generate.labels import CLOSED, FACTS, families, samples_of, series_at_most

_HEAD = """# Metrics

<!-- Written by `./dev dashboards` from the agent's code; change it there. -->

`http://ADDRESS:9830/metrics`, `[metrics]` in adoptd.toml: `listen` (loopback by default), `port`, `tls_certificate`,
`tls_key`, `tls_client_ca` (who may ask), and `textfile` for sites that open no port (written every 15 s, whole or
not at all, into a directory that only root can write to; `node_exporter --collector.textfile.directory` reads it).

Names and labels are an interface. Times are seconds, ratios 0 to 1, counters end in `_total`. No label holds a user,
a job, a pid or an address: the values below are all there are. A series appears with its first event, except where
its absence would be taken for "never": what is unknown is absent, not zero. Beside each series of a counter, and each
set of a histogram's, prometheus-client exports when it began, as `..._created` (Unix time); it is counted below.

Where the scraper asks for OpenMetrics, logins carry exemplars with `request_id`: the same id is in the log, in
`adoptctl watch` and in the denial that the user sees.
"""


def reference() -> str:
    """The whole text."""
    lines: List[str] = [_HEAD]
    total = 0
    for name, family in families().items():
        bound = series_at_most(name, family)
        total += bound
        lines += [f"## {name}", "", f"{family.documentation} ({family.type})", ""]
        lines += [
            f"Samples: {', '.join(f'`{sample}`' for sample in samples_of(name, family))}; at most {bound} series."
        ]
        if name in FACTS:
            labels = sorted({label for sample in family.samples for label in sample.labels})
            lines += [f"Labels: {', '.join(f'`{label}`' for label in labels)}."]
        if name in CLOSED:
            lines += ["", "| label | values |", "|---|---|"]
            for label, values in CLOSED[name].items():
                lines.append(f"| `{label}` | {', '.join(f'`{value}`' for value in sorted(values))} |")
        lines.append("")
    lines += [
        "## How many series",
        "",
        f"At most {total} from the agent itself: every combination of labels counted, most of which cannot occur.",
        "Measured: about 165 after its start, 200 to 400 in use, the more the more has gone wrong; a fifth of them are",
        "`_created`. prometheus-client's six `adoptd_process_*` come on top.",
        "",
    ]
    return "\n".join(lines)
