"""The Grafana dashboard and the Prometheus rules, described in Python and committed as plain files beside this package.

Owns what is drawn and what is alerted on. Sites install the files and never need this package; a test fails when
the two differ. Called by ``./dev dashboards``.
"""
