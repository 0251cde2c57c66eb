"""A real target replica of a tiny model in this process: its own streams and engine thread, without Serve."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from paceline.api import ClusterStatus, SessionInfo, Targets
from paceline.engine.loop import EngineLoop
from paceline.rpc.frame_feed import Feeds
from paceline.serving.exchange import Exchange
from paceline.serving.target import Target
from paceline.sessions.handoff import Outcome
from paceline.telemetry.tracing import NoTracer
from paceline.types import Frame, Request
from tests import tiny
from tests.api.scripted import tokenizer

VOCABULARY = len(tokenizer().get_vocab())


class _Bare(Target):
    """A target without what Serve and drafts add to it."""

    def __init__(self, loop: EngineLoop) -> None:
        self.replica_id = "target-1"
        self._loop = loop
        self._feeds, self._feed_address = Feeds(), None
        self._tracer = NoTracer()
        self._exchange = Exchange(self.replica_id, loop, _nobody, within_s=0.0, grace_s=0.0)

    def __del__(self) -> None:
        """Whoever made the loop stops it."""


class EngineTarget(Targets):
    """One replica behind the gateway's seam. `steps` counts the engine's; `seed` is that of the model's weights."""

    def __init__(self, seed: int = 0, **engine: Any) -> None:
        self.loop = EngineLoop(tiny.engine_for(tiny.tiny_llama(seed, vocab_size=VOCABULARY), **engine))
        self.steps = 0
        self._step, self.loop.engine.step = self.loop.engine.step, self._counted  # type: ignore[method-assign]
        self.target = _Bare(self.loop)

    def generate(self, request: Request) -> AsyncIterator[Frame]:
        return self.target.generate(request)

    async def sessions(self) -> list[SessionInfo]:
        return [SessionInfo(*held) for held in await self.target.sessions()]

    async def close_session(self, session_id: str) -> bool:
        return await self.target.close_session(session_id)

    async def hand_off(
        self, replica: str, sessions: Sequence[str] | None, count: int, to: str | None = None
    ) -> Outcome | None:
        return None

    async def abort(self, request_id: str) -> bool:
        return await self.target.abort(request_id)

    async def status(self) -> ClusterStatus:
        return ClusterStatus()

    @property
    def open_streams(self) -> bool:
        return bool(self.target._exchange.streams)

    def _counted(self) -> Any:
        self.steps += 1
        return self._step()


@contextmanager
def engine_target(**engine: Any) -> Iterator[EngineTarget]:
    """Until the block ends."""
    made = EngineTarget(**engine)
    try:
        yield made
    finally:
        made.loop.stop()


def _nobody(_: Any) -> Any:
    raise AssertionError("without peers nobody is asked")
