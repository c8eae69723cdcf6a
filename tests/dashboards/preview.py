"""One HTML page with the dashboard's panels, drawn from what a real Prometheus answers about a fleet with traffic.

Not Grafana, and says so: layout, titles, units and queries are the dashboard's, the drawing is this file's. For
reading a change of the dashboard without a Grafana, and for the picture in README.md. Run by ``./dev dashboards
--preview FILE``.
"""

from __future__ import annotations

import html
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from dashboards.board_file import Panel, board, filled_in, panels
from dashboards.fleet import Fleet, fleet, make_traffic

ROUNDS = 5
_CELL_PX, _ROW_PX = 54, 36
_COLOURS = (
    "#7eb26d",
    "#eab839",
    "#6ed0e0",
    "#ef843c",
    "#e24d42",
    "#1f78c1",
    "#ba43a9",
    "#705da0",
    "#508642",
    "#cca300",
)
# As Grafana has them in its dark theme.
_NAMED = {"green": "#73bf69", "yellow": "#fade2a", "red": "#f2495c", "blue": "#5794f2"}

_STYLE = """
body { background: #111217; color: #ccccdc; font: 13px/1.35 system-ui, sans-serif; margin: 12px; width: 1320px }
h1 { font-size: 19px; margin: 0 0 2px } .note { color: #8e8ea0; margin: 0 0 10px }
.grid { position: relative } .row { position: absolute; font-weight: 600; font-size: 15px; padding-top: 8px }
.panel { position: absolute; background: #181b1f; border: 1px solid #2c3235; border-radius: 3px; box-sizing: border-box;
  padding: 6px 8px; overflow: hidden }
.title { font-weight: 500; white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
.legend { font-size: 11px; color: #aaaaba; line-height: 1.3 } .key { display: inline-block; width: 10px; height: 3px;
  margin: 0 4px 3px 0 } .number { font-size: 30px; text-align: center; margin-top: 10px }
table { border-collapse: collapse; font-size: 11px; width: 100% } td, th { text-align: left; padding: 2px 6px 2px 0;
  border-bottom: 1px solid #2c3235 }
"""

Points = List[Tuple[float, float]]
Series = Tuple[str, Points]


def shown(value: float, unit: str) -> str:
    """A value with its unit, as short as it can be read."""
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "s":
        return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
    if unit == "bytes":
        return f"{value / 1e6:.3g} MB"
    suffix = {"reqps": "/s", "cps": "/s"}.get(unit, "")
    return f"{value:.3g}{suffix}"


def page(up: Fleet) -> str:
    """The whole document."""
    since_s, until_s = up.since_s, time.time()
    drawn = []
    for each in board()["panels"]:
        place = each["gridPos"]
        style = (
            f"left:{place['x'] * _CELL_PX}px;top:{place['y'] * _ROW_PX}px;"
            f"width:{place['w'] * _CELL_PX - 6}px;height:{place['h'] * _ROW_PX - 6}px"
        )
        if each["type"] == "row":
            drawn.append(f'<div class="row" style="{style}">{html.escape(each["title"])}</div>')
    for panel in panels():
        left, top, width, height = panel.place
        wide, high = width * _CELL_PX - 6, height * _ROW_PX - 6
        style = f"left:{left * _CELL_PX}px;top:{top * _ROW_PX}px;width:{wide}px;height:{high}px"
        body = _body(up, panel, since_s, until_s, (wide - 18, high - 30))
        title = f'<div class="title" title="{html.escape(panel.description)}">{html.escape(panel.title)}</div>'
        drawn.append(f'<div class="panel" style="{style}">{title}{body}</div>')
    bottom = max(each["gridPos"]["y"] + each["gridPos"]["h"] for each in board()["panels"]) * _ROW_PX
    note = (
        f"A preview: drawn by a script from what Prometheus answered about three nodes in {until_s - since_s:.0f} s of "
        "test traffic. In Grafana the same panels look otherwise."
    )
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(board()["title"])}</title><style>{_STYLE}</style>'
        f'<h1>{html.escape(board()["title"])}</h1><p class="note">{note}</p>'
        f'<div class="grid" style="height:{bottom}px">{"".join(drawn)}</div>\n'
    )


def _body(up: Fleet, panel: Panel, since_s: float, until_s: float, size: Tuple[int, int]) -> str:
    expressions = [filled_in(expression) for expression, _ in panel.targets]
    if panel.kind == "table":
        return _table(up.prometheus.query(expressions)[0], panel)
    results = up.prometheus.query_range(expressions, since_s, until_s)
    series: List[Series] = []
    for (_, legend), found in zip(panel.targets, results):
        for each in found:
            points = [(float(at), float(value)) for at, value in each["values"] if value != "NaN"]
            if points:
                series.append((_named(legend, each["metric"]), points))
    if panel.kind == "stat":
        if not series:
            return '<div class="number">none</div>'
        value = series[0][1][-1][1]
        colour = [name for least, name in panel.steps if least is None or value >= least][-1]
        return f'<div class="number" style="color:{_NAMED[colour]}">{shown(value, panel.unit)}</div>'
    if panel.kind == "state-timeline":
        return _states(series, (since_s, until_s), size)
    if panel.kind == "heatmap":
        return _heat(series, (since_s, until_s), size)
    return _graph(series, panel.unit, (since_s, until_s), size)


