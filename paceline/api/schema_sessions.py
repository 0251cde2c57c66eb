"""What clients send about sessions and replicas."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from paceline.api.fields import Body
from paceline.api.schema_tools import MessageParam


class CreateSessionBody(Body):
    """Body of POST /v1/sessions."""

    session_id: str | None = Field(None, description="Its name; one is made up if there is none.")
    messages: list[MessageParam] | None = Field(None, description="What was said already.")
    seed: int | None = Field(None, description="Of every appended turn that has none of its own.")


class ForkSessionBody(Body):
    """Body of POST /v1/sessions/{id}/fork."""

    session_id: str | None = Field(None, description="The fork's name; one is made up if there is none.")


class MoveSessionBody(Body):
    """Body of POST /v1/sessions/{id}/move."""

    replica: str | None = Field(None, description="The target replica to take its KV; one is chosen if there is none.")


class RelieveBody(Body):
    """Body of POST /v1/replicas/{id}/relieve."""

    sessions: Annotated[int, Field(ge=1)] = Field(description="How many to hand to other replicas, at most.")
