"""Checks custom resources as an API server does: against the schema in their CRD, unknown fields refused.

A CRD's schema is JSON schema but for a few marks: int-or-string, nullable, unknown fields kept, embedded resources.
"""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

FOLDER = Path(__file__).parent / "data"
Schema = dict[str, Any]
OBJECT_META = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}


def definition(kind: str) -> dict[str, Any]:
    """KubeRay's CustomResourceDefinition of RayService or RayCluster."""
    packed = (FOLDER / f"ray.io_{kind.lower()}s.yaml.gz").read_bytes()
    found: dict[str, Any] = yaml.load(gzip.decompress(packed), yaml.CSafeLoader)
    return found


def errors(resource: dict[str, Any]) -> list[str]:
    """What its schema says against a resource, by field; empty if nothing."""
    validator = _validators(resource["kind"])[resource["apiVersion"]]
    found = validator.iter_errors(resource)
    return [f"{'.'.join(map(str, each.absolute_path))}: {each.message[:200]}" for each in found]


@cache
def _validators(kind: str) -> dict[str, jsonschema.Draft4Validator]:
    spec = definition(kind)["spec"]
    return {
        f"{spec['group']}/{version['name']}": jsonschema.Draft4Validator(
            _json_schema(version["schema"]["openAPIV3Schema"], root=True)
        )
        for version in spec["versions"]
        if version["served"]
    }


def _json_schema(schema: Schema, *, root: bool = False, strict: bool = True) -> Schema:
    """`strict` refuses fields that have no schema; not below anyOf and its like, which only add conditions."""
    schema = dict(schema)
    nullable = schema.pop("nullable", False)
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
        schema.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    open_ended = schema.pop("x-kubernetes-preserve-unknown-fields", False)
    embedded = schema.pop("x-kubernetes-embedded-resource", False)
    properties = schema.get("properties")
    if properties is not None:
        schema["properties"] = {key: _json_schema(each, strict=strict) for key, each in properties.items()}
        if strict and not open_ended:
            schema.setdefault("additionalProperties", False)
    if root or embedded:
        schema["properties"] = schema.get("properties", {}) | OBJECT_META
    for key in ("items", "not", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = _json_schema(schema[key], strict=strict)
    for key in ("allOf", "anyOf", "oneOf"):
        if key in schema:
            schema[key] = [_json_schema(each, strict=False) for each in schema[key]]
    return {"anyOf": [{"type": "null"}, schema]} if nullable else schema
