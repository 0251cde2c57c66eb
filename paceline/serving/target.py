"""A target replica: the engine in its thread, the draft streams in the event loop, frames in between."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr
from ray import serve

from paceline.autoscaling.presets import resolved
from paceline.config import AppSettings
from paceline.engine.status import status_of
from paceline.errors import PacelineError, Unavailable
from paceline.models import resolve
from paceline.rpc.draft_client import DraftPool
from paceline.rpc.draft_credentials import DraftCredentials
from paceline.rpc.frame_codec import Named
from paceline.rpc.frame_feed import Feeds, start_feed_server
from paceline.rpc.mailbox import Mailbox
from paceline.serving.discovery import ReplicaWatch
from paceline.serving.exchange import Exchange
from paceline.serving.hosts import own_host, whereabouts
from paceline.serving.journal import ClusterKeyValue
from paceline.serving.leaving import note_left
from paceline.serving.logs import join_serve_logs
from paceline.serving.peers import KV_IDENTITY, ServePeers
from paceline.serving.ranks import Ranks, loading, rank_engine, ranks_status
from paceline.serving.reports import Starting, TargetReport
from paceline.serving.streams import OpenStream
from paceline.sessions.handoff import Bound, Move, Outcome, Receipt, Room
from paceline.sessions.placement import Route
from paceline.sessions.prefixes import sketch
from paceline.speculation.acceptance import Kind
from paceline.speculation.frames import Hello
from paceline.speculation.idle import Facts, IdleWatch
from paceline.speculation.proposer import Source
from paceline.speculation.remote import RemoteProposer
from paceline.speculation.telemetry import merged
from paceline.telemetry.generation import Generation
from paceline.telemetry.tracing import open_tracer
from paceline.types import Accepted, Failure, Frame, Request, SourceMetrics

if TYPE_CHECKING:
    # torch and transformers take seconds to import; the application builder imports this module without them.
    from paceline.engine.kv_entry import SessionKV
    from paceline.engine.kv_parts import KVPart
    from paceline.engine.load import LoadedModel
    from paceline.engine.loop import EngineLoop

logger = logging.getLogger(__name__)

FEED_LOST = Unavailable("the way from the replica to the router was lost; send it again")
MAX_ADVERTISED_SESSIONS = 512
MAX_ADVERTISED_ENTRIES = 128
MAX_QUEUED_PREFILL_S = 30.0
"""What may wait, at the pace of this replica, where the settings leave it to it: about as long as a person would."""


class Target:
    """Verifies, holds sessions, answers. Decorated and bound by `paceline.serving.app.build`."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        settings: AppSettings,
        draft_deployment: str | None,
        router_deployment: str,
        token: SecretStr | None = None,
    ) -> None:
        starting = Starting()
        self._settings = settings
        self._token = token
        self._context = serve.get_replica_context()
        self.replica_id: str = self._context.replica_id.unique_id
        join_serve_logs(settings.telemetry)
        self._tracer = open_tracer(settings.telemetry, "paceline-target", self.replica_id)
        self._proposer: RemoteProposer | None = None
        self._pool: DraftPool | None = None
        self._watch: ReplicaWatch | None = None
        self._idle = IdleWatch()
        self._feeds = Feeds()
        self._ranks: Ranks | None = None
        self._ranks = await Ranks.start(settings.target, settings.model)
        try:
            await self._set_up(draft_deployment)
        except BaseException:
            if self._ranks is not None:
                await self._ranks.stop()
            raise
        self._exchange = Exchange(
            self.replica_id,
            self._loop,
            lambda on_change: ServePeers(self._context, self._model.kv_identity, router_deployment, on_change),
            within_s=settings.sessions.handoff_timeout_s,
            grace_s=settings.target.drain_timeout_s,
            note_left=note_left(self._context.app_name, self.replica_id, ClusterKeyValue()),
        )
        host = own_host(settings.target.host)
        self._feed_server, self._feed_address = await start_feed_server(self._feeds, host, settings.target.port)
        goals = resolved(settings.autoscaling, cpu=settings.target.on_cpu)
        assert goals.itl_s != "auto"
        self._report = TargetReport(self.replica_id, self._loop.engine, goals.itl_s, starting.done())

    async def _set_up(self, draft_deployment: str | None) -> None:
        self._model = await loading(self._ranks, asyncio.to_thread(_load, self._settings, self._ranks))
        if draft_deployment is not None:
            self._watch_drafts(draft_deployment)
        started = asyncio.to_thread(_start, self._model, self._proposer, self._settings)
        self._loop = await loading(self._ranks, started)
        if self._ranks is not None:
            await self._ranks.watch(self._loop.abandon)

    def _watch_drafts(self, deployment: str) -> None:
        speculation = self._settings.speculation
        self._proposer = RemoteProposer(
            speculation.draft_timeout_ms / 1000,
            ahead=speculation.draft_ahead_tokens,
            rejection=speculation.verification == "rejection",
        )
        hello = Hello(self.replica_id, self._settings.model, self._model.fingerprint)
        credentials = DraftCredentials.of(self._settings.draft.security, self._token)
        self._pool = DraftPool(self._proposer, hello, credentials)
        self._watch = ReplicaWatch(self._context.app_name, deployment, "address", self._pool.set_members)

    async def generate(self, request: Request, route: Route | None = None, router: str = "") -> AsyncIterator[Frame]:
        """Accepted, then a delta per step, here or in the feed that `router` has; or a Failure. Closing the generator
        frees everything at once.

        `route` says why the request came here, as whoever routed it filled it in.
        """
        request = replace(request, params=request.params.with_seed())
        with (
            Generation.begin(self._tracer, request, self.replica_id) as generation,
            self._exchange.streams.open(generation.request) as stream,
            self._carried(stream, router) as feed,
        ):
            try:
                began = time.time_ns()
                if await self._exchange.arrival(request.session_id):
                    generation.waited(began)
                sink = generation.hearing(stream.sink(feed))
                await asyncio.wrap_future(self._loop.submit(generation.request, sink))
                yield self._accepted(request, route, fed=feed is not None)
                while (frame := await stream.frames.get()) is not None:
                    yield frame
                    if isinstance(frame, Failure):
                        generation.note(frame)
                        break
            except PacelineError as error:
                stream.left = 0
                generation.note(Failure.of(error))
                yield Failure.of(error, self.replica_id)
            finally:
                if stream.left:
                    self._loop.abort(request.request_id, request.params.n)

    async def abort(self, request_id: str) -> bool:
        """End a request with FinishReason.ABORT; whether it ran here."""
        ran = False
        for stream in self._exchange.streams.named(request_id):
            ran |= await asyncio.wrap_future(self._loop.end(stream.request.request_id, stream.request.params.n))
        return ran

    def _carried(self, stream: OpenStream, router: str) -> AbstractContextManager[Mailbox[Named] | None]:
        """The feed that the frames of this stream go to, if the router has one; a loss of it ends the stream."""
        streams = self._exchange.streams
        return self._feeds.carrying(router, lambda: streams.fail(stream, FEED_LOST, self.replica_id))

    def _accepted(self, request: Request, route: Route | None, *, fed: bool) -> Accepted:
        assert request.params.seed is not None
        reason = route.told_by(self.replica_id) if route is not None else ""
        tokens = len(request.token_ids)
        return Accepted(self.replica_id, request.params.seed, tokens, reason, self._feed_address, fed)

    async def sessions(self) -> list[tuple[str, str, int, bool, int, str]]:
        """(session, replica, tokens held, running, their bytes, tier) of every session held here."""
        return [
            (each.session_id, self.replica_id, each.tokens, each.running, each.num_bytes, each.tier)
            for each in await self._sessions()
        ]

    async def close_session(self, session_id: str) -> bool:
        """Drop a session's idle KV; whether there was any."""
        engine = self._loop.engine
        return await asyncio.wrap_future(self._loop.call(lambda: engine.drop_session(session_id)))

    async def room(self) -> Room | None:
        """What another replica may hand over to this one; None if it leaves itself."""
        return await self._exchange.room()

    async def expect(self, move: Move) -> None:
        """Sessions are on their way to this replica."""
        self._exchange.expect(move)

    async def receive(self, bound: Bound, parts: list[KVPart]) -> Receipt | None:
        """Take what another replica hands over; None if it is not for this one."""
        return await self._exchange.take(parts) if bound.replica == self.replica_id else None

    async def hand_off(
        self, bound: Bound, sessions: Sequence[str] | None, count: int, to: str | None
    ) -> Outcome | None:
        """Hand these sessions, or those used last, at most `count`, to another replica; None if it is not for this
        one."""
        return await self._exchange.give(sessions, count, to) if bound.replica == self.replica_id else None

    def record_replica_metadata(self) -> dict[str, Any]:
        """Captured once, after `__init__`."""
        return {KV_IDENTITY: self._model.kv_identity}

    async def status(self) -> dict[str, Any]:
        """Numbers about this replica, for /status, /metrics and `paceline status`."""
        numbers: dict[str, Any] = {
            "replica_id": self.replica_id,
            "pid": os.getpid(),
            **whereabouts(),
            **status_of(self._loop.engine),
            "routers_fed": len(self._feeds.routers),
            "drafters_connected": 0,
            "speculation": self._speculation(),
            **self._report.status(),
            "handoff": self._exchange.numbers(),
            "warnings": list(self._warnings()),
            **ranks_status(self._settings.target, self._ranks),
        }
        if self._proposer is not None and self._pool is not None:
            sent, received = self._proposer.traffic()
            numbers["drafters_connected"] = len(self._proposer.link_ids)
            numbers["drafters_known"] = len(self._pool.members)
            numbers["drafter_problems"] = self._problems()
            numbers["draft_bytes_sent"] = sent
            numbers["draft_bytes_received"] = received
        return numbers

    def _speculation(self) -> dict[str, Any]:
        """What became of candidates since the start; read by `paceline.api.metrics` and `paceline status`."""
        settings, tally = self._settings.speculation, self._loop.engine.tally
        # Much of what a drafter sends goes to waste before the engine sees it.
        unseen = self._proposer.stats.wasted if self._proposer is not None else 0
        sources = merged((tally.sources(), (SourceMetrics(Source.REMOTE, wasted=unseen),) if unseen else ()))
        return {
            "enabled": settings.enabled,
            "verification": settings.verification,
            "synthetic_acceptance": settings.synthetic_acceptance,
            "sources": {
                each.source: {"drafted": each.drafted, "accepted": each.accepted, "wasted": each.wasted}
                for each in sources
            },
            "late": tally.late,
        }

    def _warnings(self) -> tuple[str, ...]:
        settings, engine = self._settings.speculation, self._loop.engine
        speculator = engine.speculator
        return self._idle.look(
            Facts(
                engine.tally,
                enabled=settings.enabled,
                lookup=settings.prompt_lookup_num_tokens > 0,
                drafts_wanted=self._pool is not None,
                drafters_connected=len(self._proposer.link_ids) if self._proposer is not None else 0,
                problems=self._problems(),
                rests=speculator is not None and all(speculator.policy.rests(kind) for kind in Kind),
                synthetic_acceptance=settings.synthetic_acceptance,
            )
        )

    def _problems(self) -> str:
        return "; ".join(f"{name}: {why}" for name, why in self._pool.problems.items()) if self._pool else ""

    async def record_routing_stats(self) -> dict[str, Any]:
        """Polled by the controller, pushed to every SessionRouter. No timestamps: a change is a broadcast."""
        self._warnings()  # so that what is wrong is logged without anybody asking
        kv = self._loop.engine.kv
        # Replicas that share a folder would all claim what is on disk.
        held = [each.session_id for each in await self._sessions() if each.tier != "disk"]
        sessions = held[-MAX_ADVERTISED_SESSIONS:]
        recent = await asyncio.wrap_future(self._loop.call(lambda: kv.recent(MAX_ADVERTISED_ENTRIES)))
        return {"sessions": sorted(sessions), "prefixes": await asyncio.to_thread(sketch, recent)}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Polled by Serve for the policy, `paceline.autoscaling`: a `TargetLoad`'s numbers."""
        return self._report.load().numbers()

    def check_health(self) -> None:
        if self._ranks is not None:
            self._ranks.check_health()
        if not self._loop.healthy:
            raise RuntimeError("the engine's thread has ended")

    async def __del__(self) -> None:
        """Awaited by Serve on a graceful shutdown, after the last request."""
        if hasattr(self, "_exchange"):  # it may be called while __init__ is still loading
            await self._exchange.finish()
        if hasattr(self, "_feed_server"):
            await self._feed_server.stop(grace=None)
        if self._watch is not None:
            self._watch.stop()
        if self._pool is not None:
            await self._pool.close()
        if hasattr(self, "_loop"):
            await asyncio.to_thread(self._loop.stop)
        if self._ranks is not None:
            await self._ranks.stop()
        if hasattr(self, "_tracer"):
            await asyncio.to_thread(self._tracer.close)

    async def _sessions(self) -> list[SessionKV]:
        """The engine's thread alone may look."""
        return await asyncio.wrap_future(self._loop.call(self._loop.engine.sessions))


def _load(settings: AppSettings, ranks: Ranks | None) -> LoadedModel:
    from paceline.engine.load import load_model

    leader = ranks.leader if ranks is not None else None
    return load_model(resolve(settings.model).path, rank_engine(settings.target), leader)


def _start(model: LoadedModel, proposer: RemoteProposer | None, settings: AppSettings) -> EngineLoop:
    from paceline.engine.loop import EngineLoop

    engine = model.engine(
        proposer, settings.speculation, sessions=settings.sessions, max_queued_prefill_s=MAX_QUEUED_PREFILL_S
    )
    return EngineLoop(engine)
