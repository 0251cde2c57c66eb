"""Whether a replica that is wanted and does not run can be started at all, and what it waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paceline.autoscaling.snapshot import Pool
from paceline.config import AppSettings, DraftSettings, TargetSettings
from paceline.serving.bundles import bundle

Resources = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the cluster has. `nodes` run; `groups` are the kinds of node that an autoscaler may start, None if there is
    no autoscaler."""

    nodes: tuple[Resources, ...]
    groups: tuple[Resources, ...] | None = None

    @property
    def kinds(self) -> tuple[Resources, ...]:
        return (*self.nodes, *(self.groups or ()))


def cluster_capacity() -> Capacity:
    """Of the Ray cluster this process belongs to. Blocks for some milliseconds."""
    import ray
    from ray._private.state import state

    nodes = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
    config = state.get_cluster_config()
    if config is None:
        return Capacity(nodes)
    return Capacity(nodes, tuple(dict(group.resources) for group in config.node_group_configs if group.max_count))


def missing(pool: Pool, settings: AppSettings, wanted: int, running: int, capacity: Capacity) -> str:
    """Why `wanted` replicas of a pool are not there yet, in one line that names the remedy."""
    replica: TargetSettings | DraftSettings = settings.target if pool is Pool.TARGET else settings.draft
    asked = bundle(replica)
    begin = f"{running} of {wanted} {pool.value} replicas run, and one more needs {_words(asked, replica)}"
    if not any(_fits(asked, kind) for kind in capacity.kinds):
        where = "no node of the cluster has that" if capacity.groups is None else "no node that has that can be started"
        return f"{begin}: {where}; lower {_keys(pool, asked, capacity.kinds)} or add such nodes"
    if capacity.groups is None:
        return f"{begin}: every node that has that is full; add nodes or lower autoscaling.{pool.value}.max_replicas"
    return f"{begin}: waiting for a node"


def _fits(asked: Resources, node: Resources) -> bool:
    return all(node.get(name, 0.0) >= amount for name, amount in asked.items())


def _words(asked: Resources, replica: TargetSettings | DraftSettings) -> str:
    each = " and ".join(f"{amount:g} {name}{'s' if amount != 1 else ''}" for name, amount in asked.items()) or "nothing"
    size = replica.engine.tensor_parallel_size
    return each if size == 1 else f"{each} for each of {size} ranks"


def _keys(pool: Pool, asked: Resources, kinds: Sequence[Resources]) -> str:
    """The settings that ask for more than any node has; all of them if no single one does."""
    names = {"CPU": f"{pool.value}.num_cpus", "GPU": f"{pool.value}.num_gpus"}
    most = {name: max((kind.get(name, 0.0) for kind in kinds), default=0.0) for name in asked}
    over = [names[name] for name, amount in asked.items() if amount > most[name]]
    return " and ".join(over or [names[name] for name in asked])