def _named(legend: str, labels: Dict[str, str]) -> str:
    for label, value in labels.items():
        legend = legend.replace("{{" + label + "}}", value)
    return legend or ", ".join(labels.values())


def _x(at: float, span: Tuple[float, float], width: int) -> float:
    return (at - span[0]) / (span[1] - span[0]) * width


def _graph(series: Sequence[Series], unit: str, span: Tuple[float, float], size: Tuple[int, int]) -> str:
    series = sorted(series, key=lambda each: -each[1][-1][1])
    keys = series[:4]
    width, height = size[0], size[1] - 16 * len(keys) - 4
    top = max((value for _, points in series for _, value in points), default=0.0) or 1.0
    lines = [
        f'<polyline fill="none" stroke="{_COLOURS[index % len(_COLOURS)]}" points="'
        + " ".join(f"{_x(at, span, width):.1f},{height - value / top * (height - 14):.1f}" for at, value in points)
        + '"/>'
        for index, (_, points) in enumerate(series)
    ]
    scale = f'<text x="0" y="10" fill="#8e8ea0" font-size="10">{shown(top, unit)}</text>'
    legend = "".join(
        f'<div><span class="key" style="background:{_COLOURS[index % len(_COLOURS)]}"></span>'
        f"{html.escape(name)}: {shown(points[-1][1], unit)}</div>"
        for index, (name, points) in enumerate(keys)
    )
    drawing = f'<svg width="{width}" height="{height}">{scale}{"".join(lines)}</svg>'
    return f'{drawing}<div class="legend">{legend}</div>'


def _states(series: Sequence[Series], span: Tuple[float, float], size: Tuple[int, int]) -> str:
    width, step = size[0], min(18.0, size[1] / max(len(series), 1))
    bars = []
    for index, (name, points) in enumerate(series):
        y = index * step
        bars.append(f'<text x="0" y="{y + step * 0.7:.1f}" fill="#aaaaba" font-size="10">{html.escape(name)}</text>')
        for at, value in points:
            colour = "#56a64b" if value == 1 else "#e02f44"
            x = 170 + _x(at, span, width - 170)
            bars.append(f'<rect x="{x:.1f}" y="{y + 2:.1f}" width="14" height="{step - 4:.1f}" fill="{colour}"/>')
    return f'<svg width="{width}" height="{size[1]}">{"".join(bars)}</svg>'


def _heat(series: Sequence[Series], span: Tuple[float, float], size: Tuple[int, int]) -> str:
    """Buckets are cumulative: what is in one is the difference to the one below it."""
    series = sorted(series, key=lambda each: float(each[0]))
    step = size[1] / max(len(series), 1)
    cells: List[str] = []
    below: Dict[float, float] = {}
    most = max((value for _, points in series for _, value in points), default=0.0) or 1.0
    for index, (name, points) in enumerate(series):
        y = size[1] - (index + 1) * step
        cells.append(f'<text x="0" y="{y + step * 0.7:.1f}" fill="#8e8ea0" font-size="9">{html.escape(name)}</text>')
        for at, value in points:
            share = (value - below.get(at, 0.0)) / most
            below[at] = value
            if share > 0.01:
                x = 40 + _x(at, span, size[0] - 50)
                opacity = 0.15 + 0.85 * min(share, 1.0)
                cells.append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="9" height="{step:.1f}" fill="#ff9830" '
                    f'opacity="{opacity:.2f}"/>'
                )
    return f'<svg width="{size[0]}" height="{size[1]}">{"".join(cells)}</svg>'


def _table(found: Sequence[Dict[str, Any]], panel: Panel) -> str:
    if not found:
        return '<div class="number">none</div>'
    cells = [{**each["metric"], "Value": f"{float(each['value'][1]):.0f}"} for each in found]
    if "Value" in panel.columns:
        cells.sort(key=lambda row: -float(row["Value"]))
    else:
        cells.sort(key=lambda row: [row.get(name, "") for name in panel.columns])
    head = "".join(f"<th>{html.escape(panel.renamed.get(name, name))}</th>" for name in panel.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(row.get(name, ''))}</td>" for name in panel.columns) + "</tr>"
        for row in cells
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def main() -> int:
    """Write the page to the file named."""
    file = Path(sys.argv[1])
    with fleet() as up:
        make_traffic(up, ROUNDS)
        file.write_text(page(up), encoding="utf-8")
    print(f"wrote {file}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
