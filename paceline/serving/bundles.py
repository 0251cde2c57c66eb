"""What Ray reserves for a replica: resources of its own, or a bundle for each rank; and what is refused before it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from paceline.config import AppSettings, DraftSettings, TargetSettings
from paceline.errors import ConfigError, ModelError
from paceline.models import load_config, resolve

logger = logging.getLogger("ray.serve")

NODE_GROUP = "ray.io/node-group"
"""Label of nodes that an autoscaler or an operator started: there may be more of them, and others, later."""
HEALTH_CHECK_PERIOD_S = 2.0
RANKS_HEALTH_CHECK_PERIOD_S = 1.0
"""Serve acts on the third check that fails. A replica of several ranks fails more often, and takes its host with it."""

Node = Mapping[str, Any]
"""An entry of `ray.nodes()`."""


def options(settings: TargetSettings | DraftSettings) -> dict[str, Any]:
    """Of a deployment, in Ray Serve's words."""
    own: dict[str, Any] = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus}
    if settings.resources:
        own["resources"] = dict(settings.resources)
    size = settings.engine.tensor_parallel_size
    if size == 1:
        return {"ray_actor_options": own, "health_check_period_s": HEALTH_CHECK_PERIOD_S}
    return {
        "ray_actor_options": own,
        "placement_group_bundles": [bundle(settings)] * size,
        # Ranks on sockets sum in shared memory; those on GPUs may be on several hosts, if one has too few.
        "placement_group_strategy": "PACK" if settings.num_gpus else "STRICT_PACK",
        "health_check_period_s": RANKS_HEALTH_CHECK_PERIOD_S,
    }


def check(settings: AppSettings, nodes: Sequence[Node] | None = None) -> None:
    """Raise ConfigError for ranks that cannot work: with the settings, the model or the nodes of the cluster, if known.

    A model that is not on this machine is left to the replicas.
    """
    checked: list[tuple[str, TargetSettings | DraftSettings, str]] = [("target", settings.target, settings.model)]
    if settings.draft_replicas.most:
        checked.append(("draft", settings.draft, settings.draft_model))
    for role, replica, model in checked:
        if replica.engine.tensor_parallel_size > 1:
            _check_resources(role, replica)
            if nodes is not None:
                _check_nodes(role, replica, nodes)
            _check_model(role, model, replica.engine.tensor_parallel_size)


def _check_resources(role: str, settings: TargetSettings | DraftSettings) -> None:
    size, gpus = settings.engine.tensor_parallel_size, settings.num_gpus
    if gpus < 1 and (gpus > 0 or settings.engine.device == "cuda"):
        raise ConfigError(
            f"{role}.num_gpus: {size} ranks on GPUs need one each, and {gpus:g} is reserved for a rank; set "
            f"{role}.num_gpus to 1",
            param=f"{role}.num_gpus",
        )
    if not bundle(settings):
        raise ConfigError(
            f"{role}.num_cpus: nothing is reserved for a rank, so that Ray cannot place {size} of them; set it to the "
            "cores of a rank",
            param=f"{role}.num_cpus",
        )


def _check_model(role: str, model: str, size: int) -> None:
    from paceline.models.sharding import check_size

    try:
        config = load_config(resolve(model, download=False).path)
    except ModelError:
        return
    try:
        check_size(config, size)
    except (ConfigError, ModelError) as error:
        key = f"{role}.engine.tensor_parallel_size"
        why = error.message.removeprefix(f"{error.param}: ")
        raise ConfigError(f"{key}: {why}", param=key) from None


def _check_nodes(role: str, settings: TargetSettings | DraftSettings, nodes: Sequence[Node]) -> None:
    alive = [node for node in nodes if node["Alive"]]
    problem = _gpu_problem(role, settings, alive) if settings.num_gpus else _cpu_problem(role, settings, alive)
    if problem is None:
        return
    if any(NODE_GROUP in node.get("Labels", {}) for node in alive):
        logger.warning("%s; waiting for nodes that can", problem.message)
        return
    raise problem


def _cpu_problem(role: str, settings: TargetSettings | DraftSettings, nodes: Sequence[Node]) -> ConfigError | None:
    size = settings.engine.tensor_parallel_size
    wanted, largest = size * settings.num_cpus, max((_has(node, "CPU") for node in nodes), default=0.0)
    if wanted <= largest:
        return None
    return ConfigError(
        f"{role}.num_cpus: {size} ranks with {settings.num_cpus:g} CPUs each must be on one host, and no node of the "
        f"cluster has {wanted:g}; the largest has {largest:g}: lower {role}.num_cpus or "
        f"{role}.engine.tensor_parallel_size",
        param=f"{role}.num_cpus",
    )


def _gpu_problem(role: str, settings: TargetSettings | DraftSettings, nodes: Sequence[Node]) -> ConfigError | None:
    size = settings.engine.tensor_parallel_size
    rank = bundle(settings)
    room = sum(int(min(_has(node, name) / amount for name, amount in rank.items())) for node in nodes)
    if size <= room:
        return None
    gpus = sum(_has(node, "GPU") for node in nodes)
    return ConfigError(
        f"{role}.engine.tensor_parallel_size: {size} ranks with {settings.num_gpus:g} GPUs and {settings.num_cpus:g} "
        f"CPUs each, and the cluster, with {gpus:g} GPUs on {len(nodes)} nodes, has room for {room}: lower it, or add "
        "nodes",
        param=f"{role}.engine.tensor_parallel_size",
    )


def bundle(settings: TargetSettings | DraftSettings) -> dict[str, float]:
    """Of one rank, without zeros."""
    wanted = {"CPU": settings.num_cpus, "GPU": settings.num_gpus, **settings.resources}
    return {name: amount for name, amount in wanted.items() if amount}


def _has(node: Node, name: str) -> float:
    return float(node["Resources"].get(name, 0.0))
