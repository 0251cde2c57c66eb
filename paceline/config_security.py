"""Settings of who may ask, how much, and for how long. They name files and variables; no secret is among them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from paceline.config_base import Auto, Positive, Seconds, Settings


class ApiKeySettings(Settings):
    """Who may use the server. With neither a file nor a variable, everybody may."""

    file: str | None = Field(
        None,
        description="File with hashed keys, as `paceline keys create` prints them, such as a mounted secret. Read "
        "again when it changes; each router reads its own machine's.",
    )
    environment: str | None = Field(
        None, description="Environment variable of the routers that holds the same lines, instead of a file."
    )
    metrics: Literal["open", "key", "admin"] = Field(
        "key", description="Who may read /metrics, if there are keys: everybody, any key, or one with `admin`."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.file is not None and self.environment is not None:
            raise ValueError("file and environment exclude each other; keep one")
        return self

    @property
    def enabled(self) -> bool:
        return self.file is not None or self.environment is not None


class DraftSecurity(Settings):
    """Who may talk to the drafts' port, where target replicas send what users wrote, as token ids."""

    mode: Literal["auto", "token", "tls", "off"] = Field(
        "auto",
        description="auto: a random token, new with each deployment; token: yours; both keep strangers out but hide "
        "nothing on the way. tls: certificates on both sides, encrypted. off: everybody, with draft.host 127.0.0.1 "
        "alone.",
    )
    token_file: str | None = Field(None, description="token: the file that holds it, on every node.")
    token_environment: str | None = Field(None, description="token: or the environment variable that does.")
    cert_file: str | None = Field(None, description="tls: certificate of this node's replicas, PEM.")
    key_file: str | None = Field(None, description="tls: its private key.")
    ca_file: str | None = Field(None, description="tls: the authority that signed all of them, and nothing else.")
    server_name: str = Field(
        "paceline-draft",
        description="tls: name in every draft's certificate (subjectAltName), since replicas have no fixed address.",
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.mode == "token" and (self.token_file is None) == (self.token_environment is None):
            raise ValueError("mode token needs one of token_file and token_environment")
        if self.mode == "tls" and None in (self.cert_file, self.key_file, self.ca_file):
            raise ValueError("mode tls needs cert_file, key_file and ca_file")
        return self


class LimitSettings(Settings):
    """Bounds on what one client may send, and on how slowly."""

    max_body_bytes: Positive = Field(8 << 20, description="Of a request's body; more is refused with 413.")
    max_messages: Positive = Field(2048, description="Messages in one request.")
    max_prompt_chars: Positive | Auto = Field(
        "auto",
        description="Characters of a prompt, or of all messages of a request, refused before they are "
        "tokenized; auto is 64 for each token of the model's context.",
    )
    max_json_depth: Annotated[int, Field(ge=8, le=200)] = Field(64, description="Objects and lists in each other.")
    max_json_containers: Positive = Field(20_000, description="Objects and lists in one body.")
    max_json_fields: Positive = Field(100_000, description="Fields of all objects in one body.")
    max_json_values: Positive = Field(
        1_000_000, description="Values in one body, as told by its commas; a prompt of token ids has many."
    )
    max_header_bytes: Positive = Field(32 << 10, description="All headers of a request; more is refused with 431.")
    max_headers: Positive = Field(100, description="Headers of a request.")
    max_url_bytes: Positive = Field(8 << 10, description="Path and query of a request; more is refused with 414.")
    body_timeout_s: Seconds = Field(30.0, description="A body that takes longer to arrive is given up, with 408.")
    slow_client_timeout_s: Seconds = Field(
        30.0, description="A client that takes nothing of its answer for so long loses it."
    )
