"""What routes are given: the gateway, as whoever asks may use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Request

from paceline.api.access import CALLER
from paceline.api.gateway import Gateway
from paceline.api.owned import seen_by


async def _gateway(request: Request) -> Gateway:
    gateway: Gateway | Callable[[], Gateway] = request.app.state.gateway
    whole = gateway if isinstance(gateway, Gateway) else gateway()
    return seen_by(whole, request.scope.get(CALLER))


TheGateway = Annotated[Gateway, Depends(_gateway)]
