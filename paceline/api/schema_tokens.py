"""What clients send to /tokenize, /detokenize (in vLLM's words) and /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from paceline.api.fields import Body, Ignored, only
from paceline.api.prompts import ChatMessage
from paceline.api.schema_tools import MessageParam, ToolParam
from paceline.errors import InvalidRequest


class TokenizeRequest(Body):
    """Body of POST /tokenize: a text, or a conversation as /v1/chat/completions renders it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[MessageParam] | None = None
    tools: list[ToolParam] | None = Field(None, description="Functions the model is told of; only with messages.")
    add_special_tokens: bool | None = Field(None, description="Of a text: those the tokenizer adds, unless false.")
    add_generation_prompt: Annotated[Any, only(True)] = None
    continue_final_message: Annotated[Any, only(False)] = None
    return_token_strs: bool | None = Field(None, description="Also each token as text.")

    def content(self) -> str | list[ChatMessage]:
        """What to tokenize. Raises InvalidRequest unless it is one thing."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("prompt: either a prompt or messages", param="prompt")
        if self.prompt is not None and self.tools:
            raise InvalidRequest("tools: only with messages", param="tools")
        if self.messages is not None and self.add_special_tokens:
            raise InvalidRequest(
                "add_special_tokens: the chat template has them already; leave it out", param="add_special_tokens"
            )
        return [message.message() for message in self.messages or ()] if self.prompt is None else self.prompt


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]


class EmbeddingsRequest(Body):
    """Body of POST /v1/embeddings."""

    model: str | None = None
    input: Any
    encoding_format: Ignored = None
    dimensions: Ignored = None
    user: Ignored = None
