"""The console over real engines, in this process: no Ray, a port of its own, the same routes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Event, Thread

import uvicorn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from paceline.api import ClusterStatus, Gateway, SessionInfo, Targets, create_app
from paceline.engine.loop import EngineLoop
from paceline.sessions.handoff import Outcome
from paceline.speculation.local import LocalProposer
from paceline.types import Accepted, Delta, Frame, Request
from tests import tiny

TEMPLATE = "{% for m in messages %} w3 {{ m.content }}{% endfor %}{% if add_generation_prompt %} w4{% endif %}"


class EngineTargets(Targets):
    """Engines by name, in place of target replicas: a session stays where it is, a new one goes to the emptiest.

    `hold` stops every answer after its first frames until it is set again.
    """

    def __init__(self, loops: Mapping[str, EngineLoop]) -> None:
        self._loops = loops
        self._homes: dict[str, str] = {}
        self.hold = Event()
        self.hold.set()

    def _home(self, request: Request) -> str:
        counts = {name: list(self._homes.values()).count(name) for name in self._loops}
        emptiest = min(counts, key=lambda name: counts[name])
        return self._homes.setdefault(request.session_id or request.request_id, emptiest)

    async def generate(self, request: Request) -> AsyncIterator[Frame]:
        home, events = self._home(request), asyncio.get_running_loop()
        loop, frames = self._loops[home], asyncio.Queue[Frame]()
        await asyncio.wrap_future(loop.submit(request, lambda f: events.call_soon_threadsafe(frames.put_nowait, f)))
        assert request.params.seed is not None
        yield Accepted(home, request.params.seed, len(request.token_ids))
        ended, told = False, 0
        try:
            while not ended:
                frame = await frames.get()
                if told > 2:
                    await asyncio.to_thread(self.hold.wait, 10)
                ended, told = not isinstance(frame, Delta) or frame.finished, told + 1
                yield frame
        finally:
            if not ended:
                loop.abort(request.request_id)

    async def sessions(self) -> list[SessionInfo]:
        return [
            SessionInfo(each.session_id, name, each.tokens, each.running, each.num_bytes, each.tier)
            for name, loop in self._loops.items()
            for each in await asyncio.wrap_future(loop.call(loop.engine.sessions))
        ]

    async def close_session(self, session_id: str) -> bool:
        found = [
            await asyncio.wrap_future(loop.call(lambda engine=loop.engine: engine.drop_session(session_id)))
            for loop in self._loops.values()
        ]
        return any(found)

    async def hand_off(
        self, replica: str, sessions: Sequence[str] | None, count: int, to: str | None = None
    ) -> Outcome | None:
        return None

    async def abort(self, request_id: str) -> bool:
        found = [await asyncio.wrap_future(loop.end(request_id)) for loop in self._loops.values()]
        return any(found)

    def stop(self) -> None:
        for loop in self._loops.values():
            loop.stop()

    async def status(self) -> ClusterStatus:
        targets = []
        for name, loop in self._loops.items():
            engine = loop.engine
            usage = await asyncio.wrap_future(loop.call(engine.kv.usage))
            sources = {
                each.source: {"drafted": each.drafted, "accepted": each.accepted} for each in engine.tally.sources()
            }
            targets.append(
                {
                    "replica_id": name,
                    "running": engine.num_running,
                    "waiting": engine.num_waiting,
                    "kv_tokens_total": usage.total,
                    "kv_tokens_in_use": usage.in_use,
                    "kv_tokens_cached": usage.cached,
                    "sessions": len(engine.sessions()),
                    "drafted_tokens": engine.tally.drafted,
                    "accepted_tokens": engine.tally.accepted,
                    "speculation": {"verification": "coupled", "sources": sources, "late": 0},
                    "warnings": [],
                }
            )
        return ClusterStatus(targets=tuple(targets))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word for each id of the tiny models: w0, w1, …"""
    raw = Tokenizer(models.WordLevel({f"w{n}": n for n in range(tiny.VOCAB)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw)  # no special ids: every token has a text
    fast.chat_template = TEMPLATE
    return fast


def tiny_targets(*names: str) -> EngineTargets:
    """Engines over one tiny model, with a drafter that is that model itself, and so is right but for its depth."""
    model, tokenizer = tiny.tiny_llama(), tiny_tokenizer()
    return EngineTargets(
        {
            name: EngineLoop(
                tiny.engine_for(model, proposer=LocalProposer(tiny.drafter_for(model)), depth=3, decoder=tokenizer)
            )
            for name in names
        }
    )


def tiny_gateway(targets: Targets) -> Gateway:
    return Gateway(targets, tiny_tokenizer(), "tiny", 512, 60.0)


@contextmanager
def served(gateway: Gateway) -> Iterator[str]:
    """The application on a free port; gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(gateway), log_level="error", lifespan="off"))
        thread = Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
