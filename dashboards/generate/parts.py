"""Panels as this dashboard draws them: one look for each kind, set here and nowhere else.

Owns every choice of style. Each function takes what differs (title, description, unit, queries, place) and returns
a builder of the SDK's. A description is required: it is what whoever is on call reads first.
"""

from __future__ import annotations

from typing import Optional, Sequence, Tuple, TypeVar, Union

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import prometheus as prometheus_models

from generate.queries import PATH, total

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")

# The grid is 24 wide.
FULL, HALF, THIRD, QUARTER, SIXTH = 24, 12, 8, 6, 4
ROW_HEIGHT, STAT_HEIGHT = 8, 4

GREEN, YELLOW, RED, BLUE = "green", "yellow", "red", "blue"

# A query and the legend of its series.
Query = Tuple[str, str]
# From which value on which colour; the first begins at minus infinity.
Steps = Sequence[Tuple[Optional[float], str]]

AnyPanel = Union[timeseries.Panel, stat.Panel, statetimeline.Panel, table.Panel, heatmap.Panel]
# A row's title and its panels, left to right and down.
Row = Tuple[str, Sequence[AnyPanel]]

_Panel = TypeVar("_Panel", bound=Union[timeseries.Panel, stat.Panel, statetimeline.Panel, table.Panel, heatmap.Panel])


def _with(panel: _Panel, title: str, description: str, unit: str, width: int, height: int) -> _Panel:
    panel.title(title).description(description).unit(unit).datasource(SOURCE).span(width).height(height)
    return panel


def _thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    made = [models.Threshold(value=value, color=color) for value, color in steps]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(made)


def _target(query: Query, index: int) -> prometheus.Dataquery:
    expression, legend = query
    return (
        prometheus.Dataquery()
        .expr(expression)
        .legend_format(legend)
        .ref_id(chr(ord("A") + index))
        .datasource(SOURCE)
        .editor_mode(prometheus_models.QueryEditorMode.CODE)
    )


def graph(
    title: str,
    description: str,
    unit: str,
    queries: Sequence[Query],
    *,
    width: int = HALF,
    stacked: bool = False,
    exemplars: bool = False,
) -> timeseries.Panel:
    """Lines over time; ``stacked`` where the sum is what matters."""
    legend = (
        common.VizLegendOptions()
        .display_mode(common_models.LegendDisplayMode.TABLE)
        .placement(common_models.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull", "max"])
    )
    panel = (
        _with(timeseries.Panel(), title, description, unit, width, ROW_HEIGHT)
        .min(0)
        .line_width(1)
        .fill_opacity(25 if stacked else 5)
        .show_points(common_models.VisibilityMode.NEVER)
        .legend(legend)
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_models.TooltipDisplayMode.MULTI)
            .sort(common_models.SortOrder.DESCENDING)
        )
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A"))
    for index, query in enumerate(queries):
        panel.with_target(_target(query, index).range().exemplar(exemplars))
    return panel


def counted(
    title: str,
    description: str,
    metric: str,
    where: str,
    by: str,
    *,
    width: int,
    legend: str = "",
    some: bool = False,
    exemplars: bool = False,
) -> timeseries.Panel:
    """How often per second, stacked, by the labels named, which are the legend unless that is given.

    ``some``: without those that have not happened.
    """
    query = total(metric, where, by) + (" > 0" if some else "")
    words = legend or " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return graph(title, description, "reqps", [(query, words)], width=width, stacked=True, exemplars=exemplars)


def number(title: str, description: str, unit: str, query: str, steps: Steps, *, width: int = SIXTH) -> stat.Panel:
    """The latest value, large, coloured by what it means; "none" where nothing of the kind has been counted."""
    return (
        _with(stat.Panel(), title, description, unit, width, STAT_HEIGHT)
        .thresholds(_thresholds(steps))
        .color_mode(common_models.BigValueColorMode.VALUE)
        .graph_mode(common_models.BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .no_value("none")
        .with_target(_target((query, ""), 0).range())
    )


def states(title: str, description: str, queries: Sequence[Query], *, width: int = HALF) -> statetimeline.Panel:
    """1 and 0 over time, as up and down."""
    up, down = (
        models.ValueMappingResult(text="up", color=GREEN, index=0),
        models.ValueMappingResult(text="down", color=RED, index=1),
    )
    panel = (
        _with(statetimeline.Panel(), title, description, "short", width, ROW_HEIGHT)
        .mappings([models.ValueMap(options={"1": up, "0": down})])
        .thresholds(_thresholds([(None, RED), (1, GREEN)]))
        .show_value(common_models.VisibilityMode.NEVER)
    )
    for index, query in enumerate(queries):
        panel.with_target(_target(query, index).range())
    return panel


def rows(
    title: str, description: str, query: str, columns: Sequence[str], value: str = "", *, width: int = HALF
) -> table.Panel:
    """The present values of one query, one row each: the labels named as columns, then what the value is (if said).

    A row that is about a node leads to this dashboard of that node.
    """
    names = [*columns, "Value"]
    hidden = dict.fromkeys(("Time", "__name__", "job", *([] if value else ["Value"])), True)
    placed = {name: index for index, name in enumerate(names)}
    options = {"excludeByName": hidden, "indexByName": placed, "renameByName": {"Value": value} if value else {}}
    panel = (
        _with(table.Panel(), title, description, "short", width, ROW_HEIGHT)
        .decimals(0)
        .no_value("none")
        .with_target(_target((query, ""), 0).instant().format(prometheus_models.PromQueryFormat.TABLE))
        .with_transformation(models.DataTransformerConfig(id_val="organize", options=options))
    )
    if "instance" in columns:
        url = f"{PATH}?var-node=${{__data.fields.instance}}&${{__url_time_range}}"
        panel.data_links([dashboard.DashboardLink("This node alone").type(models.DashboardLinkType.LINK).url(url)])
    order = common.TableSortByFieldState()
    return panel.sort_by([order.display_name(value).desc(True) if value else order.display_name(columns[0])])


def heat(title: str, description: str, unit: str, query: str, *, width: int = HALF) -> heatmap.Panel:
    """A histogram over time: how many took how long."""
    return (
        _with(heatmap.Panel(), title, description, unit, width, ROW_HEIGHT)
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(heatmap_models.HeatmapColorMode.SCHEME)
            .scheme("Oranges")
            .steps(32)
            .exponent(0.5)
        )
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .with_target(_target((query, "{{le}}"), 0).range().format(prometheus_models.PromQueryFormat.HEATMAP))
    )
