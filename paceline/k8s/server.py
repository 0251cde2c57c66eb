"""Paceline's own HTTP API, reached through the API server's proxy: no port has to be open, no forward kept running.

The API server keeps `Authorization` for itself, so Paceline's key goes as `x-api-key`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from paceline.config import API_KEY_VARIABLE, secret
from paceline.errors import ConfigError, PacelineError, Unavailable, by_code
from paceline.k8s.api import Api
from paceline.k8s.kinds import PODS, SERVICES, Resource
from paceline.k8s.refusals import Asked, refusal, status_object

HTTP_PORT = 8000
CHAT_TIMEOUT_S = 300.0


class ServerProxy:
    """A Paceline behind a Service, or in one pod.

    `api_key` None is the environment's (PACELINE_API_KEY), if it has one.
    """

    def __init__(
        self,
        api: Api,
        name: str,
        *,
        resource: Resource = SERVICES,
        port: int = HTTP_PORT,
        api_key: str | None = None,
    ) -> None:
        self._api, self._resource, self._name, self._port = api, resource, name, port
        key = secret(API_KEY_VARIABLE) if api_key is None else api_key
        if key and not (key.isascii() and key.isprintable()):
            raise ConfigError("--api-key: not printable ASCII; check it, and PACELINE_API_KEY", param="api_key")
        self._headers = {"x-api-key": key} if key else {}

    @classmethod
    def of_service(cls, api: Api, ray_service: str, *, api_key: str | None = None) -> ServerProxy:
        """Through the Service that KubeRay keeps pointed at the pods whose proxy is ready."""
        return cls(api, f"{ray_service}-serve-svc", api_key=api_key)

    @classmethod
    def of_pod(cls, api: Api, pod: str, *, api_key: str | None = None) -> ServerProxy:
        return cls(api, pod, resource=PODS, api_key=api_key)

    def status(self) -> dict[str, Any]:
        """`GET /status`: every replica."""
        return self.ask("GET", "/status")

    def sessions(self) -> list[dict[str, Any]]:
        """`GET /v1/sessions`."""
        found = self.ask("GET", "/v1/sessions").get("data")
        return found if isinstance(found, list) else []

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        seed: int,
        max_tokens: int = 16,
        session_id: str | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        """One answer, whole, with its token ids; `seed` fixes it."""
        body = {
            "messages": [dict(message) for message in messages],
            "seed": seed,
            "max_tokens": max_tokens,
            "return_token_ids": True,
            **({} if session_id is None else {"session_id": session_id}),
            **fields,
        }
        return self.ask("POST", "/v1/chat/completions", body, timeout_s=CHAT_TIMEOUT_S)

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = 60.0) -> dict[str, Any]:
        return self.ask("POST", path, body or {}, timeout_s=timeout_s)

    def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = 60.0
    ) -> dict[str, Any]:
        """One request for JSON. Raises Unavailable if no pod answers, else the error that Paceline sent."""
        target = f"{quote(self._name, safe='')}:{self._port}"
        status, answer = self._api.send(
            method,
            self._resource.path(self._api.namespace) + f"/{target}/proxy{path}",
            body=body,
            headers=self._headers,
            read_timeout_s=timeout_s,
        )
        if status >= 300:
            raise self._refused(method, status, answer)
        try:
            found = json.loads(answer)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Unavailable(f"{self._resource.kind} {self._name} answers, but not as a Paceline server does")
        return found

    def _refused(self, method: str, status: int, answer: bytes) -> PacelineError:
        """Paceline's error, or the API server's: which of the two answered is in the body alone."""
        if told := status_object(answer):
            if status in (401, 403):
                verb = "get" if method == "GET" else "create"
                asked = Asked(verb, f"{self._resource.plural}/proxy", self._name, self._api.namespace)
                return refusal(asked, status, answer)
            return Unavailable(f"{self._resource.kind} {self._name} does not answer: {told.get('message')}")
        try:
            error = json.loads(answer)["error"]
            kind, message = by_code(str(error.get("code") or error.get("type"))), str(error["message"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return Unavailable(f"{self._resource.kind} {self._name} answered {status}")
        remedy = "; give a key with --api-key or in PACELINE_API_KEY" if status == 401 else ""
        return kind(message + remedy, param=error.get("param"))
