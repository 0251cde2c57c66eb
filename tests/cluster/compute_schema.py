"""The body of Compute Engine's `instances.insert` as a JSON Schema, from Google's own description of its API.

`tests/data/compute-instance.json` is what this makes of the description that google-api-python-client brings. Make it
anew, with that package installed: python -m tests.cluster.compute_schema
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STORED = Path(__file__).parents[1] / "data" / "compute-instance.json"


def schema(discovery: dict[str, Any]) -> dict[str, Any]:
    """Names, types and enums of `Instance` and of all it is made of. An unknown key is an error, unlike in Google's."""
    found: dict[str, Any] = {}
    waiting = ["Instance"]
    while waiting:
        name = waiting.pop()
        if name not in found:
            properties = discovery["schemas"][name].get("properties", {})
            found[name] = {
                "type": "object",
                "additionalProperties": False,
                "properties": {key: _field(value, waiting) for key, value in properties.items()},
            }
    return {
        "$comment": f"{discovery['title']}, revision {discovery['revision']}; made by tests/cluster/compute_schema.py",
        "$ref": "#/$defs/Instance",
        "$defs": dict(sorted(found.items())),
    }


def _field(field: dict[str, Any], waiting: list[str]) -> dict[str, Any]:
    """One property. Google writes 64-bit integers as strings in JSON, and takes numbers too."""
    if reference := field.get("$ref"):
        waiting.append(reference)
        return {"$ref": f"#/$defs/{reference}"}
    if field["type"] == "array":
        return {"type": "array", "items": _field(field["items"], waiting)}
    if field["type"] == "object":
        values = field.get("additionalProperties")
        return {"type": "object", **({"additionalProperties": _field(values, waiting)} if values else {})}
    if field["type"] == "any":
        return {}
    if "enum" in field:
        return {"enum": field["enum"]}
    return {"type": ["string", "integer"] if field.get("format") in ("int64", "uint64") else field["type"]}


def installed() -> dict[str, Any]:
    """The description that the installed google-api-python-client brings; ImportError without it."""
    import googleapiclient  # type: ignore[import-not-found]

    path = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents" / "compute.v1.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


if __name__ == "__main__":
    STORED.write_text(json.dumps(schema(installed()), indent=1) + "\n")
