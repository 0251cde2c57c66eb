"""Writes the chart's values.schema.json and README.md from its values.yaml: `python helm/build.py`.

With `--check`, fails if they differ from it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from readme import readme_of
from schema import schema_of
from values_file import read

CHART = Path(__file__).parent / "paceline"


def files() -> dict[Path, str]:
    """Every file, as it should be."""
    values = read(CHART / "values.yaml")
    return {
        CHART / "values.schema.json": json.dumps(schema_of(values), indent=1, ensure_ascii=False) + "\n",
        CHART / "README.md": readme_of(values),
    }


def main() -> None:
    wanted = files()
    if "--check" in sys.argv[1:]:
        stale = [path.name for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
        sys.exit(f"{', '.join(stale)}: not what values.yaml says: python helm/build.py" if stale else None)
    for path, text in wanted.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
