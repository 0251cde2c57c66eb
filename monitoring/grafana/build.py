"""Writes the dashboards: `python monitoring/grafana/build.py`; with `--check`, fails if the files differ."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import overview
import pools
import speculation
from panels import Dashboard

FOLDER = Path(__file__).parent / "dashboards"
ALL: tuple[Dashboard, ...] = (
    overview.DASHBOARD,
    speculation.DASHBOARD,
    pools.SESSIONS,
    pools.AUTOSCALING,
)


def files() -> dict[Path, str]:
    """Every file, as it should be."""
    return {FOLDER / f"{each.uid}.json": json.dumps(each.json(), indent=2) + "\n" for each in ALL}


def main() -> None:
    wanted = files()
    if "--check" in sys.argv[1:]:
        found = {path: path.read_text() for path in FOLDER.glob("*.json")}
        sys.exit(
            None if found == wanted else "the dashboards differ from their source: python monitoring/grafana/build.py"
        )
    for path, text in wanted.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
