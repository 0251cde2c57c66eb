"""What the defaults and every preset render, as files: `python -m tests.k8s.snapshot` writes them anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.k8s import charts

FOLDER = Path(__file__).parent / "snapshots"
CASES: dict[str, dict[str, Any]] = {"defaults": {}} | {name: charts.preset(name) for name in charts.PRESETS}


def text(case: str) -> str:
    return yaml.dump_all(charts.render(CASES[case]), sort_keys=False, width=120)


def main() -> None:
    for case in CASES:
        (FOLDER / f"{case}.yaml").write_text(text(case))


if __name__ == "__main__":
    main()
