"""The dashboard: first the fleet, then one node, each row a question that somebody on call asks.

Owns which panels there are and in which order. A panel that nobody would act on does not belong here.
"""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import dashboard as models

from generate import fleet_rows, node_rows
from generate.parts import SOURCE
from generate.queries import UID

ROWS = (
    fleet_rows.fleet,
    fleet_rows.logins,
    node_rows.callerid,
    node_rows.sessions,
    node_rows.probe,
    node_rows.agent,
)


def board() -> models.Dashboard:
    """The whole dashboard, its panels placed and numbered."""
    made = (
        dashboard.Dashboard("adoptd: ssh sessions and their jobs")
        .uid(UID)
        .description("Where ssh sessions on compute nodes land: the fleet first, then the nodes chosen above.")
        .tags(["adoptd", "slurm", "ssh"])
        .timezone("browser")
        .refresh("1m")
        .time("now-6h", "now")
        .editable()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
    )
    _add_variables(made)
    for row in ROWS:
        title, panels = row()
        made.with_row(dashboard.Row(title))
        for panel in panels:
            made.with_panel(panel)
    built = made.build()
    for identifier, placed in enumerate(built.panels or [], start=1):
        placed.id_val = identifier
    return built


def _add_variables(made: dashboard.Dashboard) -> None:
    made.with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    for name, label, query in (
        ("cluster", "Cluster", "label_values(adoptd_build_info, cluster)"),
        ("node", "Node", 'label_values(adoptd_build_info{cluster=~"$cluster"}, instance)'),
    ):
        made.with_variable(
            dashboard.QueryVariable(name)
            .label(label)
            .datasource(SOURCE)
            .query(query)
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            # Matches series that lack the label as well: a site with one cluster need not name it.
            .all_value(".*")
        )
