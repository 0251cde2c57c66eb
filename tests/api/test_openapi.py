"""The OpenAPI document is valid and tells of every route, error and event."""

from __future__ import annotations

from typing import Any

from openapi_spec_validator import validate

from paceline.api import create_app
from tests.api.scripted import gateway


def document() -> Any:
    return create_app(gateway()).openapi()


def operations() -> list[tuple[str, dict[str, Any]]]:
    return [(path, operation) for path, methods in document()["paths"].items() for operation in methods.values()]


def test_the_document_is_valid() -> None:
    validate(document())


def test_every_operation_has_an_id_of_its_own_and_one_tag() -> None:
    found = operations()
    assert len({operation["operationId"] for _, operation in found}) == len(found)
    assert all(len(operation["tags"]) == 1 for _, operation in found)


def test_no_error_is_in_another_form_than_openais() -> None:
    for path, operation in operations():
        for status, answer in operation["responses"].items():
            if status != "200":
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Error"}, path


def test_streams_are_described_as_events() -> None:
    streaming = {
        path
        for path, operation in operations()
        if "text/event-stream" in operation["responses"]["200"].get("content", {})
    }
    assert streaming == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/sessions/{session_id}/turns",
    }


def test_every_reference_leads_somewhere() -> None:
    schemas = document()["components"]["schemas"]

    def references(part: Any) -> set[str]:
        if isinstance(part, dict):
            own = {part["$ref"]} if isinstance(part.get("$ref"), str) else set()
            return own.union(*map(references, part.values()))
        return set().union(*map(references, part)) if isinstance(part, list) else set()

    assert {name.rsplit("/", 1)[-1] for name in references(document())} <= schemas.keys()
