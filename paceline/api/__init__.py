"""The front ends: the gateway both share, and the OpenAI-compatible HTTP API."""

from __future__ import annotations

from paceline.api.gateway import Gateway, Targets
from paceline.api.routes import create_app
from paceline.api.state import ClusterStatus, SessionInfo
from paceline.api.stream import Stream

__all__ = ["ClusterStatus", "Gateway", "SessionInfo", "Stream", "Targets", "create_app"]
