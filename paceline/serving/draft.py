"""A draft replica: the drafter in its thread, a gRPC server of its own in the event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr
from ray import serve

from paceline.config import AppSettings
from paceline.models import resolve
from paceline.rpc.draft_credentials import DraftCredentials
from paceline.rpc.draft_server import DraftService, start_draft_server
from paceline.serving.draft_exchange import DraftExchange
from paceline.serving.hosts import own_host, whereabouts
from paceline.serving.logs import join_serve_logs
from paceline.serving.peers import KV_IDENTITY, ServePeers
from paceline.serving.ranks import Ranks, loading, rank_engine, ranks_status
from paceline.serving.reports import DraftReport, Starting
from paceline.sessions.handoff import Bound, Receipt, Room
from paceline.speculation.frames import Hello
from paceline.speculation.telemetry import DraftedSequence
from paceline.telemetry.generation import tell_drafted
from paceline.telemetry.tracing import NoTracer, Tracer, open_tracer

if TYPE_CHECKING:
    # torch and transformers take seconds to import; the application builder imports this module without them.
    from paceline.engine.kv_parts import KVPart
    from paceline.engine.load import LoadedModel
    from paceline.engine.loop import DrafterLoop

DRAIN_GRACE_S = 2.0
"""How long open streams may go on after the replica left the membership."""


class Draft:
    """Guesses for every target that connects. Decorated and bound by `paceline.serving.app.build`.

    Targets find its address in the replica's metadata, which the controller broadcasts with the replica set,
    and talk to it directly: no frame goes through a Serve handle.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: AppSettings, token: SecretStr | None = None
    ) -> None:
        starting = Starting()
        credentials = DraftCredentials.of(settings.draft.security, token)
        context = serve.get_replica_context()
        self.replica_id: str = context.replica_id.unique_id
        join_serve_logs(settings.telemetry)
        self._tracer = open_tracer(settings.telemetry, "paceline-draft", self.replica_id)
        told = _told_in(asyncio.get_running_loop(), self._tracer, self.replica_id)
        self._ranks = await Ranks.start(settings.draft, settings.draft_model)
        try:
            self._loop, model = await loading(self._ranks, asyncio.to_thread(_start, settings, self._ranks, told))
        except BaseException:
            if self._ranks is not None:
                await self._ranks.stop()
            raise
        hello = Hello(self.replica_id, settings.draft_model, model.fingerprint)
        self._service = DraftService(self._loop, hello, credentials)
        self._kv_identity = model.kv_identity
        self._exchange = DraftExchange(
            self.replica_id,
            self._loop,
            lambda: ServePeers(context, self._kv_identity),
            within_s=settings.sessions.handoff_timeout_s,
        )
        host = own_host(settings.draft.host)
        self._server, self.address = await start_draft_server(self._service, host, settings.draft.port)
        self._settings = settings
        if self._ranks is not None:
            await self._ranks.watch(self._loop.abandon)
        self._report = DraftReport(self.replica_id, self._loop.meter, starting.done())

    def record_replica_metadata(self) -> dict[str, Any]:
        """Captured once, after `__init__`."""
        return {"address": self.address, KV_IDENTITY: self._kv_identity}

    async def room(self) -> Room | None:
        """What another replica may hand over to this one; None if it leaves itself."""
        return await self._exchange.room()

    async def receive(self, bound: Bound, parts: list[KVPart]) -> Receipt | None:
        """Take what another replica hands over; None if it is not for this one."""
        return await self._exchange.take(parts) if bound.replica == self.replica_id else None

    async def status(self) -> dict[str, Any]:
        """Numbers about this replica, for /status and `paceline status`."""
        drafter = self._loop.drafter
        usage = await asyncio.wrap_future(self._loop.call(drafter.kv.usage))
        return {
            "replica_id": self.replica_id,
            "pid": os.getpid(),
            **whereabouts(),
            "address": self.address,
            "model": self._settings.draft_model,
            "streams": len(self._service.streams),
            "sequences": drafter.num_sequences,
            "drafted_tokens": drafter.drafted_tokens,
            "rolled_back_tokens": drafter.rolled_back_tokens,
            "kv_tokens_total": usage.total,
            "kv_tokens_in_use": usage.in_use,
            "kv_tokens_cached": usage.cached,
            **self._report.status(),
            "handoff": self._exchange.numbers(),
            **ranks_status(self._settings.draft, self._ranks),
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Polled by Serve for the policy, `paceline.autoscaling`: a `DraftLoad`'s numbers."""
        return self._report.load().numbers()

    def check_health(self) -> None:
        if self._ranks is not None:
            self._ranks.check_health()
        if not self._loop.healthy:
            raise RuntimeError("the drafter's thread has ended")

    async def __del__(self) -> None:
        """Awaited by Serve on a graceful shutdown, also of a replica that is still loading."""
        if not hasattr(self, "_server"):
            return
        await self._server.stop(grace=DRAIN_GRACE_S)
        await self._exchange.finish()
        await asyncio.to_thread(self._loop.stop)
        if self._ranks is not None:
            await self._ranks.stop()
        await asyncio.to_thread(self._tracer.close)


def _told_in(
    events: asyncio.AbstractEventLoop, tracer: Tracer, replica_id: str
) -> Callable[[DraftedSequence], object] | None:
    """What the drafter tells of a sequence becomes a span in the event loop: its own thread goes on drafting."""
    if isinstance(tracer, NoTracer):
        return None
    return lambda ended: events.call_soon_threadsafe(tell_drafted, tracer, ended, replica_id)


def _start(
    settings: AppSettings, ranks: Ranks | None, told: Callable[[DraftedSequence], object] | None
) -> tuple[DrafterLoop, LoadedModel]:
    from paceline.engine.load import load_model
    from paceline.engine.loop import DrafterLoop

    leader = ranks.leader if ranks is not None else None
    model = load_model(resolve(settings.draft_model).path, rank_engine(settings.draft), leader)
    return DrafterLoop(model.drafter(), told), model
