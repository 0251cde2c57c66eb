"""The public service in a thread of its own, for clients that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from paceline.api import Targets
from paceline.rpc.inference_service import InferenceHandlers
from tests.api.scripted import ScriptedTargets, gateway
from tests.rpc.served import serving

T = TypeVar("T")
PATIENCE_S = 20.0


@dataclass(frozen=True)
class Served:
    address: str
    targets: Any
    loop: asyncio.AbstractEventLoop

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What it gives, in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE_S)


@contextmanager
def served(targets: Targets | None = None, **options: Any) -> Iterator[Served]:
    """A server over scripted replicas, made in its own loop, until the block ends."""
    ready: Future[Served] = Future()
    over: Future[asyncio.Event] = Future()

    async def serve() -> None:
        done = asyncio.Event()
        over.set_result(done)
        made = targets or ScriptedTargets()
        async with serving(InferenceHandlers(gateway(made, **options))) as address:
            ready.set_result(Served(address, made, asyncio.get_running_loop()))
            await done.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        found = ready.result(PATIENCE_S)
        yield found
    finally:
        found.loop.call_soon_threadsafe(over.result().set)
        thread.join(PATIENCE_S)
