"""A wait that ends: with what was awaited, or with an error a client can read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from paceline.errors import PacelineError

T = TypeVar("T")


async def bounded(answer: Awaitable[T], scope: asyncio.Timeout, late: PacelineError) -> T:
    """What `answer` gives within `scope`, else `late` is raised. A timeout of the answer's own stays what it is."""
    try:
        async with scope:
            return await answer
    except TimeoutError:
        if not scope.expired():
            raise
        raise late from None
