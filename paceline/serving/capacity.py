"""Whether a replica that is wanted and does not run can be started at all, and what it waits for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.autoscaling.snapshot import Pool
from paceline.config import AppSettings, DraftSettings, TargetSettings
from paceline.serving.bundles import bundle

Resources = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the cluster has. `nodes` run; `pending` is what was asked for and has no place on them; `refused` what its
    autoscaler says it cannot provide, now or ever; None if there is no autoscaler."""

    nodes: tuple[Resources, ...]
    pending: tuple[Resources, ...] = ()
    refused: tuple[Resources, ...] | None = None


def cluster_capacity() -> Capacity:
    """Of the Ray cluster this process belongs to. Blocks for some milliseconds."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    nodes = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(address=ray.get_runtime_context().gcs_address).get_cluster_status())
    demand, state = reply.cluster_resource_state, reply.autoscaling_state
    pending = _bundles(
        (each.request for each in demand.pending_resource_requests), demand.pending_gang_resource_requests
    )
    if not state.autoscaler_state_version:
        return Capacity(nodes, pending)
    refused = _bundles(state.infeasible_resource_requests, state.infeasible_gang_resource_requests)
    return Capacity(nodes, pending, refused)


def _bundles(requests: Iterable[Any], gangs: Iterable[Any]) -> tuple[Resources, ...]:
    """Of single requests, and of those that are placed together."""
    together = (request for gang in gangs for request in gang.requests)
    return tuple(dict(request.resources_bundle) for request in (*requests, *together))


def missing(pool: Pool, settings: AppSettings, wanted: int, running: int, capacity: Capacity) -> str:
    """Why `wanted` replicas of a pool are not there yet, in one line that names the remedy; empty if none of them waits
    for a place: it is starting."""
    replica: TargetSettings | DraftSettings = settings.target if pool is Pool.TARGET else settings.draft
    asked = bundle(replica)
    if asked not in capacity.pending:
        return ""
    begin = f"{running} of {wanted} {pool.value} replicas run, and one more needs {_words(asked, replica)}"
    known = any(_fits(asked, node) for node in capacity.nodes)
    most = f"autoscaling.{pool.value}.max_replicas"
    if capacity.refused is None:
        if known:
            return f"{begin}: every node that has that is full; add nodes or lower {most}"
        return f"{begin}: no node of the cluster has that; lower {_keys(pool, asked, capacity.nodes)} or add such nodes"
    if asked not in capacity.refused:
        return f"{begin}: waiting for a node"
    if known:
        return f"{begin}: the cluster's autoscaler starts no more nodes; raise its limits or lower {most}"
    keys = _keys(pool, asked)
    return f"{begin}: no node that the cluster's autoscaler may start has that; lower {keys} or add such a kind"


def _fits(asked: Resources, node: Resources) -> bool:
    return all(node.get(name, 0.0) >= amount for name, amount in asked.items())


def _words(asked: Resources, replica: TargetSettings | DraftSettings) -> str:
    each = " and ".join(f"{amount:g} {name}{'s' if amount != 1 else ''}" for name, amount in asked.items()) or "nothing"
    size = replica.engine.tensor_parallel_size
    return each if size == 1 else f"{each} for each of {size} ranks"


def _keys(pool: Pool, asked: Resources, nodes: Sequence[Resources] = ()) -> str:
    """The settings that ask for more than any node has; all of them if that is not known or no single one does."""
    own = {"CPU": f"{pool.value}.num_cpus", "GPU": f"{pool.value}.num_gpus"}
    names = {name: own.get(name, f"{pool.value}.resources.{name}") for name in asked}
    most = {name: max((node.get(name, 0.0) for node in nodes), default=amount) for name, amount in asked.items()}
    over = [names[name] for name, amount in asked.items() if amount > most[name]]
    return " and ".join(over or [names[name] for name in asked])
