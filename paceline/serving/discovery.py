"""Who the replicas of a deployment are now, pushed by Serve's controller.

The long poll is private to Ray Serve, but it is what Ray's own LLM serving uses: the replica set arrives
within milliseconds of a change, with what each replica put into its metadata.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping

import ray
from ray.serve._private.common import DeploymentID, DeploymentTargetInfo
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.long_poll import LongPollClient, LongPollNamespace

logger = logging.getLogger(__name__)


class ReplicaWatch:
    """Calls `on_change` in the current event loop with {replica id: metadata[key]} at every change."""

    def __init__(self, app: str, deployment: str, key: str, on_change: Callable[[Mapping[str, str]], None]) -> None:
        self._key = key
        self._on_change = on_change
        watched = (LongPollNamespace.DEPLOYMENT_TARGETS, DeploymentID(name=deployment, app_name=app))
        self._client = LongPollClient(
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE),
            {watched: self._changed},
            call_in_event_loop=asyncio.get_running_loop(),
            client_id=f"{type(self).__name__}:{deployment}:{os.getpid()}",
        )

    def stop(self) -> None:
        self._client.stop()

    def _changed(self, info: DeploymentTargetInfo) -> None:
        replicas = {r.replica_id.unique_id: (r.replica_metadata or {}).get(self._key) for r in info.running_replicas}
        self._on_change({name: value for name, value in replicas.items() if value})
