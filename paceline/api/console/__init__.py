"""The web console: one page, its files, and the routes that serve them."""

from __future__ import annotations

from paceline.api.console.routes import console_router

__all__ = ["console_router"]
