"""Write the dashboard, the rules and docs/metrics.md; with ``--check`` only say which of them are out of date."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Dict

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from generate.alerts import alert_groups
from generate.board import board
from generate.recording import recording_groups
from generate.reference import reference

ROOT = Path(__file__).resolve().parents[2]

# What Prometheus has no use for; for whoever opens the file.
_NOTE = "# Written by `./dev dashboards` from dashboards/generate/{source}; change it there.\n"


def written() -> Dict[str, str]:
    """The text of each file, by its path in the project."""
    return {
        "dashboards/adoptd.json": json.dumps(board(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n",
        "dashboards/rules.yml": _NOTE.format(source="recording.py") + _yaml({"groups": recording_groups()}),
        "dashboards/alerts.yml": _NOTE.format(source="alerts.py") + _yaml({"groups": alert_groups()}),
        "docs/metrics.md": reference(),
    }


def _yaml(value: object) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, width=110, allow_unicode=True))


def main() -> int:
    """The exit status: 1 if ``--check`` found a difference."""
    texts = written()
    if "--check" in sys.argv[1:]:
        differ = [name for name, text in texts.items() if _read(ROOT / name) != text]
        for name in differ:
            print(f"{name} is not what dashboards/generate/ writes: run ./dev dashboards", file=sys.stderr)
        return 1 if differ else 0
    for name, text in texts.items():
        (ROOT / name).write_text(text, encoding="utf-8")
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
