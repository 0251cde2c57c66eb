"""values.schema.json: types from defaults, constraints from comments, Paceline's settings from its own schema."""

from __future__ import annotations

from typing import Any

from values_file import Value

from paceline.config import AppSettings

Schema = dict[str, Any]
SETTINGS = "config"
"""The value that holds further settings of Paceline, as its configuration reference names them."""
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def schema_of(values: tuple[Value, ...]) -> Schema:
    """Of the whole file. Helm puts `global` among the values of every subchart, so it is always allowed."""
    sections = {value.name: value for value in values}
    schema = _section(values, sections)
    schema["properties"]["global"] = {"type": "object"}
    settings, definitions = _settings()
    schema["properties"][SETTINGS] |= settings
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema, "definitions": definitions}


def _section(values: tuple[Value, ...], sections: dict[str, Value]) -> Schema:
    properties = {value.name: _value(value, sections) for value in values}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _value(value: Value, sections: dict[str, Value]) -> Schema:
    comment = value.comment
    schema: Schema = {"description": comment.description} if comment.description else {}
    if comment.each:
        # Of a map `pattern` is what its keys are like: as patternProperties, a wrong key is named in the message.
        names = comment.schema["pattern"]
        entries = {names: _value(sections[comment.each], sections)}
        return schema | {"type": "object", "additionalProperties": False, "patternProperties": entries}
    if value.children:
        schema |= _section(value.children, sections) | comment.schema
        if comment.like:
            schema["properties"] = _value(sections[comment.like], sections)["properties"] | schema["properties"]
        if comment.subchart:
            schema["properties"]["global"] = {"type": "object"}
        return schema
    if not {"type", "enum", "anyOf", "const"} & comment.schema.keys():
        schema["type"] = TYPES[type(value.default)]
    return schema | comment.schema


def _settings() -> tuple[Schema, Schema]:
    """Paceline's settings and the definitions they refer to.

    In draft-07 what stands beside a `$ref` counts for nothing, so only the reference stays.
    """
    schema = _draft_07(AppSettings.model_json_schema())
    definitions = schema.pop("$defs")
    return {"additionalProperties": False, "properties": schema["properties"]}, definitions


def _draft_07(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_draft_07(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(reference := schema.get("$ref"), str):
        return {"$ref": reference.replace("#/$defs/", "#/definitions/")}
    if "properties" in schema:  # a property may be called `default` or `title`
        named = {key: _draft_07(each) for key, each in schema["properties"].items()}
        rest = {key: each for key, each in schema.items() if key not in ("properties", "required")}
        return {**_draft_07(rest), "properties": named}
    return {
        key: {name: _draft_07(each) for name, each in value.items()} if key == "$defs" else _draft_07(value)
        for key, value in schema.items()
        if key not in ("title", "default")
    }
