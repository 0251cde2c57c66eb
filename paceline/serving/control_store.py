"""Ray's control store, asked directly: who asks needs its address, and no Ray of its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from typing import Any

from paceline.errors import Unavailable
from paceline.serving.journal import NAMESPACE

TIMEOUT_S = 5.0


class ControlStore:
    """Of the cluster at `address`. Calls block for milliseconds, and for `TIMEOUT_S` at most before they raise.

    Nodes go by their ids in hexadecimal digits. Ray's other identifications, such as its token, are the environment's.
    """

    def __init__(self, address: str) -> None:
        """Raises Unavailable if nobody listens there: Ray's client would try for minutes, and then end the process."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        _knock(address)
        self._client: Any = GcsClient(address=address)

    def nodes(self) -> dict[str, Any]:
        """Ray's own record of each, also of those that have gone."""
        return {key.hex(): info for key, info in self._client.get_all_node_info(timeout=TIMEOUT_S).items()}

    def draining(self) -> dict[str, int]:
        """Deadlines of nodes that drain, in milliseconds since 1970."""
        found: Mapping[str, int] = self._client.get_draining_nodes(timeout=TIMEOUT_S)
        return dict(found)

    def free(self) -> dict[str, dict[str, float]]:
        """What nobody has reserved of the resources of each."""
        usage = self._client.get_all_resource_usage(timeout=TIMEOUT_S).resource_usage_data.batch
        return {each.node_id.hex(): dict(each.resources_available) for each in usage}

    def actors(self, node_id: str) -> list[str]:
        """Names of those that live on a node."""
        found = asyncio.run(self._actors())
        return [each.name for each in found.values() if each.address.node_id.hex() == node_id]

    async def _actors(self) -> Mapping[Any, Any]:
        found: Mapping[Any, Any] = await self._client.async_get_all_actor_info(
            actor_state_name="ALIVE", timeout=TIMEOUT_S
        )
        return found

    def drain(self, node_id: str, deadline: float, why: str) -> tuple[bool, str]:
        """Have a node drain until then, in seconds since 1970; whether Ray does, and if not, why."""
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION  # the other reason is refused by a node that is not idle
        accepted, refusal = self._client.drain_node(node_id, reason, why, int(deadline * 1000), timeout=TIMEOUT_S)
        return bool(accepted), " ".join(str(refusal).split())

    def get(self, key: str) -> bytes | None:
        """What this package keeps under `key`."""
        found: bytes | None = self._client.internal_kv_get(key.encode(), NAMESPACE, timeout=TIMEOUT_S)
        return found


def _knock(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise Unavailable(f"no Ray cluster answers at {address}: {error}") from None
