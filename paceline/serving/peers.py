"""The other replicas of a deployment, and the routers, over Serve handles."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import ReplicaContext
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from paceline.errors import Unavailable
from paceline.serving.calls import ask_all, call_alone
from paceline.serving.discovery import ReplicaWatch
from paceline.serving.handoff import Peers
from paceline.sessions.handoff import Bound, Move, Receipt, Room

if TYPE_CHECKING:
    from paceline.engine.kv_parts import KVPart

SEND_TIMEOUT_S = 5.0
"""For one message to be written at the other end; a peer that takes longer counts as lost."""
KV_IDENTITY = "kv_identity"
"""Key of a replica's metadata: replicas with the same value compute the same keys and values from a text."""


class ServePeers(Peers):
    """Watches the replica set, itself included.

    `on_change` hears whether this replica belongs to it, whenever that changes. It is how a replica learns that it
    leaves; from then on it gets no new request. Without a `router` nobody is told where sessions go.
    """

    def __init__(
        self,
        context: ReplicaContext,
        identity: str,
        router: str | None = None,
        on_change: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._app, self._deployment, self._router = context.app_name, context.deployment, router
        self._own, self._identity = context.replica_id.unique_id, identity
        self._on_change = on_change
        self._handles: dict[str, DeploymentHandle] = {}
        self._members: Mapping[str, str] = {}
        self._watch = ReplicaWatch(self._app, self._deployment, KV_IDENTITY, self._changed)

    def stop(self) -> None:
        self._watch.stop()

    async def rooms(self) -> list[Room]:
        if not self._alike():
            return []
        answers: list[Room | None] = await ask_all(await self._handle(self._deployment), "room")
        return [room for room in answers if room is not None and room.replica in self._alike()]

    async def announce(self, moves: Sequence[Move]) -> None:
        if self._router is not None:
            await ask_all(await self._handle(self._router), "moved", list(moves))

    async def send(self, replica: str, parts: Sequence[KVPart]) -> Receipt:
        if replica not in self._alike():
            raise Unavailable("it has left")
        targets = await self._handle(self._deployment)
        stored = await asyncio.to_thread(ray.put, list(parts))
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                receipt: Receipt | None = await call_alone(targets, "receive", Bound(replica), stored)
        except (RayError, RayServeException, TimeoutError) as error:
            raise Unavailable(f"it does not answer: {type(error).__name__}") from error
        if receipt is None:
            raise Unavailable("it is gone")
        return receipt

    def _alike(self) -> set[str]:
        """Living peers whose KV means the same."""
        return {name for name, identity in self._members.items() if identity == self._identity and name != self._own}

    def _changed(self, members: Mapping[str, str]) -> None:
        was, self._members = self._own in self._members, members
        if was != (self._own in members):
            self._on_change(not was)

    async def _handle(self, deployment: str) -> DeploymentHandle:
        """Made when it is needed: it asks the controller, which must not hold up the event loop."""
        if deployment not in self._handles:
            self._handles[deployment] = await asyncio.to_thread(serve.get_deployment_handle, deployment, self._app)
        return self._handles[deployment]
