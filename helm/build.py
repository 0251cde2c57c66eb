"""Writes what the chart has from elsewhere: `python helm/build.py`; with `--check`, fails if the files differ.

From its values.yaml: values.schema.json and README.md. From monitoring/: copies of the alerts and dashboards, since
Helm reads no file outside of a chart. With `--package FOLDER`, makes the archive that is published.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from package import package
from readme import readme_of
from schema import schema_of
from values_file import read

CHART = Path(__file__).parent / "paceline"
MONITORING = Path(__file__).parent.parent / "monitoring"


def files() -> dict[Path, str]:
    """Every file, as it should be."""
    values = read(CHART / "values.yaml")
    return {
        CHART / "values.schema.json": json.dumps(schema_of(values), indent=1, ensure_ascii=False) + "\n",
        CHART / "README.md": readme_of(values),
        **copies(),
    }


def copies() -> dict[Path, str]:
    """The chart's copies of monitoring/, with what they must hold."""
    folder = CHART / "files"
    dashboards = (MONITORING / "grafana" / "dashboards").glob("*.json")
    return {
        folder / "alerts.yaml": (MONITORING / "prometheus" / "alerts.yaml").read_text(),
        **{folder / "dashboards" / path.name: path.read_text() for path in sorted(dashboards)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the files differ from what they are made from")
    parser.add_argument("--package", type=Path, metavar="FOLDER", help="make the archive, with KubeRay's operator")
    asked = parser.parse_args()
    wanted = files()
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    if stale and (asked.check or asked.package):
        names = ", ".join(path.name for path in stale)
        sys.exit(f"{names}: not what it is made from: python helm/build.py")
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path])
    if asked.package:
        print(package(CHART, asked.package))


if __name__ == "__main__":
    main()
