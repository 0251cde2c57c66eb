"""An API server's refusals as lines: what was refused, and what to do about it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from paceline.errors import ClusterError
from paceline.k8s.errors import Conflict, Denied, Gone, NotFound, TooMany

_USER = re.compile(r'User "([^"]+)"')


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request was for, as its refusal names it."""

    verb: str  # RBAC's word
    what: str  # `rayservices.ray.io`, or a path
    name: str = ""
    namespace: str | None = None

    def __str__(self) -> str:
        where = "" if self.namespace is None else f" in namespace {self.namespace}"
        return f"{self.verb} {self.what}{f' {self.name}' if self.name else ''}{where}"


def refusal(asked: Asked, status: int, body: bytes) -> ClusterError:
    """The error of an answer that is not 2xx."""
    told = status_object(body)
    message = " ".join(str(told.get("message") or body.decode(errors="replace")[:300]).split()) or f"HTTP {status}"
    if status == 401:
        return Denied(f"{asked}: the API server does not know this account (401): log in again, or give --context")
    if status == 403:
        return _denied(asked, message)
    if status == 404:
        return NotFound(f"{asked}: {message}")
    if status == 409:
        return _conflict(asked, told, message)
    if status == 410:
        return Gone(f"{asked}: {message}")
    if status == 429:
        return TooMany(f"{asked}: {message}{_causes(told)}")
    if status in (400, 422):
        return ClusterError(f"{asked}: refused as it is written: {message}")
    return ClusterError(f"{asked}: the API server answered {status}: {message}")


def status_object(body: bytes) -> Mapping[str, Any]:
    """The `Status` an API server answers with; empty if it is none."""
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and found.get("kind") == "Status" else {}


def _denied(asked: Asked, message: str) -> ClusterError:
    if message.endswith("is forbidden:"):  # of an apply to what is not there yet, no more is said
        asked = replace(asked, verb="create")
    elif "forbidden: User" not in message:  # an admission plugin's words, such as a quota's or Pod Security's
        return Denied(f"{asked}: {message}")
    user = _USER.search(message)
    who = f" to {user[1]}" if user else ""
    return Denied(f"{asked}: not allowed{who}; `paceline k8s role` prints the Role it takes")


def _causes(told: Mapping[str, Any]) -> str:
    """What the message leaves out: of an eviction, which disruption budget it is."""
    causes = (told.get("details") or {}).get("causes") or ()
    return "".join(f" {' '.join(str(cause.get('message') or '').split())}" for cause in causes)


def _conflict(asked: Asked, told: Mapping[str, Any], message: str) -> ClusterError:
    """Of server-side apply: the fields and who has them; of others, the server's words."""
    causes = [
        cause
        for cause in (told.get("details") or {}).get("causes") or ()
        if cause.get("reason") == "FieldManagerConflict"
    ]
    if not causes:
        return Conflict(f"{asked}: {message}")
    fields = ", ".join(dict.fromkeys(str(cause.get("field", "")).lstrip(".") for cause in causes))
    holders = re.findall(r'conflict with "([^"]+)"', " ".join(str(cause.get("message")) for cause in causes))
    return Conflict(
        f"{asked}: {fields} is set by {', '.join(dict.fromkeys(holders)) or 'another manager'}; "
        "--force-conflicts takes it over, or leave it out of the values"
    )
