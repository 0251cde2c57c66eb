"""docs/api-http.md: the HTTP API in words, from its OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]

HEAD = """{generated}
# HTTP API

{description}
The same as an OpenAPI document is at `/openapi.json` of a running server, to be read by people at `/docs`. What of
OpenAI's fields has which effect is in [openai-fields.md](openai-fields.md).
"""


def http_reference(generated: str) -> str:
    """The page; `generated` is its first line."""
    from paceline.api import create_app

    document = create_app(_nobody).openapi()
    return "\n".join(_page(document, generated)).rstrip() + "\n"


def _nobody() -> Any:
    raise AssertionError("nothing is served while documents are written")


def _page(document: Schema, generated: str) -> Iterator[str]:
    yield HEAD.format(generated=generated, description=document["info"]["description"].strip())
    for tag in document["tags"]:
        yield f"## {tag['name']}\n\n{tag['description']}\n"
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                if tag["name"] in operation["tags"]:
                    yield from _operation(f"{method.upper()} {path}", operation)
    yield "## Objects\n"
    for name, schema in document["components"]["schemas"].items():
        yield from _object(name, schema)


def _operation(title: str, operation: Schema) -> Iterator[str]:
    yield f"### {title}\n"
    if text := operation.get("description"):
        yield f"{_one_line(text)}\n"
    rows = [_parameter(each) for each in operation.get("parameters", ())]
    if "requestBody" in operation:
        rows.append(f"- Body: {_words(_content(operation['requestBody'])['application/json']['schema'])}")
    for kind, content in _content(operation["responses"]["200"]).items():
        rows.append(f"- Answer, `{kind}`: {_answer(kind, content.get('schema'))}")
    errors = [status for status in operation["responses"] if status != "200"]
    rows.append(f"- Errors: {', '.join(errors)}")
    yield "\n".join(rows) + "\n"


def _answer(kind: str, schema: Schema | None) -> str:
    if not schema:
        return "text"
    if kind != "text/event-stream":
        return _words(schema)
    _, told = schema["properties"]["data"]["anyOf"]
    return f"events of {_words(told['contentSchema'])}"


def _parameter(parameter: Schema) -> str:
    return f"- `{parameter['name']}` in the {parameter['in']}: {_words(parameter['schema'])}"


def _object(name: str, schema: Schema) -> Iterator[str]:
    yield f"### {name}\n"
    if text := schema.get("description"):
        yield f"{_one_line(text)}\n"
    if "properties" not in schema:
        yield f"{_words(schema)}\n"
        return
    required = schema.get("required", ())
    lines = ["| Field | Type | Meaning |", "| --- | --- | --- |"]
    for field, inner in schema["properties"].items():
        mark = "" if field in required else "?"
        text = _one_line(inner.get("description", ""))
        lines.append(f"| `{field}`{mark} | {_cell(_words(inner))} | {_cell(text)} |")
    yield "\n".join(lines) + "\n"


def _words(schema: Schema) -> str:
    """A schema as people say it. Null is as good as leaving out, so it is not mentioned."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    options = schema.get("anyOf") or schema.get("oneOf")
    if options:
        return " or ".join(_words(each) for each in options if each.get("type") != "null")
    if "const" in schema or "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_words(schema['items'])}" if schema.get("items") else "list"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_words(schema['additionalProperties'])}"
    bounds = {"minimum": "≥", "maximum": "≤", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[bound]:g}" for bound, sign in bounds.items() if bound in schema]
    return f"{schema.get('type', 'any')} {', '.join(limits)}".strip()


def _content(part: Schema) -> Schema:
    found: Schema = part.get("content", {})
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
